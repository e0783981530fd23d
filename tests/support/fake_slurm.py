"""Slurm's commands in a world of jobs: they lose, delay and repeat what they are told."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from syncbn.jobs.engines.programs import Done
from syncbn.jobs.engines.slurm import SCRIPT
from tests.support.job_world import World

# How many commands later something is done that was thought to be lost.
_LATE = 4

_Start = tuple[str, int]


class _Known(NamedTuple):
    """How an attempt is called in the queue."""

    id: str
    name: str
    task: str


class FakeSlurm:
    """Answers as sbatch, squeue and scancel do; what waits there are the starts of the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._late: list[tuple[int, _Start]] = []
        self._calls = 0
        self._known: dict[_Start, _Known] = {}
        self._submitted = 0
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], timeout_s: float) -> Done:
        """Run a command, before and after which the dispatcher may be killed."""
        self.commands.append(list(command))
        self._calls += 1
        self._world.starts += [start for due, start in self._late if due <= self._calls]
        self._late = [each for each in self._late if each[0] > self._calls]
        self._world.point()
        options: dict[str, str] = {}
        for option in command:
            if option.startswith("--"):
                name, _, value = option.removeprefix("--").partition("=")
                options[name] = value
        run = {"sbatch": self._sbatch, "squeue": self._squeue, "scancel": self._scancel}
        done = run[command[0]](command, options)
        self._world.point()
        return done

    def _sbatch(self, command: Sequence[str], options: dict[str, str]) -> Done:
        world, fault = self._world, self._world.fault("start")
        self._submitted += 1
        starts = self._starts(command, options)
        if fault == "lost":
            raise TimeoutError("no answer within 10 s")
        if fault == "late":
            self._late += [(self._calls + _LATE, start) for start in starts]
            raise TimeoutError("no answer within 10 s")
        world.starts += starts * (2 if fault == "repeated" else 1)
        if fault != "slow":
            for start in starts:
                world.deliver(world.starts.index(start))
        return Done(0, f"{self._submitted}\n", "")

    def _starts(self, command: Sequence[str], options: dict[str, str]) -> list[_Start]:
        """Return the attempts that are to be started: those of whose tasks there are arguments."""
        number, name = str(self._submitted), options["job-name"]
        _, _, count, *arguments = command[command.index(str(SCRIPT)) + 1 :]
        tasks = options["array"].split(",") if "array" in options else [""]
        found: list[_Start] = []
        for task in tasks:
            first = int(task or 0) * int(count)
            run, _, attempt, *_ = arguments[first : first + int(count)]
            start = Path(run).parent.name, int(attempt)
            called = _Known(f"{number}_{task}", name, task) if task else _Known(number, name, "N/A")
            self._known[start] = called
            found.append(start)
        return found

    def _squeue(self, command: Sequence[str], options: dict[str, str]) -> Done:
        fault = self._world.fault("observe")
        if fault == "lost":
            raise TimeoutError("no answer within 10 s")
        if fault == "late":
            return Done(1, "", "slurm_load_jobs error: Unable to contact slurm controller\n")
        rows = [(start, "PENDING", "Resources") for start in self._world.starts]
        rows += [(start, "RUNNING", "None") for start in self._world.running.items()]
        lines = ["" if "name" in options else "0|of another program|N/A|RUNNING|None\n"]
        for start, state, why in rows:
            known = self._known.get(start) or _Known("1", "syncbn-{}-{}".format(*start), "N/A")
            if options.get("name") in (None, known.name):
                lines.append(f"{known.id}|{known.name}|{known.task}|{state}|{why}\n")
        return Done(0, "".join(lines), "")

    def _scancel(self, command: Sequence[str], options: dict[str, str]) -> Done:
        world, signal = self._world, options.get("signal")
        if world.fault("kill" if signal == "KILL" else "stop") in ("lost", "late"):
            raise TimeoutError("no answer within 10 s")
        for start, known in self._known.items():
            job, number = start
            # As the real one does, which takes a task that waits for its array then.
            is_taken = {"me", "state", "signal"} & options.keys() and start in world.starts
            array = {each.partition("_")[0] for each in command if "_" in each}
            is_meant = known.id in command or (is_taken and known.id.partition("_")[0] in array)
            if known.name != options.get("name") and not is_meant:
                continue
            if signal != "TERM":
                world.starts[:] = [each for each in world.starts if each != start]
            if world.running.get(job) == number:
                if signal == "TERM":
                    world.told.add(start)
                elif signal == "KILL":
                    world.end(job, None)
        return Done(0, "", "")
