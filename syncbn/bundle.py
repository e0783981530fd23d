"""Bundles: a trained model as safetensors and JSON, written atomically and verified when read.

docs/bundle.md is the specification.
"""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from torch import Tensor, nn

import syncbn
from syncbn.errors import BundleError, ModelError
from syncbn.models import ARCHITECTURES, build_model, build_without_memory

MANIFEST_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
_MANIFEST_LIMIT_BYTES = 1 << 20

Size = Annotated[int, Field(ge=0, lt=2**31)]
# What stays finite in float32.
Number = Annotated[FiniteFloat, Field(ge=-3e38, le=3e38)]
PositiveNumber = Annotated[FiniteFloat, Field(ge=1e-37, le=3e38)]
Value = Size | Number | bool | str
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


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

    `config_sha256` is the SHA-256 of the resolved configuration that trained it.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    architecture: Architecture
    input: InputSpec
    preprocessing: Preprocessing
    classes: tuple[str, ...] = Field(min_length=1)
    metrics: dict[str, FiniteFloat]
    config_sha256: Sha256

    @model_validator(mode="after")
    def _one_mean_and_std_per_channel(self) -> "Description":
        channels = self.input.shape[0]
        if not len(self.preprocessing.mean) == len(self.preprocessing.std) == channels:
            raise ValueError(f"preprocessing needs {channels} values each of mean and std")
        return self


class Manifest(Description):
    """The content of bundle.json: the description, and what makes it verifiable."""

    format: Literal["syncbn-bundle"]
    format_version: Literal[1]
    weights: Weights
    versions: Versions


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its manifest, and its model in evaluation mode on the CPU."""

    manifest: Manifest
    model: nn.Module

    def probabilities(self, x: Tensor) -> Tensor:
        """Return the class probabilities of raw samples, from the running statistics.

        Args:
            x: shape (N, *manifest.input.shape), raw (not preprocessed), any real dtype.

        Returns:
            Shape (N, classes), float32; each row sums to 1, or is NaN where x overflowed.
        """
        with torch.inference_mode():
            return self.model(self.manifest.preprocessing.apply(x)).softmax(1)


def write_bundle(
    path: Path, description: Description, model: nn.Module, *, allow_imports: bool = False
) -> Manifest:
    """Write a model's bundle as the directory `path`: it appears whole, or not at all.

    Args:
        path: must not exist yet; its parent is made where it is missing.
        description: what to say about the model.
        model: its state dict is stored; it must fit `description.architecture`.
        allow_imports: whether the architecture may be an import path, as for `read_bundle`.

    Raises:
        BundleError: `path` exists, the model does not fit its description or holds values that are
            not finite, or the files cannot be written. Nothing is left behind then.
    """
    if path.exists():
        raise BundleError(f"{path} exists; remove it, or write the bundle elsewhere")
    state: dict[str, Tensor] = {}
    values: dict[str, object] = model.state_dict()
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise BundleError(f"the model's state {key!r} is no tensor")
        # A copy, since parameters may share memory and the file's tensors must not.
        state[key] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    _check(description, state, allow_imports)
    content = safetensors.torch.save(state)
    manifest = Manifest(
        **description.model_dump(),
        format="syncbn-bundle",
        format_version=1,
        weights=Weights(
            file=WEIGHTS_FILE, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
        ),
        versions=Versions(syncbn=syncbn.__version__, torch=torch.__version__),
    )
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep a service of another user out
        _write_durably(temporary / WEIGHTS_FILE, content)
        _write_durably(
            temporary / MANIFEST_FILE, manifest.model_dump_json(indent=2).encode() + b"\n"
        )
        temporary.rename(path)
    except OSError as error:
        raise BundleError(f"cannot write the bundle {path}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def read_bundle(path: Path, *, allow_imports: bool = False) -> Bundle:
    """Read and verify a bundle; executes no code that it holds, and none that it names by default.

    Args:
        path: the bundle's directory.
        allow_imports: whether to import and run the factory that the bundle names, where its
            architecture is an import path. Allow it only for bundles from those whom you trust.

    Raises:
        BundleError: a file is missing or cannot be read; the manifest is not valid JSON, has an
            unknown, missing or mistyped field, or another format version; the weights' size or
            SHA-256 differs, or they are not safetensors; the architecture is unknown, not allowed,
            or cannot be built without memory; a tensor is missing, superfluous, of another shape
            or dtype, or not finite; the model does not turn an input of the declared shape into
            one logit per class.
    """
    manifest = _read_manifest(path)
    content = _read_file(path / WEIGHTS_FILE, manifest.weights.size_bytes)
    if len(content) != manifest.weights.size_bytes:
        raise BundleError(
            f"{path / WEIGHTS_FILE} has {len(content)} bytes, but {MANIFEST_FILE} states "
            f"{manifest.weights.size_bytes}; copy the bundle again"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest.weights.sha256:
        raise BundleError(
            f"{path / WEIGHTS_FILE} has SHA-256 {digest}, but {MANIFEST_FILE} states "
            f"{manifest.weights.sha256}; copy the bundle again"
        )
    try:
        state = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise BundleError(f"{path / WEIGHTS_FILE} is not a safetensors file: {error}") from error
    try:
        return Bundle(manifest, _build(manifest, state, allow_imports))
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def is_bundle(path: Path) -> bool:
    """Return whether a directory claims to be a bundle, by holding a manifest."""
    return (path / MANIFEST_FILE).is_file()


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST_FILE
    content = _read_file(file, _MANIFEST_LIMIT_BYTES)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'content'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)[:5]
        )
        raise BundleError(f"{file} is not a valid manifest: {reasons}") from error


def _read_file(file: Path, limit_bytes: int) -> bytes:
    """Return the content of a regular file that is not larger than a limit."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for its writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{file} is not a regular file")
            if status.st_size > limit_bytes:
                raise BundleError(f"{file} is larger than {limit_bytes} bytes")
            return stream.read()
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}; is it a bundle?") from error


def _write_durably(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _build(description: Description, state: dict[str, Tensor], allow_imports: bool) -> nn.Module:
    """Return the described model holding a state dict, in evaluation mode, after checking both."""
    model = _check(description, state, allow_imports)
    architecture = description.architecture
    try:
        if architecture.name not in ARCHITECTURES:
            # Others may keep tensors outside the state dict, which nothing would fill. The values
            # that they start with are drawn without moving the caller's random numbers on.
            with torch.random.fork_rng(devices=[]):
                model = build_model(
                    architecture.name, architecture.arguments, allow_imports=allow_imports
                )
        filled = model.state_dict()
        filled.update(state)  # and keeps the versions by which modules tell an older layout
        model.load_state_dict(filled, assign=True)
    except (ModelError, RuntimeError) as error:
        raise BundleError(f"the model cannot be built for real: {error}") from error
    return model.eval().requires_grad_(False)


def _check(description: Description, state: dict[str, Tensor], allow_imports: bool) -> nn.Module:
    """Return the described model without memory, after checking a state dict and an input with it.

    Without memory, so that absurd arguments cost nothing.
    """
    name, arguments = description.architecture.name, description.architecture.arguments
    try:
        model = build_without_memory(name, arguments, allow_imports=allow_imports)
    except ModelError as error:
        raise BundleError(str(error)) from error
    expected: dict[str, Any] = model.state_dict()
    for problem, keys in (
        ("misses", expected.keys() - state.keys()),
        ("has the unknown", state.keys() - expected.keys()),
    ):
        if keys:
            raise BundleError(f"the state {problem} tensors {', '.join(sorted(keys))}")
    for key, wanted in expected.items():
        value = state[key]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise BundleError(
                f"tensor {key!r} should be {wanted.dtype} of shape {tuple(wanted.shape)}, "
                f"but is {value.dtype} of shape {tuple(value.shape)}"
            )
        if not value.isfinite().all():
            raise BundleError(f"tensor {key!r} holds values that are not finite")
        if key.endswith(("running_var", "num_batches_tracked")) and (value < 0).any():
            raise BundleError(f"tensor {key!r} holds negative values")
    try:
        size = 1, *description.input.shape
        x = torch.empty(size, dtype=torch.get_default_dtype(), device="meta")
        with torch.device("meta"):  # what a forward makes for itself
            output: object = model.eval()(x)
    except Exception as error:  # whatever a forward makes of it
        raise BundleError(
            f"the model refuses an input of shape {(1, *description.input.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise BundleError(f"the model returns a {type(output).__name__}, not a tensor of logits")
    if output.shape != (1, len(description.classes)):
        raise BundleError(
            f"the model turns one sample into shape {tuple(output.shape)}, not into one logit for "
            f"each of {len(description.classes)} classes"
        )
    return model


__all__ = [
    "Architecture",
    "Bundle",
    "Description",
    "InputSpec",
    "Manifest",
    "Preprocessing",
    "is_bundle",
    "read_bundle",
    "write_bundle",
]
