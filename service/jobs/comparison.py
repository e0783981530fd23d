"""Jobs side by side: the keys in which they differ, and means over those that differ by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from syncbn.jobs.job import Job

MAX_JOBS = 200
_SEED = "seed"
_NAME = "name"  # is told beside, and differs within each sweep
# Where the server put things, which tells nothing of a job.
_PLACES = ("run_root", "run_dir", "sweep_dir", "publish")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_MEASURED = {"step", "epoch", "time", "best"}


@dataclass(frozen=True)
class Compared:
    """A job that is compared.

    Attributes:
        job: the job.
        config: its configuration by keys with dots.
        metrics: of its best epoch.
    """

    job: Job
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]


def read_config(file: Path) -> dict[str, Any]:
    """Return a run's configuration by keys with dots; empty if there is none that can be read."""
    try:
        loaded = yaml.load(file.read_text(), _LOADER)  # noqa: S506 -- a safe loader
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    flat = _flatten(loaded) if isinstance(loaded, dict) else {}
    return {key: value for key, value in flat.items() if key not in _PLACES}


def config_of(job: Job, file: Path) -> dict[str, Any]:
    """Return a job's configuration; before it first ran, what was submitted of it."""
    names = {f"{group}.name": choice for group, choice in job.spec.choices.items()}
    return read_config(file) or names | job.values


def compare(compared: Sequence[Compared], by: Sequence[str] | None) -> dict[str, Any]:
    """Return jobs, the keys in which they differ, and groups of them with means and deviations.

    Args:
        compared: the jobs.
        by: the keys whose values make a group; None: those in which they differ, but for the seed.
    """
    keys = {
        key: {each.job.id: each.config.get(key) for each in compared}
        for key in differing_keys([each.config for each in compared])
    }
    chosen = [key for key in keys if key != _SEED] if by is None else list(by)
    members: dict[bytes, list[Compared]] = {}
    for each in compared:
        values = [each.config.get(key) for key in chosen]
        members.setdefault(msgspec.json.encode(values), []).append(each)
    return {
        "jobs": [
            {
                "id": each.job.id,
                "name": each.job.name,
                "state": each.job.state,
                "objective": each.job.objective,
                "metrics": each.metrics,
            }
            for each in compared
        ],
        "keys": keys,
        "groups": [_group(each, chosen) for each in members.values()],
    }


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys in which configurations differ, in their order.

    Keys that some choices of a section have and others have not, such as norm.eps, count only if
    their values differ: the section's name says the rest.
    """
    every = dict.fromkeys(key for config in configs for key in config if key != _NAME)

    def values(key: str) -> set[str]:
        return {repr(config[key]) for config in configs if key in config}

    def differs(key: str) -> bool:
        if len(values(key)) > 1:
            return True
        implied = len(values(f"{key.partition('.')[0]}.name")) > 1
        return not implied and any(key not in config for config in configs)

    return [key for key in every if differs(key)]


def _group(members: Sequence[Compared], keys: Sequence[str]) -> dict[str, Any]:
    measured: dict[str, list[float]] = {}
    for each in members:
        for name, value in each.metrics.items():
            if name not in _NOT_MEASURED and _is_number(value):
                measured.setdefault(name, []).append(value)
    objectives = [each.job.objective for each in members if each.job.objective is not None]
    if objectives:
        measured["objective"] = objectives
    return {
        "values": {key: members[0].config.get(key) for key in keys},
        "ids": [each.job.id for each in members],
        "n": len(members),
        "mean": {name: statistics.fmean(values) for name, values in measured.items()},
        # The sample standard deviation, which one value does not have.
        "deviation": {
            name: statistics.stdev(values) if len(values) > 1 else None
            for name, values in measured.items()
        },
    }


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _flatten(node: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
