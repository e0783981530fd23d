"""Models and their answers in the words of the API's bodies."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from service.metrics import Statistics
from service.models.drift import DriftReport
from service.models.model import ServedModel
from service.models.outputs import Answer
from service.models.pictures import MOST_CLASSES, mask_picture, palette_of
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
    Segmentation,
    Segmentations,
    TensorMetadata,
    TensorPrediction,
    TensorPredictions,
)


def metadata_of(model: ServedModel, versions: list[str]) -> ModelMetadata:
    """Return what a model takes and gives, and from its manifest what a person wants to know."""
    manifest = model.manifest
    spec = manifest.input
    parameters: dict[str, Any] = {
        "architecture": manifest.architecture.name,
        "classes": list(manifest.classes),
        "metrics": manifest.metrics,
    }
    if manifest.task != "classification":
        parameters["task"] = manifest.task
    if manifest.task == "segmentation":
        parameters["palette"] = [list(color) for color in palette_of(manifest)]
    if manifest.evaluations:
        parameters["evaluations"] = [each.model_dump() for each in manifest.evaluations]
    return ModelMetadata(
        name=model.name,
        versions=versions,
        platform="syncbn_bundle",
        inputs=[TensorMetadata(name=spec.name, datatype="FP32", shape=[-1, *spec.shape])],
        outputs=[
            TensorMetadata(name=output.name, datatype=output.datatype, shape=[-1, *output.shape])
            for output in model.outputs.specs
        ],
        parameters=parameters,
    )


def config_of(model: ServedModel, max_request_rows: int) -> ModelConfig:
    """Return a model's configuration, in Triton's words."""
    spec = model.manifest.input
    return ModelConfig(
        name=model.name,
        platform="syncbn_bundle",
        backend="syncbn",
        max_batch_size=max_request_rows,
        input=[InputConfig(name=spec.name, data_type="TYPE_FP32", dims=list(spec.shape))],
        output=[
            OutputConfig(
                name=output.name,
                data_type="TYPE_STRING"
                if output.datatype == "BYTES"
                else f"TYPE_{output.datatype}",
                dims=list(output.shape) or [1],
            )
            for output in model.outputs.specs
        ],
    )


def statistics_of(name: str, version: str, seen: Statistics) -> ModelStatistics:
    """Return how often a model was asked, and how long it took."""
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


def drift_of(model: ServedModel, report: DriftReport) -> ModelDrift:
    """Return how far a model's inputs are from what it was trained with."""
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


def predictions_of(
    model: ServedModel, answers: Answer, *, with_mask: bool
) -> Sequence[Prediction | Segmentation | TensorPrediction]:
    """Return what a model makes of some images.

    Args:
        model: that was asked.
        answers: the compact array of its outputs, one image a row.
        with_mask: whether a segmentation comes with its mask as a picture.
    """
    classes = model.manifest.classes
    if model.manifest.task == "classification":
        return [
            Prediction(
                label=classes[max(range(len(classes)), key=row.__getitem__)],
                probability=max(row),
                probabilities=dict(zip(classes, row, strict=True)),
            )
            for row in answers.tolist()
        ]
    if model.manifest.task == "segmentation":
        return [_segmentation(model, mask, with_mask=with_mask) for mask in answers]
    return [
        TensorPrediction(shape=list(values.shape), output=values.ravel().tolist())
        for values in answers
    ]


def _segmentation(model: ServedModel, mask: Answer, *, with_mask: bool) -> Segmentation:
    classes = model.manifest.classes
    counts = np.bincount(mask.ravel(), minlength=len(classes)).tolist()
    picture: str | None = None
    if with_mask and len(classes) <= MOST_CLASSES:
        png = mask_picture(mask, palette_of(model.manifest))
        picture = base64.b64encode(png).decode()
    height, width = mask.shape
    return Segmentation(
        shares={name: count / mask.size for name, count in zip(classes, counts, strict=True)},
        height=height,
        width=width,
        mask=picture,
    )


def answer_of(
    model: ServedModel, predictions: list[Any]
) -> Predictions | Segmentations | TensorPredictions:
    """Return the body that answers a request with images."""
    body: type[Predictions | Segmentations | TensorPredictions] = {
        "classification": Predictions,
        "segmentation": Segmentations,
        "tensor": TensorPredictions,
    }[model.manifest.task]
    return body(model_name=model.name, model_version=model.version, predictions=predictions)
