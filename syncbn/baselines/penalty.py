"""A penalty on the statistics of activations, added to the cost."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.comm.exchange import Exchange, Memory
from syncbn.comm.reducer import select_reducer
from syncbn.errors import InputError
from syncbn.ops.all_reduce import checked_all_reduce
from syncbn.ops.batch_norm import reason_to_refuse


class StatisticsPenalty:
    """Draws the mean of each unit towards 0 and its variance towards 1, over the global batch.

    P = strength·Σ_layers (1/C)·Σ_c (μ_c² + (σ_c² − 1)²), with the mean μ_c and the variance σ_c² of
    unit c over the concatenation of all replicas' batches. Every replica adds the same P to its
    loss; the mean of their gradients, which DistributedDataParallel takes, is the gradient of P.
    A batch without samples on any replica counts as one of mean and variance 0, and moves nothing.

    Communicates: for each layer, one all-reduce of 2C + 1 float64 forward and one backward; none in
    a world of one, nor outside `watch`. Every replica must watch the same forwards.

    Error: of σ², 2⁻⁵²·(μ² + σ²); P is float64.

    Args:
        units: modules whose outputs, (N, C, *), are the activations of C units each, by name; none
            inside a part of the model that activation checkpointing repeats.
        strength: of the penalty, 0 or more.
        process_group: the replicas; None means the default group.

    Raises:
        InputError: the strength is negative or no number. In a watched forward: an output is not
            (N, C, *) in floating point, or gradients are off, as in reentrant checkpointing.
        ReplicaError: in a watched forward or its backward, the all-reduce failed, or the replicas
            did not make the same call, or another one refused its output.

    Source: Goodfellow, Bengio and Courville, "Deep Learning" (2016), section 8.7.1: "adding
    penalties to the cost function to encourage units to have normalized activation statistics".
    """

    def __init__(
        self,
        units: Mapping[str, nn.Module],
        strength: float,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise InputError(f"strength is {strength}; choose 0 or more, such as 0.01")
        self._strength = strength
        self._group = process_group
        self._watches = False
        self._terms: list[Tensor] = []
        self._hooks = [
            unit.register_forward_hook(partial(self._look, number))
            for number, unit in enumerate(units.values())
        ]

    @contextmanager
    def watch(self) -> Generator[None]:
        """Let the forwards in this context count; none of them does where one raises."""
        self._watches = True
        try:
            yield
        except BaseException:
            self._terms.clear()
            raise
        finally:
            self._watches = False

    def value(self) -> Tensor:
        """Return P of what was watched since the last call: 0-d, float64, differentiable."""
        terms, self._terms = self._terms, []
        if not terms:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        return self._strength * torch.stack(terms).sum()

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for hook in self._hooks:
            hook.remove()

    def _look(
        self, number: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> None:
        if not self._watches:
            return
        reducer = select_reducer(self._group, output.device)
        channels = output.shape[1] if output.dim() > 1 else 0
        memory = Memory(channels, output.device, module)
        exchange = Exchange(reducer, memory, channels, output.dtype)
        reason = reason_to_refuse(output)
        if not torch.is_grad_enabled():
            reason = (
                "a penalty needs gradients, which are off here; watch no forward under no_grad() "
                "and no unit inside reentrant activation checkpointing"
            )
        if reason:
            exchange.refuse(output.device, reason)
            raise InputError(reason)
        values = output.transpose(0, 1).flatten(1).double()
        local = values.new_full((1,), values.shape[1])
        sums = torch.cat([local, values.sum(1), values.square().sum(1)])
        # Which unit these are sums of: another one on another rank would be as long.
        total = checked_all_reduce(sums, values.new_full((1,), number), exchange)
        mean, square = (total[1:] / total[0].detach().clamp(min=1)).chunk(2)
        variance = square - mean.square()
        self._terms.append((mean.square() + (variance - 1).square()).mean())
