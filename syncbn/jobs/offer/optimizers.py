"""Arguments of torch's optimizers, one by one: which there are, and which optimizer takes which."""

from collections.abc import Mapping
from typing import Any

from syncbn.errors import SubmissionError
from syncbn.jobs.offer.key import Key
from syncbn.jobs.offer.values import shown
from syncbn.train.catalog import optimizer_arguments
from syncbn.train.schema import TorchOptimConfig, TrainConfig

ARGUMENTS = "optim.arguments"

# Numbers and booleans that change what is learned; not what only says how it is computed.
_NUMBERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "weight_decay": ("How much weights are drawn to 0", {"minimum": 0, "maximum": 10}),
    "momentum": ("Share of the last update that goes into the next", {"exclusive_maximum": 1}),
    "dampening": ("Share of the gradient that momentum leaves out", {"maximum": 1}),
    "alpha": ("Weight of the old average of squares, or a power", {"maximum": 1}),
    "rho": ("Weight of the old average of squares", {"maximum": 1}),
    "eps": ("Added to what is divided by", {"maximum": 1}),
    "lr_decay": ("How fast the learning rate falls", {"maximum": 1}),
    "momentum_decay": ("How fast the momentum falls", {"maximum": 1}),
}
_SWITCHES: Mapping[str, str] = {
    "nesterov": "Whether momentum looks one step ahead",
    "amsgrad": "Whether the largest average of squares counts",
    "centered": "Whether the variance takes the place of the average of squares",
    "decoupled_weight_decay": "Whether weight decay passes by the averages of gradients",
}
# Of these, it is no single number.
_PAIRS = {("Adafactor", "eps")}


def argument_keys() -> dict[str, Key]:
    """Return the arguments that may be set, each null by default, which leaves it to torch."""
    found: dict[str, Key] = {}
    for name, (text, bounds) in _NUMBERS.items():
        key = f"{ARGUMENTS}.{name}"
        ranged: dict[str, Any] = {"minimum": 0, **bounds}
        found[key] = Key(key=key, kind="number", nullable=True, help=_help(name, text), **ranged)
    for name, text in _SWITCHES.items():
        key = f"{ARGUMENTS}.{name}"
        found[key] = Key(key=key, kind="boolean", nullable=True, help=_help(name, text))
    return found


def check_arguments(config: TrainConfig) -> None:
    """Check that the optimizer takes the arguments that are set.

    Raises:
        SubmissionError: it does not take one of them.
    """
    if not isinstance(config.optim, TorchOptimConfig):
        return
    optimizer, arguments = config.optim.optimizer, config.optim.arguments
    known = _taken(optimizer)
    for name, value in arguments.items():
        if name not in known:
            raise SubmissionError(
                f"{ARGUMENTS}.{name}={shown(value)}: must be null for "
                f"optim.optimizer={optimizer}, which takes {', '.join(known) or 'none of these'}"
            )


def without_null(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not left to torch."""
    return {name: value for name, value in arguments.items() if value is not None}


def _taken(optimizer: str) -> list[str]:
    given = optimizer_arguments()[optimizer]
    return [
        name
        for name in (*_NUMBERS, *_SWITCHES)
        if name in given and (optimizer, name) not in _PAIRS
    ]


def _help(name: str, text: str) -> str:
    takers = [optimizer for optimizer in optimizer_arguments() if name in _taken(optimizer)]
    return f"{text}; null: torch's own. Of {', '.join(takers)}."
