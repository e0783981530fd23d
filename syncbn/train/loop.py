"""The training loop: what every rank does between joining the process group and leaving it."""

import dataclasses
import logging
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from syncbn.bundle import Architecture, Description, write_bundle
from syncbn.convert import convert_sync_batchnorm
from syncbn.errors import TrainingError
from syncbn.models import build_model
from syncbn.train.checkpoint import Checkpoint, share_checkpoint, write_checkpoint
from syncbn.train.config import LocalNormConfig, SyncNormConfig, TrainConfig, config_sha256
from syncbn.train.data import DATASETS, Dataset, held_out_share, training_batches
from syncbn.train.optim import make_optimizer, make_schedule
from syncbn.train.run_directory import RunDirectory
from syncbn.train.tracking import NoTracker, start_tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Training:
    """What is trained, on one rank: the model, its replica under DDP, and what moves it."""

    config: TrainConfig
    device: torch.device
    dataset: Dataset
    batches: DataLoader[tuple[Tensor, ...]]
    total_steps: int
    architecture: Architecture
    model: nn.Module
    replica: DistributedDataParallel
    optimizer: Optimizer
    schedule: LRScheduler

    def checkpoint(self, epoch: int, step: int, metrics: dict[str, float]) -> Checkpoint:
        """Return the present state."""
        return Checkpoint(
            epoch,
            step,
            metrics,
            self.model.state_dict(),
            self.optimizer.state_dict(),
            self.schedule.state_dict(),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Return to a former state."""
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.schedule.load_state_dict(checkpoint.schedule)


def train(config: TrainConfig, run: RunDirectory | None, device: torch.device) -> dict[str, float]:
    """Train the configured model over all ranks of the default process group.

    After each epoch rank 0 writes metrics and a checkpoint, from which a run that was killed goes
    on; after the last, the bundle.

    Args:
        config: the job, the same on every rank.
        run: where rank 0 writes; None on the other ranks.
        device: where this rank computes.

    Returns:
        The metrics of the last epoch, the same on every rank but for the rate: epoch, step, lr,
        train_loss and test_loss (nats a sample), test_accuracy (0 to 1), images_per_s (over all
        ranks).

    Raises:
        ConfigError: the data cannot fill a step, on every rank.
        TrainingError: a loss is not finite any more, or a checkpoint cannot be read, on every
            rank.
    """
    training = _prepare(config, device)
    total_steps = training.total_steps
    epoch, step, metrics = 0, 0, dict[str, float]()
    checkpoint = share_checkpoint(None if run is None else run.checkpoint_file)
    if checkpoint is not None:
        epoch, step, metrics = checkpoint.epoch, checkpoint.step, checkpoint.metrics
        training.restore(checkpoint)
        log.info("resuming after epoch %d, step %d", epoch, step)
    if run is not None:
        run.forget_metrics_after(epoch)

    tracker = NoTracker() if run is None else start_tracker(config, run.path)
    silent = run is None or not sys.stderr.isatty()
    with (
        tqdm(total=total_steps, initial=step, unit="step", disable=silent) as progress,
        logging_redirect_tqdm([logging.getLogger("syncbn")] if not silent else []),
    ):
        while step < total_steps:
            steps = min(len(training.batches), total_steps - step)
            metrics = _train_epoch(training, epoch, steps, progress)
            epoch, step = epoch + 1, step + steps
            metrics = {"epoch": epoch, "step": step} | metrics
            for loss in ("train_loss", "test_loss"):
                if not math.isfinite(metrics[loss]):
                    raise TrainingError(
                        f"{loss} is {metrics[loss]} after epoch {epoch}; "
                        f"try a lower optim.lr than {config.optim.lr}"
                    )
            if run is not None:
                run.append_metrics(metrics)
                write_checkpoint(run.checkpoint_file, training.checkpoint(epoch, step, metrics))
            tracker.log(step, metrics)
            log.info(
                "epoch %2d/%d  train loss %.4f  test loss %.4f  accuracy %.2f %%  %.0f images/s",
                epoch,
                config.epochs,
                metrics["train_loss"],
                metrics["test_loss"],
                100 * metrics["test_accuracy"],
                metrics["images_per_s"],
            )
    tracker.finish()
    if run is not None:
        _export(training, run, metrics)
    return metrics


def evaluate(model: nn.Module, dataset: Dataset, device: torch.device) -> tuple[float, float]:
    """Return the mean loss (nats) and the accuracy (0 to 1) on the test data, over all ranks.

    Collective: one broadcast a buffer from rank 0, whose running statistics are the ones that will
    be served, and one all-reduce of 3 float64. Leaves the model in evaluation mode.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
    model.eval()
    samples, labels = held_out_share(dataset, dist.get_rank(), dist.get_world_size())
    labels = labels.to(device)
    with torch.inference_mode():
        logits: Tensor = model(dataset.preprocessing.apply(samples.to(device)))
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
    count = torch.full_like(correct, len(labels))
    sums = torch.stack([loss.double(), correct.double(), count.double()])
    dist.all_reduce(sums)
    loss_sum, correct_sum, total = sums.tolist()
    return loss_sum / total, correct_sum / total


def describe_architecture(config: TrainConfig, dataset: Dataset) -> Architecture:
    """Return the name and the arguments with which `build_model` makes the configured model."""
    arguments: dict[str, Any] = dataclasses.asdict(config.model)
    name = arguments.pop("name")
    arguments |= {"in_channels": dataset.input.shape[0], "num_classes": len(dataset.classes)}
    if isinstance(config.norm, LocalNormConfig):  # synchronised too; serving needs no more
        arguments |= {"norm": "batch", "eps": config.norm.eps, "momentum": config.norm.momentum}
    else:
        arguments |= {"norm": "none"}
    return Architecture(name=name, arguments=arguments)


def _prepare(config: TrainConfig, device: torch.device) -> _Training:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = DATASETS[config.data.name]()
    batches = training_batches(dataset, config.data.batch_size, rank, world_size, config.seed)
    total_steps = config.epochs * len(batches)
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)
    architecture = describe_architecture(config, dataset)
    torch.manual_seed(config.seed)
    model = build_model(architecture.name, architecture.arguments)
    if isinstance(config.norm, SyncNormConfig):
        model = convert_sync_batchnorm(model)
    model.to(device)
    replica = DistributedDataParallel(model)
    optimizer = make_optimizer(replica.parameters(), config.optim)
    schedule = make_schedule(optimizer, config.optim, total_steps)
    return _Training(
        config,
        device,
        dataset,
        batches,
        total_steps,
        architecture,
        model,
        replica,
        optimizer,
        schedule,
    )


def _train_epoch(
    training: _Training, epoch: int, steps: int, progress: "tqdm[Any]"
) -> dict[str, float]:
    """Do the first steps of an epoch, evaluate, and return what was measured, over all ranks."""
    dataset, device = training.dataset, training.device
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # All that is random in an epoch depends on these alone, so that a resumed epoch repeats itself.
    entropy = (training.config.seed, epoch, rank)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    assert isinstance(training.batches.sampler, DistributedSampler)
    training.batches.sampler.set_epoch(epoch)

    training.replica.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    started = time.perf_counter()
    for _, (samples, labels) in zip(range(steps), training.batches, strict=False):
        inputs = dataset.preprocessing.apply(samples.to(device))
        loss = functional.cross_entropy(training.replica(inputs), labels.to(device))
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        training.schedule.step()
        loss_sum += loss.detach()
        progress.update()
    dist.all_reduce(loss_sum)
    train_loss = loss_sum.item() / (steps * world_size)
    elapsed_s = time.perf_counter() - started
    test_loss, test_accuracy = evaluate(training.model, dataset, device)
    return {
        "lr": float(training.schedule.get_last_lr()[0]),
        "train_loss": train_loss,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "images_per_s": steps * training.config.data.batch_size * world_size / elapsed_s,
    }


def _export(training: _Training, run: RunDirectory, metrics: dict[str, float]) -> None:
    description = Description(
        name=training.config.name,
        architecture=training.architecture,
        input=training.dataset.input,
        preprocessing=training.dataset.preprocessing,
        classes=training.dataset.classes,
        metrics=metrics,
        config_sha256=config_sha256(training.config),
    )
    write_bundle(run.bundle_dir, description, training.model)
    log.info("bundle written to %s", run.bundle_dir)
