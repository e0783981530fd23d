"""The environment variables that the layer reads, at every call, because they may change."""

import os

import torch

KERNELS, REDUCER, DEBUG = "SYNCBN_KERNELS", "SYNCBN_REDUCER", "SYNCBN_DEBUG_TIMEOUT_S"

# os.environ takes 2 µs to say that a variable is not there, as it encodes the name first. What it
# looks into, on POSIX, is a dict of encoded names; where there is none, it is asked itself.
_ENCODED = {name: name.encode() for name in (KERNELS, REDUCER, DEBUG)}
_variables = getattr(os.environ, "_data", None)


def variable(name: str) -> str | None:
    """Return the value of one of these variables; None if it is not set."""
    if (
        isinstance(_variables, dict)
        and not torch.compiler.is_compiling()
        and _ENCODED[name] not in _variables
    ):
        return None
    return os.environ.get(name)
