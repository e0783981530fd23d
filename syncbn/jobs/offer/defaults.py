"""What a job is made of unless it says otherwise: all of conf/, composed once by Hydra.

One composition has every choice of every group beside each other; a job is put together from these
parts, which takes no Hydra. That is the same as composing the job, because no file of conf/ refers
to another group, but for the job's name; a test composes jobs both ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from syncbn.jobs.offer.help import FileHelp, read_help
from syncbn.train.config import compose_conf, config_dir
from syncbn.train.schema import CHOICES, SECTIONS, schemas

Values = Mapping[str, Any]

_READING = Lock()
_MISSING = "???"


@dataclass(frozen=True)
class Defaults:
    """The values of conf/, and its comments.

    Attributes:
        top: the values of config.yaml, sections such as numerics as mappings, without groups.
        top_help: the comments of config.yaml.
        chosen: the choice of each group that config.yaml makes.
        choices: of each group, and each of its choices, the values; those that have no default are
            left out.
        help: of each group, and each of its choices, the comments.
    """

    top: Values
    top_help: FileHelp
    chosen: Mapping[str, str]
    choices: Mapping[str, Mapping[str, Values]]
    help: Mapping[str, Mapping[str, FileHelp]]

    def changed(self, values: Values) -> "Defaults":
        """Return defaults with other values, each for all choices of its group that have the key.

        Args:
            values: by keys with dots.

        Raises:
            KeyError: there is no such key; its argument is the key.
        """
        top = dict(self.top)
        sections = {"": top, **{name: dict(self.top[name]) for name in SECTIONS}}
        choices = {
            group: {name: dict(each) for name, each in named.items()}
            for group, named in self.choices.items()
        }
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            if section in choices:
                places = [each for each in choices[section].values() if name in each]
            else:
                places = [sections[section]] if name in sections.get(section, {}) else []
            if not places:
                raise KeyError(key)
            for place in places:
                place[name] = value
        top |= {name: sections[name] for name in SECTIONS}
        return replace(self, top=top, choices=choices)


def read_defaults() -> Defaults:
    """Return what conf/ holds; read once in a process, by whichever thread asks first."""
    with _READING:
        return _read_defaults()


@cache
def _read_defaults() -> Defaults:
    whole = _plain(compose_conf("config", []))
    every = [f"+{group}@{group}.{name}={name}" for group in CHOICES for name in schemas(group)]
    parts = _plain(compose_conf(None, every))
    directory = config_dir()
    return Defaults(
        top={key: value for key, value in whole.items() if key not in CHOICES},
        top_help=read_help(directory / "config.yaml"),
        chosen={group: whole[group]["name"] for group in CHOICES},
        choices={
            group: {name: _known(parts[group][name]) for name in schemas(group)}
            for group in CHOICES
        },
        help={
            group: {name: read_help(directory / group / f"{name}.yaml") for name in schemas(group)}
            for group in CHOICES
        },
    )


def _plain(composed: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    return cast(dict[str, Any], plain)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value != _MISSING}
