"""Optimizers, schedules and moving averages of weights, as configured."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from syncbn.errors import ConfigError
from syncbn.train.schema import (
    AdamWConfig,
    CosineConfig,
    OneCycleConfig,
    OptimConfig,
    ScheduleConfig,
    SgdConfig,
    StepConfig,
    TorchOptimConfig,
    WarmupConfig,
)


def make_optimizer(parameters: Iterable[Tensor], config: OptimConfig) -> Optimizer:
    """Return the configured optimizer over parameters.

    SGD and AdamW update all parameters in one pass over memory, where torch's default on the CPU is
    several passes over each: the same operations, and so the same weights but for AdamW's rounding.

    Raises:
        ConfigError: torch's optimizer does not take the configured arguments.
    """
    parameters = list(parameters)
    fused = all(parameter.is_floating_point() for parameter in parameters)  # torch's condition
    match config:
        case SgdConfig():
            return SGD(
                parameters,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.momentum > 0,
                fused=fused,
            )
        case AdamWConfig():
            return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        case TorchOptimConfig():
            try:
                return getattr(torch.optim, config.optimizer)(
                    parameters, lr=config.lr, **config.arguments
                )
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"optim.arguments={config.arguments} do not fit {config.optimizer}: {error}"
                ) from error
        case _:
            raise AssertionError(f"no optimizer for {config}")


def make_schedule(
    optimizer: Optimizer, config: ScheduleConfig, total_steps: int, steps_per_epoch: int
) -> LRScheduler:
    """Return the configured learning-rate schedule over all steps of a run.

    Source: Loshchilov and Hutter, "SGDR" (2017), equation 5, without restarts (cosine); Smith and
    Topin, "Super-Convergence" (2018) (one_cycle).
    """
    if isinstance(config, OneCycleConfig):
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(
            optimizer, peaks, total_steps, pct_start=config.rise, cycle_momentum=False
        )
    assert isinstance(config, WarmupConfig)
    warmup_steps = min(config.warmup_steps, total_steps - 1)
    match config:
        case CosineConfig():
            main = CosineAnnealingLR(optimizer, total_steps - warmup_steps)
        case StepConfig():
            main = StepLR(optimizer, config.every_epochs * steps_per_epoch, config.factor)
        case _:
            main = ConstantLR(optimizer, factor=1)
    if warmup_steps == 0:
        return main
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])


class WeightAverage(AveragedModel):
    """An exponential moving average of a model: of its parameters and its running statistics.

    Statistics are averaged with the weights that they belong to; how many batches they have seen
    is copied, for an average of counts counts nothing.

    Args:
        model: what is averaged; a copy of it holds the average.
        decay: weight of the old value.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def update_parameters(self, model: nn.Module) -> None:
        """Take a step towards the model as it is now."""
        super().update_parameters(model)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            if not ours.is_floating_point():
                ours.copy_(theirs)
