"""What a submission may not set, and who sets it instead."""

import re
from collections.abc import Iterable, Mapping

from syncbn.jobs.offer.settings import SETTINGS_FILE

_RUNS_CODE = "it names code to run; the administrator names such {what} in " + SETTINGS_FILE
_READS_FILES = "it names files; the administrator names such {what} in " + SETTINGS_FILE
_NAMED = f"the administrator names models that have it in {SETTINGS_FILE}"
_LAUNCH = f"the administrator sets it, in {SETTINGS_FILE} under [defaults.values]"
_DIRECTORY = "the server chooses where a job lies"

# By key, or by what stands before its dots.
_WHO: Mapping[str, str] = {
    "run_dir": _DIRECTORY,
    "run_root": _DIRECTORY,
    "sweep_dir": _DIRECTORY,
    "publish": "the server chooses the directory of models; give the model's name as publish "
    "beside values",
    "name": "give the job's name as name beside values",
    "launch": _LAUNCH,
    "launch.device": "give device beside values",
    "launch.threads": "the server divides a job's cores among its replicas; give cores beside "
    "values",
    "launch.max_restarts": "give retries beside values",
    "track": "the server itself keeps what a job logs",
    "hydra": "it is Hydra's, which reads no submission",
    "task.loss": _RUNS_CODE.format(what="tasks"),
    "task.factory": _RUNS_CODE.format(what="tasks"),
    "task.arguments": _RUNS_CODE.format(what="tasks"),
    "data.factory": _RUNS_CODE.format(what="data sets"),
    "data.arguments": _RUNS_CODE.format(what="data sets"),
    "data.path": _READS_FILES.format(what="data sets"),
    "model.factory": _RUNS_CODE.format(what="models"),
    "model.arguments": _NAMED,
    "model.architecture": _NAMED,
    "model.encoder": _NAMED,
    "model.weights": _READS_FILES.format(what="models"),
    "model.weights_into": _NAMED,
    "model.weights_strict": _NAMED,
    "optim.arguments": "set them one by one, as optim.arguments.momentum",
    "optim.lr_scale": "a submission has no patterns with numbers; use syncbn-train for it",
}


def who_sets(key: str, groups: Iterable[str]) -> str | None:
    """Return who sets a key that a submission may not set, or None if nobody else does.

    Args:
        key: as it was sent.
        groups: whose choices a submission may make.
    """
    key = key.lstrip("+~")
    group, _, name = key.partition(".")
    if group in groups and name in ("", "name"):
        return f"{group} is a choice; give it among choices, beside values"
    parts = re.split(r"([./@])", key)
    for count in range(len(parts), 0, -2):
        if (who := _WHO.get("".join(parts[:count]))) is not None:
            return who
    return None
