"""Run a function in a forked child of this very process, as a DataLoader worker runs."""

import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class ChildError(Exception):
    """A forked child failed, with its traceback, or died, or missed its deadline."""


def in_forked_child(function: Callable[[], T], deadline_s: int = 20) -> T:
    """Fork, call a function in the child, and return its result, which must be picklable.

    The child ends without finalizing the interpreter, like one of multiprocessing.

    Raises:
        ChildError: the function raised, or the child ended in another way or at the deadline.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(deadline_s)  # kills the child even if it hangs in C
        try:
            outcome = pickle.dumps((True, function()))
        except BaseException:
            outcome = pickle.dumps((False, traceback.format_exc()))
        os.write(sender, outcome)
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        outcome = pipe.read()
    _, status = os.waitpid(child, 0)
    if not outcome:
        raise ChildError(f"the child ended with status {os.waitstatus_to_exitcode(status)}")
    succeeded, value = pickle.loads(outcome)
    if not succeeded:
        raise ChildError(value)
    return value
