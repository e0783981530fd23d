"""The examples in docs/examples train, as docs/training.md says."""

import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from syncbn.bundle import read_manifest
from syncbn.train import loop
from syncbn.train.config import compose_config
from syncbn.train.run.directory import Result, open_run_directory
from tests.support.jobs import quiet_watch
from tests.support.processes import REPOSITORY
from tests.support.world import run_world

EXAMPLES = REPOSITORY / "docs" / "examples"


def _train(overrides: list[str]) -> Result:
    sys.path.insert(0, str(EXAMPLES))
    config = compose_config(overrides)
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    return loop.train(config, run, torch.device("cpu"), quiet_watch())


def test_task_of_the_documents_learns_and_its_bundle_needs_no_code(tmp_path: Path) -> None:
    (command,) = re.findall(
        r"^PYTHONPATH=docs/examples syncbn-train (task=custom .*)$",
        (REPOSITORY / "docs" / "training.md").read_text(),
        re.MULTILINE,
    )
    small = ["model.width=8", "track=none", f"run_dir={tmp_path / 'run'}"]
    result, _ = run_world(2, _train, [*command.split(), *small], deadline_s=120)
    (evaluation,) = result.evaluations
    assert (evaluation["split"], evaluation["samples"]) == ("test", 360)
    # The mean of the values is 2.5 from a value, on average.
    assert evaluation["metrics"]["mean_absolute_error"]["value"] < 1.5
    assert evaluation["metrics"]["within_half"]["low"] > 0
    manifest = read_manifest(tmp_path / "run" / "bundle")
    assert manifest.task == "tensor"
    assert manifest.architecture.name == "cnn"
