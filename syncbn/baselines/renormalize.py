"""Renormalizing the units after every gradient step, by rescaling their weights and biases."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.comm.exchange import Exchange, Memory
from syncbn.comm.reducer import select_reducer
from syncbn.errors import InputError
from syncbn.kernels.reference import ReferenceKernels
from syncbn.ops.batch_norm import global_moments, reason_to_refuse


@dataclass(frozen=True)
class Unit:
    """C units of a layer, y = γ·(w∗x) + β, and what standardizes them.

    Attributes:
        weight: w of the linear layer or convolution, not transposed; its first axis is the C units.
        bias: β, shape (C,), of that layer or of the module after it that scales by γ.
        module: whose output, (N, C, *), is y.
    """

    weight: Tensor
    bias: Tensor
    module: nn.Module


@dataclass(frozen=True)
class Renormalization:
    """How far the units' statistics were from standard when they were made so.

    After the first time, this is what changed since: by the gradient step before it, and because
    this batch is another one than that of the time before.

    Attributes:
        mean_shift: the root mean square of μ over all units.
        log_scale: the root mean square of ln σ over all units; 0.01 is a change by 1 %.
    """

    mean_shift: float
    log_scale: float


class Renormalizer:
    """Rescales weights and biases so that each unit is standard on the global batch.

    w ← w/σ and β ← (β − μ)/σ, layer by layer in the order of the forward, each given what the
    renormalized layers before it compute: then y has mean 0 and variance σ₀²/(σ₀² + eps) over the
    concatenation of all replicas' batches, where σ₀² was its variance and σ² = σ₀² + eps. A unit
    of variance eps or less keeps its scale, σ = 1: there is nothing to standardize, and the weights
    would grow by 1/√eps with each step. All replicas' parameters stay bit-identical.

    Communicates: for each layer, one all-reduce of 2C + 1 float64 in each `step`; none in a world
    of one. Every replica must run the same forward: of two units with as many channels, nothing
    tells that they are exchanged.

    Error: of σ², as for `sync_batch_norm`; parameters are rounded once to their dtype.

    Args:
        units: by name.
        eps: added to the variance, and the least that is rescaled; dimension of y².
        process_group: the replicas; None means the default group.

    Raises:
        InputError: eps is not positive; a weight or bias does not fit the other.

    Source: Goodfellow, Bengio and Courville, "Deep Learning" (2016), section 8.7.1: "intervening
    to renormalize unit statistics after each gradient descent step".
    """

    def __init__(
        self,
        units: Mapping[str, Unit],
        eps: float = 1e-5,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 < eps < math.inf:
            raise InputError(f"eps is {eps}; choose a positive one, such as 1e-5")
        for name, unit in units.items():
            if unit.bias.shape != unit.weight.shape[:1]:
                raise InputError(
                    f"unit {name!r} has a weight of shape {tuple(unit.weight.shape)} and a bias of "
                    f"shape {tuple(unit.bias.shape)}; the bias must have the weight's first axis"
                )
        self._units = units
        self._eps = eps
        self._group = process_group

    @torch.no_grad()
    def step(self, forward: Callable[[], object]) -> Renormalization:
        """Make all units standard on a batch, and return how far they were from it.

        A batch without samples on any replica changes nothing.

        Args:
            forward: runs the model, once, on this replica's share of the batch.

        Raises:
            InputError: a module was called twice or never, its output is not (N, C, *) in floating
                point, all replicas together have one value of each unit, or a unit's statistics are
                not finite; all parameters are as before then.
            ReplicaError: the all-reduce failed, or the replicas summed for other numbers of units,
                or another one refused its output.
        """
        kept = [(unit, unit.weight.clone(), unit.bias.clone()) for unit in self._units.values()]
        means: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}

        def standardize(name: str, unit: Unit, output: Tensor) -> Tensor:
            if name in means:
                raise InputError(f"unit {name!r} is called twice in a forward; leave it out")
            mean, deviation = self._statistics(name, unit, output)
            means[name], scales[name] = mean, deviation.log()
            column = (-1, *[1] * (unit.weight.dim() - 1))
            unit.weight.copy_(unit.weight.double() / deviation.reshape(column))
            unit.bias.copy_((unit.bias.double() - mean) / deviation)
            shape = (-1, *[1] * (output.dim() - 2))
            standard = (output.double() - mean.reshape(shape)) / deviation.reshape(shape)
            return standard.to(output.dtype)

        def hook(name: str, unit: Unit) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            return lambda module, inputs, output: standardize(name, unit, output)

        hooks = [
            unit.module.register_forward_hook(hook(name, unit))
            for name, unit in self._units.items()
        ]
        try:
            forward()
            if never := self._units.keys() - means.keys():
                raise InputError(f"the forward never calls the units {', '.join(sorted(never))}")
        except BaseException:
            for unit, weight, bias in kept:
                unit.weight.copy_(weight)
                unit.bias.copy_(bias)
            raise
        finally:
            for each in hooks:
                each.remove()
        return Renormalization(_root_mean_square(means), _root_mean_square(scales))

    def _statistics(self, name: str, unit: Unit, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return μ and σ of the global batch, or 0 and 1 where it has no samples."""
        channels = len(unit.bias)
        reducer = select_reducer(self._group, output.device)
        memory = Memory(channels, output.device, unit.module)
        exchange = Exchange(reducer, memory, channels, output.dtype)
        reason = reason_to_refuse(output)
        if not reason and output.shape[1] != channels:
            reason = (
                f"unit {name!r} has {channels} biases, but outputs of shape {tuple(output.shape)}"
            )
        if reason:
            exchange.refuse(output.device, reason)
            raise InputError(reason)
        moments = global_moments(output, ReferenceKernels(), exchange)
        if not (moments.mean.isfinite().all() and moments.m2.isfinite().all()):
            raise InputError(f"the statistics of unit {name!r} are not finite")
        variance = moments.variance()
        return moments.mean, torch.where(variance > self._eps, variance + self._eps, 1.0).sqrt()


def _root_mean_square(values: Mapping[str, Tensor]) -> float:
    if not values:
        return 0.0
    together = torch.cat(list(values.values()))
    return together.square().mean().sqrt().item()
