"""What a server offers: choices and keys, and the configuration that is put together from them."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from syncbn.errors import ConfigError, JobSettingsError, SubmissionError
from syncbn.jobs.offer.choice import OFFERED, Choice, choices_of, top_keys
from syncbn.jobs.offer.contradictions import check_together
from syncbn.jobs.offer.defaults import read_defaults
from syncbn.jobs.offer.key import Key
from syncbn.jobs.offer.optimizers import ARGUMENTS, without_null
from syncbn.jobs.offer.refusals import who_sets
from syncbn.jobs.offer.settings import JobSettings
from syncbn.jobs.offer.values import close_to, shown
from syncbn.train.config import check_config, explain
from syncbn.train.schema import SECTIONS, LaunchConfig, NoTrackConfig, TrainConfig

_NOT_MORE = 128  # characters of a key


class Offer:
    """What may be chosen and set on a server; nothing of it changes, so threads may share it.

    Args:
        settings: what the administrator decided.

    Raises:
        JobSettingsError: a data set, a model or a default does not fit the schemas.
    """

    def __init__(self, settings: JobSettings) -> None:
        self.settings = settings
        try:
            defaults = read_defaults().changed(settings.default_values)
        except KeyError as error:
            raise JobSettingsError(
                f"{settings.file}: defaults.values.{shown(error.args[0])}: there is no such key"
            ) from error
        self._top, self._launch = defaults.top, defaults.choices["launch"]["local"]
        self.groups: Mapping[str, Mapping[str, Choice]] = {
            group: choices_of(group, defaults, settings) for group in OFFERED
        }
        self.default_choices = {
            group: settings.default_choices.get(group, defaults.chosen[group]) for group in OFFERED
        }
        self.top_keys: Mapping[str, Key] = top_keys(defaults, settings)

    def chosen(self, choices: Mapping[str, Any]) -> dict[str, Choice]:
        """Return the choice of every group, the default one where none was made.

        Raises:
            SubmissionError: there is no such group or choice.
        """
        for group in choices:
            if group not in self.groups:
                raise SubmissionError(self._unknown_group(group, choices[group]))
        found: dict[str, Choice] = {}
        for group, offered in self.groups.items():
            name = choices.get(group, self.default_choices[group])
            if not isinstance(name, str) or name not in offered:
                raise SubmissionError(self._unknown_choice(group, name))
            found[group] = offered[name]
        return found

    def keys(self, chosen: Mapping[str, Choice]) -> dict[str, Key]:
        """Return what may be set with these choices, by the keys with dots."""
        found = dict(self.top_keys)
        for choice in chosen.values():
            found |= choice.keys
        return found

    def unknown_key(self, key: str, value: object, chosen: Mapping[str, Choice]) -> str:
        """Return why a key may not be set with these choices, and what is valid."""
        said = f"{shown(key)}={shown(value)}"
        if len(key) > _NOT_MORE:
            return f"{said}: is no key, as it has more than {_NOT_MORE} characters"
        group = key.partition(".")[0]
        having = [name for name, each in self.groups.get(group, {}).items() if key in each.keys]
        if having:
            return (
                f"{said}: {group}={chosen[group].name} has no such key; "
                f"{group}={' or '.join(having)} has"
            )
        if (who := who_sets(key, self.groups)) is not None:
            return f"{said}: cannot be set by a submission; {who}"
        known = self.keys(chosen)
        return f"{said}: unknown key; {close_to(key, known)}valid: {', '.join(known)}"

    def assemble(self, chosen: Mapping[str, Choice], values: Mapping[str, Any]) -> TrainConfig:
        """Return the configuration of choices and checked values; what the server sets is open.

        Raises:
            SubmissionError: the values do not fit each other.
        """
        try:
            config = self.combine(chosen, values)
        except ConfigError as error:
            raise SubmissionError(str(error)) from error
        check_together(config, self.settings.limits)
        return config

    def combine(self, chosen: Mapping[str, Choice], values: Mapping[str, Any]) -> TrainConfig:
        """Return a configuration that follows the schemas, whatever it takes to run it.

        Raises:
            ConfigError: it does not follow them.
        """
        split: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            split.setdefault(section, {})[name] = value
        arguments = without_null(split.pop(ARGUMENTS, {}))
        if arguments:
            split.setdefault("optim", {})["arguments"] = arguments
        try:
            parts: dict[str, Any] = {
                group: choice.schema(**{**choice.values, **split.get(group, {})})
                for group, choice in chosen.items()
            }
            for section, (schema,) in SECTIONS.items():
                parts[section] = schema(**{**self._top[section], **split.get(section, {})})
            parts["launch"] = LaunchConfig(**{**self._launch, **split.get("launch", {})})
            parts["track"] = NoTrackConfig()
            config = TrainConfig(**{**self._top, **split.get("", {}), **parts})
        except ValidationError as error:
            raise explain(error) from error
        check_config(config)
        return config

    def _unknown_group(self, group: str, name: object) -> str:
        said = f"choices.{shown(group)}={shown(name)}"
        if len(group) <= _NOT_MORE and (who := who_sets(group, ())) is not None:
            return f"{said}: cannot be chosen by a submission; {who}"
        return f"{said}: unknown group; {close_to(group, self.groups)}valid: {', '.join(OFFERED)}"

    def _unknown_choice(self, group: str, name: object) -> str:
        offered = self.groups[group]
        close = close_to(name, offered) if isinstance(name, str) else ""
        custom = (
            "; the administrator names what needs files, or code of your own, in "
            f"{self.settings.file.name}"
            if group in ("data", "model")
            else ""
        )
        return f"{group}={shown(name)}: {close}must be one of {', '.join(offered)}{custom}"
