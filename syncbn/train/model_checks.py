"""What a model must have to be trained as configured."""

import re
from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base

from syncbn.errors import ConfigError, DataError
from syncbn.layers.base import Synchronized
from syncbn.models import ChannelAffine
from syncbn.train.schema import NoNormConfig, TrainConfig

_SHOWN = 8
# In DDP's words.
_INDICES = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")


def check_normalization(model: nn.Module, name: str, config: TrainConfig) -> None:
    """Raise if a normalization is configured, and a model has no place for it.

    Args:
        model: as built, with whatever stands in the places of its batch normalizations.
        name: of its architecture.
        config: the job.

    Raises:
        ConfigError: the model has no batch normalization, and norm is not none.
    """
    if isinstance(config.norm, NoNormConfig):
        return
    places = (_BatchNorm, Synchronized, ChannelAffine)
    if not any(isinstance(module, places) for module in model.modules()):
        raise ConfigError(
            f"model: {name} has no batch normalization, so norm={config.norm.name} would change "
            "nothing; choose norm=none to train it as it is (layer, group and instance "
            "normalization stay), or a model with batch normalization"
        )


def check_used(model: nn.Module, config: TrainConfig) -> None:
    """Raise if a parameter has no gradient after a backward pass, and all must have one.

    Args:
        model: after a backward pass, on all that its training output holds.
        config: the job.

    Raises:
        ConfigError: a parameter that learns was not used, and launch.find_unused_parameters is off.
    """
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if unused and not config.launch.find_unused_parameters:
        raise ConfigError(
            f"model: {shown(unused)} had no part in the loss, so that the replicas would wait for "
            "gradients that never come; leave them out of the model, freeze them with "
            "optim.freeze, or choose launch.find_unused_parameters=true, which looks for them in "
            "each step"
        )


@contextmanager
def explaining_unused(model: nn.Module) -> Generator[None]:
    """Raise in our words if DDP notes in a forward pass that the one before had unused parameters.

    Such as those of an output that the task leaves out of the loss, of which `check_used` cannot
    know.

    Args:
        model: without its wrapper.

    Raises:
        ConfigError: a parameter had no part in the loss of the step before.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "Expected to have finished reduction" not in text:
            raise
        learning = [name for name, each in model.named_parameters() if each.requires_grad]
        found = _INDICES.search(text)
        numbers = [int(number) for number in found[1].split()] if found else []
        names = [learning[number] for number in numbers if number < len(learning)]
        raise ConfigError(
            f"model: {shown(names) if names else 'some parameters'} had no part in the loss of the "
            "step before, though perhaps in an output; have the task learn from every output that "
            "the model gives in training, freeze them with optim.freeze, or choose "
            "launch.find_unused_parameters=true"
        ) from error


@contextmanager
def on_this_rank_alone() -> Generator[None]:
    """Raise a ConfigError as a DataError: others do not have it, so this rank must speak of it.

    Raises:
        DataError: in place of a ConfigError.
    """
    try:
        yield
    except ConfigError as error:
        raise DataError(str(error)) from error


def shown(names: list[str]) -> str:
    """Return names as a part of a message, the first few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
