"""The command `syncbn-runs`: list, compare and plot the runs in some directories.

Imports neither torch nor Hydra, so that it answers at once.
"""

import argparse
import csv
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from syncbn.errors import ConfigError
from syncbn.train.run.comparison import (
    STATUSES,
    Group,
    Run,
    default_metric,
    differing_keys,
    find_runs,
    group_runs,
    metric_of,
)
from syncbn.train.run.plots import plot_groups, plot_runs
from syncbn.train.run.report import duration, is_share

_NAME_MIN = 24

_DESCRIPTION = """\
List, compare and plot the runs of syncbn-train: every directory with a config.yaml, or with a
result.json alone where a job of a sweep was refused, at most two levels below each PATH.

status is what the run's result.json says: finished, failed or interrupted. Where there is none:
  starting  its lock is held, as far as this machine can tell, and it loads its data and model
  running   its lock is held, and it trains; with the steps made, and the time left until the last
  unknown   its lock is free: it was killed, most likely
and a run with a file that cannot be read is damaged. duration is that of the last attempt."""

_EPILOG = """\
examples:
  syncbn-runs                                     what is in runs
  syncbn-runs runs/sweep --status failed          what went wrong
  syncbn-runs runs/sweep --by norm.name data.batch_size
                                                  mean ± standard deviation over seeds
  syncbn-runs runs/sweep --by norm.name --metric val_loss --at last --csv -
  syncbn-runs runs/sweep --by norm.name data.batch_size --plot accuracy.png"""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: over the cells.
        values: as they go into a CSV file.
        cells: as they are shown; None where they are not.
    """

    title: str
    values: Sequence[Any]
    cells: Sequence[str] | None


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
    except ConfigError as error:
        print(f"syncbn-runs: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
        default=[],
        metavar="KEY",
        help="group by these keys of the configuration; n counts the finished runs (with --status, "
        "those of that status) that have a finite value, over everything else, such as seeds",
    )
    parser.add_argument(
        "--metric",
        help="a key of metrics.jsonl, or test_… of the exported models (default: val_accuracy, or "
        "what the runs' task has in its place)",
    )
    parser.add_argument(
        "--at",
        choices=("best", "last"),
        default="best",
        help="the metric in which epoch: the best by validation, or the last (default: best)",
    )
    parser.add_argument("--status", choices=STATUSES, help="only runs of this status")
    parser.add_argument(
        "--csv", metavar="FILE", help="write the table with full precision; -: print it instead"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw the metric over the epochs, or, with --by, over the last key",
    )
    return parser


def _answer(arguments: argparse.Namespace) -> None:
    by, at = arguments.by, arguments.at
    runs = find_runs(arguments.paths)
    metric: str = arguments.metric or default_metric(runs)
    for run in runs:
        for damage in run.damage:
            print(f"syncbn-runs: warning: {run.name} is damaged: {damage}", file=sys.stderr)
    metrics = {key for run in runs for each in (*run.epochs, run.tests) for key in each} - {"time"}
    if metrics:
        _check("metric", metric, metrics)
    for key in by:
        _check("key", key, {key for run in runs for key in run.config})
    chosen = [run for run in runs if arguments.status in (None, run.status)]
    groups = group_runs(chosen, by, metric, at, arguments.status or "finished") if by else []
    table = _group_table(groups, by, metric, at) if by else _run_table(chosen, metric, at)
    if arguments.plot is not None:
        try:
            if by:
                plot_groups(groups, by, metric, at, arguments.plot)
            else:
                plot_runs(chosen, metric, arguments.plot)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--plot {arguments.plot}: {error}") from error
    if arguments.csv == "-":
        _write_csv(table, sys.stdout)
        return
    if arguments.csv is not None:
        try:
            with Path(arguments.csv).open("w", newline="") as stream:
                _write_csv(table, stream)
        except OSError as error:
            raise ConfigError(f"--csv {arguments.csv}: {error}") from error
    if not chosen:
        print(f"none of {len(runs)} runs is {arguments.status}")
        return
    _print_table(table)
    failures = [run for run in chosen if run.error] if not by else []
    print("\n" * bool(failures), end="")
    for run in failures:
        print(f"{run.name}: {_plain(run.error)}")


def _check(kind: str, name: str, valid: set[str]) -> None:
    if name not in valid:
        raise ConfigError(f"unknown {kind} {name!r}; valid: {', '.join(sorted(valid))}")


def _run_table(runs: Sequence[Run], metric: str, at: str) -> list[Column]:
    names, statuses = [run.name for run in runs], [run.status for run in runs]
    done = [len(run.epochs) for run in runs]
    planned = [run.config.get("epochs", "?") for run in runs]
    chosen = [metric_of(run, metric, at) for run in runs]
    losses = [metric_of(run, "train_loss", "last") for run in runs]
    seconds = [run.duration_s for run in runs]
    return [
        Column("run", names, names),
        Column("status", statuses, [_status(run) for run in runs]),
        Column("epochs_done", done, [f"{n}/{all_}" for n, all_ in zip(done, planned, strict=True)]),
        Column(f"{at}_{metric}", chosen, [_measure(metric, value) for value in chosen]),
        Column("last_train_loss", losses, [_measure("train_loss", value) for value in losses]),
        Column("duration_s", seconds, [duration(value) for value in seconds]),
        Column("reason", [run.reason for run in runs], None),
        Column("error", [run.error for run in runs], None),
        *(_key_column(key, [run.config.get(key) for run in runs]) for key in differing_keys(runs)),
    ]


def _status(run: Run) -> str:
    """Return a run's status, and how far it is while it runs."""
    progress = run.progress
    if run.status != "running" or progress is None or progress.total_steps is None:
        return run.status
    left = progress.time_left_s
    doing = progress.phase if left is None else f"{duration(left)} left"
    return f"running: step {progress.step} of {progress.total_steps}, {doing}"


def _group_table(groups: Sequence[Group], by: Sequence[str], metric: str, at: str) -> list[Column]:
    means, stdevs = [group.mean for group in groups], [group.stdev for group in groups]
    shown = [_measure(metric, group.mean, group.stdev) for group in groups]
    return [
        *(_key_column(key, [group.key[i] for group in groups]) for i, key in enumerate(by)),
        _key_column("n", [group.n for group in groups]),
        Column(f"{at}_{metric}_mean", means, shown),
        Column(f"{at}_{metric}_stdev", stdevs, None),
        _key_column("failed", [group.failed for group in groups]),
    ]


def _key_column(title: str, values: Sequence[Any]) -> Column:
    return Column(title, values, [_plain(value) for value in values])


def _plain(value: Any) -> str:
    """Return a value on one line; "–" for none."""
    return "–" if value is None else " ".join(str(value).split())


def _measure(metric: str, *values: float) -> str:
    """Return a metric, or its mean ± its deviation, to a few digits; shares in percent."""
    percent = is_share(metric)
    scale, digits = (100, ".2f") if percent else (1, ".4g")
    shown = ["–" if math.isnan(value) else format(scale * value, digits) for value in values]
    return " ± ".join(shown) + (" %" if percent else "")


def _write_csv(table: Sequence[Column], stream: TextIO) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(column.title for column in table)
    writer.writerows(zip(*(column.values for column in table), strict=True))


def _print_table(table: Sequence[Column]) -> None:
    """Print what is shown; on a terminal, within its width."""
    shown = [column for column in table if column.cells is not None]
    texts = [any(isinstance(value, str) for value in column.values) for column in shown]
    rows = list(zip(*([column.title, *(column.cells or [])] for column in shown), strict=True))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if limit is not None:
        widths[0] = min(widths[0], max(_NAME_MIN, limit - sum(2 + width for width in widths[1:])))
    for row in rows:
        cells = [
            f"{_shorten(cell, width):{'<' if text else '>'}{width}}"
            for cell, width, text in zip(row, widths, texts, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        print(line if limit is None or len(line) <= limit else f"{line[: limit - 1]}…")


def _shorten(text: str, width: int) -> str:
    """Return a text without some of its middle: names of runs differ at both ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


if __name__ == "__main__":
    main()
