"""Steps of which the host learns one step late, as on a GPU: here with all of it on the CPU."""

import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn.errors import ReplicaError, TrainingError
from syncbn.train import export, loop
from syncbn.train.config import compose_config
from syncbn.train.data.sampling import Batch
from syncbn.train.loop import train
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.directory import RunDirectory, open_run_directory
from syncbn.train.step import Stepper
from syncbn.train.totals import DeviceTotals, Report, Statement
from tests.support.jobs import Quiet, comparable, outcome, quiet_watch
from tests.support.world import run_world

CPU = torch.device("cpu")
SMALL = ["track=none", "optim.lr=0.05", "launch.device=cpu", "log_every_steps=1", "name=run"]


def _late(_: Any) -> DeviceTotals:
    return DeviceTotals(CPU, 60, 3)


def _train(overrides: list[str], late: bool, watch: Any = None) -> str:
    """Train, and return how it ended."""
    config = compose_config([*SMALL, *overrides])
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    totals = mock.patch.object(loop, "HostTotals", side_effect=_late)
    with mock.patch.object(export, "plot_curves"):
        try:
            if late:
                with totals:
                    return train(config, run, CPU, watch or quiet_watch()).status
            return train(config, run, CPU, watch or quiet_watch()).status
        except TrainingError as error:
            return str(error)


WAYS = {
    "adamw": ["optim=adamw", "optim.clip_norm=0.5", "checkpoint.every_steps=7"],
    "average": ["optim.ema_decay=0.9", "recalibrate=true", "optim.accumulate=2"],
    "float16": ["numerics.precision=float16", "schedule=one_cycle"],
    "penalty": ["norm=penalty"],
    "sgd": [],
    "local": ["norm=local", "data.batch_size=359", "optim.ema_decay=0.5", "data.validation=0"],
    "renormalize": ["norm=renormalize"],  # whose host cannot be late
    "rmsprop": ["optim=torch", "optim.lr=0.001"],  # likewise
}


# The first ones check nearly all that the others do.
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(overrides, id=name, marks=[pytest.mark.long] * (number > 2))
        for number, (name, overrides) in enumerate(WAYS.items())
    ],
)
def test_run_comes_to_the_same_if_the_host_learns_of_its_steps_late(
    tmp_path: Path, overrides: list[str]
) -> None:
    outcomes: list[dict[str, Any]] = []
    for late in (False, True):
        run_dir = tmp_path / f"late-{late}"
        more = ["model.width=4", "epochs=2", "data.batch_size=64", *overrides]
        ended = run_world(2, _train, [*more, f"run_dir={run_dir}"], late)
        assert ended == ["finished", "finished"]
        outcomes.append(outcome(RunDirectory(run_dir)))
    assert outcomes[0] == outcomes[1]


_POISONED = [
    *("model=custom", "model.factory=tests.syncbn.train.test_loop:make_poisoned"),
    *("schedule.warmup_steps=3", "checkpoint.keep=1"),
]
_AT_ONCE = "model.factory=tests.syncbn.train.test_step:make_poisoned_at_once"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [_AT_ONCE],
        ["optim=adamw", "optim.ema_decay=0.9", "checkpoint.every_steps=5"],
        pytest.param(["optim=adamw", "optim.ema_decay=0.9", _AT_ONCE], marks=pytest.mark.long),
        ["numerics.precision=float16", "optim.clip_norm=1"],
    ],
    ids=["sgd", "sgd at once", "adamw", "adamw at once", "float16"],
)
def test_loss_that_is_not_finite_reaches_nothing_if_the_host_learns_of_it_late(
    tmp_path: Path, overrides: list[str]
) -> None:
    found: list[Any] = []
    for late in (False, True):
        run_dir = tmp_path / f"late-{late}"
        texts = run_world(2, _train, [*_POISONED, *overrides, f"run_dir={run_dir}"], late)
        step = 1 if _AT_ONCE in overrides else 10
        assert (
            f"the training loss is nan at step {step} (epoch 1, after {32 * (step - 1)}"
            in (texts[0])
        )
        assert "ranks [1]); the state before this step is in checkpoints/step-" in texts[0]
        assert texts[0] == texts[1]
        kept = read_checkpoint(checkpoint_files(run_dir / "checkpoints")[0])
        assert kept.position.step == step - 1
        states = dict(kept.states)
        if _AT_ONCE in overrides:  # 0 for what is not there yet is the same to an optimizer
            states["optimizer"] = [
                value
                for state in kept.states["optimizer"]["state"].values()
                for value in state.values()
                if value.any()
            ]
        found.append(comparable([states, kept.generators, kept.sums]))
    assert found[0] == found[1]


def make_poisoned_at_once(in_channels: int, num_classes: int) -> torch.nn.Module:
    from tests.syncbn.train.test_loop import make_poisoned

    model: Any = make_poisoned(in_channels, num_classes)
    model.calls = 9  # the next ones are two trials, and the first step
    return model


class _ToldToStop(Quiet):
    """A watch of a rank that is told to stop while it makes a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.stop_signal = 0
        self._step = step if dist.get_rank() == rank else None

    def at(self, step: int, doing: str) -> None:
        if step == self._step and doing == "in forward and backward":
            self.stop_signal = int(signal.SIGTERM)


def _train_until_told(overrides: list[str], step: int) -> str:
    return _train(overrides, True, _ToldToStop(1, step))


def test_ranks_stop_together_one_step_late_and_go_on_bit_identical(tmp_path: Path) -> None:
    common = ["model.width=4", "epochs=2", "data.batch_size=64", "optim.ema_decay=0.5"]
    common.append("data.validation=0")
    # 12 steps an epoch: told in the midst of one, and at its last.
    for told, stops in ((4, 6), (11, 12)):
        run_dir = tmp_path / f"told-{told}"
        more = [*common, f"run_dir={run_dir}"]
        assert run_world(2, _train_until_told, more, told) == ["interrupted", "interrupted"]
        (newest, *_) = checkpoint_files(run_dir / "checkpoints")
        assert read_checkpoint(newest).position.step == stops
        assert len((run_dir / "steps.jsonl").read_text().splitlines()) == stops
        assert run_world(2, _train, more, True) == ["finished", "finished"]
    run_world(2, _train, [*common, f"run_dir={tmp_path / 'whole'}"], False)
    whole = outcome(RunDirectory(tmp_path / "whole"))
    for told in (4, 11):
        assert outcome(RunDirectory(tmp_path / f"told-{told}")) == whole


class _Reads(TorchDispatchMode):
    """Counts how often a tensor's value is made a number of Python's, for which a host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _train_and_watch(overrides: list[str]) -> tuple[list[str], int]:
    """Train late; return what was asked of the totals in which order, and the values read."""
    calls: list[str] = []
    reads = _Reads()

    class Told(DeviceTotals):
        def start(self, statement: Statement) -> None:
            calls.append(f"start {self._started}")
            super().start(statement)

        def diverged(self) -> Tensor:
            calls.append(f"diverged {self._started - 1}")
            return super().diverged()

        def note_skip(self, skipped: Tensor) -> None:
            calls.append(f"note {self._started - 1}")
            super().note_skip(skipped)

        def read(self) -> Report:
            calls.append(f"read {self._known}")
            return super().read()

    original = Stepper.make

    def make(self: Stepper, micro: list[Batch], *args: Any) -> Any:
        with reads:
            return original(self, micro, *args)

    with (
        mock.patch.object(loop, "HostTotals", side_effect=lambda _: Told(CPU, 60, 3)),
        mock.patch.object(Stepper, "make", make),
    ):
        _train(overrides, late=False)
    return calls, reads.count


def test_host_reads_a_step_only_when_the_next_one_has_been_ordered(tmp_path: Path) -> None:
    overrides = ["model.width=4", "norm=none", "optim.clip_norm=1", "max_steps=3", "epochs=1"]
    calls, reads = run_world(1, _train_and_watch, [*overrides, f"run_dir={tmp_path / 'run'}"])[0]
    assert calls == [
        *("start 0", "diverged 0", "note 0"),
        *("start 1", "read 0", "diverged 1", "note 1"),
        *("start 2", "read 1", "diverged 2", "note 2"),
        "read 2",
    ]
    assert reads == 0


def _wait_a_little() -> tuple[int, Report]:
    totals = DeviceTotals(CPU, 60, 1)
    totals.start(Statement([torch.tensor(2.0)], [torch.tensor([1.0])], [], 0, False))
    with mock.patch.object(torch.cpu.Event, "query", side_effect=[False, False, True]) as query:
        report = totals.read()
    return query.call_count, report


def test_host_takes_the_sum_only_when_the_device_says_that_it_is_there() -> None:
    ((asked, report),) = run_world(1, _wait_a_little)
    assert asked == 3
    assert report.totals == (2, 0, 0, (1,))


def _wait_in_vain() -> str:
    totals = DeviceTotals(CPU, 0.05, 1)
    totals.start(Statement([torch.tensor(1.0)], [torch.tensor([1.0])], [], 0, False))
    with (
        mock.patch.object(torch.cpu.Event, "query", return_value=False),
        pytest.raises(ReplicaError) as caught,
    ):
        totals.read()
    return str(caught.value)


def test_wait_for_a_sum_that_does_not_come_ends() -> None:
    (text,) = run_world(1, _wait_in_vain)
    assert text == (
        "rank 0 got no sum over the 1 ranks of a step within 0.05 s: a rank, or its GPU, is gone "
        "or hangs"
    )


def _totals_of_two() -> tuple[Report, float]:
    totals, rank = DeviceTotals(CPU, 60, 2), dist.get_rank()
    losses = [torch.tensor(0.5), torch.tensor(1.25 + rank)]
    observed = torch.tensor([3.0 + rank, 10])
    totals.start(Statement(losses, [observed], [torch.tensor(0.25)], 15 * rank, rank == 0))
    totals.note_skip(torch.tensor(1.0 - rank))
    diverged = totals.diverged().item()
    totals.start(Statement([torch.tensor(torch.inf * rank)], [], [], 0, False))
    return totals.read(), diverged + 2 * totals.diverged().item()


def test_totals_are_sums_over_ranks_and_the_rest_is_each_ranks_own() -> None:
    for rank, (report, diverged) in enumerate(run_world(2, _totals_of_two)):
        assert report.totals == (4.5, 15, 1, (7, 20))
        assert report.skipped == (rank == 0)
        assert (report.own_loss, report.penalty) == (1.75 + rank, 0.25)
        assert diverged == 2
