"""What models answer, by task: which tensors there are, and how they come from a model's output."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.errors import InvalidRequestError
from service.models.tensors import (
    DATATYPES,
    LABEL,
    PROBABILITIES,
    OutputTensor,
    RequestedOutput,
    all_finite,
    class_output,
    unknown_output,
)
from syncbn.bundle import Manifest

Answer = NDArray[Any]
MASK, OUTPUT = "mask", "output"
_OVERFLOWED = -1  # in each pixel of a mask whose sample overflowed
_TEXT_BYTES = 20  # of a float as JSON, and of what Python needs for it


@dataclass(frozen=True)
class OutputSpec:
    """A tensor that a model answers.

    Attributes:
        name: of the output.
        datatype: the protocol's.
        shape: of one sample.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


class Outputs(ABC):
    """What models of one task answer.

    A forward's output becomes one array a request: the `compact` one, unless the request asks for
    an output that needs the `whole` one. Both have samples as their first axis.

    Attributes:
        specs: all outputs.
        default: the names of those that a request without any gets.
        classes: the model's.
    """

    specs: tuple[OutputSpec, ...]
    default: tuple[str, ...]
    classes: tuple[str, ...]

    @abstractmethod
    def whole(self, output: Tensor) -> Tensor:
        """Return what all outputs can be made of, from the model's, in float32."""

    def compact(self, output: Tensor) -> Tensor:
        """Return what the default outputs can be made of, from the model's."""
        return self.whole(output)

    def needs_whole(self, names: Iterable[str]) -> bool:
        """Return whether the compact array is too little for these outputs."""
        return False

    def is_finite(self, values: Answer) -> bool:
        """Return whether the model overflowed on no sample, from either array."""
        return all_finite(values)

    @abstractmethod
    def make(
        self, requested: RequestedOutput, values: Answer, classes: Sequence[str]
    ) -> tuple[OutputTensor, Answer | list[str]]:
        """Return an output without its data, and the data; see `tensors.write_response`."""

    def size_bytes(self, name: str, rows: int, *, binary: bool) -> int:
        """Return about how much memory an output takes when it is sent; 0 if there is none."""
        for spec in self.specs:
            if spec.name == name and spec.datatype != "BYTES":
                values = rows * math.prod(spec.shape)
                if binary:
                    return values * DATATYPES[spec.datatype].itemsize
                text = _TEXT_BYTES if spec.datatype == "FP32" else 1 + len(str(len(self.classes)))
                return values * text
        return 0


class ClassOutputs(Outputs):
    """Of a classification: the probability of each class, and the name of the likeliest."""

    default = (PROBABILITIES, LABEL)

    def __init__(self, manifest: Manifest) -> None:
        self.classes = manifest.classes
        self.specs = (
            OutputSpec(PROBABILITIES, "FP32", (len(self.classes),)),
            OutputSpec(LABEL, "BYTES", ()),
        )

    def whole(self, output: Tensor) -> Tensor:
        """Return probabilities (rows, classes) of logits."""
        return output.softmax(1)

    def make(
        self, requested: RequestedOutput, values: Answer, classes: Sequence[str]
    ) -> tuple[OutputTensor, Answer | list[str]]:
        """Return probabilities, labels, or the first classes as Triton's extension asks."""
        return class_output(requested, values, classes)


class SegmentOutputs(Outputs):
    """Of a segmentation: the class of each pixel, and the probability of each class there.

    The mask has the smallest unsigned integers that hold the classes' indices: an eighth of the
    protocol's usual INT64 for up to 256 classes.
    """

    default = (MASK,)

    def __init__(self, manifest: Manifest) -> None:
        self.classes = manifest.classes
        size = manifest.input.shape[1:]
        self._datatype = next(
            name
            for name in ("UINT8", "UINT16", "UINT32")
            if len(self.classes) <= 1 << 8 * DATATYPES[name].itemsize
        )
        self.specs = (
            OutputSpec(MASK, self._datatype, size),
            OutputSpec(PROBABILITIES, "FP32", (len(self.classes), *size)),
        )

    def whole(self, output: Tensor) -> Tensor:
        """Return probabilities (rows, classes, height, width) of logits."""
        return output.softmax(1)

    def compact(self, output: Tensor) -> Tensor:
        """Return the likeliest class of each pixel of logits, int32 (rows, height, width).

        It is -1 in all of a sample on which the model overflowed.
        """
        largest, mask = self.whole(output).max(1)
        mask[~largest.isfinite().flatten(1).all(1)] = _OVERFLOWED
        return mask.int()

    def needs_whole(self, names: Iterable[str]) -> bool:
        """Return whether probabilities are asked for."""
        return PROBABILITIES in names

    def is_finite(self, values: Answer) -> bool:
        """Return whether the model overflowed on no sample."""
        if values.dtype == np.int32:
            return bool((values.reshape(len(values), -1)[:, 0] != _OVERFLOWED).all())
        return all_finite(values)

    def make(
        self, requested: RequestedOutput, values: Answer, classes: Sequence[str]
    ) -> tuple[OutputTensor, Answer | list[str]]:
        """Return the mask, or probabilities."""
        if (requested.parameters or {}).get("classification"):
            raise InvalidRequestError(
                f"output {requested.name!r} has a class for each pixel; the parameter "
                "classification is for models that classify whole samples"
            )
        whole = values.dtype == np.float32
        if requested.name == MASK:
            mask = (values.argmax(1) if whole else values).astype(DATATYPES[self._datatype])
            return OutputTensor(MASK, list(mask.shape), self._datatype), mask
        if requested.name == PROBABILITIES and whole:
            return OutputTensor(PROBABILITIES, list(values.shape), "FP32"), values
        raise unknown_output(requested.name, (MASK, PROBABILITIES))


class TensorOutputs(Outputs):
    """Of any other model: its one tensor, as it is."""

    default = (OUTPUT,)

    def __init__(self, manifest: Manifest, shape: tuple[int, ...]) -> None:
        self.classes = manifest.classes
        self.specs = (OutputSpec(OUTPUT, "FP32", shape),)

    def whole(self, output: Tensor) -> Tensor:
        """Return the output."""
        return output

    def make(
        self, requested: RequestedOutput, values: Answer, classes: Sequence[str]
    ) -> tuple[OutputTensor, Answer | list[str]]:
        """Return the output."""
        if (requested.parameters or {}).get("classification"):
            raise InvalidRequestError(
                f"output {requested.name!r} has no classes; the parameter classification is for "
                "models that classify"
            )
        if requested.name != OUTPUT:
            raise unknown_output(requested.name, self.default)
        return OutputTensor(OUTPUT, list(values.shape), "FP32"), values


def outputs_of(manifest: Manifest, shape: tuple[int, ...]) -> Outputs:
    """Return what a model answers.

    Args:
        manifest: of its bundle.
        shape: of what the model returns for one sample.
    """
    if manifest.task == "classification":
        return ClassOutputs(manifest)
    if manifest.task == "segmentation":
        return SegmentOutputs(manifest)
    return TensorOutputs(manifest, shape)
