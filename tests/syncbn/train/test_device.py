import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.errors import ConfigError, TrainingError
from syncbn.train import device as module
from syncbn.train.config import compose_config
from syncbn.train.device import (
    choose_backend,
    choose_device,
    join_process_group,
    leave_process_group,
    why_not_on_gpus,
)
from syncbn.train.loop import train
from syncbn.train.run.directory import open_run_directory
from syncbn.train.schema import LaunchConfig
from tests.support.jobs import Job, quiet_watch
from tests.support.world import run_world

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def _launch(*overrides: str) -> LaunchConfig:
    return compose_config([f"launch.{override}" for override in overrides]).launch


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with two GPUs; the list gets which of them is made the current one."""
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("overrides", "nproc", "expected"),
    [
        (["device=cuda"], 2, ["cuda:0", "cuda:1"]),
        (["device=auto"], 2, ["cuda:0", "cuda:1"]),
        (["device=cpu"], 2, ["cpu", "cpu"]),
        (["device=auto"], 3, ["cpu", "cpu", "cpu"]),
        (["device=cuda", "ranks_per_gpu=2"], 2, ["cuda:0", "cuda:0"]),
        (["device=auto", "ranks_per_gpu=2"], 3, ["cuda:0", "cuda:0", "cuda:1"]),
        (["device=cpu", "ranks_per_gpu=2"], 2, ["cpu", "cpu"]),
    ],
)
def test_each_rank_gets_its_device(
    gpus: list[Any], overrides: list[str], nproc: int, expected: list[str]
) -> None:
    chosen = [choose_device(_launch(*overrides), rank, nproc) for rank in range(nproc)]
    assert [str(device) for device in chosen] == expected
    assert gpus == [device for device in chosen if device.type == "cuda"]


@pytest.mark.parametrize(
    ("overrides", "nproc", "message"),
    [
        (
            [],
            5,
            "needs 5 GPUs, found 2; use launch.nproc=2, launch.device=cpu, or, slowly, "
            "launch.ranks_per_gpu=3",
        ),
        (
            ["ranks_per_gpu=2"],
            5,
            "needs 3 GPUs, found 2; use launch.nproc=4, launch.device=cpu, or, slowly, "
            "launch.ranks_per_gpu=3",
        ),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_too_few_gpus_are_refused_with_what_would_do(
    overrides: list[str], nproc: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_device(_launch("device=cuda", *overrides), 0, nproc)
    assert str(caught.value) == f"launch.device=cuda {message}"


@pytest.mark.usefixtures("gpus")
def test_gpus_that_auto_leaves_alone_are_told_of_with_what_would_use_them() -> None:
    assert why_not_on_gpus(_launch("device=auto"), 5) == (
        "launch.device=auto takes the CPU, because 5 ranks need 5 GPUs and there are 2; to use "
        "them, say launch.nproc=2, or, slowly, launch.ranks_per_gpu=3"
    )
    assert why_not_on_gpus(_launch("device=auto"), 2) is None
    assert why_not_on_gpus(_launch("device=cpu"), 5) is None


def test_nothing_is_said_of_gpus_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not_on_gpus(_launch("device=auto"), 2) is None


def test_nccl_is_for_gpus_that_no_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert choose_backend(CPU, _launch("ranks_per_gpu=2")) == "gloo"
    assert choose_backend(GPU, _launch()) == "cpu:gloo,cuda:nccl"
    assert choose_backend(GPU, _launch("ranks_per_gpu=2")) == "cpu:gloo,cuda:gloo"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert choose_backend(GPU, _launch()) == "cpu:gloo,cuda:gloo"


class _Joined:
    """Stands in for the process group that is joined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.arguments: dict[str, Any] = {}
        self.longest: Any = None
        self._error = error
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
        monkeypatch.setattr(dist, "init_process_group", self._init)
        monkeypatch.setattr(dist, "group", mock.Mock(WORLD=self))

    def _init(self, backend: str, **arguments: Any) -> None:
        self.arguments = {"backend": backend, **arguments}
        if self._error is not None:
            raise self._error

    def _get_backend(self, device: torch.device) -> Any:
        assert device == GPU
        return self

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.longest = timeout


def test_ranks_connect_their_gpus_at_once_and_nccl_ends_a_wait_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joined, store = _Joined(monkeypatch), object()
    join: Any = join_process_group
    join(GPU, _launch("timeout_s=7"), store, 1, 2)
    assert joined.arguments == {
        "backend": "cpu:gloo,cuda:nccl",
        "store": store,
        "rank": 1,
        "world_size": 2,
        "timeout": timedelta(seconds=7),
        "device_id": GPU,
    }
    assert joined.longest == timedelta(seconds=21)
    for device in (GPU, CPU):
        joined = _Joined(monkeypatch)
        join(device, _launch("ranks_per_gpu=2"), store, 1, 2)
        assert joined.arguments["device_id"] is None
        assert joined.longest is None


def test_gpus_that_cannot_be_connected_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NCCL error in: x.cpp:1\nLast error:\nDuplicate GPU detected : rank 1 and rank 0\n"
    _Joined(monkeypatch, dist.DistBackendError(text))
    join: Any = join_process_group
    with pytest.raises(TrainingError) as caught:
        join(GPU, _launch(), None, 1, 2)
    assert str(caught.value) == (
        "rank 1, on cuda:1: NCCL cannot connect the GPUs of the 2 ranks: Duplicate GPU detected : "
        "rank 1 and rank 0; NCCL_DEBUG=INFO in the environment says more, and ranks that share a "
        "GPU need launch.ranks_per_gpu"
    )


@pytest.mark.parametrize(
    ("backends", "failed", "leaves", "limited"),
    [
        ("cpu:gloo,cuda:nccl", False, True, True),
        ("cpu:gloo,cuda:nccl", True, False, True),
        ("cpu:gloo,cuda:gloo", True, True, False),
        ("cpu:gloo", True, True, False),
    ],
)
def test_failed_rank_does_not_wait_for_nccl(
    monkeypatch: pytest.MonkeyPatch, backends: str, failed: bool, leaves: bool, limited: bool
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    destroy, faults = mock.Mock(), mock.Mock()
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    monkeypatch.setattr(module, "faulthandler", faults)
    leave_process_group(failed)
    assert destroy.called == leaves
    assert faults.dump_traceback_later.called == limited
    assert faults.cancel_dump_traceback_later.called == (limited and leaves)


class _Scattering(nn.Module):
    """A model with an operation that torch has not deterministically."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.is_meta:
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return self.layers(x)


def make_scattering(in_channels: int, num_classes: int) -> nn.Module:
    return _Scattering(in_channels, num_classes)


class _TooLarge(_Scattering):
    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        return self.layers(x)


def make_too_large(in_channels: int, num_classes: int) -> nn.Module:
    return _TooLarge(in_channels, num_classes)


def _train(factory: str, overrides: list[str]) -> tuple[str, str | None]:
    torch.use_deterministic_algorithms(False)  # what these tests have set themselves
    custom = ["model=custom", f"model.factory={__name__}:{factory}", "norm=none", "track=none"]
    custom += ["max_steps=1"]
    config = compose_config([*custom, *overrides])
    text = ""
    exported = mock.Mock(metrics={}, evaluations=[])
    with mock.patch("syncbn.train.loop.export", return_value=exported):
        try:
            train(config, open_run_directory(config), CPU, quiet_watch())
        except ConfigError as error:
            text = str(error)
    return text, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_operations_of_which_repetitions_may_differ_are_refused_if_asked_for(
    tmp_path: Path,
) -> None:
    plain = [f"run_dir={tmp_path / 'plain'}"]
    assert run_world(1, _train, "make_scattering", plain)[0] == ("", None)
    overrides = ["numerics.deterministic=true", f"run_dir={tmp_path / 'deterministic'}"]
    ((text, workspace),) = run_world(1, _train, "make_scattering", overrides)
    assert "put_ does not have a deterministic implementation" in text
    assert workspace == ":4096:8"


def test_job_refuses_operations_of_which_repetitions_may_differ_before_its_first_step(
    tmp_path: Path,
) -> None:
    custom = ["model=custom", f"model.factory={__name__}:make_scattering", "norm=none"]
    job = Job(tmp_path / "run", *custom, "numerics.deterministic=true", "launch.nproc=1")
    assert job.wait() == 2
    result = job.run.read_result()
    assert result is not None
    assert "put_ does not have a deterministic implementation" in str(result.error)
    assert job.run.read_metrics() == []


def test_operations_of_a_run_itself_can_all_be_repeated(tmp_path: Path) -> None:
    every = ["numerics.deterministic=true", "recalibrate=true", "optim.ema_decay=0.9"]
    every += ["optim.clip_norm=1", "optim.accumulate=2", "epochs=1", "max_steps=4"]
    job = Job(tmp_path / "run", *every)
    assert job.wait() == 0, Path(f"{job.run.path}.out").read_text()
    assert "deterministic" not in Path(f"{job.run.path}.out").read_text()  # not as a warning


def test_batch_too_large_for_the_memory_is_explained(tmp_path: Path) -> None:
    overrides = ["data.batch_size=7", f"run_dir={tmp_path / 'run'}"]
    ((text, _),) = run_world(1, _train, "make_too_large", overrides)
    assert text == (
        "data.batch_size=7 is too much for the memory of cpu: CUDA out of memory. Tried to "
        "allocate 2 GiB.; choose a smaller one, with more of optim.accumulate=1 for the same "
        "step, or numerics.precision=bfloat16"
    )


_COUNT = """
import torch
asked = []
torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0
import importlib
import syncbn.train.launch.supervisor
importlib.import_module("torch._dynamo")
assert not asked and not torch.cuda.is_initialized()
"""


@pytest.mark.long
def test_supervisor_leaves_cuda_alone_which_a_fork_could_not_use_any_more() -> None:
    checkout = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", _COUNT], check=True, timeout=120, cwd=checkout)
