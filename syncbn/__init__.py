"""Batch normalization over the whole batch, however many replicas share it."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from syncbn.errors import SyncBNError

if TYPE_CHECKING:
    from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
    from syncbn.fold import Folding, drop_redundant_bias, fold
    from syncbn.functional import sync_batch_norm
    from syncbn.fuse import Fusion, fuse
    from syncbn.layers import SyncBatchNorm
    from syncbn.recalibrate import recalibrate
    from syncbn.whitening import SyncWhitening

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
    "Folding": "fold",
    "Fusion": "fuse",
    "SyncBatchNorm": "layers",
    "SyncWhitening": "whitening",
    "convert_sync_batchnorm": "convert",
    "drop_redundant_bias": "fold",
    "fold": "fold",
    "fuse": "fuse",
    "recalibrate": "recalibrate",
    "revert_sync_batchnorm": "convert",
    "sync_batch_norm": "functional",
}


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module syncbn.fold would put it in the place of the function of that name.
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
