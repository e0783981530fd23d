"""Descriptions of small models, for bundles."""

import json
from pathlib import Path
from typing import Any

from syncbn.bundle import Architecture, Description, InputSpec, Preprocessing

ARGUMENTS: dict[str, int | float | bool | str] = {"in_channels": 2, "num_classes": 3, "width": 4}


def describe(**changes: Any) -> Description:
    """Return the description of a small cnn for images (2, 8, 8), with some fields changed."""
    values: dict[str, Any] = {
        "name": "small",
        "architecture": Architecture(name="cnn", arguments=ARGUMENTS),
        "input": InputSpec(name="image", shape=(2, 8, 8), dtype="float32"),
        "preprocessing": Preprocessing(scale=0.5, mean=(1.0, 2.0), std=(3.0, 4.0)),
        "classes": ("a", "b", "c"),
        "metrics": {"test_accuracy": 0.5},
        "config_sha256": "0" * 64,
    }
    return Description(**values | changes)


def edit_manifest(bundle: Path, **changes: Any) -> None:
    """Set keys of a bundle's manifest; None removes one."""
    file = bundle / "bundle.json"
    manifest = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in manifest.items() if value is not None}
    file.write_text(json.dumps(kept))
