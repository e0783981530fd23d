"""Bundles: a trained model as safetensors and JSON, written atomically and verified when read.

docs/bundle.md is the specification.
"""

import hashlib
import os
import shutil
import tempfile
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
from syncbn.models import build_model

MANIFEST_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
_MANIFEST_LIMIT_BYTES = 1 << 20

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Architecture(_Part):
    """Which model to build: a name and arguments of `syncbn.models.build_model`."""

    name: str
    arguments: dict[str, int | FiniteFloat | bool | str]


class InputSpec(_Part):
    """One sample as a caller sends it: its name, its shape without the batch axis, its dtype."""

    name: str = Field(min_length=1)
    shape: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    dtype: Literal["float32"]


class Preprocessing(_Part):
    """What turns a raw sample into the model's input: (x·scale − mean)/std, by channel."""

    scale: FiniteFloat
    mean: tuple[FiniteFloat, ...]
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]

    def apply(self, x: Tensor) -> Tensor:
        """Return (x·scale − mean)/std for x of shape (N, C, *), in torch's default dtype."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, std = (
            torch.tensor(values, device=x.device).reshape(shape) for values in (self.mean, self.std)
        )
        return (x.to(mean.dtype) * self.scale - mean) / std


class Weights(_Part):
    """The weights' file, by its SHA-256 and size."""

    file: Literal["model.safetensors"]
    sha256: Sha256
    size_bytes: int


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


def write_bundle(path: Path, description: Description, model: nn.Module) -> Manifest:
    """Write a model's bundle as the directory `path`: it appears whole, or not at all.

    Args:
        path: must not exist yet; its parent is made where it is missing.
        description: what to say about the model.
        model: its state dict is stored; it must fit `description.architecture`.

    Raises:
        BundleError: `path` exists, the model does not fit its description or holds values that are
            not finite, or the files cannot be written. Nothing is left behind then.
    """
    if path.exists():
        raise BundleError(f"{path} exists; remove it, or write the bundle elsewhere")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    _build(description, state)
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


def read_bundle(path: Path) -> Bundle:
    """Read and verify a bundle; executes no code from it.

    Raises:
        BundleError: a file is missing or cannot be read; the manifest is not valid JSON, has an
            unknown, missing or mistyped field, or another format version; the weights' size or
            SHA-256 differs, or they are not safetensors; the architecture is unknown; a tensor is
            missing, superfluous, of another shape or dtype, or not finite; the model does not
            turn an input of the declared shape into one logit per class.
    """
    manifest = _read_manifest(path)
    content = _read_file(path / WEIGHTS_FILE, manifest.weights.size_bytes)
    if len(content) != manifest.weights.size_bytes:
        raise BundleError(
            f"{path / WEIGHTS_FILE} has another size than the {manifest.weights.size_bytes} bytes "
            f"that {MANIFEST_FILE} states; copy the bundle again"
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
        return Bundle(manifest, _build(manifest, state))
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def is_bundle(path: Path) -> bool:
    """Return whether a directory claims to be a bundle, by holding a manifest."""
    return (path / MANIFEST_FILE).is_file()


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST_FILE
    content = _read_file(file, _MANIFEST_LIMIT_BYTES)
    if len(content) > _MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{file} is larger than {_MANIFEST_LIMIT_BYTES} bytes")
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'content'}: {item['msg']}"
            for item in error.errors(include_url=False)
        )
        raise BundleError(f"{file} is not a valid manifest: {reasons}") from error


def _read_file(file: Path, limit_bytes: int) -> bytes:
    """Return a file's content, or its first limit_bytes + 1 bytes, so that nothing huge is read."""
    try:
        with file.open("rb") as stream:
            return stream.read(limit_bytes + 1)
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}; is it a bundle?") from error


def _write_durably(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _build(description: Description, state: dict[str, Tensor]) -> nn.Module:
    """Return the described model holding a state dict, in evaluation mode, after checking the fit.

    The model is built without memory first, so that absurd arguments cost nothing.
    """
    try:
        with torch.device("meta"):
            model = build_model(description.architecture.name, description.architecture.arguments)
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
        if key.endswith("running_var") and (value < 0).any():
            raise BundleError(f"tensor {key!r} holds a negative variance")
    try:
        shape = tuple(model.eval()(torch.empty(1, *description.input.shape, device="meta")).shape)
    except RuntimeError as error:
        raise BundleError(
            f"the model refuses an input of shape {(1, *description.input.shape)}: {error}"
        ) from error
    if shape != (1, len(description.classes)):
        raise BundleError(
            f"the model turns one sample into shape {shape}, not into one logit for each of "
            f"{len(description.classes)} classes"
        )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


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
