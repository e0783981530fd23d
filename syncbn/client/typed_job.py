"""From what is typed to what is submitted: which words choose, which set values, which vary."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, cast

from syncbn.client.calls import Submission
from syncbn.client.overrides import Override, read_overrides
from syncbn.client.results import Key, Options, Value
from syncbn.errors import SubmissionError


def typed_submission(
    typed: Sequence[str], options: Options, *, is_sweep: bool = False
) -> Submission:
    """Return what a command line submits.

    Whether values are valid is left to the service; names that it does not have are refused here
    if one is close, as the service does not know whether a group or a key was meant.

    Args:
        typed: words such as norm=sync, optim.lr=0.05 and priority=5.
        options: what may be submitted.
        is_sweep: whether keys may have several values.

    Raises:
        SubmissionError: a word has no form that can be submitted, or a name is unknown.
    """
    keys = {key.key: key for key in _all_keys(options)}
    about_job = {key.key: key for key in options.job}
    choices: dict[str, str] = {}
    values: dict[str, Value] = {}
    sweep: dict[str, Sequence[Value]] = {}
    said: dict[str, Any] = {}
    for override in read_overrides(typed, is_sweep):
        name = override.key
        is_group = name in options.groups
        if not is_group and name not in keys and name not in about_job:
            _refuse_if_close(name, [*options.groups, *keys, *about_job], typed)
        meant = _meant(override, is_group, keys.get(name, about_job.get(name)))
        if len(meant) > 1 and name in about_job:
            raise SubmissionError(f"{name}: is of all jobs of a sweep, and cannot vary in it")
        if len(meant) > 1:
            sweep[name] = meant
        elif is_group:
            choices[name] = cast(str, meant[0])
        elif name in about_job:
            said[name] = meant[0]
        else:
            values[name] = meant[0]
    return Submission(choices=choices, values=values, sweep=sweep, **said)


def typed_values(typed: Sequence[str]) -> dict[str, Value]:
    """Return the values that a job goes on with.

    Raises:
        SubmissionError: as `typed_submission`.
    """
    return {each.key: each.values[0] for each in read_overrides(typed, is_sweep=False)}


def _all_keys(options: Options) -> Iterable[Key]:
    yield from options.values
    for group in options.groups.values():
        for choice in group.choices.values():
            yield from choice.values


def _meant(override: Override, is_group: bool, key: Key | None) -> Sequence[Value]:
    """Return the values; what looks like a number is a text if the key wants one."""
    wants_text = is_group or (key is not None and key.type in ("string", "enum"))
    return [
        text if wants_text and isinstance(value, bool | int | float) else value
        for value, text in zip(override.values, override.texts, strict=True)
    ]


def _refuse_if_close(name: str, known: Sequence[str], typed: Sequence[str]) -> None:
    close = [each for each in known if each.rpartition(".")[2] == name]
    close += difflib.get_close_matches(name, known, n=1)
    if close:
        (word,) = (each for each in typed if each.lstrip("+").startswith(f"{name}="))
        raise SubmissionError(
            f"{word}: there is no {name}; did you mean {' or '.join(dict.fromkeys(close))}?"
        )
