"""Segmentation: one class for each pixel."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.train.data import Dataset
from syncbn.train.data.checks import IGNORED
from syncbn.train.tasks.parts import (
    check_class_weights,
    check_logits,
    check_targets,
    exact,
    own_losses,
)
from syncbn.train.tasks.protocol import Answers


class Segmentation:
    """One class for each pixel, learned by cross-entropy, with Dice if wanted.

    The mean of the loss is over the valid pixels of all ranks. With Dice, each image has
    1 − mean over classes of 2·Σpq/(Σp + Σq) besides, p the probabilities, q the mask, which weighs
    as many pixels as are valid in it.

    Metrics: mean_iou, the mean over the classes that are in the masks or the predictions of
    intersection over union, over all pixels of all images, without the class of `ignore_index`;
    pixel_accuracy.

    Args:
        dataset: whose targets are masks, shape (n, H, W), int64.
        ignore_index: pixels of this value count nowhere, and neither do those of 255, which stands
            for what lies outside of an image.
        class_weights: of the losses, one for each class; None: 1.
        loss: called with logits and masks, returns the losses of pixels, shape (n, H, W); None:
            cross-entropy. Masks have 0 in place of what is ignored, whose losses are left out.
        label_smoothing: the share of the probability that is spread over all classes in training.
        dice: weight of the Dice loss.
        auxiliary: weight of the losses of auxiliary outputs, in training.

    Raises:
        ConfigError: the weights are not as many as the classes, or the targets are no masks.

    Source: Milletari, Navab and Ahmadi, "V-Net" (2016), section 3, but with p and q unsquared.
    """

    answers: Answers = "segmentation"
    best = "mean_iou"
    maximize = True
    weighs_samples_alike = False
    proportions: Mapping[str, tuple[int, int]] = {}  # pixels of an image are not independent

    def __init__(
        self,
        dataset: Dataset,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
        dice: float = 0.0,
        auxiliary: float = 0.4,
    ) -> None:
        check_targets(dataset, "segmentation", "masks")
        self._classes = len(dataset.classes)
        self._input = dataset.input.shape
        self._ignored = ignore_index
        self._weights = check_class_weights(class_weights, self._classes)
        self._loss = loss
        self._label_smoothing = label_smoothing
        self._dice = dice
        self._auxiliary = auxiliary
        self.statistics = 3 * self._classes

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of channels and of classes."""
        return {"in_channels": self._input[0], "num_classes": self._classes}

    def check_output(self, output: object, samples: int) -> None:
        """Raise unless each of the outputs is one logit for each sample, class and pixel."""
        shape = (samples, self._classes, *self._input[1:])
        for logits in output if isinstance(output, tuple) else (output,):  # pyright: ignore[reportUnknownVariableType] -- whatever a model gives
            check_logits(logits, shape)

    def answer(self, output: Any) -> Tensor:
        """Return the logits without the auxiliary ones."""
        return output[0] if isinstance(output, tuple) else output  # pyright: ignore[reportUnknownVariableType] -- as above

    def weights(self, targets: Tensor) -> Tensor:
        """Return how many pixels of each mask are valid, or the sum of their classes' weights."""
        valid = self._valid(targets)
        if self._weights is None:
            return valid.flatten(1).sum(1).double()
        return (self._weights[targets.where(valid, 0)] * valid).flatten(1).sum(1)

    def _valid(self, targets: Tensor) -> Tensor:
        return (targets != self._ignored) & (targets != IGNORED)

    def losses(self, output: Any, targets: Tensor, training: bool) -> Tensor:
        """Return the sum of the losses of each image's valid pixels, times their weights."""
        valid = self._valid(targets)
        masks = targets.where(valid, 0)
        outputs: tuple[Tensor, ...] = output if isinstance(output, tuple) else (output,)
        losses = self._image_losses(outputs[0], masks, valid, training)
        for auxiliary in outputs[1:] if training else ():
            losses = losses + self._auxiliary * self._image_losses(auxiliary, masks, valid, True)
        return losses

    def _image_losses(self, output: Tensor, masks: Tensor, valid: Tensor, training: bool) -> Tensor:
        logits = exact(output)
        log_p = logits.log_softmax(1)
        weights = None if self._weights is None else self._weights.to(logits)
        if self._loss is not None:
            pixels = own_losses(self._loss, logits, masks)
            if weights is not None:
                pixels = pixels * weights[masks]
        else:
            # Not by torch's function, which has no deterministic form for images on a GPU.
            pixels = -log_p.gather(1, masks[:, None])[:, 0]
            if weights is not None:
                pixels = pixels * weights[masks]
            if training and self._label_smoothing:
                by_class = log_p if weights is None else log_p * weights[:, None, None]
                spread = -by_class.mean(1)
                pixels = pixels.lerp(spread, self._label_smoothing)
        losses = pixels.where(valid, 0).flatten(1).sum(1)
        if self._dice and training:
            pixel_weights = valid.to(logits.dtype) if weights is None else weights[masks] * valid
            losses = losses + self._dice * _dice(log_p, masks, valid) * pixel_weights.sum((1, 2))
        return losses

    def observe(self, answer: Tensor, targets: Tensor) -> Tensor:
        """Return, by class, the pixels that are right, that are predicted, and that are there."""
        valid = self._valid(targets)
        found = answer.argmax(1)
        classes = self._classes

        def counts(of: Tensor, where: Tensor) -> Tensor:
            # One more class for all that does not count.
            places = of.where(where, classes).flatten(1)
            totals = places.new_zeros(len(places), classes + 1)
            return totals.scatter_add_(1, places, torch.ones_like(places))[:, :classes]

        right = counts(found, valid & (found == targets))
        return torch.cat([right, counts(found, valid), counts(targets, valid)], dim=1).double()

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Return mean IoU and pixel accuracy, from 0 to 1; NaN of no pixels."""
        classes = self._classes
        right, found, there = (sums[at * classes : (at + 1) * classes] for at in range(3))
        ratios = [
            hit / (predicted + actual - hit)
            for number, (hit, predicted, actual) in enumerate(zip(right, found, there, strict=True))
            if predicted + actual > 0 and number != self._ignored
        ]
        return {
            "mean_iou": sum(ratios) / len(ratios) if ratios else math.nan,
            "pixel_accuracy": sum(right) / sum(there) if sum(there) else math.nan,
        }


def _dice(log_p: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
    """Return 1 − the mean Dice coefficient of the classes, for each image.

    A class that an image does not have counts with what is predicted of it.
    """
    p = log_p.exp() * valid[:, None]
    q = torch.zeros_like(p).scatter_(1, masks[:, None], valid[:, None].to(p.dtype))
    both, either = (p * q).flatten(2).sum(2), (p + q).flatten(2).sum(2)
    tiny = torch.finfo(p.dtype).eps
    return 1 - ((2 * both + tiny) / (either + tiny)).mean(1)
