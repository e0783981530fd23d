"""Starting weights: a state dict from a local file, into a model that begins to learn."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from syncbn.errors import ConfigError
from syncbn.train.model_checks import shown
from syncbn.train.schema import ModelConfig

log = logging.getLogger(__name__)

# Under which training programs keep the state dict among other things, and put before its names.
_KEYS = ("state_dict", "model", "model_state_dict", "model_state", "module")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the state dict that a file holds, on the CPU; executes no code from the file.

    Args:
        file: safetensors, if so named, or what `torch.save` wrote of a state dict, by itself or
            under a key such as "state_dict". A prefix "module." of all its names is left out.

    Raises:
        ConfigError: the file cannot be read, or holds no state dict of finite tensors.
    """
    where = f"model.weights={file}"
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; name a local file") from error
    try:
        if file.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{where} is not a safetensors file: {error}") from error
    except Exception as error:  # whatever an archive of something else makes torch raise
        raise ConfigError(
            f"{where} is not a file of tensors that torch loads without running code: "
            f"{str(error).splitlines()[0]}; save the state dict alone, with torch.save or as "
            "safetensors"
        ) from error
    state = _state_dict(found)
    if state is None:
        kind = f"keys {shown(list(map(str, found)))}" if isinstance(found, Mapping) else type(found)
        raise ConfigError(
            f"{where} holds no state dict, neither by itself nor under one of "
            f"{', '.join(_KEYS)}, but {kind}"
        )
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise ConfigError(f"{where} has values that are not finite in {shown(broken)}")
    return state


def load_weights(model: nn.Module, config: ModelConfig) -> None:
    """Load the configured starting weights into a model, if there are any, on rank 0 alone.

    `share_state` gives them to the other ranks. To be called at the start of a run, and not when it
    goes on from a checkpoint.

    Args:
        model: changed in place; on an error, in part.
        config: of the model, with weights, weights_into and weights_strict.

    Raises:
        ConfigError: the file cannot be read, there is no such part, or the file does not fit: with
            weights_strict, if any name or shape differs; without, if nothing fits.
    """
    if config.weights is None:
        return
    state = read_weights(Path(config.weights).expanduser())
    part = _part(model, config.weights_into)
    own: dict[str, Tensor] = part.state_dict()
    shapes = {key for key in state.keys() & own.keys() if state[key].shape != own[key].shape}
    fitting = {key: value for key, value in state.items() if key not in shapes}
    result = part.load_state_dict(fitting, strict=False)
    # Files from before torch counted batches lack the counts, which then begin at 0.
    missing = [
        key
        for key in result.missing_keys
        if key not in shapes and not key.endswith("num_batches_tracked")
    ]
    problems: list[str] = []
    if missing:
        problems.append(f"it lacks {shown(missing)}")
    if result.unexpected_keys:
        problems.append(
            f"{config.weights_into or 'the model'} has no {shown(list(result.unexpected_keys))}"
        )
    if shapes:
        problems.append(
            "other shapes: "
            + shown(
                [
                    f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
                    for key in state
                    if key in shapes
                ]
            )
        )
    told = f"model.weights={config.weights}: {'; '.join(problems)}"
    taken = len(fitting) - len(result.unexpected_keys)
    if taken == 0:
        raise ConfigError(f"{told}; nothing in it fits; a file of a part needs model.weights_into")
    if problems and config.weights_strict:
        raise ConfigError(f"{told}; model.weights_strict=false takes what fits")
    if problems:
        log.warning("%s; these start from random values, the other %d from the file", told, taken)
    else:
        log.info("the model starts from the %d tensors of %s", taken, config.weights)


def share_state(model: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0.

    Collective: broadcasts each tensor of the state dict, on the model's device.
    """
    state: dict[str, Tensor] = model.state_dict()
    for value in state.values():
        dist.broadcast(value, src=0)


def _part(model: nn.Module, name: str | None) -> nn.Module:
    """Return the part of a model that starting weights are for; None: the whole."""
    try:
        return model.get_submodule(name or "")
    except AttributeError as error:
        known = [each for each, _ in model.named_modules() if each]
        close = difflib.get_close_matches(str(name), known, n=3)
        parts = close or [each for each, _ in model.named_children()]
        raise ConfigError(
            f"model.weights_into={name}: the model has no such part; did you mean "
            f"{' or '.join(parts)}?"
        ) from error


def _state_dict(found: Any) -> dict[str, Tensor] | None:
    """Return the state dict that was found in a file, without prefixes; None if there is none."""
    nested = [found[key] for key in _KEYS if key in found] if isinstance(found, Mapping) else []
    for each in (found, *nested):
        if isinstance(each, Mapping) and each and all(map(_is_entry, each.items())):
            state = dict(each)
            for prefix in _PREFIXES:
                if all(key.startswith(prefix) for key in state):
                    state = {key.removeprefix(prefix): value for key, value in state.items()}
            return state
    return None


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
