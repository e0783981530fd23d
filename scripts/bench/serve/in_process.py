"""What is measured without a server: batches computed in a process of their own."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts.bench.serve.workloads import TOLERANCE
from service.models.model import Compute, Predictor
from syncbn.bundle import read_bundle
from syncbn.transforms.fold import fold

BATCH_SIZE = 16


def as_served(bundle: Path) -> Callable[[Tensor], Tensor]:
    """Return what the service computes of raw samples, as it does."""
    compute = Compute(
        device=torch.device("cpu"),
        dtype=torch.float32,
        compile=False,
        threads=torch.get_num_threads(),
        max_batch_size=BATCH_SIZE,
        max_queue_rows=BATCH_SIZE,
        timeout_s=1,
        drift=False,
    )
    predictor = Predictor(read_bundle(bundle), compute)
    return lambda x: torch.from_numpy(predictor(x.numpy()))


def as_torch_has_it(bundle: Path) -> Callable[[Tensor], Tensor]:
    """Return the probabilities of raw samples with what torch has to make them fast."""
    read = read_bundle(bundle)
    preprocess = read.manifest.preprocessing.prepared(4, torch.device("cpu"))
    model = fold(read.model).model.to(memory_format=torch.channels_last)

    def probabilities(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(preprocess(x).to(memory_format=torch.channels_last)).softmax(1)

    return probabilities


def as_read(bundle: Path) -> Callable[[Tensor], Tensor]:
    """Return the probabilities of raw samples as a bundle has them, which the peers serve."""
    return read_bundle(bundle).probabilities


IN_PROCESS = {"as served": as_served, "folded, channels_last": as_torch_has_it, "as read": as_read}


def be_model(pipe: Connection, bundle: Path, samples: Path, threads: int) -> None:
    """Answer each name and time that come through a pipe with images a second, until None."""
    torch.set_num_threads(threads)
    with np.load(samples) as file:
        images = torch.from_numpy(file["samples"][:BATCH_SIZE])
        expected = torch.from_numpy(file["expected"][:BATCH_SIZE])
    models = {name: make(bundle) for name, make in IN_PROCESS.items()}
    while wanted := pipe.recv():
        name, seconds = wanted
        model, batches = models[name], 0
        torch.testing.assert_close(model(images), expected, rtol=0, atol=TOLERANCE)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            model(images)
            batches += 1
        pipe.send(batches * BATCH_SIZE / (time.perf_counter() - start))
