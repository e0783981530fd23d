"""Batch normalization over the whole batch, however many replicas share it."""

from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.errors import SyncBNError
from syncbn.fold import Folding, drop_redundant_bias, fold
from syncbn.functional import sync_batch_norm
from syncbn.fuse import Fusion, fuse
from syncbn.layers import SyncBatchNorm
from syncbn.recalibrate import recalibrate

__version__ = "0.1.0"

__all__ = [
    "Folding",
    "Fusion",
    "SyncBNError",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "drop_redundant_bias",
    "fold",
    "fuse",
    "recalibrate",
    "revert_sync_batchnorm",
    "sync_batch_norm",
]
