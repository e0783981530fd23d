"""The JSON bodies of the protocol's smaller requests and answers, and of our own.

Inference is in `service/models/tensors.py`, as it is read and written a thousand times as often.
Unknown keys are ignored, as clients add their own.
Source: https://github.com/kserve/open-inference-protocol, inference_rest.yaml, and Triton's
protocol extensions of model configuration, statistics and model repository.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Body(BaseModel):
    # The protocol's own `model_name` starts with what pydantic reserves.
    model_config = ConfigDict(protected_namespaces=())


class TensorMetadata(_Body):
    """What a model takes or gives; -1 is the number of samples."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Body):
    """The answer of /v2/models/{name}."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any]


class ModelList(_Body):
    """The answer of /v2/models, which the protocol does not have."""

    models: list[ModelMetadata]


class ModelReady(_Body):
    """The answer of /v2/models/{name}/ready."""

    name: str
    ready: bool


class InputConfig(_Body):
    """An input in Triton's words; the number of samples is not one of its dimensions."""

    name: str
    data_type: str
    dims: list[int]


class OutputConfig(InputConfig):
    """An output in Triton's words."""


class ModelConfig(_Body):
    """The answer of /v2/models/{name}/config."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[InputConfig]
    output: list[OutputConfig]


class Durations(_Body):
    """How often something was done, and the nanoseconds that it took in all."""

    count: int
    ns: int


class InferenceStatistics(_Body):
    """What became of a model's requests; the durations are of queue and forwards."""

    success: Durations
    fail: Durations
    queue: Durations
    compute_input: Durations
    compute_infer: Durations
    compute_output: Durations


class ModelStatistics(_Body):
    """How much a model was used since the service started."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    batch_stats: list[dict[str, Any]]


class StatisticsList(_Body):
    """The answer of /v2/models/{name}/stats."""

    model_stats: list[ModelStatistics]


class InputDistance(_Body):
    """How far the inputs are from training's, in standard deviations; null: too few so far."""

    distance: float | None
    channels: list[float] | None


class LayerDistance(_Body):
    """How far the inputs of a batch normalization are from its running statistics."""

    name: str
    distance: float | None
    batches: int


class ModelDrift(_Body):
    """The answer of /v2/models/{name}/drift."""

    model_name: str
    model_version: str
    samples: int
    input: InputDistance
    layers: list[LayerDistance]


class Prediction(_Body):
    """What a model makes of one image."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Segmentation(_Body):
    """What a segmentation makes of one image, as large as the model's input.

    `shares` are those of all pixels, by class. `mask` is a PNG file in Base64 whose pixels are the
    indices of classes; null unless it was asked for, or if there are more than 256 classes.
    """

    shares: dict[str, float]
    height: int
    width: int
    mask: str | None


class TensorPrediction(_Body):
    """What a model that answers a tensor makes of one image; flat, in row-major order."""

    shape: list[int]
    output: list[float]


class Predictions(_Body):
    """The answer of /predict/{name}: one prediction a file, in their order."""

    model_name: str
    model_version: str
    predictions: list[Prediction]


class Segmentations(_Body):
    """The answer of /predict/{name} of a segmentation: one a file, in their order."""

    model_name: str
    model_version: str
    predictions: list[Segmentation]


class TensorPredictions(_Body):
    """The answer of /predict/{name} of a model that answers a tensor: one a file."""

    model_name: str
    model_version: str
    predictions: list[TensorPrediction]


class ServerMetadata(_Body):
    """The answer of /v2."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(_Body):
    """The answer of /v2/health/live."""

    live: bool


class ServerReady(_Body):
    """The answer of /v2/health/ready."""

    ready: bool


class ErrorBody(_Body):
    """The answer to whatever failed."""

    error: str
