"""Runs side by side: finding and reading them, the keys in which they differ, groups of them.

Imports neither torch nor Hydra, so that the command answers at once.
"""

import fcntl
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from syncbn.errors import ConfigError
from syncbn.train.run.report import ENDS, Record, best_epoch, read_records, read_result
from syncbn.train.run.status import Phase, Status, read_status
from syncbn.train.schema import PLACES

CONFIG_FILE = "config.yaml"
STATUSES = (*ENDS, "starting", "running", "unknown", "damaged")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 10 times as fast, where it is there

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run as its directory tells it.

    Attributes:
        name: its directory, below the one that holds all runs that were found.
        config: the resolved configuration by dotted keys; empty where it cannot be read.
        epochs: the lines of metrics.jsonl.
        status: one of `STATUSES`.
        error: why it did not finish, or None.
        reason: the code of why it ended, one of `syncbn.train.run.reasons`, or None.
        progress: how far it is, where it has not ended.
        duration_s: seconds that the last attempt took; NaN where it has not ended.
        tests: metrics of the exported model on the test data; empty before the run has finished.
        damage: what cannot be read.
    """

    name: str
    config: Mapping[str, Any]
    epochs: Sequence[Record]
    status: str
    error: str | None
    reason: str | None
    progress: Status | None
    duration_s: float
    tests: Mapping[str, float]
    damage: Sequence[str]


@dataclass(frozen=True)
class Group:
    """Runs that agree in some keys.

    Attributes:
        key: their values of these keys; None where a run does not have one.
        n: how many runs count.
        mean: of the metric over these; NaN where there is none.
        stdev: the sample standard deviation; NaN of fewer than two.
        failed: how many runs failed.
    """

    key: tuple[Any, ...]
    n: int
    mean: float
    stdev: float
    failed: int


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in some directories, or at most two levels below them, by name.

    Args:
        paths: runs, sweeps, or directories of them.

    Raises:
        ConfigError: a path is no directory, or holds no run.
    """
    every: dict[Path, None] = {}  # a set in order
    for root in paths:
        found = _run_directories(root)
        if not found:
            raise ConfigError(
                f"{root} {'holds no run' if root.is_dir() else 'is not a directory'}; "
                "name a run, a sweep, or a directory of them"
            )
        every |= dict.fromkeys(path.resolve() for path in found)
    common = os.path.commonpath([path.parent for path in every])
    return [_read(path, str(path.relative_to(common))) for path in every]


def _run_directories(root: Path) -> list[Path]:
    # A job of a sweep that was refused has a result alone.
    files = (CONFIG_FILE, "result.json")
    levels = ("", "*/", "*/*/")
    found = {each.parent for level in levels for file in files for each in root.glob(level + file)}
    return sorted(path for path in found if found.isdisjoint(path.parents))


def _read(path: Path, name: str) -> Run:
    damage: list[str] = []

    def read(function: Callable[[Path], T], file: str, otherwise: T) -> T:
        try:
            return function(path / file)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            damage.append(f"{path / file}: {' '.join(str(error).split())}")
            return otherwise

    config = read(read_settings, CONFIG_FILE, {})
    result = read(read_result, "result.json", {})
    epochs, wrong = read(read_records, "metrics.jsonl", ([], []))
    if wrong:
        lines = ", ".join(map(str, wrong))
        damage.append(f"{path / 'metrics.jsonl'}: not an object of numbers in line {lines}")
    progress = None if result else read_status(path)
    if damage:
        status = "damaged"
    elif result:
        status = result["status"]
    elif _is_locked(path):
        is_starting = not epochs if progress is None else progress.phase == Phase.LOADING
        status = "starting" if is_starting else "running"
    else:
        status = "unknown"
    duration_s = result.get("duration_s", math.nan)
    measured = result.get("metrics") or {}
    tests = {key: value for key, value in measured.items() if key.startswith("test_")}
    error, reason = result.get("error"), result.get("reason")
    return Run(name, config, epochs, status, error, reason, progress, duration_s, tests, damage)


def read_settings(file: Path) -> dict[str, Any]:
    """Return the configuration in a file by dotted keys; nothing if there is no file.

    Raises:
        OSError, ValueError, yaml.YAMLError: it cannot be read, or holds none.
    """
    loaded = yaml.load(file.read_text(), _LOADER) if file.exists() else {}  # noqa: S506 -- safe
    if not isinstance(loaded, dict):
        raise ValueError("not a configuration")
    return _flatten(loaded)


def _flatten(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, str | int | float | None)
            flat[f"{prefix}{key}"] = value if plain else json.dumps(value, default=str)
    return flat


def _is_locked(path: Path) -> bool:
    try:
        with (path / ".lock").open() as stream:
            # Let go at once; who wants the lock just then tries again for seconds.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or this file system has none
        pass
    return False


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the dotted keys in which runs differ, in the configuration's order.

    Keys that some choices of a section have and others have not, such as norm.eps, count only
    where their values differ: the section's name says the rest.

    Args:
        runs: what to compare; those without a configuration are passed over.
    """
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config if key not in PLACES)

    def values(key: str) -> set[Any]:
        return {repr(config[key]) for config in configs if key in config}

    def differs(key: str) -> bool:
        if len(values(key)) > 1:
            return True
        implied = len(values(f"{key.partition('.')[0]}.name")) > 1
        return not implied and any(key not in config for config in configs)

    return [key for key in keys if differs(key)]


def metric_of(run: Run, metric: str, at: str) -> float:
    """Return a metric of one epoch of a run; NaN where there is none.

    Args:
        run: the run.
        metric: a key of metrics.jsonl, or test_… of the exported model.
        at: "best", the best epoch by validation, or "last".
    """
    last = run.epochs[-1] if run.epochs else {}
    epoch = best_epoch(run.epochs) if at == "best" else last
    return epoch.get(metric, run.tests.get(metric, math.nan))


def default_metric(runs: Sequence[Run]) -> str:
    """Return the metric that tells most of runs: of the validation data, if they have them.

    Args:
        runs: what is compared; the metrics of most of them count.
    """
    counts = Counter(name for run in runs for name in (run.epochs[-1] if run.epochs else ()))
    for name in _TELLING:
        if counts[name]:
            return name
    for prefix in ("val_", "train_"):
        others = [n for n in counts if n.startswith(prefix) and n != f"{prefix}loss"]
        if others:
            return others[0]
    return _TELLING[0]


# test_accuracy is of earlier versions.
_TELLING = ("val_accuracy", "val_mean_iou", "test_accuracy", "train_accuracy", "train_mean_iou")


def group_runs(
    runs: Sequence[Run], by: Sequence[str], metric: str, at: str, counted: str = "finished"
) -> list[Group]:
    """Return the runs' metric grouped by their values of some keys, in the order of these values.

    Args:
        runs: what to group; damaged ones are left out.
        by: dotted keys.
        metric: a key of metrics.jsonl.
        at: "best" or "last", as for `metric_of`.
        counted: the status of the runs that count, if their metric is finite.
    """
    members: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.status != "damaged":
            members.setdefault(tuple(run.config.get(key) for key in by), []).append(run)
    groups: list[Group] = []
    for key in sorted(members, key=order):
        found = [metric_of(run, metric, at) for run in members[key] if run.status == counted]
        values = [value for value in found if math.isfinite(value)]
        mean = statistics.mean(values) if values else math.nan
        stdev = statistics.stdev(values) if len(values) > 1 else math.nan
        failed = sum(run.status == "failed" for run in members[key])
        groups.append(Group(key, len(values), mean, stdev, failed))
    return groups


def order(values: Sequence[Any]) -> list[tuple[bool, bool, Any]]:
    """Return what sorts numbers by size, after what is missing and before texts.

    Args:
        values: of the keys of some runs.
    """
    return [(isinstance(value, str), value is not None, value) for value in values]
