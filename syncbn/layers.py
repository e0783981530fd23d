"""`SyncBatchNorm`: the layer that holds parameters and running statistics around `functional`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from syncbn.errors import InputError
from syncbn.functional import sync_batch_norm
from syncbn.moments import Moments


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage] -- DDP refuses nn.SyncBatchNorm's subclasses on CPU; tools look for this base
    """Batch normalization whose μ and σ are those of the batch of all replicas together.

    In training, y = (x − μ)/√(σ² + eps)·weight + bias over the concatenation of every replica's
    input, exactly what `nn.BatchNorm2d` computes on that concatenation in one process, and
    running = (1 − momentum)·running + momentum·batch, with the unbiased variance. In evaluation,
    the running statistics stand in; without them each replica uses its own batch. The arguments,
    parameters, buffers and state dict are those of `torch.nn.SyncBatchNorm`.

    Communicates: see `sync_batch_norm`; not in evaluation, nor in a world of one.

    Args:
        num_features: C, the channels of inputs (N, C, *).
        eps: added to σ² inside the square root; dimension of x².
        momentum: weight of the newest batch in the running statistics; None for the plain average
            over all batches.
        affine: whether to learn weight γ and bias β.
        track_running_stats: whether to keep running statistics.
        process_group: the replicas to synchronise with; None means the default group.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether an affine layer has a bias β.

    Raises:
        InputError: in `forward`, see `sync_batch_norm`; also where the input has not
            `num_features` channels.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015), algorithms 1 and 2.
    """

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
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:  # torch 2.11 has no such argument to pass on
            self.register_parameter("bias", None)
        self.process_group = process_group

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the running statistics to those of no batch."""
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:  # pyright: ignore[reportUnnecessaryComparison] -- None without affine or bias, which torch's annotation leaves out
                nn.init.constant_(parameter, value)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, of the same shape, dtype and memory format."""
        self._check_input_dim(input)
        if not self.training:
            # Without tracked statistics the batch's own stand in, unsynchronised: torch's rule.
            use_batch = self.running_mean is None or self.running_var is None
            return functional.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                use_batch,
                0.0,
                self.eps,
            )
        output, moments = sync_batch_norm(
            input, self.weight, self.bias, eps=self.eps, process_group=self.process_group
        )
        if self.track_running_stats:
            self._track(moments)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise InputError(
                f"expected an input of shape (N, {self.num_features}, *), got {tuple(input.shape)}"
            )

    @torch.no_grad()
    def _track(self, moments: Moments) -> None:
        """Move the running statistics towards a batch; a batch without samples changes nothing.

        Without a branch on the count, which would make the host wait for a GPU.
        """
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        seen = moments.count > 0
        self.num_batches_tracked.add_(seen)
        if self.momentum is None:
            momentum: Any = 1.0 / self.num_batches_tracked.clamp(min=1).double()
        else:
            momentum = self.momentum
        for running, batch in (
            (self.running_mean, moments.mean),
            (self.running_var, moments.unbiased_variance()),
        ):
            moved = running.double() * (1 - momentum) + batch * momentum
            running.copy_(torch.where(seen, moved, running.double()))
