"""Batch normalization over the whole batch, however many replicas share it."""

from syncbn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.errors import SyncBNError
from syncbn.functional import sync_batch_norm
from syncbn.layers import SyncBatchNorm

__version__ = "0.1.0"

__all__ = [
    "SyncBNError",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "revert_sync_batchnorm",
    "sync_batch_norm",
]
