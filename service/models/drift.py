"""Drift watch: how far live inputs are from what a model's running statistics were taken of."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
from torch.utils.hooks import RemovableHandle

from syncbn.bundle import Bundle
from syncbn.moments import Moments, merge

log = logging.getLogger(__name__)

_LEAST_ROWS = 32  # below, the mean of even a lone value is off by a sixth of σ by chance
_MOST_ROWS = 10_000  # that count; older ones are forgotten little by little


@dataclass(frozen=True)
class LayerDrift:
    """How far the inputs of a batch normalization are from its running statistics.

    Attributes:
        name: of the layer.
        distance: in standard deviations; None: there were too few samples so far.
        batches: how often it was looked at.
    """

    name: str
    distance: float | None
    batches: int


@dataclass(frozen=True)
class DriftReport:
    """How far recent inputs are from training's.

    Attributes:
        samples: that were looked at.
        input_distance: the root mean square over `channels`; None: too few samples so far.
        channels: the distance of each channel of the input.
        layers: in the order of the model.
    """

    samples: int
    input_distance: float | None
    channels: tuple[float, ...] | None
    layers: tuple[LayerDrift, ...]


class DriftWatch:
    """Compares a sample of a model's inputs with the statistics that it was trained with.

    A distance is that of 2-Wasserstein between two normal distributions, in units of the trained
    σ: √((m − μ)²/σ² + (s/σ − 1)²), with m and s of recent samples. 0 is as in training; 1 is, for
    one, a mean that moved by σ. Of several channels, it is the root mean square. For the input, μ
    and σ are those that preprocessing subtracts and divides by; for a batch normalization, its
    running mean, and the root of its running variance + eps. Some 10 000 of the latest samples
    count. Moments are float64, merged after Chan et al.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions"
    (1982), equation 16; Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979), equation 2.1.

    Args:
        bundle: its model, as it was trained, is kept in memory and run now and then.
        share: of the time, that it may take.
        max_rows: of a batch, that it looks at.
        clock: in seconds.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        share: float = 0.01,
        max_rows: int = 16,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model: nn.Module | None = bundle.model
        self._preprocess = bundle.manifest.preprocessing.apply
        self._share = share
        self._max_rows = max_rows
        self._clock = clock
        self._random = np.random.default_rng(0)
        self._lock = threading.Lock()
        self._next_s = -np.inf
        channels = bundle.manifest.input.shape[0]
        nothing = torch.zeros(channels, dtype=torch.float64)
        self._samples = 0
        self._input = _Distances(nothing, nothing + 1)
        self._layers: dict[str, _Distances] = {}
        self._seen: dict[str, Moments] = {}
        self._hooks: list[RemovableHandle] = []
        for name, module in bundle.model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                deviation = (module.running_var.double() + module.eps).sqrt()
                self._layers[name] = _Distances(module.running_mean.double(), deviation)
                hook = self._looker(name)
                self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _looker(
        self, name: str
    ) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            # At once, as the input may be changed in place later; and all layers' inputs kept to
            # the end would take 0.8 GB for 16 images of ResNet-50.
            moments = _moments(inputs[0] if inputs else named["input"])
            # A layer that is called again in one forward was trained with all its inputs.
            earlier = self._seen.get(name)
            self._seen[name] = moments if earlier is None else merge(earlier, moments)

        return look

    def observe(self, samples: NDArray[np.float32]) -> None:
        """Look at some samples, if it is time to.

        Never raises: what goes wrong is logged, and ends the watch. For one thread at a time.

        Args:
            samples: shape (rows, *shape), raw.
        """
        start_s = self._clock()
        model = self._model  # `close` may take it away meanwhile
        if start_s < self._next_s or model is None:
            return
        try:
            if len(samples) > self._max_rows:
                samples = samples[self._random.choice(len(samples), self._max_rows, replace=False)]
            with torch.inference_mode():
                # A copy: torch takes no array of negative strides, and warns of read-only ones.
                x = self._preprocess(torch.from_numpy(np.array(samples, order="C")))
                x = x[x.flatten(1).isfinite().all(1)]
                if len(x):
                    self._add(x, model)
        except Exception:
            if self._model is not None:  # else it failed because its hooks were being removed
                log.exception("drift is not watched any more")
                self.close()
        finally:
            self._seen.clear()
        now_s = self._clock()
        self._next_s = now_s + (now_s - start_s) / self._share

    def _add(self, x: Tensor, model: nn.Module) -> None:
        self._seen.clear()  # of what others called the model with
        model(x)
        inputs = _moments(x)
        with self._lock:
            self._samples += len(x)
            self._input.add(inputs, len(x))
            for name, seen in self._seen.items():
                if seen.m2.isfinite().all():
                    self._layers[name].add(seen, len(x))

    def close(self) -> None:
        """Stop watching, and let the model go."""
        self._model = None
        for hook in self._hooks:
            hook.remove()

    def report(self) -> DriftReport:
        """Return how far recent inputs are from training's; from any thread."""
        with self._lock:
            channels = self._input.of_channels()
            return DriftReport(
                samples=self._samples,
                input_distance=_root_mean_square(channels),
                channels=channels,
                layers=tuple(
                    LayerDrift(name, _root_mean_square(layer.of_channels()), layer.batches)
                    for name, layer in self._layers.items()
                ),
            )


class _Distances:
    """The moments of what was seen of some channels, and how far they are from trained ones.

    Args:
        mean: μ, of each channel.
        deviation: σ, likewise.
    """

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self._mean = mean
        self._deviation = deviation
        nothing = torch.zeros_like(mean)
        self._moments = Moments.of(torch.zeros((), dtype=torch.float64), nothing, nothing)
        self._rows = 0
        self.batches = 0

    def add(self, moments: Moments, rows: int) -> None:
        """Add the moments of so many samples."""
        merged = merge(self._moments, moments)
        self.batches += 1
        self._rows += rows
        if self._rows > _MOST_ROWS:
            # As if the oldest had been taken out: the same mean and variance, of fewer.
            share = _MOST_ROWS / self._rows
            merged = Moments.of(merged.count * share, merged.mean, merged.m2 * share)
            self._rows = _MOST_ROWS
        self._moments = merged

    def of_channels(self) -> tuple[float, ...] | None:
        """Return the distance of each channel; None: there were too few samples."""
        if self._rows < _LEAST_ROWS:
            return None
        shift = (self._moments.mean - self._mean) / self._deviation
        ratio = self._moments.variance().sqrt() / self._deviation
        return tuple((shift.square() + (ratio - 1).square()).sqrt().tolist())


def _moments(x: Tensor) -> Moments:
    """Return the moments of each channel of a batch (N, C, *)."""
    values = x.detach().double().transpose(0, 1).flatten(1)
    mean = values.mean(1)
    m2 = (values - mean[:, None]).square_().sum(1)
    return Moments.of(torch.tensor(float(values.shape[1]), dtype=torch.float64), mean, m2)


def _root_mean_square(values: Sequence[float] | None) -> float | None:
    return None if values is None else float(np.sqrt(np.mean(np.square(values))))
