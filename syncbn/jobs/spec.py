"""What was submitted and accepted, as the store keeps it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from syncbn.errors import JobError


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A job as it was accepted; `Catalog.configuration` makes what the trainer reads of it.

    Attributes:
        name: of the job.
        choices: the choice of each group for which one was made.
        values: what was set, by keys with dots: a scalar, or a list of scalars.
        publish: the model's name under the server's directory of models; None: it is not published.
        priority: larger ones are started first, from -100 to 100.
        retries: how often it is started again after it was lost or a rank died.
        nproc: how many replicas it has.
        cores: that it gets; None: one for each replica.
        device: "auto", "cpu" or "cuda".
        sweep_values: what this job has of the values and choices that its sweep varies; all of it
            stands in `choices` and `values` too.
    """

    name: str
    choices: Mapping[str, str] = field(default_factory=dict[str, str])
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    publish: str | None = None
    priority: int = 0
    retries: int = 0
    nproc: int = 2
    cores: int | None = None
    device: str = "auto"
    sweep_values: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON that `from_json` reads back, now and in later versions."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "JobSpec":
        """Return what `to_json` wrote, now or in another version.

        What this version does not know is passed over, and what the other one did not know is as
        the defaults are.

        Raises:
            JobError: it has no name, or is no JSON object at all.
        """
        known = {each.name for each in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in stored.items() if key in known})
        except (AttributeError, TypeError) as error:
            raise JobError(f"not a job as it is stored: {error}") from error
