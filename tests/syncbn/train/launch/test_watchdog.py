import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.errors import ConfigError, TrainingError
from syncbn.train.launch.watchdog import HUNG_CODE, Watch
from tests.support.world import CONTEXT


def _ask_with_a_short_time_out() -> None:
    watch = Watch(TCPStore("localhost", 0, is_master=True), 0, 2, timeout_s=0.5, stop_timeout_s=30)
    watch.start()
    reason = watch.blame()
    os._exit(0 if reason == "rank 1 gave no sign of life" else 3)


def test_asking_who_is_missing_may_take_longer_than_the_time_out() -> None:
    began = time.monotonic()
    rank = CONTEXT.Process(target=_ask_with_a_short_time_out)
    rank.start()
    rank.join(60)
    assert rank.exitcode == 0
    assert time.monotonic() - began < 30


def _watch(store: Any, rank: int, world_size: int = 1, load_timeout_s: float = 30) -> Watch:
    return Watch(
        store,
        rank,
        world_size,
        timeout_s=0.5,
        stop_timeout_s=30,
        load_timeout_s=load_timeout_s,
    )


def _work_long(kind: str) -> None:
    """Work for three times as long as a rank may stand still, in one of the ways."""
    with _watched(TCPStore("localhost", 0, is_master=True)) as watch:
        if kind == "moving":
            for _ in watch.moving(range(6), 7, "evaluating"):
                time.sleep(0.5)
        elif kind == "working":
            with watch.working(0, "loading data"):
                time.sleep(3)
            watch.at(1, "in a step")
            time.sleep(0.5)
        else:
            watch.at(0, "loading data")
            time.sleep(3)
    os._exit(7)


@contextmanager
def _watched(store: Any, load_timeout_s: float = 30) -> Generator[Watch]:
    watch = _watch(store, 0, load_timeout_s=load_timeout_s)
    watch.start()
    yield watch
    watch.end()


def _hang(kind: str) -> None:
    with _watched(TCPStore("localhost", 0, is_master=True), load_timeout_s=2) as watch:
        if kind == "moving":
            for _ in watch.moving(range(2), 7, "evaluating"):
                time.sleep(60)
        else:
            with watch.working(0, "loading data"):
                time.sleep(60)


def _hang_unheard() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)  # as a console on a disk that is full
    _hang("moving")


def _end_of(target: Any, *args: str) -> tuple[int | None, float]:
    began = time.monotonic()
    rank = CONTEXT.Process(target=target, args=args)
    rank.start()
    rank.join(45)
    rank.kill()
    rank.join()
    return rank.exitcode, time.monotonic() - began


@pytest.mark.parametrize(("kind", "code"), [("moving", 7), ("working", 7), ("neither", HUNG_CODE)])
def test_long_work_that_says_so_is_not_taken_for_a_hang(kind: str, code: int) -> None:
    assert _end_of(_work_long, kind)[0] == code


@pytest.mark.parametrize("kind", ["moving", "working"])
def test_long_work_that_hangs_is_ended(kind: str) -> None:
    code, duration_s = _end_of(_hang, kind)
    assert code == HUNG_CODE
    assert duration_s < 40


def test_rank_that_hangs_is_ended_though_nothing_can_be_printed() -> None:
    assert _end_of(_hang_unheard)[0] == HUNG_CODE


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_wait_for_each_other_at_the_end_of_long_work(fails: bool) -> None:
    store, ends = HashStore(), dict[int, float]()

    def work(rank: int) -> None:
        with suppress(ConfigError), _watch(store, rank, 3).working(0, "loading data"):
            time.sleep(0.3 * rank)
            if fails and rank == 0:
                raise ConfigError("no such file")
        ends[rank] = time.monotonic()

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert len(ends) == 3
    assert max(ends.values()) - min(ends.values()) < 0.25


def test_rank_that_does_not_finish_long_work_is_named_with_what_to_do() -> None:
    watch = _watch(HashStore(), 1, 2, load_timeout_s=0.2)
    message = r"ranks \[0\] are still loading data, 0.2 s after rank 1 .* launch.load_timeout_s"
    with pytest.raises(TrainingError, match=message), watch.working(0, "loading data"):
        pass


def test_error_that_the_ranks_do_not_tell_each_other_is_raised_at_once() -> None:
    store = HashStore()
    with pytest.raises(ZeroDivisionError), _watch(store, 0, 2).working(0, "loading data"):
        raise ZeroDivisionError
    assert store.check(["done/1/0"])  # so the other one does not wait for it


def _hear_of_a_stop() -> None:
    store = TCPStore("localhost", 0, is_master=True)
    with _watched(store) as told:
        other = _watch(store, 1, world_size=2)
        other.start()
        told.heed_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (told.stop_signal, told.is_told) == (signal.SIGTERM, True)
        deadline = time.monotonic() + 10
        while not other.stop_signal and time.monotonic() < deadline:
            for each in (told, other):
                each.at(0, "waiting")
            time.sleep(0.05)
        assert (other.stop_signal, other.is_told) == (signal.SIGTERM, False)
    os._exit(7)


def test_rank_hears_that_another_was_told_to_stop() -> None:
    code, duration_s = _end_of(_hear_of_a_stop)
    assert code == 7
    assert duration_s < 10
