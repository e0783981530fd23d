"""Runs jobs on a cluster of Slurm, with its own commands."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from syncbn.errors import ConfigError, EngineError, JobError
from syncbn.jobs.engines.asking import Listing, Silence
from syncbn.jobs.engines.nodes import batch_arguments, shares_of
from syncbn.jobs.engines.programs import Done, Programs, SystemPrograms
from syncbn.jobs.engines.protocol import Attempt, Presence
from syncbn.jobs.workspace import ARRAYS, Workspace

SCRIPT = Path(__file__).with_name("slurm.sh")
_PROGRAMS = ("sbatch", "squeue", "scancel")
_TIMEOUT_S = 10.0
# Each question is work for the controller, which all users of a cluster share.
_POLL_S = 2.0
# How long nobody asks a controller that did not answer.
_QUIET_S = 5.0
# A rank has 30 s to write its state, and Slurm may tell it a minute late.
_WARNING_S = 120
_FORMAT = "%i|%j|%K|%T|%r"
_NO_TASK = "N/A"

_WAITING = frozenset(
    {
        *("PENDING", "CONFIGURING", "SUSPENDED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
        *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"),
    }
)
_ALIVE = frozenset({"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING"})
# What sbatch says of jobs for which there are no machines, now or later.
_IMPOSSIBLE = (
    "Requested node configuration is not available",
    "More processors requested than permitted",
    "Node count specification invalid",
    "Memory required by task is not available",
    "Invalid generic resource (gres) specification",
)
_SILENT = ("contact slurm controller", "timed out")
_REASONS = {
    "Resources": "for machines that are free",
    "Priority": "behind other jobs",
    "BeginTime": "until it may begin again",
    "PartitionConfig": "in vain: no machine of the partition has so much (PartitionConfig)",
    "PartitionNodeLimit": "in vain: the partition has no so many machines (PartitionNodeLimit)",
}


@dataclass(frozen=True)
class SlurmOptions:
    """How jobs are handed to Slurm.

    Attributes:
        partition, account, time: as sbatch has them; None: what Slurm takes by itself.
        python: the interpreter on the machines.
        ranks_per_node: a job of more ranks gets several machines; None: none does.
        arguments: of sbatch, after all others.
    """

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    python: str = sys.executable
    ranks_per_node: int | None = None
    arguments: tuple[str, ...] = ()


class _Entry(NamedTuple):
    """A job in Slurm's queue, or a task of an array."""

    id: str
    name: str
    task: str
    state: str
    reason: str

    @property
    def key(self) -> str:
        return self.name if self.task == _NO_TASK else f"{self.name}_{self.task}"


class SlurmEngine:
    """Has Slurm run a supervisor for each attempt, as a job of the attempt's name.

    The name is all that it needs to find an attempt again, so nothing is lost with this process. If
    a call was lost and repeated, two jobs may have one name: the lock of the run lets one of them
    begin. Jobs of a sweep that start together are the tasks of an array, found by the array's name
    and their places in it. A job that Slurm itself puts back into its queue, because a machine
    failed or another job was more urgent, goes on as the same attempt.

    Args:
        options: how jobs are handed over.
        programs: runs Slurm's commands.
        monotonic: returns seconds that never jump.
        poll_s: how old what is known of the queue may be.
    """

    name = "slurm"
    has_own_queue = True

    def __init__(
        self,
        options: SlurmOptions,
        programs: Programs,
        monotonic: Callable[[], float] = time.monotonic,
        poll_s: float = _POLL_S,
    ) -> None:
        self._options = options
        self._programs = programs
        self._queue: Listing[_Entry] = Listing(monotonic, poll_s)
        self._silence = Silence(monotonic, _QUIET_S)

    @classmethod
    def of_machine(cls, options: SlurmOptions, environment: Mapping[str, str]) -> "SlurmEngine":
        """Return one that runs the commands of this machine.

        Args:
            options: how jobs are handed over.
            environment: of all jobs, and of the commands.

        Raises:
            JobError: the commands are not there.
        """
        missing = [name for name in _PROGRAMS if shutil.which(name) is None]
        if missing:
            raise JobError(
                f"--engine slurm: {', '.join(missing)} not found; install Slurm's commands "
                "(slurm-client on Debian), with the cluster's slurm.conf"
            )
        # What is in a directory that others write to must not be imported; which GPUs a job sees is
        # Slurm's to say.
        own = {"PYTHONSAFEPATH": "1"}
        environment = {k: v for k, v in environment.items() if k != "CUDA_VISIBLE_DEVICES"}
        if "SLURM_CONF" in os.environ:
            own["SLURM_CONF"] = os.environ["SLURM_CONF"]
        return cls(options, SystemPrograms({**environment, **own}))

    def start(self, attempt: Attempt) -> str:
        """Hand an attempt to Slurm, unless it is there; return the number of Slurm's job."""
        self._queue.forget()  # it is another now, whatever comes of this
        known = self._list(attempt.name)
        if known:
            return next(iter(known.values())).id
        console = str(Workspace(attempt.directory).console)
        return self._submit(
            attempt,
            f"--job-name={attempt.name}",
            f"--comment=attempt {attempt.number} of job {attempt.job}",
            f"--output={console.replace('%', '%%')}",
            arguments=[batch_arguments(attempt)],
        )

    def start_array(self, attempts: Sequence[Attempt]) -> dict[str, str]:
        """Hand attempts to Slurm as the tasks of one array, unless it is there."""
        self._queue.forget()
        first, tasks = attempts[0], {each.task: each for each in attempts}
        known = self._list(first.array)
        if known:
            number = next(iter(known.values())).id.partition("_")[0]
        else:
            given = [
                batch_arguments(tasks[task]) if task in tasks else []
                for task in range(max(tasks) + 1)
            ]
            number = self._submit(
                first,
                f"--array={','.join(map(str, sorted(tasks)))}",
                f"--job-name={first.array}",
                f"--output={str(_link_consoles(attempts)).replace('%', '%%')}/%a",
                arguments=given,
            )
        return {each.job: f"{number}_{each.task}" for each in attempts}

    def observe(self, attempts: Sequence[Attempt]) -> dict[str, Presence]:
        """Return what Slurm's queue says, all of it by one question, which is not asked too often.

        What has left the queue is gone; Slurm need keep no accounts.
        """
        queue = self._queue.look(self._list)
        if queue is None:
            return {}
        return {each.job: _presence(queue.get(_key(each))) for each in attempts}

    def explain(self, attempt: Attempt) -> str:
        """Return why Slurm lets an attempt wait."""
        entry = (self._queue.known or {}).get(_key(attempt))
        if entry is None:
            return ""
        if entry.state != "PENDING":
            return f"its job {entry.id} is {entry.state.lower()}"
        return _REASONS.get(entry.reason, entry.reason)

    def stop(self, attempt: Attempt) -> None:
        """Cancel it if it waits; have Slurm send SIGTERM to the supervisor if it runs."""
        self._cancel(attempt, "PENDING")
        # Of several machines, to all processes; of one, to that alone which knows what to do.
        several = shares_of(attempt, self._options.ranks_per_node).nodes > 1
        who = () if several else ("--batch",)
        self._cancel(attempt, "RUNNING", "--signal=TERM", *who)

    def kill(self, attempt: Attempt) -> None:
        """Have Slurm kill all processes of it, and forget it."""
        if attempt.array:
            self._cancel(attempt, "PENDING")
        self._cancel(attempt, None, "--full", "--signal=KILL")

    def close(self) -> None:
        """Do nothing: this process holds nothing of Slurm."""

    def _submit(self, attempt: Attempt, *named: str, arguments: Sequence[Sequence[str]]) -> str:
        """Hand over what an attempt needs, and return the number of Slurm's job.

        Args:
            attempt: one of those that are handed over.
            named: the options by which it is found.
            arguments: of the script, for each task.
        """
        options = self._options
        shares = shares_of(attempt, options.ranks_per_node)
        given = {"partition": options.partition, "account": options.account, "time": options.time}
        # With a B, to the supervisor alone.
        to = "B:" if shares.nodes == 1 else ""
        count = max(map(len, arguments))
        command = [
            "sbatch",
            "--parsable",
            *named,
            f"--chdir={attempt.directory}",
            "--open-mode=append",
            f"--nodes={shares.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={shares.cores}",
            *([f"--gres=gpu:{shares.gpus}"] if shares.gpus else []),
            "--requeue",
            f"--signal={to}TERM@{_WARNING_S}",
            *(f"--{name}={value}" for name, value in given.items() if value is not None),
            *options.arguments,
            str(SCRIPT),
            options.python,
            str(shares.ranks),
            str(count),
            *(value for each in arguments for value in (each or [""] * count)),
        ]
        done = self._call(command)
        if done.code:
            said = _last_line(done.error)
            if any(each in said for each in _IMPOSSIBLE):
                raise ConfigError(f"Slurm refuses the job: {said}; ask for less")
            raise EngineError(f"attempt {attempt.name} was not started: {said}")
        return done.output.strip().partition(";")[0]

    def _list(self, name: str | None = None) -> dict[str, _Entry]:
        """Return what is in the queue, by name, and of arrays by name and task."""
        found: dict[str, _Entry] = {}
        for entry in self._entries(name):
            if entry.key not in found or entry.state in _ALIVE:
                found[entry.key] = entry
        return found

    def _entries(self, name: str | None) -> list[_Entry]:
        which = [] if name is None else [f"--name={name}"]
        done = self._call(
            ["squeue", "--me", "--array", "--noheader", f"--format={_FORMAT}", *which]
        )
        if done.code:
            raise EngineError(f"squeue: {_last_line(done.error)}")
        lines = [line.strip().split("|", 4) for line in done.output.splitlines()]
        return [_Entry(*fields) for fields in lines if len(fields) == len(_Entry._fields)]

    def _cancel(self, attempt: Attempt, state: str | None, *options: str) -> None:
        """Cancel or signal an attempt, if it is in a state."""
        self._queue.forget()
        if attempt.array:
            # With a filter, such as --state or --me, or with a signal, scancel takes a task that
            # waits for its whole array.
            found = [each for each in self._entries(attempt.array) if each.key == _key(attempt)]
            which = [
                each.id
                for each in found
                if each.state == state or (state is None and each.state != "PENDING")
            ]
            if not which:
                return
        else:
            which = ["--me", f"--name={attempt.name}"]
            which += [] if state is None else [f"--state={state}"]
        done = self._call(["scancel", *options, *which])
        # It may have ended, or begun, between two looks of scancel itself.
        if done.code and "Invalid job id" not in done.error and "already" not in done.error:
            raise EngineError(f"scancel: {_last_line(done.error)}")

    def _call(self, command: Sequence[str]) -> Done:
        """Run a command of Slurm, unless its controller has just failed to answer."""
        self._silence.check()
        try:
            done = self._programs(command, _TIMEOUT_S)
            said = _last_line(done.error) if done.code else ""
            is_silent = any(each in said for each in _SILENT)
        except OSError as error:
            said, is_silent, done = str(error), True, None
        if is_silent or done is None:
            raise self._silence.begin(f"Slurm does not answer: {command[0]}: {said}")
        return done


def _key(attempt: Attempt) -> str:
    """Return by what an attempt is found in the queue."""
    return f"{attempt.array}_{attempt.task}" if attempt.array else attempt.name


def _link_consoles(attempts: Sequence[Attempt]) -> Path:
    """Return a directory of links to the logs of an array's tasks, named by their numbers.

    Slurm has one pattern for the files that all tasks print to.
    """
    directory = attempts[0].directory.parent.parent / ARRAYS / attempts[0].array
    directory.mkdir(parents=True, exist_ok=True)
    for each in attempts:
        link = directory / str(each.task)
        link.unlink(missing_ok=True)
        link.symlink_to(Workspace(each.directory).console)
    return directory


def _presence(entry: _Entry | None) -> Presence:
    if entry is None:
        return Presence.gone
    if entry.state in _ALIVE:
        return Presence.alive
    return Presence.waiting if entry.state in _WAITING else Presence.gone


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]
