"""What is counted and timed, for Prometheus; of several workers together.

Where PROMETHEUS_MULTIPROC_DIR is set before this module is imported, all processes that name the
same directory are one service, and each of them tells what all have counted.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
_ROWS = tuple(1 << bits for bits in range(11))
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_OF_MODEL = ("model", "version")


@dataclass(frozen=True)
class Statistics:
    """What a model's requests came to, over all workers.

    Attributes:
        requests: how many, by outcome.
        rows: samples that were answered.
        batches: forwards.
        forward_seconds: that they took.
        queue_count: requests that left the queue.
        queue_seconds: that they waited.
    """

    requests: Mapping[str, int]
    rows: int
    batches: int
    forward_seconds: float
    queue_count: int
    queue_seconds: float


class Metrics:
    """All metrics of one service."""

    def __init__(self) -> None:
        disable_created_metrics()  # several workers do not have them, and nobody asks for them
        registry = CollectorRegistry()
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._of_http: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._http_requests = Counter(
            "syncbn_http_requests",
            "Requests, by what answered them",
            ("route", "method", "status"),
            registry=registry,
        )
        self._http_seconds = Histogram(
            "syncbn_http_request_seconds",
            "Seconds from a request's head to the end of its answer",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.requests = Counter(
            "syncbn_model_requests",
            "Requests for predictions, by what became of them",
            (*_OF_MODEL, "outcome"),
            registry=registry,
        )
        self.rows = Counter(
            "syncbn_model_rows", "Samples that were answered", _OF_MODEL, registry=registry
        )
        self.queue_rows = Gauge(
            "syncbn_queue_rows",
            "Samples that wait now",
            _OF_MODEL,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.queue_seconds = Histogram(
            "syncbn_queue_seconds",
            "Seconds that a request waited for its batch",
            _OF_MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "syncbn_batch_rows", "Samples in a batch", _OF_MODEL, buckets=_ROWS, registry=registry
        )
        self.forward_seconds = Histogram(
            "syncbn_forward_seconds",
            "Seconds that a batch took",
            _OF_MODEL,
            buckets=_SECONDS,
            registry=registry,
        )
        self.input_drift = Gauge(
            "syncbn_input_drift",
            "Distance of the inputs from training's, in standard deviations",
            _OF_MODEL,
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self.layer_drift = Gauge(
            "syncbn_layer_drift",
            "Distance of a layer's batch statistics from its running statistics, in standard "
            "deviations",
            (*_OF_MODEL, "layer"),
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._loaded = Gauge(
            "syncbn_model_loaded",
            "1 where a model is served",
            _OF_MODEL,
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._loads = Counter(
            "syncbn_model_loads",
            "Attempts to load a model",
            ("model", "outcome"),
            registry=registry,
        )
        self._jobs = _of_jobs("syncbn_jobs", "Training jobs, by state", "state", registry)
        self._job_cores = _of_jobs(
            "syncbn_jobs_cores", "Cores that the dispatcher gives to jobs", "use", registry
        )
        self._job_parts = _of_jobs(
            "syncbn_jobs_up",
            "1 where the store can be read, and where a dispatcher runs",
            "part",
            registry,
        )
        self._collected = registry
        directory = os.environ.get(_DIRECTORY)
        self.is_shared = directory is not None
        if directory is not None:
            _forget_the_dead(Path(directory))
            self._collected = CollectorRegistry()
            MultiProcessCollector(self._collected, directory)
        else:
            for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
                registry.register(collector)

    def http_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: the path as it was declared, of which there are few.
            method: of HTTP.
            status: of the answer.
            seconds: that it took.
        """
        key = (route, method, status)
        if key not in self._of_http:
            known = method if method in _METHODS else "OTHER"
            self._of_http[key] = (
                self._http_requests.labels(route, known, str(status)),
                self._http_seconds.labels(route),
            )
            if known != method:  # what clients make up is not remembered
                counter, histogram = self._of_http.pop(key)
                counter.inc()
                histogram.observe(seconds)
                return
        counter, histogram = self._of_http[key]
        counter.inc()
        histogram.observe(seconds)

    def model(self, name: str, version: str) -> "ModelMetrics":
        """Return what counts for one version of a model; always the same for the same."""
        key = (name, version)
        if key not in self._models:
            self._models[key] = ModelMetrics(self, name, version)
        return self._models[key]

    def model_loaded(self, name: str, version: str, loaded: bool) -> None:
        """Note that a model is served from now on, or is not any more."""
        self._loaded.labels(name, version).set(int(loaded))
        if not loaded:
            self.model(name, version).forget()

    def load_finished(self, name: str, ok: bool) -> None:
        """Count an attempt to load a model."""
        self._loads.labels(name, "ok" if ok else "failed").inc()

    def jobs(
        self, counts: Mapping[str, int], cores: Mapping[str, int], parts: Mapping[str, bool]
    ) -> None:
        """Note what the store of training jobs says.

        Args:
            counts: of jobs, by all states.
            cores: how many the dispatcher has, by use: free and busy.
            parts: whether the store can be read and a dispatcher runs.
        """
        for gauge, values in (
            (self._jobs, counts),
            (self._job_cores, cores),
            (self._job_parts, parts),
        ):
            for label, value in values.items():
                gauge.labels(label).set(value)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the form that a header Accept asks for, and its content type."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is none
            encode, content_type = choose_encoder("")
        return encode(self._collected), content_type

    def statistics(self, name: str, version: str) -> Statistics:
        """Return what the requests for one version of a model came to, over all workers."""
        requests: dict[str, int] = {}
        values: dict[str, float] = {}
        for metric in self._collected.collect():
            for sample in metric.samples:
                labels = sample.labels
                if (labels.get("model"), labels.get("version")) != (name, version):
                    continue
                if sample.name == "syncbn_model_requests_total":
                    requests[labels["outcome"]] = int(sample.value)
                elif "le" not in labels:
                    values[sample.name] = sample.value
        return Statistics(
            requests=requests,
            rows=int(values.get("syncbn_model_rows_total", 0)),
            batches=int(values.get("syncbn_forward_seconds_count", 0)),
            forward_seconds=values.get("syncbn_forward_seconds_sum", 0.0),
            queue_count=int(values.get("syncbn_queue_seconds_count", 0)),
            queue_seconds=values.get("syncbn_queue_seconds_sum", 0.0),
        )


class ModelMetrics:
    """What counts for one version of a model; what its batcher tells of is the observer's part."""

    def __init__(self, metrics: Metrics, name: str, version: str) -> None:
        self._metrics = metrics
        self._labels = labels = (name, version)
        self._drift: dict[str | None, Gauge] = {}  # by layer; None: of the inputs
        self._outcomes: dict[str, Counter] = {}
        self._rows = metrics.rows.labels(*labels)
        self._queue_rows = metrics.queue_rows.labels(*labels)
        self._queue_seconds = metrics.queue_seconds.labels(*labels)
        self._batch_rows = metrics.batch_rows.labels(*labels)
        self._forward_seconds = metrics.forward_seconds.labels(*labels)

    def requests(self, outcome: str, rows: int = 0) -> None:
        """Count a request.

        Args:
            outcome: what became of it: ok, refused, full, expired, cancelled or failed.
            rows: samples that were answered.
        """
        counter = self._outcomes.get(outcome)
        if counter is None:
            counter = self._outcomes[outcome] = self._metrics.requests.labels(
                *self._labels, outcome
            )
        counter.inc()
        if rows:
            self._rows.inc(rows)

    def queue_changed(self, rows: int) -> None:
        """Note how many rows wait now."""
        self._queue_rows.set(rows)

    def batch_started(self, waited_s: Sequence[float], rows: int) -> None:
        """Count a batch, and how long its requests waited."""
        self._batch_rows.observe(rows)
        observe = self._queue_seconds.observe
        for seconds in waited_s:
            observe(seconds)

    def batch_finished(self, forward_s: float) -> None:
        """Count a forward."""
        self._forward_seconds.observe(forward_s)

    def drift(self, input_distance: float | None, layers: Mapping[str, float | None]) -> None:
        """Note how far the inputs, and those of each layer, are from training's; None: unknown."""
        if input_distance is not None:
            gauge = self._metrics.input_drift.labels(*self._labels)
            gauge.set(input_distance)
            self._drift[None] = gauge
        for layer, distance in layers.items():
            if distance is not None:
                gauge = self._metrics.layer_drift.labels(*self._labels, layer)
                gauge.set(distance)
                self._drift[layer] = gauge

    def forget(self) -> None:
        """Take back what holds only while the model is served."""
        self._queue_rows.set(0)
        drift, self._drift = self._drift, {}
        for layer, gauge in list(drift.items()):
            if self._metrics.is_shared:
                gauge.set(0)  # as single series cannot be taken back
            elif layer is None:
                self._metrics.input_drift.remove(*self._labels)
            else:
                self._metrics.layer_drift.remove(*self._labels, layer)


def _of_jobs(name: str, what: str, label: str, registry: CollectorRegistry) -> Gauge:
    # Each worker says the same, of the one store.
    return Gauge(name, what, (label,), registry=registry, multiprocess_mode="livemostrecent")


def _forget_the_dead(directory: Path) -> None:
    """Take back what processes that have ended said of the present."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with suppress(FileNotFoundError):  # another worker, started as well, was faster
                mark_process_dead(pid, str(directory))
        except PermissionError:
            pass
