"""What the service answers about jobs, made up in its shapes: options, jobs, curves, logs."""

import math
import random
from typing import Any

NOW = 1_796_000_000.0  # a day in November 2026
HOUR_S = 3600.0
ENDED = ("finished", "failed", "cancelled", "lost")
_ACTIONS = {
    "submitted": ["cancel", "pause"],
    "queued": ["cancel", "pause"],
    "starting": ["cancel"],
    "running": ["cancel", "pause"],
    "stopping": [],
    "paused": ["cancel", "resume"],
    "finished": ["resume", "publish", "archive"],
    "failed": ["retry", "archive"],
    "cancelled": ["resume", "archive"],
    "lost": ["retry", "archive"],
}
_REASONS: dict[str, tuple[str | None, str]] = {
    "submitted": (None, "just submitted"),
    "queued": (None, ""),
    "starting": (None, "its processes are starting"),
    "running": (None, "training"),
    "stopping": (None, "writing a checkpoint"),
    "paused": ("stopped", "paused after step 60; a checkpoint was written"),
    "finished": ("finished", "trained for 12 epochs"),
    "failed": ("not_finite", "the loss is nan at step 37; lower optim.lr, or set optim.clip_norm"),
    "cancelled": ("stopped", "cancelled by anna after step 60; a checkpoint was written"),
    "lost": ("killed", "the machine went down at step 60; no retry was left"),
}


def _key(name: str, kind: str, default: Any, help_text: str = "", **more: Any) -> dict[str, Any]:
    key = {"key": name, "type": kind, "nullable": False, "default": default, "help": help_text}
    return key | more


def _choice(help_text: str, *values: dict[str, Any]) -> dict[str, Any]:
    return {"help": help_text, "values": list(values)}


_BATCH = _key(
    "data.batch_size",
    "integer",
    16,
    "Images per replica and step; a step sees batch_size × replicas × optim.accumulate.",
    minimum=1,
    maximum=4096,
)
_VALIDATION = _key(
    "data.validation",
    "number",
    0.1,
    "The share of the training samples that validates; 0: none.",
    minimum=0,
    exclusive_maximum=1,
)
_MOMENTUM = _key("norm.momentum", "number", 0.1, "Of the running statistics.", minimum=0, maximum=1)
_LR = _key(
    "optim.lr", "number", 0.1, "The learning rate at its highest.", exclusive_minimum=0, maximum=100
)
_DECAY = _key("optim.weight_decay", "number", 0.0005, "", minimum=0, maximum=10)
_CLIP = _key(
    "optim.clip_norm",
    "number",
    None,
    "Scale gradients down to this norm; null: never.",
    nullable=True,
    exclusive_minimum=0,
)
_WARM_UP = _key("schedule.warmup_epochs", "number", 1.0, "", minimum=0, maximum=1000)

OPTIONS: dict[str, Any] = {
    "groups": {
        "data": {
            "default": "digits",
            "help": "What is learned.",
            "choices": {
                "digits": _choice(
                    "scikit-learn's handwritten digits: 1797 images of 8×8 pixels.",
                    _BATCH,
                    _VALIDATION,
                    _key("data.balanced", "boolean", False, "As many images of each class."),
                ),
                "synthetic": _choice(
                    "Random images with random labels.",
                    _BATCH,
                    _key("data.samples", "integer", 1024, "", minimum=1, maximum=1_000_000),
                ),
            },
        },
        "model": {
            "default": "cnn",
            "help": "The network.",
            "choices": {
                "cnn": _choice(
                    "A small convolutional network.",
                    _key("model.width", "integer", 16, "Channels.", minimum=1, maximum=1024),
                ),
                "mlp": _choice(
                    "Linear layers.",
                    _key(
                        "model.hidden",
                        "list",
                        [128, 64],
                        "Units of the layers.",
                        max_items=8,
                        item={"type": "integer", "nullable": False, "minimum": 1},
                    ),
                ),
            },
        },
        "norm": {
            "default": "sync",
            "help": "How activations are normalized.",
            "choices": {
                "sync": _choice("Statistics over the batches of all replicas.", _MOMENTUM),
                "local": _choice("Statistics over each replica's own batch.", _MOMENTUM),
                "none": _choice("Not at all."),
            },
        },
        "optim": {
            "default": "sgd",
            "help": "How parameters are moved.",
            "choices": {
                "sgd": _choice(
                    "Gradient descent with momentum.",
                    _LR,
                    _key("optim.momentum", "number", 0.9, "", minimum=0, exclusive_maximum=1),
                    _DECAY,
                    _CLIP,
                    _key("optim.nesterov", "boolean", False, "Look ahead."),
                ),
                "adamw": _choice("Adam with decoupled weight decay.", _LR, _DECAY, _CLIP),
            },
        },
        "schedule": {
            "default": "cosine",
            "help": "The learning rate over time.",
            "choices": {
                "cosine": _choice("Down along a cosine.", _WARM_UP),
                "constant": _choice("The same, always."),
            },
        },
    },
    "values": [
        _key("seed", "integer", 0, "Decides the initial weights.", minimum=0, maximum=2**31 - 1),
        _key("epochs", "integer", 12, "Passes over the training data.", minimum=1, maximum=10_000),
        _key("max_steps", "integer", None, "Stop after so many steps.", nullable=True, minimum=1),
        _key(
            "numerics.precision",
            "enum",
            "float32",
            "What convolutions and the like compute in.",
            choices=["float32", "bfloat16", "float16"],
        ),
        _key("numerics.compile", "boolean", False, "Compile the model with torch.compile."),
        _key("launch.nproc", "integer", 1, "Processes on this machine.", minimum=1, maximum=8),
    ],
    "job": [
        _key(
            "name",
            "string",
            None,
            "Empty: made of data and model.",
            nullable=True,
            pattern="[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
            form="letters, digits, '.', '_' and '-', at most 100",
        ),
        _key(
            "publish",
            "string",
            None,
            "The model whose next version it becomes when it has finished.",
            nullable=True,
        ),
        _key("priority", "integer", 0, "Higher ones start first.", minimum=-100, maximum=100),
        _key("retries", "integer", 0, "After a failure that may pass.", minimum=0, maximum=10),
        _key("cores", "integer", None, "null: as the service decides.", nullable=True, minimum=1),
        _key("device", "enum", "auto", "", choices=["auto", "cpu", "cuda"]),
    ],
    "limits": {"sweep_jobs": 1000},
    "dispatcher": {
        "host": "here",
        "pid": 1,
        "engine": "local",
        "cores": 8,
        "gpus": 0,
        "seen": NOW,
        "alive": True,
    },
}


def job(number: int, state: str = "queued", **changes: Any) -> dict[str, Any]:
    """Return a job as the list has it; it was submitted by NOW."""
    submitted = NOW - HOUR_S
    code, reason = _REASONS[state]
    has_started = state not in ("submitted", "queued")
    step = {"starting": 0, "finished": 480, "failed": 37}.get(state, 180)
    progress: Any = None
    if has_started:
        progress = {
            "phase": "done" if state in ENDED else "training",
            "step": step,
            "total_steps": 480,
            "fraction": step / 480,
            "epoch": step / 40,
            "epochs": 12,
            "time_left_s": 41.5 if state == "running" else None,
            "images_per_s": 912.4,
        }
    lines = curves(number, step // 40) if has_started else []
    made: dict[str, Any] = {
        "kind": "job",
        "id": f"j{number:09d}",
        "number": number,
        "name": "digits-cnn",
        "owner": "anna",
        "state": state,
        "reason_code": code,
        "reason": reason,
        "wanted": None,
        "sweep": None,
        "sweep_values": {},
        "choices": {},
        "values": {},
        "publish": None,
        "published": [],
        "priority": 0,
        "retries": 0,
        "cores": 2,
        "gpus": 0,
        "device": "cpu",
        "attempt": 1 if has_started else 0,
        "waiting_for": "2 cores, 1 free; third in line" if state == "queued" else "",
        "progress": progress,
        "metrics": lines[-1] if lines else None,
        "objective": lines[-1]["val_loss"] if state == "finished" else None,
        "submitted": submitted,
        "started": submitted + 2 if has_started else None,
        "ended": submitted + 150 if state in ENDED else None,
        "archived": False,
        "actions": _ACTIONS[state],
    }
    return made | changes


def with_state(job: dict[str, Any], state: str, **changes: Any) -> dict[str, Any]:
    """Return a job as it is after a transition."""
    code, reason = _REASONS[state]
    told = {"state": state, "reason_code": code, "reason": reason, "actions": _ACTIONS[state]}
    return job | told | changes


def details(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a job's own address tells beyond the list."""
    told = {**job["values"], **job["sweep_values"]}
    defaults = _defaults()
    config = defaults | {key: value for key, value in told.items() if key in defaults}
    path = [("submitted", 0.0), ("queued", 0.1)]
    if job["started"] is not None:
        path += [("starting", 1.0), ("running", 2.0)]
    if job["state"] != path[-1][0]:
        path.append((job["state"], 150.0))
    transitions = [
        {
            "state": state,
            "time": job["submitted"] + after_s,
            "reason_code": _REASONS[state][0],
            "reason": _REASONS[state][1],
            "by": job["owner"] if state == "submitted" else None,
        }
        for state, after_s in path
    ]
    started: float = job["started"] or 0.0
    attempts: list[dict[str, Any]] = []
    for number in range(1, job["attempt"] + 1):
        is_last = number == job["attempt"]
        attempts.append(
            {
                "number": number,
                "started": started + 60.0 * (number - 1),
                "ended": job["ended"] if is_last else started + 60.0 * number - 1,
                "status": job["state"] if is_last else "lost",
                "reason_code": job["reason_code"] if is_last else "rank_killed",
                "reason": job["reason"] if is_last else "rank 1 was killed by signal 9",
                "exit_code": None if is_last else -9,
            }
        )
    changed = {
        key: {"default": defaults[key], "value": value}
        for key, value in config.items()
        if value != defaults[key]
    }
    return job | {
        "transitions": transitions,
        "events": job.get("events", []),
        "attempts": attempts,
        "config": config,
        "changed": changed,
    }


def _defaults() -> dict[str, Any]:
    keys = list(OPTIONS["values"])
    for group in OPTIONS["groups"].values():
        keys += group["choices"][group["default"]]["values"]
    return {key["key"]: key["default"] for key in keys}


def curves(seed: int, epochs: int) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl, as a training that goes well writes them."""
    noise = random.Random(seed)
    start, speed = noise.uniform(1.9, 2.3), noise.uniform(0.35, 0.6)
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        train = start * math.exp(-speed * epoch) + 0.02 + noise.uniform(0, 0.02)
        validation = train + 0.06 + noise.uniform(0, 0.04)
        lines.append(
            {
                "epoch": epoch,
                "step": 40 * epoch,
                "lr": 0.05 * (1 + math.cos(math.pi * epoch / 12)),
                "train_loss": train,
                "train_accuracy": 1 - 0.35 * train,
                "val_loss": validation,
                "val_accuracy": 1 - 0.35 * validation,
                "images_per_s": 900 + noise.uniform(-50, 50),
                "time": NOW + 10 * epoch,
            }
        )
    return lines


def steps(seed: int, last: int) -> list[dict[str, Any]]:
    """Return lines of steps.jsonl up to a step."""
    noise = random.Random(seed)
    return [
        {
            "step": step,
            "epoch": step / 40,
            "lr": 0.05 * (1 + math.cos(math.pi * step / 480)),
            "loss": 2.0 * math.exp(-step / 90) + noise.uniform(0.02, 0.25),
            "accuracy": min(1.0, 1 - 0.7 * math.exp(-step / 90) + noise.uniform(-0.08, 0.02)),
            "images_per_s": 900 + noise.uniform(-80, 80),
            "time": NOW + step / 4,
        }
        for step in range(5, last + 1, 5)
    ]


def log_lines(epochs: int) -> list[str]:
    """Return what a job writes to its log."""
    lines = ["=== attempt 1, 2026-11-30T14:00:00Z ===", "2 ranks, gloo, 1 thread each"]
    for line in curves(1, epochs):
        lines.append(
            f"epoch {line['epoch']}: train_loss {line['train_loss']:.4f}, val_accuracy "
            f"{line['val_accuracy']:.4f}, {line['images_per_s']:.0f} images/s"
        )
    return lines
