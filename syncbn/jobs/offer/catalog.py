"""The one door to what may be submitted: options, checks, and configurations for the trainer."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from syncbn.errors import SubmissionError
from syncbn.jobs.offer.administered import check_administered
from syncbn.jobs.offer.choice import GROUP_HELP
from syncbn.jobs.offer.offer import Offer
from syncbn.jobs.offer.settings import JobSettings
from syncbn.jobs.offer.submission import changed_spec, check_submission, checked_spec, job_keys
from syncbn.jobs.spec import JobSpec
from syncbn.train.schema import Device, TrainConfig


class Catalog:
    """What a server offers; made once, and then shared by all threads.

    The first one in a process takes about a second, in which Hydra composes conf/; nothing later
    takes Hydra.

    Args:
        settings: what the administrator decided.

    Raises:
        JobSettingsError: it does not fit the schemas; the message names the file, the key and the
            value.
    """

    def __init__(self, settings: JobSettings | None = None) -> None:
        self.settings = settings or JobSettings()
        self._offer = Offer(self.settings)
        check_administered(self._offer)

    def options(self) -> dict[str, Any]:
        """Return what may be submitted, as JSON: choices, keys with types and ranges, limits.

        It is the same object at each call, and not to be changed.
        """
        return self._options

    @cached_property
    def _options(self) -> dict[str, Any]:
        offer = self._offer
        return {
            "groups": {
                group: {
                    "default": offer.default_choices[group],
                    "help": GROUP_HELP[group],
                    "choices": {
                        name: {
                            "help": choice.help,
                            "values": [key.describe() for key in choice.keys.values()],
                        }
                        for name, choice in offered.items()
                    },
                }
                for group, offered in offer.groups.items()
            },
            "values": [key.describe() for key in offer.top_keys.values()],
            "job": [key.describe() for key in job_keys(offer).values()],
            "limits": asdict(self.settings.limits),
        }

    def check(self, submission: Mapping[str, Any]) -> list[JobSpec]:
        """Return the jobs that a submission asks for: one, or those of its sweep.

        The jobs of a sweep have `sweep_values`, and are called NAME-1, NAME-2 and so on.

        Args:
            submission: JSON with any of name, choices, values, sweep, publish, priority, retries,
                cores and device.

        Raises:
            SubmissionError: it cannot be accepted; the message names the key, the value and what
                is valid.
        """
        return check_submission(self._offer, submission)

    def changed(self, spec: JobSpec, values: Mapping[str, Any]) -> JobSpec:
        """Return a job with other values, for its run to go on with.

        Raises:
            SubmissionError: they cannot be accepted, or may not change once a run has begun.
        """
        return changed_spec(self._offer, spec, values)

    def configuration(
        self,
        spec: JobSpec,
        *,
        run_dir: Path,
        publish_dir: Path | None = None,
        threads: int | None = None,
        device: str | None = None,
        max_restarts: int = 0,
    ) -> TrainConfig:
        """Return what the trainer reads: the job, and what the server decides.

        Args:
            spec: as it was accepted; it is checked again, as what is offered may have changed.
            run_dir: where the job lies.
            publish_dir: the directory of models, for a job that is published.
            threads: of each replica; None: the trainer's own choice.
            device: where replicas compute; None: what the job asks for.
            max_restarts: how often its replicas are started again within an attempt.

        Raises:
            SubmissionError: the job is not offered any more, or is to be published nowhere.
        """
        offer = self._offer
        config = offer.assemble(offer.chosen(spec.choices), checked_spec(offer, spec).values)
        if spec.publish is not None and publish_dir is None:
            raise SubmissionError(
                f"publish={spec.publish}: must be null, as this server has no directory of models"
            )
        return replace(
            config,
            name=spec.publish or spec.name,
            run_dir=str(run_dir),
            publish=None if spec.publish is None else str(publish_dir),
            launch=replace(
                config.launch,
                threads=threads,
                device=Device(device or spec.device),
                max_restarts=max_restarts,
            ),
        )
