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


def shown(names: list[str]) -> str:
    """Return names as a part of a message, the first few of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
