"""What ranks load that takes long, loaded once where they are forked from."""

import importlib
from contextlib import suppress

from syncbn.train.data.images import split_digits
from syncbn.train.run.plots import warm_up
from syncbn.train.schema import TrainConfig

# What DDP and the optimizers load.
_ALWAYS = ("torch._dynamo",)
_OF_MODELS = {"torchvision": ("torchvision",), "timm": ("timm",)}
_OF_TRACKERS = {"wandb": ("wandb",)}
_OF_DIGITS = ("digits", "digit_scenes")


def preload() -> None:
    """Load what the ranks of every job need."""
    _import(*_ALWAYS)


def preload_for(config: TrainConfig) -> None:
    """Load what the ranks of a job need before they train, of well-known packages alone."""
    preload()
    _import(*_OF_MODELS.get(config.model.name, ()), *_OF_TRACKERS.get(config.track.name, ()))
    if config.data.name in _OF_DIGITS:
        with suppress(Exception):
            split_digits()


def preload_for_the_end() -> None:
    """Load what the first rank of a job needs after it has trained."""
    with suppress(Exception):
        warm_up()


def _import(*modules: str) -> None:
    """Import modules; what is not installed, or fails, fails again where it is needed."""
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)
