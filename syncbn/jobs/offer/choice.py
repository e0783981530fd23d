"""What may be chosen and set: choices of groups and their keys, made from the schemas and conf/."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from pydantic import TypeAdapter

from syncbn.jobs.offer.bounds import largest
from syncbn.jobs.offer.defaults import Defaults
from syncbn.jobs.offer.help import FileHelp
from syncbn.jobs.offer.key import Key, key_of_schema
from syncbn.jobs.offer.optimizers import argument_keys
from syncbn.jobs.offer.refusals import who_sets
from syncbn.jobs.offer.settings import JobSettings, Named
from syncbn.train.catalog import optimizer_names, torchvision_names
from syncbn.train.schema import (
    SECTIONS,
    LaunchConfig,
    MaskedConfig,
    TorchOptimConfig,
    TrainConfig,
    schemas,
)

# What is offered of each group without the administrator. What is not in here needs files, or runs
# code; a test holds that every choice of the schemas is here, or known to be left out.
OFFERED: Mapping[str, tuple[str, ...]] = {
    "task": ("classification", "segmentation"),
    "data": ("digits", "synthetic", "digit_scenes"),
    "model": ("cnn", "mlp", "unet", "torchvision"),
    "norm": ("sync", "local", "none", "whitening", "penalty", "renormalize"),
    "optim": ("sgd", "adamw", "torch"),
    "schedule": ("cosine", "step", "one_cycle", "constant"),
}

# Each group in a sentence.
GROUP_HELP: Mapping[str, str] = {
    "task": "What is learned of a sample.",
    "data": "The samples.",
    "model": "What learns.",
    "norm": "How activations are normalized.",
    "optim": "How weights follow their gradients.",
    "schedule": "How the learning rate goes over the steps.",
}

# Characters of names of parameters, and wildcards.
_PATTERNS = Key(
    key="optim.freeze",
    kind="string",
    help="",
    pattern=r"[A-Za-z0-9_.*?-]{1,200}",
    form="at most 200 letters, digits, '_', '.', '-', '*' and '?'",
)
_MOST_PATTERNS = 64
_MOST_CLASSES = 1000
# Samples with masks have no labels, by which both choose.
_OF_LABELS = ("data.shares", "data.balanced")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a group may be.

    Attributes:
        name: what a submission calls it.
        schema: the dataclass of its values.
        help: what it is.
        values: those that it has by default, by their names in the schema.
        keys: what may be set of it, by the key with dots.
    """

    name: str
    schema: type[Any]
    help: str
    values: Mapping[str, Any]
    keys: Mapping[str, Key]


def choices_of(group: str, defaults: Defaults, settings: JobSettings) -> dict[str, Choice]:
    """Return what a group may be, by the names that submissions use."""
    named: Mapping[str, Named] = {"data": settings.data, "model": settings.models}.get(group, {})
    offered = {name: Named(kind=name, help="", values={}) for name in OFFERED[group]}
    offered.update(named)
    return {
        name: _choice(group, name, entry, name in named, defaults, settings)
        for name, entry in offered.items()
    }


def top_keys(defaults: Defaults, settings: JobSettings) -> dict[str, Key]:
    """Return what may be set besides choices and what these have."""
    found: dict[str, Key] = {}
    parts = {"": TrainConfig, **{name: schema for name, (schema,) in SECTIONS.items()}}
    for section, schema in parts.items():
        values = defaults.top[section] if section else defaults.top
        prefix = f"{section}." if section else ""
        helps = {key.removeprefix(prefix): text for key, text in defaults.top_help.keys.items()}
        found |= _keys(prefix, "", schema, values, helps, settings)
    launch = defaults.choices["launch"]["local"], defaults.help["launch"]["local"].keys
    return found | _keys("launch.", "", LaunchConfig, *launch, settings)


def _choice(
    group: str, name: str, entry: Named, is_named: bool, defaults: Defaults, settings: JobSettings
) -> Choice:
    schema = schemas(group)[entry.kind]
    prefix = f"{group}."
    values = {**defaults.choices[group][entry.kind], **entry.values}
    comments: FileHelp = defaults.help[group][entry.kind]
    # A model that the administrator names is as it is; a data set is read in many ways.
    fixed = is_named and group == "model"
    keys = {} if fixed else _keys(prefix, entry.kind, schema, values, comments.keys, settings)
    if schema is TorchOptimConfig:
        keys |= argument_keys()
    if issubclass(schema, MaskedConfig):
        keys = {key: each for key, each in keys.items() if key not in _OF_LABELS}
    return Choice(
        name=name, schema=schema, help=entry.help or comments.whole, values=values, keys=keys
    )


def _keys(
    prefix: str,
    kind: str,
    schema: type[Any],
    values: Mapping[str, Any],
    helps: Mapping[str, str],
    settings: JobSettings,
) -> dict[str, Key]:
    """Return what may be set of a schema, in the order of its comments."""
    described = TypeAdapter[Any](schema).json_schema()
    properties = cast(dict[str, dict[str, Any]], described["properties"])
    found: dict[str, Key] = {}
    commented = [name for name in helps if name in properties]
    for name in dict.fromkeys([*commented, *properties]):
        key = f"{prefix}{name}"
        enumerated = _enumerated(key, kind, values)
        is_of_others = who_sets(key, OFFERED) is not None
        if name not in values or (is_of_others and not enumerated and key not in _EXCEPTIONS):
            continue
        node = _resolved(properties[name], described.get("$defs", {}))
        group = prefix.partition(".")[0]
        maxima = largest(settings.limits)
        maximum = maxima.get(f"{group}.{kind}.{name}", maxima.get(key))
        known = {"default": values[name], "help": helps.get(name, ""), "maximum": maximum}
        known |= {"choices": enumerated} if enumerated else _LISTS.get(key, {})
        if (each := key_of_schema(key, node, **known)) is not None:
            found[key] = each
    return found


# Of launch, which the administrator sets otherwise.
_EXCEPTIONS = ("launch.nproc",)
_LISTS: Mapping[str, Mapping[str, Any]] = {
    "optim.freeze": {"item": _PATTERNS, "max_items": _MOST_PATTERNS},
    "task.class_weights": {"max_items": _MOST_CLASSES},
}


def _enumerated(key: str, kind: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the values of a key that its schema would allow any text."""
    if key == "model.architecture" and kind == "torchvision":
        return torchvision_names()
    return optimizer_names() if key == "optim.optimizer" else ()


def _resolved(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a value with what it refers to in its place."""
    if "$ref" in node:
        return definitions[node["$ref"].rpartition("/")[2]]
    if "anyOf" in node:
        return {"anyOf": [_resolved(each, definitions) for each in node["anyOf"]]}
    return node
