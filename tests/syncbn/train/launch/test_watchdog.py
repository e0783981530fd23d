import os
import time

from torch.distributed import (
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.train.launch.watchdog import Watch
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
