import copy
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from syncbn.bundle import read_bundle
from syncbn.errors import ConfigError
from syncbn.train.config import compose_config
from syncbn.train.optim import make_optimizer
from syncbn.train.parameters import freeze, parameter_groups
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.schedule import Schedule
from syncbn.transforms.convert import convert_sync_batchnorm
from tests.support.jobs import Job, wait_until, whole_outcome


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 3, 1, bias=False)
        )
        self.norm = nn.LayerNorm([3, 4])
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).flatten(1))


def _groups(
    *overrides: str, model: nn.Module | None = None
) -> list[tuple[list[str], float, float]]:
    """Return each group's names, learning rate and weight decay, as the optimizer has them."""
    model = _Model() if model is None else model
    config = compose_config(["optim.lr=0.5", *overrides]).optim
    optimizer = make_optimizer(parameter_groups(model, config), config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ([names[each] for each in group["params"]], group["lr"], group.get("weight_decay", 0))
        for group in optimizer.param_groups
    ]


ALL = [name for name, _ in _Model().named_parameters()]
WEIGHTS = ["body.0.weight", "body.3.weight", "head.weight"]
OTHERS = [name for name in ALL if name not in WEIGHTS]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=sgd", "optim.weight_decay=0.25"],
        ["optim=adamw", "optim.weight_decay=0.25"],
        ["optim=torch", "+optim.arguments.weight_decay=0.25"],
    ],
)
def test_biases_and_normalizations_do_not_decay_unless_asked_for(overrides: list[str]) -> None:
    assert _groups(*overrides) == [(WEIGHTS, 0.5, 0.25), (OTHERS, 0.5, 0)]
    assert _groups(*overrides, "optim.decay_all=true") == [(ALL, 0.5, 0.25)]


@pytest.mark.parametrize(
    ("overrides", "decay"),
    [
        (["optim.weight_decay=0"], 0),
        (["optim=torch"], 0),
        (["optim=torch", "optim.optimizer=Rprop"], 0),
    ],
)
def test_without_decay_there_is_one_group(overrides: list[str], decay: float) -> None:
    assert _groups(*overrides) == [(ALL, 0.5, decay)]


def test_decay_that_is_an_optimizers_own_default_leaves_normalizations_alone_too() -> None:
    groups = _groups("optim=torch", "optim.optimizer=AdamW")
    assert groups == [(WEIGHTS, 0.5, 0.01), (OTHERS, 0.5, 0)]


def test_first_pattern_that_matches_scales_the_rate() -> None:
    scale = "+optim.lr_scale={body.0.*:0.5,body.*:0.25}"
    assert _groups("optim.decay_all=true", scale) == [
        (["norm.weight", "norm.bias", "head.weight", "head.bias"], 0.5, 5e-4),
        (["body.0.weight", "body.0.bias"], 0.25, 5e-4),
        (["body.1.weight", "body.1.bias", "body.3.weight"], 0.125, 5e-4),
    ]
    assert [rate for _, rate, _ in _groups(scale)] == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


@pytest.mark.parametrize("schedule", ["cosine", "step", "one_cycle", "constant"])
def test_schedule_keeps_the_ratio_of_rates(schedule: str) -> None:
    config = compose_config([f"schedule={schedule}", "+optim.lr_scale={body.*:0.25}"])
    model = _Model()
    optimizer = make_optimizer(parameter_groups(model, config.optim), config.optim)
    moves = Schedule(optimizer, config.schedule, 12, 4)
    for _ in range(12):
        base, *_, scaled = moves.get_last_lr()
        assert scaled == pytest.approx(base / 4)
        optimizer.step()
        moves.step()


def test_frozen_parameters_are_in_no_group() -> None:
    model = _Model()
    freeze(model, ["body.*", "*.bias"])
    groups = _groups(model=model)
    assert [names for names, _, _ in groups] == [["head.weight"], ["norm.weight"]]


@pytest.mark.parametrize("synchronized", [False, True])
def test_frozen_normalization_keeps_its_statistics_in_any_mode(synchronized: bool) -> None:
    model = _Model()
    if synchronized:
        convert_sync_batchnorm(model)
    freeze(model, ["body.*"])
    for each in (model, copy.deepcopy(model)):
        each.eval().train()
        assert each.head.training
        before = {name: value.clone() for name, value in each.named_buffers()}
        each(torch.randn(5, 2, 4))
        assert all(torch.equal(value, before[name]) for name, value in each.named_buffers())


def test_normalization_of_which_a_part_learns_goes_on_as_before() -> None:
    model = _Model()
    freeze(model, ["body.1.weight"])
    model.eval().train()
    model(torch.randn(5, 2, 4))
    assert model.get_buffer("body.1.num_batches_tracked") == 1


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("body", "'body.*'"),
        ("bdy.*", "'body.*'"),
        ("body.0.wieght", "'body.0.weight'"),
        ("Head.*", "'head.*'"),
    ],
)
def test_pattern_that_matches_nothing_is_answered_with_close_names(pattern: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"^optim.freeze: no parameter's name matches ") as caught:
        freeze(_Model(), [pattern])
    assert hint in str(caught.value)
    config = compose_config([f"+optim.lr_scale={{{pattern}:2}}"]).optim
    with pytest.raises(ConfigError, match=r"^optim.lr_scale: no parameter's name matches "):
        parameter_groups(_Model(), config)


def test_something_must_be_left_to_learn() -> None:
    with pytest.raises(ConfigError, match=r"^optim.freeze=\['\*'\] leaves no parameter to learn"):
        freeze(_Model(), ["*"])


def test_run_with_frozen_parts_and_groups_ends_bit_identical_after_a_stop(tmp_path: Path) -> None:
    overrides = ["epochs=2", "log_every_steps=1", "optim=adamw", "optim.ema_decay=0.9"]
    overrides += ["optim.freeze=['0.*','1.*']", "+optim.lr_scale={3.*:0.5}"]
    whole = whole_outcome(tmp_path / "whole", *overrides)
    job = Job(tmp_path / "stopped", *overrides)
    lines = job.run.path / "steps.jsonl"
    wait_until(lambda: lines.exists() and len(lines.read_text().splitlines()) >= 5)
    os.kill(job.supervisor.pid, signal.SIGTERM)
    assert job.wait(20) == 128 + signal.SIGTERM
    (start,) = [read_checkpoint(file) for file in checkpoint_files(job.run.checkpoints_dir)]
    assert whole_outcome(tmp_path / "stopped", *overrides) == whole
    end = read_checkpoint(checkpoint_files(job.run.checkpoints_dir)[0])
    for name, value in end.states["model"].items():
        is_frozen = name.startswith(("0.", "1."))
        assert torch.equal(value, start.states["model"][name]) == is_frozen, name


def test_recalibrating_leaves_frozen_statistics_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["epochs=1", "recalibrate=true", "optim.freeze=['0.*','1.*']", "launch.nproc=1"]
    assert Job(run, *overrides).wait() == 0
    state = read_bundle(run / "bundle").model.state_dict()
    assert state["1.num_batches_tracked"] == 0
    assert torch.equal(state["1.running_var"], torch.ones(4))
    assert state["4.num_batches_tracked"] > 0
    assert not torch.equal(state["4.running_var"], torch.ones(8))
