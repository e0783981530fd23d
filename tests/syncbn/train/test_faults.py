"""Faults at random instants of each place of a run: what is promised of each, and how runs end.

What is promised stands in docs/reliability.md. The instants follow from a seed, which is printed
(`pytest -s`): `SYNCBN_TEST_SEED=7 make test-long` tries those of 7, and SYNCBN_TEST_INSTANTS=5 five
of each cell.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from syncbn.train.run.result import Result
from tests.support.faults import Case, Servers, Stream, bring_about, compose_job_once, small_disk
from tests.support.probe import PLACES, Hit, Instant, Plan, read_durations

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]

INSTANTS = int(os.environ.get("SYNCBN_TEST_INSTANTS", "20"))
SEED = int(os.environ.get("SYNCBN_TEST_SEED", random.SystemRandom().randrange(10**6)))
# Of a place's turns of a rank since it was started, how many may come before a fault.
_TURNS = {"step": 4, "checkpoint": 3, "evaluation": 3, "export": 1, "publish": 1}
# Of its computations there, how many before a NaN.
_TURNS_TO_NAN = {**_TURNS, "evaluation": 4, "export": 5}


@dataclass(frozen=True)
class Whole:
    """A run without faults.

    Attributes:
        servers: what starts runs.
        end: what it came to.
        trained: a directory with what it was when it had trained, and nothing was exported.
        typical_s: how long its places took.
    """

    servers: Servers
    end: dict[str, Any]
    trained: Path
    typical_s: dict[str, float]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Generator[Whole]:
    directory = tmp_path_factory.mktemp("whole")
    servers = Servers()
    try:
        compose_job_once()
        plan = directory / "plan"
        Plan("", "", [], {}).write(plan)
        case = Case(servers.server, directory, plan, {}, 0)
        case.attempt()
        end = case.end()
        trained = directory / "trained"
        without = shutil.ignore_patterns("bundle", "result.json", "*.png", "*.svg", ".lock")
        shutil.copytree(case.run.path, trained, ignore=without)
        yield Whole(servers, end, trained, read_durations(plan))
    finally:
        servers.server.close()


def _streams(fault: str, place: str, number: int, restarting: bool) -> list[Stream]:
    """Return the faults of a cell, in streams that run at once."""
    chance = random.Random(f"{SEED} {fault} {place}")
    turns = (_TURNS_TO_NAN if fault == "NaN" else _TURNS)[place]
    ranks = (0,) if place == "publish" else (0, 1)  # as the other one has ended
    instants = [
        Instant(chance.choice(ranks), chance.randrange(turns), chance.random())
        for _ in range(INSTANTS)
    ]
    size = -(-INSTANTS // number)
    parts = [instants[start : start + size] for start in range(0, INSTANTS, size)]
    return [
        Stream(k, fault, place, part, len(part) if restarting and k % 2 else 0)
        for k, part in enumerate(parts)
    ]


def _bring_about(whole: Whole, streams: list[Stream], tmp_path: Path, expect: Any) -> None:
    fault, place = streams[0].fault, streams[0].place
    sys.stdout.write(f"\n{fault} | {place} | SYNCBN_TEST_SEED={SEED} | ")
    began = time.monotonic()
    with ExitStack() as stack, ThreadPoolExecutor(len(streams)) as pool:
        doing: list[Any] = []
        for stream in streams:
            work = tmp_path / str(stream.number)
            if fault == "full disk":
                try:
                    stack.enter_context(small_disk(work))
                except OSError as error:
                    pytest.skip(f"cannot mount: {error}")
            else:
                work.mkdir()
            trained = whole.trained if place in ("export", "publish") else None
            end = dict(whole.end)
            if (fault, place) == ("NaN", "export"):
                del end["test"]  # which may be NaN
            told = (stream, whole.servers, work, trained, whole.typical_s, end, expect)
            doing.append(pool.submit(bring_about, *told))
        attempts = sum(each.result() for each in doing)
    took_s = time.monotonic() - began
    count = sum(len(stream.instants) for stream in streams)
    sys.stdout.write(f"{count} instants in {attempts} starts of a run, {took_s:.0f} s\n")


def _expect(reason: str, *said: str) -> Any:
    def check(case: Case, result: Result | None, hits: list[Hit]) -> None:
        assert result is not None, case.said()
        assert (result.status, result.reason) == ("failed", reason), f"{result}\n{case.said()}"
        assert not said or any(each in str(result.error) for each in said), result
        assert len(hits) == 1 + case.max_restarts, f"{hits}\n{case.said()}"
        case.check_whole()

    return check


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSEGV"])
def test_killed_rank_costs_nothing_but_time(
    whole: Whole, tmp_path: Path, fault: str, place: str
) -> None:
    streams = _streams(fault, place, 4, restarting=True)
    _bring_about(whole, streams, tmp_path, _expect("rank_killed", f"killed by {fault}"))


@pytest.mark.parametrize("place", PLACES)
def test_stopped_rank_is_given_up_in_time(whole: Whole, tmp_path: Path, place: str) -> None:
    streams = _streams("SIGSTOP", place, 10, restarting=True)
    _bring_about(whole, streams, tmp_path, _expect("rank_hung"))


@pytest.mark.parametrize("place", PLACES)
def test_cut_network_is_noticed_in_time(whole: Whole, tmp_path: Path, place: str) -> None:
    if whole.servers.why_no_network:
        pytest.skip(whole.servers.why_no_network)
    streams = _streams("cut network", place, 10, restarting=False)
    _bring_about(whole, streams, tmp_path, _expect("rank_hung"))


def _expect_full(case: Case, result: Result | None, hits: list[Hit]) -> None:
    assert result is not None, case.said()
    assert result.status == "failed", f"{result}\n{case.said()}"
    assert result.reason in ("disk_full", "publish"), f"{result}\n{case.said()}"
    assert "No space left on device" in str(result.error)
    case.check_whole()


@pytest.mark.parametrize("place", PLACES)
def test_full_disk_leaves_nothing_half_written(whole: Whole, tmp_path: Path, place: str) -> None:
    _bring_about(whole, _streams("full disk", place, 4, restarting=False), tmp_path, _expect_full)


@pytest.mark.parametrize("place", PLACES[:-1])  # who publishes copies files, and computes nothing
def test_nan_reaches_nothing_that_is_kept(whole: Whole, tmp_path: Path, place: str) -> None:
    streams = _streams("NaN", place, 4, restarting=False)
    _bring_about(whole, streams, tmp_path, _expect("not_finite"))
