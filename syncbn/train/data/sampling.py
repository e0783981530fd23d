"""Which rank sees which samples when: shares of one shuffled order, for any number of ranks."""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from syncbn.errors import ConfigError, DataError, SyncBNError
from syncbn.train.schema import DataConfig, Shares

Key = tuple[int, int]
Batch = tuple[Tensor, Tensor]

# For a batch that another process prepares; one that died is an error then, and no hang.
_WORKER_TIMEOUT_S = 120
# The kernel tells of a process's end some milliseconds after its sockets are closed.
_NOTICE_S = 1.0


class Samples(Protocol):
    """Samples with targets, in whatever store, that are fetched by the batch.

    Two attributes are used if there are any: `labels`, those of all samples, shape (N,), int64, by
    which samples are shared out and balanced; and a method `plain()`, which returns the same
    samples without random changes, for those of the training data that validate.
    """

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return the samples and the targets of keys, each an epoch and an index.

        Args:
            keys: any number of them, also none.

        Returns:
            Raw samples, shape (n, *shape), and labels, shape (n,), int64, or masks, shape
            (n, H, W), int64, with 255 for pixels that count for nothing.
        """
        ...


class TrainingShare(Sampler[list[Key]]):
    """One rank's batches of the training data, in an order that depends on seed and epoch alone.

    Over all ranks, batch k of an epoch is the samples k·B to (k + 1)·B of one permutation, with
    B = batch_size·world_size, and rank r takes every world_size-th of them from the r-th on. The
    last batch may be smaller; it is shared out likewise, so that a rank may get none of it.

    A position within an epoch is a number of samples over all ranks, and means the same for every
    world size, unless samples are shared out by their labels.

    Args:
        size: training samples.
        batch_size: of one rank.
        rank: this rank.
        world_size: how many there are.
        seed: decides the order.
        labels: shape (size,); of samples in the order of these, each rank gets the next part, and
            no other ones in any epoch. None: any rank may get any sample.
        drop_last: whether an epoch leaves out the samples of a last batch that is not full.
        balanced: labels, shape (size,), int64; instead of a permutation, an epoch is `size` draws
            with replacement, of which each class that has a sample gets the same number, to one.
            None: every sample comes once an epoch.

    Raises:
        ConfigError: without the last batch there is none, or both `labels` and `balanced` are
            given.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        labels: Tensor | None = None,
        *,
        drop_last: bool = False,
        balanced: Tensor | None = None,
    ) -> None:
        self._size = size
        self._whole = batch_size * world_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._drop_last = drop_last
        self._sorted = None if labels is None else labels.argsort(stable=True)
        self._classes = None if balanced is None else _members(balanced)
        if labels is not None and balanced is not None:
            raise ConfigError(
                "data.balanced=true draws from all classes on every replica, which "
                "data.shares=by_class rules out; choose one of them"
            )
        if drop_last and size < self._whole:
            raise ConfigError(
                f"data.drop_last=true leaves none of {size} training samples, since one batch of "
                f"{world_size} replicas is {self._whole}; choose data.drop_last=false, or a "
                f"data.batch_size smaller than {batch_size}"
            )
        self.set_position(0)

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Begin the next iteration in an epoch, after so many samples over all ranks."""
        self._epoch = epoch
        self._start = start

    @property
    def size_of_epoch(self) -> int:
        """The position, in samples over all ranks, at which the present epoch ends.

        It is the size, less what is dropped; from a position that another world size has left, that
        may be another number than from the epoch's start.
        """
        return self._end(self._start)

    def total(self, number: int) -> int:
        """Return how many samples a batch has over all ranks, counted from the position."""
        return min(self._whole, self.size_of_epoch - self._start - number * self._whole)

    def steps(self, samples_from: int, accumulate: int) -> int:
        """Return the optimizer steps from a position in an epoch to its end.

        Args:
            samples_from: the position, in samples over all ranks.
            accumulate: batches of a step; the last step of an epoch may have fewer.
        """
        return math.ceil((self._end(samples_from) - samples_from) / (self._whole * accumulate))

    def last_batch(self) -> list[int]:
        """Return how many samples each rank has in an epoch's last batch."""
        total = self._end(0) % self._whole or self._whole
        return [len(range(rank, total, self._world_size)) for rank in range(self._world_size)]

    def __len__(self) -> int:
        return self.steps(self._start, 1)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self._epoch
        (value,) = np.random.SeedSequence((self._seed, epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(value))
        rest = self._order(generator)[self._start :]
        for number in range(len(self)):
            batch = rest[number * self._whole :][: self._whole]
            yield [(epoch, index) for index in batch[self._rank :: self._world_size].tolist()]

    def _end(self, start: int) -> int:
        left = self._size - start
        return start + (left // self._whole * self._whole if self._drop_last else left)

    def _order(self, generator: torch.Generator) -> Tensor:
        """Return the samples of an epoch, of which each rank takes every world_size-th."""
        if self._classes is not None:
            return _drawn_evenly(self._classes, self._size, generator)
        if self._sorted is None:
            return torch.randperm(self._size, generator=generator)
        order = torch.empty_like(self._sorted)
        first = 0
        for rank in range(self._world_size):
            places = order[rank :: self._world_size]
            own = self._sorted[first : first + len(places)]
            places.copy_(own[torch.randperm(len(own), generator=generator)])
            first += len(places)
        return order


def share_out(
    config: DataConfig, samples: Samples, rank: int, world_size: int, seed: int
) -> TrainingShare:
    """Return a rank's share of the training samples, as configured.

    Raises:
        ConfigError: `config` needs the labels of all samples, which are not in memory; or see
            `TrainingShare`.
    """
    by_class = config.shares is Shares.by_class
    return TrainingShare(
        len(samples),
        config.batch_size,
        rank,
        world_size,
        seed,
        _labels(samples, "data.shares=by_class", config, "data.shares=mixed") if by_class else None,
        drop_last=config.drop_last,
        balanced=_labels(samples, "data.balanced=true", config, "data.balanced=false")
        if config.balanced
        else None,
    )


def labels_in_memory(samples: Samples) -> Tensor | None:
    """Return the labels of all samples, shape (n,), int64; None if they are not at hand."""
    labels = getattr(samples, "labels", None)
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.dim() == 1:
        return labels
    return None


def _labels(samples: Samples, setting: str, config: DataConfig, instead: str) -> Tensor:
    labels = labels_in_memory(samples)
    if labels is None:
        raise ConfigError(
            f"{setting} needs the labels of all samples in memory, which data={config.name} has "
            f"not; choose {instead}"
        )
    return labels


def _members(labels: Tensor) -> list[Tensor]:
    """Return the samples of each class that has any."""
    _, counts = labels.unique(return_counts=True)
    return list(labels.argsort(stable=True).split(counts.tolist()))


def _drawn_evenly(classes: list[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Return `size` samples, as many of each class to one, which are drawn with replacement."""
    each, left = divmod(size, len(classes))
    more = torch.zeros(len(classes), dtype=torch.int64)
    more[torch.randperm(len(classes), generator=generator)[:left]] = 1
    drawn = [
        members[torch.randint(len(members), (each + extra,), generator=generator)]
        for members, extra in zip(classes, more.tolist(), strict=True)
    ]
    return torch.cat(drawn)[torch.randperm(size, generator=generator)]


def held_out_batches(size: int, batch_size: int, rank: int, world_size: int) -> list[list[Key]]:
    """Return one rank's batches of a held-out split; those of all ranks hold each sample once."""
    keys = [(0, index) for index in range(rank, size, world_size)]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]


class Loader:
    """Batches of samples, as often as they are iterated over.

    What syncbn says of a sample reaches the caller in the same words, as a `DataError`, also from a
    worker, to which torch would add the traceback.

    Args:
        loader: yields batches, or errors of syncbn in their place.
    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def close(self) -> None:
        """End the processes that fetch, in order; it may not be iterated over again.

        A process that is killed instead may hold a lock for which torch waits, for ever, when the
        loader is deleted (torch 2.14).
        """
        iterator: Any = vars(self._loader).get("_iterator")
        if iterator is not None:
            # Where one has been killed, the caller has heard of it, or does not need it any more.
            with suppress(RuntimeError):
                iterator._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._loader:
                if isinstance(batch, SyncBNError):
                    raise DataError(str(batch)) from batch
                yield batch
        except (ConnectionError, EOFError) as error:
            if self._loader.num_workers == 0:
                raise
            # This process noticed before torch did, whose handler of a worker's end raises wherever
            # Python is by then: better here than in what cleans up.
            time.sleep(_NOTICE_S)
            raise RuntimeError(
                f"a DataLoader worker does not answer: {type(error).__name__}: {error}; most "
                "likely it was killed, as for using too much memory: try fewer data.workers"
            ) from error


def make_loader(
    samples: Samples, batches: Iterable[list[Key]], workers: int, pinned: bool
) -> Loader:
    """Return a loader of batches of keys, which leaves the global random generators alone.

    Args:
        samples: where they come from.
        batches: the keys; iterated over anew each time.
        workers: processes that fetch them; 0: this one does.
        pinned: whether batches shall lie in memory from which they are copied to a GPU fast.
    """
    more: dict[str, Any] = {}
    if workers > 0:
        # Workers end when their parent does, which must be this process: that of a server's forks
        # would be the server. They share what is in memory, and compute in one thread.
        more = {
            "persistent_workers": True,
            "timeout": _WORKER_TIMEOUT_S,
            "multiprocessing_context": "fork",
            "worker_init_fn": _leave_signals_to_rank,
        }
    return Loader(
        DataLoader(
            _Fetched(samples),  # pyright: ignore[reportArgumentType] -- by batches, without __getitem__
            batch_sampler=batches,  # pyright: ignore[reportArgumentType] -- any iterable will do
            num_workers=workers,
            pin_memory=pinned,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            **more,
        )
    )


class _Fetched:
    """Batches of samples, or the error of ours that they end in."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitems__(self, keys: list[Key]) -> Batch | SyncBNError:
        try:
            return self._samples.__getitems__(keys)
        except SyncBNError as error:
            return error


def _leave_signals_to_rank(worker: int) -> None:
    """Ignore signals to stop, which a scheduler sends to every process: the rank ends its workers.

    A worker that ended by one would make its rank fail before it has written its state.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
