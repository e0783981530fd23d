"""From a command line to a checked configuration: composition by Hydra, and readable errors."""

import difflib
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import ValidationError as PydanticError
from yaml import YAMLError

import syncbn
from syncbn.errors import ConfigError
from syncbn.train.catalog import optimizer_names, timm_names, torchvision_names
from syncbn.train.schema import (
    CHOICES,
    SECTIONS,
    TimmConfig,
    TorchOptimConfig,
    TorchvisionConfig,
    TrainConfig,
    UnetConfig,
    WhiteningNormConfig,
    schemas,
)
from syncbn.train.schema.resume import BEFORE

_COMPOSING = RLock()


def config_dir() -> Path:
    """Return the directory conf/: beside the package in a checkout, inside it in a wheel."""
    package = Path(syncbn.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_schemas() -> None:
    """Make the schemas known to Hydra, so that it refuses what they do not allow."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for group in CHOICES:
        for name, schema in schemas(group).items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def compose_conf(name: str | None, overrides: Sequence[str]) -> DictConfig:
    """Return what Hydra makes of conf/ and overrides, for one thread at a time, as it has globals.

    Args:
        name: of the file of conf/ to begin with; None: of nothing.
        overrides: as on the command line.

    Raises:
        HydraException: an override is malformed, or names an unknown choice or key.
        OmegaConfBaseException: a value has the wrong type.
    """
    with _COMPOSING:
        register_schemas()
        around = GlobalHydra.instance().hydra  # of a sweep, in one of whose jobs this is
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(
                str(config_dir()), version_base="1.3", job_name="syncbn-train"
            ):
                return compose(name, overrides=list(overrides))
        finally:
            GlobalHydra.instance().hydra = around


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """Return the job that conf/ and overrides describe.

    Args:
        overrides: as on the command line: "norm=local", "optim.lr=0.05".

    Raises:
        ConfigError: an override is malformed, or names an unknown choice or key, or has a value of
            the wrong type or out of range.
    """
    try:
        composed = compose_conf("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        explain_quoting(overrides, error)
        raise explain(error) from error
    return to_config(composed)


def explain_quoting(overrides: Sequence[str], error: Exception) -> None:
    """Raise a ConfigError that says what to type if one of the overrides must be quoted.

    Args:
        overrides: as on the command line.
        error: what Hydra's parser made of them.
    """
    for override in overrides:
        if quoted := _quoted(override):
            raise ConfigError(
                f"{override}: some of these characters mean something to Hydra, which reads "
                f"the command line; quote the value for it, and all for the shell: {quoted}"
            ) from error


def _quoted(override: str) -> str | None:
    """Return what to type for an override that only quoting makes readable, or None."""
    parser = OverridesParser.create()
    try:
        if not parser.parse_override(override).is_sweep_override():
            return None
    except HydraException:
        pass
    key, _, value = override.partition("=")
    escaped = value.replace('"', '\\"')
    quoted = f'{key}="{escaped}"'
    try:
        # What begins like a list or is quoted already is meant for the parser.
        is_text = value[:1] not in ("", "[", "{", "'", '"')
        return shlex.quote(quoted) if is_text and parser.parse_override(quoted).value() else None
    except HydraException:
        return None


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
        for group in CHOICES:
            name, known = values[group].name, schemas(group)
            if name not in known:
                raise ConfigError(f"{group}.name={name}: choose one of {', '.join(known)}")
            typed[group] = OmegaConf.structured(known[name])
        config = OmegaConf.to_object(OmegaConf.merge(typed, values))
    except (OmegaConfBaseException, PydanticError) as error:
        raise explain(error) from error
    assert isinstance(config, TrainConfig)
    check_config(config)
    return config


def check_config(config: TrainConfig) -> None:
    """Check what no schema of its own says: names that others define, and what excludes what.

    Raises:
        ConfigError: torch, torchvision or timm has nothing of a configured name, or values
            contradict each other.
    """
    _check_names(config)
    if config.recalibrate and isinstance(config.norm, WhiteningNormConfig):
        raise ConfigError("recalibrate=true is for batch normalization; norm=whitening has none")


def _check_names(config: TrainConfig) -> None:
    """Raise if torch, torchvision or timm has nothing of a configured name."""
    if isinstance(config.model, TorchvisionConfig):
        _check_name("model.architecture", config.model.architecture, torchvision_names())
    if isinstance(config.model, TimmConfig):
        _check_timm("model.architecture", config.model.architecture)
    if isinstance(config.model, UnetConfig) and config.model.encoder is not None:
        _check_timm("model.encoder", config.model.encoder.removeprefix("timm."))
    if isinstance(config.optim, TorchOptimConfig):
        _check_name("optim.optimizer", config.optim.optimizer, optimizer_names())


def _check_name(key: str, name: str, valid: Sequence[str]) -> None:
    if name not in valid:
        hint = _did_you_mean(name, valid)
        raise ConfigError(f"{key}={name}: {hint}choose one of {', '.join(valid)}")


def _check_timm(key: str, name: str) -> None:
    valid = timm_names()
    if not valid:
        raise ConfigError(f"{key}={name} needs timm: pip install 'syncbn[timm]'")
    if name not in valid:
        close = difflib.get_close_matches(name, valid, n=3) or valid[:3]
        raise ConfigError(
            f"{key}={name}: timm has no such model; did you mean {' or '.join(close)}?"
        )


def to_yaml(config: TrainConfig) -> str:
    """Return a configuration as YAML that `from_yaml` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> TrainConfig:
    """Return the configuration that `to_yaml` wrote, now or in an earlier version.

    A key that the earlier version did not have gets the value that means what it did, which may be
    another than the default: see `syncbn.train.schema.resume`.

    Raises:
        ConfigError: as `to_config`.
    """
    try:
        loaded = OmegaConf.create(text)
        assert isinstance(loaded, DictConfig)
        _fill(loaded)
        return to_config(loaded)
    except (YAMLError, AssertionError, AttributeError) as error:
        raise ConfigError(f"not a configuration of syncbn-train: {error}") from error


def _fill(loaded: DictConfig) -> None:
    """Give keys that a configuration of an earlier version does not have their former meaning."""
    for key, value in BEFORE.items():
        section, _, name = key.rpartition(".")
        node = loaded.get(section) if section else loaded
        if not isinstance(node, DictConfig) or name in node:
            continue
        if section in CHOICES:
            fields = getattr(schemas(section).get(node.get("name")), "__dataclass_fields__", {})
            if name not in fields:
                continue
        node[name] = value


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Return the values of a configuration by their keys with dots, such as optim.lr."""
    return _flatten(OmegaConf.structured(config))


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
        parts = {**CHOICES, **SECTIONS}
        names = {schema.__name__: part for part, all_ in parts.items() for schema in all_}
        group = names.get(error.title, "")
        return ConfigError(
            "; ".join(
                f"{'.'.join(filter(None, [group, *map(str, item['loc'])]))}={item['input']}: "
                f"{item['msg'][0].lower()}{item['msg'][1:]}"
                for item in error.errors(include_url=False)
            )
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(
            f"{group}={name}: {_did_you_mean(name, error.options)}choose one of "
            f"{', '.join(error.options)}"
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None:  # Hydra's own words, less where it looked
        return ConfigError(str(error).split("\nConfig search path")[0].strip())
    reason = (cause.msg or str(cause)).split("\n")[0]
    if "missing mandatory" in reason:
        return ConfigError(f"{cause.full_key} has no default; say {cause.full_key}=…")
    parent = cause.parent_node
    unknown = isinstance(cause, ConfigKeyError | ConfigAttributeError)
    if unknown and isinstance(parent, DictConfig):
        keys = [str(key) for key in parent if key != "hydra"]
        if not keys:
            whole = parent._get_full_key(None)  # pyright: ignore[reportPrivateUsage] -- the only way to learn it
            return ConfigError(f"unknown key {cause.full_key!r}; to add to {whole}, say +{whole}=…")
        hint = _hint(str(cause.key), keys, parent)
        return ConfigError(f"unknown key {cause.full_key!r}; {hint}valid: {', '.join(keys)}")
    return ConfigError(f"{cause.full_key}: {reason}" if cause.full_key else reason)


def _did_you_mean(name: str, valid: Sequence[str]) -> str:
    """Return a hint at up to three names that are like one that is unknown, or nothing."""
    close = difflib.get_close_matches(name, valid, n=3)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _hint(key: str, keys: Sequence[str], parent: DictConfig) -> str:
    """Return a hint at the keys of an unknown one's name in other sections, or at one beside it."""
    root: Any = parent._get_root()  # pyright: ignore[reportPrivateUsage] -- the only way to it
    sections = [name for name in (*CHOICES, *SECTIONS) if isinstance(root.get(name), DictConfig)]
    found = [f"{name}.{key}" for name in sections if key in root[name]]
    found = found or difflib.get_close_matches(key, keys, n=1)
    return f"did you mean {' or '.join(map(repr, found))}? " if found else ""
