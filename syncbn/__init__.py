"""Batch normalization over the whole batch, however many replicas share it."""

import importlib
from typing import TYPE_CHECKING, Any

from syncbn.errors import SyncBNError

if TYPE_CHECKING:
    from syncbn.layers.batch_norm import SyncBatchNorm
    from syncbn.layers.whitening import SyncWhitening
    from syncbn.ops.batch_norm import sync_batch_norm
    from syncbn.transforms.convert import convert_sync_batchnorm, revert_sync_batchnorm
    from syncbn.transforms.fold import Folding, drop_redundant_bias, fold
    from syncbn.transforms.fuse import Fusion, fuse
    from syncbn.transforms.recalibrate import recalibrate

__version__ = "0.1.0"

__all__ = [
    "Folding",
    "Fusion",
    "SyncBNError",
    "SyncBatchNorm",
    "SyncWhitening",
    "convert_sync_batchnorm",
    "drop_redundant_bias",
    "fold",
    "fuse",
    "recalibrate",
    "revert_sync_batchnorm",
    "sync_batch_norm",
]

# Loaded when first asked for: they import torch, which takes seconds, and a command that only says
# what is wrong with its arguments should not wait for it.
_HOMES = {
    "Folding": "transforms.fold",
    "Fusion": "transforms.fuse",
    "SyncBatchNorm": "layers.batch_norm",
    "SyncWhitening": "layers.whitening",
    "convert_sync_batchnorm": "transforms.convert",
    "drop_redundant_bias": "transforms.fold",
    "fold": "transforms.fold",
    "fuse": "transforms.fuse",
    "recalibrate": "transforms.recalibrate",
    "revert_sync_batchnorm": "transforms.convert",
    "sync_batch_norm": "ops.batch_norm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
