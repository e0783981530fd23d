"""Learning-rate schedules, as configured."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from syncbn.train.schema import (
    CosineConfig,
    OneCycleConfig,
    ScheduleConfig,
    StepConfig,
    WarmupConfig,
)


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
