"""Which parameters learn, how fast, and which of them decay: patterns on their names."""

import difflib
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage] -- batch and instance normalization have no other common base

from syncbn.errors import ConfigError
from syncbn.layers.base import Synchronized
from syncbn.models import ChannelAffine
from syncbn.train.schema import AdamWConfig, OptimConfig, SgdConfig, TorchOptimConfig

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, Synchronized, ChannelAffine)


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Exclude from learning, in place, the parameters whose names match a pattern.

    A normalization of which all parameters are frozen stays in evaluation mode, whatever mode the
    model is set to: it normalizes by its running statistics, and these stay as they are. To be
    called before DistributedDataParallel is made, which otherwise waits for their gradients.

    Args:
        model: in any mode.
        patterns: as `fnmatch` takes them, on qualified names of parameters: "backbone.*".

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to learn.
    """
    names = _names(model)
    for pattern in patterns:
        for name in _matching("optim.freeze", pattern, names):
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"optim.freeze={list(patterns)} leaves no parameter to learn; choose narrower patterns"
        )
    for layer in model.modules():
        if isinstance(layer, _NORMS) and is_frozen(layer):
            layer.eval()
            layer.__dict__["train"] = _stay


def is_frozen(layer: nn.Module) -> bool:
    """Return whether a layer has parameters, and none of them learns."""
    parameters = list(layer.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the parameters that learn, grouped by learning rate and by whether they decay.

    The groups' order depends on the configuration alone: the base rate first, then the patterns
    in their order, and each first with those that decay. If all are treated alike, it is one group.

    Args:
        model: what learns.
        config: of the optimizer, whose lr_scale has patterns as `freeze` does, of which the first
            that matches counts. Unless decay_all is set, parameters of one dimension, which are
            biases and the γ and β of normalizations, do not decay, and nothing of a normalization.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = _names(model)
    scales: dict[int, str] = {}
    for pattern in config.lr_scale:
        for name in _matching("optim.lr_scale", pattern, names):
            scales.setdefault(id(names[name]), pattern)
    keeps: set[int] = set()
    if not config.decay_all and _decays(config):
        keeps = {id(each) for each in model.parameters() if each.dim() <= 1}
        norms = (module for module in model.modules() if isinstance(module, _NORMS))
        keeps |= {id(each) for norm in norms for each in norm.parameters()}
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[scales.get(id(parameter)), id(parameter) in keeps].append(parameter)
    found: list[dict[str, Any]] = []
    for pattern in (None, *config.lr_scale):
        for keep in (False, True):
            if parameters := groups.get((pattern, keep)):
                group: dict[str, Any] = {"params": parameters}
                if pattern is not None:
                    group["lr"] = config.lr * config.lr_scale[pattern]
                if keep:
                    group["weight_decay"] = 0.0
                found.append(group)
    return found


def _stay(mode: bool = True) -> None:
    """Take the place of a frozen layer's `train`, which its model calls for each of its parts."""


def _decays(config: OptimConfig) -> bool:
    """Return whether the configured optimizer has a weight decay that is not 0."""
    match config:
        case SgdConfig() | AdamWConfig():
            return config.weight_decay > 0
        case TorchOptimConfig():
            known = inspect.signature(getattr(torch.optim, config.optimizer)).parameters
            if "weight_decay" not in known:
                return False
            return config.arguments.get("weight_decay", known["weight_decay"].default) != 0
        case _:
            raise AssertionError(f"no optimizer for {config}")


def _names(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return all parameters by all names that they have."""
    return dict(model.named_parameters(remove_duplicate=False))


def _matching(key: str, pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that match a pattern.

    Raises:
        ConfigError: there is none.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        known = list(names)
        parts = {name.rpartition(".")[0] for name in known} - {""}
        parts |= {part.partition(".")[0] for part in parts}
        wholes = [f"{part}.*" for part in sorted(parts)]
        close = difflib.get_close_matches(pattern, [*wholes, *known], n=3) or known[:3]
        raise ConfigError(
            f"{key}: no parameter's name matches {pattern!r}; did you mean "
            f"{' or '.join(map(repr, close))}?"
        )
    return found
