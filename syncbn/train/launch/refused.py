"""Jobs of a sweep that Hydra cannot compose, set aside so that the others go on without them."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf.errors import OmegaConfBaseException

from syncbn.errors import ConfigError
from syncbn.train.config import explain


@contextmanager
def setting_aside(refuse: Callable[[list[str], ConfigError], None]) -> Generator[None]:
    """Have Hydra's own sweeper leave out, within the context, the jobs that it cannot compose.

    It composes them before it launches any, and would refuse the sweep for one.

    Args:
        refuse: called for each of them, with its overrides and why; not if no job can be composed,
            for then the sweep is refused.
    """
    known: set[int] = set()  # one check is of all batches of a sweeper

    def check(sweeper: Any, batch: list[Sequence[str]]) -> None:
        if not hasattr(sweeper, "split_overrides_to_chunks"):  # one that chooses job after job
            original(sweeper, batch)
            return
        if id(sweeper) in known:
            return
        known.add(id(sweeper))
        loader = sweeper.hydra_context.config_loader
        good: list[Sequence[str]] = []
        bad: list[tuple[list[str], Exception]] = []
        for overrides in (job for jobs in sweeper.overrides for job in jobs):
            try:
                loader.load_sweep_config(sweeper.config, list(overrides))
                good.append(overrides)
            except (HydraException, OmegaConfBaseException) as error:
                bad.append((list(overrides), error))
        if not good:
            raise bad[0][1]
        if bad:
            for overrides, error in bad:
                refuse(overrides, explain(error))
            chunks = list(sweeper.split_overrides_to_chunks(good, sweeper.max_batch_size))
            batch[:] = chunks[0]  # the sweeper has this one already
            sweeper.overrides = [batch, *chunks[1:]]

    original = Sweeper.validate_batch_is_legal
    # Of the base class, as Hydra loads the others anew.
    Sweeper.validate_batch_is_legal = check  # pyright: ignore[reportAttributeAccessIssue] -- sequences are lists
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = original
