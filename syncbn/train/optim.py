"""Optimizers, as configured, and a step of theirs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import SGD, AdamW, Optimizer

from syncbn.errors import ConfigError
from syncbn.train.schema import (
    AdamWConfig,
    OptimConfig,
    SgdConfig,
    TorchOptimConfig,
)


def make_optimizer(
    parameters: Iterable[Tensor] | Sequence[dict[str, Any]], config: OptimConfig
) -> Optimizer:
    """Return the configured optimizer over parameters, or over groups with their own settings.

    SGD and AdamW update all parameters in one pass over memory, where torch's default on the CPU is
    several passes over each: the same operations, and so the same weights but for AdamW's rounding.

    Args:
        parameters: what learns, or groups of it as torch's optimizers take them.
        config: the optimizer.

    Raises:
        ConfigError: torch's optimizer does not take the configured arguments.
    """
    groups: list[Any] = list(parameters)
    each = [group["params"] if isinstance(group, dict) else [group] for group in groups]
    fused = all(weight.is_floating_point() for weights in each for weight in weights)  # torch's
    match config:
        case SgdConfig():
            return SGD(
                groups,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.momentum > 0,
                fused=fused,
            )
        case AdamWConfig():
            return AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        case TorchOptimConfig():
            try:
                return getattr(torch.optim, config.optimizer)(
                    groups, lr=config.lr, **config.arguments
                )
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"optim.arguments={config.arguments} do not fit {config.optimizer}: {error}"
                ) from error
        case _:
            raise AssertionError(f"no optimizer for {config}")


def can_skip(optimizer: Optimizer) -> bool:
    """Return whether an optimizer can leave out a step by what a tensor on its device says.

    The fused ones can, which is what torch chooses them by for its own gradient scaler.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def take_step(
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    clip_norm: float | None,
    skip: Tensor | None = None,
) -> Tensor:
    """Change the weights by their gradients, unless one of these is not finite.

    If the optimizer `can_skip` and `skip` is given, the host does not wait for the device.

    Args:
        optimizer: holds the weights.
        scaler: scaled the loss; disabled unless the precision is float16. Its scale moves.
        clip_norm: gradients whose norm is larger are scaled down to it; None: never.
        skip: 0-d, float32, on the device of the weights: if it is 1, the weights and the state of
            the optimizer stay as they are, and if it is 0, it changes nothing. Only for an
            optimizer that `can_skip`.

    Returns:
        0-d, float32, on the device of the weights: 1 if a gradient is not finite, so that weights
        and state are as before, or else 0.
    """
    if skip is not None or scaler.is_enabled():
        _begin_momentum(optimizer)
    if scaler.is_enabled():
        scaler.unscale_(optimizer)
        found = scaler._found_inf_per_device(optimizer)  # pyright: ignore[reportPrivateUsage] -- as torch's FSDP does, to tell all ranks
        overflows = [each.reshape(()) for each in found.values()]
        overflow = overflows[0].clone() if overflows else torch.zeros(())
        if skip is not None:
            for each in found.values():
                torch.maximum(each, skip, out=each)  # the kernels look whether it is exactly 1
    else:
        overflow = _overflow(optimizer)
        if skip is None and overflow:
            return overflow
    if clip_norm is not None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        clip_grad_norm_(weights, clip_norm)
    if skip is None or scaler.is_enabled():
        scaler.step(optimizer)
    else:
        assert can_skip(optimizer)
        optimizer.found_inf = torch.maximum(overflow, skip)  # pyright: ignore[reportAttributeAccessIssue] -- how torch's scaler tells it
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue] -- as above
    scaler.update()
    return overflow


def _overflow(optimizer: Optimizer) -> Tensor:
    """Return 1 if a gradient is not finite, or else 0, as `take_step` does."""
    groups = optimizer.param_groups
    gradients = [weight.grad for group in groups for weight in group["params"]]
    present = [gradient for gradient in gradients if gradient is not None]
    # The largest value: squares of large ones would overflow.
    largest = get_total_norm(present, norm_type=math.inf)
    return largest.isfinite().logical_not().to(torch.float32)


def _begin_momentum(optimizer: Optimizer) -> None:
    """Set the momentum of SGD to 0 before its first step.

    Otherwise torch's fused SGD takes fresh memory for it, which a first step that is left out does
    not fill, and the second one adds to (torch 2.14).
    """
    if isinstance(optimizer, SGD) and not optimizer.state:
        for group in optimizer.param_groups:
            if group["momentum"] != 0:
                for weight in group["params"]:
                    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
