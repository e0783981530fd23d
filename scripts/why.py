"""Computes and draws what docs/why.md shows: data and pictures of the claims of the chapter."""

import argparse
import itertools
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import matplotlib as mpl
import torch
import why_plots as plots
from chapter import (
    PositionNorm,
    accuracy,
    accuracy_by_batch,
    before_and_after_moving,
    chain_step,
    cost_of_order,
    digits,
    followed_gradient,
    gradient_at_zero_variance,
    mean_and_error,
    means_while_learning,
    newton_step,
    perceptron,
    second_order_term,
    steps_until_there,
    train_chain,
    train_on,
)
from document import write_table
from experiments import before, before_table, synchronising, synchronising_table
from matplotlib.figure import Figure
from measure import Rows, on_ranks, table, take_turns
from torch import Tensor, nn
from torch.nn.functional import pad

import syncbn

Data = dict[str, Any]
IMAGES = Path(__file__).parent.parent / "docs" / "images"
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


def main() -> None:
    """Compute and draw the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs/why"), help="default: %(default)s"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--write", action="store_true", help="put pictures and tables into docs/ too"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw, from the data that a run before has left"
    )
    arguments = parser.parse_args()
    places = [arguments.directory, *([IMAGES] if arguments.write else [])]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=place).close()
        except OSError as error:
            sys.exit(f"why.py: cannot write to {place}: {error.strerror}; name another directory")
    torch.set_num_threads(1)  # the layers are too small to share
    for name in arguments.only:
        started = time.monotonic()
        print(f"{name} …", end=" ", flush=True)
        compute, draw = SECTIONS[name]
        file = arguments.directory / f"{name}.json"
        if not arguments.draw:
            file.write_text(json.dumps(compute(arguments.directory), indent=1))
        elif not file.exists():
            sys.exit(f"why.py: there is no {file} to draw; leave out --draw")
        data = json.loads(file.read_text())
        picture = arguments.directory / f"why-{name}.png"
        with mpl.rc_context(plots.STYLE):
            draw(data).savefig(picture)
        if arguments.write:
            shutil.copy(picture, IMAGES)
            if name in TABLES:
                write_table("why.md", f"why.py {name}", TABLES[name](data))
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    print(f"data and pictures are in {arguments.directory}")


def _chain(directory: Path) -> Data:
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


def _chain_table(data: Data) -> str:
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


def _rates(directory: Path) -> Data:
    """Return the final losses of chains with and without BN, over learning rates."""
    rows: Rows = []
    for normalise, scale in itertools.product((True, False), CHAIN_SCALES):
        rates = torch.tensor(RATES, dtype=torch.float64)
        chains = [train_chain(normalise, rates, 20, 300, seed, scale)[-1] for seed in SEEDS]
        finals = zip(RATES, torch.stack(chains, 1).tolist(), strict=True)
        rows += [
            {"normalised": normalise, "scale": scale, "lr": lr, "losses": losses}
            for lr, losses in finals
        ]
    return {"rows": rows}


def _gradient(directory: Path) -> Data:
    """Return mean and deviation of a unit's activations, the more they follow their gradient.

    Of two ranks with unequal shares, which is to rounding what one computes of all samples.
    """
    generator = torch.Generator().manual_seed(0)
    sizes, centres = [24, 40], [0.0, 2.0]
    h, dy = (torch.randn(sum(sizes), 1, generator=generator).double() for _ in range(2))
    rank = torch.tensor([0, 1]).repeat_interleave(torch.tensor(sizes))[:, None]
    h += torch.tensor(centres)[rank]
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


def _delta(directory: Path) -> Data:
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


def _mean(directory: Path) -> Data:
    """Return how a unit's mean gets to where it is wanted, by β alone and by everything."""
    rows: Rows = []
    for rate, normalise in itertools.product(MEAN_RATES, (True, False)):
        means = [means_while_learning(normalise, rate, seed, 50) for seed in range(10)]
        steps = [steps_until_there(each) for each in means]
        rows.append({"lr": rate, "normalised": normalise, "means": means, "steps": steps})
    return {"rows": rows}


def _translation(directory: Path) -> Data:
    """Return a digit, it moved, and both normalised among others that stay."""
    images = digits().x[:64].reshape(-1, 1, 8, 8)
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


def _digits(directory: Path) -> Data:
    """Return accuracies of the places of BN, and of statistics of the batch at test time."""
    data = digits()
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


def _whitening(directory: Path) -> Data:
    """Return the time of whitening beside that of batch normalization, as channels grow."""
    return {
        "input": "16×C×8×8 on each rank, float32, one thread",
        "milliseconds by ranks": {f"{n}": on_ranks(n, _whitening_times, 5) for n in (1, 2)},
    }


def _whitening_table(data: Data) -> str:
    times = data["milliseconds by ranks"]
    return table([{"ranks": ranks} | row for ranks, rows in times.items() for row in rows])


Section = tuple[Callable[[Path], Data], Callable[[Data], Figure]]
SECTIONS: Mapping[str, Section] = {
    "chain": (_chain, plots.chain),
    "rates": (_rates, plots.rates),
    "gradient": (_gradient, plots.gradient),
    "delta": (_delta, plots.delta),
    "mean": (_mean, plots.mean),
    "translation": (_translation, plots.translation),
    "digits": (_digits, plots.digits),
    "before": (before, plots.before),
    "whitening": (_whitening, plots.whitening),
    "synchronising": (synchronising, plots.synchronising),
}
TABLES: Mapping[str, Callable[[Data], str]] = {
    "chain": _chain_table,
    "before": before_table,
    "whitening": _whitening_table,
    "synchronising": synchronising_table,
}


if __name__ == "__main__":
    main()
