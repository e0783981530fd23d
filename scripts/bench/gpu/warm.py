"""Compiles kernels ahead of a run, on all cores, into Triton's cache: one by one takes a minute."""

import multiprocessing
import os
import time

import torch

from scripts.bench.gpu.cases import KINDS

# One for each height of an image: others of the same height need the same kernels.
_IMAGES = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]
_SHAPES = [(256, c, side, side) for c, side in _IMAGES]


def warm(capability: tuple[int, int], limit_s: float = 60) -> str:
    """Compile for a GPU what a layer launches on inputs of ResNet-50's; return what happened.

    Does nothing if the GPU is not among those that kernels are compiled for without one.
    """
    from scripts.dev.compile_kernels import TARGETS

    target = f"sm_{capability[0]}{capability[1]}"
    if target not in TARGETS:
        return f"kernels are compiled one by one, as {target} is not known"
    jobs = [(target, *kind, shape) for shape in _SHAPES for kind in KINDS]
    start = time.monotonic()
    # Not forked: the parent may use the GPU already.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        try:
            pool.starmap_async(compile_layer, jobs, chunksize=1).get(limit_s)
        except multiprocessing.TimeoutError:
            return f"not all kernels were compiled within {limit_s:.0f} s"
    return f"kernels were compiled in {time.monotonic() - start:.0f} s"


def compile_layer(target: str, dtype: str, layout: str, shape: tuple[int, ...]) -> int:
    """Compile what a layer launches on an input; return how many launches that are."""
    from scripts.dev.compile_kernels import launches_on, run_layer

    with launches_on(target) as launches:
        run_layer(shape, getattr(torch, dtype), layout)
    return len(launches)
