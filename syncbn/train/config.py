"""What may be configured: the schemas of conf/, how they are composed, and readable errors."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import ValidationError as PydanticError
from pydantic.dataclasses import dataclass
from yaml import YAMLError

import syncbn
from syncbn.errors import ConfigError

# The schemas are not frozen: OmegaConf makes frozen ones read-only and refuses every override.
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Device(Enum):
    """Where replicas compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WandbMode(Enum):
    """Whether wandb writes to disk alone or to its server."""

    offline = "offline"
    online = "online"


@dataclass(kw_only=True)
class DataConfig:
    """A data set: see conf/data."""

    name: str
    batch_size: PositiveInt


@dataclass(kw_only=True)
class DigitsConfig(DataConfig):
    """conf/data/digits.yaml."""

    name: str = "digits"


@dataclass(kw_only=True)
class ModelConfig:
    """An architecture of `syncbn.models`; the other fields are its arguments: see conf/model."""

    name: str


@dataclass(kw_only=True)
class CnnConfig(ModelConfig):
    """conf/model/cnn.yaml."""

    name: str = "cnn"
    width: PositiveInt


@dataclass(kw_only=True)
class NormConfig:
    """A normalization: see conf/norm."""

    name: str


@dataclass(kw_only=True)
class NoNormConfig(NormConfig):
    """conf/norm/none.yaml."""

    name: str = "none"


@dataclass(kw_only=True)
class LocalNormConfig(NormConfig):
    """conf/norm/local.yaml."""

    name: str = "local"
    eps: PositiveFloat
    momentum: Annotated[float, Field(gt=0, le=1)]


@dataclass(kw_only=True)
class SyncNormConfig(LocalNormConfig):
    """conf/norm/sync.yaml."""

    name: str = "sync"


@dataclass(kw_only=True)
class OptimConfig:
    """An optimizer and its schedule: see conf/optim."""

    name: str
    lr: PositiveFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat


@dataclass(kw_only=True)
class SgdConfig(OptimConfig):
    """conf/optim/sgd.yaml."""

    name: str = "sgd"
    momentum: BelowOne


@dataclass(kw_only=True)
class AdamWConfig(OptimConfig):
    """conf/optim/adamw.yaml."""

    name: str = "adamw"


@dataclass(kw_only=True)
class LaunchConfig:
    """Which processes train: see conf/launch."""

    name: str = "local"
    nproc: PositiveInt
    device: Device
    timeout_s: PositiveFloat


@dataclass(kw_only=True)
class TrackConfig:
    """Who is told about the run: see conf/track."""

    name: str


@dataclass(kw_only=True)
class NoTrackConfig(TrackConfig):
    """conf/track/none.yaml."""

    name: str = "none"


@dataclass(kw_only=True)
class WandbConfig(TrackConfig):
    """conf/track/wandb.yaml."""

    name: str = "wandb"
    project: Annotated[str, Field(min_length=1)]
    mode: WandbMode


@dataclass(kw_only=True)
class TrainConfig:
    """A whole job: see conf/config.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
    seed: NonNegativeInt
    epochs: PositiveInt
    max_steps: PositiveInt | None
    run_root: str
    run_dir: str | None
    data: DataConfig
    model: ModelConfig
    norm: NormConfig
    optim: OptimConfig
    launch: LaunchConfig
    track: TrackConfig


_CHOICES: Mapping[str, tuple[type[Any], ...]] = {
    "data": (DigitsConfig,),
    "model": (CnnConfig,),
    "norm": (SyncNormConfig, LocalNormConfig, NoNormConfig),
    "optim": (SgdConfig, AdamWConfig),
    "launch": (LaunchConfig,),
    "track": (WandbConfig, NoTrackConfig),
}


def _schemas(group: str) -> dict[str, type[Any]]:
    """Return the schemas of a group by the name that each has as its default."""
    return {schema.name: schema for schema in _CHOICES[group]}


def config_dir() -> Path:
    """Return the directory conf/: beside the package in a checkout, inside it in a wheel."""
    package = Path(syncbn.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_schemas() -> None:
    """Make the schemas known to Hydra, so that it refuses what they do not allow."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for group in _CHOICES:
        for name, schema in _schemas(group).items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """Return the job that conf/ and overrides describe.

    Args:
        overrides: as on the command line: "norm=local", "optim.lr=0.05".

    Raises:
        ConfigError: an override is malformed, or names an unknown choice or key, or has a value of
            the wrong type or out of range.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3", job_name="syncbn-train"):
            composed = compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    return to_config(composed)


def to_config(composed: DictConfig) -> TrainConfig:
    """Return a composed configuration as typed values, checked against their schemas and ranges.

    Raises:
        ConfigError: a key is unknown, or a value is missing, mistyped or out of range.
    """
    try:
        # Without the types that Hydra composed with, because its `+key=value` adds keys past them.
        values = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
        assert isinstance(values, DictConfig)
        typed = OmegaConf.structured(TrainConfig)
        for group in _CHOICES:
            name, schemas = values[group].name, _schemas(group)
            if name not in schemas:
                raise ConfigError(f"{group}.name={name}: choose one of {', '.join(schemas)}")
            typed[group] = OmegaConf.structured(schemas[name])
        config = OmegaConf.to_object(OmegaConf.merge(typed, values))
    except (OmegaConfBaseException, PydanticError) as error:
        raise explain(error) from error
    assert isinstance(config, TrainConfig)
    return config


def to_yaml(config: TrainConfig) -> str:
    """Return a configuration as YAML that `from_yaml` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> TrainConfig:
    """Return the configuration that `to_yaml` wrote; raises as `to_config`."""
    try:
        loaded = OmegaConf.create(text)
        assert isinstance(loaded, DictConfig)
        return to_config(loaded)
    except (YAMLError, AssertionError, AttributeError) as error:
        raise ConfigError(f"not a configuration of syncbn-train: {error}") from error


def differences(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Return "key=value" for each value of a configuration that another has differently."""
    ours, theirs = (_flatten(OmegaConf.structured(each)) for each in (config, other))
    return [f"{key}={value}" for key, value in ours.items() if theirs.get(key, ...) != value]


def _flatten(node: DictConfig, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, DictConfig):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_sha256(config: TrainConfig) -> str:
    """Return the SHA-256 of a configuration's YAML, which tells two jobs apart."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()


def explain(error: Exception) -> ConfigError:
    """Return an error of Hydra, OmegaConf or pydantic as one message that says what to type."""
    if isinstance(error, PydanticError):
        schema = error.title
        group = next(
            (g for g, all_ in _CHOICES.items() if schema in (s.__name__ for s in all_)), ""
        )
        return ConfigError(
            "; ".join(
                f"{'.'.join(filter(None, [group, *map(str, item['loc'])]))}={item['input']}: "
                f"{item['msg'][0].lower()}{item['msg'][1:]}"
                for item in error.errors(include_url=False)
            )
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None:  # Hydra's own words, less where it looked
        return ConfigError(str(error).split("\nConfig search path")[0].strip())
    reason = (cause.msg or str(cause)).split("\n")[0]
    parent = cause.parent_node
    unknown = isinstance(cause, ConfigKeyError | ConfigAttributeError)
    if unknown and isinstance(parent, DictConfig):
        keys = [str(key) for key in parent if key != "hydra"]
        close = difflib.get_close_matches(str(cause.key), keys, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return ConfigError(f"unknown key {cause.full_key!r}; {hint}valid: {', '.join(keys)}")
    return ConfigError(f"{cause.full_key}: {reason}" if cause.full_key else reason)
