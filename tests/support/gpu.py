"""What tests that need a GPU share: `make test-gpu` runs them all; they skip without one.

With SYNCBN_TEST_DEVICE=cpu, SYNCBN_KERNELS=triton and TRITON_INTERPRET=1 in the environment, those
that the interpreter can do run on the CPU, which shows that they would run at all.
"""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("SYNCBN_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"


def _reason() -> str:
    if not ON_GPU:
        return ""
    if not torch.cuda.is_available():
        return "needs a GPU"
    from syncbn.kernels.triton_launch import INTERPRETED

    return "the kernels are interpreted in this process; use make test-gpu" if INTERPRETED else ""


_REASON = _reason()
needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(bool(_REASON), reason=_REASON)]
# What has no meaning for interpreted kernels.
real_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a real GPU")
