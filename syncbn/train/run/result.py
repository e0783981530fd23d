"""How an attempt at a run ended: result.json, which is written once and whole."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syncbn.train.run.files import replace_file
from syncbn.train.run.reasons import is_full, presumed
from syncbn.train.run.status import STATUS_FILE

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Result:
    """How an attempt at a run ended.

    What is not known when it is made, `RunDirectory.write_result` fills in.

    Attributes:
        status: "finished", "failed" or "interrupted"; of an earlier attempt also "lost", if it was
            killed before it could say anything.
        error: why, in words; None where it finished.
        metrics: those of the best epoch; empty where there is none.
        duration_s: seconds that this attempt trained; of one that failed, since it began.
        exit_code: of the processes: 0, 1, 2 for a wrong configuration, 128 + a signal's number.
        evaluations: how good the exported model is: a split, the number of its samples, whether the
            statistics are as trained or recalibrated, and metrics with their 95 % intervals.
        objective: what a sweep minimizes: the validation error of the best epoch, and in a run of
            an earlier version the test error; None if the run did not finish.
        reason: why, as one of `syncbn.train.run.reasons`.
        attempt: the number of this attempt, from 1.
        started: when it began, in seconds since 1970; None in a result of an earlier version.
        ended: when it ended, likewise.
    """

    status: str
    error: str | None
    metrics: dict[str, float]
    duration_s: float
    exit_code: int
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    objective: float | None = None
    reason: str = ""
    attempt: int = 0
    started: float | None = None
    ended: float | None = None


def read_result(directory: Path) -> Result | None:
    """Return how the last attempt at a run ended; None if none has in an orderly way."""
    try:
        return decode_result((directory / RESULT_FILE).read_text())
    except (OSError, UnicodeDecodeError):
        return None


def write_result(directory: Path, result: Result) -> None:
    """Replace what is said of how an attempt ended.

    On a full disk in the place of status.json, as how far a run is counts less than why it ended.
    """
    file, status = directory / RESULT_FILE, directory / STATUS_FILE
    try:
        replace_file(file, encode_result(result))
    except OSError as error:
        if not is_full(error) or not status.exists():
            raise
        status.unlink()
        replace_file(file, encode_result(result))


def encode_result(result: Result) -> str:
    """Return a result as one line."""
    return json.dumps(dataclasses.asdict(result)) + "\n"


def decode_result(text: str) -> Result | None:
    """Return the result that a line says, also one of an earlier version; None if it says none."""
    try:
        values = json.loads(text)
        result = Result(**values)
        metrics = result.metrics
        if "objective" not in values and result.status == "finished":
            tested = metrics.get("ema_test_accuracy", metrics.get("test_accuracy"))
            objective = None if tested is None else 1 - tested
            result = dataclasses.replace(result, objective=objective)
        reason = result.reason or presumed(result.status, result.exit_code)
        # Earlier versions kept no attempts, so theirs is the first that is known.
        return dataclasses.replace(result, reason=reason, attempt=int(result.attempt) or 1)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def best_of(epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of the best epoch, as the run has noted; empty if there is none.

    Args:
        epochs: the lines of metrics.jsonl.
    """
    best = next((epoch for epoch in reversed(epochs) if epoch.get("best")), {})
    return {name: value for name, value in best.items() if name != "time"}
