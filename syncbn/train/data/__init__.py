"""Data sets, and which rank sees which of their samples when.

`Dataset`, `Samples`, `Batch` and `TensorImages` are for data sets of your own (`data=custom`).
"""

from syncbn.train.data.datasets import Dataset
from syncbn.train.data.images import TensorImages
from syncbn.train.data.sampling import Batch, Samples

__all__ = ["Batch", "Dataset", "Samples", "TensorImages"]
