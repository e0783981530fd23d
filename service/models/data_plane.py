"""The data plane: from a request's bytes to a model's answer; no HTTP in it."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from service.errors import InvalidRequestError, ModelNotFoundError, ServiceError
from service.metrics import Metrics
from service.models import tensors
from service.models.describe import (
    answer_of,
    config_of,
    drift_of,
    metadata_of,
    predictions_of,
    statistics_of,
)
from service.models.images import read_image
from service.models.model import ServedModel
from service.models.outputs import Answer, Outputs
from service.models.pictures import mask_picture, palette_of
from service.models.registry import Registry
from service.models.tensors import Array
from service.schemas import (
    ModelConfig,
    ModelDrift,
    ModelMetadata,
    Predictions,
    Segmentations,
    StatisticsList,
    TensorPredictions,
)

IsGone = Callable[[], bool]
_LARGE_BYTES = 1 << 20  # an answer above takes a thread, as others wait for the event loop
_MAX_TIMEOUT_US = 86_400_000_000


class DataPlane:
    """Answers requests about models and for their predictions.

    Args:
        registry: the models.
        metrics: of them.
        timeout_s: longest wait for one answer, queueing included.
        max_request_rows: most samples in one request.
        max_answer_bytes: of the tensors that one request is answered with.
        max_image_pixels: of an image that is decoded.
    """

    def __init__(
        self,
        registry: Registry[ServedModel],
        metrics: Metrics,
        *,
        timeout_s: float,
        max_request_rows: int,
        max_answer_bytes: int,
        max_image_pixels: int,
    ) -> None:
        self.registry = registry
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._max_request_rows = max_request_rows
        self._max_answer_bytes = max_answer_bytes
        self._max_image_pixels = max_image_pixels

    async def infer(
        self, name: str, version: str | None, body: bytes, json_bytes: int | None, is_gone: IsGone
    ) -> tuple[bytes, int | None]:
        """Return the answer to an inference request, and how long its JSON is if it is binary.

        Args:
            name: of the model.
            version: None: its newest.
            body: the request's, as `service.models.tensors.read_request` takes it.
            json_bytes: likewise.
            is_gone: whether nobody waits for the answer any more.

        Raises:
            ModelNotFoundError: there is no such model.
            InvalidRequestError: the request is not of the protocol, its tensors do not fit the
                model, or the model's answer to them is not finite or too large.
            ServiceError: as `Batcher.predict`.
        """
        start_s = asyncio.get_running_loop().time()
        model = self.registry.get(name, version)
        spec = model.manifest.input
        with _Counted(model) as count:
            request, binary = tensors.read_request(body, json_bytes, spec)
            samples = tensors.read_samples(request, binary, spec, self._max_request_rows)
            deadline_s = start_s + self._timeout_of(request)
            outputs = model.outputs
            size_bytes = self._answer_bytes(outputs, request, len(samples))
            whole = outputs.needs_whole(output.name for output in request.outputs or ())
            values = await self._predict(model, samples, deadline_s, is_gone, whole=whole)
            write = partial(
                tensors.write_response,
                request,
                (model.name, model.version),
                values,
                model.manifest.classes,
                outputs.make,
                outputs.default,
            )
            answer = write() if size_bytes < _LARGE_BYTES else await asyncio.to_thread(write)
            count.answered = len(samples)
            return answer

    def _answer_bytes(self, outputs: Outputs, request: tensors.InferenceRequest, rows: int) -> int:
        """Return about how large an answer will be, after refusing what is too large."""
        wanted = request.outputs or [tensors.RequestedOutput(name) for name in outputs.default]
        size_bytes = 0
        for output in wanted:
            binary = tensors.is_binary(request, output)
            size_bytes += outputs.size_bytes(output.name, rows, binary=binary)
        if size_bytes > self._max_answer_bytes:
            raise InvalidRequestError(
                f"the answer to {rows} samples would have about {size_bytes} bytes, of at most "
                f"{self._max_answer_bytes}; send fewer, ask for fewer outputs, or take them in "
                "binary"
            )
        return size_bytes

    async def recognize(
        self,
        name: str,
        version: str | None,
        files: Sequence[tuple[str, bytes]],
        is_gone: IsGone,
        *,
        with_mask: bool = False,
    ) -> Predictions | Segmentations | TensorPredictions:
        """Return what a model makes of image files: classes, shares of classes, or its tensor.

        They are decoded, computed and described a batch at a time, so that their number does not
        decide how much memory they take.

        Args:
            name: of the model.
            version: None: its newest.
            files: the name and content of each.
            is_gone: whether nobody waits for the answer any more.
            with_mask: whether a segmentation comes with its mask as a picture.

        Raises:
            ModelNotFoundError: there is no such model.
            InvalidRequestError: there is no file or there are too many, one of them is no image,
                or the model takes no images, or its answer is not finite or too large.
            ServiceError: as `Batcher.predict`.
        """
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        model = self.registry.get(name, version)
        with _Counted(model) as count:
            if not 0 < len(files) <= self._max_request_rows:
                raise InvalidRequestError(
                    f"{len(files)} image files in one request; send 1 to {self._max_request_rows}"
                )
            task = model.manifest.task
            if task == "tensor" or (task == "segmentation" and with_mask):
                # The file of a mask is hardly larger than the mask in binary.
                parameters = {"binary_data_output": task == "segmentation"}
                request = tensors.InferenceRequest([], parameters=parameters)
                self._answer_bytes(model.outputs, request, len(files))
            predictions: list[Any] = []
            for first in range(0, len(files), model.max_rows):
                part = files[first : first + model.max_rows]
                answers = await self._look_at(model, part, deadline_s, is_gone)
                describe = partial(predictions_of, model, answers, with_mask=with_mask)
                small = model.manifest.task == "classification"
                predictions += describe() if small else await asyncio.to_thread(describe)
            count.answered = len(files)
        return answer_of(model, predictions)

    async def paint(
        self, name: str, version: str | None, file: tuple[str, bytes], is_gone: IsGone
    ) -> bytes:
        """Return the mask of an image file as a PNG file whose palette is that of the classes.

        Args:
            name: of the model, a segmentation.
            version: None: its newest.
            file: its name and content.
            is_gone: whether nobody waits for the answer any more.

        Raises:
            ModelNotFoundError: there is no such model.
            InvalidRequestError: the file is no image, or the model's answer is not finite or has
                more classes than a palette.
            ServiceError: as `Batcher.predict`.
        """
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        model = self.registry.get(name, version)
        with _Counted(model) as count:
            answers = await self._look_at(model, [file], deadline_s, is_gone)
            palette = palette_of(model.manifest)
            picture = await asyncio.to_thread(mask_picture, answers[0], palette)
            count.answered = 1
        return picture

    async def _look_at(
        self,
        model: ServedModel,
        files: Sequence[tuple[str, bytes]],
        deadline_s: float,
        is_gone: IsGone,
    ) -> Answer:
        """Return a model's compact answers to image files, one a row."""
        samples = np.stack(
            [
                await asyncio.to_thread(
                    read_image,
                    content,
                    model.manifest,
                    max_pixels=self._max_image_pixels,
                    name=file_name,
                )
                for file_name, content in files
            ]
        )
        return await self._predict(model, samples, deadline_s, is_gone)

    async def _predict(
        self,
        model: ServedModel,
        samples: Array,
        deadline_s: float,
        is_gone: IsGone,
        *,
        whole: bool = False,
    ) -> Answer:
        compute = model.predictor.whole if whole else None
        most = model.max_rows
        if len(samples) <= most:
            answers = await model.batcher.predict(samples, deadline_s, is_gone, compute)
        else:
            # One part after the other, so that others' requests go between them.
            answers = np.concatenate(
                [
                    await model.batcher.predict(
                        samples[at : at + most], deadline_s, is_gone, compute
                    )
                    for at in range(0, len(samples), most)
                ]
            )
        if not model.outputs.is_finite(answers):
            raise InvalidRequestError(
                f"model {model.name!r} overflowed on this input; are its values in the usual range?"
            )
        return answers

    def _timeout_of(self, request: tensors.InferenceRequest) -> float:
        """Return the seconds that a request may take: what it says, but not more than ours."""
        timeout_us = (request.parameters or {}).get("timeout")
        if timeout_us is None:
            return self._timeout_s
        if type(timeout_us) is not int or not 0 < timeout_us <= _MAX_TIMEOUT_US:
            raise InvalidRequestError(
                f"the parameter timeout must be a number of microseconds, got {timeout_us!r}"
            )
        return min(timeout_us * 1e-6, self._timeout_s)

    def metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """Return what a model takes and gives, and from its manifest what a person wants to know.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        return metadata_of(self.registry.get(name, version), self.registry.versions_of(name))

    def config(self, name: str, version: str | None = None) -> ModelConfig:
        """Return a model's configuration, in Triton's words.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        return config_of(self.registry.get(name, version), self._max_request_rows)

    def statistics(self, name: str | None = None, version: str | None = None) -> StatisticsList:
        """Return how often models were asked and how long it took, over all workers.

        Args:
            name: of a model; None: all of them.
            version: None: all that are served.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        if name is not None:
            self.registry.get(name, version)
        return StatisticsList(
            model_stats=[
                statistics_of(each, number, self._metrics.statistics(each, number))
                for each in ([name] if name is not None else self.registry.names())
                for number in ([version] if version else self.registry.versions_of(each))
            ]
        )

    def drift(self, name: str, version: str | None = None) -> ModelDrift:
        """Return how far a model's inputs are from what it was trained with, as this worker saw.

        Raises:
            ModelNotFoundError: there is no such model, or drift is not watched.
        """
        model = self.registry.get(name, version)
        if model.watch is None:
            raise ModelNotFoundError(
                "drift is not watched: the service was started with --no-drift"
            )
        return drift_of(model, model.watch.report())

    def measure_drift(self) -> None:
        """Bring the metrics of drift up to date, as this worker saw it."""
        for name in self.registry.names():
            for version in self.registry.versions_of(name):
                model = self.registry.get(name, version)
                if model.watch is not None:
                    report = model.watch.report()
                    distances = {layer.name: layer.distance for layer in report.layers}
                    model.metrics.drift(report.input_distance, distances)


class _Counted:
    """Keeps a model alive for a request, and counts what became of it.

    Attributes:
        answered: its samples, once there is an answer.
    """

    __slots__ = ("_model", "answered")

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.answered = 0

    def __enter__(self) -> "_Counted":
        self._model.users += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            outcome = "ok"
        elif isinstance(error, ServiceError):
            outcome = error.outcome
        else:
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
        self._model.metrics.requests(outcome, self.answered)
        self._model.release()
