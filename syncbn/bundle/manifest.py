"""What bundle.json says: the description of a model, and what makes its weights verifiable."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticSerializationError
from torch import Tensor

import syncbn
from syncbn.errors import BundleError

MANIFEST_FILE = "bundle.json"
MANIFEST_LIMIT_BYTES = 8 << 20  # 21 000 classes with long names have less than 2 MiB
FORMAT_VERSION = 2

Task = Literal["classification", "segmentation", "tensor"]
"""What a model answers: logits (N, K), logits (N, K, H, W), or any tensor (N, *)."""


def _bounded(value: Any) -> Any:
    """Return an argument's value, unless other programs would read another one."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"an integer must fit in 64 bits, got {value}")
    return value


Size = Annotated[int, Field(ge=0, lt=2**31)]
# What stays finite in float32.
Number = Annotated[FiniteFloat, Field(ge=-3e38, le=3e38)]
PositiveNumber = Annotated[FiniteFloat, Field(ge=1e-37, le=3e38)]
# Integers stay integers, whatever their sign: 1 is an index or a size, and 1.0 is neither.
Value = Annotated[bool | int | Number | str, AfterValidator(_bounded)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Intensity = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Intensity, Intensity, Intensity]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Architecture(_Part):
    """Which model to build: a name and arguments of `syncbn.models.build_model`."""

    name: str
    arguments: Mapping[str, Value | Annotated[list[Value], Field(max_length=1024)]]


class InputSpec(_Part):
    """One sample as a caller sends it: its name, its shape without the batch axis, its dtype."""

    name: str = Field(min_length=1)
    shape: tuple[Annotated[Size, Field(gt=0)], ...] = Field(min_length=1, max_length=4)
    dtype: Literal["float32"]


class Preprocessing(_Part):
    """What turns a raw sample into the model's input: (x·scale − mean)/std, by channel."""

    scale: Number
    mean: tuple[Number, ...]
    std: tuple[PositiveNumber, ...]

    def apply(self, x: Tensor) -> Tensor:
        """Return (x·scale − mean)/std for x of shape (N, C, *), in torch's default dtype."""
        return self.prepared(x.dim(), x.device)(x)

    def prepared(self, dim: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return `apply` for any number of tensors of one dimension and device."""
        shape, dtype = (1, -1, *[1] * (dim - 2)), torch.get_default_dtype()
        mean = torch.tensor(self.mean, dtype=dtype, device=device).reshape(shape)
        std = torch.tensor(self.std, dtype=dtype, device=device).reshape(shape)
        return lambda x: (x.to(mean.dtype) * self.scale - mean) / std


class Estimate(_Part):
    """A metric on some samples, with the interval that holds the true one with 95 %.

    `low` and `high` are None if there is no interval.
    """

    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None

    @model_validator(mode="after")
    def _interval_is_one(self) -> "Estimate":
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval needs both of low and high, or neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low is {self.low}, above high, {self.high}")
        return self


class Evaluation(_Part):
    """How good the model was on one split, as it was trained or after recalibration."""

    split: Literal["test", "validation", "train"]
    samples: Annotated[int, Field(ge=1, lt=2**63)]
    statistics: Literal["as trained", "recalibrated"]
    metrics: dict[str, Estimate]


class Weights(_Part):
    """The weights' file, by its SHA-256 and size."""

    file: Literal["model.safetensors"]
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0, lt=2**40)]


class Versions(_Part):
    """The software that wrote the bundle."""

    syncbn: str
    torch: str


class Description(_Part):
    """Everything that the writer of a bundle says about the model.

    Attributes:
        name: what the model is served as.
        architecture: which model to build.
        input: one sample as a caller sends it.
        preprocessing: what turns it into the model's input.
        classes: the name of each logit; may be empty if the task is "tensor".
        metrics: what training measured of the exported model, flat.
        config_sha256: SHA-256 of the resolved configuration that trained it.
        task: what the model answers.
        evaluations: how good it is, by split and statistics.
        palette: a color (red, green, blue) for each class of a segmentation, for pictures.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    architecture: Architecture
    input: InputSpec
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    metrics: dict[str, FiniteFloat]
    config_sha256: Sha256
    task: Task = "classification"
    evaluations: tuple[Evaluation, ...] = Field(default=(), max_length=64)
    palette: tuple[Color, ...] | None = None

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> "Description":
        shape, classes = self.input.shape, len(self.classes)
        if not len(self.preprocessing.mean) == len(self.preprocessing.std) == shape[0]:
            raise ValueError(f"preprocessing needs {shape[0]} values each of mean and std")
        if self.task != "tensor" and not classes:
            raise ValueError(f"classes are empty; a {self.task} needs at least one")
        if self.task == "segmentation" and len(shape) != 3:
            raise ValueError(
                f"input.shape has {len(shape)} axes; a segmentation needs (channels, height, width)"
            )
        if self.palette is not None and self.task != "segmentation":
            raise ValueError(f"a {self.task} takes no palette; leave it out")
        if self.palette is not None and len(self.palette) != classes:
            raise ValueError(f"palette has {len(self.palette)} colors for {classes} classes")
        return self


class Manifest(Description):
    """The content of bundle.json: the description, and what makes it verifiable."""

    format: Literal["syncbn-bundle"]
    format_version: Literal[1, 2]
    weights: Weights
    versions: Versions

    @model_validator(mode="after")
    def _keys_are_those_of_its_version(self) -> "Manifest":
        needed = ("task", "evaluations")
        if self.format_version == 1:
            early = [key for key in (*needed, "palette") if key in self.model_fields_set]
            if early:
                raise ValueError(f"format version 1 has no {', '.join(early)}")
            return self
        missing = [key for key in needed if key not in self.model_fields_set]
        if missing:
            raise ValueError(f"format version 2 needs {', '.join(missing)}")
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice:
            raise ValueError(f"several classes are called {twice[0]!r}; give each its own name")
        return self


def make_manifest(
    description: Description, sha256: str, size_bytes: int, *, reserve_bytes: int = 0
) -> tuple[Manifest, bytes]:
    """Return the manifest of a description, and the content of its file.

    Args:
        description: what to say about the model.
        sha256: of the weights' file.
        size_bytes: of the weights' file.
        reserve_bytes: how much smaller than its limit the content must be.

    Raises:
        BundleError: the description breaks a rule of the format, a text in it is not UTF-8, or
            the file would be larger than a reader takes.
    """
    try:
        manifest = Manifest(
            **description.model_dump(),
            format="syncbn-bundle",
            format_version=FORMAT_VERSION,
            weights=Weights(file="model.safetensors", sha256=sha256, size_bytes=size_bytes),
            versions=Versions(syncbn=syncbn.__version__, torch=torch.__version__),
        )
        content = manifest.model_dump_json(indent=2).encode() + b"\n"
    except ValidationError as error:
        raise BundleError(f"the description is not valid: {_reasons(error)}") from error
    except (PydanticSerializationError, UnicodeError) as error:
        wrong = [name for name in description.classes if not _is_text(name)]
        what = f"the name of class {wrong[0]!r}" if wrong else "a text of the description"
        raise BundleError(f"{what} is not UTF-8; rename it") from error
    limit = MANIFEST_LIMIT_BYTES - reserve_bytes
    if len(content) > limit:
        raise BundleError(
            f"{MANIFEST_FILE} would have {len(content)} bytes, and may have {limit}: "
            f"{len(description.classes)} class names are too many or too long; shorten them"
        )
    return manifest, content


def parse_manifest(content: bytes, source: object) -> Manifest:
    """Return the manifest that a file holds.

    Args:
        content: of the file.
        source: what to call it in errors.

    Raises:
        BundleError: it is not valid JSON, or breaks a rule of its format version.
    """
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise BundleError(f"{source} is not a valid manifest: {_reasons(error)}") from error


def _reasons(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'content'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)[:5]
    )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True
