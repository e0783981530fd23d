"""Jobs on the terminal while they run: a progress bar each, and a line for what has happened."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self, TextIO

import msgspec

from syncbn.client.results import Job
from syncbn.client.words import duration, job_line, measure, plain, telling_metric

# The command ends with the first of them that a job is in.
EXIT_CODES = {"failed": 1, "lost": 4, "cancelled": 3, "finished": 0}
_MOST_BARS = 8
_ACTIVE = ("starting", "running", "stopping")
_ALL = ""  # the bar over all jobs of a sweep
_FORMAT = "{desc} {percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}{postfix}"


class Screen(Protocol):
    """Where it is told how jobs are."""

    def show(self, jobs: Sequence[Job], changed: Sequence[Job]) -> None:
        """Tell how all jobs are, of which some came into another state."""
        ...


def watch_jobs(seen: Iterable[Sequence[Job]], screen: Screen) -> int:
    """Show jobs until all have ended, and return the exit code that tells how.

    Args:
        seen: all of the jobs, whenever one has changed.
        screen: where they are shown.
    """
    known: dict[str, tuple[str, int]] = {}
    jobs: Sequence[Job] = ()
    for jobs in seen:
        changed = [job for job in jobs if known.get(job.id) != (job.state, job.attempt)]
        known.update({job.id: (job.state, job.attempt) for job in jobs})
        screen.show(jobs, changed)
    states = {job.state for job in jobs}
    return next((code for state, code in EXIT_CODES.items() if state in states), 0)


class Lines:
    """A line for each job that came into another state; as JSON for each change."""

    def __init__(self, output: TextIO, as_json: bool) -> None:
        self._output, self._as_json = output, as_json
        self._told: dict[str, Job] = {}

    def show(self, jobs: Sequence[Job], changed: Sequence[Job]) -> None:
        """Tell what has changed."""
        if not self._as_json:
            for job in changed:
                print(job_line(job), file=self._output, flush=True)
            return
        for job in jobs:
            if self._told.get(job.id) != job:
                self._told[job.id] = job
                print(msgspec.json.encode(job).decode(), file=self._output, flush=True)


class Bars:
    """The same lines, and below them a bar for each job that runs, and one over all of a sweep."""

    def __init__(self, output: TextIO, terminal: TextIO) -> None:
        self._output, self._terminal = output, terminal
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._bars):
            self._bars.pop(name).close()

    def show(self, jobs: Sequence[Job], changed: Sequence[Job]) -> None:
        """Tell what has changed, and move the bars."""
        active = {job.id: job for job in jobs if job.state in _ACTIVE and job.progress}
        for name in self._bars.keys() - {_ALL, *active}:
            self._bars.pop(name).close()
        for job in changed:
            self._write(job_line(job))
        if len(jobs) > 1:
            running = sum(job.state in _ACTIVE for job in jobs)
            ended = sum(job.has_ended for job in jobs)
            self._move(_ALL, f"{len(jobs)} jobs", ended, len(jobs), [f"{running} running"])
        for name, job in active.items():
            if name in self._bars or len(self._bars) < _MOST_BARS:
                assert job.progress is not None
                title = f"{plain(job.name)} {job.progress.phase or job.state}"
                self._move(name, title, job.progress.step, job.progress.total_steps, _told(job))

    def _write(self, line: str) -> None:
        from tqdm import tqdm  # which takes a tenth of a second

        tqdm.write(line, file=self._output)

    def _move(
        self, name: str, title: str, done: int, total: int | None, told: Sequence[str]
    ) -> None:
        from tqdm import tqdm

        if name not in self._bars:
            self._bars[name] = tqdm(
                desc=title,
                initial=done,
                total=total,
                file=self._terminal,
                leave=False,
                dynamic_ncols=True,
                bar_format=_FORMAT,
            )
        bar = self._bars[name]
        bar.total, bar.n = total, done
        bar.set_description_str(title, refresh=False)
        bar.set_postfix_str(", ".join(told), refresh=False)
        bar.refresh()


def _told(job: Job) -> list[str]:
    """Return what stands beside a job's bar."""
    assert job.progress is not None
    metric = telling_metric([job.metrics])
    value = measure(metric, (job.metrics or {}).get(metric))
    left_s, per_s = job.progress.time_left_s, job.progress.images_per_s
    told = [
        "" if left_s is None else f"{duration(left_s)} left",
        f"{metric} {value}" if value else "",
        "" if per_s is None else f"{per_s:.4g} images/s",
    ]
    return [text for text in told if text]
