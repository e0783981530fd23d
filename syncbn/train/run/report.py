"""What a run's files tell about it, and its end in a few lines for its terminal."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, float]

ENDS = ("finished", "failed", "interrupted")


def read_records(file: Path) -> tuple[list[Record], list[int]]:
    """Return the JSON objects of a file, one a line, and the numbers of the damaged lines.

    A last line that was cut short, by a kill or because it is being written, is passed over.

    Args:
        file: metrics.jsonl or steps.jsonl of a run; one that does not exist has no lines.
    """
    lines = file.read_text(errors="replace").split("\n")[:-1] if file.exists() else []
    records: list[Record] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and all(isinstance(v, int | float) for v in record.values()):
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def read_result(file: Path) -> dict[str, Any]:
    """Return how the last attempt at a run ended; nothing where none has.

    Args:
        file: result.json of the run.

    Raises:
        ValueError: the file does not say it.
    """
    result = json.loads(file.read_text()) if file.exists() else {}
    if not isinstance(result, dict) or (result and result.get("status") not in ENDS):
        raise ValueError(f"no status of {', '.join(ENDS)}")
    return result


def best_epoch(epochs: Sequence[Record], prefix: str = "") -> Record:
    """Return the epoch of highest test accuracy; of equals, that of lowest test loss.

    Args:
        epochs: the lines of metrics.jsonl.
        prefix: "ema_" judges the averaged weights.

    Returns:
        The epoch's line; an empty one where no epoch has an accuracy.
    """
    accuracy, loss = f"{prefix}test_accuracy", f"{prefix}test_loss"
    judged = [epoch for epoch in epochs if math.isfinite(epoch.get(accuracy, math.nan))]
    return max(judged, key=lambda epoch: (epoch[accuracy], -epoch.get(loss, math.inf)), default={})


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as "3 min 07 s"; "–" for none.

    Args:
        seconds: the duration; NaN where it was not measured.
    """
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )


def summarize(run_path: Path) -> str:
    """Return a few aligned lines on how a run ended and what it left, for its terminal.

    Args:
        run_path: the run's directory.
    """
    epochs, _ = read_records(run_path / "metrics.jsonl")
    result = read_result(run_path / "result.json")
    last = epochs[-1] if epochs else {}
    status = result.get("status", "has not ended")
    done = f"{last.get('epoch', 0)} epochs, {last.get('step', 0)} steps"
    lines = {"status": f"{status} after {done}"}
    if result.get("error"):
        lines["error"] = result["error"]
    prefix = "ema_" if "ema_test_accuracy" in last else ""
    # The result has the metrics of the exported model, whose statistics may be recalibrated.
    best = result.get("metrics") or best_epoch(epochs, prefix)
    if best:
        lines["best"] = _quality(best, prefix)
    if last:
        lines["last"] = f"{_quality(last, prefix)}, training loss {last['train_loss']:.4f}"
    lines["time"] = duration(result.get("duration_s", math.nan))
    if speeds := [epoch["images_per_s"] for epoch in epochs]:
        lines["time"] += f", {statistics.median(speeds):.0f} images/s"
    for name in ("bundle", "checkpoints", "curves.png"):
        if (run_path / name).exists():
            lines[name] = str(run_path / name)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _quality(epoch: Record, prefix: str) -> str:
    accuracy, loss = epoch[f"{prefix}test_accuracy"], epoch[f"{prefix}test_loss"]
    of = " of the averaged weights" if prefix else ""
    return f"epoch {epoch['epoch']}: test accuracy{of} {100 * accuracy:.2f} %, test loss {loss:.4f}"
