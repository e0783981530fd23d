"""A program that ends as README.md does leaves no process group behind, and does not abort."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.endings import DEADLINE_S
from tests.support.processes import REPOSITORY, run

_DEFAULTS = """
import weakref
import torch.distributed as dist

dist.init_process_group("gloo", init_method={store!r}, rank=0, world_size=1)
{before}
import syncbn

syncbn.SyncBatchNorm(2)
from torch.distributed.nn import functional

held = [
    name
    for name, function in vars(functional).items()
    for default in getattr(function, "__defaults__", None) or ()
    if isinstance(default, dist.ProcessGroup)
]
assert not held, held
alive = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
assert alive() is None
"""


@pytest.mark.parametrize(
    "before",
    ["", "import torch.distributed.nn.functional"],
    ids=["layer_first", "functional_first"],
)
def test_default_arguments_hold_no_group_however_late_the_layer_is_imported(
    before: str, tmp_path: Path
) -> None:
    code = _DEFAULTS.format(store=(tmp_path / "store").as_uri(), before=before)
    result = run([sys.executable, "-W", "error", "-c", code], REPOSITORY, timeout_s=300)
    assert result.returncode == 0, result.stdout


def _end(order: str, pairs: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.support.endings", order, str(pairs)]
    result = run(command, REPOSITORY, timeout_s=DEADLINE_S + 60)
    assert result.returncode == 0, result.stdout
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.long
def test_sixty_endings_with_the_wrapper_deleted_leave_no_thread_and_do_not_abort() -> None:
    assert _end("wrapper_deleted", 30) == {"finished": 60}


@pytest.mark.long
def test_endings_with_the_wrapper_kept_are_told_from_safe_ones() -> None:
    assert "finished" not in _end("wrapper_kept", 2)
