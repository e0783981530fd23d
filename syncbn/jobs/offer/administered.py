"""Whether what the administrator named and set can be offered, before anybody asks for it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from syncbn.errors import ConfigError, JobSettingsError, SubmissionError
from syncbn.jobs.offer.choice import OFFERED
from syncbn.jobs.offer.key import Key
from syncbn.jobs.offer.offer import Offer
from syncbn.jobs.offer.refusals import who_sets
from syncbn.jobs.offer.values import close_to, shown
from syncbn.train.config import from_yaml, to_yaml

# Of launch, what the administrator may set for all jobs, besides what jobs set.
_OF_LAUNCH = (
    "launch.timeout_s",
    "launch.stop_timeout_s",
    "launch.load_timeout_s",
    "launch.ranks_per_gpu",
    "launch.find_unused_parameters",
)


def check_administered(offer: Offer) -> None:
    """Check the data sets, models and defaults of the administrator.

    Raises:
        JobSettingsError: one of them does not fit the schemas, or the limits; the message names
            the file, the key and the value.
    """
    try:
        _check_choices(offer)
        _check_values(offer)
        _check_named(offer, "data", "data", offer.settings.data)
        _check_named(offer, "model", "models", offer.settings.models)
        _check_defaults(offer)
    except (ConfigError, SubmissionError) as error:
        raise JobSettingsError(f"{offer.settings.file}: {error}") from error


def _check_choices(offer: Offer) -> None:
    for group, name in offer.settings.default_choices.items():
        try:
            offer.chosen({group: name})
        except SubmissionError as error:
            raise SubmissionError(f"defaults.choices: {error}") from error


def _check_values(offer: Offer) -> None:
    """Check that the keys of [defaults.values] are not the server's own, and launch's values."""
    offered = _offered(offer)
    for key, value in offer.settings.default_values.items():
        if key not in _OF_LAUNCH and key not in offered:
            why = who_sets(key, offer.groups) or "no job has it"
            raise SubmissionError(f"defaults.values.{key}={shown(value)}: cannot be set; {why}")
    offer.combine(offer.chosen({}), {})


def _check_named(offer: Offer, group: str, section: str, named: Mapping[str, Any]) -> None:
    for name, entry in named.items():
        where = f"{section}.{name}"
        if name in OFFERED[group]:
            raise SubmissionError(f"{where}: {name} is offered as it is; choose another name")
        choice = offer.groups[group][name]
        fields = dataclasses.fields(choice.schema)
        known = [each.name for each in fields if each.name != "name"]
        for key, value in entry.values.items():
            if key not in known:
                raise SubmissionError(
                    f"unknown key {where}.{shown(key)}={shown(value)}; {close_to(key, known)}"
                    f"valid: kind, help, {', '.join(known)}"
                )
        missing = [
            each.name
            for each in fields
            if each.default is dataclasses.MISSING
            and each.default_factory is dataclasses.MISSING
            and each.name not in choice.values
        ]
        if missing:
            raise SubmissionError(f"{where}: kind={entry.kind} needs {', '.join(missing)}")
        try:
            for key in choice.keys.values():
                key.check(key.default)
            config = offer.combine({**offer.chosen({}), group: choice}, {})
            kept = from_yaml(to_yaml(config))
        except (ConfigError, SubmissionError) as error:
            raise SubmissionError(f"{where}: {error}") from error
        if kept != config:
            raise SubmissionError(
                f"{where}: a value would be read as another, as ${{...}} is; write it otherwise"
            )


def _check_defaults(offer: Offer) -> None:
    """Check that whoever sets nothing gets what would be accepted."""
    for key in _offered(offer).values():
        try:
            key.check(key.default)
        except SubmissionError as error:
            raise SubmissionError(f"the default {error}; set another in defaults.values") from error


def _offered(offer: Offer) -> dict[str, Key]:
    """Return all keys that some job may set."""
    found = dict(offer.top_keys)
    for named in offer.groups.values():
        for choice in named.values():
            found |= choice.keys
    return found
