"""Which kernels compute: C++ on the CPU, Triton on a GPU, and the reference for everything else."""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from syncbn import _native
from syncbn._native.plain import is_unobserved
from syncbn.environment import KERNELS, variable
from syncbn.errors import InputError
from syncbn.kernels.native import PLAIN, NativeKernels, can_read
from syncbn.kernels.protocol import Kernels
from syncbn.kernels.reference import ReferenceKernels

_REFERENCE, _NATIVE = ReferenceKernels(), NativeKernels()
# Those in Triton, once they have been imported.
_imported: list[Kernels] = []
_log = logging.getLogger("syncbn")


def select_kernels(x: Tensor, *others: Tensor | None) -> Kernels:
    """Return the kernels for these tensors: the native ones, or those in Triton, if they can.

    The environment variable SYNCBN_KERNELS decides otherwise: `native` insists on having the native
    ones, `triton` on those in Triton, which compute on the CPU too with TRITON_INTERPRET=1 in the
    environment; `reference` takes PyTorch operations, `auto` is the rule. What the chosen ones
    cannot compute with, such as float64, is left to PyTorch operations; for a GPU, the log says so
    once for each kind of input.

    Args:
        x: the input.
        others: further tensors that the kernels will read; None for one that is absent.

    Raises:
        InputError: the variable has another value, or insists on kernels that are not there.
    """
    choice, available = variable(KERNELS), _native.library is not None
    if choice is not None and choice != "auto":
        if choice not in ("native", "reference", "triton"):
            raise InputError(
                f"{KERNELS} is {choice!r}; set it to auto, native, triton or reference"
            )
        if choice == "reference":
            return _REFERENCE
        if choice == "triton":
            return _triton(insist=True)
        if not available:
            raise InputError(
                "the native kernels are not there; install g++ or clang++ and then syncbn again, "
                f"or set {KERNELS} to auto or reference"
            )
    if x.is_cuda:
        return _for_gpu(x, *others)
    if not (available and can_read(x, *others)):
        return _REFERENCE
    return PLAIN if is_unobserved() else _NATIVE


def select_merging(device: torch.device) -> Kernels:
    """Return the kernels that merge all ranks' moments: the same on every rank.

    Whatever each rank's input is like; otherwise the last bits could differ from rank to rank.
    """
    choice = variable(KERNELS)
    if choice == "triton" or (device.type == "cuda" and choice in (None, "auto", "native")):
        return _triton(insist=choice == "triton")
    return _REFERENCE


def _for_gpu(x: Tensor, *others: Tensor | None) -> Kernels:
    """Return those in Triton whatever x is like: what is of channels alone, they compute always.

    So that a rank with an input that they do not take has the same bits there as the others.
    """
    kernels = _triton(insist=False)
    if kernels is _REFERENCE or x.numel() == 0 or torch.compiler.is_compiling():
        return kernels
    if not kernels.can_compute(x, *others):
        _say_once(
            f"an input of {x.dtype} with strides {x.stride()} is normalized by PyTorch operations, "
            "which are slower; the Triton kernels take contiguous and channels_last tensors of "
            "float32, bfloat16 and float16"
        )
    return kernels


def _triton(insist: bool) -> Kernels:
    """Return the kernels in Triton, or, unless one insists on them, the reference without them."""
    if not _imported:
        try:
            from syncbn.kernels.triton import TritonKernels  # takes a second; not everywhere
        except ImportError as error:
            reason = f"Triton cannot be imported ({error})"
            if insist:
                raise InputError(
                    f"{reason}; install it, or set {KERNELS} to auto or reference"
                ) from error
            _say_once(f"{reason}; on GPUs, PyTorch operations normalize, which are slower")
            return _REFERENCE
        _imported.append(TritonKernels())
    return _imported[0]


@lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    _log.warning(message)
