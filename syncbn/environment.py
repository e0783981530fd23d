"""The environment variables that the layer reads, at every call, because they may change."""

import os

import torch

KERNELS, REDUCER, DEBUG = "SYNCBN_KERNELS", "SYNCBN_REDUCER", "SYNCBN_DEBUG_TIMEOUT_S"

# os.environ takes 2 µs to say that a variable is not there, as it encodes the name first. What it
# looks into is a dict of encoded names; whatever else may stand in its place is asked itself.
_ENCODED = {name: os.environ.encodekey(name) for name in (KERNELS, REDUCER, DEBUG)}


def variable(name: str) -> str | None:
    """Return the value of one of these variables; None if it is not set."""
    if not torch.compiler.is_compiling():
        variables = getattr(os.environ, "_data", None)
        if type(variables) is dict and _ENCODED[name] not in variables:
            return None
    return os.environ.get(name)
