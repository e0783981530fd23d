"""The files of jobs: what the dispatcher writes for the trainer, and what the trainer tells."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from syncbn.errors import ConfigError, JobError, SyncBNError
from syncbn.jobs.dispatch.runs import Outcome
from syncbn.jobs.job import Job
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.states import State
from syncbn.jobs.workspace import Workspace
from syncbn.train.changes import check_changes, resumed_config
from syncbn.train.run.directory import is_more, open_run
from syncbn.train.run.publish import MANIFEST_FILE, publish, published_version

log = logging.getLogger(__name__)

_TAIL_BYTES = 1 << 16


class RunFiles:
    """The runs in a store's directory.

    Args:
        root: of the store.
        catalog: makes configurations of what was submitted.
        models: where models are published; None: nowhere.
    """

    def __init__(self, root: Path, catalog: Catalog, models: Path | None) -> None:
        self._root = root.resolve()
        self._catalog = catalog
        self._models = None if models is None else models.resolve()

    def prepare(self, job: Job) -> None:
        """Open the run directory, which sets the result of the attempt before aside."""
        workspace = Workspace.of_job(self._root, job.id)
        workspace.directory.mkdir(parents=True, exist_ok=True)
        run = workspace.run
        overrides: list[str] | None = None
        # Replicas that die are started again in place, which is faster than an attempt.
        restarts = max(0, job.spec.retries - job.failures)
        if run.config_file.is_file():
            config = run.read_config()
            overrides = _overrides(job.arguments)
            if config.launch.max_restarts != restarts:
                overrides.append(f"launch.max_restarts={restarts}")
        else:
            config = self._catalog.configuration(
                # With what was asked for since the submission, as it may have waited until then.
                replace(job.spec, values=job.values),
                run_dir=run.path,
                publish_dir=self._models,
                threads=max(1, job.cores // job.spec.nproc),
                device=job.device,
                max_restarts=restarts,
            )
        try:
            open_run(config, overrides).lock.close()
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):  # such as a full disk: not the job's fault
                raise error.__cause__ from error
            raise
        workspace.allow(job.attempt)

    def check(self, job: Job, arguments: Mapping[str, Any]) -> None:
        """Refuse what may not change, and what adds nothing to a run that has finished."""
        run = Workspace.of_job(self._root, job.id).run
        stored = run.read_config()
        overrides = _overrides(arguments)
        config = resumed_config(stored, overrides)
        check_changes(run.path, stored, config)
        if job.state == State.finished and not is_more(run, config, overrides):
            raise ConfigError(
                f"job {job.id} has finished, and {arguments or 'this'} adds nothing to it: ask for "
                "more epochs than it has made"
            )

    def revoke(self, job: Job) -> None:
        """Take the permit to run away."""
        Workspace.of_job(self._root, job.id).revoke()

    def is_free(self, job: Job) -> bool:
        """Return whether nobody has the lock of the run."""
        return not Workspace.of_job(self._root, job.id).is_held()

    def outcome(self, job: Job) -> Outcome:
        """Return what result.json, status.json and the end of metrics.jsonl say of this attempt."""
        workspace = Workspace.of_job(self._root, job.id)
        if workspace.prepared() != job.attempt:  # a kill came first: they tell of the one before
            return Outcome(None, None)
        run = workspace.run
        status = run.read_status()
        if status is not None:
            status["metrics"] = _last_line(run.metrics_file)
        return Outcome(run.read_result(), status)

    def publish(self, job: Job, model: str) -> dict[str, Any]:
        """Copy the bundle to `models/NAME/VERSION`, with the version after the newest."""
        if self._models is None:
            raise JobError("the dispatcher does not know where models are served from")
        workspace = Workspace.of_job(self._root, job.id)
        bundle = workspace.run.bundle_dir
        renamed = workspace.directory / "bundle.renamed"
        try:
            manifest = json.loads((bundle / MANIFEST_FILE).read_text())
            if manifest["name"] != model:  # a TypeError or a KeyError if it is no manifest
                shutil.rmtree(renamed, ignore_errors=True)
                shutil.copytree(bundle, renamed)
                (renamed / MANIFEST_FILE).write_text(json.dumps(manifest | {"name": model}))
                bundle = renamed
            path = publish(bundle, self._models, model)
        except (OSError, ValueError, LookupError, TypeError, SyncBNError) as error:
            # What the trainer says besides is for whoever started it by a command.
            why = error.__cause__ or error
            raise JobError(f"job {job.id} could not be published as {model}: {why}") from error
        finally:
            shutil.rmtree(renamed, ignore_errors=True)
        return {"model": model, "version": int(path.name)}

    def published(self, job: Job) -> list[dict[str, Any]]:
        """Return where a bundle equal to the run's is among those that are served."""
        model = job.spec.publish
        if self._models is None or model is None:
            return []
        bundle = Workspace.of_job(self._root, job.id).run.bundle_dir
        try:
            version = published_version(bundle, self._models, model)
        except OSError as error:  # such as a version of another user, which this one may not read
            log.warning("job %s: cannot tell what it published: %s", job.id, error)
            return []
        return [] if version is None else [{"model": model, "version": version}]

    def discard(self, job: Job) -> None:
        """Remove the checkpoints; configuration, metrics, logs and bundle stay."""
        shutil.rmtree(Workspace.of_job(self._root, job.id).run.checkpoints_dir, ignore_errors=True)


def _overrides(arguments: Mapping[str, Any]) -> list[str]:
    """Return what was asked for as the command line has it; all of it passed the allow-list."""
    return [f"{key}={json.dumps(value)}" for key, value in arguments.items()]


def _last_line(file: Path) -> dict[str, Any]:
    """Return the last whole line of a file of JSON objects; empty if there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
        line = json.loads(lines[-1])
    except (OSError, ValueError, IndexError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}
