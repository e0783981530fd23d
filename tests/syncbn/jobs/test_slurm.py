"""What is asked of Slurm's commands, how often, and what is made of their answers."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from syncbn.errors import ConfigError, EngineError, JobError
from syncbn.jobs.engines.nodes import Shares, shares_of
from syncbn.jobs.engines.programs import Done, SystemPrograms
from syncbn.jobs.engines.protocol import Attempt, Presence
from syncbn.jobs.engines.slurm import SCRIPT, SlurmEngine, SlurmOptions
from tests.support.fake_slurm import FakeSlurm
from tests.support.job_world import Clock, World


def _attempt(job: str = "abc", nproc: int = 2, cores: int = 2, gpus: int = 0) -> Attempt:
    return Attempt(
        job=job,
        number=3,
        directory=Path("/jobs/$(touch x) 100%/work") / job,
        cores=(),
        gpus=(),
        cores_wanted=cores,
        gpus_wanted=gpus,
        nproc=nproc,
    )


class Bench:
    """An engine in a world."""

    def __init__(self, options: SlurmOptions | None = None) -> None:
        self.clock, self.world = Clock(), World()
        self.world.permits["abc"] = 3
        self.slurm = FakeSlurm(self.world)
        options = options or SlurmOptions(python="/python")
        self.engine = SlurmEngine(options, self.slurm, lambda: self.clock.steady)

    def asked(self, program: str) -> list[list[str]]:
        return [command for command in self.slurm.commands if command[0] == program]


def test_what_a_job_is_named_by_is_never_part_of_a_script() -> None:
    bench = Bench()
    bench.engine.start(_attempt())
    (command,) = bench.asked("sbatch")
    script = command.index(str(SCRIPT))
    assert command[script + 1 :] == [
        *("/python", "2", "8", "/jobs/$(touch x) 100%/work/abc/run", "--attempt", "3"),
        *("--permit", "/jobs/$(touch x) 100%/work/abc/attempt", "3", "--threads", "1"),
    ]
    # Slurm would take what follows a % for something of its own.
    assert "--output=/jobs/$(touch x) 100%%/work/abc/console.log" in command
    assert {"--job-name=syncbn-abc-3", "--requeue", "--signal=B:TERM@120"} <= set(command)


def test_job_asks_for_its_cores_and_gpus_and_what_the_administrator_wants() -> None:
    bench = Bench(SlurmOptions("short", "ours", "1:00:00", arguments=("--qos=low", "--time=5")))
    bench.engine.start(_attempt(cores=6, gpus=2))
    (command,) = bench.asked("sbatch")
    assert {"--nodes=1", "--cpus-per-task=6", "--gres=gpu:2"} <= set(command)
    assert {"--partition=short", "--account=ours"} <= set(command)
    # The last one counts.
    assert command.index("--time=1:00:00") < command.index("--time=5") < command.index(str(SCRIPT))
    assert command[-1] == "3"  # threads of each rank


@pytest.mark.parametrize(
    ("nproc", "cores", "gpus", "most", "shares"),
    [
        (4, 8, 4, None, Shares(1, 4, 8, 4)),
        (4, 8, 4, 4, Shares(1, 4, 8, 4)),
        (4, 8, 4, 2, Shares(2, 2, 4, 2)),
        (4, 9, 0, 3, Shares(2, 2, 5, 0)),
        (5, 5, 5, 4, Shares(5, 1, 1, 1)),
        (6, 6, 0, 4, Shares(2, 3, 3, 0)),
    ],
)
def test_each_machine_gets_the_same_share(
    nproc: int, cores: int, gpus: int, most: int | None, shares: Shares
) -> None:
    assert shares_of(_attempt(nproc=nproc, cores=cores, gpus=gpus), most) == shares


def test_job_of_several_machines_is_stopped_on_all_of_them() -> None:
    bench = Bench(SlurmOptions(ranks_per_node=1))
    bench.engine.start(_attempt())
    (command,) = bench.asked("sbatch")
    assert {"--nodes=2", "--ntasks-per-node=1", "--signal=TERM@120"} <= set(command)
    bench.engine.stop(_attempt())
    assert not any("--batch" in each for each in bench.asked("scancel"))


def _tasks(directory: Path, *numbers: int) -> list[Attempt]:
    return [
        replace(
            _attempt(f"job{number}"),
            directory=directory / "work" / f"job{number}",
            array="syncbn-job0-3-array",
            task=number,
        )
        for number in numbers
    ]


def test_jobs_of_a_sweep_are_the_tasks_of_an_array(tmp_path: Path) -> None:
    bench, attempts = Bench(), _tasks(tmp_path / "100%", 0, 2)  # the one between was not ready
    bench.world.permits |= {"job0": 3, "job2": 3}
    assert bench.engine.start_array(attempts) == {"job0": "1_0", "job2": "1_2"}
    (command,) = bench.asked("sbatch")
    assert {"--array=0,2", "--job-name=syncbn-job0-3-array"} <= set(command)
    place = tmp_path / "100%" / "arrays" / "syncbn-job0-3-array"
    assert f"--output={place}/%a".replace("100%", "100%%") in command
    assert (place / "2").readlink() == attempts[1].directory / "console.log"
    _, _, count, *arguments = command[command.index(str(SCRIPT)) + 1 :]
    runs = arguments[:: int(count)]
    assert runs == [str(attempts[0].directory / "run"), "", str(attempts[1].directory / "run")]
    assert set(bench.engine.observe(attempts).values()) == {Presence.alive}
    # A repeated call finds it.
    assert bench.engine.start_array(attempts) == {"job0": "1_0", "job2": "1_2"}
    assert len(bench.asked("sbatch")) == 1


def test_task_of_an_array_is_stopped_and_killed_alone(tmp_path: Path) -> None:
    bench, (first, second) = Bench(), _tasks(tmp_path, 0, 1)
    bench.world.permits |= {"job0": 3, "job1": 3}
    bench.engine.start_array([first, second])
    bench.engine.stop(second)
    assert bench.world.told == {("job1", 3)}
    bench.engine.kill(second)
    assert bench.world.running == {"job0": 3}
    asked = len(bench.asked("scancel"))
    bench.engine.kill(second)  # it is not in the queue any more
    assert len(bench.asked("scancel")) == asked
    assert bench.engine.observe([first, second]) == {
        "job0": Presence.alive,
        "job1": Presence.gone,
    }


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_task_that_waits_leaves_those_beside_it_in_the_queue(tmp_path: Path, end: str) -> None:
    bench, (first, second) = Bench(), _tasks(tmp_path, 0, 1)
    bench.world.faults["start"] = ["slow"]
    bench.engine.start_array([first, second])
    getattr(bench.engine, end)(second)
    assert bench.world.starts == [("job0", 3)]


def test_repeated_start_starts_nothing() -> None:
    bench = Bench()
    bench.world.faults["start"] = ["slow"]
    first = bench.engine.start(_attempt())
    assert bench.engine.start(_attempt()) == first
    assert len(bench.asked("sbatch")) == 1


def test_queue_is_asked_at_most_every_two_seconds_and_after_each_change() -> None:
    bench = Bench()
    for _ in range(10):
        assert bench.engine.observe([_attempt()]) == {"abc": Presence.gone}
        bench.clock.pass_by(0.1)
    assert len(bench.asked("squeue")) == 1
    bench.engine.start(_attempt())
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.alive}
    bench.clock.pass_by(2)
    bench.world.running.clear()
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.gone}


def test_controller_that_does_not_answer_is_left_alone_for_a_while() -> None:
    bench = Bench()
    bench.world.faults["observe"] = ["late"]
    assert bench.engine.observe([_attempt()]) == {}
    for _ in range(4):
        bench.clock.pass_by(1)
        with pytest.raises(EngineError, match="Slurm does not answer: squeue: slurm_load_jobs"):
            bench.engine.start(_attempt())
    assert len(bench.slurm.commands) == 1
    bench.clock.pass_by(1)
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.gone}


def test_of_two_jobs_of_one_name_the_one_that_runs_counts() -> None:
    bench = Bench()
    bench.engine.start(_attempt())
    bench.world.starts.append(("abc", 3))
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.alive}
    bench.engine.stop(_attempt())
    assert not bench.world.starts
    assert bench.world.told == {("abc", 3)}


def test_reason_of_waiting_is_said_in_plain_words() -> None:
    bench = Bench()
    bench.world.starts.append(("abc", 3))
    assert bench.engine.observe([_attempt()]) == {"abc": Presence.waiting}
    assert bench.engine.explain(_attempt()) == "for machines that are free"


@pytest.mark.parametrize(
    ("state", "presence"),
    [
        ("CONFIGURING", Presence.waiting),
        ("SUSPENDED", Presence.waiting),
        ("REQUEUE_HOLD", Presence.waiting),
        ("COMPLETING", Presence.alive),
        ("COMPLETED", Presence.gone),
        ("NODE_FAIL", Presence.gone),
    ],
)
def test_states_of_slurm_are_understood(state: str, presence: Presence) -> None:
    def programs(command: object, timeout_s: float) -> Done:
        return Done(0, f"7|syncbn-abc-3|N/A|{state}|None\nsomething else\n", "")

    engine = SlurmEngine(SlurmOptions(), programs)
    assert engine.observe([_attempt()]) == {"abc": presence}


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (
            "Batch job submission failed: Requested node configuration is not available",
            ConfigError,
            "Slurm refuses the job: .*not available; ask for less",
        ),
        ("invalid partition specified: nix", EngineError, "was not started: .*nix"),
    ],
)
def test_refusal_of_slurm_is_passed_on(said: str, error: type[Exception], message: str) -> None:
    def programs(command: Sequence[str], timeout_s: float) -> Done:
        return (
            Done(1, "", f"sbatch: error: {said}\n") if command[0] == "sbatch" else Done(0, "", "")
        )

    engine = SlurmEngine(SlurmOptions(), programs)
    with pytest.raises(error, match=message):
        engine.start(_attempt())


def test_missing_commands_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        JobError, match=r"sbatch, squeue, scancel not found; install .*slurm-client"
    ):
        SlurmEngine.of_machine(SlurmOptions(), {})


def test_program_that_takes_too_long_is_killed() -> None:
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        SystemPrograms({})(["/bin/sleep", "60"], 0.1)


def test_programs_have_the_given_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    done = SystemPrograms({"LANG": "C"})(["/usr/bin/env"], 10)
    assert done.output.splitlines() == ["LANG=C"]


def test_script_satisfies_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, str(SCRIPT)], check=True, timeout=60)
