"""Commands of the product, run as a user would, each with a deadline."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TRAIN = [sys.executable, str(REPOSITORY / "scripts" / "train.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run(
    command: list[str], cwd: Path, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory and return its exit code and output, stderr within stdout."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
