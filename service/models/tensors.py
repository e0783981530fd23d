"""Tensors on the wire: the protocol's inference requests and answers, in JSON and in binary.

A body is JSON, then, where a header says how long the JSON is, the bytes of those tensors that it
announces as binary, in the order of their announcement, little-endian and in row-major order.
Source: https://github.com/kserve/open-inference-protocol, inference_rest.yaml, and Triton's
protocol extensions of binary tensor data, classification and schedule policy.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from syncbn.bundle import InputSpec

Array = NDArray[np.float32]
PROBABILITIES, LABEL = "probabilities", "label"
_FLOATS = {"FP32": "<f4", "FP64": "<f8"}
_HALVES = {"FP16": "<f2", "BF16": "<u2"}
_INTEGERS = {f"{sign}{bits}": f"<{sign[0].lower()}{bits // 8}"
             for sign in ("INT", "UINT") for bits in (8, 16, 32, 64)}  # fmt: skip
DATATYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(code) for name, code in (_FLOATS | _HALVES | _INTEGERS).items()
}
_SHARED_MEMORY = "shared_memory_region"

Dimension = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class InputTensor(Struct):
    """A tensor sent by a client; data in row-major order, flat or nested, unless it is binary."""

    name: str
    shape: Annotated[list[Dimension], Meta(max_length=8)]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)  # empty: there is none


class RequestedOutput(Struct):
    """A tensor that a client asks for; its parameters may ask for binary data or for classes."""

    name: str
    parameters: dict[str, Any] | None = None


class InferenceRequest(Struct):
    """The JSON of an inference request; without outputs, all are meant. Other keys are ignored."""

    inputs: Annotated[list[InputTensor], Meta(max_length=1024)]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: Annotated[list[RequestedOutput], Meta(max_length=1024)] | None = None


class OutputTensor(Struct, omit_defaults=True):
    """A tensor sent to a client; data flat, in row-major order, unless it is binary."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, int] | None = None
    data: Sequence[float | str] | None = None


class InferenceResponse(Struct, omit_defaults=True):
    """The JSON of the answer to an inference request."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | None = None


Make = Callable[
    [RequestedOutput, NDArray[Any], Sequence[str]], tuple[OutputTensor, NDArray[Any] | list[str]]
]
_request_decoder = msgspec.json.Decoder(InferenceRequest)
_response_encoder = msgspec.json.Encoder()
_number_decoders: dict[tuple[str, int], msgspec.json.Decoder[Any]] = {}


def read_request(
    body: bytes, json_bytes: int | None, spec: InputSpec
) -> tuple[InferenceRequest, memoryview]:
    """Return a body's JSON part, whose tensors' data is not read yet, and its binary part.

    Args:
        body: as it was before it was compressed.
        json_bytes: how long the JSON is; None: all of it. 0: there is none, and the body is one
            sample, to be answered in binary.
        spec: of the model's input, which is meant where there is no JSON.

    Raises:
        InvalidRequestError: the body is shorter, or its JSON is not an inference request.
    """
    if json_bytes is None:
        json_bytes = len(body)
    elif json_bytes > len(body):
        raise InvalidRequestError(
            f"the body has {len(body)} bytes, but Inference-Header-Content-Length says that "
            f"{json_bytes} of them are JSON"
        )
    view = memoryview(body)
    if not json_bytes and body:
        tensor = InputTensor(
            spec.name, [1, *spec.shape], "FP32", parameters={"binary_data_size": len(body)}
        )
        return InferenceRequest([tensor], parameters={"binary_data_output": True}), view
    try:
        request = _request_decoder.decode(view[:json_bytes])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not an inference request: {error}") from None
    return request, view[json_bytes:]


def read_samples(
    request: InferenceRequest, binary: memoryview, spec: InputSpec, max_rows: int
) -> Array:
    """Return a request's samples, after checking that they are what a model takes.

    Args:
        request: as `read_request` returns it.
        binary: likewise.
        spec: of the model's input.
        max_rows: of the samples.

    Returns:
        Shape (rows, *spec.shape), float32, finite; a copy.

    Raises:
        InvalidRequestError: it is not the one input that the model has, its shape, datatype or
            size is another, it has too many rows, or it holds values that are not finite in FP32.
    """
    chunks = _binary_chunks(request.inputs, binary)
    if len(request.inputs) != 1 or request.inputs[0].name != spec.name:
        names = [tensor.name for tensor in request.inputs[:8]]
        raise InvalidRequestError(f"expected the one input {spec.name!r}, got {names}")
    tensor, chunk = request.inputs[0], chunks[0]
    if tensor.parameters and _SHARED_MEMORY in tensor.parameters:
        raise InvalidRequestError("shared memory is not supported; send the data in the request")
    dtype = DATATYPES.get(tensor.datatype)
    if dtype is None:
        raise InvalidRequestError(
            f"input {spec.name!r} must have datatype FP32, or one of {', '.join(DATATYPES)}, "
            f"got {tensor.datatype!r}"
        )
    shape = tensor.shape
    if len(shape) == 0 or shape[0] == 0 or tuple(shape[1:]) != spec.shape:
        raise InvalidRequestError(
            f"input {spec.name!r} must have shape {[-1, *spec.shape]} with at least one sample, "
            f"got {shape}"
        )
    if shape[0] > max_rows:
        raise InvalidRequestError(f"{shape[0]} samples in one request; send at most {max_rows}")
    if chunk is not None:
        samples = _binary_numbers(tensor, chunk, dtype)
    elif tensor.data:
        samples = _json_numbers(tensor, tensor.data, dtype)
    else:
        raise InvalidRequestError(f"input {spec.name!r} has neither data nor binary_data_size")
    if not all_finite(samples):
        raise InvalidRequestError(f"input {spec.name!r} holds values that are not finite in FP32")
    return samples.reshape(shape)


def all_finite(x: Array) -> bool:
    """Return whether there is neither NaN nor an infinity among some numbers."""
    flat = x.ravel()
    # Any of them would be felt in this sum, which costs a tenth of looking at each; so would a
    # number whose square overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(flat.dot(flat)) or bool(np.isfinite(flat).all())


def _binary_chunks(tensors: Sequence[InputTensor], binary: memoryview) -> list[memoryview | None]:
    """Return the part of the binary data that belongs to each tensor; None: its data is JSON."""
    chunks: list[memoryview | None] = []
    end = 0
    for tensor in tensors:
        size_bytes = (tensor.parameters or {}).get("binary_data_size")
        if size_bytes is None:
            chunks.append(None)
            continue
        if type(size_bytes) is not int or size_bytes < 0:
            raise InvalidRequestError(
                f"binary_data_size of input {tensor.name!r} must be a number of bytes, "
                f"got {size_bytes!r}"
            )
        if tensor.data:
            raise InvalidRequestError(f"input {tensor.name!r} has both data and binary_data_size")
        chunks.append(binary[end : end + size_bytes])
        end += size_bytes
    if end != len(binary):
        raise InvalidRequestError(
            f"{len(binary)} bytes follow the JSON, but its inputs announce {end} binary bytes; "
            "the header Inference-Header-Content-Length says how long the JSON is"
        )
    return chunks


def _binary_numbers(tensor: InputTensor, chunk: memoryview, dtype: np.dtype[Any]) -> Array:
    wanted_bytes = math.prod(tensor.shape) * dtype.itemsize
    if len(chunk) != wanted_bytes:
        raise InvalidRequestError(
            f"input {tensor.name!r} has {len(chunk)} bytes, but {tensor.datatype} of shape "
            f"{tensor.shape} has {wanted_bytes}"
        )
    numbers = np.frombuffer(chunk, dtype)
    if tensor.datatype == "BF16":  # the upper half of an FP32
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):  # what overflows float32 is refused as not finite
        return numbers.astype(np.float32)


def _json_numbers(tensor: InputTensor, data: msgspec.Raw, dtype: np.dtype[Any]) -> Array:
    if tensor.datatype in _HALVES:
        raise InvalidRequestError(f"{tensor.datatype} goes in binary only; send FP32 as JSON")
    # Flat, unless what comes first in it is a list too.
    nested = bytes(memoryview(data)[:64]).lstrip()[1:].lstrip().startswith(b"[")
    depth = len(tensor.shape) if nested else 1
    try:
        numbers = _number_decoder(tensor.datatype, depth).decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(
            f"the data of input {tensor.name!r} must be a list of {tensor.datatype} numbers, flat "
            f"or nested as its shape {tensor.shape}: {error}"
        ) from None
    if not nested and len(numbers) != math.prod(tensor.shape):
        raise InvalidRequestError(
            f"the data of input {tensor.name!r} has {len(numbers)} elements, but its shape "
            f"{tensor.shape} has {math.prod(tensor.shape)}"
        )
    try:
        with np.errstate(over="ignore"):
            array = np.array(numbers, dtype if dtype.kind in "iu" else np.float64)
    except ValueError:  # lists of different lengths side by side
        array = np.empty(0)
    if nested and array.shape != tuple(tensor.shape):
        raise InvalidRequestError(
            f"the data of input {tensor.name!r} is not nested as its shape {tensor.shape}"
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _number_decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    """Return what reads a list of numbers alone, so many lists deep."""
    if (datatype, depth) not in _number_decoders:
        kind: Any = float
        if datatype in _INTEGERS:
            limits = np.iinfo(DATATYPES[datatype])
            # msgspec's own limits are those of 64 bits with a sign.
            kind = Annotated[int, Meta(ge=int(limits.min), le=int(min(limits.max, 2**63 - 1)))]
        for _ in range(depth):
            kind = list[kind]
        _number_decoders[datatype, depth] = msgspec.json.Decoder(kind)
    return _number_decoders[datatype, depth]


def write_response(
    request: InferenceRequest,
    model: tuple[str, str],
    values: NDArray[Any],
    classes: Sequence[str],
    make: Make | None = None,
    default: Sequence[str] = (PROBABILITIES, LABEL),
) -> tuple[bytes, int | None]:
    """Return the body of an answer, and how long its JSON is if binary data follows it.

    Args:
        request: what was asked.
        model: its name and version.
        values: what the model answered, samples first: of a classification, probabilities of shape
            (rows, classes).
        classes: names.
        make: makes an output of them; None: `class_output`.
        default: the outputs of a request that names none.

    Raises:
        InvalidRequestError: there is no output of a name that was asked for, or it was asked for
            twice, or in an unknown way.
    """
    wanted = request.outputs
    if not wanted:
        wanted = [RequestedOutput(name) for name in default]
    outputs: list[OutputTensor] = []
    chunks: list[bytes] = []
    for output in wanted:
        if any(output.name == other.name for other in outputs):
            raise InvalidRequestError(f"output {output.name!r} is asked for twice")
        if output.parameters and _SHARED_MEMORY in output.parameters:
            raise InvalidRequestError("shared memory is not supported; take the data in the answer")
        tensor, data = (make or class_output)(output, values, classes)
        if is_binary(request, output):
            chunk = _bytes(data) if isinstance(data, list) else data.tobytes()
            tensor.parameters = {"binary_data_size": len(chunk)}
            chunks.append(chunk)
        else:
            tensor.data = data if isinstance(data, list) else data.ravel().tolist()
        outputs.append(tensor)
    head = _response_encoder.encode(InferenceResponse(*model, outputs, request.id))
    return (b"".join((head, *chunks)), len(head)) if chunks else (head, None)


def is_binary(request: InferenceRequest, output: RequestedOutput) -> bool:
    """Return whether a request wants an output in binary.

    Raises:
        InvalidRequestError: what it says of that is neither true nor false.
    """
    by_default = _flag(request.parameters, "binary_data_output", "the request")
    return _flag(output.parameters, "binary_data", f"output {output.name!r}", by_default)


def class_output(
    output: RequestedOutput, probabilities: Array, classes: Sequence[str]
) -> tuple[OutputTensor, Array | list[str]]:
    """Return an output of a classification without its data, and the data.

    Args:
        output: what was asked for.
        probabilities: shape (rows, classes).
        classes: names.

    Raises:
        InvalidRequestError: there is no such output, or its parameter classification is no number.
    """
    rows = len(probabilities)
    parameters = output.parameters or {}
    if output.name == PROBABILITIES and (most := parameters.get("classification")):
        if type(most) is not int or most < 0:
            raise InvalidRequestError(
                f"classification of output {output.name!r} must be a number of classes, "
                f"got {most!r}"
            )
        best: NDArray[np.int64] = np.argsort(-probabilities, axis=1, kind="stable")[:, :most]
        words = [
            f"{row[index]:f}:{index}:{classes[index]}"
            for row, indices in zip(probabilities, best.tolist(), strict=True)
            for index in indices
        ]
        return OutputTensor(PROBABILITIES, list(best.shape), "BYTES"), words
    if output.name == PROBABILITIES:
        return OutputTensor(PROBABILITIES, list(probabilities.shape), "FP32"), probabilities
    if output.name == LABEL:
        labels = [classes[int(index)] for index in probabilities.argmax(1)]
        return OutputTensor(LABEL, [rows], "BYTES"), labels
    raise unknown_output(output.name, (PROBABILITIES, LABEL))


def unknown_output(name: str, known: Sequence[str]) -> InvalidRequestError:
    """Return what a client is told that asks for an output of another name."""
    return InvalidRequestError(f"unknown output {name!r}; choose of {' and '.join(known)}")


def _bytes(words: list[str]) -> bytes:
    """Return the binary form of BYTES: each element after its length."""
    encoded = (word.encode() for word in words)
    return b"".join(struct.pack("<I", len(word)) + word for word in encoded)


def _flag(
    parameters: Mapping[str, Any] | None, name: str, whose: str, default: bool = False
) -> bool:
    value = parameters.get(name, default) if parameters else default
    if type(value) is not bool:
        raise InvalidRequestError(f"{name} of {whose} must be true or false, got {value!r}")
    return value
