"""`SyncWhitening`: the layer that removes all linear relations between channels, over all replicas.

Batch normalization is its special case of groups of one channel.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.collectives import SingleReplica
from syncbn.differentiable import differentiable_sum
from syncbn.errors import InputError
from syncbn.functional import reason_to_refuse
from syncbn.moments import COUNT_LIMIT, add_fingerprint, checked_count
from syncbn.reduction import Call, refuse, require_same_call, require_two_values
from syncbn.synchronised import Synchronised, adopt, check_reducer, refuse_join

Method = Literal["zca", "newton"]
METHODS: tuple[str, ...] = get_args(Method)


class SyncWhitening(Synchronised):
    """Whitening whose mean and covariance are those of the batch of all replicas together.

    In training, y = Σ^(−1/2)·(x − μ)·weight + bias, where μ and Σ are the mean and the covariance
    of the channels over the concatenation of every replica's input. Of all square roots it is the
    symmetric one (ZCA), which moves the input least. Channels are whitened in groups: with groups
    of one, it is batch normalization. In evaluation, running averages of μ and Σ^(−1/2), the latter
    of the unbiased covariance, stand in; without them each replica uses its own batch.

    The covariance S is regularised to Σ = (1 − ρ)·S + ρ·(tr S/D)·I + eps·I, for a batch of few
    samples knows S badly, and of fewer than D not at all: without shrinkage, whitening would then
    put all samples at the same distance from each other. By default ρ is what is best for n normal
    samples, (1 − 2/D)·tr S² + (tr S)² over (n + 1 − 2/D)·(tr S² − (tr S)²/D), and at most 1; it
    vanishes as n grows. Where eps is less than the rounding error of S, as for values of 10⁶ that
    are all alike, that error stands in for it.

    Communicates: in training, one all-reduce of 1 + C + C·(D + 1)/2 float64 forward, D being the
    channels of a group, and one as large backward; none in evaluation nor in a world of one. Every
    replica must call it, in the same order. When activation checkpointing repeats a forward, it
    communicates again, and tracks nothing.

    Error: everything is computed in float64. Relative to the largest element of the output, it is
    that of rounding y to its dtype, plus some 10⁻¹⁵·κ where κ is the condition number of Σ. Sums
    are about the running mean, or 0 without one; in a world of several replicas, at a distance d
    from it, that costs another 2⁻⁵²·(d/σ)²·κ. With "newton", Σ^(−1/2) is what so many
    iterations reach: along an eigenvalue λ far below tr Σ·(4/9)^T, the output's variance is
    λ/tr Σ·(9/4)^T instead of 1. The gradient is exactly that of what is computed, and can be
    differentiated in turn. Memory: three float64 copies of the input are kept for backward.

    Args:
        num_features: C, the channels of inputs (N, C, *).
        group_size: D, of the channels that are whitened together; divides C. A larger C costs
            C·D·n operations for the covariance and C·D² for its root.
        method: "zca", by eigenvalues; or "newton", by iterations of matrix products, which suit
            a GPU better.
        iterations: T, for "newton".
        eps: added to the eigenvalues of the covariance; dimension of x².
        shrinkage: ρ, from 0 to 1; None for the best one of each batch.
        momentum: weight of the newest batch in the running statistics; None for the plain average
            over all batches.
        affine: whether to learn weight γ and bias β, of shape (C,).
        track_running_stats: whether to keep running statistics.
        process_group: the replicas to synchronise with; None means the default group.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        reducer: who sums over the replicas, as for `SyncBatchNorm`.

    Raises:
        InputError: an argument is out of its range. In `forward`, before anything is sent: the
            input is not floating point, or not (N, num_features, *); on every replica: all of them
            together hold one value per channel, or `join()` is active.
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
            self.running_whitening.copy_(torch.eye(self.group_size))
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
        reason = reason_to_refuse(input)
        if input.dim() < 2 or input.shape[1] != self.num_features:
            shape = tuple(input.shape)
            reason = f"expected an input of shape (N, {self.num_features}, *), got {shape}"
        if reason:
            if self.training:
                refuse(self._call(input), input.device, reason, self._sums())
            raise InputError(reason)
        if self.training:
            refuse_join()
            return self._train(input, self._call(input))
        if self.running_mean is None or self.running_whitening is None:
            alone = Call(SingleReplica(), None, self.num_features, input.dtype)
            return self._train(input, alone)
        dtype = torch.promote_types(input.dtype, torch.float32)
        mean, matrix = self.running_mean.to(dtype), self.running_whitening.to(dtype)
        with _no_autocast(input.device.type):
            return self._apply_to(self._grouped(input).to(dtype), mean, matrix, input)

    def _train(self, input: Tensor, call: Call) -> Tensor:
        values = self._grouped(input).double()
        # About the replica's own mean, nothing cancels within its share; as a constant, for the
        # result does not depend on what values are summed about.
        local = (values.sum(2) / max(values.shape[2], 1)).detach().flatten()
        values = values - local.reshape(-1, self.group_size, 1)
        statistics = self._statistics(values, local, self._shift(local, call), call)
        regular = self._regularised(statistics)
        # Of what is not finite there are no eigenvalues, and the output is not finite either.
        finite = regular.isfinite().all()
        regular = torch.where(finite, regular, torch.eye(self.group_size).to(regular))
        root = inverse_root(regular) if self.method == "zca" else self._iterate(regular)
        matrix = torch.where(finite, root, torch.nan)
        if self.training and self.track_running_stats:
            self._track(statistics, matrix)
        return self._apply_to(values, statistics.mean - local, matrix, input)

    def _shift(self, local: Tensor, call: Call) -> Tensor:
        """Return what all replicas' values are summed about: shape (C,), float64, on all alike."""
        if call.reducer.world_size == 1:
            return local
        if self.running_mean is None:
            return torch.zeros_like(local)
        known = self.running_mean.double()
        return torch.where(known.isfinite(), known, 0.0)

    def _grouped(self, input: Tensor) -> Tensor:
        """Return the input with its channels in groups: shape (C/D, D, n)."""
        return input.transpose(0, 1).reshape(
            self.num_features // self.group_size, self.group_size, -1
        )

    def _sums(self) -> int:
        """Return how many numbers the replicas add up."""
        return 1 + self.num_features + self.num_features * (self.group_size + 1) // 2

    def _statistics(
        self, values: Tensor, local: Tensor, shift: Tensor, call: Call
    ) -> "_Statistics":
        """Return the statistics of all replicas' values together, as a function of them.

        Args:
            values: this replica's, less `local`: shape (C/D, D, n).
            local: shape (C,).
            shift: what the sums over replicas are about, shape (C,), on all alike.
            call: who takes part.
        """
        size, reducer = self.group_size, call.reducer
        rows, columns = torch.triu_indices(size, size, device=values.device)
        number = values.new_full((1,), values.shape[2])
        first = values.sum(2, keepdim=True)
        offset = (local - shift).reshape(-1, size, 1)
        mixed = first @ offset.mT
        products = values @ values.mT + mixed + mixed.mT + number * (offset @ offset.mT)
        sums = (first + number * offset).flatten(), products[:, rows, columns].flatten()
        vector = add_fingerprint(
            torch.cat([number, *sums]), shift, reducer.rank, reducer.world_size
        )
        total = differentiable_sum(vector, call, "forward")
        if reducer.world_size > 1:
            if torch.compiler.is_compiling() or total.device.type != "cpu":
                total = checked_count(total)
            elif not 0 <= total[0].item() < COUNT_LIMIT:
                require_same_call(call)
                # All is well, and yet the shifts differ: one replica reloaded its layer, say.
                return self._statistics(values, local, torch.zeros_like(shift), call)
        count = total[0].detach()
        require_two_values(count, values.shape[2], call)
        means = total[1:] / count.clamp(min=1)
        distance = means[: self.num_features]
        # Where each element of the matrix stands in its upper triangle.
        places = torch.empty(size, size, dtype=torch.long, device=values.device)
        places[rows, columns] = places[columns, rows] = torch.arange(
            len(rows), device=values.device
        )
        second = means[self.num_features :].reshape(-1, len(rows))[:, places]
        centre = distance.reshape(-1, size, 1)
        sizes = second.detach().diagonal(dim1=1, dim2=2).sum(1).reshape(-1, 1, 1)
        rounding = (reducer.world_size + 3) * 2.0**-52 * sizes
        mean = torch.where(count > 0, shift + distance, distance)
        return _Statistics(count, mean, second - centre @ centre.mT, rounding)

    def _regularised(self, statistics: "_Statistics") -> Tensor:
        covariance, size = statistics.covariance, self.group_size
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
        if self.shrinkage is None:
            square = covariance.square().sum((1, 2))
            distance = square - trace.square() / size
            known = distance > 0  # else S is its own target, and any ρ is right
            best = ((1 - 2 / size) * square + trace.square()) / (
                (statistics.count + 1 - 2 / size) * torch.where(known, distance, 1.0)
            )
            share = torch.where(known, best, 1.0).clamp(max=1).reshape(-1, 1, 1)
        else:
            share = self.shrinkage
        identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
        target = (trace / size).reshape(-1, 1, 1) * identity
        least = statistics.rounding.clamp(min=self.eps)
        return covariance + share * (target - covariance) + least * identity

    def _iterate(self, matrix: Tensor) -> Tensor:
        """Return the inverse square root of symmetric matrices by iterations of Newton and Schulz.

        R ← ½·(3·R − R³·Σ), coupled with R·Σ, without which rounding errors grow exponentially.
        """
        trace = matrix.diagonal(dim1=1, dim2=2).sum(1).reshape(-1, 1, 1)
        identity = torch.eye(self.group_size, dtype=matrix.dtype, device=matrix.device)
        product, root = matrix / trace, identity
        for _ in range(self.iterations):
            step = 1.5 * identity - 0.5 * root @ product
            product, root = product @ step, step @ root
        return root / trace.sqrt()

    def _apply_to(self, values: Tensor, mean: Tensor, matrix: Tensor, like: Tensor) -> Tensor:
        output = matrix @ (values - mean.reshape(-1, self.group_size, 1))
        if self.weight is not None:
            output = output * self.weight.to(output.dtype).reshape(-1, self.group_size, 1)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype).reshape(-1, self.group_size, 1)
        first, second, *rest = like.shape
        output = output.to(like.dtype).reshape(second, first, *rest).transpose(0, 1)
        return output.contiguous(memory_format=_format(like))

    @torch.no_grad()
    def _track(self, statistics: "_Statistics", matrix: Tensor) -> None:
        """Move the running statistics towards a batch; one without samples changes nothing."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- as in torch.utils.checkpoint
            return  # in a backward pass, where activation checkpointing repeats what was tracked
        if self.running_mean is None or self.running_whitening is None:
            return
        assert self.num_batches_tracked is not None
        count = statistics.count
        seen = count > 0
        self.num_batches_tracked.add_(seen)
        momentum: Any = self.momentum
        if momentum is None:
            momentum = 1.0 / self.num_batches_tracked.clamp(min=1).double()
        unbiased = ((count - 1).clamp(min=1) / count.clamp(min=1)).sqrt()
        for running, batch in (
            (self.running_mean, statistics.mean),
            (self.running_whitening, matrix * unbiased),
        ):
            moved = running.double() * (1 - momentum) + batch * momentum
            running.copy_(torch.where(seen, moved, running.double()))


@dataclass(frozen=True)
class _Statistics:
    """Of the whole batch, in float64: count, 0-d; means, (C,); covariances, (C/D, D, D).

    And how far rounding may have moved a covariance's eigenvalues: (C/D, 1, 1).
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor
    rounding: Tensor


def inverse_root(matrix: Tensor) -> Tensor:
    """Return the symmetric inverse square roots of symmetric positive definite matrices.

    Its gradient, and that one's, hold for equal eigenvalues too, where those of eigenvectors do
    not exist. No communication. Relative error: about 10⁻¹⁵·κ, for the condition number κ.

    Args:
        matrix: shape (*, D, D), float64.
    """
    root, _, _ = _InverseRoot.apply(matrix)  # pyright: ignore[reportGeneralTypeIssues] -- torch types Function.apply as Any or None
    return root


class _InverseRoot(torch.autograd.Function):
    """S to W = S^(−1/2); S⁻¹ = W² gives W·dW + dW·W = −W²·dS·W², a Lyapunov equation."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.rsqrt()
        return (vectors * roots[..., None, :]) @ vectors.mT, vectors, roots

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (ctx, *grad_outputs: Any)
        root, vectors, roots = ctx.saved_tensors
        solution: Tensor = _Lyapunov.apply(root, grads[0], vectors, roots)  # pyright: ignore[reportAssignmentType] -- as above
        square = root @ root
        return -(square @ solution @ square)


class _Lyapunov(torch.autograd.Function):
    """(W, G) to the Z of W·Z + Z·W = G, for the eigenvectors and eigenvalues of W."""

    @staticmethod
    def forward(root: Tensor, right: Tensor, vectors: Tensor, roots: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        sums = roots[..., :, None] + roots[..., None, :]
        return vectors @ ((vectors.mT @ right @ vectors) / sums) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        root, _, vectors, roots = inputs
        ctx.save_for_backward(root, output, vectors, roots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        root, solution, vectors, roots = ctx.saved_tensors
        back: Tensor = _Lyapunov.apply(root, grads[0], vectors, roots)  # pyright: ignore[reportAssignmentType] -- as above
        return -(back @ solution.mT + solution.mT @ back), back, None, None


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which float32 stays so; float64, of which training is made, always does.

    The meta device, on which bundles are checked, has no autocast to leave.
    """
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


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
    if not eps > 0:
        raise InputError(f"eps is {eps}; choose a positive one, such as 1e-5")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage is {shrinkage}; choose one from 0 to 1, or None")
