import os
import signal
import time

from syncbn.train.launch.agent import is_running
from tests.support.jobs import wait_until


def test_asking_whether_a_rank_runs_leaves_its_exit_code_to_torch() -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        time.sleep(0.2)
        os._exit(7)
    assert is_running(child)
    wait_until(lambda: not is_running(child), timeout_s=10)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not is_running(child)
