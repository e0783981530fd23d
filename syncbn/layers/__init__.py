"""What users construct: layers that normalize by the statistics of all replicas' batches."""

from syncbn.layers.batch_norm import BatchNorm, SyncBatchNorm

# Layers that were pickled whole, before this was a package, name their classes by this module.
__all__ = ["BatchNorm", "SyncBatchNorm"]
