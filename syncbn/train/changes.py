"""What a run goes on with: its own configuration, and what of it was typed anew and may change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.errors import ConfigError
from syncbn.train.config import (
    compose_config,
    explain,
    explain_quoting,
    flatten,
    from_yaml,
    to_config,
)
from syncbn.train.schema import CHOICES, TrainConfig, schemas
from syncbn.train.schema.resume import why_fixed

CONFIG_FILE = "config.yaml"


def compose_job(overrides: Sequence[str]) -> TrainConfig:
    """Return the job that a command line describes: a new one, or that of its run_dir.

    Args:
        overrides: as on the command line. If they name a run directory that is there, its
            configuration is the base, and not the defaults.

    Raises:
        ConfigError: as `compose_config`; or the configuration that is there cannot be read.
    """
    stored = stored_config(overrides)
    return compose_config(overrides) if stored is None else resumed_config(stored, overrides)


def stored_config(overrides: Sequence[str]) -> TrainConfig | None:
    """Return the configuration in the run directory that overrides name, or None without one.

    Raises:
        ConfigError: it cannot be read, or an override is malformed.
    """
    named = [each for each in _parsed(overrides) if each.key_or_group == "run_dir"]
    value = named[-1].value() if named else None
    file = Path(str(value)) / CONFIG_FILE
    return None if value is None or not file.is_file() else read_config(file)


def read_config(file: Path) -> TrainConfig:
    """Return the configuration in a file.

    Raises:
        ConfigError: there is none, or it does not follow the schemas.
    """
    try:
        return from_yaml(file.read_text())
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def resumed_config(
    stored: TrainConfig, overrides: Sequence[str], composed: TrainConfig | None = None
) -> TrainConfig:
    """Return a run's configuration with overrides laid over it, whether that may change or not.

    A choice of a group (norm=local) counts as a change if the run has another one; it brings that
    choice's values.

    Args:
        stored: the run's configuration.
        overrides: what was typed.
        composed: what they give for a new run, from which choices are taken; None: it is composed
            if it is needed.

    Raises:
        ConfigError: an override is malformed, or does not fit the schemas.
    """
    config = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(stored)))
    assert isinstance(config, DictConfig)
    typed = [each for each in _parsed(overrides) if not str(each.key_or_group).startswith("hydra")]
    chosen = {str(each.key_or_group): each for each in typed if each.key_or_group in CHOICES}
    others = [
        group
        for group, each in chosen.items()
        if not (each.value() in schemas(group) and each.value() == config[group].name)
    ]
    if others and composed is None:
        composed = compose_config(
            [str(e.input_line) for e in typed if str(e.key_or_group).partition(".")[0] in others]
        )
    for group in others:
        part: Any = OmegaConf.structured(getattr(composed, group))
        config[group] = OmegaConf.create(OmegaConf.to_container(part))
    try:
        for each in typed:
            key = str(each.key_or_group)
            if key not in CHOICES:
                _apply(config, key, each)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    return to_config(config)


def check_changes(run_dir: Path, stored: TrainConfig, config: TrainConfig) -> list[str]:
    """Return what changes in a run that goes on, "key=value (was old)" each.

    Raises:
        ConfigError: a key changes that may not; the message names each, why, and what to do.
    """
    old, new = flatten(stored), flatten(config)
    absent = "absent"
    changes = {
        key: f"{key}={_shown(new.get(key, absent))} (was {_shown(old.get(key, absent))})"
        for key in dict.fromkeys([*new, *old])
        if old.get(key, absent) != new.get(key, absent)
    }
    reasons = {key: why for key in changes if (why := why_fixed(key)) is not None}
    if reasons:
        said = "; ".join(f"{changes[key]}: {why}" for key, why in reasons.items())
        raise ConfigError(
            f"run_dir={run_dir} holds a run that cannot go on with {said}. Leave out "
            f"{', '.join(reasons)} to go on with it, or choose another run_dir for a new run"
        )
    return list(changes.values())


def _parsed(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        explain_quoting(overrides, error)
        raise explain(error) from error


def _apply(config: DictConfig, key: str, override: Override) -> None:
    """Do what Hydra does with an override of a value."""
    if not override.is_delete():
        OmegaConf.update(config, key, override.value(), merge=True, force_add=True)
        return
    section, _, name = key.rpartition(".")
    node = OmegaConf.select(config, section) if section else config
    if isinstance(node, DictConfig) and name in node:
        del node[name]


def _shown(value: Any) -> str:
    return "null" if value is None else str(getattr(value, "value", value))
