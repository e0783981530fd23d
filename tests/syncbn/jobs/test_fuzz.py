"""Whatever is sent is refused with a reason, or is a job that composes and validates."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from syncbn.errors import SubmissionError
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.spec import JobSpec
from syncbn.train.config import compose_config, from_yaml, to_yaml

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 10**400, -1, 0, 1, 2])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["sync", "custom", "${oc.env:HOME}", "???", "\\", "x:y", "mixed", "."])
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def _keys(catalog: Catalog) -> list[dict[str, Any]]:
    options = catalog.options()
    choices = [each for group in options["groups"].values() for each in group["choices"].values()]
    return [*options["values"], *(key for choice in choices for key in choice["values"])]


def _valid(key: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that are within what the options say of a key."""
    match key["type"]:
        case "boolean":
            values: st.SearchStrategy[Any] = st.booleans()
        case "enum":
            values = st.sampled_from(key["choices"])
        case "integer":
            # Mostly small ones, because products of large ones are refused.
            small = st.integers(key["minimum"], min(key["maximum"], key["minimum"] + 5))
            values = small | small | st.integers(key["minimum"], key["maximum"])
        case "number":
            low = key.get("minimum", key.get("exclusive_minimum"))
            high = key.get("maximum", key.get("exclusive_maximum"))
            values = st.floats(
                low,
                high,
                exclude_min="exclusive_minimum" in key,
                exclude_max="exclusive_maximum" in key,
            )
            if "maximum" in key:
                values |= st.just(high)
        case "list" if key["item"]["type"] == "number":
            values = st.lists(_valid(key["item"]), max_size=3)
        case "list":
            values = st.lists(st.from_regex(key["item"]["pattern"], fullmatch=True), max_size=3)
        case other:
            raise AssertionError(other)
    return st.none() | values if key["nullable"] else values


@st.composite
def _submissions(
    draw: st.DrawFn, options: dict[str, Any], fixed: dict[str, str] | None = None
) -> dict[str, Any]:
    """Draw choices, but for those that are fixed, and values that are within their ranges."""
    groups = options["groups"]
    choices = {
        group: draw(st.sampled_from(sorted(each["choices"])))
        for group, each in groups.items()
        if draw(st.booleans())
    } | (fixed or {})
    chosen = {group: choices.get(group, each["default"]) for group, each in groups.items()}
    parts = [groups[group]["choices"][name]["values"] for group, name in chosen.items()]
    keys = [key for part in (options["values"], *parts) for key in part]
    picked = draw(st.lists(st.sampled_from(keys), max_size=6, unique_by=lambda key: key["key"]))
    return {
        "choices": choices,
        "values": {key["key"]: draw(_valid(key)) for key in picked},
        "publish": draw(st.none() | st.just("served")),
    }


def _override(key: str, value: Any) -> str:
    """Return a value as the command line takes it."""
    match value:
        case None:
            return f"{key}=null"
        case bool():
            return f"{key}={str(value).lower()}"
        case list():
            items: list[Any] = value
            return f"{key}=[{','.join(json.dumps(item) for item in items)}]"
        case _:
            return f"{key}={value}"


def _sent(catalog: Catalog, submission: Any) -> tuple[list[JobSpec], str]:
    """Return the jobs of a submission, or none, and why it is refused."""
    try:
        return catalog.check(submission), ""
    except SubmissionError as error:
        return [], str(error)


def _check_composes(
    catalog: Catalog,
    submission: dict[str, Any],
    entries: dict[str, list[str]] | None = None,
    defaults: dict[str, Any] | None = None,
) -> None:
    """Check that an accepted submission is what Hydra composes and the trainer reads.

    Args:
        catalog: accepts it.
        submission: what is sent.
        entries: what to type for the choices that are the administrator's.
        defaults: what to type for the administrator's values.
    """
    (spec,) = catalog.check(submission)
    config = catalog.configuration(
        spec,
        run_dir=Path("/jobs/work/x/run"),
        publish_dir=Path("/models"),
        threads=1,
        device="cpu",
    )
    chosen = {group: each["default"] for group, each in catalog.options()["groups"].items()}
    typed: list[str] = []
    for group, name in {**chosen, **spec.choices}.items():
        typed += (entries or {}).get(f"{group}={name}", [f"{group}={name}"])
    values = {**(defaults or {}), **spec.values}
    for key in [key for key in values if key.startswith("optim.arguments.")]:
        if (value := values.pop(key)) is not None:
            values[f"+{key}"] = value
    composed = compose_config(
        [
            *typed,
            *(_override(key, value) for key, value in values.items()),
            "track=none",
            f"name={spec.publish or spec.name}",
            "run_dir=/jobs/work/x/run",
            f"publish={'null' if spec.publish is None else '/models'}",
            "launch.threads=1",
            "launch.device=cpu",
        ]
    )
    assert config == composed
    assert from_yaml(to_yaml(config)) == config
    assert JobSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert catalog.check({**submission, "values": spec.values}) == [spec]


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_accepted_job_is_what_hydra_composes(data: st.DataObject, catalog: Catalog) -> None:
    submission = data.draw(_submissions(catalog.options()))
    assume(_sent(catalog, submission)[0])
    _check_composes(catalog, submission)


@pytest.mark.long
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_many_accepted_jobs_are_what_hydra_composes(data: st.DataObject, catalog: Catalog) -> None:
    submission = data.draw(_submissions(catalog.options()))
    assume(_sent(catalog, submission)[0])
    _check_composes(catalog, submission)


def test_each_choice_is_what_hydra_composes(catalog: Catalog) -> None:
    groups = catalog.options()["groups"]
    masks = {"task": "segmentation", "data": "digit_scenes", "model": "unet"}
    others = [masks, {"model": "mlp"}, {"model": "torchvision"}, {"data": "synthetic"}]
    for number in range(max(len(each["choices"]) for each in groups.values())):
        choices = {
            group: list(groups[group]["choices"])[number % len(groups[group]["choices"])]
            for group in ("norm", "optim", "schedule")
        }
        _check_composes(catalog, {"choices": {**choices, **others[number % len(others)]}})


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_value_of_a_key_is_accepted_or_refused_with_what_is_valid(
    data: st.DataObject, catalog: Catalog
) -> None:
    options = catalog.options()
    group = data.draw(st.sampled_from([*options["groups"], "", "job"]))
    choices: dict[str, str] = {}
    if group in options["groups"]:
        offered = options["groups"][group]["choices"]
        having = sorted(name for name, choice in offered.items() if choice["values"])
        choices = {group: data.draw(st.sampled_from(having))}
        keys = offered[choices[group]]["values"]
    else:
        keys = options["job" if group == "job" else "values"]
    key = data.draw(st.sampled_from(keys))
    value = data.draw(_JSON)
    set_to = {key["key"]: value}
    submission = {"choices": choices, **(set_to if group == "job" else {"values": set_to})}
    specs, reason = _sent(catalog, submission)
    assert reason.isprintable()
    if not specs:
        said = f"{key['key']}=" in reason or "job may take" in reason
        alone = choices.get(group) in ("segmentation", "digit_scenes", "unet")  # without the others
        assert said or alone
        assert "must" in reason


@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_any_json_is_accepted_or_refused_with_a_reason(
    data: st.DataObject, catalog: Catalog
) -> None:
    keys = sorted({key["key"] for key in _keys(catalog)})
    names = st.sampled_from([*keys, *catalog.options()["groups"]]) | st.text(max_size=12)
    fields = ["name", "choices", "values", "sweep", "publish", "priority", "cores", "x"]
    objects = st.dictionaries(names, _JSON, max_size=3)
    sweeps = st.dictionaries(names, st.lists(_SCALARS, max_size=3), max_size=3)
    submission = data.draw(
        st.dictionaries(st.sampled_from(fields), _JSON | objects | sweeps, max_size=4) | _JSON
    )
    specs, reason = _sent(catalog, submission)
    assert bool(specs) != bool(reason)
    assert reason.isprintable()
    assert len(reason) < 3000
    for spec in specs:
        catalog.configuration(spec, run_dir=Path("/x"), publish_dir=Path("/models"))


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_administered_job_is_what_hydra_composes(
    data: st.DataObject, administered: Catalog
) -> None:
    root = administered.settings.file.parent
    entries = {
        "data=flowers": ["data=folder", f"data.path={root}/images/flowers", "data.size=64"],
        "data=streets": [
            "data=cityscapes",
            "data.path=/srv/cityscapes",
            "data.height=128",
            "data.width=256",
        ],
        "data=ours": ["data=custom", "data.factory=our.data:load", "+data.arguments.split=3"],
        "model=large": [
            "model=timm",
            "model.architecture=resnet50",
            "+model.arguments.drop_rate=0.1",
        ],
        "model=pretrained": [
            "model=torchvision",
            "model.architecture=resnet18",
            f"model.weights={root}/weights/resnet18.safetensors",
            "model.weights_strict=false",
        ],
    }
    name = data.draw(st.sampled_from(["flowers", "streets", "ours"]))
    fixed = {
        "data": name,
        "task": "segmentation" if name == "streets" else "classification",
        "model": "large"
        if name == "streets"
        else data.draw(st.sampled_from(["large", "pretrained"])),
    }
    submission = data.draw(_submissions(administered.options(), fixed))
    assume(_sent(administered, submission)[0])
    defaults = {"launch.timeout_s": 600, "optim.lr": 0.02, "epochs": 3}
    _check_composes(administered, submission, entries, defaults)
