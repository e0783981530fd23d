"""Jobs on this machine: real processes that are started once, found again, and ended."""

import json
import os
import signal
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from syncbn.errors import EngineError
from syncbn.jobs.dispatch.environment import environment_for_jobs
from syncbn.jobs.engines.local import LocalEngine
from syncbn.jobs.engines.protocol import Attempt, Presence
from syncbn.jobs.workspace import Workspace
from syncbn.train.changes import compose_job
from syncbn.train.run.directory import open_run
from tests.support.jobs import SMALL, is_alive, wait_until
from tests.support.processes import REPOSITORY

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")

_LONG = ("epochs=10000", "log_every_steps=1", "data.batch_size=64")
_SECRETS = {"AWS_SECRET_ACCESS_KEY": "hunter2", "SYNCBN_API_KEY": "hunter3", "MY_PASSWORD": "x"}


@pytest.fixture(scope="module")
def engine() -> Generator[LocalEngine]:
    """An engine as a dispatcher makes it that has secrets in its environment."""
    environment = {**os.environ, **_SECRETS, "PYTHONPATH": str(REPOSITORY)}
    made = LocalEngine(environment_for_jobs(environment))
    yield made
    made.close()


@pytest.fixture
def attempt(tmp_path: Path, engine: LocalEngine) -> Generator[Attempt]:
    """An attempt at a job of two ranks that would train for hours."""
    made = prepared(tmp_path, *_LONG)
    yield made
    engine.kill(made)
    wait_until(lambda: is_gone(made))


def prepared(directory: Path, *overrides: str) -> Attempt:
    workspace = Workspace(directory / "job")
    nproc = 2
    typed = [*SMALL, *overrides, f"launch.nproc={nproc}", f"run_dir={workspace.run.path}"]
    open_run(compose_job([each for each in typed if each != "model.width=4"])).lock.close()
    workspace.allow(1)
    core = min(os.sched_getaffinity(0))
    return Attempt("job", 1, workspace.directory, (core,), (), 1, 0, nproc)


def is_gone(attempt: Attempt) -> bool:
    workspace = Workspace(attempt.directory)
    return not workspace.is_held() and not workspace.holders()


def trains(attempt: Attempt) -> bool:
    return Workspace(attempt.directory).run.steps_file.exists()


def presence(engine: LocalEngine, attempt: Attempt) -> Presence:
    return engine.observe([attempt])[attempt.job]


def test_attempt_is_started_once_however_often_that_is_asked_for(
    engine: LocalEngine, attempt: Attempt
) -> None:
    assert presence(engine, attempt) == Presence.gone
    handle = engine.start(attempt)
    workspace = Workspace(attempt.directory)
    assert int(handle) in workspace.holders()
    assert [engine.start(attempt) for _ in range(3)] == [""] * 3
    wait_until(lambda: trains(attempt))
    assert presence(engine, attempt) == Presence.alive
    assert len(workspace.holders()) == 3  # a supervisor and two ranks
    assert workspace.console.read_text().count("=== attempt 1, ") == 1


@pytest.mark.parametrize("has_handle", [True, False])
def test_stopped_attempt_writes_its_state_and_ends(
    engine: LocalEngine, attempt: Attempt, has_handle: bool
) -> None:
    handle = engine.start(attempt)
    wait_until(lambda: trains(attempt))
    engine.stop(replace(attempt, handle=handle if has_handle else ""))
    wait_until(lambda: presence(engine, attempt) == Presence.gone)
    run = Workspace(attempt.directory).run
    result = run.read_result()
    assert result is not None
    assert (result.status, result.reason) == ("interrupted", "stopped")
    assert list(run.checkpoints_dir.iterdir())


def test_killed_attempt_leaves_no_process_and_may_be_killed_again(
    engine: LocalEngine, attempt: Attempt
) -> None:
    engine.start(attempt)
    wait_until(lambda: trains(attempt))
    processes = Workspace(attempt.directory).holders()
    for _ in range(2):
        engine.kill(attempt)
    wait_until(lambda: not any(is_alive(process) for process in processes))
    # The lock is given back by the last thread of a process, which may end after its first.
    wait_until(lambda: presence(engine, attempt) == Presence.gone)
    assert Workspace(attempt.directory).run.read_result() is None


def test_supervisor_takes_its_ranks_along_and_the_next_attempt_may_begin(
    engine: LocalEngine, attempt: Attempt
) -> None:
    handle = engine.start(attempt)
    wait_until(lambda: trains(attempt))
    os.kill(int(handle), signal.SIGKILL)
    wait_until(lambda: presence(engine, attempt) == Presence.gone)
    Workspace(attempt.directory).allow(2)
    second = replace(attempt, number=2)
    assert engine.start(second)
    assert presence(engine, second) == Presence.alive
    assert Workspace(attempt.directory).console.read_text().count("=== attempt ") == 2


def test_rank_that_is_stopped_for_good_is_killed_with_the_others(
    engine: LocalEngine, attempt: Attempt
) -> None:
    handle = engine.start(attempt)
    wait_until(lambda: trains(attempt))
    processes = Workspace(attempt.directory).holders()
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    assert presence(engine, attempt) == Presence.alive
    engine.kill(replace(attempt, handle=handle))
    wait_until(lambda: is_gone(attempt))


def test_attempt_whose_permit_was_withdrawn_does_not_begin(
    engine: LocalEngine, attempt: Attempt
) -> None:
    workspace = Workspace(attempt.directory)
    workspace.revoke()
    with pytest.raises(EngineError, match="the time of this attempt is over"):
        engine.start(attempt)
    wait_until(lambda: presence(engine, attempt) == Presence.gone)
    assert not workspace.console.exists()
    assert not (workspace.run.path / "status.json").exists()


def test_run_that_is_not_there_is_said_to_be_so(engine: LocalEngine, tmp_path: Path) -> None:
    attempt = Attempt("job", 1, tmp_path / "nowhere", (0,), (), 1, 0, 1)
    with pytest.raises(EngineError, match=r"attempt syncbn-job-1 was not started: .*nowhere"):
        engine.start(attempt)


def test_processes_get_what_was_given_to_them_and_no_secret(
    engine: LocalEngine, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    factory = ["model=custom", "model.factory=tests.support.telling:make"]
    attempt = prepared(tmp_path, *factory, f"+model.arguments.file={told}", "launch.threads=null")
    attempt = replace(attempt, gpus=(3, 5))
    engine.start(attempt)
    wait_until(lambda: is_gone(attempt))
    for rank in range(2):
        seen: dict[str, Any] = json.loads(Path(f"{told}.{rank}").read_text())
        environment = seen["environment"]
        assert seen["cores"] == list(attempt.cores)
        assert (seen["threads"], environment["OMP_NUM_THREADS"]) == (1, "1")
        assert environment["CUDA_VISIBLE_DEVICES"] == "3,5"
        assert not set(_SECRETS) & set(environment)
        assert not set(_SECRETS.values()) - {"x"} & set(environment.values())
    # Nor do the processes have them where others of the same user can read them.
    console = Workspace(attempt.directory).console.read_text()
    assert "all is told" in console
    assert "hunter" not in console


def test_server_that_was_killed_is_started_again_and_its_jobs_go_on(
    tmp_path: Path, attempt: Attempt
) -> None:
    engine = LocalEngine(environment_for_jobs({**os.environ, "PYTHONPATH": str(REPOSITORY)}))
    try:
        handle = engine.start(attempt)
        server = engine._server._process  # pyright: ignore[reportPrivateUsage] -- what is killed
        assert server is not None
        server.kill()
        server.wait()
        assert is_alive(int(handle))
        second = prepared(tmp_path / "second", *_LONG)
        assert engine.start(second)
        engine.kill(second)
        wait_until(lambda: is_gone(second))
        assert presence(engine, attempt) == Presence.alive
    finally:
        engine.close()
    assert presence(engine, attempt) == Presence.alive
