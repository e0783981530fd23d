"""What each command of `syncbn-jobs` asks and prints; they return the exit code."""

import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from syncbn.client.arguments import ACTIONS
from syncbn.client.blocking import JobsClient
from syncbn.client.calls import Submission
from syncbn.client.results import Job, Options, Sweep
from syncbn.client.tables import table_lines, width_of
from syncbn.client.typed_job import typed_submission, typed_values
from syncbn.client.watching import Bars, Lines, watch_jobs
from syncbn.client.words import (
    comparison_lines,
    inert,
    job_line,
    job_lines,
    list_columns,
    options_lines,
)
from syncbn.errors import JobActionError, ServerError, SubmissionError

_JOB_OPTIONS = ("name", "publish", "priority", "retries", "cores", "device", "idempotency_key")
_TAIL_BYTES = 1 << 17  # of a log, in which the last lines are looked for
# A dispatcher imports for some seconds before it is heard of.
_START_S = 5.0
_LOOK_S = 0.2


def submit(client: JobsClient, arguments: Namespace) -> int:
    """Submit a job or a sweep; print its identifier alone if nobody looks."""
    options = client.options()
    submission = typed_submission(arguments.words, options, is_sweep=arguments.sweep)
    if not _has_dispatcher(options) and sys.stderr.isatty():
        options = _wait_for_dispatcher(client)
    submitted = client.submit(**_with_options(submission, arguments))
    if not _has_dispatcher(options):
        _warn_without_dispatcher()
    if arguments.json:
        _print_json([submitted])
    elif sys.stdout.isatty():
        for line in _submitted_lines(submitted, is_watched=arguments.watch):
            print(line)
    else:
        print(submitted.id)
    return _watch(client, submitted, arguments) if arguments.watch else 0


def list_(client: JobsClient, arguments: Namespace) -> int:
    """Print a table of jobs."""
    limit: int = arguments.limit
    if limit < 0:
        raise SubmissionError(f"--limit {limit}: must be 0 or more jobs, of which 0 lists all")
    found = client.list(
        states=arguments.state,
        name=arguments.name,
        sweep=arguments.sweep,
        text=arguments.text,
        owner=arguments.owner,
        archived=arguments.archived,
        limit=min(limit + 1, 200) if limit > 0 else 200,
    )
    jobs = list(itertools.islice(found, limit + 1 if limit > 0 else None))
    shown = jobs[:limit] if limit > 0 else jobs
    if arguments.json:
        _print_json(shown)
    elif shown:
        _print(table_lines(list_columns(shown), width_of(sys.stdout)))
    elif sys.stdout.isatty():
        print("there is no such job")
    if len(jobs) > len(shown):
        print(f"there are more than {limit}; --limit 0 lists all", file=sys.stderr)
    return 0


def show(client: JobsClient, arguments: Namespace) -> int:
    """Print all that is known of jobs."""
    for index, word in enumerate(arguments.words):
        for place, job in enumerate(_jobs(client, word)):
            if arguments.json:
                _print_json([job])
                continue
            print("\n" * bool(index or place), end="")
            _print(job_lines(job, width_of(sys.stdout)))
    return 0


def watch(client: JobsClient, arguments: Namespace) -> int:
    """Show how far a job is until it has ended."""
    try:
        return _watch(client, client.show(arguments.id), arguments)
    except ServerError as error:
        if error.status != 404:
            raise
        jobs = tuple(client.list(sweep=arguments.id))
        if not jobs:
            raise
    return _watch(client, Sweep(id=arguments.id, jobs=jobs), arguments)


def log(client: JobsClient, arguments: Namespace) -> int:
    """Print a job's log; to a terminal without what would do something to it."""
    if arguments.tail is not None and arguments.tail < 0:
        raise SubmissionError(f"--tail {arguments.tail}: must be 0 or more lines")
    offset = 0 if arguments.tail is None else -_TAIL_BYTES
    parts = client.log(
        arguments.id, offset=offset, attempt=arguments.attempt, follow=arguments.follow
    )
    if arguments.tail is not None:
        lines = next(parts, "").splitlines(keepends=True)
        parts = itertools.chain(lines[len(lines) - min(arguments.tail, len(lines)) :], parts)
    for part in parts:
        if arguments.json:
            _print_json([{"text": part}])
        else:
            text = inert(part) if sys.stdout.isatty() else part
            print(text, end="", flush=arguments.follow)
    return 0


def act(client: JobsClient, arguments: Namespace) -> int:
    """Cancel, pause, retry or archive jobs."""
    method: Callable[[str], Job] = getattr(client, arguments.command)
    for word in arguments.words:
        _print_acted(_act_on_all(client, word, arguments.command, method), arguments)
    return 0


def resume(client: JobsClient, arguments: Namespace) -> int:
    """Have jobs go on."""
    values = typed_values(arguments.words) or None
    jobs = _act_on_all(client, arguments.id, "resume", lambda job: client.resume(job, values))
    _print_acted(jobs, arguments)
    return 0


def publish(client: JobsClient, arguments: Namespace) -> int:
    """Have a finished job's model served."""
    _print_acted([client.publish(arguments.id, arguments.model)], arguments)
    return 0


def compare(client: JobsClient, arguments: Namespace) -> int:
    """Print jobs side by side."""
    ids: list[str] = arguments.words
    try:
        found = client.compare(ids, arguments.by)
    except ServerError as error:
        if error.status != 404:
            raise
        ids = [job.id for word in ids for job in _jobs(client, word)]
        found = client.compare(ids, arguments.by)
    if arguments.json:
        _print_json([found])
    else:
        _print(comparison_lines(found, arguments.metric, width_of(sys.stdout)))
    return 0


def options(client: JobsClient, arguments: Namespace) -> int:
    """Print what may be submitted."""
    found = client.options()
    if arguments.json:
        _print_json([found])
    else:
        _print(options_lines(found, arguments.words, width_of(sys.stdout)))
    return 0


SUBCOMMANDS: Mapping[str, Callable[[JobsClient, Namespace], int]] = {
    "submit": submit,
    "list": list_,
    "show": show,
    "watch": watch,
    "log": log,
    **dict.fromkeys(ACTIONS, act),
    "resume": resume,
    "publish": publish,
    "compare": compare,
    "options": options,
}


def _with_options(submission: Submission, arguments: Namespace) -> Submission:
    """Return a submission with what the options say of the job.

    Raises:
        SubmissionError: the words say it too.
    """
    typed: dict[str, Any] = {**submission}
    options = {name: getattr(arguments, name) for name in _JOB_OPTIONS}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given.keys() & typed.keys():
        raise SubmissionError(f"{name}={typed[name]}: --{name} is there too; leave one out")
    return cast(Submission, typed | given)


def _submitted_lines(submitted: Job | Sweep, is_watched: bool) -> Iterator[str]:
    if isinstance(submitted, Job):
        yield job_line(submitted)
    else:
        yield f"{submitted.id}  {submitted.name}  a sweep of {len(submitted.jobs)} jobs"
    if not is_watched:
        yield f"syncbn-jobs watch {submitted.id} shows how far it is"


def _has_dispatcher(options: Options) -> bool:
    about = options.dispatcher
    return about is not None and about.get("alive") is not False


def _wait_for_dispatcher(client: JobsClient) -> Options:
    """Return the options once somebody starts jobs, or as they are after a few seconds.

    Whoever has just started a service on a terminal need not hear that its dispatcher is late.
    """
    deadline = time.monotonic() + _START_S
    while not _has_dispatcher(options := client.options()) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    return options


def _warn_without_dispatcher() -> None:
    print(
        "syncbn-jobs: warning: nobody starts jobs now; it waits until syncbn-dispatch runs, "
        "or syncbn-serve without --no-dispatcher",
        file=sys.stderr,
    )


def _watch(client: JobsClient, watched: Job | Sweep, arguments: Namespace) -> int:
    if isinstance(watched, Sweep):
        seen: Iterable[Sequence[Job]] = client.watch_sweep(watched.id)
    else:
        seen = ((job,) for job in client.watch(watched.id))
    try:
        if arguments.json or not sys.stderr.isatty():
            return watch_jobs(seen, Lines(sys.stdout, arguments.json))
        with Bars(sys.stdout, sys.stderr) as bars:
            return watch_jobs(seen, bars)
    except KeyboardInterrupt:
        print(
            f"\n{watched.id} goes on; syncbn-jobs watch {watched.id} looks again, and "
            f"syncbn-jobs cancel {watched.id} stops it",
            file=sys.stderr,
        )
        raise


def _jobs(client: JobsClient, word: str) -> Sequence[Job]:
    """Return the job of an identifier, or the jobs of a sweep of it, as they were submitted."""
    try:
        return [client.show(word)]
    except ServerError as error:
        if error.status != 404:
            raise
        jobs = sorted(client.list(sweep=word), key=lambda job: job.number)
        if not jobs:
            raise
        return jobs


def _act_on_all(
    client: JobsClient, word: str, action: str, method: Callable[[str], Job]
) -> Iterator[Job]:
    """Act on a job, or on those of a sweep whose state allows it.

    Raises:
        JobActionError: no job of the sweep is in such a state.
    """
    try:
        yield method(word)
        return
    except ServerError as error:
        if error.status != 404:
            raise
        jobs = _jobs(client, word)
    able = [job for job in jobs if action in job.actions]
    if not able:
        states = sorted({job.state for job in jobs})
        raise JobActionError(
            f"{action}: none of the {len(jobs)} jobs of {word} allows it now; they are "
            f"{', '.join(states)}"
        )
    for job in able:
        yield method(job.id)


def _print_acted(jobs: Iterable[Job], arguments: Namespace) -> None:
    for job in jobs:
        if arguments.json:
            _print_json([job])
        else:
            print(job_line(job))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_json(documents: Iterable[Any]) -> None:
    for document in documents:
        print(msgspec.json.encode(document).decode(), flush=True)
