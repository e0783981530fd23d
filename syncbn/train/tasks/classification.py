"""Classification: one class for each sample."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from syncbn.train.data import Dataset
from syncbn.train.tasks.parts import (
    check_class_weights,
    check_logits,
    check_targets,
    exact,
    own_losses,
)
from syncbn.train.tasks.protocol import Answers

_TOP = 5


class Classification:
    """One class for each sample, learned by cross-entropy.

    Metrics: accuracy, and, with more than five classes, top5_accuracy: how often the right class is
    among the five most probable ones.

    Args:
        dataset: whose targets are labels, shape (n,), int64.
        class_weights: of the losses, one for each class; None: 1.
        loss: called with logits and labels, returns the losses of samples, shape (n,); None:
            cross-entropy.
        label_smoothing: the share of the probability that is spread over all classes in training.

    Raises:
        ConfigError: the weights are not as many as the classes, or the targets are no labels.
    """

    answers: Answers = "classification"
    best = "accuracy"
    maximize = True

    def __init__(
        self,
        dataset: Dataset,
        class_weights: Sequence[float] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        check_targets(dataset, "classification", "labels")
        self._classes = len(dataset.classes)
        self._channels = dataset.input.shape[0]
        self._weights = check_class_weights(class_weights, self._classes)
        self._loss = loss
        self._label_smoothing = label_smoothing
        self._has_top = self._classes > _TOP
        self.weighs_samples_alike = self._weights is None
        self.statistics = 3 if self._has_top else 2
        self.proportions: Mapping[str, tuple[int, int]] = {"accuracy": (1, 0)}
        if self._has_top:
            self.proportions = {**self.proportions, f"top{_TOP}_accuracy": (2, 0)}

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of channels and of classes."""
        return {"in_channels": self._channels, "num_classes": self._classes}

    def check_output(self, output: object, samples: int) -> None:
        """Raise unless an output is one logit for each sample and class."""
        check_logits(output, (samples, self._classes))

    def answer(self, output: Any) -> Tensor:
        """Return the logits."""
        return output

    def weights(self, targets: Tensor) -> Tensor:
        """Return the weights of the targets' classes."""
        if self._weights is None:
            return torch.ones(len(targets), dtype=torch.float64)
        return self._weights[targets]

    def losses(self, output: Any, targets: Tensor, training: bool) -> Tensor:
        """Return the loss of each sample, times the weight of its class."""
        logits = exact(output)
        weights = None if self._weights is None else self._weights.to(logits)
        if self._loss is None:
            return functional.cross_entropy(
                logits,
                targets,
                weights,
                reduction="none",
                label_smoothing=self._label_smoothing if training else 0.0,
            )
        losses = own_losses(self._loss, logits, targets)
        return losses if weights is None else losses * weights[targets]

    def observe(self, answer: Tensor, targets: Tensor) -> Tensor:
        """Return 1, whether the most probable class is right, and whether one of five is."""
        columns = [torch.ones_like(targets), answer.argmax(1) == targets]
        if self._has_top:
            columns.append((answer.topk(_TOP, dim=1).indices == targets[:, None]).any(1))
        return torch.stack([column.double() for column in columns], dim=1)

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the accuracies, from 0 to 1; NaN of no samples."""
        return {
            name: sums[successes] / sums[trials] if sums[trials] else math.nan
            for name, (successes, trials) in self.proportions.items()
        }
