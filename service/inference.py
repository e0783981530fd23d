"""The data plane: from a request's tensors to a model's answer; no HTTP in it."""

import asyncio
import math
from concurrent.futures import Executor
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.errors import InvalidRequestError, OverloadedError
from service.registry import Registry
from service.schemas import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    RequestInput,
    ResponseOutput,
    TensorMetadata,
)
from syncbn.bundle import Bundle, InputSpec

PROBABILITIES, LABEL = "probabilities", "label"
_DATATYPES = {"float32": "FP32"}


def model_metadata(bundle: Bundle) -> ModelMetadata:
    """Return what a model takes and gives, and from its manifest what a person wants to know."""
    manifest = bundle.manifest
    spec = manifest.input
    return ModelMetadata(
        name=manifest.name,
        platform="syncbn_bundle",
        inputs=[
            TensorMetadata(name=spec.name, datatype=_DATATYPES[spec.dtype], shape=[-1, *spec.shape])
        ],
        outputs=[
            TensorMetadata(name=PROBABILITIES, datatype="FP32", shape=[-1, len(manifest.classes)]),
            TensorMetadata(name=LABEL, datatype="BYTES", shape=[-1]),
        ],
        parameters={
            "architecture": manifest.architecture.name,
            "classes": list(manifest.classes),
            "metrics": manifest.metrics,
        },
    )


class DataPlane:
    """Answers requests, one forward at a time, off the event loop.

    Args:
        registry: the models.
        executor: runs the forwards; one thread, so that torch keeps one pool of threads.
        timeout_s: longest wait for one answer, queueing included.
        max_batch_size: most samples in one request, which bounds the time and memory of a forward.
    """

    def __init__(
        self, registry: Registry, executor: Executor, timeout_s: float, max_batch_size: int
    ) -> None:
        self.registry = registry
        self._executor = executor
        self._max_batch_size = max_batch_size
        self._timeout_s = timeout_s

    async def infer(self, name: str, request: InferenceRequest) -> InferenceResponse:
        """Return a model's outputs for a request of any number of samples.

        Raises:
            ModelNotFoundError: there is no such model.
            InvalidRequestError: the tensors' names, shapes, datatype or data do not fit it, or
                its answer to them is not finite.
            OverloadedError: the answer took longer than the time-out.
        """
        bundle = self.registry.get(name)
        wanted = _wanted_outputs(request)
        samples = _samples(request, bundle.manifest.input, self._max_batch_size)
        loop = asyncio.get_running_loop()
        forward = loop.run_in_executor(self._executor, bundle.probabilities, samples)
        try:
            probabilities = await asyncio.wait_for(forward, self._timeout_s)
        except TimeoutError:
            raise OverloadedError(
                f"no answer from {name!r} within {self._timeout_s:g} s; try again later"
            ) from None
        if not probabilities.isfinite().all():
            raise InvalidRequestError(
                f"model {name!r} overflowed on this input; are its values in the usual range?"
            )
        labels = [bundle.manifest.classes[index] for index in probabilities.argmax(1).tolist()]
        outputs = {
            PROBABILITIES: ResponseOutput(
                name=PROBABILITIES,
                shape=list(probabilities.shape),
                datatype="FP32",
                data=probabilities.flatten().tolist(),
            ),
            LABEL: ResponseOutput(name=LABEL, shape=[len(labels)], datatype="BYTES", data=labels),
        }
        return InferenceResponse(
            model_name=name, id=request.id, outputs=[outputs[output] for output in wanted]
        )


def _wanted_outputs(request: InferenceRequest) -> list[str]:
    known = [PROBABILITIES, LABEL]
    if not request.outputs:
        return known
    for output in request.outputs:
        if output.name not in known:
            raise InvalidRequestError(
                f"unknown output {output.name!r}; choose of {', '.join(known)}"
            )
    names = [output.name for output in request.outputs]
    if len(set(names)) < len(names):
        raise InvalidRequestError("an output is asked for twice; name each once")
    return names


def _samples(request: InferenceRequest, spec: InputSpec, max_batch_size: int) -> Tensor:
    """Return the request's one input as a float32 tensor of shape (N, *spec.shape)."""
    names = [tensor.name for tensor in request.inputs]
    if names != [spec.name]:
        raise InvalidRequestError(f"expected the one input {spec.name!r}, got {names}")
    tensor = request.inputs[0]
    if tensor.datatype != _DATATYPES[spec.dtype]:
        raise InvalidRequestError(
            f"input {spec.name!r} must have datatype {_DATATYPES[spec.dtype]}, "
            f"got {tensor.datatype!r}"
        )
    if len(tensor.shape) == 0 or tensor.shape[0] == 0 or tuple(tensor.shape[1:]) != spec.shape:
        raise InvalidRequestError(
            f"input {spec.name!r} must have shape {[-1, *spec.shape]} with at least one sample, "
            f"got {tensor.shape}"
        )
    if tensor.shape[0] > max_batch_size:
        raise InvalidRequestError(
            f"{tensor.shape[0]} samples in one request; send at most {max_batch_size}"
        )
    try:
        array = np.array(_numbers(tensor), dtype=np.float64)
    except OverflowError:  # an integer beyond float64
        array = np.array([np.inf])
    with np.errstate(over="ignore"):  # what overflows float32 is refused below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InvalidRequestError(f"input {spec.name!r} holds values that are not finite in FP32")
    return torch.from_numpy(array.reshape(tensor.shape))


def _numbers(tensor: RequestInput) -> list[Any]:
    """Return a tensor's data as a flat list of as many int and float as its shape says.

    NumPy would find the shape and type by itself, but takes memory without bound to do so: one
    long string among numbers makes every number as long.
    """
    flat = tensor.data
    if flat and isinstance(flat[0], list):
        level: list[Any] = [flat]
        for size in tensor.shape:
            if not all(isinstance(part, list) and len(part) == size for part in level):
                raise InvalidRequestError(
                    f"the data of input {tensor.name!r} is not nested as its shape {tensor.shape}"
                )
            level = list(chain.from_iterable(level))
        flat = level
    if len(flat) != math.prod(tensor.shape):
        raise InvalidRequestError(
            f"the data of input {tensor.name!r} has {len(flat)} elements, but its shape "
            f"{tensor.shape} has {math.prod(tensor.shape)}"
        )
    if not set(map(type, flat)) <= {int, float}:
        raise InvalidRequestError(f"the data of input {tensor.name!r} must be numbers alone")
    return flat
