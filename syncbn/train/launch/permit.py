"""Whether an attempt may still begin, which may come late: its scheduler decides when."""

import os
from pathlib import Path

from syncbn.errors import ConfigError

_FILE, _TEXT = "SYNCBN_PERMIT_FILE", "SYNCBN_PERMIT_TEXT"


def check_permit(file: str, text: str) -> None:
    """Raise ConfigError unless a file says that this job may begin, whose lock is held already.

    Whoever withdraws the permit looks afterwards whether somebody has the lock: so either this
    process finds that its time is over, or it is found.
    """
    try:
        found = Path(file).read_text()
    except OSError as error:
        found = str(error)
    if found.strip() != text.strip():
        raise ConfigError(
            f"{file} says {found.strip()!r}, and must say {text.strip()!r}: the time of this "
            "attempt is over"
        )


def permit_variables(file: str, text: str) -> dict[str, str]:
    """Return the variables by which ranks of a torchrun need a permit."""
    return {_FILE: file, _TEXT: text}


def check_own_permit() -> None:
    """Raise ConfigError where this process needs a permit and has not got it."""
    if _FILE in os.environ:
        check_permit(os.environ[_FILE], os.environ.get(_TEXT, ""))
