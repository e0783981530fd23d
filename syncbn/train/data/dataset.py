"""What a data set is: raw samples in three splits, and what a bundle has to say about them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.bundle import InputSpec, Preprocessing
from syncbn.train.data.sampling import Samples

# ImageNet's, as for torchvision's own models: to read all images first takes long.
IMAGENET = Preprocessing(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Dataset:
    """Raw samples with their targets, split into what trains, what selects and what measures.

    Targets are labels, shape (n,), int64, or masks, shape (n, H, W), int64, in which 255 marks
    pixels that count for nothing. No sample is in two splits.

    Attributes:
        train: what is random about a sample of it depends on seed, epoch and index alone.
        test: samples that are looked at once, at the end; None: there are none.
        classes: the name of each label.
        input: what one sample looks like.
        preprocessing: what turns samples into a model's input, from the training data alone.
        validation: samples by which epochs are compared, not changed at random. None: there are
            none, until `load_dataset` takes a share of the training samples if it is told to.
        palette: for masks, the color (red, green, blue; 0 to 255) of each class in pictures.
    """

    train: Samples
    test: Samples | None
    classes: tuple[str, ...]
    input: InputSpec
    preprocessing: Preprocessing
    validation: Samples | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None


def image_input(samples: Tensor) -> InputSpec:
    """Return the form of images in memory, shape (N, C, H, W)."""
    return InputSpec(name="image", shape=tuple(samples.shape[1:]), dtype="float32")


def standardizing(images: Tensor, which: Tensor | slice = slice(None)) -> Preprocessing:
    """Return what gives each channel of some uint8 images mean 0 and deviation 1; by histograms."""
    means: list[float] = []
    deviations: list[float] = []
    for channel in images.unbind(1):
        counts = torch.bincount(channel[which].flatten(), minlength=256).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = (counts @ values / counts.sum()).item()
        means.append(mean)
        deviations.append((counts @ (values - mean) ** 2 / counts.sum()).sqrt().item())
    return Preprocessing(
        scale=1 / 255, mean=tuple(means), std=tuple(max(each, 1e-6) for each in deviations)
    )
