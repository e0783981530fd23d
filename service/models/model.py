"""A model as it is served: a bundle, folded, checked against itself, warmed up, and its batcher."""

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base

from service.metrics import Metrics, ModelMetrics
from service.models.batcher import Answer, Array, Batcher, ForwardTimes
from service.models.drift import DriftWatch
from service.models.outputs import Outputs, outputs_of
from syncbn.bundle import Bundle, Manifest, Preprocessing, read_bundle
from syncbn.errors import BundleError, ConversionError
from syncbn.transforms.fold import fold

log = logging.getLogger(__name__)

# A model whose largest batch takes less is computed on the event loop: handing it to a thread and
# back costs some 0.2 ms, and while both want the interpreter, up to its switch interval of 5 ms.
_INLINE_S = 0.002
_LONG_S = 0.5  # a forward that takes longer is not worth a larger one at warm-up
_WARM_UP_S = 1.0  # for the sizes that are no power of two
_CHECKED_ROWS = 7
_LOGITS_TOLERANCE = 1e-4  # of folding, in float32, for logits up to 1, or relative to the largest
_BATCH_TOLERANCE = 1e-5  # of a probability, alone or in a batch, in float32
_BFLOAT16_TOLERANCE = 0.05  # of a probability


@dataclass(frozen=True)
class Compute:
    """How and where models compute.

    Attributes:
        device: of the models.
        dtype: float32 or bfloat16; probabilities are float32 anyway.
        compile: whether by torch.compile.
        threads: of torch, on the CPU.
        max_batch_size: most rows of a forward.
        max_queue_rows: most rows that wait for one model.
        timeout_s: how long a model that is replaced goes on answering what it was asked.
        drift: whether to watch it.
        max_batch_bytes: of input and output of a forward, in float32, unless one sample has more.
        max_queue_bytes: of the samples that wait for one model, unless they are one batch.
    """

    device: torch.device
    dtype: torch.dtype
    compile: bool
    threads: int
    max_batch_size: int
    max_queue_rows: int
    timeout_s: float
    drift: bool
    max_batch_bytes: int = 256 << 20
    max_queue_bytes: int = 2 << 30


class Predictor:
    """The answers to raw samples, as fast as torch has them.

    Computes model((x·scale − mean)/std) in inference mode, with BN folded into the layers before
    it, channels_last for images, and of it what the model's task answers. Error: that of folding,
    and of computing x·(scale/std) − mean/std instead.

    Args:
        bundle: left unchanged.
        compute: how and where.

    Attributes:
        model: the folded copy.
        outputs: what the model answers.
    """

    def __init__(self, bundle: Bundle, compute: Compute) -> None:
        shape = bundle.manifest.input.shape
        images = len(shape) == 3
        self._format = torch.channels_last if images else torch.contiguous_format
        self._device, self._dtype = compute.device, compute.dtype
        folded = fold(bundle.model).model
        model = folded.to(compute.device, compute.dtype).to(memory_format=self._format)
        if compute.compile:
            model.compile(dynamic=True)
        self.model = model
        preprocessing = bundle.manifest.preprocessing
        self._factor, self._shift = _affine(preprocessing, 1 + len(shape), compute.device)
        self.outputs: Outputs = outputs_of(bundle.manifest, _output_shape(bundle))

    def output(self, samples: Tensor) -> Tensor:
        """Return the model's own output for raw samples (rows, *shape), in float32."""
        with torch.inference_mode():
            x = samples.to(self._device, non_blocking=True)
            x = torch.addcmul(self._shift, x, self._factor)
            return self.model(x.to(self._dtype, memory_format=self._format)).float()

    def __call__(self, samples: Array) -> Answer:
        """Return the usual answer to raw samples (rows, *shape): see `Outputs.compact`."""
        with torch.inference_mode():
            return self.outputs.compact(self.output(torch.from_numpy(samples))).cpu().numpy()

    def whole(self, samples: Array) -> Answer:
        """Return all that the model answers to raw samples (rows, *shape): see `Outputs.whole`."""
        with torch.inference_mode():
            return self.outputs.whole(self.output(torch.from_numpy(samples))).cpu().numpy()


def _output_shape(bundle: Bundle) -> tuple[int, ...]:
    """Return the shape of what a model returns for one sample."""
    classes, shape = len(bundle.manifest.classes), bundle.manifest.input.shape
    if bundle.manifest.task == "classification":
        return (classes,)
    if bundle.manifest.task == "segmentation":
        return (classes, *shape[1:])
    return tuple(bundle.outputs(torch.from_numpy(random_samples(bundle.manifest, 1))).shape[1:])


def _affine(preprocessing: Preprocessing, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factor and shift with which x·factor + shift preprocesses."""
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    shape = (1, -1, *[1] * (dim - 2))
    factor, shift = preprocessing.scale / std, -mean / std
    return tuple(each.float().reshape(shape).to(device) for each in (factor, shift))  # pyright: ignore[reportReturnType] -- two


class ServedModel:
    """A model that answers; made by `load_model`, and alive between `start` and `drain`.

    Attributes:
        name: of the model.
        version: of the bundle.
        manifest: of the bundle.
        metrics: of this version.
        predictor: what computes.
        outputs: what it answers.
        max_rows: of a forward.
        watch: of its inputs' drift; None: nobody watches.
        batcher: after `start`.
        users: requests that need it yet, of which each may ask the batcher more than once.
    """

    batcher: Batcher

    def __init__(
        self,
        bundle: Bundle,
        version: str,
        compute: Compute,
        metrics: ModelMetrics,
        predictor: Predictor,
    ) -> None:
        self.name = bundle.manifest.name
        self.version = version
        self.manifest: Manifest = bundle.manifest
        self.metrics = metrics
        self.watch = DriftWatch(bundle) if compute.drift else None
        self._compute = compute
        self.predictor = predictor
        self.outputs = predictor.outputs
        self.max_rows = _most_rows(bundle.manifest, self.outputs, compute)
        self.users = 0
        self._unused = asyncio.Event()
        self._executor: ThreadPoolExecutor | None = None
        self._times = self._warm_up()

    def _warm_up(self) -> ForwardTimes:
        """Compute batches of all sizes that are likely, and choose where forwards run."""
        shape, most = self.manifest.input.shape, self.max_rows

        def times(threads: int) -> dict[int, float]:
            torch.set_num_threads(threads)
            measured: dict[int, float] = {}
            for rows in _sizes(most):
                samples = np.zeros((rows, *shape), np.float32)
                measured[rows] = min(_seconds(self.predictor, samples) for _ in range(3))
                if measured[rows] > _LONG_S:
                    return measured
            # The first forward of any size is slow, as its kernels are made then.
            end_s = time.perf_counter() + _WARM_UP_S
            for rows in range(1, most):
                if time.perf_counter() > end_s:
                    break
                self.predictor(np.zeros((rows, *shape), np.float32))
            return measured

        if self._compute.device.type == "cpu":
            measured = times(1)  # on the loader's thread, as the event loop's has one too
            if max(measured.values()) < _INLINE_S and most in measured:
                return ForwardTimes(measured)
        # A thread of its own: torch keeps a pool of threads for each that computes.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"model-{self.name}")
        return ForwardTimes(self._executor.submit(times, self._compute.threads).result())

    def start(self) -> None:
        """Begin to answer, on the running event loop."""
        sample_bytes = 4 * math.prod(self.manifest.input.shape)
        queue_rows = min(
            self._compute.max_queue_rows, self._compute.max_queue_bytes // sample_bytes
        )
        self.batcher = Batcher(
            self.predictor,
            self._times,
            executor=self._executor,
            max_rows=self.max_rows,
            max_queue_rows=max(queue_rows, min(self.max_rows, self._compute.max_queue_rows)),
            observer=self.metrics,
            computed=self._computed,
            name=self.name,
        )

    def _computed(self, samples: Array) -> None:
        if self.watch is not None:
            self.watch.observe(samples)

    def release(self) -> None:
        """Say that a request that was added to `users` is over."""
        self.users -= 1
        if not self.users:
            self._unused.set()

    async def drain(self) -> None:
        """Answer what is under way, for `timeout_s` at the most, and end."""
        deadline_s = asyncio.get_running_loop().time() + self._compute.timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                while self.users:
                    self._unused.clear()
                    await self._unused.wait()
        except TimeoutError:
            log.warning(
                "model %s version %s: requests are still under way", self.name, self.version
            )
        await self.batcher.close(deadline_s)
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        if self.watch is not None:
            self.watch.close()


def load_model(
    path: Path, version: str, compute: Compute, metrics: Metrics, *, allow_imports: bool
) -> ServedModel:
    """Return the model of a bundle, checked and warmed up.

    It is checked, in float32 on random samples that look like training's, that folding BN changed
    nothing, that a sample's answer does not depend on what else is in its batch, and, where it
    computes in bfloat16, that this is near enough.

    Args:
        path: of the bundle.
        version: under which it is served.
        compute: how and where it computes.
        metrics: what counts its requests.
        allow_imports: as for `syncbn.bundle.read_bundle`.

    Raises:
        BundleError: the bundle is not valid, a layer normalises by the statistics of the batch as
            it has no running ones, or one of the checks failed.
    """
    torch.set_num_threads(1)  # of this thread; torch would keep a pool for it otherwise
    bundle = read_bundle(path, allow_imports=allow_imports)
    _refuse_without_statistics(bundle.model, path)
    exact = replace(compute, dtype=torch.float32, compile=False)
    try:
        predictor = Predictor(bundle, exact)
        rows = _most_rows(bundle.manifest, predictor.outputs, exact)
        samples = random_samples(bundle.manifest, max(2, min(_CHECKED_ROWS, rows)))
        answers = _check(bundle, predictor, samples, path)
        if (compute.dtype, compute.compile) != (torch.float32, False):
            predictor = Predictor(bundle, compute)
            what = "values" if bundle.manifest.task == "tensor" else "probabilities"
            tolerance = _BATCH_TOLERANCE if compute.dtype == torch.float32 else _BFLOAT16_TOLERANCE
            _check_alike(
                predictor.whole(samples),
                answers,
                tolerance * _scale(bundle.manifest, answers),
                f"{path}: compiled or in {compute.dtype}, the {what} differ from those in "
                "float32; serve it without",
            )
        return ServedModel(
            bundle, version, compute, metrics.model(bundle.manifest.name, version), predictor
        )
    except (ConversionError, RuntimeError) as error:
        raise BundleError(f"{path}: the model cannot be served: {error}") from error


def _refuse_without_statistics(model: nn.Module, path: Path) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise BundleError(
                f"{path}: layer {name!r} has no running statistics, so that a sample's answer "
                "would depend on its batch; train it with track_running_stats=True"
            )


def _most_rows(manifest: Manifest, outputs: Outputs, compute: Compute) -> int:
    """Return how many samples a forward may have: as many as their values leave room for."""
    values = max(math.prod(spec.shape) for spec in outputs.specs)
    sample_bytes = 4 * (math.prod(manifest.input.shape) + values)
    return max(1, min(compute.max_batch_size, compute.max_batch_bytes // sample_bytes))


def _scale(manifest: Manifest, answers: Answer) -> float:
    """Return what tolerances are relative to: 1 for probabilities."""
    return _largest(answers) if manifest.task == "tensor" else 1.0


def _largest(values: Answer) -> float:
    """Return the largest magnitude among the finite values, or 1 if it is below that."""
    return float(np.abs(values).max(where=np.isfinite(values), initial=1.0))


def _check(bundle: Bundle, predictor: Predictor, samples: Array, path: Path) -> Answer:
    """Return the whole answers to raw samples, after checking the predictor with them."""
    raw = torch.from_numpy(samples)
    with torch.inference_mode():
        wanted = bundle.model(bundle.manifest.preprocessing.apply(raw))
    _check_alike(
        predictor.output(raw).cpu().numpy(),
        wanted.float().numpy(),
        _LOGITS_TOLERANCE * _largest(wanted.numpy()),
        f"{path}: folding batch normalization changes the model's answer",
    )
    together = predictor.whole(samples)
    alone = np.concatenate([predictor.whole(samples[at : at + 1]) for at in range(len(samples))])
    _check_alike(
        alone,
        together,
        _BATCH_TOLERANCE * _scale(bundle.manifest, together),
        f"{path}: an answer depends on what else is in its batch",
    )
    return together


def _check_alike(values: Answer, wanted: Answer, tolerance: float, message: str) -> None:
    if values.shape != wanted.shape:
        raise BundleError(f"{message}: its shape is {values.shape}, and not {wanted.shape}")
    if not np.allclose(values, wanted, rtol=0, atol=tolerance, equal_nan=True):
        with np.errstate(invalid="ignore"):  # of infinities in the same places
            difference = np.abs(values - wanted).max()
        raise BundleError(f"{message}: the difference is {difference:.3g}, of {tolerance:.3g}")


def random_samples(manifest: Manifest, rows: int) -> Array:
    """Return raw samples that preprocessing makes standard normal."""
    spec, preprocessing = manifest.input, manifest.preprocessing
    normal = np.random.default_rng(0).standard_normal((rows, *spec.shape))
    shape = (-1, *[1] * (len(spec.shape) - 1))
    mean, std = (np.reshape(each, shape) for each in (preprocessing.mean, preprocessing.std))
    scale = preprocessing.scale or 1.0
    with np.errstate(over="ignore"):
        return ((normal * std + mean) / scale).astype(np.float32)


def _sizes(most: int) -> list[int]:
    """Return the powers of two below a number, and the number."""
    return [*(1 << bits for bits in range(most.bit_length()) if 1 << bits < most), most]


def _seconds(predictor: Predictor, samples: Array) -> float:
    start_s = time.perf_counter()
    predictor(samples)
    return time.perf_counter() - start_s
