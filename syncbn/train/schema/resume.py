"""What of a configuration may change when a run goes on, and what a key meant before it was there.

Everybody who adds a key says here which it is; a test holds that every key of every schema is in
one of the two tables.
"""

from collections.abc import Mapping
from typing import Any

# Which may change: each is used from the resume on. A name stands for all keys below it that are
# named in neither table.
FREE = (
    "name",  # under which the bundle is published from now on
    "epochs",
    "max_steps",
    "patience",
    "log_every_steps",
    "recalibrate",
    "run_root",
    "run_dir",
    "sweep_dir",
    "publish",
    "data.workers",
    "data.path",  # files may move
    "data.skip_damaged",  # errors advise it
    "model.weights",  # the file may move, and the checkpoint has what became of it
    "optim.lr",  # errors advise lower ones
    "optim.clip_norm",  # and this
    "numerics.channels_last",
    "numerics.compile",
    "numerics.deterministic",
    "numerics.max_skipped_steps",
    "checkpoint",
    "launch",
    "track",
)

_SAMPLES = "it decides which samples a step sees"
_IMAGES = "it decides what the samples look like"
_OPTIMIZER = "the optimizer's state is that of the old value"
_AVERAGE = "the average is that of the old value"
_RATES = "the rates so far were those of the old value"
_ANOTHER = "that would be another model"

# Which may not change, and why.
FIXED: Mapping[str, str] = {
    "seed": "it decides the order of the samples",
    "data.name": "that would be other data",
    "data.batch_size": _SAMPLES,
    "data.shares": _SAMPLES,
    "data.validation": _SAMPLES,
    "data.drop_last": _SAMPLES,
    "data.balanced": _SAMPLES,
    "data.crop_padding": _IMAGES,
    "data.flip": _IMAGES,
    "data.size": _IMAGES,
    "data.height": _IMAGES,
    "data.width": _IMAGES,
    "data.scale_min": _IMAGES,
    "data.scale_max": _IMAGES,
    "data.crop_scale_min": _IMAGES,
    "data.samples": "that would be other data",
    "data.test_samples": "that would be other data",
    "data.channels": "that would be other data",
    "data.classes": "that would be other data",
    "data.factory": "that would be other data",
    "data.arguments": "that would be other data",
    "task": "that would be another task",
    "model": _ANOTHER,
    "norm": _ANOTHER,
    "optim.name": _OPTIMIZER,
    "optim.optimizer": _OPTIMIZER,
    "optim.arguments": _OPTIMIZER,
    "optim.momentum": _OPTIMIZER,
    "optim.weight_decay": _OPTIMIZER,
    "optim.accumulate": _SAMPLES,
    "optim.freeze": _OPTIMIZER,
    "optim.lr_scale": _OPTIMIZER,
    "optim.decay_all": _OPTIMIZER,
    "optim.label_smoothing": "losses before and after could not be compared",
    "optim.ema_decay": _AVERAGE,
    "optim.ema_warmup": _AVERAGE,
    "schedule": _RATES,
    "numerics.precision": "the state of the loss scaling is that of the old value",
}

# What it meant, in a run of an earlier version, that its configuration does not have a key. Only
# for the choices of a group that have the key now.
BEFORE: Mapping[str, Any] = {
    "patience": None,
    "task": {"name": "classification"},
    "data.shares": "mixed",
    "data.validation": 0.0,
    "data.drop_last": False,
    "data.balanced": False,
    "data.skip_damaged": False,
    "launch.ranks_per_gpu": 1,
    "launch.load_timeout_s": 1800.0,
    "launch.find_unused_parameters": False,
    "model.weights": None,
    "model.weights_into": None,
    "model.weights_strict": True,
    "optim.ema_warmup": False,
    "optim.freeze": [],
    "optim.lr_scale": {},
    "optim.decay_all": True,
    "numerics.max_skipped_steps": 50,
}


def why_fixed(key: str) -> str | None:
    """Return why a key may not change when a run goes on, or None if it may.

    Args:
        key: with dots, such as optim.lr.
    """
    while key not in FIXED and key not in FREE and "." in key:
        key = key.rpartition(".")[0]
    return None if key in FREE else FIXED.get(key, "it is part of what is trained")
