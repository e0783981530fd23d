"""From what somebody sent to jobs that may be queued: checked, and sweeps expanded.

What is sent is JSON, and never becomes an argument of Hydra, a reference of OmegaConf, a path or
code: its texts are compared with what the schemas list, and its numbers with their ranges.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from syncbn.errors import SubmissionError
from syncbn.jobs.offer.key import Key
from syncbn.jobs.offer.offer import Offer
from syncbn.jobs.offer.settings import SETTINGS_FILE
from syncbn.jobs.offer.values import close_to, shown
from syncbn.jobs.spec import JobSpec
from syncbn.train.schema.resume import why_fixed

_NAMES = "letters, digits, '.', '_' and '-', the first a letter or digit, at most {length}"
_NAME_LENGTH = 100  # with the number of a sweep's job behind it, it is still a name for a bundle
_MODEL_LENGTH = 128
_OBJECTS = ("choices", "values", "sweep")
# More than there are keys; an error is due before each of them is looked at.
_MOST_KEYS = 256


def job_keys(offer: Offer) -> dict[str, Key]:
    """Return what a submission says of the job itself, beside choices and values."""
    every: list[Key] = [
        Key(
            key="name",
            kind="string",
            nullable=True,
            pattern=_pattern(_NAME_LENGTH),
            form=_NAMES.format(length=_NAME_LENGTH),
            help="The job's name; null: that of the data and of the model.",
        ),
        Key(
            key="publish",
            kind="string",
            nullable=True,
            pattern=_pattern(_MODEL_LENGTH),
            form=_NAMES.format(length=_MODEL_LENGTH),
            help="The model that the bundle becomes the next version of, to be served; null: none.",
        ),
        Key(
            key="priority",
            kind="integer",
            default=0,
            minimum=-100,
            maximum=100,
            help="Of jobs that wait, those with a larger one start first.",
        ),
        Key(
            key="retries",
            kind="integer",
            default=0,
            minimum=0,
            maximum=10,
            help="How often it starts again after a replica or its machine died.",
        ),
        Key(
            key="cores",
            kind="integer",
            nullable=True,
            minimum=1,
            maximum=offer.settings.limits.cores,
            help="Cores of the CPU that all replicas together get; null: one for each.",
        ),
        Key(
            key="device",
            kind="enum",
            default="auto",
            choices=("auto", "cpu", "cuda"),
            help="Where replicas compute; auto: on GPUs if there are enough.",
        ),
    ]
    return {key.key: key for key in every}


def check_submission(offer: Offer, submission: object) -> list[JobSpec]:
    """Return the jobs that a submission asks for: one, or those of its sweep.

    The jobs of a sweep are called NAME-1, NAME-2 and so on; the first key of the sweep varies
    slowest.

    Raises:
        SubmissionError: a key is unknown or not for a submission, a value has the wrong type or is
            out of range, values do not fit each other, or the sweep is too large.
    """
    sent = _object("the submission", submission)
    known = job_keys(offer)
    for field in sent:
        if field not in known and field not in _OBJECTS:
            raise SubmissionError(
                f"{shown(field)}={shown(sent[field])}: unknown; "
                f"{close_to(field, (*known, *_OBJECTS))}valid: {', '.join((*known, *_OBJECTS))}"
            )
    job: dict[str, Any] = {
        name: key.check(sent.get(name, key.default)) for name, key in known.items()
    }
    choices, values, sweep = (_object(name, sent.get(name, {})) for name in _OBJECTS)
    _check_sweep(offer, choices, values, sweep)
    base = offer.chosen(choices)
    name = job.pop("name") or f"{base['data'].name}-{base['model'].name}"[:_NAME_LENGTH]
    specs: list[JobSpec] = []
    for varied in _combinations(sweep):
        number = f"-{len(specs) + 1}" if sweep else ""
        spec = JobSpec(
            **job,
            name=f"{name}{number}",
            choices={**choices, **{key: varied[key] for key in varied if key in offer.groups}},
            values={**values, **{key: varied[key] for key in varied if key not in offer.groups}},
            sweep_values=varied,
        )
        specs.append(checked_spec(offer, spec))
    _check_different(sweep, specs)
    return specs


def checked_spec(offer: Offer, spec: JobSpec) -> JobSpec:
    """Return a job with its values as the configuration has them.

    Raises:
        SubmissionError: a choice or a value is not offered, or values do not fit each other.
    """
    chosen = offer.chosen(spec.choices)
    keys = offer.keys(chosen)
    values: dict[str, Any] = {}
    for name, value in spec.values.items():
        if name not in keys:
            raise SubmissionError(offer.unknown_key(name, value, chosen))
        values[name] = keys[name].check(value)
    nproc = offer.assemble(chosen, values).launch.nproc
    varied = {key: values.get(key, value) for key, value in spec.sweep_values.items()}
    return replace(spec, values=values, sweep_values=varied, nproc=nproc)


def changed_spec(offer: Offer, spec: JobSpec, values: Mapping[str, Any]) -> JobSpec:
    """Return a job that has run, with other values, for the same run to go on with.

    Raises:
        SubmissionError: as `checked_spec`; or a value may not change once a run has begun.
    """
    sent = _object("values", values)
    for key, value in sent.items():
        if key in offer.keys(offer.chosen(spec.choices)) and (why := why_fixed(key)) is not None:
            raise SubmissionError(
                f"{key}={shown(value)}: cannot change in a run that goes on: {why}; submit a new "
                "job for it"
            )
    return checked_spec(offer, replace(spec, values={**spec.values, **sent}))


def _object(name: str, value: object) -> dict[str, Any]:
    """Return what was sent as a JSON object of not too many keys."""
    if not isinstance(value, dict) or len(cast(dict[Any, Any], value)) > _MOST_KEYS:
        raise SubmissionError(
            f"{name}={shown(value)}: must be a JSON object of at most {_MOST_KEYS} keys"
        )
    found = cast(dict[Any, Any], value)
    for key in found:
        if not isinstance(key, str):
            raise SubmissionError(f"{name}: {shown(key)} is no key; keys must be texts")
    return found


def _check_sweep(
    offer: Offer, choices: Mapping[str, Any], values: Mapping[str, Any], sweep: Mapping[str, Any]
) -> None:
    """Check what the grid is made of, before any job is."""
    most = offer.settings.limits.sweep_jobs
    for key, alternatives in sweep.items():
        if key in choices or key in values:
            raise SubmissionError(
                f"sweep.{shown(key)}={shown(alternatives)}: must not be in "
                f"{'choices' if key in choices else 'values'} too"
            )
        if not isinstance(alternatives, list) or not alternatives:
            raise SubmissionError(
                f"sweep.{shown(key)}={shown(alternatives)}: must be a list of the values to try"
            )
    jobs = math.prod(len(alternatives) for alternatives in sweep.values())
    if jobs > most:
        sizes = " × ".join(str(len(alternatives)) for alternatives in sweep.values())
        raise SubmissionError(
            f"sweep: {sizes} makes {jobs} jobs, and must make at most {most} "
            f"(limits.sweep_jobs of {SETTINGS_FILE}); leave out some values"
        )


def _combinations(sweep: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield every combination of a grid's values; an empty one if there is no grid."""
    for combination in itertools.product(*sweep.values()):
        yield dict(zip(sweep, combination, strict=True))


def _check_different(sweep: Mapping[str, Sequence[Any]], specs: Sequence[JobSpec]) -> None:
    """Check that no value of a grid is there twice, also as 1 and 1.0."""
    for key, alternatives in sweep.items():
        different = {json.dumps(spec.sweep_values[key]) for spec in specs}
        if len(different) < len(alternatives):
            raise SubmissionError(f"sweep.{key}={shown(alternatives)}: must not have a value twice")


def _pattern(length: int) -> str:
    return f"[A-Za-z0-9][A-Za-z0-9._-]{{0,{length - 1}}}"
