"""Configurations of the jobs of a sweep, which Hydra composes once, and not each time."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig

# How many are kept, which take about a megabyte each.
_LIMIT = 64


@contextmanager
def composing_once() -> Generator[None]:
    """Have each job's configuration composed once in this process, which takes a quarter second.

    Hydra's sweepers compose all of them to see whether they can be, and its launchers again when
    their turn comes.
    """
    composed: dict[tuple[str, ...], DictConfig] = {}

    def once(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
        def load_sweep_config(
            loader: ConfigLoader, master_config: DictConfig, sweep_overrides: list[str]
        ) -> DictConfig:
            key = tuple(sweep_overrides)
            if (found := composed.pop(key, None)) is not None:
                return found
            found = load(loader, master_config, sweep_overrides)
            if len(composed) < _LIMIT:
                composed[key] = found
            return found

        return load_sweep_config

    loaders = {loader: loader.load_sweep_config for loader in ConfigLoader.__subclasses__()}
    for loader, load in loaders.items():
        loader.load_sweep_config = once(load)
    try:
        yield
    finally:
        for loader, load in loaders.items():
            loader.load_sweep_config = load
