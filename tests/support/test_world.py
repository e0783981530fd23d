import os
import signal
import time

import pytest
import torch.distributed as dist

from tests.support.world import WorldError, run_world


def _rank_and_size() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise LookupError("rank 1 has no luck")
    dist.barrier()


def _die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    expected = [(rank, world_size) for rank in range(world_size)]
    assert run_world(world_size, _rank_and_size) == expected


def test_first_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(WorldError, match=r"(?s)rank 1 failed.*_fail_on_rank_1.*no luck"):
        run_world(2, _fail_on_rank_1)


def test_dead_rank_is_named_and_the_others_are_killed() -> None:
    started = time.monotonic()
    with pytest.raises(WorldError, match="rank 1 died"):
        run_world(2, _die_on_rank_1)
    assert time.monotonic() - started < 30


def test_deadline_ends_a_world_that_hangs() -> None:
    with pytest.raises(WorldError, match="missed the deadline"):
        run_world(1, time.sleep, 60, deadline_s=2)
