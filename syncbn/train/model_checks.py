"""What a model must have to be trained as configured."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base

from syncbn.errors import ConfigError
from syncbn.layers.base import Synchronized
from syncbn.models import ChannelAffine
from syncbn.train.schema import NoNormConfig, TrainConfig

_SHOWN = 8


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


def shown(names: list[str]) -> str:
    """Return names as a part of a message, the first few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
