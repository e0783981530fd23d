"""A moving average of a model: of its weights and running statistics."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """An exponential moving average of a model: of its parameters and its running statistics.

    Statistics are averaged with the weights that they belong to; how many batches they have seen
    is copied, for an average of counts counts nothing.

    Args:
        model: what is averaged; a copy of it holds the average.
        decay: weight of the old value.
        warmup: whether it is less at first: (1 + n) / (10 + n) after n updates, as long as that is
            below `decay`. Otherwise the weights of the first steps stay in the average for
            1 / (1 - decay) updates, which may be more than a short run has.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        super().__init__(model, use_buffers=True)
        self._decay = decay
        self._warmup = warmup

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, buffers: Iterable[Tensor] | None = None) -> None:
        """Take a step towards the model as it is now.

        The host does not wait for the device, which torch's own function makes it do.

        Args:
            model: what is averaged.
            buffers: in the order of the model's, and in their place; None: the model's own.
        """
        ours = [*self.module.parameters(), *self.module.buffers()]
        theirs = [*model.parameters(), *(model.buffers() if buffers is None else buffers)]
        updates = int(self.n_averaged)  # it is on the CPU
        is_first = updates == 0
        decay = min(self._decay, (1 + updates) / (10 + updates)) if self._warmup else self._decay
        averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]
        averaged = defaultdict(lambda: ([], []))
        for mine, new in zip(ours, theirs, strict=True):
            if is_first or not (mine.is_floating_point() or mine.is_complex()):
                mine.copy_(new)
            else:
                averaged[mine.dtype][0].append(mine)
                averaged[mine.dtype][1].append(new)
        for mine, new in averaged.values():
            torch._foreach_lerp_(mine, new, 1 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] -- one call, as torch's own averages do
        self.n_averaged += 1
