"""The files of a bundle: written at once or not at all, and read with suspicion."""

import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from syncbn.bundle.fit import check_fit, check_storable, tensors_of
from syncbn.bundle.manifest import (
    MANIFEST_FILE,
    MANIFEST_LIMIT_BYTES,
    Description,
    Manifest,
    make_manifest,
    parse_manifest,
)
from syncbn.errors import BundleError, ModelError
from syncbn.models import ARCHITECTURES, build_model

WEIGHTS_FILE = "model.safetensors"
_RESERVE_BYTES = 64 << 10  # for metrics that are not known before training


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its manifest, and its model in evaluation mode on the CPU."""

    manifest: Manifest
    model: nn.Module

    def outputs(self, x: Tensor) -> Tensor:
        """Return what the model makes of raw samples, from the running statistics.

        Args:
            x: shape (N, *manifest.input.shape), raw (not preprocessed), any real dtype.

        Returns:
            By `manifest.task`: logits of shape (N, classes), logits of shape (N, classes, height,
            width), or any tensor whose first axis is N.
        """
        with torch.inference_mode():
            return self.model(self.manifest.preprocessing.apply(x))

    def probabilities(self, x: Tensor) -> Tensor:
        """Return the class probabilities of raw samples, from the running statistics.

        Args:
            x: as for `outputs`.

        Returns:
            Shape (N, classes), or (N, classes, height, width) for a segmentation, float32; they sum
            to 1 over the classes, or are NaN if x overflowed.

        Raises:
            BundleError: the model's task is "tensor", so that its output is no logits.
        """
        if self.manifest.task == "tensor":
            raise BundleError(
                f"model {self.manifest.name!r} answers tensors, not classes, and so has no "
                "probabilities; use outputs()"
            )
        with torch.inference_mode():
            return self.outputs(x).softmax(1)


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
        BundleError: `path` exists; the description breaks a rule of the format, holds a text that
            is not UTF-8, or makes a manifest that no reader takes; the model does not fit its
            description or holds values that a bundle may not; or the files cannot be written.
            Nothing is left behind then.
    """
    if path.exists():
        raise BundleError(f"{path} exists; remove it, or write the bundle elsewhere")
    tensors = tensors_of(model)
    check_storable(tensors)
    # Copies, since parameters may share memory and the file's tensors must not.
    state = {
        key: value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    check_fit(description, state, allow_imports)
    weights = safetensors.torch.save(state)
    manifest, content = make_manifest(
        description, hashlib.sha256(weights).hexdigest(), len(weights)
    )
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep a service of another user out
        _write_durably(temporary / WEIGHTS_FILE, weights)
        _write_durably(temporary / MANIFEST_FILE, content)
        temporary.rename(path)
    except OSError as error:
        raise BundleError(f"cannot write the bundle {path}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def check_exportable(
    description: Description, model: nn.Module, *, allow_imports: bool = False
) -> None:
    """Raise whatever `write_bundle` would, except for values that training changes.

    For use before training: it neither copies nor reads the parameters, so it takes a fraction of
    a second. The values of parameters and of running statistics are not looked at, those of other
    buffers are.

    Args:
        description: what will be said about the model. Its metrics and evaluations may be empty
            yet; 64 KiB of the manifest are kept free for them.
        model: as for `write_bundle`, on any device.
        allow_imports: as for `write_bundle`.

    Raises:
        BundleError: as `write_bundle`, except for `path`.
    """
    tensors = tensors_of(model)
    check_storable(tensors)
    size_bytes = sum(value.numel() * value.element_size() for value in tensors.values())
    make_manifest(description, "0" * 64, size_bytes, reserve_bytes=_RESERVE_BYTES)
    check_fit(description, tensors, allow_imports, trained=False)


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
            or dtype, or holds values that it may not; the model does not turn an input of the
            declared shape into what its task answers.
    """
    manifest = read_manifest(path)
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


def read_manifest(path: Path) -> Manifest:
    """Return what a bundle says of itself; its weights are neither read nor verified.

    Args:
        path: the bundle's directory.

    Raises:
        BundleError: the manifest is missing, cannot be read, or is not valid.
    """
    file = path / MANIFEST_FILE
    return parse_manifest(_read_file(file, MANIFEST_LIMIT_BYTES), file)


def is_bundle(path: Path) -> bool:
    """Return whether a directory claims to be a bundle, by holding a manifest."""
    return (path / MANIFEST_FILE).is_file()


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
    model = check_fit(description, state, allow_imports)
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
