"""The kernels in Triton, interpreted on the CPU."""

from collections.abc import Generator
from contextlib import contextmanager
from unittest import mock

from triton import knobs


@contextmanager
def interpreting() -> Generator[None]:
    """Interpret what is decorated or launched within."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        yield


with interpreting():
    from syncbn.kernels import triton as kernels
    from syncbn.kernels import triton_launch as launch


@contextmanager
def tiles_of(values: int) -> Generator[kernels.TritonKernels]:
    """Use tiles of so many values, so that small tensors have several, and several parts."""
    with mock.patch.object(launch, "_TILE", values), interpreting():
        yield kernels.TritonKernels()
