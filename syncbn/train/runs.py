"""The command `syncbn-runs`: list, compare and plot the runs in some directories.

Imports neither torch nor Hydra, so that it answers at once.
"""

import argparse
import csv
import difflib
import fcntl
import io
import json
import math
import os
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from syncbn.errors import ConfigError
from syncbn.train.report import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Record,
    best_epoch,
    duration,
    number,
    read_records,
    read_result,
    save,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATUSES = ("finished", "failed", "interrupted", "running", "unknown", "damaged")
# Where a run lies is no part of what it trained.
_PLACES = {"run_root", "run_dir", "sweep_dir"}
_LEVELS = 2
_RECENT_S = 300
_NAME_MIN = 24
_LEGEND_MAX = 12
# Values of an axis that span at least this factor are spread by their logarithms.
_LOG_SPAN = 4
_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 10 times as fast, where it is there

_DESCRIPTION = f"""\
List, compare and plot the runs of syncbn-train: every directory with a config.yaml, or with a
result.json alone where a job of a sweep was refused, at most {_LEVELS} levels below each PATH.

status is what the run's result.json says: finished, failed or interrupted. Where there is none:
  running   its lock is held on this machine, or it wrote within the last {_RECENT_S // 60} minutes
  unknown   otherwise: it was killed, most likely
and a run with a file that cannot be read is damaged."""

_EPILOG = """\
examples:
  syncbn-runs                                     what is in runs, the newest last
  syncbn-runs runs/sweep --status failed          what went wrong
  syncbn-runs runs/sweep --by norm.name data.batch_size
                                                  mean ± standard deviation over seeds
  syncbn-runs runs/sweep --by norm.name --metric test_loss --at last --csv -
  syncbn-runs runs/sweep --by norm.name data.batch_size --plot accuracy.png"""


@dataclass(frozen=True)
class Run:
    """A run as its directory tells it.

    Attributes:
        path: the directory.
        name: the directory's name, below the path that was searched.
        config: the resolved configuration by dotted keys; empty where it cannot be read.
        epochs: the lines of metrics.jsonl.
        status: one of `STATUSES`.
        error: why it did not finish, or None.
        duration_s: seconds that the last attempt took; NaN where it has not ended.
        started: when the last attempt began, in seconds since 1970.
        damage: what cannot be read.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    epochs: Sequence[Record]
    status: str
    error: str | None
    duration_s: float
    started: float
    damage: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Runs that agree in some keys.

    Attributes:
        key: their values of these keys.
        values: the metric of each run that counts and has it.
        failed: how many runs failed.
        unfinished: how many neither finished nor failed.
    """

    key: tuple[Any, ...]
    values: tuple[float, ...]
    failed: int
    unfinished: int

    @property
    def mean(self) -> float:
        """The mean; NaN of no values."""
        return statistics.mean(self.values) if self.values else math.nan

    @property
    def stdev(self) -> float:
        """The sample standard deviation; NaN of fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: over the cells, in one or two lines.
        cells: as they are shown.
        right: whether they are aligned to the right.
    """

    title: str
    cells: Sequence[str]
    right: bool = True


@dataclass(frozen=True)
class Table:
    """Rows as they are shown, and as exact values.

    Attributes:
        columns: what is shown.
        optional: how many of the last columns may be left out for want of room.
        exact: each column of the CSV file, with its header.
    """

    columns: Sequence[Column]
    optional: int
    exact: Sequence[tuple[str, Sequence[Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    """List, group, export or plot runs as the command line says.

    Args:
        argv: its arguments; those of the process where None.

    Raises:
        SystemExit: with code 2 where the arguments are wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        _answer(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"syncbn-runs: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "syncbn-runs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        default=[Path("runs")],
        help="a run, a sweep, or a directory of them; before --by (default: runs)",
    )
    parser.add_argument(
        "--by",
        nargs="+",
        metavar="KEY",
        help="group by these keys of the configuration; n counts the finished runs (with --status, "
        "those of that status) that have a finite value, over everything else, such as seeds",
    )
    parser.add_argument(
        "--metric",
        default="test_accuracy",
        help="a key of metrics.jsonl (default: test_accuracy)",
    )
    parser.add_argument(
        "--at",
        choices=("best", "last"),
        default="best",
        help="the metric in which epoch: best, that of the highest test_accuracy (for metrics "
        "ema_…: ema_test_accuracy), or the last (default: best)",
    )
    parser.add_argument("--status", choices=STATUSES, help="only runs of this status")
    parser.add_argument(
        "--csv", metavar="FILE", help="write the table with full precision; -: print it instead"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw the metric over the epochs, or, with one or two keys of --by, over the last key",
    )
    return parser


def _answer(arguments: argparse.Namespace) -> None:
    runs = find_runs(arguments.paths)
    for run in runs:
        for damage in run.damage:
            _note(f"warning: {run.name} is damaged: {damage}")
    metrics = sorted({key for run in runs for record in run.epochs for key in record})
    if metrics:
        _check("metric", arguments.metric, metrics)
    by: list[str] = arguments.by or []
    if arguments.plot is not None and len(by) > 2:
        raise ConfigError(f"--plot draws one or two keys of --by, got {len(by)}: {' '.join(by)}")
    for key in by:
        _check("key", key, sorted({key for run in runs for key in run.config}))
    chosen = [run for run in runs if arguments.status in (None, run.status)]
    if by:
        counted = arguments.status or "finished"
        groups = group_runs(chosen, by, arguments.metric, arguments.at, counted)
        table = _group_table(groups, by, arguments.metric, arguments.at)
    else:
        groups = []
        table = _run_table(chosen, arguments.metric, arguments.at)
    if arguments.plot is not None:
        if by:
            figure = _draw_groups(groups, by, arguments.metric, arguments.at)
        else:
            figure = _draw_runs(chosen, arguments.metric)
        _write_plot(figure, arguments.plot)
    if arguments.csv == "-":
        print(_csv(table), end="")
        return
    if arguments.csv is not None:
        try:
            Path(arguments.csv).write_text(_csv(table), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--csv: cannot write {arguments.csv}: {error.strerror}") from error
        _note(f"wrote {arguments.csv}")
    if not chosen:
        print(f"none of {len(runs)} runs is {arguments.status}")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(_text(table, width))
    failures = [run for run in chosen if run.error] if not by else []
    if failures:
        print()
    for run in failures:
        print(f"{_plain(run.name)}: {_plain(run.error)}")


def _note(text: str) -> None:
    print(f"syncbn-runs: {text}", file=sys.stderr)


def _check(kind: str, name: str, valid: Sequence[str]) -> None:
    """Raise where a name is not one of the valid ones."""
    if name in valid:
        return
    # A section's name is what tells its choices apart.
    close = [f"{name}.name"] if f"{name}.name" in valid else []
    close = close or difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if kind == "key" and Path(name).exists():
        hint = "paths come before --by; "
    raise ConfigError(f"unknown {kind} {name!r}; {hint}valid: {', '.join(valid) or 'none'}")


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs at and below some paths, each once, the newest last.

    Args:
        paths: runs, or directories of them or of sweeps.

    Raises:
        ConfigError: a path is no directory, or holds no run.
    """
    names: dict[Path, tuple[Path, Path]] = {}
    for root in paths:
        if not root.is_dir():
            wrong = "is not a directory" if root.exists() else "does not exist"
            raise ConfigError(f"{root} {wrong}; name a run, a sweep, or a directory of them")
        found = list(_run_directories(root, _LEVELS))
        if not found:
            raise ConfigError(
                f"{root} holds no run: no config.yaml in it or at most {_LEVELS} levels below; "
                "name a run, a sweep, or a directory of them"
            )
        for path in found:
            names.setdefault(path.resolve(), (path, root))
    short = [_name(path, root) for path, root in names.values()]
    # Sweeps name their jobs alike.
    unique = len(set(short)) == len(short)
    runs = [
        _read(path, _name(path, root) if unique else str(path)) for path, root in names.values()
    ]
    return sorted(runs, key=lambda run: (run.started, run.name))


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path != root else path.resolve().name


def _run_directories(directory: Path, levels: int) -> Iterator[Path]:
    try:
        inside = sorted(directory.iterdir())
        if any(entry.name in ("config.yaml", "result.json") for entry in inside):
            yield directory
            return
        below = [entry for entry in inside if entry.is_dir()] if levels else []
    except OSError as error:
        _note(f"warning: cannot look into {directory}: {error.strerror}")
        return
    for entry in below:
        yield from _run_directories(entry, levels - 1)


def _read(path: Path, name: str) -> Run:
    config, *damage = _read_config(path / "config.yaml")
    epochs, wrong = read_records(path / "metrics.jsonl")
    damage.append(wrong)
    result, wrong = read_result(path / "result.json")
    status: str = result["status"] if result else "unknown"
    if result and status not in STATUSES:
        wrong = f"{path / 'result.json'} says the status {status!r}"
    damage.append(wrong)
    if any(damage):
        status = "damaged"
    elif result is None and _is_running(path):
        status = "running"
    result = result or {}
    error = result.get("error")
    return Run(
        path,
        name,
        config,
        epochs,
        status,
        None if error is None else str(error),
        number(result, "duration_s"),
        _modified(path / "config.yaml") or _modified(path / "result.json"),
        tuple(each for each in damage if each),
    )


def _read_config(file: Path) -> tuple[dict[str, Any], str | None]:
    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), _LOADER)  # noqa: S506 -- a safe one
        if not isinstance(loaded, dict):
            return {}, f"{file} is not a configuration"
        return _flatten(loaded), None
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"cannot read {file}: {error.strerror}"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, f"{file} is not YAML: {' '.join(str(error).split())}"


def _flatten(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            plain = value is None or isinstance(value, str | int | float)
            flat[f"{prefix}{key}"] = value if plain else json.dumps(value, default=str)
    return flat


def _is_running(path: Path) -> bool:
    files = ("config.yaml", "metrics.jsonl", "steps.jsonl")
    if time.time() - max(_modified(path / file) for file in files) < _RECENT_S:
        return True
    try:
        with (path / ".lock").open() as stream:
            # Let go at once; who wants the lock just then tries again for seconds.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or this file system has none
        pass
    return False


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the dotted keys in which runs differ, in the configuration's order, sections first.

    Keys that some choices of a section have and others have not, such as norm.eps, count only
    where their values differ: the section's name says the rest.

    Args:
        runs: what to compare; those without a configuration are passed over.
    """
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _PLACES)

    def values(key: str) -> set[Any]:
        return {repr(config[key]) for config in configs if key in config}

    def differs(key: str) -> bool:
        if len(values(key)) > 1:
            return True
        implied = len(values(f"{key.partition('.')[0]}.name")) > 1
        return not implied and any(key not in config for config in configs)

    # What is right of all, such as the seed, is what a narrow terminal shows last.
    return sorted(filter(differs, keys), key=lambda key: "." not in key)


def metric_of(run: Run, metric: str, at: str) -> float:
    """Return a metric of one epoch of a run; NaN where there is none.

    Args:
        run: the run.
        metric: a key of metrics.jsonl.
        at: "best", the epoch of highest test accuracy, or "last".
    """
    if at == "last":
        return number(run.epochs[-1], metric) if run.epochs else math.nan
    return number(best_epoch(run.epochs, "ema_" if metric.startswith("ema_") else "") or {}, metric)


def group_runs(
    runs: Sequence[Run], by: Sequence[str], metric: str, at: str, counted: str = "finished"
) -> list[Group]:
    """Return the runs' metric grouped by their values of some keys, in the order of these values.

    Damaged runs, and those without a configuration, are left out, with a warning.

    Args:
        runs: what to group.
        by: dotted keys.
        metric: a key of metrics.jsonl.
        at: "best" or "last", as for `metric_of`.
        counted: the status of the runs whose metric counts.
    """
    members: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.damage or not run.config:
            _note(f"warning: {run.name} is left out of the groups: {run.error or 'damaged'}")
        else:
            members.setdefault(tuple(run.config.get(key) for key in by), []).append(run)
    groups: list[Group] = []
    for key in sorted(members, key=lambda values: [_order(value) for value in values]):
        mine = members[key]
        found = [metric_of(run, metric, at) for run in mine if run.status == counted]
        values = tuple(value for value in found if not math.isnan(value))
        failed = sum(run.status == "failed" for run in mine)
        finished = sum(run.status == "finished" for run in mine)
        groups.append(Group(key, values, failed, len(mine) - failed - finished))
    return groups


def _order(value: Any) -> tuple[int, float, str]:
    """Return what sorts numbers by size, after what is missing and before texts."""
    if value is None:
        return 0, 0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0, str(value))


def _run_table(runs: Sequence[Run], metric: str, at: str) -> Table:
    keys = differing_keys(runs)
    chosen = [metric_of(run, metric, at) for run in runs]
    losses = [metric_of(run, "train_loss", "last") for run in runs]
    done = [len(run.epochs) for run in runs]
    planned = [run.config.get("epochs", "?") for run in runs]
    columns = [
        Column("run", [run.name for run in runs], right=False),
        Column("status", [run.status for run in runs], right=False),
        Column("done", [f"{n}/{total}" for n, total in zip(done, planned, strict=True)]),
        Column(f"{at}\n{metric}", [_measure(value, metric) for value in chosen]),
        Column("last\ntrain_loss", [_measure(value, "train_loss") for value in losses]),
        Column("duration", [duration(run.duration_s) for run in runs]),
        *(_key_column(key, [run.config.get(key) for run in runs]) for key in keys),
    ]
    exact = [
        ("run", [run.name for run in runs]),
        ("status", [run.status for run in runs]),
        ("epochs_done", done),
        (f"{at}_{metric}", chosen),
        ("last_train_loss", losses),
        ("duration_s", [run.duration_s for run in runs]),
        ("error", [run.error for run in runs]),
        *((key, [run.config.get(key) for run in runs]) for key in keys),
    ]
    return Table(columns, len(keys), exact)


def _group_table(groups: Sequence[Group], by: Sequence[str], metric: str, at: str) -> Table:
    keys = [(key, [group.key[i] for group in groups]) for i, key in enumerate(by)]
    counts = [
        ("n", [len(group.values) for group in groups]),
        ("failed", [group.failed for group in groups]),
        ("unfinished", [group.unfinished for group in groups]),
    ]
    shown = [_measure(group.mean, metric, group.stdev) for group in groups]
    columns = [
        *(_key_column(key, values) for key, values in keys),
        *(Column(title, [str(count) for count in values]) for title, values in counts[:1]),
        Column(f"{at}\n{metric}", shown),
        *(Column(title, [str(count) for count in values]) for title, values in counts[1:]),
    ]
    exact = [
        *keys,
        *counts[:1],
        (f"{at}_{metric}_mean", [group.mean for group in groups]),
        (f"{at}_{metric}_stdev", [group.stdev for group in groups]),
        *counts[1:],
    ]
    return Table(columns, 0, exact)


def _key_column(key: str, values: Sequence[Any]) -> Column:
    right = all(value is None or isinstance(value, int | float) for value in values)
    return Column(key, [_plain(value) for value in values], right)


def _plain(value: Any) -> str:
    """Return a value on one line, without what would control a terminal; "–" for none."""
    if value is None:
        return "–"
    text = " ".join(_exact(value).split())
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _exact(value: Any) -> str:
    """Return a value as in a CSV file: numbers so that the same are read back."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def _measure(mean: float, metric: str, stdev: float | None = None) -> str:
    """Return a metric to a few digits, accuracies in percent."""
    if math.isnan(mean):
        return "–"
    percent = metric.endswith("accuracy")
    text = f"{100 * mean:.2f}" if percent else f"{mean:.4g}"
    if stdev is not None and not math.isnan(stdev):
        text += f" ± {100 * stdev:.2f}" if percent else f" ± {stdev:.2g}"
    elif stdev is not None:
        text += " ± – "
    return f"{text} %" if percent else text


def _csv(table: Table) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header for header, _ in table.exact)
    for row in zip(*(values for _, values in table.exact), strict=True):
        writer.writerow(_exact(value) for value in row)
    return stream.getvalue()


def _text(table: Table, width: int | None) -> str:
    """Return a table as lines, no longer than a width if there is one."""
    kept = list(table.columns)
    first = Column(kept[0].title, [_plain(cell) for cell in kept[0].cells], kept[0].right)
    omitted: list[str] = []
    full = _width(first)
    room = full
    if width is not None:
        while True:
            room = width - sum(2 + _width(column) for column in kept[1:])
            if room >= min(full, _NAME_MIN) or len(omitted) == table.optional:
                break
            omitted.insert(0, kept.pop().title)
        room = min(full, max(room, _NAME_MIN // 2))
    kept[0] = replace(first, cells=[_shorten(cell, room) for cell in first.cells])
    titles = [column.title.rpartition("\n") for column in kept]
    heads = [[title[0] for title in titles], [title[2] for title in titles]]
    rows = [*heads[not any(heads[0]) :], *zip(*(column.cells for column in kept), strict=True)]
    lines: list[str] = []
    for row in rows:
        cells = [
            cell.rjust(_width(column)) if column.right else cell.ljust(_width(column))
            for cell, column in zip(row, kept, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        lines.append(line if width is None or len(line) <= width else f"{line[: width - 1]}…")
    if omitted:
        note = f"no room for {', '.join(omitted)}; --csv - shows all"
        lines += ["", *textwrap.wrap(note, width or 80)]
    return "\n".join(lines)


def _width(column: Column) -> int:
    return max(map(len, [*column.title.split("\n"), *column.cells]))


def _shorten(text: str, width: int) -> str:
    """Return a text without some of its middle: names of runs differ at both ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _write_plot(figure: "Figure", file: Path) -> None:
    kinds = figure.canvas.get_supported_filetypes()
    kind = file.suffix.lstrip(".").lower()
    if kind not in kinds:
        raise ConfigError(f"--plot: {file} should end in .png, or one of .{', .'.join(kinds)}")
    try:
        save(figure, file)
    except OSError as error:
        raise ConfigError(f"--plot: cannot write {file}: {error.strerror}") from error
    _note(f"wrote {file}")


def _draw_runs(runs: Sequence[Run], metric: str) -> "Figure":
    """Draw a metric over the epochs, a line for each run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # takes a second
    from matplotlib.ticker import MaxNLocator

    lines: list[tuple[str, list[tuple[float, float]]]] = []
    keys = differing_keys(runs)
    labels = ["  ".join(f"{key}={_plain(run.config.get(key))}" for key in keys) for run in runs]
    for run, label in zip(runs, labels, strict=True):
        points = [(number(record, "epoch"), number(record, metric)) for record in run.epochs]
        if not all(math.isnan(y) for _, y in points):
            # Runs of the same configuration are told apart by their names.
            own = label if labels.count(label) == 1 else f"{label}  {_plain(run.name)}"
            lines.append((_shorten(own.strip(), 100), points))
    if not lines:
        raise ConfigError(f"nothing to plot: none of {len(runs)} runs has the metric {metric}")
    legend = len(lines) <= _LEGEND_MAX
    columns = max(1, min(4, 115 // (max(len(label) for label, _ in lines) + 6)))
    rows = math.ceil(len(lines) / columns) if legend else 0
    figure = Figure(figsize=(9, 4.6 + 0.2 * rows), layout="constrained")
    panel: Axes = figure.subplots()
    for place, (label, points) in enumerate(lines):
        style: dict[str, Any] = {"color": _COLOURS[place % len(_COLOURS)], "label": label}
        style |= {"linestyle": "--" if place >= len(_COLOURS) else "-", "linewidth": 1.4}
        if not legend:
            shade = place / (len(lines) - 1)
            style = {"color": colormaps["viridis"](0.92 * shade), "linewidth": 0.9, "alpha": 0.8}
        few = len(points) <= 30
        panel.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker="o" if few else None,
            markersize=3,
            **style,
        )
    panel.set_xlabel("epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _label_metric(panel, metric)
    tidy(panel)
    if legend:
        box = figure.legend(
            loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=2.4
        )
        for text in box.get_texts():
            text.set_parse_math(False)
    order = "" if legend else ", from the oldest (dark) to the newest (bright)"
    one = len(lines) == 1
    figure.suptitle(f"{_words(metric)} of {len(lines)} run{'' if one else 's'}{order}", fontsize=11)
    return figure


def _draw_groups(groups: Sequence[Group], by: Sequence[str], metric: str, at: str) -> "Figure":
    """Draw means with their deviations over the last key, a line for each value of the first."""
    from matplotlib.figure import Figure  # takes a second

    drawn = [group for group in groups if group.values]
    if not drawn:
        raise ConfigError(f"nothing to plot: no group has a run with the metric {metric}")
    places, in_a_row = _places([group.key[-1] for group in drawn])
    span = max(places.values()) - min(places.values()) or 1
    lines: dict[Any, list[Group]] = {}
    for group in drawn:
        lines.setdefault(group.key[0] if len(by) == 2 else None, []).append(group)
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panel: Axes = figure.subplots()
    # Side by side, so that no error bar hides another, or the values beside it.
    step = min(0.024, 0.2 / len(lines)) * span
    for index, (value, members) in enumerate(lines.items()):
        shift = (index - (len(lines) - 1) / 2) * step
        xs = [places[group.key[-1]] + shift for group in members]
        colour = _COLOURS[index % len(_COLOURS)]
        each = [
            (x + 0.4 * step, y) for x, group in zip(xs, members, strict=True) for y in group.values
        ]
        panel.plot(*zip(*each, strict=True), "o", color=colour, alpha=0.3, markersize=4, mew=0)
        panel.errorbar(
            xs,
            [group.mean for group in members],
            [0 if math.isnan(group.stdev) else group.stdev for group in members],
            marker="o",
            linestyle="none" if len(by) == 1 else "-" if index < len(_COLOURS) else "--",
            color=colour,
            capsize=4,
            markersize=6,
            label=f"{by[0]}={_plain(value)}",
        )
    labels = [_plain(value) for value in places]
    crowded = sum(map(len, labels)) > 80
    panel.set_xticks(list(places.values()), labels, rotation=30 if crowded else 0, parse_math=False)
    margin = 0.5 if in_a_row else 0.08 * span
    panel.set_xlim(min(places.values()) - margin, max(places.values()) + margin)
    panel.set_xlabel(by[-1], parse_math=False)
    _label_metric(panel, metric)
    tidy(panel)
    if len(by) == 2:
        box = figure.legend(
            loc="outside lower center", ncols=min(4, len(lines)), frameon=False, fontsize=9
        )
        for text in box.get_texts():
            text.set_parse_math(False)
    counts = {len(group.values) for group in drawn}
    n = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    figure.suptitle(
        f"{_words(metric)} in the {at} epoch: mean ± standard deviation of {n} "
        f"run{'' if counts == {1} else 's'} (pale)",
        fontsize=11,
    )
    return figure


def _places(values: Sequence[Any]) -> tuple[dict[Any, float], bool]:
    """Return where each value lies, and whether they are in a row instead of by their size.

    Numbers lie by their size, or by its logarithm where they are spread.
    """
    unique = sorted(set(values), key=_order)
    sizes = [value for value in unique if isinstance(value, int | float)]
    positive = [size for size in sizes if size > 0]
    spread = bool(positive) and max(positive) >= _LOG_SPAN * min(positive)
    flags = any(isinstance(value, bool) for value in unique)
    # 0 has no logarithm, and on a linear axis would crowd what is spread.
    if len(sizes) < len(unique) or flags or (spread and len(positive) < len(unique)):
        return {value: float(place) for place, value in enumerate(unique)}, True
    return {value: math.log2(value) if spread else float(value) for value in unique}, False


def _label_metric(panel: "Axes", metric: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if metric.endswith("accuracy"):
        panel.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    unit = " / nats" if metric.endswith("loss") else ""
    panel.set_ylabel(f"{_words(metric)}{unit}", parse_math=False)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


if __name__ == "__main__":
    main()
