"""Data sets, and which rank sees which of their samples when.

`Dataset`, `Samples`, `Batch`, `TensorImages`, `MaskedImages`, `StoredPairs` and `Form` are for data
sets of your own (`data=custom`).
"""

from syncbn.train.data.datasets import Dataset
from syncbn.train.data.images import TensorImages
from syncbn.train.data.masks import Form, MaskedImages, StoredPairs
from syncbn.train.data.sampling import Batch, Samples

__all__ = ["Batch", "Dataset", "Form", "MaskedImages", "Samples", "StoredPairs", "TensorImages"]
