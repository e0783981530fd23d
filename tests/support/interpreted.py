"""The kernels in Triton, interpreted on the CPU."""

from collections.abc import Generator
from contextlib import contextmanager
from unittest import mock

import triton


@contextmanager
def _interpreting() -> Generator[None]:
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        yield


with _interpreting():
    from syncbn.kernels import triton as kernels


@contextmanager
def tiles_of(values: int) -> Generator[kernels.TritonKernels]:
    """Use tiles of so many values, so that small tensors have several, and several parts."""
    with mock.patch.object(kernels, "_TILE", values), _interpreting():
        yield kernels.TritonKernels()
