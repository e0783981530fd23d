"""Whether what a task returns fits the protocol: known before training, not hours later."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from syncbn.errors import ConfigError, SyncBNError
from syncbn.train.tasks.protocol import Task

T = TypeVar("T")


def tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors of a model's output: itself, or those in its tuples, lists and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        parts: Any = output.values() if isinstance(output, Mapping) else output  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType] -- whatever a model gives
        for part in parts:
            yield from tensors(part)


def check_task(task: Task, output: object, targets: Tensor, device: torch.device) -> None:
    """Raise unless a task makes of an output and its targets what the protocol says.

    Args:
        task: any, most likely the user's own.
        output: of the model in training.
        targets: as many as there are samples in the output, on the host.
        device: of the output.

    Raises:
        ConfigError: it says which method of the task returns what, and what it must return.
    """
    name, count, numbers = type(task).__name__, len(targets), task.statistics
    there = targets.to(device)

    def tried(method: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (SyncBNError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever somebody else's code raises
            raise ConfigError(
                f"task: {name}.{method} failed for targets of shape {tuple(targets.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def check(method: str, found: object, shape: tuple[int, ...]) -> None:
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            raise ConfigError(
                f"task: {name}.{method} returned {_shown(found)} for {count} samples; it must "
                f"return a tensor of shape {shape}"
            )

    with torch.no_grad():
        weights = tried("weights", lambda: task.weights(targets))
        check("weights", weights, (count,))
        if not bool(weights.isfinite().all()) or bool((weights < 0).any()):
            raise ConfigError(
                f"task: {name}.weights returned {weights.tolist()[:4]}…; no weight may be below 0"
            )
        for training in (True, False):
            part: Any = output if training else tried("answer", lambda: task.answer(output))
            losses = tried("losses", lambda part=part, on=training: task.losses(part, there, on))
            check("losses", losses, (count,))
        answer = tried("answer", lambda: task.answer(output))
        observed = tried("observe", lambda: task.observe(answer, there))
        check("observe", observed, (count, numbers))
        sums = observed.double().sum(0).tolist()
    metrics: Any = tried("metrics", lambda: task.metrics(sums))
    if not isinstance(metrics, dict) or not all(
        isinstance(key, str) and isinstance(value, int | float)
        for key, value in metrics.items()  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType] -- whatever it is
    ):
        raise ConfigError(
            f"task: {name}.metrics returned {metrics!r:.200}; it must return a dict of numbers by "
            "name"
        )
    taken = [each for each in metrics if each in _TAKEN]
    if taken:
        raise ConfigError(
            f"task: {name}.metrics calls a metric {taken[0]!r}, which is something else in the "
            "lines of steps and epochs; give it another name"
        )
    if task.best not in metrics:
        raise ConfigError(
            f"task: {name}.best is {task.best!r}, which is none of the metrics "
            f"{', '.join(metrics) or '(there are none)'}; epochs are compared by it"
        )
    for metric, places in task.proportions.items():
        if metric not in metrics or not all(0 <= place < numbers for place in places):
            raise ConfigError(
                f"task: {name}.proportions has {metric!r}: {places}; it must be a metric, with the "
                f"places of successes and trials among {numbers} statistics"
            )


def check_without_samples(
    task: Task, output: object, targets: Tensor, device: torch.device
) -> None:
    """Raise unless a task takes a batch without samples, of which nothing is added up.

    A rank may have none of an epoch's last batch, which is late to hear that a loss cannot do that.

    Args:
        task: any.
        output: of the model in training, for any number of samples.
        targets: one or more, on the host.
        device: of the output.

    Raises:
        ConfigError: a method of the task fails.
    """
    nothing, none = tree_map_only(Tensor, lambda part: part[:0], output), targets[:0]
    try:
        with torch.no_grad():
            task.weights(none)
            task.losses(nothing, none.to(device), True).sum()
            task.observe(task.answer(nothing), none.to(device)).sum(0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise ConfigError(
            f"task: {type(task).__name__} fails for no samples, which is what a rank will have of "
            f"each epoch's last batch: {error}; return tensors of length 0 then, or set "
            "data.drop_last=true"
        ) from error


def check_members(task: Task, where: str) -> None:
    """Raise unless an object has what a task must have, with values that are allowed.

    Args:
        task: whatever a factory returned.
        where: what an error says first.

    Raises:
        ConfigError: something is missing or wrong.
    """
    name = type(task).__name__
    missing = [each for each in _MEMBERS if not hasattr(task, each)]
    if missing:
        raise ConfigError(
            f"{where} returned a {name} without {', '.join(missing)}; it must return a "
            "syncbn.train.tasks.Task"
        )
    wrong = {
        "answers": task.answers not in _ANSWERS,
        "statistics": not isinstance(task.statistics, int) or task.statistics < 0,  # pyright: ignore[reportUnnecessaryIsInstance] -- whatever it is
    }
    for member, is_wrong in wrong.items():
        if is_wrong:
            needed = ", ".join(_ANSWERS) if member == "answers" else "a whole number from 0 on"
            raise ConfigError(
                f"{where} returned a {name} whose {member} is {getattr(task, member)!r}; it must "
                f"be {'one of ' if member == 'answers' else ''}{needed}"
            )


def _shown(found: object) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    return f"a {type(found).__name__}"


_TAKEN = ("loss", "step", "epoch", "lr", "images_per_s")
_ANSWERS = ("classification", "segmentation", "tensor")
_MEMBERS = (*Task.__annotations__, *(n for n in vars(Task) if not n.startswith("_")))
