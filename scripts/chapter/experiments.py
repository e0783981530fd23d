"""The experiments of the chapter that take one process, each of which returns a figure's data."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import syncbn
from scripts.bench.measure import Rows, on_ranks, table, take_turns
from scripts.chapter.claims import (
    PositionNorm,
    before_and_after_moving,
    chain_step,
    cost_of_order,
    followed_gradient,
    gradient_at_zero_variance,
    means_while_learning,
    newton_step,
    second_order_term,
    steps_until_there,
    train_chain,
)
from scripts.chapter.digits import (
    accuracy,
    accuracy_by_batch,
    mean_and_error,
    perceptron,
    split_digits,
    train_on,
)

Data = dict[str, Any]
LAYERS = range(2, 51)
SCALES = [0.5, 0.9, 1.0, 1.1, 1.2]
EPSILON = 1e-2
RATES = [10 ** (exponent / 4) for exponent in range(-20, 5)]
CHAIN_SCALES = [0.8, 1.0, 1.2]
SEEDS = range(5)
MEAN_RATES = [0.1, 0.25, 0.5, 1.0]
SEEDS_ON_DIGITS = range(30)
TEST_BATCHES = [2, 4, 8, 15, 30, 60, 120]  # divisors of 360 test images
CHANNELS = (16, 32, 64, 128, 256, 512)


def chain(directory: Path) -> Data:
    """Return the orders of a step in chains of several depths and scales of weights."""
    rows: Rows = []
    for layers, scale in itertools.product(LAYERS, SCALES):
        weights = torch.full((layers,), scale, dtype=torch.float64)
        step = chain_step(weights, EPSILON)
        rows.append(
            {
                "layers": layers,
                "scale": scale,
                "orders": step.orders.tolist(),
                "predicted": step.predicted,
                "actual": step.actual,
                "one second-order term": second_order_term(weights, EPSILON),
                "orders 3 and up": step.beyond_second,
                "Newton's step, by its model and in fact": newton_step(weights),
            }
        )
    costs = {order: cost_of_order(50, order) for order in (1, 2, 3, 5, 10, 25)}
    return {"epsilon": EPSILON, "rows": rows, "derivatives of 50 layers by order": costs}


def chain_table(data: Data) -> str:
    """Return the terms of a step in the deepest chains, for each scale of weights."""
    rows: Rows = []
    for row in data["rows"]:
        if row["layers"] == LAYERS[-1]:
            values = {
                "predicted": row["predicted"],
                "actual": row["actual"],
                "ε²g₁g₂∏wᵢ (one term of order 2)": row["one second-order term"],
                "all of order 2": row["orders"][2],
                "orders 3 and up": row["orders 3 and up"],
            }
            shown = {name: _short(value) for name, value in values.items()}
            rows.append({"weights": str(row["scale"])} | shown)
    return table(rows)


def _short(value: float) -> str:
    if 1e-2 <= abs(value) < 1e3:
        return f"{value:.3g}".replace("-", "−")
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", "−")


def rates(directory: Path) -> Data:
    """Return the final losses of chains with and without BN, over learning rates."""
    rows: Rows = []
    for normalize, scale in itertools.product((True, False), CHAIN_SCALES):
        rates = torch.tensor(RATES, dtype=torch.float64)
        chains = [train_chain(normalize, rates, 20, 300, seed, scale)[-1] for seed in SEEDS]
        finals = zip(RATES, torch.stack(chains, 1).tolist(), strict=True)
        rows += [
            {"normalized": normalize, "scale": scale, "lr": lr, "losses": losses}
            for lr, losses in finals
        ]
    return {"rows": rows}


def gradient(directory: Path) -> Data:
    """Return mean and deviation of a unit's activations, the more they follow their gradient.

    Of two ranks with unequal shares, which is to rounding what one computes of all samples.
    """
    generator = torch.Generator().manual_seed(0)
    sizes, centers = [24, 40], [0.0, 2.0]
    h, dy = (torch.randn(sum(sizes), 1, generator=generator).double() for _ in range(2))
    rank = torch.tensor([0, 1]).repeat_interleave(torch.tensor(sizes))[:, None]
    h += torch.tensor(centers)[rank]
    dy += 1.5 + 0.8 * h - 2 * rank  # asks for less of all, closer together, and the ranks apart
    rows: Rows = []
    for name, constants in (("through μ and σ", False), ("μ and σ as constants", True)):
        for step in torch.linspace(0, 1, 21).tolist():
            moved = followed_gradient(h, dy, step, constants)
            rows.append(
                {
                    "gradient": name,
                    "step": step,
                    "mean": moved.mean().item(),
                    "deviation": moved.std(correction=0).item(),
                    "means of the ranks": [part.mean().item() for part in moved.split(sizes)],
                }
            )
    return {"rows": rows}


def delta(directory: Path) -> Data:
    """Return the gradient at zero variance for several δ and dtypes."""
    rows: Rows = []
    for exponent in range(-14, 1):
        row: Data = {"eps": 10.0**exponent}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "eps is")  # what it warns of is shown
                size = gradient_at_zero_variance(row["eps"], dtype).abs().max().item()
            row[str(dtype).removeprefix("torch.")] = size
        rows.append(row)
    return {"rows": rows}


def mean(directory: Path) -> Data:
    """Return how a unit's mean gets to where it is wanted, by β alone and by everything."""
    rows: Rows = []
    for rate, normalize in itertools.product(MEAN_RATES, (True, False)):
        means = [means_while_learning(normalize, rate, seed, 50) for seed in range(10)]
        steps = [steps_until_there(each) for each in means]
        rows.append({"lr": rate, "normalized": normalize, "means": means, "steps": steps})
    return {"rows": rows}


def translation(directory: Path) -> Data:
    """Return a digit, it moved, and both normalized among others that stay."""
    images = split_digits().x[:64].reshape(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    places = [0, *torch.randint(5, (len(images) - 1,), generator=generator).tolist()]
    wide = zip(images, places, strict=True)
    x = torch.stack([pad(image, (place, 4 - place)) for image, place in wide]).double()
    layers: Mapping[str, Callable[[Tensor], Tensor]] = {
        "image": lambda x: x,
        "μ and σ of the map": syncbn.SyncBatchNorm(1, dtype=torch.float64),
        "μ and σ of each position": PositionNorm(),
    }
    pairs = {name: before_and_after_moving(layer, x, 4) for name, layer in layers.items()}
    return {"images": {name: [y[0].tolist() for y in pair] for name, pair in pairs.items()}}


def digits(directory: Path) -> Data:
    """Return accuracies of the places of BN, and of statistics of the batch at test time."""
    data = split_digits()
    places: dict[str, list[float]] = {"before": [], "after": [], "none": []}
    sizes: Data = {"mixed": {}, "by class": {}}
    by_class = data.test_labels.argsort(stable=True)
    for place, seed in itertools.product(places, SEEDS_ON_DIGITS):
        torch.manual_seed(seed)
        model = perceptron(place)
        train_on(data, model, seed, 0.1, 4)
        places[place].append(accuracy(data, model))
        if place == "before":
            mixed = torch.randperm(len(by_class), generator=torch.Generator().manual_seed(seed))
            for found, order in zip(sizes.values(), (mixed, by_class), strict=True):
                for size in TEST_BATCHES:
                    value = accuracy_by_batch(data, model, size, order)
                    found.setdefault(str(size), []).append(value)
    gain = [a - b for a, b in zip(places["before"], places["after"], strict=True)]
    return {
        "places": places,
        "before less after, mean and standard error": mean_and_error(gain),
        "batch": sizes,
    }


def _forward_and_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)


def _whitening_times(turns: int) -> Rows:
    rows: Rows = []
    for channels in CHANNELS:
        x = torch.randn(16, channels, 8, 8, requires_grad=True)
        dy = torch.randn(x.shape)
        layers: dict[str, nn.Module] = {
            "batch normalization": syncbn.SyncBatchNorm(channels),
            "whitening, groups of 1": syncbn.SyncWhitening(channels, 1),
            "groups of 16": syncbn.SyncWhitening(channels, 16),
            "all, zca": syncbn.SyncWhitening(channels, channels),
            "all, newton": syncbn.SyncWhitening(channels, channels, "newton"),
        }
        steps = {name: partial(_forward_and_backward, each, x, dy) for name, each in layers.items()}
        times = take_turns(steps, turns)
        rows.append({"C": channels} | {name: 1e3 * taken for name, taken in times.items()})
    return rows


def whitening(directory: Path) -> Data:
    """Return the time of whitening beside that of batch normalization, as channels grow."""
    return {
        "input": "16×C×8×8 on each rank, float32, one thread",
        "milliseconds by ranks": {f"{n}": on_ranks(n, _whitening_times, 5) for n in (1, 2)},
    }


def whitening_table(data: Data) -> str:
    """Return the times of `whitening`, a row for each number of ranks and channels."""
    times = data["milliseconds by ranks"]
    return table([{"ranks": ranks} | row for ranks, rows in times.items() for row in rows])
