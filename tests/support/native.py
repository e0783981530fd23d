"""The native kernels as a machine with fewer instructions runs them."""

from collections.abc import Generator
from contextlib import contextmanager

from syncbn import _native


@contextmanager
def limited(level: int) -> Generator[int]:
    """Use at most a level of instructions: 0 for any machine's, 1 for AVX2, 2 for AVX-512."""
    assert _native.library is not None
    try:
        yield _native.library.syncbn_limit_level(level)
    finally:
        _native.library.syncbn_limit_level(2)
