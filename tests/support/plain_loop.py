"""A training loop for one process, written from docs/training.md and conf/ alone, with plain torch.

It shares no code with `syncbn.train`, so that what it ends with is a second opinion.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = 255


@dataclass(frozen=True)
class Recipe:
    """What is trained, with the names and the defaults of conf/.

    Attributes:
        epochs: passes over the data.
        max_steps: optimizer steps after which it ends at the latest; None: those of the epochs.
        optimizer: makes the optimizer of parameter groups that have a rate and a weight decay.
        lr: the highest rate, of the first step after the rise.
        weight_decay: for weights; not for what has at most one dimension, unless `decay_all`.
        warmup_steps: over which the rate rises linearly; then follows half a cosine down to 0.
        accumulate: batches whose gradients make one step.
        clip_norm: to which larger gradients are scaled; None: none are.
        label_smoothing: share of the probability that is spread over all classes, in training.
        class_weights: of the losses, whose mean is that sum over the sum of the weights; None: 1
            each.
        ema_decay: weight of the old value in an average of weights and running statistics, which
            begins as those after the first step; None: there is none.
        ema_warmup: whether the old value, of n steps, weighs at most (1 + n) / (10 + n).
        decay_all: whether all parameters have weight decay.
        frozen: whether a parameter of that name does not learn.
        lr_scale: the factor of a parameter's rate, by its name.
        auxiliary: weight of the loss of outputs after the first.
    """

    epochs: int
    max_steps: int | None
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    lr: float
    weight_decay: float
    warmup_steps: int
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None
    ema_decay: float | None = None
    ema_warmup: bool = True
    decay_all: bool = False
    frozen: Callable[[str], bool] = lambda name: False
    lr_scale: Callable[[str], float] = lambda name: 1.0
    auxiliary: float = 0.4


@dataclass
class Ended:
    """What a run ends with.

    Attributes:
        model: the state of the model after the last step.
        average: that of its moving average; None if there is none.
        metrics: a line for each epoch, as in metrics.jsonl.
        steps: the learning rate and the mean training loss of each step.
    """

    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    metrics: list[dict[str, float]]
    steps: list[tuple[float, float]]


class _Tally:
    """What is added up over samples: losses, what they weigh, and which answers were right."""

    def __init__(self, classes: int) -> None:
        self._loss = self._weight = self._in_five = 0.0
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self._of_pixels = False

    def add(self, loss: float, weight: float, logits: Tensor, targets: Tensor) -> None:
        """Count a batch, with the sum of its weighted losses and that of their weights."""
        self._loss += loss
        self._weight += weight
        self._of_pixels = targets.dim() == 3
        classes = len(self._confusion)
        counted = targets != IGNORED
        pairs = targets[counted] * classes + logits.argmax(1)[counted]
        self._confusion += pairs.bincount(minlength=classes**2).view(classes, classes)
        if classes > 5 and not self._of_pixels:
            self._in_five += (logits.topk(5).indices == targets[:, None]).sum().item()

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the mean loss, and how many answers were right, of one at least."""
        samples = self._confusion.sum().item()
        hits = self._confusion.diagonal()
        found = {"loss": self._loss / self._weight}
        right = hits.sum().item() / samples
        if self._of_pixels:
            either = self._confusion.sum(0) + self._confusion.sum(1) - hits
            occurs = either > 0
            iou = hits[occurs].double() / either[occurs]
            found |= {"pixel_accuracy": right, "mean_iou": iou.mean().item()}
        else:
            found |= {"accuracy": right}
            if len(self._confusion) > 5:
                found |= {"top5_accuracy": self._in_five / samples}
        return {f"{prefix}_{key}": value for key, value in found.items()}


Epoch = Sequence[tuple[Tensor, Tensor]]


def train_plainly(
    model: nn.Module,
    epoch: Callable[[int], Epoch],
    validation: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    recipe: Recipe,
) -> Ended:
    """Train a model in place.

    Args:
        model: with float64 parameters.
        epoch: returns the batches of an epoch, of the inputs and targets of all ranks.
        validation: batches by which epochs are compared.
        classes: how many there are.
        recipe: how.
    """
    optimizer = recipe.optimizer(_groups(model, recipe))
    factors = [group["lr"] / recipe.lr for group in optimizer.param_groups]
    steps = sum(math.ceil(len(epoch(each)) / recipe.accumulate) for each in range(recipe.epochs))
    steps = min(steps, recipe.max_steps or steps)
    average: dict[str, Tensor] | None = None
    ended = Ended({}, None, [], [])
    best = (-math.inf, -math.inf)
    for number in range(recipe.epochs):
        batches = epoch(number)
        tally = _Tally(classes)
        for first in range(0, len(batches), recipe.accumulate):
            taken = len(ended.steps)
            if taken == steps:
                break
            rate = _rate(taken, steps, recipe)
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate * factor
            loss = _step(
                model, optimizer, batches[first : first + recipe.accumulate], tally, recipe
            )
            ended.steps.append((rate, loss))
            if recipe.ema_decay is not None:
                average = (
                    _copy(model) if average is None else _nearer(average, model, taken, recipe)
                )
        line = tally.metrics("train") | _validated(model, validation, classes, recipe, "val")
        if average is not None:
            now = _copy(model)
            model.load_state_dict(average)
            line |= _validated(model, validation, classes, recipe, "ema_val")
            model.load_state_dict(now)
        quality = _quality(line)
        line |= {"epoch": number + 1, "step": len(ended.steps), "lr": ended.steps[-1][0]}
        line |= {"best": float(quality > best)}
        best = max(best, quality)
        ended.metrics.append(line)
        if len(ended.steps) == steps:
            break
    ended.model, ended.average = _copy(model), average
    return ended


def _quality(line: dict[str, float]) -> tuple[float, float]:
    """Return what epochs are compared by, of the average if there is one: the metric, then loss."""
    prefix = "ema_val" if "ema_val_loss" in line else "val"
    key = "accuracy" if f"{prefix}_accuracy" in line else "mean_iou"
    return line[f"{prefix}_{key}"], -line[f"{prefix}_loss"]


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return one group for each parameter that learns."""
    groups: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        if recipe.frozen(name):
            parameter.requires_grad_(False)
            continue
        decays = recipe.decay_all or parameter.dim() > 1
        groups.append(
            {
                "params": [parameter],
                "lr": recipe.lr * recipe.lr_scale(name),
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
        )
    return groups


def _rate(taken: int, steps: int, recipe: Recipe) -> float:
    """Return the rate of the step after so many."""
    if taken < recipe.warmup_steps:
        return recipe.lr * (taken + 1) / (recipe.warmup_steps + 1)
    share = (taken - recipe.warmup_steps) / (steps - recipe.warmup_steps)
    return recipe.lr * (1 + math.cos(math.pi * share)) / 2


def _set_training(model: nn.Module) -> None:
    """Train, but for normalizations whose parameters are all frozen."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and not layer.weight.requires_grad:
            layer.eval()


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Epoch,
    tally: _Tally,
    recipe: Recipe,
) -> float:
    """Take one step by the mean loss over all that counts in some batches, and return it.

    If nothing counts, the loss is 0, and so are its gradients.
    """
    weight = sum(_weight(targets, recipe) for _, targets in batches)
    _set_training(model)
    optimizer.zero_grad()
    total = 0.0
    for inputs, targets in batches:
        output = model(inputs)
        logits, *others = output if isinstance(output, tuple) else (output,)
        loss = _summed(logits, targets, recipe, recipe.label_smoothing)
        for other in others:
            loss = loss + recipe.auxiliary * _summed(other, targets, recipe, recipe.label_smoothing)
        (loss / (weight or 1)).backward()
        tally.add(loss.item(), _weight(targets, recipe), logits.detach(), targets)
        total += loss.item()
    if recipe.clip_norm is not None:
        learning = [each for group in optimizer.param_groups for each in group["params"]]
        nn.utils.clip_grad_norm_(learning, recipe.clip_norm)
    optimizer.step()
    return total / (weight or 1)


def _weight(targets: Tensor, recipe: Recipe) -> float:
    """Return what the losses of a batch weigh together."""
    counted = targets[targets != IGNORED]
    if recipe.class_weights is None:
        return float(len(counted))
    return torch.tensor(recipe.class_weights)[counted].sum().item()


def _summed(logits: Tensor, targets: Tensor, recipe: Recipe, smoothing: float) -> Tensor:
    weights = recipe.class_weights
    return functional.cross_entropy(
        logits,
        targets,
        weight=None if weights is None else logits.new_tensor(weights),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
    )


def _nearer(
    average: dict[str, Tensor], model: nn.Module, taken: int, recipe: Recipe
) -> dict[str, Tensor]:
    """Return an average of so many steps that takes in the model after one more."""
    assert recipe.ema_decay is not None
    decay = recipe.ema_decay
    if recipe.ema_warmup:
        decay = min(decay, (1 + taken) / (10 + taken))
    return {
        name: decay * average[name] + (1 - decay) * value if value.is_floating_point() else value
        for name, value in _copy(model).items()
    }


def _validated(
    model: nn.Module,
    validation: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    recipe: Recipe,
    prefix: str,
) -> dict[str, float]:
    model.eval()
    tally = _Tally(classes)
    with torch.no_grad():
        for inputs, targets in validation:
            logits = model(inputs)
            loss = _summed(logits, targets, recipe, 0.0).item()
            tally.add(loss, _weight(targets, recipe), logits, targets)
    return tally.metrics(prefix)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
