"""What one run tells about itself: its records, its curves as a picture, its end in a few lines.

Whatever is missing or damaged in its directory is left out: a report never ends a run.
"""

import json
import math
import os
import statistics
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

# Colours that Okabe and Ito chose for all kinds of colour vision.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#666666"

PICTURE = "curves.png"
_EMA = "ema_"
# Losses that span more than this factor are told apart only on a logarithmic axis.
_LOG_SPAN = 20
# Up to so many epochs, each is marked by a point.
_MARKED_EPOCHS = 30
_TITLE_WIDTH = 100
_THIN: dict[str, Any] = {
    "color": SKY,
    "linewidth": 0.7,
    "alpha": 0.7,
    "markersize": 1.5,
    "label": "training, some steps",
}


def read_records(file: Path) -> tuple[list[Record], str | None]:
    """Return the JSON objects of a file, one a line, and what is wrong with it.

    A file that does not exist has none. A last line that was cut short, by a kill or because it is
    being written, is passed over, and nothing is wrong with that.

    Args:
        file: metrics.jsonl or steps.jsonl of a run.

    Returns:
        The objects that could be read, oldest first, and a description of the damage or None.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"cannot read {file}: {error.strerror}"
    records: list[Record] = []
    damaged: list[int] = []
    for index, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            value = ...
        if isinstance(value, dict):
            records.append(value)
        elif value is not None and index < len(lines):
            damaged.append(index)
    if not damaged:
        return records, None
    plural = "s" if len(damaged) > 1 else ""
    shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
    return records, f"line{plural} {shown} of {file} cannot be read as JSON objects"


def read_result(file: Path) -> tuple[Record | None, str | None]:
    """Return how the last attempt at a run ended, and what is wrong with the file that says so.

    Args:
        file: result.json of a run.

    Returns:
        The object, or None where there is none, and a description of the damage or None.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"cannot read {file}: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return None, f"{file} is not JSON: {error}"
    if not isinstance(value, dict) or not isinstance(value.get("status"), str):
        return None, f"{file} does not say a status"
    return value, None


def number(record: Mapping[str, Any], key: str) -> float:
    """Return a value of a record; NaN where it is missing, no number, or not finite.

    Args:
        record: a line of metrics.jsonl or steps.jsonl.
        key: the value's name.
    """
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer beyond the largest float
        return math.nan


def best_epoch(epochs: Sequence[Record], prefix: str = "") -> Record | None:
    """Return the epoch of highest test accuracy; of equals, that of lowest test loss.

    Args:
        epochs: the lines of metrics.jsonl.
        prefix: "ema_" judges the averaged weights.

    Returns:
        The epoch's line, or None where no epoch has an accuracy.
    """

    def quality(record: Record) -> tuple[float, float]:
        loss = number(record, f"{prefix}test_loss")
        accuracy = number(record, f"{prefix}test_accuracy")
        return accuracy, -math.inf if math.isnan(loss) else -loss

    judged = [record for record in epochs if not math.isnan(quality(record)[0])]
    return max(judged, key=quality, default=None)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as "3 min 07 s"; "–" for none.

    Args:
        seconds: the duration; NaN or 0 where it was not measured.
    """
    if not seconds > 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def plot_curves(run_path: Path) -> Path:
    """Draw a run's losses, accuracies and learning rate over its epochs, as they are so far.

    Args:
        run_path: the run's directory.

    Returns:
        The picture, curves.png in that directory, which appears whole or not at all.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second
    from matplotlib.ticker import MaxNLocator

    epochs, _ = read_records(run_path / "metrics.jsonl")
    steps, _ = read_records(run_path / "steps.jsonl")
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels: dict[str, Axes] = figure.subplot_mosaic(
        [["loss", "accuracy"], ["lr", "lr"]], height_ratios=[3.2, 1]
    )
    _draw_losses(panels["loss"], epochs, steps)
    _draw_accuracies(panels["accuracy"], epochs, steps)
    _draw_rate(panels["lr"], epochs, steps)
    for panel in panels.values():
        panel.set_xlabel("epoch")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        tidy(panel)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
        elif not panel.lines:
            panel.text(
                0.5, 0.5, "nothing measured yet", transform=panel.transAxes, ha="center", color=GREY
            )
    title = "\n".join(textwrap.wrap(run_path.resolve().name, _TITLE_WIDTH))
    figure.suptitle(title, fontsize=11, parse_math=False)
    file = run_path / PICTURE
    save(figure, file)
    return file


def _draw_losses(panel: "Axes", epochs: Sequence[Record], steps: Sequence[Record]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    _draw(panel, steps, "loss", **_THIN)
    _draw(panel, epochs, "train_loss", label="training, mean of the epoch", color=BLUE)
    _draw(panel, epochs, "test_loss", label="test", color=VERMILLION)
    _draw(panel, epochs, f"{_EMA}test_loss", label="test, averaged weights", color=GREEN)
    names = ("train_loss", "test_loss", f"{_EMA}test_loss")
    everything = [number(record, name) for record in epochs for name in names]
    everything += [number(record, "loss") for record in steps]
    losses = [loss for loss in everything if not math.isnan(loss)]
    if losses and min(losses) > 0 and max(losses) > _LOG_SPAN * min(losses):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel("cross-entropy / nats")


def _draw_accuracies(panel: "Axes", epochs: Sequence[Record], steps: Sequence[Record]) -> None:
    from matplotlib.ticker import PercentFormatter

    _draw(panel, steps, "accuracy", **_THIN)
    _draw(panel, epochs, "train_accuracy", label="training, mean of the epoch", color=BLUE)
    _draw(panel, epochs, "test_accuracy", label="test", color=VERMILLION)
    _draw(panel, epochs, f"{_EMA}test_accuracy", label="test, averaged weights", color=GREEN)
    prefix = _prefix(epochs)
    best = best_epoch(epochs, prefix)
    if best is not None:
        accuracy = number(best, f"{prefix}test_accuracy")
        panel.plot(
            [number(best, "epoch")],
            [accuracy],
            "*",
            color=BLACK,
            markersize=10,
            label=f"best: {accuracy:.2%} after epoch {best.get('epoch', '?')}",
        )
    panel.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    panel.set_ylabel("accuracy")


def _draw_rate(panel: "Axes", epochs: Sequence[Record], steps: Sequence[Record]) -> None:
    # An epoch's line has only the rate at its end.
    _draw(panel, steps or epochs, "lr", color=PURPLE, markersize=1.5)
    panel.set_ylabel("learning rate")
    panel.set_ylim(bottom=0)


def _draw(panel: "Axes", records: Sequence[Record], key: str, **style: Any) -> None:
    """Draw a value over the epochs, with gaps where it is missing; nothing where it always is."""
    points = [(number(record, "epoch"), number(record, key)) for record in records]
    seen = [point for point in points if not any(map(math.isnan, point))]
    if seen:
        # A line of a single point, or between gaps, is visible by its markers alone.
        few = len(points) <= _MARKED_EPOCHS
        style = {"marker": "o" if few else None, "markersize": 3, **style}
        panel.plot([x for x, _ in points], [y for _, y in points], **style)


def tidy(panel: "Axes") -> None:
    """Leave of a panel's frame what is needed to read values.

    Args:
        panel: what is changed.
    """
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)


def save(figure: "Figure", file: Path) -> None:
    """Write a picture that appears whole or not at all.

    Args:
        figure: the picture.
        file: where it goes; the suffix, such as .png, says the format.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib does not know the format.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        kind = file.suffix.lstrip(".").lower() or "png"
        with warnings.catch_warnings():
            # A letter of a name that the font lacks becomes a box.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(temporary, format=kind, dpi=120, facecolor="white")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def summarise(run_path: Path) -> str:
    """Return a few aligned lines on how a run ended and what it left, for its terminal.

    Args:
        run_path: the run's directory.
    """
    epochs, _ = read_records(run_path / "metrics.jsonl")
    result, _ = read_result(run_path / "result.json")
    last = epochs[-1] if epochs else {}
    done = f"{_count(last, 'epoch', ' epoch')}, {_count(last, 'step', ' step')}"
    lines = {"status": f"{result['status'] if result else 'has not ended'} after {done}"}
    if result and result.get("error"):
        lines["error"] = str(result["error"])
    prefix = _prefix(epochs)
    best = best_epoch(epochs, prefix)
    if best is not None:
        lines["best"] = f"epoch {_count(best, 'epoch')}: {_quality(best, prefix)}"
        exported = (result or {}).get("metrics")
        if isinstance(exported, dict) and exported:
            # Statistics recalibrated after the last epoch make the exported model another one.
            said = _quality(exported, prefix)
            if said != _quality(best, prefix):
                lines["exported"] = said
    if epochs:
        train_loss = f"training loss {number(last, 'train_loss'):.4f}"
        lines["last"] = f"epoch {_count(last, 'epoch')}: {_quality(last, prefix)}, {train_loss}"
    speeds = [number(record, "images_per_s") for record in epochs]
    speeds = [speed for speed in speeds if not math.isnan(speed)]
    time = [duration(number(result or {}, "duration_s"))]
    if speeds:
        time.append(f"{statistics.median(speeds):.0f} images/s")
    lines["time"] = ", ".join(time)
    places = {"bundle": "bundle", "checkpoints": "checkpoints", "picture": PICTURE}
    for name, place in places.items():
        if (run_path / place).exists():
            lines[name] = _shorter(run_path / place)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _prefix(epochs: Sequence[Record]) -> str:
    """Return what the names of the exported model's metrics begin with."""
    return _EMA if any(f"{_EMA}test_accuracy" in record for record in epochs) else ""


def _count(record: Record, key: str, unit: str = "") -> str:
    """Return a whole number, with the plural of its unit if that has one."""
    value = number(record, key)
    count = 0 if math.isnan(value) else round(value)
    return f"{count}{unit}{'s' if unit and count != 1 else ''}"


def _quality(record: Record, prefix: str) -> str:
    accuracy, loss = (number(record, f"{prefix}test_{name}") for name in ("accuracy", "loss"))
    of = " of the averaged weights" if prefix else ""
    return f"test accuracy{of} {100 * accuracy:.2f} %, test loss {loss:.4f}"


def _shorter(path: Path) -> str:
    return min(str(path.resolve()), os.path.relpath(path), key=len)
