"""The data of a run on one rank: loaded, compared with the other ranks, handed out in batches."""

from collections.abc import Iterable, Iterator
from typing import Any

from syncbn.errors import ConfigError
from syncbn.train.agreement import gathered, together
from syncbn.train.data import Batch, Dataset, Samples
from syncbn.train.data.datasets import load_dataset
from syncbn.train.data.digest import digest
from syncbn.train.data.sampling import Loader, held_out_batches, make_loader, share_out
from syncbn.train.launch.watchdog import Watch
from syncbn.train.schema import CustomTaskConfig, TrainConfig

_HELD_OUT_BATCH_SIZE = 64


class Feed:
    """This rank's batches of the configured data set.

    Collective: the ranks compare digests of their data.

    Args:
        config: the job.
        rank: this rank.
        world_size: how many there are.
        pinned: whether batches shall lie in memory from which they are copied to a GPU fast.
        watch: hears that this rank moves, with each batch.

    Attributes:
        dataset: the data set.
        sha256: its digest.
        share: which training samples this rank has when.
        training: the batches of the training samples, as `share` says.
        validation: those of the validation samples; None if there are none.

    Raises:
        ConfigError: the data cannot be had as configured, or differ between ranks; on every rank.
    """

    def __init__(
        self, config: TrainConfig, rank: int, world_size: int, pinned: bool, watch: Watch
    ) -> None:
        self._config = config
        self._place = rank, world_size
        self._pinned = pinned
        self._watch = watch
        self._loaders: list[Loader] = []
        any_targets = isinstance(config.task, CustomTaskConfig)

        def load() -> tuple[Dataset, str]:
            with watch.working(0, "loading data"):
                dataset = load_dataset(config.data, config.seed, any_targets=any_targets)
                return dataset, digest(dataset)

        self.dataset, self.sha256 = together(load)
        self._compare()
        self.share = together(
            lambda: share_out(config.data, self.dataset.train, rank, world_size, config.seed)
        )
        self.training = self._load(self.dataset.train, self.share)
        held_out = self.dataset.validation
        self.validation = None if held_out is None else self.held_out(held_out)

    def _compare(self) -> None:
        every = gathered(self.sha256)
        others = [rank for rank, each in enumerate(every) if each != every[0]]
        if others:
            raise ConfigError(
                f"the data of the ranks {others} are others than those of rank 0: their files "
                "differ, or data.factory draws from generators of its own; let all ranks read the "
                "same files, and draw from generators that are seeded by a constant"
            )

    def held_out(self, samples: Samples) -> Loader:
        """Return this rank's batches of samples, of which each is in one batch of one rank."""
        # As many as training has memory for, of which a few large images may take all.
        size = min(_HELD_OUT_BATCH_SIZE, self._config.data.batch_size)
        return self._load(samples, held_out_batches(len(samples), size, *self._place))

    def once_more(self) -> Loader:
        """Return the batches of the training samples of the first epoch, from new workers."""
        self.share.set_position(0)
        return self._load(self.dataset.train, self.share)

    def _load(self, samples: Samples, batches: Iterable[Any]) -> Loader:
        loader = make_loader(samples, batches, self._config.data.workers, self._pinned)
        self._loaders.append(loader)
        return loader

    def until_told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches, at least one, until this rank is told to stop."""
        for batch in batches:
            yield batch
            if self._watch.stop_signal:
                return

    def close(self) -> None:
        """End the processes that fetch samples."""
        for loader in self._loaders:
            loader.close()
