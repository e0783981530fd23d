"""Which of the dispatcher's environment variables jobs get."""

import re
from collections.abc import Mapping

from syncbn.train.launch.variables import is_secret

# An allow-list, because no list of secrets is complete.
_GIVEN = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|HOSTNAME"
    r"|PYTHON(PATH|HOME|HASHSEED|WARNINGS|UNBUFFERED|FAULTHANDLER|DONTWRITEBYTECODE)"
    r"|VIRTUAL_ENV|CONDA_PREFIX|XDG_CACHE_HOME|LD_LIBRARY_PATH|LD_PRELOAD|MALLOC_\w+"
    r"|(CUDA|NVIDIA|NCCL|GLOO|TORCH|TORCHINDUCTOR|TRITON|PYTORCH|OMP|KMP|MKL|OPENBLAS)_\w+"
    r"|MPLCONFIGDIR|COLUMNS"
)


def environment_for_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that jobs get: what Python, torch and its libraries heed.

    Args:
        environment: of the dispatcher.
    """
    return {
        name: value
        for name, value in environment.items()
        if _GIVEN.fullmatch(name) and not is_secret(name)
    }
