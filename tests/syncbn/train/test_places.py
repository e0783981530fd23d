"""Runs that are stopped or killed at any of their places end as if they had not been.

What a kill leaves is what lies on the disk, so a run is gone on with from each content that its
directory ever had; that is more than killing it, as contents that are alike are tried once. What a
signal to stop does depends on the next look for it alone, so it is sent right before each look.
"""

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.run.command import main as list_runs
from syncbn.train.run.comparison import find_runs
from tests.support.attempts import STOPPED, Attempt, TinyRun, snapshots
from tests.support.jobs import comparable
from tests.support.places import IGNORED, LOOK, RANDOM, Act, Snapshot, digest, is_of_a_file, kind

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

# Three steps an epoch. max_steps=3 of one epoch, or 6 of two, are the same steps as without.
CASES = {
    "one epoch": ("epochs=1",),
    "one epoch, ended within": ("epochs=1", "max_steps=2"),
    "two epochs": ("epochs=2",),
    "two epochs, ended after the first": ("epochs=2", "max_steps=3"),
    "two epochs, ended within the second": ("epochs=2", "max_steps=4"),
}


# Of a result: which attempt it was, and when.
TIMES = {"attempt", "started", "ended", "duration_s"}


class Whole:
    """What a run comes to that nobody stops, and all that it passes.

    Args:
        directory: for it.
        overrides: of the configuration.
    """

    def __init__(self, directory: Path, *overrides: str) -> None:
        self.run = TinyRun(directory / "work", *overrides)
        kept: dict[str, Snapshot] = {}
        ends: list[dict[str, Any]] = []
        attempts: list[Attempt] = []
        for writes in ("at once", "late"):
            (directory / writes).mkdir()
            self.run.clear()
            attempts.append(self.run.attempt(Act(writes=writes, snapshots=directory / writes)))
            assert attempts[-1].codes == [0, 0], self.run.output()
            ends.append(end(self.run))
            for snapshot in snapshots(directory / writes):
                kept.setdefault(digest(snapshot.files), snapshot)
        assert ends[0] == ends[1]
        self.end = ends[0]
        self.places = attempts[0].places
        self.snapshots = list(kept.values())

    def check_end(self, where: str) -> None:
        """Go on until the run is finished, and compare what it came to."""
        self.run.finish()
        found = end(self.run)
        others = {name for name in found | self.end if found.get(name) != self.end.get(name)}
        assert not others, f"{where}: {sorted(others)} differ"

    def check_kill(self, snapshot: Snapshot) -> None:
        """Go on from what a kill leaves."""
        self.run.clear(snapshot.files)
        result = self.run.directory.read_result()
        check_listed(self.run, "unknown" if result is None else result.status)
        self.check_end(f"killed at {snapshot.place!r}")

    def check_stop(self, rank: int, at: int) -> None:
        """Tell a rank to stop right before it looks, and go on."""
        self.run.clear()
        attempt = self.run.attempt(Act(rank=rank, signal=SIGTERM, at=at))
        where = f"rank {rank} stopped at place {at}, after {self.places[rank][at - 1]!r}"
        assert attempt.codes == [STOPPED, STOPPED], f"{where}: {attempt.codes}"
        check_listed(self.run, "interrupted")
        self.check_end(where)

    def check_rank_killed(self, rank: int, at: int) -> None:
        """Kill a rank at a place, end the other as the supervisor does, and go on."""
        self.run.clear()
        attempt = self.run.attempt(Act(rank=rank, signal=SIGKILL, at=at))
        where = f"rank {rank} killed at {self.places[rank][at]!r}"
        assert attempt.codes[rank] == -SIGKILL, f"{where}: {attempt.codes}"
        self.check_end(where)


def end(run: TinyRun) -> dict[str, Any]:
    """Return the content of a finished run's files, without times and attempts."""
    newest = checkpoint_files(run.directory.checkpoints_dir)[0]
    found: dict[str, Any] = {}
    for name, content in run.files().items():
        file = run.work / name
        if IGNORED.search(name) or file.name == "attempts.jsonl":
            continue
        if file.name == "result.json":
            result = json.loads(content or b"")
            found[name] = {key: result[key] for key in result.keys() - TIMES}
        elif file.suffix != ".ckpt":
            found[RANDOM.sub(".temporary", name)] = content
        elif not file.name.startswith("step-") or file == newest:  # older ones may be others
            found[name] = comparable(vars(read_checkpoint(file)))
    return found


def check_listed(run: TinyRun, status: str) -> None:
    """Check what `syncbn-runs` says of a run."""
    (listed,) = find_runs([run.directory.path])
    assert (listed.status, listed.damage) == (status, [])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        list_runs([str(run.directory.path)])
    assert status in printed.getvalue()


def looks(places: list[str]) -> Iterable[tuple[str, int]]:
    """Yield where a rank looks whether it was told to stop: after what, and which place it is."""
    for number, place in enumerate(places):
        if place == LOOK:
            yield kind(places[number - 1]), number


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run of two epochs that ends within the second."""
    return Whole(tmp_path_factory.mktemp("places"), *CASES["two epochs, ended within the second"])


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_looks_for_a_stop_at_each_step_and_batch(whole: Whole, rank: int) -> None:
    most = {"in forward and backward": 1, "evaluating": 3, "recalibrating": 3}
    done = Counter[str]()
    for place in whole.places[rank]:
        doing = place.partition(",")[0]
        done[doing] += 1
        assert done[doing] <= most.get(doing, math.inf)  # of a batch: to get it, to use it, done
        if place == LOOK:
            done.clear()


def test_run_killed_at_each_kind_of_place_ends_bit_identical(whole: Whole) -> None:
    last = {kind(snapshot.place): snapshot for snapshot in whole.snapshots}
    for place, snapshot in last.items():
        if ".jsonl" not in place:  # before the first step, from which all of them go on alike
            whole.check_kill(snapshot)


def test_run_stopped_at_each_kind_of_look_ends_bit_identical(whole: Whole) -> None:
    for rank in (0, 1):
        for number, at in enumerate(dict(looks(whole.places[rank])).values()):
            if number % 2 == rank:
                whole.check_stop(rank, at)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_run_killed_at_any_place_ends_bit_identical(case: str, tmp_path: Path) -> None:
    whole = Whole(tmp_path, *CASES[case])
    for snapshot in whole.snapshots:
        whole.check_kill(snapshot)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_run_stopped_at_any_look_ends_bit_identical(case: str, tmp_path: Path) -> None:
    whole = Whole(tmp_path, *CASES[case])
    for rank in (0, 1):
        for number, (_, at) in enumerate(looks(whole.places[rank])):
            if number % 2 == rank:  # the ranks look at the same places
                whole.check_stop(rank, at)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_at_each_kind_of_place_ends_bit_identical(whole: Whole, rank: int) -> None:
    last = {kind(place): number for number, place in enumerate(whole.places[rank])}
    for place, at in last.items():
        if not is_of_a_file(place):  # what it leaves was gone on with above
            whole.check_rank_killed(rank, at)


@pytest.mark.long
def test_run_stopped_in_an_evaluation_and_killed_when_it_goes_on_ends_bit_identical(
    whole: Whole, tmp_path: Path
) -> None:
    run, places = whole.run, whole.places[1]
    at = places.index(LOOK, places.index("evaluating, step 4"))  # after the last step
    run.clear()
    assert run.attempt(Act(rank=1, signal=SIGTERM, at=at)).codes == [STOPPED, STOPPED]
    assert run.attempt(Act(snapshots=tmp_path)).codes == [0, 0]
    for snapshot in snapshots(tmp_path):
        whole.check_kill(snapshot)
