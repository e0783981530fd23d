"""Optimizers and learning-rate schedules, as configured."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from syncbn.errors import ConfigError
from syncbn.train.config import AdamWConfig, OptimConfig, SgdConfig


def make_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> Optimizer:
    """Return the configured optimizer over parameters."""
    match config:
        case SgdConfig():
            return SGD(
                parameters,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.momentum > 0,
            )
        case AdamWConfig():
            return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        case _:
            raise ConfigError(f"optim.name={config.name}: no such optimizer")


def make_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """Return the schedule to step after each optimizer step: linear warm-up, then a cosine to 0.

    A warm-up that would not leave room for the cosine is cut to all steps but one.

    Source: Loshchilov and Hutter, "SGDR" (2017), equation 5, without restarts.
    """
    warmup_steps = min(config.warmup_steps, total_steps - 1)
    cosine = CosineAnnealingLR(optimizer, total_steps - warmup_steps)
    if warmup_steps == 0:
        return cosine
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])
