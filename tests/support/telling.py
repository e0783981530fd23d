"""A model that a job's processes never get: they write down what they were given, and fail."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch


def make(file: str, **arguments: Any) -> NoReturn:
    """Write the environment, the cores and the threads of a rank to a file, with its number."""
    told = {
        "environment": dict(os.environ),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(told))
    raise ValueError("all is told")
