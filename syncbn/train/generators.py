"""This rank's random generators, which a model or data may use: seeded, kept and restored."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from syncbn.train.run.checkpoint import Position


class KeptGenerators:
    """What torch's generators were when this was made; cheap enough for every step.

    The others are not: to copy NumPy's takes longer than all else that is kept. A model that draws
    from those gets other numbers when a step is repeated.

    Args:
        device: where this rank computes; a GPU has a generator of its own, whose state the host
            knows without waiting for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Return torch's generators to what they were."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return what the generators are, in types that a checkpoint may hold.

    Args:
        device: where this rank computes, of which the generator is among them.
    """
    name, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Return the generators to a checkpoint's; those of which it has none are left alone.

    Args:
        states: what `generator_states` returned, perhaps for another device.
        device: where this rank computes.
    """
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_generators(seed: int, position: Position) -> None:
    """Seed the generators, of a GPU too, by the job's seed, the position, and the rank."""
    _seed((seed, position.epoch, position.samples, dist.get_rank()))


def seed_alike(seed: int) -> None:
    """Seed the generators by the job's seed alone, the same on every rank.

    For what runs before training, such as a user's function that splits data at random.
    """
    _seed(seed)


def _seed(entropy: int | tuple[int, ...]) -> None:
    (value,) = np.random.SeedSequence(entropy).generate_state(1)
    torch.manual_seed(int(value))
    np.random.seed(int(value))
    random.seed(int(value))
