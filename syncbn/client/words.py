"""What is known of jobs in words and numbers for people."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from syncbn.client.results import Comparison, Job, Key, Metrics, Options, Value
from syncbn.client.tables import Column, table_lines
from syncbn.errors import SubmissionError

_TELLING = ("val_accuracy", "val_mean_iou")
# What a line of metrics holds besides, which a job's progress tells.
_NOT_MEASURED = ("epoch", "step", "time", "best", "lr", "skipped_steps", "images_per_s")
_FEW = 8  # choices that are told unasked


def plain(text: object) -> str:
    """Return a text on one line that does nothing to a terminal but appear."""
    letters = (letter if letter.isprintable() else " " for letter in str(text))
    return " ".join("".join(letters).split())


def inert(text: str) -> str:
    """Return a text of several lines with what does something to a terminal written out."""
    return "".join(
        letter
        if letter.isprintable() or letter in "\n\t"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def shown(value: Value) -> str:
    """Return a value as it is typed."""
    if isinstance(value, list):
        return f"[{','.join(shown(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return plain(value)


def pairs(values: Mapping[str, Value]) -> str:
    """Return values as they are typed, one after the other."""
    return " ".join(f"{key}={shown(value)}" for key, value in values.items())


def duration(seconds: float | None) -> str:
    """Return a duration in its two largest units, such as "3 min 07 s"; empty for none."""
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{max(seconds, 0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def moment(seconds: float | None) -> str:
    """Return a time as the clock on the wall shows it; empty for none."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def telling_metric(every: Iterable[Metrics | None]) -> str:
    """Return the metric that tells most of jobs: one of the validation data, if they have one."""
    names = dict.fromkeys(name for metrics in every for name in metrics or {})
    losses = ("val_loss", "train_loss")
    others = [
        name
        for prefix in ("val_", "test_", "train_")
        for name in names
        if name.startswith(prefix) and name not in losses
    ]
    return next((name for name in (*_TELLING, *others, *losses) if name in names), _TELLING[0])


def measure(name: str, *values: float | None) -> str:
    """Return a metric, or its mean ± its deviation, to a few digits; shares in percent."""
    is_share = name.endswith(("accuracy", "iou"))
    scale, digits = (100, ".2f") if is_share else (1, ".4g")
    numbers = [format(scale * value, digits) for value in values if value is not None]
    return " ± ".join(numbers) + (" %" if is_share and numbers else "")


def _state(job: Job) -> str:
    is_on_the_way = job.wanted is not None and not job.has_ended
    return f"{job.state}, to be {job.wanted}" if is_on_the_way else job.state


def job_line(job: Job) -> str:
    """Return where a job is on one line."""
    state, end = _state(job), ""
    if job.has_ended and job.started is not None and job.ended is not None:
        end = f" after {duration(job.ended - job.started)}"
    reason = plain(job.reason or job.waiting_for or "")
    said = [reason] if reason and reason != job.state else []
    name = telling_metric([job.metrics])
    if value := measure(name, (job.metrics or {}).get(name)):
        said.append(f"{name} {value}")
    told = f": {', '.join(said)}" if said else ""
    return f"{job.id}  {plain(job.name)}  {state}{end}{told}"


def progress_words(job: Job) -> str:
    """Return how far a job is; empty if nothing is known."""
    progress = job.progress
    if progress is None:
        return ""
    parts = ["" if progress.fraction is None else f"{progress.fraction:.0%}".replace("%", " %")]
    if progress.epoch is not None and progress.epochs is not None:
        parts.append(f"epoch {progress.epoch:.3g} of {progress.epochs:g}")
    if progress.images_per_s is not None:
        parts.append(f"{progress.images_per_s:.4g} images/s")
    if progress.time_left_s is not None and not job.has_ended:
        parts.append(f"{duration(progress.time_left_s)} left")
    return ", ".join(part for part in parts if part)


def list_columns(jobs: Sequence[Job]) -> list[Column]:
    """Return the table of a list of jobs."""
    now = time.time()
    metric = telling_metric(job.metrics for job in jobs)
    active = [None if job.has_ended else job.progress for job in jobs]
    fractions = [each.fraction if each else None for each in active]
    left = [each.time_left_s if each else None for each in active]
    ages = [None if job.submitted is None else now - job.submitted for job in jobs]
    values = [(job.metrics or {}).get(metric) for job in jobs]
    states = [_state(job) for job in jobs]
    is_shared = len({job.owner for job in jobs}) > 1
    done = ["" if part is None else f"{100 * part:.0f} %" for part in fractions]
    return [
        Column("id", [job.id for job in jobs]),
        Column("name", [plain(job.name) for job in jobs], least=12, cut="middle"),
        Column("state", states),
        Column("done", done, is_number=True),
        Column("left", [duration(each) for each in left], is_number=True),
        Column(metric, [measure(metric, value) for value in values], is_number=True),
        Column("owner", [plain(job.owner) * is_shared for job in jobs], least=8),
        Column("age", [" ".join(duration(age).split()[:2]) for age in ages], is_number=True),
        Column("varies", [pairs(job.sweep_values) for job in jobs], least=10),
        Column("reason", [plain(job.reason or "") for job in jobs], least=12),
    ]


def job_lines(job: Job, width: int | None) -> Iterator[str]:
    """Yield all that is known of a job."""
    yield f"{plain(job.name)} ({job.id}), job {job.number} of {plain(job.owner)}"
    reason = plain(job.reason or "")
    taken = f"{job.cores} cores, {job.gpus} GPUs, {job.device}"
    rows = {
        "state": _state(job) + f": {reason}" * (reason not in ("", job.state)),
        "waits for": plain(job.waiting_for or ""),
        "progress": progress_words(job),
        "metrics": ", ".join(
            f"{name} {measure(name, value)}"
            for name, value in (job.metrics or {}).items()
            if name not in _NOT_MEASURED
        ),
        "objective": "" if job.objective is None else f"{job.objective:.6g}",
        "submitted": moment(job.submitted),
        "started": moment(job.started),
        "ended": moment(job.ended),
        "takes": f"{taken}; priority {job.priority}, retries {job.retries}",
        "sweep": f"{job.sweep}: {pairs(job.sweep_values)}" if job.sweep else "",
        "choices": pairs({**job.choices}),
        "values": pairs(job.values),
        "changed": ", ".join(
            f"{key}={shown(change.value)} (default {shown(change.default)})"
            for key, change in job.changed.items()
        ),
        "published": ", ".join(f"{each.model}/{each.version}" for each in job.published)
        or (f"as {job.publish} when it is finished" if job.publish else ""),
        "actions": ", ".join(job.actions),
    }
    for title, text in rows.items():
        if text:
            yield f"{title:9}  {text}"
    if job.attempts:
        yield ""
        attempts = job.attempts
        took = [
            None if each.started is None or each.ended is None else each.ended - each.started
            for each in attempts
        ]
        reasons = [plain(each.reason or each.reason_code or "") for each in attempts]
        yield from table_lines(
            [
                Column("attempt", [str(each.number) for each in attempts], is_number=True),
                Column("status", [each.status or "" for each in attempts]),
                Column("started", [moment(each.started) for each in attempts]),
                Column("took", [duration(each) for each in took], is_number=True),
                Column("reason", reasons, least=16),
            ],
            width,
        )
    if job.transitions:
        yield ""
        past = job.transitions
        yield from table_lines(
            [
                Column("time", [moment(each.time) for each in past]),
                Column("state", [each.state for each in past]),
                Column("by", [plain(each.by or "") for each in past], least=8),
                Column("reason", [plain(each.reason or "") for each in past], least=16),
            ],
            width,
        )


def comparison_lines(
    comparison: Comparison, metric: str | None, width: int | None
) -> Iterator[str]:
    """Yield jobs side by side, and groups of them if some are alike but for the seed.

    Raises:
        SubmissionError: no job has that metric.
    """
    jobs = comparison.jobs
    known = dict.fromkeys(name for job in jobs for name in job.metrics or {})
    if metric is not None and metric not in known:
        raise SubmissionError(f"--metric {metric}: is unknown; valid: {', '.join(known) or 'none'}")
    name = metric or telling_metric(job.metrics for job in jobs)
    values = [(job.metrics or {}).get(name) for job in jobs]
    objectives = ["" if job.objective is None else f"{job.objective:.4g}" for job in jobs]
    yield from table_lines(
        [
            Column("id", [job.id for job in jobs]),
            Column("name", [plain(job.name) for job in jobs], least=12, cut="middle"),
            Column("state", [job.state for job in jobs]),
            Column(name, [measure(name, value) for value in values], is_number=True),
            Column("objective", objectives, is_number=True),
            *(
                Column(key, [shown(of_job.get(job.id)) for job in jobs])
                for key, of_job in comparison.keys.items()
                if key != "name"
            ),
        ],
        width,
    )
    groups = comparison.groups
    if all(group.n < 2 for group in groups):
        return
    yield ""
    keys = dict.fromkeys(key for group in groups for key in group.values)
    means = [measure(name, group.mean.get(name), group.deviation.get(name)) for group in groups]
    yield from table_lines(
        [
            *(Column(key, [shown(group.values.get(key)) for group in groups]) for key in keys),
            Column("n", [str(group.n) for group in groups], is_number=True),
            Column(f"{name}, mean ± deviation", means, is_number=True),
        ],
        width,
    )


def options_lines(options: Options, names: Sequence[str], width: int | None) -> Iterator[str]:
    """Yield what may be submitted.

    Args:
        options: all of it.
        names: of groups, or the beginnings of keys; none: groups, and the keys of no group.
        width: which no line exceeds.

    Raises:
        SubmissionError: there is nothing of that name.
    """
    groups = {name: group for name, group in options.groups.items() if not names or name in names}
    rows = [
        (f"{name}={choice}", "default" * (choice == group.default), plain(each.help))
        for name, group in groups.items()
        for choice, each in group.choices.items()
    ]
    yield from _three("choice", "", rows, width)
    of_groups = [
        key
        for group in options.groups.values()
        for choice in group.choices.values()
        for key in choice.values
    ]
    # A key of several choices of a group is told once; its default may be another one in each.
    every = {key.key: key for key in [*options.job, *options.values, *(of_groups if names else [])]}
    wanted = [key for name, key in every.items() if not names or name.startswith(tuple(names))]
    if not rows and not wanted:
        valid = ", ".join(options.groups)
        raise SubmissionError(
            f"{' '.join(names)}: there is no such group or key; the groups are {valid}"
        )
    if rows and wanted:
        yield ""
    described = [
        (key.key, _described(key, is_whole=names == [key.key]), plain(key.help)) for key in wanted
    ]
    yield from _three("key", "value", described, width)


def _three(
    first: str, second: str, rows: Sequence[tuple[str, str, str]], width: int | None
) -> Iterator[str]:
    names, values, helps = zip(*rows, strict=True) if rows else ((), (), ())
    columns = [Column(first, names), Column(second, values, least=20), Column("", helps, least=20)]
    return table_lines(columns, width)


def _described(key: Key, is_whole: bool) -> str:
    """Return what is valid for a key, and its default."""
    if len(key.choices) > _FEW and not is_whole:
        valid = f"one of {len(key.choices)} names"
    elif key.choices:
        valid = ", ".join(map(shown, key.choices))
    else:
        bounds = {
            "above": key.exclusive_minimum,
            "at least": key.minimum,
            "below": key.exclusive_maximum,
            "at most": key.maximum,
        }
        limits = [f"{word} {value:.15g}" for word, value in bounds.items() if value is not None]
        valid = f"{key.type} {' and '.join(limits)}".strip()
    return f"{valid}{' or null' if key.nullable else ''}; default {shown(key.default)}"
