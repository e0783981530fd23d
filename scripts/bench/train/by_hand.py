"""The loop that one writes by hand, and a program that takes a step of it, whose start is timed.

So it loads no more than such a program does, and nothing of the trainer.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncbn
from syncbn.models import build_model

BATCH_SIZE = 16
LOG_EVERY = 10


class ByHand:
    """The loop that one writes by hand, with everything as torch has it by default.

    Args:
        fused: not by default, but as the trainer has it: an optimizer that passes once over memory.
    """

    def __init__(
        self, model: nn.Module, dataset: TensorDataset, epochs: int, fused: bool | None = None
    ) -> None:
        self.sampler: DistributedSampler[Any] = DistributedSampler(dataset)
        self.loader = DataLoader(dataset, BATCH_SIZE, sampler=self.sampler)
        self.model = DistributedDataParallel(syncbn.convert_sync_batchnorm(model))
        self.optimizer = sgd(self.model, fused)
        self.schedule = CosineAnnealingLR(self.optimizer, epochs * len(self.loader))
        self.losses: list[float] = []

    def train_epoch(self, epoch: int) -> None:
        """Train on this rank's share of the samples, in a new order each epoch."""
        self.sampler.set_epoch(epoch)
        self.model.train()
        for step, (images, labels) in enumerate(self.loader):
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            if step % LOG_EVERY == 0:
                self.losses.append(loss.item())


def sgd(model: nn.Module, fused: bool | None = None) -> torch.optim.SGD:
    """Return the optimizer that all loops have."""
    return torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=fused
    )


def main() -> None:
    """Be a rank of the job, and write the file that is named after its first step."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    one_step = BATCH_SIZE * dist.get_world_size()
    dataset = TensorDataset(images[:one_step], torch.tensor(labels[:one_step]))
    ByHand(build_model("cnn", {"in_channels": 1, "num_classes": 10}), dataset, 1).train_epoch(0)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text("a step\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
