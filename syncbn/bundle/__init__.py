"""Bundles: a trained model as safetensors and JSON, written atomically and verified when read.

docs/bundle.md is the specification.
"""

from syncbn.bundle.files import (
    WEIGHTS_FILE,
    Bundle,
    check_exportable,
    is_bundle,
    read_bundle,
    read_manifest,
    write_bundle,
)
from syncbn.bundle.manifest import (
    MANIFEST_FILE,
    MANIFEST_LIMIT_BYTES,
    Architecture,
    Description,
    Estimate,
    Evaluation,
    InputSpec,
    Manifest,
    Preprocessing,
    Task,
    Versions,
    Weights,
)

__all__ = [
    "MANIFEST_FILE",
    "MANIFEST_LIMIT_BYTES",
    "WEIGHTS_FILE",
    "Architecture",
    "Bundle",
    "Description",
    "Estimate",
    "Evaluation",
    "InputSpec",
    "Manifest",
    "Preprocessing",
    "Task",
    "Versions",
    "Weights",
    "check_exportable",
    "is_bundle",
    "read_bundle",
    "read_manifest",
    "write_bundle",
]
