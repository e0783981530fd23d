"""Pictures of runs: one run's curves, a metric of several runs, and of groups of runs.

Imports matplotlib only to draw, which takes a second.
"""

import io
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from syncbn.errors import ConfigError
from syncbn.train.run.comparison import CONFIG_FILE, Group, Run, order, read_settings
from syncbn.train.run.report import Record, is_share, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors that Okabe and Ito chose for all kinds of color vision.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"]
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.prop_cycle": f"cycler(linestyle=['-', '--', ':']) * cycler(color={_COLORS})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#dddddd",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.5,
    "lines.markersize": 4,
    "savefig.dpi": 120,
    "text.parse_math": False,  # names of runs may hold a $
}
# Directories of any run: of the only job of a sweep, and of a job of the service.
_NAMES_OF_ANY = ("defaults", "run")
# Losses that span more than this factor are told apart only on a logarithmic axis.
_LOG_SPAN = 20
# As many as differ in color or line.
_LEGEND_MAX = 3 * len(_COLORS)


def plot_curves(run_path: Path) -> Path:
    """Draw a run's losses, its metric and learning rate over its epochs, as they are so far.

    Args:
        run_path: the run's directory.

    Returns:
        The picture, curves.png in that directory.

    Raises:
        OSError: the picture cannot be written.
    """
    epochs, _ = read_records(run_path / "metrics.jsonl")
    steps, _ = read_records(run_path / "steps.jsonl")
    file = run_path / "curves.png"
    # Looking for margins takes as long as a small run trains, and these fit all curves.
    with _drawing(file, 15, 4.5, layout=None) as figure:
        figure.subplots_adjust(left=0.06, right=0.985, bottom=0.12, top=0.9, wspace=0.22)
        figure.suptitle(title(run_path.resolve()))
        panels: Sequence[Axes] = figure.subplots(1, 3)
        metric = _metric_of(epochs)
        for panel, name in zip(panels, ("loss", metric), strict=False):
            for key, label in (
                (f"train_{name}", "training, mean of the epoch"),
                (f"val_{name}", "validation"),
                (f"ema_val_{name}", "validation, averaged weights"),
                (f"test_{name}", "test"),  # of earlier versions
                (f"ema_test_{name}", "test, averaged weights"),
            ):
                _draw(panel, epochs, key, label=label, marker="o")
            thin = {"linewidth": 0.7, "color": "#aaaaaa", "zorder": 1}
            _draw(panel, steps, name, label="training, some steps", **thin)
            _label(panel, name)
            if panel.lines:
                panel.legend()
        # An epoch's line has only the rate at its end.
        _draw(panels[2], steps or epochs, "lr", marker=None if steps else "o")
        _label(panels[2], "learning rate")
        panels[2].set_ylim(bottom=0)
    return file


def title(run_path: Path) -> str:
    """Return what a picture of a run is called: by its directory, and the job's name if need be.

    Args:
        run_path: the run's directory.
    """
    try:
        job = str(read_settings(run_path / CONFIG_FILE).get("name", ""))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        job = ""
    if run_path.name in _NAMES_OF_ANY:
        return job or run_path.name
    return run_path.name if job in run_path.name else f"{job}, {run_path.name}"


def warm_up() -> None:
    """Load matplotlib and its fonts, for the processes that are forked from this one."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().set_title("text")
    figure.savefig(io.BytesIO())


def plot_runs(runs: Sequence[Run], metric: str, file: Path) -> None:
    """Draw a metric over the epochs, a line for each run.

    Args:
        runs: what is drawn.
        metric: a key of metrics.jsonl.
        file: the picture; its suffix says the format.

    Raises:
        ConfigError: no run has the metric.
        OSError: the picture cannot be written.
        ValueError: matplotlib does not know the format.
    """
    shown = [run for run in runs if any(metric in epoch for epoch in run.epochs)]
    if not shown:
        raise ConfigError(f"nothing to plot: none of {len(runs)} runs has the metric {metric}")
    with _drawing(file, 9, 4.5, legend=len(shown)) as figure:
        panel = figure.subplots()
        for run in shown:
            _draw(panel, run.epochs, metric, label=run.name, marker="o")
        _label(panel, metric)


def plot_groups(
    groups: Sequence[Group], by: Sequence[str], metric: str, at: str, file: Path
) -> None:
    """Draw means with their deviations over the last key, a line for each value of the others.

    Args:
        groups: what is drawn.
        by: the keys by which the runs were grouped.
        metric: a key of metrics.jsonl.
        at: in which epoch it is: "best" or "last".
        file: the picture; its suffix says the format.

    Raises:
        ConfigError: no group has the metric.
        OSError: the picture cannot be written.
        ValueError: matplotlib does not know the format.
    """
    shown = [group for group in groups if group.n]
    if not shown:
        raise ConfigError(f"nothing to plot: no group has a run with the metric {metric}")
    lines: dict[tuple[Any, ...], list[Group]] = {}
    for group in shown:
        lines.setdefault(group.key[:-1], []).append(group)
    # Not by their size, which 0 and texts do not have on a logarithmic axis.
    places = sorted({group.key[-1] for group in shown}, key=lambda value: order([value]))
    # There is nothing between two texts.
    style: Any = {"linestyle": "none"} if any(isinstance(place, str) for place in places) else {}
    with _drawing(file, 9, 4.5, legend=len(lines) if len(by) > 1 else 0) as figure:
        panel = figure.subplots()
        for index, (key, members) in enumerate(lines.items()):
            # Side by side, so that no bar hides another.
            shift = (index - (len(lines) - 1) / 2) * min(0.06, 0.6 / len(lines))
            panel.errorbar(
                [places.index(group.key[-1]) + shift for group in members],
                [group.mean for group in members],
                [group.stdev for group in members],
                label=", ".join(f"{k}={v}" for k, v in zip(by, key, strict=False)),
                marker="o",
                capsize=4,
                **style,
            )
        panel.set_xticks(range(len(places)), [str(place) for place in places])
        counts = sorted({group.n for group in shown})
        n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        figure.suptitle(f"mean ± standard deviation in the {at} epoch, n = {n}")
        _label(panel, metric, over=by[-1])


def _metric_of(epochs: Sequence[Record]) -> str:
    """Return the metric by which a run's epochs are compared, without the name of a split."""
    names = [name.removeprefix("train_") for epoch in epochs for name in epoch]
    known = ("accuracy", "mean_iou")
    found = [name for name in names if f"train_{name}" in epochs[-1] and name != "loss"]
    return next((name for name in known if name in found), found[0] if found else known[0])


@contextmanager
def _drawing(
    file: Path,
    width: float,
    height: float,
    legend: int = 0,
    layout: Literal["constrained"] | None = "constrained",
) -> Generator["Figure"]:
    """Give a figure to draw on, and write it with a legend of so many lines below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        if not 0 < legend <= _LEGEND_MAX:
            legend = 0
        figure = Figure(figsize=(width, height + 0.2 * legend), layout=layout)
        yield figure
        if legend:
            figure.legend(loc="outside lower center")
        # Under another name first, so that nobody finds half a picture.
        temporary = file.with_name(f".{file.name}")
        try:
            figure.savefig(temporary)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _draw(panel: "Axes", records: Sequence[Record], key: str, **style: Any) -> None:
    """Draw a value over the epochs, with gaps where it is missing; nothing where it always is."""
    if any(key in record for record in records):
        xs = [record.get("epoch", math.nan) for record in records]
        panel.plot(xs, [record.get(key, math.nan) for record in records], **style)


def _label(panel: "Axes", name: str, over: str = "epoch") -> None:
    """Say what the axes are, and scale them for it."""
    panel.set_ylabel(name.replace("_", " ") + (" / nats" if name.endswith("loss") else ""))
    panel.set_xlabel(over)
    if over == "epoch":
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", integer=True, min_n_ticks=1)
    if is_share(name):
        panel.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
    drawn = [y for line in panel.lines for y in cast(list[float], line.get_ydata()) if y > 0]
    if name.endswith("loss") and drawn and max(drawn) > _LOG_SPAN * min(drawn):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
