"""The data plane: from a request's bytes to a model's answer; no HTTP in it."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from service import tensors
from service.errors import InvalidRequestError, ModelNotFoundError, ServiceError
from service.images import read_image
from service.metrics import Metrics
from service.model import ServedModel
from service.registry import Registry
from service.schemas import (
    Durations,
    InferenceStatistics,
    InputConfig,
    InputDistance,
    LayerDistance,
    ModelConfig,
    ModelDrift,
    ModelMetadata,
    ModelStatistics,
    OutputConfig,
    Prediction,
    Predictions,
    StatisticsList,
    TensorMetadata,
)
from service.tensors import Array

IsGone = Callable[[], bool]
_MAX_TIMEOUT_US = 86_400_000_000


class DataPlane:
    """Answers requests about models and for their predictions.

    Args:
        registry: the models.
        metrics: of them.
        timeout_s: longest wait for one answer, queueing included.
        max_batch_size: most samples of one forward.
        max_request_rows: most samples in one request.
        max_image_pixels: of an image that is decoded.
    """

    def __init__(
        self,
        registry: Registry[ServedModel],
        metrics: Metrics,
        *,
        timeout_s: float,
        max_batch_size: int,
        max_request_rows: int,
        max_image_pixels: int,
    ) -> None:
        self.registry = registry
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._max_batch_size = max_batch_size
        self._max_request_rows = max_request_rows
        self._max_image_pixels = max_image_pixels

    async def infer(
        self, name: str, version: str | None, body: bytes, json_bytes: int | None, is_gone: IsGone
    ) -> tuple[bytes, int | None]:
        """Return the answer to an inference request, and how long its JSON is if it is binary.

        Args:
            name: of the model.
            version: None: its newest.
            body: the request's, as `service.tensors.read_request` takes it.
            json_bytes: likewise.
            is_gone: whether nobody waits for the answer any more.

        Raises:
            ModelNotFoundError: there is no such model.
            InvalidRequestError: the request is not of the protocol, its tensors do not fit the
                model, or the model's answer to them is not finite.
            ServiceError: as `Batcher.predict`.
        """
        start_s = asyncio.get_running_loop().time()
        model = self.registry.get(name, version)
        spec = model.manifest.input
        with _Counted(model) as count:
            request, binary = tensors.read_request(body, json_bytes, spec)
            samples = tensors.read_samples(request, binary, spec, self._max_request_rows)
            deadline_s = start_s + self._timeout_of(request)
            probabilities = await self._predict(model, samples, deadline_s, is_gone)
            answer = tensors.write_response(
                request, (model.name, model.version), probabilities, model.manifest.classes
            )
            count.answered = len(samples)
            return answer

    async def classify(
        self,
        name: str,
        version: str | None,
        files: Sequence[tuple[str, bytes]],
        is_gone: IsGone,
    ) -> Predictions:
        """Return the classes of image files.

        Args:
            name: of the model.
            version: None: its newest.
            files: the name and content of each.
            is_gone: whether nobody waits for the answer any more.

        Raises:
            ModelNotFoundError: there is no such model.
            InvalidRequestError: there is no file or there are too many, one of them is no image,
                or the model takes no images.
            ServiceError: as `Batcher.predict`.
        """
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        model = self.registry.get(name, version)
        with _Counted(model) as count:
            if not 0 < len(files) <= self._max_request_rows:
                raise InvalidRequestError(
                    f"{len(files)} image files in one request; send 1 to {self._max_request_rows}"
                )
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
            probabilities = await self._predict(model, samples, deadline_s, is_gone)
            count.answered = len(samples)
        classes = model.manifest.classes
        return Predictions(
            model_name=model.name,
            model_version=model.version,
            predictions=[
                Prediction(
                    label=classes[max(range(len(classes)), key=row.__getitem__)],
                    probability=max(row),
                    probabilities=dict(zip(classes, row, strict=True)),
                )
                for row in probabilities.tolist()
            ],
        )

    async def _predict(
        self, model: ServedModel, samples: Array, deadline_s: float, is_gone: IsGone
    ) -> Array:
        most = self._max_batch_size
        if len(samples) <= most:
            probabilities = await model.batcher.predict(samples, deadline_s, is_gone)
        else:
            # One part after the other, so that others' requests go between them.
            probabilities = np.concatenate(
                [
                    await model.batcher.predict(samples[at : at + most], deadline_s, is_gone)
                    for at in range(0, len(samples), most)
                ]
            )
        if not tensors.all_finite(probabilities):
            raise InvalidRequestError(
                f"model {model.name!r} overflowed on this input; are its values in the usual range?"
            )
        return probabilities

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
        manifest = self.registry.get(name, version).manifest
        spec = manifest.input
        return ModelMetadata(
            name=name,
            versions=self.registry.versions_of(name),
            platform="syncbn_bundle",
            inputs=[TensorMetadata(name=spec.name, datatype="FP32", shape=[-1, *spec.shape])],
            outputs=[
                TensorMetadata(
                    name=tensors.PROBABILITIES, datatype="FP32", shape=[-1, len(manifest.classes)]
                ),
                TensorMetadata(name=tensors.LABEL, datatype="BYTES", shape=[-1]),
            ],
            parameters={
                "architecture": manifest.architecture.name,
                "classes": list(manifest.classes),
                "metrics": manifest.metrics,
            },
        )

    def config(self, name: str, version: str | None = None) -> ModelConfig:
        """Return a model's configuration, in Triton's words.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        manifest = self.registry.get(name, version).manifest
        return ModelConfig(
            name=name,
            platform="syncbn_bundle",
            backend="syncbn",
            max_batch_size=self._max_request_rows,
            input=[
                InputConfig(
                    name=manifest.input.name, data_type="TYPE_FP32", dims=list(manifest.input.shape)
                )
            ],
            output=[
                OutputConfig(
                    name=tensors.PROBABILITIES,
                    data_type="TYPE_FP32",
                    dims=[len(manifest.classes)],
                ),
                OutputConfig(name=tensors.LABEL, data_type="TYPE_STRING", dims=[1]),
            ],
        )

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
                self._statistics_of(each, number)
                for each in ([name] if name is not None else self.registry.names())
                for number in ([version] if version else self.registry.versions_of(each))
            ]
        )

    def _statistics_of(self, name: str, version: str) -> ModelStatistics:
        seen = self._metrics.statistics(name, version)
        answered = seen.requests.get("ok", 0)
        refused = sum(seen.requests.values()) - answered
        nothing = Durations(count=0, ns=0)
        queue = Durations(count=seen.queue_count, ns=round(seen.queue_seconds * 1e9))
        forward = Durations(count=seen.batches, ns=round(seen.forward_seconds * 1e9))
        return ModelStatistics(
            name=name,
            version=version,
            last_inference=0,
            inference_count=seen.rows,
            execution_count=seen.batches,
            inference_stats=InferenceStatistics(
                success=Durations(count=answered, ns=queue.ns + forward.ns),
                fail=Durations(count=refused, ns=0),
                queue=queue,
                compute_input=nothing,
                compute_infer=forward,
                compute_output=nothing,
            ),
            batch_stats=[],
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
        report = model.watch.report()
        return ModelDrift(
            model_name=model.name,
            model_version=model.version,
            samples=report.samples,
            input=InputDistance(
                distance=report.input_distance,
                channels=None if report.channels is None else list(report.channels),
            ),
            layers=[
                LayerDistance(name=layer.name, distance=layer.distance, batches=layer.batches)
                for layer in report.layers
            ],
        )

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
