"""What a task says of itself: all that the loop, the checkpoints and the bundle know of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

Answers = Literal["classification", "segmentation", "tensor"]


class Task(Protocol):
    """What a model learns from samples and targets, and how good it is at it.

    The loss of a step is Σ losses / Σ weights over the samples of all ranks, so that any number of
    ranks learns what one process would learn from all of them.

    Attributes:
        answers: what the model's output means to those who ask it: "classification", logits of
            shape (N, K); "segmentation", logits of shape (N, K, H, W); or "tensor", anything.
        best: the metric by which epochs are compared; of equals, the one of lower loss is better.
        maximize: whether more of that metric is better.
        statistics: S, how many numbers `observe` returns for each sample.
        weighs_samples_alike: whether each sample weighs 1, so that ranks need not tell each other.
        proportions: metrics that are a share of independent trials: for each the place of its
            successes and of its trials among the statistics. Their intervals are Wilson's.
    """

    answers: Answers
    best: str
    maximize: bool
    statistics: int
    weighs_samples_alike: bool
    proportions: Mapping[str, tuple[int, int]]

    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments that the model needs besides those configured."""
        ...

    def check_output(self, output: object, samples: int) -> None:
        """Raise unless a model's output in training fits.

        Args:
            output: what the model returned.
            samples: how many samples it was given.

        Raises:
            ConfigError: it does not fit.
        """
        ...

    def answer(self, output: Any) -> Tensor:
        """Return the part of an output that the model gives in evaluation mode."""
        ...

    def weights(self, targets: Tensor) -> Tensor:
        """Return the weight of each sample in the mean of the losses, shape (n,), on the host.

        Args:
            targets: of a batch, on the host.
        """
        ...

    def losses(self, output: Any, targets: Tensor, training: bool) -> Tensor:
        """Return the loss of each sample, times its weight, shape (n,), float32 or float64.

        Args:
            output: the model's, for n samples.
            targets: on the device of the output.
            training: whether it is for the gradient; label smoothing and the like are for that.
        """
        ...

    def observe(self, answer: Tensor, targets: Tensor) -> Tensor:
        """Return what ranks add up for `metrics`, for each sample, shape (n, S), float64.

        Args:
            answer: the model's, for n samples.
            targets: on the device of the answer.
        """
        ...

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the metrics by name, `best` among them.

        Args:
            sums: what `observe` returned, summed over samples.
        """
        ...
