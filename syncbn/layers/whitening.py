"""`SyncWhitening`: the layer that removes all linear relations between channels, over all replicas.

Batch normalization is its special case of groups of one channel.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.comm.exchange import Exchange
from syncbn.comm.recomputation import unless_repeated
from syncbn.comm.reducer import SingleReplica
from syncbn.errors import InputError
from syncbn.layers.base import Synchronized, adopt, check_reducer, refuse_join
from syncbn.ops.batch_norm import reason_to_refuse_parameters
from syncbn.ops.covariance import global_covariance
from syncbn.ops.inverse_sqrt import inverse_root

Method = Literal["zca", "newton"]
METHODS: tuple[str, ...] = get_args(Method)


class SyncWhitening(Synchronized):
    """Whitening whose mean and covariance are those of the batch of all replicas together.

    In training, y = Σ^(−1/2)·(x − μ)·weight + bias, where μ and Σ are the mean and the covariance
    of the channels over the concatenation of every replica's input. Of all square roots it is the
    symmetric one (ZCA), which moves the input least. Channels are whitened in groups: with groups
    of one, it is batch normalization in training. In evaluation, running averages of μ and
    Σ^(−1/2), the latter of the unbiased covariance, stand in; without them each replica uses its
    own batch. The first 1/momentum batches count alike in these averages, so that nothing of the
    values before the first batch stays: as an average of Σ^(−1/2), unlike one of variances, would
    forget an identity late.

    The covariance S is regularized to Σ = (1 − ρ)·S + ρ·(tr S/D)·I + eps·I, for a batch of few
    samples knows S badly, and of fewer than D not at all: without shrinkage, whitening would then
    put all samples at the same distance from each other. By default ρ approximates what is best for
    n independent normal samples: (1 − 2/D)·tr S² + (tr S)² over (n + 1 − 2/D)·(tr S² − (tr S)²/D),
    and at most 1; it vanishes as n grows, which counts every position of a feature map. Where eps
    is less than the rounding error of S, as for values of 10⁶ that are all alike, that error stands
    in for it.

    Communicates: in training, one all-reduce of 1 + C + C·(D + 1)/2 float64 forward, D being the
    channels of a group, and one of C + C·(D + 1)/2 backward; none in evaluation nor in a world of
    one, nor when activation checkpointing (non-reentrant) repeats a forward, which tracks nothing
    either. Every replica must call it, in the same order.

    Error: training computes in float64. Relative to the largest element of the output, the error is
    that of rounding y to its dtype, plus some 10⁻¹⁵·κ where κ is the condition number of Σ. Sums
    over several replicas are about the mean of the layer's batch before, at first 0; at a distance
    d from it in each channel, that costs another (W + 3)·D·2⁻⁵³·(d/σ)²·κ. With "newton", Σ^(−1/2)
    is what so many iterations reach: along an eigenvalue λ far below tr Σ·(4/9)^T, the output's
    variance is λ/tr Σ·(9/4)^T instead of 1. The gradient is exactly that of what is computed, and
    can be differentiated in turn. Evaluation computes in float32, or the input's dtype if that is
    wider: some 2⁻²⁴·√κ·(1 + |μ|/σ). On a GPU, its one product is made in float32 too, unless TF32
    was asked for by `torch.set_float32_matmul_precision`; training, in float64, knows no TF32.
    Memory: one float64 copy of the input is kept for backward.

    Args:
        num_features: C, the channels of inputs (N, C, *).
        group_size: D, of the channels that are whitened together; divides C. A larger C costs
            C·D·n operations for the covariance and C·D² for its root.
        method: "zca", by eigenvalues; or "newton", by iterations of matrix products, which suit
            a GPU better.
        iterations: T, for "newton".
        eps: added to the eigenvalues of the covariance; dimension of x².
        shrinkage: ρ, from 0 to 1; None for the best one of each batch.
        momentum: least weight of the newest batch in the running statistics; None for the plain
            average over all batches; 0 leaves them as they are.
        affine: whether to learn weight γ and bias β, of shape (C,).
        track_running_stats: whether to keep running statistics.
        process_group: the replicas to synchronize with; None means the default group.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        reducer: who sums over the replicas, as for `SyncBatchNorm`.

    Raises:
        InputError: an argument is out of its range. In `forward`, before anything is sent: the
            input is not floating point, or not (N, num_features, *), or weight or bias not of shape
            (num_features,); on every replica: all of them together hold one value per channel
            (without running statistics, and in evaluation, this one alone), or `join()` is active.
        ReplicaError: in `forward` or `backward`: the all-reduce failed, or the replicas did not
            make the same call, or another one refused its input.

    Source: Huang et al., "Decorrelated Batch Normalization" (2018), equations 3 to 7; Huang et al.,
    "Iterative Normalization" (2019), algorithm 1; Higham, "Functions of Matrices" (2008), equation
    6.35, for its stable form; Desjardins et al., "Natural Neural Networks"
    (2015), section 3; for ρ, Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation"
    (2010), equation 23.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_whitening: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        group_size: int = 16,
        method: Method = "zca",
        iterations: int = 5,
        eps: float = 1e-5,
        shrinkage: float | None = None,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reducer: str | None = None,
    ) -> None:
        super().__init__()
        _check(num_features, group_size, method, iterations, eps, shrinkage)
        check_reducer(reducer)
        self.num_features = num_features
        self.group_size = group_size
        self.method = method
        self.iterations = iterations
        self.eps = eps
        self.shrinkage = shrinkage
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.process_group = process_group
        self.reducer = reducer
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            values = nn.Parameter(torch.empty(num_features, **made)) if affine else None
            self.register_parameter(name, values)
        shape = (num_features // group_size, group_size, group_size)
        tracked: dict[str, Tensor | None] = {
            "running_mean": torch.empty(num_features, **made),
            "running_whitening": torch.empty(shape, **made),
            "num_batches_tracked": torch.zeros((), dtype=torch.long, device=device),
        }
        for name, buffer in tracked.items():
            self.register_buffer(name, buffer if track_running_stats else None)
        self.reset_parameters()
        adopt(self)

    def reset_running_stats(self) -> None:
        """Set the running statistics to those of no batch: a mean of 0, and the identity."""
        if self.running_mean is not None:
            assert self.running_whitening is not None
            assert self.num_batches_tracked is not None
            self.running_mean.zero_()
            self.running_whitening.copy_(_identity(self.running_whitening))
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the running statistics to those of no batch."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        """Return the arguments that matter to a reader."""
        parts = [f"{self.num_features}, group_size={self.group_size}, method={self.method!r}"]
        if self.method == "newton":
            parts.append(f"iterations={self.iterations}")
        parts.append(f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}")
        if self.shrinkage is not None:
            parts.append(f"shrinkage={self.shrinkage}")
        return ", ".join(parts)

    def forward(self, input: Tensor) -> Tensor:
        """Return the whitened input, of the same shape, dtype and memory format."""
        reason = self._reason_to_refuse(input)
        if reason := reason or reason_to_refuse_parameters(input, self.weight, self.bias):
            if self.training:
                self._exchange(input).refuse(input.device, reason, self._sums())
            raise InputError(reason)
        if self.training:
            refuse_join()
            return self._train(input, self._exchange(input))
        if self.running_mean is None or self.running_whitening is None:
            alone = Exchange(SingleReplica(), None, self.num_features, input.dtype)
            return self._train(input, alone)
        dtype = torch.promote_types(input.dtype, torch.float32)
        mean, matrix = self.running_mean.to(dtype), self.running_whitening.to(dtype)
        with _no_autocast(input.device.type):
            centered = self._grouped(input).to(dtype) - mean.reshape(-1, self.group_size, 1)
            return self._apply_to(centered, None, matrix, input)

    def _train(self, input: Tensor, exchange: Exchange) -> Tensor:
        values = self._grouped(input).double()
        number = values.shape[2]
        # About the replica's own mean, nothing cancels within its share; as a constant, for the
        # result does not depend on what values are summed about.
        own = values.detach().sum(2) / max(number, 1)
        values = values - own[..., None]
        offset, covariance, count, mean, rounding = global_covariance(values, own, exchange)
        exchange.require_two_values(count, number)
        regular = self._regularized(covariance, count, rounding)
        # Of what is not finite there are no eigenvalues, and the output is not finite either.
        finite = regular.isfinite().all(2, keepdim=True).all(1, keepdim=True)
        regular = torch.where(finite, regular, _identity(regular))
        root = inverse_root(regular) if self.method == "zca" else self._iterate(regular)
        matrix = torch.where(finite, root, torch.nan)
        if self.training and self.track_running_stats:
            unless_repeated(lambda: self._track(count, mean, matrix))
        return self._apply_to(values, offset, matrix, input)

    def _grouped(self, input: Tensor) -> Tensor:
        """Return the input with its channels in groups: shape (C/D, D, n)."""
        return input.transpose(0, 1).reshape(
            self.num_features // self.group_size, self.group_size, -1
        )

    def _sums(self) -> int:
        """Return how many numbers the replicas add up."""
        return 1 + self.num_features + self.num_features * (self.group_size + 1) // 2

    def _regularized(self, covariance: Tensor, count: Tensor, rounding: Tensor) -> Tensor:
        size = self.group_size
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
        if self.shrinkage is None:
            square = covariance.square().sum((1, 2))
            distance = square - trace.square() / size
            known = distance > 0  # else S is its own target, and any ρ is right
            best = ((1 - 2 / size) * square + trace.square()) / (
                (count + 1 - 2 / size) * torch.where(known, distance, 1.0)
            )
            share = torch.where(known, best, 1.0).clamp(max=1).reshape(-1, 1, 1)
        else:
            share = self.shrinkage
        identity = _identity(covariance)
        target = (trace / size).reshape(-1, 1, 1) * identity
        least = rounding.clamp(min=self.eps).reshape(-1, 1, 1)
        return covariance + share * (target - covariance) + least * identity

    def _iterate(self, matrix: Tensor) -> Tensor:
        """Return the inverse square root of symmetric matrices by iterations of Newton and Schulz.

        R ← ½·(3·R − R³·Σ), coupled with R·Σ, without which rounding errors grow exponentially.
        """
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1).reshape(-1, 1, 1)
        identity = _identity(matrix)
        product, root = matrix / trace, identity
        for _ in range(self.iterations):
            step = 1.5 * identity - 0.5 * root @ product
            product, root = product @ step, step @ root
        return root / trace.sqrt()

    def _apply_to(
        self, values: Tensor, offset: Tensor | None, matrix: Tensor, like: Tensor
    ) -> Tensor:
        """Return matrix·(values − offset)·weight + bias, in shape, dtype and format of the input.

        Args:
            values: shape (C/D, D, n).
            offset: shape (C/D, D), small beside the deviations of the values; None for 0.
            matrix: shape (C/D, D, D).
            like: the input.
        """
        if self.weight is not None:
            matrix = self.weight.to(matrix.dtype).reshape(-1, self.group_size, 1) * matrix
        bias = matrix.new_zeros(*matrix.shape[:2], 1)
        if self.bias is not None:
            bias = self.bias.to(matrix.dtype).reshape(bias.shape)
        if offset is not None:
            bias = bias - matrix @ offset[..., None]
        output = torch.baddbmm(bias, matrix, values)
        first, second, *rest = like.shape
        output = output.to(like.dtype).reshape(second, first, *rest).transpose(0, 1)
        return output.contiguous(memory_format=_format(like))

    @torch.no_grad()
    def _track(self, count: Tensor, mean: Tensor, matrix: Tensor) -> None:
        """Move the running statistics towards a batch; one without samples changes nothing."""
        if self.running_mean is None or self.running_whitening is None:
            return
        assert self.num_batches_tracked is not None
        seen = count > 0
        self.num_batches_tracked.add_(seen)
        plain = 1.0 / self.num_batches_tracked.clamp(min=1).double()
        momentum = plain.clamp(min=self.momentum or 0.0) if self.momentum != 0 else 0.0
        unbiased = ((count - 1).clamp(min=1) / count.clamp(min=1)).sqrt()
        for running, batch in (
            (self.running_mean, mean),
            (self.running_whitening, matrix * unbiased),
        ):
            moved = running.double() * (1 - momentum) + batch * momentum
            running.copy_(torch.where(seen, moved, running.double()))


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which float32 stays so; float64, of which training is made, always does.

    The meta device, on which bundles are checked, has no autocast to leave.
    """
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _format(like: Tensor) -> torch.memory_format:
    for dim, found in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.dim() == dim and like.is_contiguous(memory_format=found):
            return torch.contiguous_format if like.is_contiguous() else found
    return torch.contiguous_format


def _check(
    num_features: int,
    group_size: int,
    method: str,
    iterations: int,
    eps: float,
    shrinkage: float | None,
) -> None:
    if num_features < 1 or group_size < 1 or num_features % group_size:
        sizes = [size for size in range(1, num_features + 1) if num_features % size == 0]
        raise InputError(
            f"{num_features} channels cannot be whitened in groups of {group_size}; choose a "
            f"group_size of {', '.join(map(str, sizes)) or 'a positive number of channels'}"
        )
    if method not in METHODS:
        raise InputError(f"the method is {method!r}; choose {' or '.join(METHODS)}")
    if iterations < 1:
        raise InputError(f"iterations is {iterations}; choose 1 or more, such as 5")
    if not 0 < eps < math.inf:
        raise InputError(f"eps is {eps}; choose a positive one, such as 1e-5")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage is {shrinkage}; choose one from 0 to 1, or None")
