import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from syncbn.errors import JobError, SubmissionError
from syncbn.jobs.offer import defaults
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.offer.choice import OFFERED
from syncbn.jobs.offer.refusals import who_sets
from syncbn.jobs.offer.settings import DATA_KINDS, MODEL_KINDS
from syncbn.jobs.spec import JobSpec
from syncbn.train.config import compose_config
from syncbn.train.schema import CHOICES, SECTIONS, TorchOptimConfig, TrainConfig, schemas

# Left to the command line: what the server does itself, or what names code.
LEFT_OUT = {"task": ("custom",), "launch": ("local",), "track": ("wandb", "none")}


def _options_keys(options: dict[str, Any]) -> list[dict[str, Any]]:
    choices = [each for group in options["groups"].values() for each in group["choices"].values()]
    return [*options["values"], *(key for choice in choices for key in choice["values"])]


def test_each_choice_of_the_schemas_is_offered_or_known_to_be_left_out() -> None:
    for group in CHOICES:
        kinds = {"data": DATA_KINDS, "model": MODEL_KINDS}.get(group, ())
        known = {*OFFERED.get(group, ()), *kinds, *LEFT_OUT.get(group, ())}
        assert known == set(schemas(group))


def test_each_key_of_the_schemas_is_offered_or_said_to_be_of_somebody_else(
    catalog: Catalog,
) -> None:
    offered = {key["key"] for key in _options_keys(catalog.options())}
    named = {"data.crop_padding", "data.crop_scale_min", "data.height", "data.skip_damaged"}
    every: set[str] = set()
    for part, choices in {**CHOICES, **SECTIONS}.items():
        for schema in choices:
            every |= {f"{part}.{field.name}" for field in dataclasses.fields(schema)}
    every |= {field.name for field in dataclasses.fields(TrainConfig)} - {*CHOICES, *SECTIONS}
    every |= {key for key in offered if key.startswith("optim.arguments.")}
    assert offered <= every
    unsaid = {key for key in every - offered - named if who_sets(key, OFFERED) is None}
    assert unsaid == {"data.width"} - offered  # of mask files, as height


def test_each_key_has_help_and_each_number_a_bound_on_both_sides(
    catalog: Catalog, administered: Catalog
) -> None:
    for options in (catalog.options(), administered.options()):
        for group in options["groups"].values():
            assert group["help"]
            assert group["default"] in group["choices"]
            assert all(choice["help"] for choice in group["choices"].values())
        for key in [*_options_keys(options), *options["job"]]:
            assert key["help"], key
            for number in (key, key.get("item", {})):
                if number.get("type") in ("integer", "number"):
                    assert {"maximum", "exclusive_maximum"} & number.keys(), key
                    assert {"minimum", "exclusive_minimum"} & number.keys(), key
        assert json.loads(json.dumps(options)) == options


def test_defaults_of_the_options_are_accepted_and_change_nothing(catalog: Catalog) -> None:
    options = catalog.options()
    (plain,) = catalog.check({})
    for group, each in options["groups"].items():
        for name in each["choices"]:
            values = {key["key"]: key["default"] for key in each["choices"][name]["values"]}
            masks = {"task": "segmentation", "data": "digit_scenes", "model": "unet"}
            choices = {group: name} if masks.get(group) != name else masks
            (spec,) = catalog.check({"choices": choices, "values": values})
            (other,) = catalog.check({"choices": choices})
            first, second = (
                catalog.configuration(each, run_dir=Path("/x")) for each in (spec, other)
            )
            assert first == second
    assert plain == JobSpec(name="digits-cnn")


def test_configuration_has_what_the_server_decides(catalog: Catalog) -> None:
    (spec,) = catalog.check(
        {"name": "mine", "values": {"launch.nproc": 3}, "publish": "served", "device": "cuda"}
    )
    config = catalog.configuration(
        spec, run_dir=Path("/j/run"), publish_dir=Path("/models"), threads=2, device="cpu"
    )
    assert (config.name, config.run_dir, config.publish) == ("served", "/j/run", "/models")
    assert (config.launch.nproc, config.launch.threads) == (3, 2)
    assert (config.launch.device.value, config.track.name) == ("cpu", "none")
    asked = catalog.configuration(spec, run_dir=Path("/j/run"), publish_dir=Path("/models"))
    assert (asked.launch.device.value, asked.launch.threads) == ("cuda", None)
    kept = catalog.configuration(dataclasses.replace(spec, publish=None), run_dir=Path("/j/run"))
    assert (kept.name, kept.publish) == ("mine", None)
    with pytest.raises(SubmissionError, match=r"^publish=served: must be null, as this server"):
        catalog.configuration(spec, run_dir=Path("/j/run"))


def test_stored_job_is_checked_again_by_what_is_offered_now(
    catalog: Catalog, administered: Catalog
) -> None:
    (spec,) = administered.check({"choices": {"data": "flowers"}})
    with pytest.raises(SubmissionError, match=r"^data=flowers: must be one of digits"):
        catalog.configuration(spec, run_dir=Path("/x"))
    evil = JobSpec(name="x", values={"data.name": "custom"})
    with pytest.raises(SubmissionError, match=r"^data\.name=custom: cannot be set"):
        catalog.configuration(evil, run_dir=Path("/x"))


def test_sweep_makes_a_job_of_each_combination_of_values_and_choices(catalog: Catalog) -> None:
    specs = catalog.check(
        {
            "name": "grid",
            "values": {"epochs": 2},
            "sweep": {"norm": ["sync", "whitening"], "optim.lr": [1, 0.5]},
            "priority": 5,
        }
    )
    assert [spec.name for spec in specs] == ["grid-1", "grid-2", "grid-3", "grid-4"]
    assert [dict(spec.sweep_values) for spec in specs] == [
        {"norm": "sync", "optim.lr": 1.0},
        {"norm": "sync", "optim.lr": 0.5},
        {"norm": "whitening", "optim.lr": 1.0},
        {"norm": "whitening", "optim.lr": 0.5},
    ]
    assert specs[2].choices == {"norm": "whitening"}
    assert specs[2].values == {"epochs": 2, "optim.lr": 1.0}
    assert {spec.priority for spec in specs} == {5}
    assert catalog.check({"sweep": {}}) == [JobSpec(name="digits-cnn")]
    (only,) = catalog.check({"sweep": {"seed": [3]}})
    assert (only.name, only.sweep_values) == ("digits-cnn-1", {"seed": 3})


def test_sweep_is_refused_as_a_whole_if_one_job_is(catalog: Catalog) -> None:
    with pytest.raises(SubmissionError, match=r"^norm=synch: did you mean sync\?"):
        catalog.check({"sweep": {"norm": ["sync", "synch"]}})
    with pytest.raises(SubmissionError, match=r"^optim\.momentum=0\.9: optim=adamw has no such"):
        catalog.check({"sweep": {"optim": ["sgd", "adamw"], "optim.momentum": [0.9]}})
    with pytest.raises(SubmissionError, match=r"^recalibrate=true is for batch normalization"):
        catalog.check({"values": {"recalibrate": True}, "sweep": {"norm": ["sync", "whitening"]}})


def test_job_goes_on_with_values_that_may_change(catalog: Catalog) -> None:
    (spec,) = catalog.check({"values": {"epochs": 2, "seed": 1}})
    changed = catalog.changed(spec, {"epochs": 20, "optim.lr": 1})
    assert changed.values == {"epochs": 20, "seed": 1, "optim.lr": 1.0}
    with pytest.raises(SubmissionError, match=r"^seed=2: cannot change in a run that goes on: it"):
        catalog.changed(spec, {"seed": 2})
    with pytest.raises(SubmissionError, match=r"^epochs=0: must be an integer"):
        catalog.changed(spec, {"epochs": 0})
    with pytest.raises(SubmissionError, match=r"^run_dir=/x: cannot be set by a submission"):
        catalog.changed(spec, {"run_dir": "/x"})


@pytest.mark.parametrize(
    ("choices", "values", "reason"),
    [
        ({"data": "digit_scenes"}, {}, "task=classification: must be segmentation for data="),
        ({"task": "segmentation"}, {}, "task=segmentation: must be classification for data="),
        ({"model": "unet"}, {}, "model=unet: must be another for task=classification"),
        (
            {"data": "digit_scenes", "task": "segmentation"},
            {},
            "model=cnn: must be unet, or another that answers for each pixel",
        ),
        (
            {"data": "digit_scenes", "task": "segmentation", "model": "unet"},
            {"data.scale_min": 2, "data.scale_max": 1},
            "data.scale_min=2: must be at most data.scale_max=1",
        ),
        (
            {},
            {"data.shares": "by_class", "data.balanced": True},
            "data.balanced=true: must be false for data.shares=by_class",
        ),
        (
            {"norm": "penalty"},
            {"numerics.compile": True},
            "numerics.compile=true: must be false for norm=penalty",
        ),
        (
            {"data": "digit_scenes", "task": "segmentation", "model": "torchvision"},
            {},
            "model.architecture=resnet18: must be one of deeplabv3_mobilenet_v3_large, ",
        ),
        (
            {"model": "torchvision"},
            {"model.architecture": "fcn_resnet50"},
            "model.architecture=fcn_resnet50: must be none of deeplabv3_mobilenet_v3_large, ",
        ),
        (
            {"optim": "torch"},
            {"optim.optimizer": "Adam", "optim.arguments.momentum": 0.9},
            "optim.arguments.momentum=0.9: must be null for optim.optimizer=Adam, which takes "
            "weight_decay, eps, amsgrad, decoupled_weight_decay",
        ),
        ({}, {"patience": 3, "data.validation": 0}, "patience=3: must be null for data.validation"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused_before(
    choices: dict[str, str], values: dict[str, Any], reason: str, catalog: Catalog
) -> None:
    with pytest.raises(SubmissionError) as refused:
        catalog.check({"choices": choices, "values": values})
    assert str(refused.value).startswith(reason)


def test_stored_job_of_another_version_is_read() -> None:
    spec = JobSpec(name="x", choices={"norm": "sync"}, values={"seed": 1}, cores=2)
    assert JobSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert JobSpec.from_json({"name": "x", "unknown": 1}) == JobSpec(name="x")
    for damaged in ({}, None, []):
        with pytest.raises(JobError, match=r"^not a job as it is stored: "):
            JobSpec.from_json(damaged)  # pyright: ignore[reportArgumentType] -- damaged


def test_sixteen_threads_get_what_one_gets() -> None:
    submission = {"choices": {"norm": "whitening"}, "values": {"optim.lr": 0.5}}
    alone = Catalog().check({**submission, "sweep": {"seed": list(range(20))}})
    defaults._read_defaults.cache_clear()  # pyright: ignore[reportPrivateUsage] -- as in a new process
    together = Barrier(16)

    def work(number: int) -> object:
        together.wait(timeout=60)
        if number % 4 == 0:
            return compose_config(["norm=whitening", "optim.lr=0.5"])
        if number % 4 == 1:
            return Catalog().options()
        catalog = Catalog()
        specs = catalog.check({**submission, "sweep": {"seed": list(range(20))}})
        assert [catalog.configuration(spec, run_dir=Path("/x")).seed for spec in specs] == [
            *range(20)
        ]
        return specs

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(16), timeout=300))
    expected: list[object] = [
        compose_config(["norm=whitening", "optim.lr=0.5"]),
        Catalog().options(),
        alone,
        alone,
    ]
    assert results == expected * 4


def test_jobs_load_neither_torch_nor_a_web_server() -> None:
    code = (
        "import sys, pkgutil, syncbn.jobs\n"
        "for each in pkgutil.walk_packages(syncbn.jobs.__path__, 'syncbn.jobs.'):\n"
        "    if not each.name.endswith('__main__'): __import__(each.name)\n"
        "from syncbn.jobs.offer.catalog import Catalog\n"
        "Catalog().check({})\n"
        "print([each for each in ('torch', 'torchvision', 'timm', 'fastapi', 'starlette', "
        "'uvicorn', 'wandb') if each in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == "[]\n"


def test_arguments_of_an_optimizer_are_set_one_by_one(catalog: Catalog) -> None:
    values = {
        "optim.arguments.momentum": 0.5,
        "optim.arguments.centered": True,
        "optim.arguments.eps": None,
    }
    (spec,) = catalog.check({"choices": {"optim": "torch"}, "values": values})
    config = catalog.configuration(spec, run_dir=Path("/x"))
    assert isinstance(config.optim, TorchOptimConfig)
    assert config.optim.arguments == {"momentum": 0.5, "centered": True}
    assert torch.optim.RMSprop([torch.zeros(1)], lr=0.1, **config.optim.arguments)
