import inspect
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncbn.errors import ConfigError
from syncbn.train.catalog import (
    optimizer_arguments,
    optimizer_names,
    timm_names,
    torchvision_names,
    torchvision_segmenters,
)
from syncbn.train.config import compose_config, config_dir, config_sha256, from_yaml, to_yaml
from syncbn.train.schema import (
    AdamWConfig,
    LocalNormConfig,
    MlpConfig,
    MnistConfig,
    NoNormConfig,
    NoTrackConfig,
    PenaltyNormConfig,
    RenormalizeNormConfig,
    SgdConfig,
    SyncNormConfig,
    WandbConfig,
    WhiteningNormConfig,
)

CHOICES = {
    "norm=sync": SyncNormConfig,
    "norm=local": LocalNormConfig,
    "norm=none": NoNormConfig,
    "norm=whitening": WhiteningNormConfig,
    "norm=penalty": PenaltyNormConfig,
    "norm=renormalize": RenormalizeNormConfig,
    "model=mlp": MlpConfig,
    "optim=sgd": SgdConfig,
    "optim=adamw": AdamWConfig,
    "track=none": NoTrackConfig,
    "track=wandb": WandbConfig,
}


def test_defaults_synchronize_and_track_offline() -> None:
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


def test_configuration_without_the_newer_keys_means_what_it_meant() -> None:
    newer = ("freeze", "lr_scale", "decay_all", "weights", "find_unused_parameters")
    lines = to_yaml(compose_config(["norm.eps=1e-5", "norm.momentum=0.1"])).splitlines()
    older = [line for line in lines if not line.strip().startswith(newer)]
    assert len(older) == len(lines) - 7
    config = from_yaml("\n".join(older))
    assert config.optim.decay_all
    assert (config.optim.freeze, config.optim.lr_scale) == ([], {})
    assert (config.model.weights, config.launch.find_unused_parameters) == (None, False)


# What has no default, because only the user knows it.
NEEDED = {
    "data/folder": ["data.path=somewhere"],
    "data/masks": ["data.path=x"],
    "data/custom": ["data.factory=package.module:function"],
    "model/custom": ["model.factory=package.module:function"],
    "task/custom": ["task.factory=package.module:function"],
}


def test_every_file_in_conf_has_a_schema() -> None:
    for file in config_dir().glob("*/*.yaml"):
        group, choice = file.parent.name, file.stem
        added = "+" if group == "experiment" else ""
        needed = NEEDED.get(f"{group}/{choice}", [])
        compose_config([f"{added}{group}={choice}", *needed])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=folder"], r"^data.path has no default; say data.path=…$"),
        (
            ["model=torchvision", "model.architecture=resnet19"],
            r"^model.architecture=resnet19: did you mean resnet18 .*choose one of alexnet, .*vit_",
        ),
        (
            ["model=timm", "model.architecture=resnet19"],
            r"^model.architecture=resnet19: timm has no such model; did you mean resnet18 or ",
        ),
        (
            ["model=unet", "model.encoder=timm.resnet19"],
            r"^model.encoder=resnet19: timm has no such model; did you mean resnet18 or ",
        ),
        (["model=unet", "model.encoder=resnet18"], r"^model.encoder=resnet18: string should match"),
        (
            ["optim=torch", "optim.optimizer=Adm"],
            r"^optim.optimizer=Adm: did you mean Adam .*choose one of ASGD, .*RMSprop",
        ),
        (["model=custom", "model.factory=os.system"], r"^model.factory=os.system: string should"),
        (["data=synthetic", "data.classes=0"], r"^data.classes=0: input should be greater"),
        (
            ["norm=whitening", "recalibrate=true"],
            r"^recalibrate=true is for batch normalization; norm=whitening has none$",
        ),
        (
            ["norm=whitening", "norm.method=pca"],
            r"Invalid value 'pca', expected one of \[zca, newton",
        ),
        (["checkpoint.keep=0"], r"^checkpoint.keep=0: input should be greater"),
        (["numerics.precision=int8"], r"numerics.precision: Invalid value 'int8', expected one of"),
    ],
)
def test_wrong_choice_is_refused_with_what_is_valid(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config(overrides)


@pytest.mark.parametrize("path", ["/a b", "/my photos/2024 05/x y"])
def test_a_path_with_a_space_is_taken(path: str) -> None:
    assert (
        compose_config(["data=mnist", f"data.path={path}"]).data
        == compose_config(["data=mnist", f'data.path="{path}"']).data
    )


@pytest.mark.parametrize(
    "path", ["/a b (1)", "/it's here", "/é b", "/a,b", "/a=b", "/a#b", "/a[1]", '/a "b", c']
)
def test_a_path_that_hydra_cannot_read_is_answered_with_how_to_quote_it(path: str) -> None:
    with pytest.raises(ConfigError, match="mean something to Hydra") as caught:
        compose_config(["data=mnist", f"data.path={path}"])
    (typed,) = shlex.split(str(caught.value).partition("for the shell: ")[2])
    config = compose_config(["data=mnist", typed]).data
    assert isinstance(config, MnistConfig)
    assert config.path == path


def test_names_come_from_the_installed_torch_torchvision_and_timm() -> None:
    import torchvision

    modules = torchvision.models, torchvision.models.segmentation
    known = [name for module in modules for name in torchvision.models.list_models(module=module)]
    assert list(torchvision_names()) == sorted(known)
    segmenters = torchvision.models.list_models(module=torchvision.models.segmentation)
    assert list(torchvision_segmenters()) == sorted(segmenters)
    import timm

    assert sorted(timm_names()) == sorted(timm.list_models())
    for name in optimizer_names():
        optimizer = getattr(torch.optim, name)
        assert issubclass(optimizer, torch.optim.Optimizer)
        parameters = set(inspect.signature(optimizer).parameters)
        assert set(optimizer_arguments()[name]) == parameters - {"params", "lr"}
    assert {"SGD", "AdamW", "RMSprop"} < set(optimizer_names())


@pytest.mark.parametrize(
    "overrides", [["model=timm"], ["model=unet", "model.encoder=timm.resnet18"]]
)
def test_missing_timm_says_how_to_get_it(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncbn.train.catalog.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"=resnet18 needs timm: pip install 'syncbn\[timm\]'$"):
        compose_config(overrides)


def test_wrong_configuration_is_known_before_torch_is_imported() -> None:
    code = (
        "import sys; from syncbn.train.launch import command; sys.argv = ['x', 'optim.lrr=1'];"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules)); command.main()"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert "unknown key 'optim.lrr'" in result.stderr


def test_hash_tells_configurations_apart() -> None:
    assert config_sha256(compose_config([])) == config_sha256(compose_config([]))
    assert config_sha256(compose_config([])) != config_sha256(compose_config(["seed=1"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("norm=batch", r"norm=batch: choose one of local, none, penalty"),
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
        ("data.batch_size=???", r"data.batch_size has no default; say data.batch_size=…"),
        ("track.mode=shared", r"track.mode: Invalid value 'shared', expected one of \[offline, on"),
        (
            "launch.device=tpu",
            r"launch.device: Invalid value 'tpu', expected one of \[auto, cpu, c",
        ),
        (
            "launch.timeout_s=1e15",
            r"launch.timeout_s=1000000000000000.0: input should be less than or equal to 604800",
        ),
        ("launch.stop_timeout_s=inf", r"launch.stop_timeout_s=inf: input should be less than or"),
        ("launch.load_timeout_s=0", r"launch.load_timeout_s=0.0: input should be greater than 0"),
        ("launch.nproc=1000000", r"launch.nproc=1000000: input should be less than or equal to"),
        ("norm.name=batch", r"norm.name=batch: choose one of sync, local, none"),
        ("norm=synch", r"norm=synch: did you mean sync\? choose one of local, none, penalty"),
        ("lr=0.1", r"unknown key 'lr'; did you mean 'optim.lr'\? valid: name, seed"),
        ("eps=0.1", r"unknown key 'eps'; did you mean 'norm.eps'\?"),
        ("name=a/b", r"name=a/b: string should match"),
        ("epochs", r"Error parsing override 'epochs'"),
        ("~norm", r"norm: Missing mandatory value"),
    ],
)
def test_wrong_override_is_refused_with_what_is_valid(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose_config([override])
    assert str(Path.cwd()) not in str(caught.value)
