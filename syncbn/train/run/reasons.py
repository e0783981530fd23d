"""Why an attempt at a run ended, as a code by which programs decide, such as whether to retry."""

import errno
import sys
from collections.abc import Iterator

from syncbn.errors import ConfigError, DataError, SyncBNError

FINISHED = "finished"
"""It did all that it was to do."""
STOPPED = "stopped"
"""It was told to stop; its state is written."""
CONFIG = "config"
"""The configuration is wrong, or the data or the model cannot be had so."""
DATA = "data"
"""A sample cannot be read, or the data are others than those that the run began with."""
NOT_FINITE = "not_finite"
"""A loss, a gradient or a weight is not finite any more."""
OUT_OF_MEMORY = "out_of_memory"
"""The memory of a GPU or of a process does not suffice."""
DISK_FULL = "disk_full"
"""There is no room for what it writes."""
RANK_KILLED = "rank_killed"
"""A signal killed a rank: SIGKILL most likely where a machine's memory is used up."""
RANK_FAILED = "rank_failed"
"""A rank ended by an exception that is none of syncbn's, or by an exit code."""
RANK_HUNG = "rank_hung"
"""A rank did not answer, or did not move, within its time."""
PUBLISH = "publish"
"""The bundle could not be published; it is safe in the run directory."""
KILLED = "killed"
"""What started the ranks was killed, or its machine was lost: nobody could say more."""
INTERNAL = "internal"
"""Whatever else."""

ALL = (
    *(FINISHED, STOPPED, CONFIG, DATA, NOT_FINITE, OUT_OF_MEMORY, DISK_FULL),
    *(RANK_KILLED, RANK_FAILED, RANK_HUNG, PUBLISH, KILLED, INTERNAL),
)
RETRIED = frozenset({RANK_KILLED, RANK_FAILED, RANK_HUNG, KILLED, DISK_FULL, PUBLISH})
"""Those that another attempt may not meet again."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


def reason_of(error: BaseException, otherwise: str = INTERNAL) -> str:
    """Return the code of an exception, or of what caused it.

    Args:
        error: what ended an attempt.
        otherwise: the code if neither says one.
    """
    codes = (_code(each) for each in _with_causes(error))
    return next((code for code in codes if code is not None), otherwise)


def is_full(error: OSError) -> bool:
    """Return whether an error says that there is no room on a disk."""
    return error.errno in _FULL


def presumed(status: str, exit_code: int) -> str:
    """Return the code of a result that names none, as those of earlier versions.

    Args:
        status: how the attempt ended.
        exit_code: of its processes.
    """
    of_status = {"finished": FINISHED, "interrupted": STOPPED, "lost": KILLED}
    return of_status.get(status, CONFIG if exit_code == 2 else INTERNAL)


def _code(error: BaseException) -> str | None:
    if isinstance(error, SyncBNError) and error.reason is not None:
        return error.reason
    if isinstance(error, ConfigError):
        return CONFIG
    if isinstance(error, DataError):
        return DATA
    if isinstance(error, MemoryError | _out_of_memory_on_device()):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and is_full(error):
        return DISK_FULL
    return None


def _out_of_memory_on_device() -> type[BaseException]:
    """Return torch's exception, without loading torch where nobody has."""
    torch = sys.modules.get("torch")
    return MemoryError if torch is None else torch.OutOfMemoryError


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__
