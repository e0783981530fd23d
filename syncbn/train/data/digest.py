"""A data set in one short text, by which ranks and attempts see whether they have the same."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from syncbn.train.data.checks import splits
from syncbn.train.data.dataset import Dataset
from syncbn.train.data.sampling import Samples, labels_in_memory
from syncbn.train.generators import generator_states, restore_generators, seed_alike

_SAMPLES = 16


def digest(dataset: Dataset) -> str:
    """Return the SHA-256 of what a data set says of itself, and of some of its samples.

    It takes in classes, the form of inputs, preprocessing and palette; of each split the size, all
    labels if they are in memory, the files' relative names and sizes if samples have a method
    `files` that returns them, and up to 16 evenly spaced samples of epoch 0 with their targets.
    The generators are left as they were; samples that draw from them draw the same on every rank.

    Raises:
        ConfigError: a sample cannot be read.
    """
    said: dict[str, Any] = {
        "classes": dataset.classes,
        "input": dataset.input.model_dump(),
        "preprocessing": dataset.preprocessing.model_dump(),
        "palette": dataset.palette,
    }
    states = generator_states(torch.device("cpu"))
    try:
        for name, samples in splits(dataset).items():
            seed_alike(0)
            said[name] = _described(samples)
    finally:
        restore_generators(states, torch.device("cpu"))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _described(samples: Samples) -> dict[str, Any]:
    count = len(samples)
    indices = sorted({number * (count - 1) // (_SAMPLES - 1) for number in range(_SAMPLES)})
    labels = labels_in_memory(samples)
    files: Any = getattr(samples, "files", None)
    # ascii() of a name that is not UTF-8 is text all the same.
    names = None if files is None else hashlib.sha256(ascii(files()).encode()).hexdigest()
    return {
        "size": count,
        "labels": None if labels is None else _sha256(labels),
        "files": names,
        "samples": [_sha256(each) for each in samples.__getitems__([(0, i) for i in indices])],
    }


def _sha256(tensor: Tensor) -> str:
    kept = tensor.detach().cpu().contiguous()
    head = f"{kept.dtype} {tuple(kept.shape)}".encode()
    return hashlib.sha256(head + kept.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
