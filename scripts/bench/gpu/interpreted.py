"""Triton's interpreter, made quick enough to count with, and to run with any numpy."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy
from triton.runtime import interpreter

from syncbn.kernels import triton_source

_patch_lang_tensor: Any = vars(interpreter)["_patch_lang_tensor"]


@contextmanager
def interpreting_quickly() -> Generator[None]:
    """Have reductions done by numpy, and numbers read as numpy since 2.4 wants it.

    And have the language prepared for interpretation once for a kernel, instead of for each of its
    functions again: they are all of one module.
    """
    with (
        mock.patch.object(interpreter.ReduceOps, "generic_reduce", _reduce),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_tensor),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call),
    ):
        yield


def _reduce(operation: Any, inputs: tuple[Any, ...]) -> Any:
    """Reduce at once; the interpreter would call the kernels' own function for each value."""
    if operation.combine_fn is vars(triton_source)["_plus"]:
        return operation.sum(inputs[0])
    assert operation.combine_fn is vars(triton_source)["_maximum"]
    return operation.min_max(inputs[0], numpy.max)


def _call(function: Any, *args: Any, **options: Any) -> Any:
    return function.rewrite()(*args, **options)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Do what Triton does; 3.6 takes arrays of one value for numbers, which numpy 2.4 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
