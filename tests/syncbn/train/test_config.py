from pathlib import Path

import pytest

from syncbn.errors import ConfigError
from syncbn.train.config import (
    AdamWConfig,
    LocalNormConfig,
    NoNormConfig,
    NoTrackConfig,
    SgdConfig,
    SyncNormConfig,
    WandbConfig,
    compose_config,
    config_dir,
    config_sha256,
    from_yaml,
    to_yaml,
)

CHOICES = {
    "norm=sync": SyncNormConfig,
    "norm=local": LocalNormConfig,
    "norm=none": NoNormConfig,
    "optim=sgd": SgdConfig,
    "optim=adamw": AdamWConfig,
    "track=none": NoTrackConfig,
    "track=wandb": WandbConfig,
}


def test_defaults_synchronise_and_track_offline() -> None:
    config = compose_config([])
    assert isinstance(config.norm, SyncNormConfig)
    assert isinstance(config.track, WandbConfig)
    assert config.track.mode.value == "offline"
    assert config.name == "digits-cnn"
    assert config.data.batch_size <= 16


@pytest.mark.parametrize(("override", "schema"), CHOICES.items())
def test_every_choice_composes_and_survives_yaml(override: str, schema: type) -> None:
    config = compose_config([override, "seed=7"])
    group = override.partition("=")[0]
    assert type(getattr(config, group)) is schema
    assert from_yaml(to_yaml(config)) == config


def test_every_file_in_conf_has_a_schema() -> None:
    for file in config_dir().glob("*/*.yaml"):
        compose_config([f"{file.parent.name}={file.stem}"])


def test_hash_tells_configurations_apart() -> None:
    assert config_sha256(compose_config([])) == config_sha256(compose_config([]))
    assert config_sha256(compose_config([])) != config_sha256(compose_config(["seed=1"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("norm=batch", r"(?s)Could not find 'norm/batch'.*local.*none.*sync"),
        ("norn=sync", r"unknown key 'norn'; did you mean 'norm'\? valid: name, seed"),
        ("optim.lrr=1", r"unknown key 'optim.lrr'; did you mean 'lr'\? valid: name, lr"),
        ("+optim.foo=1", r"unknown key 'optim.foo'; valid: name, lr"),
        ("+foo=1", r"unknown key 'foo'; valid: name, seed"),
        ("optim.lr=fast", r"optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("seed=1.5", r"seed: Value '1.5' of type 'float' could not be converted to Integer"),
        ("optim.lr=-1", r"optim.lr=-1.0: input should be greater than 0"),
        ("optim.momentum=1", r"optim.momentum=1.0: input should be less than 1"),
        ("epochs=0", r"epochs=0: input should be greater than 0"),
        ("epochs=null", r"epochs: .*not Optional"),
        ("data.batch_size=???", r"data.batch_size: .*missing mandatory value"),
        ("track.mode=shared", r"track.mode: Invalid value 'shared', expected one of \[offline, on"),
        (
            "launch.device=tpu",
            r"launch.device: Invalid value 'tpu', expected one of \[auto, cpu, c",
        ),
        ("norm.name=batch", r"norm.name=batch: choose one of sync, local, none"),
        ("name=a/b", r"name=a/b: string should match"),
        ("epochs", r"Error parsing override 'epochs'"),
        ("~norm", r"norm: Missing mandatory value"),
    ],
)
def test_wrong_override_is_refused_with_what_is_valid(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config([override])
    assert str(Path.cwd()) not in str(caught.value)
