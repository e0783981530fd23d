"""Which kernels compute: those of C++ for tensors on the CPU, and the reference for all others."""

from torch import Tensor

from syncbn import _native
from syncbn._native.plain import is_unobserved
from syncbn.environment import KERNELS, variable
from syncbn.errors import InputError
from syncbn.kernels.native import PLAIN, NativeKernels, can_read
from syncbn.kernels.protocol import Kernels
from syncbn.kernels.reference import ReferenceKernels

_REFERENCE, _NATIVE = ReferenceKernels(), NativeKernels()


def select_kernels(x: Tensor, *others: Tensor | None) -> Kernels:
    """Return the kernels for these tensors: the native ones if they can read them all.

    The environment variable SYNCBN_KERNELS decides otherwise: `native` insists on having the native
    ones, `triton` takes those in Triton for tensors on a GPU, or, with TRITON_INTERPRET=1 in the
    environment, on the CPU, `reference` takes PyTorch operations, `auto` is the rule. What the
    chosen ones cannot compute with, such as float64, is left to PyTorch operations.

    Args:
        x: the input.
        others: further tensors that the kernels will read; None for one that is absent.

    Raises:
        InputError: the variable has another value, or insists on kernels that are not there.
    """
    choice, available = variable(KERNELS), _native.library is not None
    if choice is not None and choice != "auto":
        if choice not in ("native", "reference", "triton"):
            raise InputError(f"{KERNELS} is {choice!r}; set it to auto, native, triton or reference")
        if choice == "reference":
            return _REFERENCE
        if choice == "triton":
            return _triton()
        if not available:
            raise InputError(
                "the native kernels are not there; install g++ or clang++ and then syncbn again, "
                f"or set {KERNELS} to auto or reference"
            )
    if not (available and can_read(x, *others)):
        return _REFERENCE
    return PLAIN if is_unobserved() else _NATIVE


def _triton() -> Kernels:
    try:
        from syncbn.kernels import triton  # takes a second, and is not there everywhere
    except ImportError as error:
        raise InputError(
            f"Triton cannot be imported ({error}); install it, or set {KERNELS} to auto or reference"
        ) from error
    return triton.TritonKernels() if is_unobserved() else _REFERENCE
