"""Whether a model's tensors and output are what its description says."""

from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from syncbn.bundle.manifest import Description
from syncbn.errors import BundleError, ModelError
from syncbn.models import build_without_memory


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict, which shares its memory, without gradients.

    Raises:
        BundleError: it holds something else than tensors.
    """
    values: dict[str, object] = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise BundleError(f"the model's state {key!r} is no tensor")
        tensors[key] = value.detach()
    return tensors


def check_storable(tensors: dict[str, Tensor]) -> None:
    """Raise BundleError if a safetensors file cannot hold tensors of such names and dtypes."""
    for key, value in tensors.items():
        if value.layout != torch.strided:
            raise BundleError(
                f"tensor {key!r} has the layout {value.layout}; a bundle stores dense tensors"
            )
        try:
            safetensors.torch.save({key: torch.empty(0, dtype=value.dtype, device="cpu")})
        except Exception as error:  # the library raises what it likes
            raise BundleError(
                f"tensor {key!r} of {value.dtype} cannot be stored as safetensors: "
                f"{type(error).__name__}: {error}"
            ) from error


def check_fit(
    description: Description,
    state: dict[str, Tensor],
    allow_imports: bool,
    *,
    trained: bool = True,
) -> nn.Module:
    """Return the described model without memory, after checking a state dict and an input with it.

    Without memory, so that absurd arguments cost nothing.

    Args:
        description: of the model.
        state: its tensors.
        allow_imports: whether the architecture may be an import path.
        trained: whether to check the values that training changes: parameters and running
            statistics.

    Raises:
        BundleError: they do not fit.
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
    buffers = {key for key, _ in model.named_buffers(remove_duplicate=False)}
    for key, wanted in expected.items():
        value = state[key]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise BundleError(
                f"tensor {key!r} should be {wanted.dtype} of shape {tuple(wanted.shape)}, "
                f"but is {value.dtype} of shape {tuple(value.shape)}"
            )
        last = key.rpartition(".")[2]
        running = last.startswith("running_") or last == "num_batches_tracked"
        constant = key in buffers and not running
        if constant or trained:
            _check_values(key, value, constant=constant)
    _check_output(description, model)
    return model


def _check_values(key: str, value: Tensor, *, constant: bool) -> None:
    """Raise BundleError for values that a tensor may not hold.

    A buffer that is no running statistic may be infinite, as attention masks are.
    """
    if constant:
        if value.isnan().any():
            raise BundleError(f"buffer {key!r} holds values that are not numbers (NaN)")
    elif not value.isfinite().all():
        raise BundleError(f"tensor {key!r} holds values that are not finite")
    if key.endswith(("running_var", "num_batches_tracked")) and (value < 0).any():
        raise BundleError(f"tensor {key!r} holds negative values")


def _check_output(description: Description, model: nn.Module) -> None:
    """Raise BundleError unless a model without memory answers what its task does."""
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
    task, classes = description.task, len(description.classes)
    kind = "tensor" if task == "tensor" else "tensor of logits"
    if not isinstance(output, Tensor):
        raise BundleError(f"the model returns a {type(output).__name__}, not a {kind}")
    shape = tuple(output.shape)
    if not output.is_floating_point():
        raise BundleError(
            f"the model returns a tensor of {output.dtype}; a {task} needs floating point"
        )
    if task == "classification" and shape != (1, classes):
        raise BundleError(
            f"the model turns one sample into shape {shape}, not into one logit for each of "
            f"{classes} classes"
        )
    wanted = (1, classes, *description.input.shape[1:])
    if task == "segmentation" and shape != wanted:
        raise BundleError(
            f"the model turns one sample into shape {shape}, not into {wanted}: one logit for "
            f"each of {classes} classes and each pixel of the input"
        )
    if task == "tensor" and shape[:1] != (1,):
        raise BundleError(
            f"the model turns one sample into shape {shape}, whose first axis is not the batch"
        )
