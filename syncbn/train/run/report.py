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


def best_epoch(epochs: Sequence[Record]) -> Record:
    """Return the best epoch, as the run has noted; an empty line if there is none.

    Runs of earlier versions noted none: the one of highest test accuracy then, and of equals that
    of lowest test loss.

    Args:
        epochs: the lines of metrics.jsonl.
    """
    noted = [epoch for epoch in epochs if "best" in epoch]
    if noted:
        return next((epoch for epoch in reversed(noted) if epoch["best"]), {})
    prefix = "ema_" if epochs and "ema_test_accuracy" in epochs[-1] else ""
    accuracy, loss = f"{prefix}test_accuracy", f"{prefix}test_loss"
    judged = [epoch for epoch in epochs if math.isfinite(epoch.get(accuracy, math.nan))]
    return max(judged, key=lambda epoch: (epoch[accuracy], -epoch.get(loss, math.inf)), default={})


def is_share(metric: str) -> bool:
    """Return whether a metric is one from 0 to 1 that is shown in percent, by its name."""
    return metric.endswith(("accuracy", "iou"))


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
    if best := best_epoch(epochs):
        is_judged = _prefix(best) != "train_"
        unjudged = "; without validation, the last epoch is exported"
        lines["best" if is_judged else "last"] = _quality(best) + ("" if is_judged else unjudged)
    if last and last != best:
        lines["last"] = _quality(last)
    for evaluation in result.get("evaluations", ()):
        again = evaluation["statistics"] == "recalibrated"
        lines["recalibrated" if again else evaluation["split"]] = _in_words(evaluation)
    lines["time"] = duration(result.get("duration_s", math.nan))
    if speeds := [epoch["images_per_s"] for epoch in epochs]:
        lines["time"] += f", {statistics.median(speeds):.0f} images/s"
    for name in ("bundle", "checkpoints", "curves.png"):
        if (run_path / name).exists():
            lines[name] = str(run_path / name)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _quality(epoch: Record) -> str:
    """Return an epoch's metrics of the exported model, and its training loss."""
    prefix = _prefix(epoch)
    name = _PREFIXES[prefix]
    shown = [
        f"{name} {key.removeprefix(prefix).replace('_', ' ')} {_number(key, value)}"
        for key, value in epoch.items()
        if key.startswith(prefix)
    ]
    if prefix != "train_":
        shown.append(f"training loss {epoch['train_loss']:.4f}")
    return f"epoch {epoch['epoch']}: {', '.join(shown)}"


def _prefix(epoch: Record) -> str:
    """Return what the metrics of the exported model begin with."""
    found = (prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in epoch))
    return next(found, "train_")


# Where the metrics of the exported model are, from best to worst; test_… in earlier versions.
_PREFIXES = {
    "ema_val_": "validation",
    "val_": "validation",
    "ema_test_": "test",
    "test_": "test",
    "train_": "training",
}


def _in_words(evaluation: dict[str, Any]) -> str:
    parts = [
        f"{name.replace('_', ' ')} {_number(name, estimate['value'])}"
        + ("" if estimate["low"] is None else f" ({_range(name, estimate)})")
        for name, estimate in evaluation["metrics"].items()
    ]
    how = f"{evaluation['samples']} samples, statistics {evaluation['statistics']}"
    return f"{', '.join(parts)}; {how}"


def _range(name: str, estimate: dict[str, float]) -> str:
    return f"{_number(name, estimate['low'])} to {_number(name, estimate['high'])}"


def _number(name: str, value: float) -> str:
    if is_share(name):
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if name.endswith("loss") else f"{value:.4g}"
