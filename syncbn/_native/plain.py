"""Whether the library can be given a tensor's memory without torch's knowledge."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# How many TorchDispatchModes are active, whether torch.func transforms something, and whether a
# tensor has memory of its own, which one inside a transform has not. Nothing public tells.
listeners: Callable[[], int] = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
has_memory: Callable[[Tensor], bool] = torch._C._has_storage  # pyright: ignore[reportPrivateUsage]
_PLAIN = (Tensor, nn.Parameter)


def are_plain(*tensors: Tensor | None) -> bool:
    """Return whether these are tensors in this machine's memory; None counts as one."""
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.is_cpu and has_memory(tensor)
        ):
            return False
    return True


def is_unobserved() -> bool:
    """Return whether torch listens to nothing: no tracing, no transform, no TorchDispatchMode."""
    return not (torch.compiler.is_compiling() or listeners() or transforming())
