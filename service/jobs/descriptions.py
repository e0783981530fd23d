"""Jobs and what happened to them in the API's words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from service.auth import Identity, Scope
from syncbn.jobs.job import DispatcherInfo, Event, Job
from syncbn.jobs.states import ACTIVE, State, allowed_actions

# A dispatcher says each second that it lives.
_SILENT_S = 10.0


def may_change(identity: Identity, job: Job) -> bool:
    """Return whether somebody may change a job: its owner, and whoever may do everything."""
    is_owner = job.owner == identity.label and identity.may(Scope.JOBS_WRITE)
    return is_owner or identity.may(Scope.ADMIN)


def job_body(job: Job, identity: Identity) -> dict[str, Any]:
    """Return a job as lists and events show it.

    Args:
        job: the job.
        identity: who asks, which decides on the actions that are offered.
    """
    actions = allowed_actions(job.state, is_archived=job.archived)
    return {
        "kind": "job",
        "id": job.id,
        "number": job.number,
        "name": job.name,
        "owner": job.owner,
        "state": job.state,
        "reason_code": job.reason_code,
        "reason": _reason(job),
        "wanted": job.wanted,
        "sweep": job.sweep,
        "sweep_values": job.sweep_values,
        "choices": job.spec.choices,
        "values": job.values,
        "publish": job.spec.publish,
        "published": job.published,
        "priority": job.spec.priority,
        "retries": job.spec.retries,
        "cores": job.cores,
        "gpus": job.gpus,
        "device": job.device,
        "attempt": job.attempt,
        "waiting_for": job.waiting_for,
        **progress_body(job),
        "objective": job.objective,
        "submitted": job.submitted,
        "started": job.started,
        "ended": job.ended,
        "archived": job.archived,
        "actions": actions if may_change(identity, job) else (),
    }


def progress_body(job: Job) -> dict[str, Any]:
    """Return how far a job is, and its newest metrics, both null before it has said so."""
    if job.progress is None:
        return {"progress": None, "metrics": None}
    metrics = job.progress.get("metrics") or None
    if _is_outdated(job, job.progress):
        return {"progress": None, "metrics": metrics}
    said = {key: value for key, value in job.progress.items() if key != "metrics"}
    step, total = said.get("step"), said.get("total_steps")
    fraction = min(1.0, step / total) if isinstance(step, int | float) and total else None
    return {"progress": said | {"fraction": fraction}, "metrics": metrics}


def _is_outdated(job: Job, said: Mapping[str, Any]) -> bool:
    """Return whether an attempt is under way that has not said anything yet."""
    updated = said.get("updated")
    return (
        job.state in ACTIVE
        and job.started is not None
        and isinstance(updated, int | float)
        and updated < job.started
    )


def _reason(job: Job) -> str:
    """Return why a job is where it is; of one that trains, what it does just now."""
    said = job.progress
    if job.reason or job.state != State.running or said is None or _is_outdated(job, said):
        return job.reason
    if not said.get("total_steps"):
        return str(said.get("phase", ""))
    return f"{said.get('phase')}, step {said.get('step')} of {said.get('total_steps')}"


def transition_bodies(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the states that a job has been in, oldest first."""
    return [
        {
            "state": event.data.get("state"),
            "time": event.time,
            "reason_code": event.data.get("reason_code"),
            "reason": event.data.get("reason") or "",
            "by": event.data.get("by"),
        }
        for event in events
        if event.kind == "state"
    ]


def note_bodies(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return what else happened to a job: what was asked for, published, refused; oldest first."""
    return [
        {"time": event.time, "kind": event.kind, "data": event.data}
        for event in events
        if event.kind != "state"
    ]


def attempt_bodies(results: Sequence[Any]) -> list[dict[str, Any]]:
    """Return how a job's attempts ended, as the trainer wrote it, in their order."""
    return [
        {
            "number": result.attempt,
            "started": result.started,
            "ended": result.ended,
            "status": result.status,
            "reason_code": result.reason,
            "reason": result.error or "",
            "exit_code": result.exit_code,
        }
        for result in results
    ]


def dispatcher_body(about: DispatcherInfo | None, now: float) -> dict[str, Any] | None:
    """Return who starts the jobs, or started them last; null if nobody ever has.

    Args:
        about: what it last said of itself.
        now: in Unix seconds.
    """
    if about is None:
        return None
    return asdict(about) | {"alive": now - about.seen <= _SILENT_S}


def changed_keys(job: Job, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the choices and values of a job that are not the defaults, each with its default.

    Args:
        job: the job.
        options: what `Catalog.options` returned.
    """
    groups: Mapping[str, Any] = options["groups"]
    chosen = {name: group["default"] for name, group in groups.items()} | dict(job.spec.choices)
    changed = {
        name: {"default": groups[name]["default"], "value": choice}
        for name, choice in job.spec.choices.items()
        if name in groups and choice != groups[name]["default"]
    }
    keys = list(options["values"])
    for name, choice in chosen.items():
        keys += groups.get(name, {}).get("choices", {}).get(choice, {}).get("values", ())
    defaults = {key["key"]: key["default"] for key in keys}
    for name, value in job.values.items():
        if name not in defaults or value != defaults[name]:
            changed[name] = {"default": defaults.get(name), "value": value}
    return changed
