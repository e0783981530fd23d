"""`SyncBatchNorm`: the layer that holds parameters and running statistics around `functional`."""

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn import functional

from syncbn.comm.exchange import Exchange
from syncbn.comm.recomputation import unless_repeated
from syncbn.comm.reducer import SingleReplica
from syncbn.errors import InputError
from syncbn.kernels.choice import select_kernels
from syncbn.kernels.protocol import Kernels, Normalization
from syncbn.kernels.reference import ReferenceKernels
from syncbn.layers.base import Synchronized, adopt, check_reducer, refuse_join
from syncbn.layers.recorded import record
from syncbn.moments import Moments
from syncbn.ops.batch_norm import (
    alike,
    global_moments,
    normalize,
    reason_to_refuse_parameters,
)

_RUNNING = "running_mean", "running_var", "num_batches_tracked"


class SyncBatchNorm(Synchronized, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage] -- DDP refuses nn.SyncBatchNorm's subclasses on CPU; tools look for this base
    """Batch normalization whose μ and σ are those of the batch of all replicas together.

    In training, y = (x − μ)/√(σ² + eps)·weight + bias over the concatenation of every replica's
    input, exactly what `nn.BatchNorm2d` computes on that concatenation in one process, and
    running = (1 − momentum)·running + momentum·batch, with the unbiased variance. In evaluation,
    the running statistics stand in; without them each replica uses its own batch. The arguments,
    parameters, buffers and state dict are those of `torch.nn.SyncBatchNorm`.

    Communicates: see `sync_batch_norm`; not in evaluation, nor in a world of one, nor when
    `torch.utils.checkpoint` (non-reentrant) repeats a forward, which tracks nothing either.

    Error: as `sync_batch_norm`, but σ² is summed about the mean of the layer's latest batch, so
    that its relative error is below 1e-6 for |μ|/σ up to 1e6 from the second batch on.

    Copies share the process group; a pickled layer keeps the ranks of its group, since connections
    cannot be pickled, and takes the default group where that has the same ranks.

    Args:
        num_features: C, the channels of inputs (N, C, *).
        eps: added to σ² inside the square root; dimension of x². For float16, see
            `sync_batch_norm`.
        momentum: weight of the newest batch in the running statistics; None for the plain average
            over all batches.
        affine: whether to learn weight γ and bias β.
        track_running_stats: whether to keep running statistics.
        process_group: the replicas to synchronize with; None means the default group.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether an affine layer has a bias β.
        relu: whether to return max(y, 0) in y's place, in the same pass over memory; see
            `sync_batch_norm`. Saves the tensor that a ReLU after the layer would keep.
        reducer: who sums over the replicas, the same on all of them: `shared_memory`,
            `process_group`, `symmetric_memory` or `auto`; None means the environment variable
            SYNCBN_REDUCER, or `auto`. See `syncbn.comm.reducer.select_reducer`.

    Raises:
        InputError: the reducer is none of these. In `forward`, see `sync_batch_norm`; also where
            the input has not `num_features` channels, under `join()`, and where a pickled group is
            missing.
        ReplicaError: in `forward` or `backward`, see `sync_batch_norm`; also where another replica
            refused its input.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithms 1 and 2.
    """

    # Of the class, so that a converted layer has it too, and under a name that its own class is
    # unlikely to have for a module.
    fuses_relu: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        relu: bool = False,
        reducer: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:  # torch 2.11 has no such argument to pass on
            self.register_parameter("bias", None)
        self.process_group = process_group
        self.fuses_relu = relu
        check_reducer(reducer)
        self.reducer = reducer
        adopt(self)

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the running statistics to those of no batch."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:  # pyright: ignore[reportUnnecessaryComparison] -- None without affine or bias, which torch's annotation leaves out
                nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        """Return the arguments that matter to a reader."""
        parts = [super().extra_repr()]
        if self.fuses_relu:
            parts.append("relu=True")
        if self.reducer is not None:
            parts.append(f"reducer={self.reducer!r}")
        return ", ".join(parts)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the normalized input, of the same shape, dtype and memory format.

        A residual is added to it, and max(·, 0) taken of the sum where the layer has a ReLU: in
        the same pass if the residual has the input's shape and dtype, and as the separate
        operations would otherwise.
        """
        if isinstance(input, fx.Proxy):
            return record(self, input, residual)
        self._check_input_dim(input)
        self._check_input(input, residual)
        if not self.training:
            output = self._evaluate(input)
        elif residual is None or alike(input, residual):
            return self._train(input, residual, self.fuses_relu)
        else:
            output = self._train(input, None, False)
        return _separately(output, residual, self.fuses_relu)

    def _train(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        refuse_join()
        weight, bias = self._own("weight"), self._own("bias")
        kernels = select_kernels(input, weight, bias, residual)
        exchange = self._exchange(input)
        if reason := reason_to_refuse_parameters(input, weight, bias):
            exchange.refuse(input.device, reason)
            raise InputError(reason)
        moments = global_moments(input, kernels, exchange)
        output = normalize(
            input, moments, weight, bias, residual, self.eps, relu, kernels, exchange
        )
        if self.track_running_stats:
            self._track(moments, kernels)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any input; a converted layer's own class may be stricter."""

    def _check_input(self, input: Tensor, residual: Tensor | None) -> None:
        if torch._C._get_tracing_state():  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- the public torch.jit.is_tracing() takes three times as long
            if self.training:
                raise InputError(
                    "torch.jit.trace cannot record the training of a synchronized layer; call "
                    "model.eval(), or revert_sync_batchnorm(model), before"
                )
            return  # sizes are no numbers now; torch's operations check them
        if not (reason := self._reason_to_refuse(input, residual)):
            return
        if self.training:
            self._exchange(input).refuse(input.device, reason)
        raise InputError(reason)

    def _evaluate(self, input: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        traced = bool(torch._C._get_tracing_state())  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- as in _check_input
        if mean is None or variance is None:
            if traced:  # which sees torch's operations alone
                scale, offset = (p if p is None else p.double() for p in (self.weight, self.bias))  # pyright: ignore[reportUnnecessaryComparison] -- as in reset_parameters
                output = torch.batch_norm(
                    input.double(), scale, offset, None, None, True, 0.0, self.eps, False
                )
                return output.to(input.dtype)
            # The batch's own statistics stand in, unsynchronized: torch's rule.
            alone = Exchange(SingleReplica(), None, self.num_features, input.dtype)
            weight, bias = self.weight, self.bias
            if reason := reason_to_refuse_parameters(input, weight, bias):
                raise InputError(reason)
            kernels = select_kernels(input, weight, bias)
            moments = global_moments(input, kernels, alone)
            return normalize(input, moments, weight, bias, None, self.eps, False, kernels, alone)
        parameters = [p for p in (self.weight, self.bias, mean, variance) if p is not None]  # pyright: ignore[reportUnnecessaryComparison] -- as in reset_parameters
        dtypes = {parameter.dtype for parameter in parameters}
        if dtypes == {input.dtype} or (dtypes == {torch.float32} and input.dtype != torch.float64):
            if torch.is_grad_enabled() and not (traced or torch.compiler.is_compiling()):
                # What the backward pass will read must not change when a later forward, or DDP,
                # writes the buffers.
                mean, variance = mean.clone(), variance.clone()
            return functional.batch_norm(
                input, mean, variance, self.weight, self.bias, False, 0.0, self.eps
            )
        # torch's kernels want parameters of one dtype that fits the input's.
        invstd = torch.rsqrt(variance.double() + self.eps)
        statistics = torch.cat([torch.ones_like(invstd[:1]), mean.double(), invstd])
        norm = Normalization(statistics, self.weight, self.bias)
        return ReferenceKernels().normalize(input, norm)

    def _track(self, moments: Moments, kernels: Kernels) -> None:
        """Move the running statistics towards a batch, unless checkpointing only repeats it."""
        # By its own dictionary: nn.Module takes longer to find an attribute.
        running_mean, running_var, num_batches_tracked = map(self._buffers.get, _RUNNING)
        if running_mean is None or running_var is None or num_batches_tracked is None:
            return
        buffers = running_mean, running_var, num_batches_tracked
        unless_repeated(lambda: kernels.update_running(moments, *buffers, self.momentum))


class BatchNorm(nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage] -- as above
    """Unsynchronized batch normalization of inputs (N, C, *) with any number of dimensions.

    What `revert_sync_batchnorm` makes of a `SyncBatchNorm` that was one from the start, or that
    adds a residual or takes a ReLU: by separate operations here.
    """

    fuses_relu: bool = False

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the normalized input, plus the residual, with the ReLU that the layer had."""
        return _separately(super().forward(input), residual, self.fuses_relu)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of shape (N, C, *), got {tuple(input.shape)}")


def _separately(output: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return a normalized input plus the residual, with the ReLU, by operations of their own."""
    if residual is not None:
        output = output + residual
    return functional.relu(output) if relu else output
