import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.errors import TrainingError
from syncbn.train.launch.rendezvous import agree


def _attempt(store: HashStore, message: str, delays: dict[int, float]) -> list[tuple[str, str]]:
    """Let three ranks agree, some of which come late, and return what each has got."""

    def be_rank(rank: int) -> tuple[str, str]:
        time.sleep(delays.get(rank, 0))
        return agree(store, rank, 3, lambda: message, timeout_s=20)

    with ThreadPoolExecutor(3) as ranks:
        return list(ranks.map(be_rank, range(3)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_attempt_gets_its_own_message_and_prefix_from_one_store(late: int) -> None:
    store = HashStore()
    prefixes: set[str] = set()
    for number in range(4):
        got = _attempt(store, f"attempt {number}", {late: 0.1})
        assert len(set(got)) == 1
        assert got[0][0] == f"attempt {number}"
        prefixes.add(got[0][1])
    assert len(prefixes) == 4


def test_what_a_killed_attempt_left_is_not_taken_for_a_rank() -> None:
    store = HashStore()
    for rank in (0, 2):  # rank 1 was killed before it came
        threading.Thread(target=_give_up, args=(store, rank), daemon=True).start()
    time.sleep(0.2)
    got = _attempt(store, "second", {1: 0.1, 2: 0.3})
    assert {message for message, _ in got} == {"second"}


def _give_up(store: HashStore, rank: int) -> None:
    with pytest.raises(TrainingError):
        agree(store, rank, 3, lambda: "first", timeout_s=0.1)


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(TrainingError, match=r"ranks \[1, 2\] did not come"):
        agree(HashStore(), 0, 3, lambda: "", timeout_s=0.1)
    with pytest.raises(TrainingError, match="rank 2 waited in vain for rank 0"):
        agree(HashStore(), 2, 3, lambda: "", timeout_s=0.1)
