from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from syncbn.errors import ConfigError
from syncbn.train.changes import check_changes, compose_job, resumed_config, stored_config
from syncbn.train.config import compose_config, flatten, from_yaml, to_yaml
from syncbn.train.run.directory import open_run
from syncbn.train.schema import CHOICES, SECTIONS, TrainConfig
from syncbn.train.schema.resume import BEFORE, FIXED, FREE, why_fixed

RUN = Path("runs/x")


def _keys() -> set[str]:
    """Return every key of every schema, with dots."""
    every = {**CHOICES, **SECTIONS}
    keys = {field.name for field in fields(TrainConfig) if field.name not in every}
    for section, choices in every.items():
        for schema in choices:
            assert is_dataclass(schema)
            keys |= {f"{section}.{field.name}" for field in fields(schema)}
    return keys


def _named(key: str) -> Iterable[str]:
    """Return what in the tables may stand for a key, the key itself first."""
    return [key, *([key.partition(".")[0]] if "." in key else [])]


@pytest.mark.parametrize("key", sorted(_keys()))
def test_every_key_is_said_to_be_free_or_fixed(key: str) -> None:
    found = [name for name in _named(key) if name in FREE or name in FIXED]
    assert found, f"say in schema/resume.py whether {key} may change on resume"
    assert (why_fixed(key) is None) == (found[0] in FREE)


def test_tables_name_no_key_that_is_not_there() -> None:
    keys = _keys()
    there = {name for key in keys for name in _named(key)}
    assert set(FREE) | set(FIXED) <= there
    assert set(BEFORE) <= there
    assert not set(FREE) & set(FIXED)


def test_what_is_typed_is_laid_over_what_the_run_has() -> None:
    stored = compose_config(["optim=adamw", "optim.lr=0.5", "seed=3", "norm=local", "norm.eps=0.1"])
    assert resumed_config(stored, []) == stored
    resumed = resumed_config(stored, ["optim.lr=0.25", "epochs=20", "launch.device=cpu"])
    assert (resumed.optim.lr, resumed.epochs, resumed.launch.device.value) == (0.25, 20, "cpu")
    assert (resumed.seed, resumed.optim.name, resumed.norm) == (3, "adamw", stored.norm)
    # The choice that it has is no change, whatever it would bring to a new run.
    assert resumed_config(stored, ["norm=local", "optim=adamw", "data=digits"]) == stored


def test_keys_that_other_choices_of_a_group_do_not_have_can_be_typed() -> None:
    stored = compose_config(["data=folder", "data.path=old", "schedule=one_cycle"])
    resumed = resumed_config(stored, ["data.path='a path/x=1'", "schedule.rise=0.5"])
    assert resumed.data.path == "a path/x=1"  # pyright: ignore[reportAttributeAccessIssue] -- a folder's
    assert resumed.schedule.rise == 0.5  # pyright: ignore[reportAttributeAccessIssue] -- of one_cycle
    changed = check_changes(RUN, stored, resumed_config(stored, ["data.path=new"]))
    assert changed == ["data.path=new (was old)"]


def test_other_choice_of_a_free_group_brings_its_values() -> None:
    stored = compose_config(["track=none"])
    resumed = resumed_config(stored, ["track=wandb", "track.project=p"])
    assert resumed.track == compose_config(["track=wandb", "track.project=p"]).track
    changed = check_changes(RUN, stored, resumed)
    assert changed[:2] == ["track.name=wandb (was none)", "track.project=p (was absent)"]


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=5", r"seed=5 \(was 0\): it decides the order of the samples"),
        ("optim.momentum=0.1", r"optim.momentum=0.1 \(was 0.9\): the optimizer's state is that"),
        ("norm=none", r"norm.name=none \(was sync\): that would be another model; norm.eps=absent"),
        ("data.batch_size=4", r"data.batch_size=4 \(was 16\): it decides which samples a step"),
        ("+model.width=7", r"model.width=7 \(was 32\)"),
    ],
)
def test_what_may_not_change_is_refused_by_name_with_what_to_do(
    override: str, difference: str
) -> None:
    stored = compose_config([])
    with pytest.raises(ConfigError, match=difference) as caught:
        check_changes(RUN, stored, resumed_config(stored, [override, "epochs=20"]))
    key = override.lstrip("+").partition("=")[0].replace("norm", "norm.name, norm.eps")
    assert f"Leave out {key}" in str(caught.value)
    assert "or choose another run_dir for a new run" in str(caught.value)
    assert "epochs=20" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'lr'"),
        ("norn=sync", "unknown key 'norn'; did you mean 'norm'"),
        ("optim.lr=fast", "optim.lr: Value 'fast' of type 'str'"),
        ("optim.lr=-1", "optim.lr=-1.0: input should be greater than 0"),
        ("norm=batch", "norm=batch: choose one of local, none, penalty"),
        ("epochs", "Error parsing override 'epochs'"),
    ],
)
def test_wrong_override_of_a_run_that_goes_on_is_refused_as_of_a_new_one(
    override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resumed_config(compose_config([]), [override])


def test_arguments_are_added_and_taken_away_as_by_hydra() -> None:
    stored = compose_config(["optim=torch", "+optim.arguments.alpha=0.5"])
    added: Any = resumed_config(stored, ["+optim.arguments.eps=0.1"]).optim
    assert added.arguments == {"alpha": 0.5, "eps": 0.1}
    taken: Any = resumed_config(stored, ["~optim.arguments.alpha"]).optim
    assert taken.arguments == {}


def test_job_is_that_of_its_directory_where_there_is_one(tmp_path: Path) -> None:
    where = f"run_dir='{tmp_path}/a=b,c'"
    assert compose_job([where, "seed=4"]).seed == 4
    (tmp_path / "a=b,c").mkdir()
    (tmp_path / "a=b,c" / "config.yaml").write_text(to_yaml(compose_config(["seed=5"])))
    job = compose_job([where, "epochs=3"])
    assert (job.seed, job.epochs, job.run_dir) == (5, 3, f"{tmp_path}/a=b,c")


# What `to_yaml` of version 0.1 gave.
OLD = """\
name: mnist-cnn
seed: 3
epochs: 12
max_steps: null
log_every_steps: 10
recalibrate: false
run_root: runs
run_dir: null
sweep_dir: null
publish: null
data:
  name: mnist
  batch_size: 64
  workers: 0
  shares: mixed
  path: data/mnist
  crop_padding: 0
  flip: false
model:
  name: cnn
  width: 32
norm:
  name: sync
  eps: 1.0e-05
  momentum: 0.1
optim:
  name: sgd
  lr: 0.1
  accumulate: 1
  clip_norm: null
  label_smoothing: 0.0
  ema_decay: null
  momentum: 0.9
  weight_decay: 0.0005
schedule:
  name: cosine
  warmup_steps: 20
numerics:
  precision: float32
  channels_last: false
  compile: false
  deterministic: false
checkpoint:
  every_steps: null
  keep: 2
launch:
  name: local
  nproc: 2
  threads: null
  device: auto
  ranks_per_gpu: 1
  max_restarts: 0
  timeout_s: 120.0
  stop_timeout_s: 30.0
track:
  name: wandb
  project: syncbn
  mode: offline
  group: null
"""


def test_configuration_of_an_earlier_version_keeps_its_meaning() -> None:
    config = from_yaml(OLD)
    assert (config.seed, config.data.name, config.optim.lr) == (3, "mnist", 0.1)
    values, before = flatten(config), flatten(from_yaml(to_yaml(config)))
    assert values == before
    # As today's defaults would not have it.
    assert values["data.validation"] == 0
    assert values["optim.ema_warmup"] is False
    assert values["optim.decay_all"] is True
    assert values["norm.eps"] == 1e-5
    assert values["task.name"] == "classification"
    added = {key for key in values if f"{key.rpartition('.')[2]}:" not in OLD}
    said = {
        key for key in values if any(key == name or key.startswith(f"{name}.") for name in BEFORE)
    }
    assert added <= said, "say in schema/resume.py what it means that an old run does not have it"


def test_run_of_an_earlier_version_goes_on_as_it_was_meant(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD)
    typed = [f"run_dir={tmp_path}", "epochs=20"]
    with open_run(compose_job(typed), typed) as opened:
        assert opened.changes == ("epochs=20 (was 12)", f"run_dir={tmp_path} (was null)")


def test_path_that_hydra_cannot_read_is_answered_with_how_to_quote_it_for_a_run_too() -> None:
    with pytest.raises(ConfigError, match=r"quote the value for it.*'data\.path=\"/x/a \(1\)\"'"):
        stored_config(["run_dir=/x/run", "data.path=/x/a (1)"])
