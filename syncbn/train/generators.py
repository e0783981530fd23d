"""This rank's random generators, which a model or data may use: seeded, kept and restored."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from syncbn.train.checkpoint import Position


class KeptGenerators:
    """What torch's generators were when this was made; cheap enough for every step.

    The others are not: to copy NumPy's takes longer than all else that is kept. A model that draws
    from those gets other numbers when a step is repeated.
    """

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Return torch's generators to what they were."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def generator_states() -> dict[str, Any]:
    """Return what the generators are, in types that a checkpoint may hold."""
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Return the generators to a checkpoint's."""
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def seed_generators(seed: int, position: Position) -> None:
    """Seed the generators by the job's seed, the position, and the rank."""
    entropy = (seed, position.epoch, position.samples, dist.get_rank())
    (value,) = np.random.SeedSequence(entropy).generate_state(1)
    torch.manual_seed(int(value))
    np.random.seed(int(value))
    random.seed(int(value))
