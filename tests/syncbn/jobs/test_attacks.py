"""Submissions that would run code, read files or the environment, or take the machine down."""

import math
import re
from typing import Any

import pytest

from syncbn.errors import SubmissionError
from syncbn.jobs.offer.catalog import Catalog


def _deep(depth: int = 100_000) -> list[Any]:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    return deep


# What runs code, or changes the environment of the process that composes.
CODE = {
    "callbacks": {"values": {"+hydra.callbacks.x._target_": "evil.Callback"}},
    "callbacks without plus": {"values": {"hydra.callbacks.x._target_": "evil.Callback"}},
    "environment": {"values": {"+hydra.job.env_set.PYTHONSTARTUP": "/tmp/evil.py"}},
    "launcher": {"choices": {"hydra/launcher": "submitit_local"}},
    "hydra": {"choices": {"hydra": "default"}},
    "sweeper": {"sweep": {"hydra/sweeper": ["optuna"]}},
    "custom data": {"choices": {"data": "custom"}},
    "custom model": {"choices": {"model": "custom"}},
    "custom task": {"choices": {"task": "custom"}},
    "custom data by value": {"values": {"data.name": "custom"}},
    "custom data by added values": {
        "values": {"data.name": "custom", "+data.factory": "evil:run", "+data.arguments": {}}
    },
    "factory": {"values": {"data.factory": "os:system"}},
    "model factory": {"values": {"model.factory": "os:system"}},
    "loss": {"values": {"task.loss": "os:system"}},
    "arguments": {"values": {"model.arguments": {"weights": "x"}}},
    "one argument": {"values": {"model.arguments.progress": True}},
    "architecture by path": {
        "choices": {"model": "torchvision"},
        "values": {"model.architecture": "os:system"},
    },
    "optimizer by path": {
        "choices": {"optim": "torch"},
        "values": {"optim.optimizer": "lr_scheduler"},
    },
    "private optimizer": {
        "choices": {"optim": "torch"},
        "values": {"optim.optimizer": "__builtins__"},
    },
    "encoder": {"choices": {"model": "unet"}, "values": {"model.encoder": "timm.resnet18"}},
}

# What reads the environment or files, now or in the ranks.
REFERENCES = {
    "name": {"name": "${oc.env:SECRET}"},
    "publish": {"publish": "${oc.env:SECRET}"},
    "choice": {"choices": {"norm": "${oc.env:SECRET}"}},
    "enum": {"values": {"numerics.precision": "${oc.env:SECRET}"}},
    "number": {"values": {"optim.lr": "${oc.env:SECRET}"}},
    "escaped": {"values": {"numerics.precision": "\\${oc.env:SECRET}"}},
    "pattern": {"values": {"optim.freeze": ["${oc.env:SECRET}"]}},
    "escaped pattern": {"values": {"optim.freeze": ["a\\${b}"]}},
    "decode": {"values": {"optim.freeze": ["${oc.decode:'{a:1}'}"]}},
    "key": {"values": {"${oc.env:SECRET}": 1}},
    "missing": {"values": {"optim.freeze": ["???"]}},
    "missing name": {"name": "???"},
    "sweep": {"sweep": {"name": ["${oc.env:SECRET}"]}},
    "sweep of values": {"sweep": {"numerics.precision": ["float32", "${oc.env:SECRET}"]}},
    "weights": {"values": {"model.weights": "/etc/shadow"}},
    "data path": {"values": {"data.path": "/etc"}},
    "folder": {"choices": {"data": "folder"}, "values": {"data.path": "/"}},
    "mnist": {"choices": {"data": "mnist"}},
}

# What belongs to the server.
PLACES = {
    "run_dir": {"values": {"run_dir": "/tmp/x"}},
    "run_root": {"values": {"run_root": "/"}},
    "sweep_dir": {"values": {"sweep_dir": "/tmp"}},
    "publish directory": {"values": {"publish": "/srv/models"}},
    "publish path": {"publish": "../../etc/cron.d/x"},
    "publish parent": {"publish": ".."},
    "name path": {"name": "../x"},
    "name slash": {"name": "a/b"},
    "name dot": {"name": ".ssh"},
    "name newline": {"name": "a\n"},
    "name in values": {"values": {"name": "x"}},
    "track": {"choices": {"track": "wandb"}},
    "tracker": {"values": {"track.mode": "online"}},
    "launch": {"choices": {"launch": "local"}},
    "threads": {"values": {"launch.threads": 4096}},
    "device": {"values": {"launch.device": "cuda"}},
    "restarts": {"values": {"launch.max_restarts": 10**9}},
    "timeout": {"values": {"launch.timeout_s": 1e300}},
    "stop timeout": {"values": {"launch.stop_timeout_s": 1e300}},
    "shared gpu": {"values": {"launch.ranks_per_gpu": 1000}},
}

# What would take too much of something.
SIZES = {
    "nproc": {"values": {"launch.nproc": 100_000}},
    "samples": {"choices": {"data": "synthetic"}, "values": {"data.samples": 10**12}},
    "samples as float": {"choices": {"data": "synthetic"}, "values": {"data.samples": 1e12}},
    "samples times size": {
        "choices": {"data": "synthetic"},
        "values": {"data.samples": 10**7, "data.size": 1024, "data.channels": 1024},
    },
    "samples times nproc": {
        "choices": {"data": "synthetic"},
        "values": {"data.samples": 500_000, "launch.nproc": 16},
    },
    "patterns": {
        "choices": {"data": "synthetic"},
        "values": {"data.classes": 10_000, "data.size": 2048, "data.channels": 16},
    },
    "scenes": {
        "choices": {"task": "segmentation", "data": "digit_scenes", "model": "unet"},
        "values": {"data.samples": 200_000, "data.size": 2048},
    },
    "batch": {
        "choices": {"data": "synthetic"},
        "values": {"data.batch_size": 65_536, "data.size": 256},
    },
    "width of a cnn": {"values": {"model.width": 8192}},
    "a large mlp": {
        "choices": {"model": "mlp"},
        "values": {"model.width": 8192, "model.depth": 1024},
    },
    "inputs of an mlp": {
        "choices": {"model": "mlp", "data": "synthetic"},
        "values": {"model.size": 256, "model.width": 8192, "data.channels": 1024},
    },
    "a deep unet": {
        "choices": {"task": "segmentation", "data": "digit_scenes", "model": "unet"},
        "values": {"model.depth": 8, "model.width": 1024},
    },
    "a large architecture on many": {
        "choices": {"model": "torchvision"},
        "values": {"model.architecture": "vit_h_14", "launch.nproc": 16},
    },
    "loaders": {"values": {"data.workers": 32, "launch.nproc": 16}},
    "all loaders": {"values": {"data.workers": 10**6}},
    "epochs": {"values": {"epochs": 10**18}},
    "seed": {"values": {"seed": 2**63}},
    "a rate": {"values": {"optim.lr": 1e300}},
    "class weights": {"values": {"task.class_weights": [1.0] * 1001}},
    "patterns to freeze": {"values": {"optim.freeze": ["a"] * 65}},
    "a long pattern": {"values": {"optim.freeze": ["a" * 201]}},
    "cores": {"cores": 10**6},
    "retries": {"retries": 10**6},
    "priority": {"priority": 10**6},
    "sweep": {"sweep": {"seed": list(range(100)), "epochs": list(range(1, 100))}},
    "sweep of a long list": {"sweep": {"seed": [1] * 10**6}},
    "checkpoints": {"values": {"checkpoint.keep": 10**6}},
}

# What is not what it seems.
TYPES = {
    "data=null": {"choices": {"data": None}},
    "data as value": {"values": {"data": None}},
    "data as object": {"values": {"data": {"name": "custom"}}},
    "section": {"values": {"numerics": {"compile": True}}},
    "deep list": {"values": {"epochs": _deep()}},
    "deep pattern": {"values": {"optim.freeze": _deep()}},
    "deep choice": {"choices": {"data": _deep()}},
    "deep name": {"name": _deep()},
    "deep sweep": {"sweep": {"seed": _deep()}},
    "deep submission": _deep(),
    "list of lists": {"values": {"task.class_weights": [[1.0]]}},
    "boolean as integer": {"values": {"epochs": True}},
    "boolean as number": {"values": {"optim.lr": True}},
    "integer as boolean": {"values": {"recalibrate": 1}},
    "text as boolean": {"values": {"recalibrate": "false"}},
    "text as integer": {"values": {"epochs": "2"}},
    "float as integer": {"values": {"epochs": 2.0}},
    "integer of 10^400": {"values": {"epochs": 10**400}},
    "number of 10^400": {"values": {"optim.lr": 10**400}},
    "integer of 10^5000": {"values": {"seed": 10**5000}},
    "negative integer": {"values": {"seed": -(10**5000)}},
    "nan": {"values": {"optim.lr": math.nan}},
    "infinity": {"values": {"optim.lr": math.inf}},
    "negative infinity": {"values": {"optim.weight_decay": -math.inf}},
    "nan in a list": {"values": {"task.class_weights": [1.0, math.nan]}},
    "zero": {"values": {"optim.lr": 0}},
    "surrogate": {"name": "\ud800"},
    "surrogate in a list": {"values": {"optim.freeze": ["\udcff"]}},
    "surrogate as key": {"values": {"\ud800": 1}},
    "surrogate as choice": {"choices": {"norm": "\ud800"}},
    "surrogate as field": {"\ud800": 1},
    "right to left": {"name": "a\u202egnp.exe"},
    "full width": {"name": "\uff41\uff42"},
    "full width key": {"values": {"\uff45pochs": 2}},
    "digits of another script": {"name": "job\u0661"},
    "NUL": {"name": "a\0b"},
    "NUL in a key": {"values": {"epochs\0": 2}},
    "escape sequence": {"values": {"optim.freeze": ["\x1b[2J"]}},
    "brackets": {"values": {"data[batch_size]": 2}},
    "equals": {"values": {"epochs=2": 2}},
    "space": {"values": {" epochs": 2}},
    "no key": {"values": {"": 2}},
    "dots": {"values": {"..": 2}},
    "dot at the end": {"values": {"epochs.": 2}},
    "dots before": {"values": {".epochs": 2}},
    "deleted": {"values": {"~norm": None}},
    "appended": {"values": {"++epochs": 2}},
    "package": {"values": {"norm@optim": "sync"}},
    "dunder": {"values": {"optim.__class__": "x"}},
    "flag": {"values": {"_target_": "os.system"}},
    "long key": {"values": {"a" * 10**6: 1}},
    "long value": {"values": {"numerics.precision": "a" * 10**6}},
    "long choice": {"choices": {"norm": "a" * 10**6}},
    "many keys": {"values": {f"a{number}": 1 for number in range(10_000)}},
    "unknown field": {"overrides": ["hydra.run.dir=/"]},
    "values as list": {"values": ["epochs=2"]},
    "choices as text": {"choices": "norm=local"},
    "choices as null": {"choices": None},
    "sweep as text": {"sweep": {"seed": "1,2,3"}},
    "sweep of nothing": {"sweep": {"seed": []}},
    "sweep twice": {"sweep": {"optim.lr": [1, 1.0]}},
    "sweep of what is set": {"values": {"seed": 1}, "sweep": {"seed": [1, 2]}},
    "sweep of what is chosen": {"choices": {"norm": "sync"}, "sweep": {"norm": ["local"]}},
    "sweep of fields": {"sweep": {"priority": [1, 2]}},
    "sweep of custom": {"sweep": {"data": ["digits", "custom"]}},
    "text": "norm=local",
    "nothing": None,
    "number as key": {"values": {1: 2}},
}

CORPUS = {
    f"{kind}: {name}": submission
    for kind, submissions in {
        "code": CODE,
        "references": REFERENCES,
        "places": PLACES,
        "sizes": SIZES,
        "types": TYPES,
    }.items()
    for name, submission in submissions.items()
}


@pytest.mark.parametrize("attack", CORPUS)
def test_attack_is_refused_with_a_printable_reason(
    attack: str, catalog: Catalog, administered: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    submission: Any = CORPUS[attack]
    for each in (catalog, administered):
        with pytest.raises(SubmissionError) as refused:
            each.check(submission)
        message = str(refused.value)
        assert "hunter2" not in message
        assert message.isprintable()
        assert len(message) < 3000
        assert re.search(r"must|valid|cannot|no key|at most|has no such", message)


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        (
            {"values": {"optim.lr": -1}},
            "optim.lr=-1: must be a number above 0 and at most 100",
        ),
        ({"values": {"epochs": True}}, "epochs=true: must be an integer from 1 to 10000"),
        (
            {"values": {"data.validation": 1}},
            "data.validation=1: must be a number from 0 to below 1",
        ),
        (
            {"values": {"optim.clip_norm": "1"}},
            "optim.clip_norm=1: must be a number above 0 and at most 1000000.0, or null",
        ),
        (
            {"choices": {"norm": "synch"}},
            "norm=synch: did you mean sync? must be one of sync, local, none, whitening, penalty, "
            "renormalize",
        ),
        (
            {"choices": {"data": "custom"}},
            "data=custom: must be one of digits, synthetic, digit_scenes; the administrator names "
            "what needs files, or code of your own, in settings.toml",
        ),
        (
            {"choices": {"nrom": "sync"}},
            "choices.nrom=sync: unknown group; did you mean norm? valid: task, data, model, norm, "
            "optim, schedule",
        ),
        (
            {"choices": {"optim": "adamw"}, "values": {"optim.momentum": 0.9}},
            "optim.momentum=0.9: optim=adamw has no such key; optim=sgd has",
        ),
        (
            {"values": {"run_dir": "/tmp/x"}},
            "run_dir=/tmp/x: cannot be set by a submission; the server chooses where a job lies",
        ),
        (
            {"values": {"data.name": "custom"}},
            "data.name=custom: cannot be set by a submission; data is a choice; give it among "
            "choices, beside values",
        ),
        (
            {"values": {"+data.factory": "evil:run"}},
            "+data.factory=evil:run: cannot be set by a submission; it names code to run; the "
            "administrator names such data sets in settings.toml",
        ),
        (
            {"values": {"+hydra.callbacks.x._target_": "evil.Callback"}},
            "+hydra.callbacks.x._target_=evil.Callback: cannot be set by a submission; it is "
            "Hydra's, which reads no submission",
        ),
        (
            {"choices": {"track": "wandb"}},
            "choices.track=wandb: cannot be chosen by a submission; the server itself keeps what "
            "a job logs",
        ),
        (
            {"prio": 1},
            "prio=1: unknown; did you mean priority? valid: name, publish, priority, retries, "
            "cores, device, choices, values, sweep",
        ),
        (
            {"name": "a b"},
            "name=a b: must be letters, digits, '.', '_' and '-', the first a letter or digit, at "
            "most 100, or null",
        ),
        (
            {"name": "${oc.env:SECRET}"},
            "name=${oc.env:SECRET}: must not have ${ in it, which would stand for a reference to "
            "another value",
        ),
        (
            {"sweep": {"seed": list(range(60)), "epochs": list(range(1, 61))}},
            "sweep: 60 × 60 makes 3600 jobs, and must make at most 1000 (limits.sweep_jobs of "
            "settings.toml); leave out some values",
        ),
        (
            {"sweep": {"optim.lr": [1, 1.0]}},
            "sweep.optim.lr=[1, 1.0]: must not have a value twice",
        ),
        (
            {"values": {"epochs": 10**5000}},
            "epochs=(an integer of 16610 bits): must be an integer from 1 to 10000",
        ),
        (
            {"values": {"recalibrate": True}, "choices": {"norm": "whitening"}},
            "recalibrate=true is for batch normalization; norm=whitening has none",
        ),
    ],
)
def test_refusal_says_key_value_and_what_is_valid(
    submission: dict[str, Any], message: str, catalog: Catalog
) -> None:
    with pytest.raises(SubmissionError) as refused:
        catalog.check(submission)
    assert str(refused.value) == message


def test_unknown_key_is_answered_with_the_close_one(catalog: Catalog) -> None:
    with pytest.raises(
        SubmissionError, match=r"^optim\.lrr=1: unknown key; did you mean optim\.lr\?"
    ):
        catalog.check({"values": {"optim.lrr": 1}})
