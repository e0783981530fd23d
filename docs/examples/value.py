"""A task of one's own: learn the value that a digit shows, by squared error.

PYTHONPATH=docs/examples syncbn-train task=custom task.factory=value:Value
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import ConfigError
from syncbn.train.data import Dataset
from syncbn.train.tasks.protocol import Answers


class Value:
    """One number for each sample. Called with the data set, and with task.arguments."""

    answers: Answers = "tensor"
    best = "mean_absolute_error"
    maximize = False
    statistics = 3
    weighs_samples_alike = True
    # Successes and trials among the statistics, for the interval.
    proportions: Mapping[str, tuple[int, int]] = {"within_half": (2, 0)}

    def __init__(self, dataset: Dataset) -> None:
        self._channels = dataset.input.shape[0]

    def model_arguments(self) -> dict[str, Any]:
        """Return what the model is built with: one output."""
        return {"in_channels": self._channels, "num_classes": 1}

    def check_output(self, output: object, samples: int) -> None:
        """Raise unless a model gives one number for each sample."""
        if not isinstance(output, Tensor) or output.shape != (samples, 1):
            raise ConfigError("model: must give one number for each sample")

    def answer(self, output: Any) -> Tensor:
        """Return what the model gives in evaluation mode."""
        return output

    def weights(self, targets: Tensor) -> Tensor:
        """Return the weight of each sample."""
        return torch.ones(len(targets))

    def losses(self, output: Any, targets: Tensor, training: bool) -> Tensor:
        """Return the squared error of each sample, times its weight."""
        return (output[:, 0].float() - targets).square()

    def observe(self, answer: Tensor, targets: Tensor) -> Tensor:
        """Return of each sample 1, its error, and whether that is below a half."""
        errors = (answer[:, 0] - targets).abs()
        return torch.stack([torch.ones_like(errors), errors, errors < 0.5], dim=1).double()

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the metrics by the sums of what was observed."""
        count, error, near = sums
        return {"mean_absolute_error": error / count, "within_half": near / count}
