"""Computes and draws what docs/why.md shows: data and pictures of the claims of the chapter."""

import argparse
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from chapter import (
    accuracy,
    accuracy_by_batch,
    chain_step,
    cost_of_order,
    digits,
    gradient_at_zero_variance,
    mean_and_error,
    newton_step,
    perceptron,
    second_order_term,
    steps_to_move_the_mean,
    train_chain,
    train_on,
)
from experiments import BATCHES, KINDS, NORMS, T_95, before, synchronising
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots import BLUE, GREEN, GREY, ORANGE

import syncbn

Data = dict[str, Any]
IMAGES = Path(__file__).parent.parent / "docs" / "images"
LAYERS = [2, 3, 5, 10, 20, 35, 50]
SCALES = [0.5, 0.9, 1.0, 1.1, 1.2]
EPSILON = 1e-2
RATES = [10 ** (exponent / 4) for exponent in range(-12, 5)]
SEEDS = range(5)
SEEDS_ON_DIGITS = range(30)
TEST_BATCHES = [2, 4, 8, 15, 30, 60, 120]  # divisors of 360 test images


def main() -> None:
    """Compute and draw the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs/why"), help="default: %(default)s"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--write", action="store_true", help="copy the pictures to docs/images")
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
        data = compute(arguments.directory)
        (arguments.directory / f"{name}.json").write_text(json.dumps(data, indent=1))
        picture = draw(data)
        for place in places:
            picture.savefig(place / f"why-{name}.png", dpi=120, facecolor="white")
        print(f"{time.monotonic() - started:.0f} s", flush=True)
    print(f"data and pictures are in {arguments.directory}")


def _chain(directory: Path) -> Data:
    """Return the orders of a step in chains of several depths and scales of weights."""
    rows: list[Data] = []
    for layers in LAYERS:
        for scale in SCALES:
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


def _draw_chain(data: Data) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = list(figure.subplots(1, 2))
    deep = [row for row in data["rows"] if row["layers"] == LAYERS[-1]]
    for row, colour in zip(deep, (GREY, GREEN, BLUE, ORANGE, "black"), strict=True):
        sizes = [abs(term) for term in row["orders"][1:]]
        shown = [(order, size) for order, size in enumerate(sizes, 1) if size > 1e-300]
        left.plot(*zip(*shown, strict=True), color=colour, label=f"w = {row['scale']}")
        rows = [each for each in data["rows"] if each["scale"] == row["scale"]]
        ratios = [abs(each["actual"] / each["predicted"]) for each in rows]
        right.plot(LAYERS, ratios, color=colour, marker="o", label=f"w = {row['scale']}")
    left.set(xlabel="order k in ε", ylabel=f"|term of order k|, {LAYERS[-1]} layers", yscale="log")
    left.set_ylim(1e-60, 1e100)
    left.set_title("one step, term by term", fontsize=10)
    right.axhline(1, color="black", linewidth=1, linestyle="--")
    right.set(xlabel="layers l", ylabel="|actual change| / |predicted by εgᵀg|", yscale="log")
    right.set_ylim(1e-3, 1e5)  # the last point of the largest weights lies far beyond
    right.set_title("what the whole step does", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    for panel in (left, right):
        _clear(panel)
    largest = max(range(len(deep[-2]["orders"]) - 1), key=lambda k: abs(deep[-2]["orders"][k + 1]))
    figure.suptitle(
        f"With weights of {SCALES[-2]} and {LAYERS[-1]} layers, the term of order {largest + 1} is "
        "the largest, not the first"
    )
    return figure


def _rates(directory: Path) -> Data:
    """Return the final losses of chains with and without BN, over learning rates."""
    rows: list[Data] = []
    for normalise in (True, False):
        for lr in RATES:
            finals = [train_chain(normalise, lr, 20, 300, seed)[-1] for seed in SEEDS]
            rows.append({"normalised": normalise, "lr": lr, "losses": finals})
    return {"rows": rows}


def _draw_rates(data: Data) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panel = figure.subplots()
    good: dict[bool, list[float]] = {}
    for normalised, colour, label, shift in (
        (True, BLUE, "with BN", 0.96),
        (False, ORANGE, "without", 1.04),
    ):
        rows = [row for row in data["rows"] if row["normalised"] == normalised]
        for row in rows:
            losses = [min(max(loss, 1e-12), 1e3) for loss in row["losses"]]
            # Beside each other, so that neither hides the other where both diverge.
            panel.plot([row["lr"] * shift] * len(losses), losses, "o", color=colour, alpha=0.4)
        middle = [sorted(min(max(x, 1e-12), 1e3) for x in row["losses"])[2] for row in rows]
        panel.plot([row["lr"] * shift for row in rows], middle, color=colour, label=label)
        good[normalised] = [
            row["lr"] for row, loss in zip(rows, middle, strict=True) if loss < 1e-2
        ]
    panel.set(xscale="log", yscale="log", xlabel="learning rate")
    panel.set_ylabel("loss after 300 steps\n(1000: diverged; points: 5 seeds, line: median)")
    panel.legend(frameon=False)
    _clear(panel)
    figure.suptitle(
        f"A chain of 20 layers learns at rates up to {max(good[True]):.2g} with BN, up to "
        f"{max(good[False]):.2g} without"
    )
    return figure


def _delta(directory: Path) -> Data:
    """Return the gradient at zero variance for several δ and dtypes."""
    rows: list[Data] = []
    for exponent in range(-14, 1):
        row: Data = {"eps": 10.0**exponent}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "eps is")  # what it warns of is shown
                size = gradient_at_zero_variance(row["eps"], dtype).abs().max().item()
            row[str(dtype).removeprefix("torch.")] = size
        rows.append(row)
    return {"rows": rows}


def _draw_delta(data: Data) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panel = figure.subplots()
    for dtype, colour, marker in (
        ("float32", BLUE, "o"),
        ("bfloat16", ORANGE, "x"),
        ("float16", GREEN, "s"),
    ):
        rows = [row for row in data["rows"] if row[dtype] < float("inf")]
        panel.plot(
            *([row[key] for row in rows] for key in ("eps", dtype)),
            color=colour, marker=marker, label=dtype, linestyle="none", markerfacecolor="none",
        )  # fmt: skip
    lowest = min(row["eps"] for row in data["rows"] if row["float16"] < float("inf"))
    panel.axhline(65504, color=GREEN, linewidth=1, linestyle="--")
    panel.annotate("float16 ends here", (1e-4, 8e4), fontsize=8, color=GREEN)
    panel.set(xscale="log", yscale="log", xlabel="δ (eps)", ylabel="|gradient| at zero variance")
    panel.legend(frameon=False)
    _clear(panel)
    figure.suptitle(
        f"The gradient is 1/√δ: finite down to δ = {lowest:.0e} in float16, and beyond in the "
        "others"
    )
    return figure


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
    moves = {
        str(normalise): [steps_to_move_the_mean(normalise, 0.5, seed) for seed in range(10)]
        for normalise in (True, False)
    }
    return {
        "places": places,
        "before less after, mean and standard error": mean_and_error(gain),
        "batch": sizes,
        "steps to a mean": moves,
    }


def _draw_digits(data: Data) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = list(figure.subplots(1, 2, width_ratios=[1, 2]))
    found = {place: mean_and_error(values) for place, values in data["places"].items()}
    for number, (mean, error) in enumerate(found.values()):
        left.errorbar(number, 100 * mean, 200 * error, color=BLUE, marker="o", capsize=4)
    left.set_xticks(range(len(found)), ["before\nReLU", "after\nReLU", "no BN"])
    left.set_xlim(-0.5, len(found) - 0.5)
    left.set_ylabel("test accuracy / %, ± 2 standard errors")
    for (name, by_size), colour in zip(data["batch"].items(), (BLUE, ORANGE), strict=True):
        style = {"color": colour, "label": f"statistics of the batch, {name}"}
        _intervals(right, [int(size) for size in by_size], list(by_size.values()), 2, style)
    running, _ = found["before"]
    right.axhline(100 * running, color=GREEN, linestyle="--", label="running averages, any batch")
    _sizes(right, TEST_BATCHES)
    right.set(xlabel="samples in a test batch", ylabel="test accuracy / %, ± 2 standard errors")
    right.legend(frameon=False, fontsize=8)
    for panel in (left, right):
        _clear(panel)
    two, _ = mean_and_error(data["batch"]["mixed"]["2"])
    figure.suptitle(
        f"Evaluated in pairs by their own statistics, {100 * two:.0f} % are right; by running "
        f"averages, {100 * running:.0f} %, one by one"
    )
    return figure


def _draw_synchronising(data: Data) -> Figure:
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels: list[list[Axes]] = figure.subplots(2, 2, sharex=True, sharey="row").tolist()
    rows = data["rows"]
    for line, share in zip(panels, ("mixed", "by_class"), strict=True):
        for panel, ranks in zip(line, (2, 4), strict=True):
            for norm, colour, shift in zip(NORMS, (ORANGE, BLUE), (0.97, 1.03), strict=True):
                found = [
                    r for r in rows if (r["ranks"], r["shares"], r["norm"]) == (ranks, share, norm)
                ]
                style = {"color": colour, "label": f"norm={norm}"}
                places = [row["batch"] * shift for row in found]
                _intervals(panel, places, [row["accuracies"] for row in found], T_95, style)
            _sizes(panel, BATCHES)
            panel.set_title(f"{ranks} ranks, data.shares={share}", fontsize=10)
            _clear(panel)
        line[0].set_ylabel("test accuracy / %\n(95 % intervals)")
    for panel in panels[1]:
        panel.set_xlabel("batch of a rank")
    panels[0][0].legend(frameon=False)
    gains = data["gains of sync over local"]
    best = max(gains, key=lambda row: row["gain"])
    real = sum(abs(row["gain"]) > row["95 %"] for row in gains)
    figure.suptitle(
        f"Synchronising gains up to {100 * best['gain']:.1f} points ({best['ranks']} ranks, "
        f"batches of {best['batch']}, {best['shares']}); {real} of {len(gains)} differences are "
        "beyond chance"
    )
    return figure


def _draw_before(data: Data) -> Figure:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = list(figure.subplots(1, 2, width_ratios=[3, 2]))
    models = list(dict.fromkeys(row["model"] for row in data["rows"]))
    for offset, (model, colour) in enumerate(zip(models, (BLUE, ORANGE, GREEN), strict=True)):
        found = [row["accuracies"] for row in data["rows"] if row["model"] == model]
        places = [place + 0.15 * (offset - 1) for place in range(len(KINDS))]
        style = {"color": colour, "label": model, "linestyle": "none"}
        _intervals(left, places, found, T_95, style)
        (undone,) = [r["steps"] for r in data["rows"] if r["model"] == model and "steps" in r]
        steps = [line["step"] for line in undone]
        sizes = [line["undone_log_scale"] for line in undone]
        right.plot(steps, sizes, color=colour, label=model)
    left.set_xticks(range(len(KINDS)), KINDS, rotation=20)
    left.set_ylim(0, 102)
    left.set_ylabel("test accuracy / % after 4 epochs (95 % intervals)")
    left.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.4))
    right.set(yscale="log", xlabel="step", ylabel="change of ln σ that renormalising undoes")
    for panel in (left, right):
        _clear(panel)
    deep = {
        r["norm"]: mean_and_error(r["accuracies"])[0]
        for r in data["rows"]
        if r["model"] == models[-1]
    }
    figure.suptitle(
        f"20 layers deep, batch normalization reaches {100 * deep['sync']:.0f} %, none "
        f"{100 * deep['none']:.0f} %, a penalty {100 * deep['penalty']:.0f} %, renormalising "
        f"{100 * deep['renormalize']:.0f} %"
    )
    return figure


def _whitening(directory: Path) -> Data:
    """Return the time of whitening over that of batch normalization, for more and more channels."""
    rows: list[Data] = []
    for channels in (16, 32, 64, 128, 256, 512):
        x = torch.randn(16, channels, 8, 8, requires_grad=True)
        layers: dict[str, torch.nn.Module] = {
            "batch normalization": syncbn.SyncBatchNorm(channels),
            "groups of 16": syncbn.SyncWhitening(channels, 16),
            "all, zca": syncbn.SyncWhitening(channels, channels),
            "all, newton": syncbn.SyncWhitening(channels, channels, "newton"),
        }
        times: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(7):
            for name, layer in layers.items():
                started = time.perf_counter()
                layer(x).sum().backward()
                times[name].append(1e3 * (time.perf_counter() - started))
        rows.append({"channels": channels} | {k: statistics.median(v) for k, v in times.items()})
    return {"input": "16×C×8×8, float32, one rank, one thread", "milliseconds": rows}


def _draw_whitening(data: Data) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panel = figure.subplots()
    rows = data["milliseconds"]
    channels = [row["channels"] for row in rows]
    names = [name for name in rows[0] if name != "channels"]
    for name, colour in zip(names, (BLUE, ORANGE, GREEN, GREY), strict=True):
        panel.plot(channels, [row[name] for row in rows], "o-", color=colour, label=name)
    _sizes(panel, channels)
    panel.set(yscale="log", xlabel="channels C", ylabel="forward and backward / ms")
    panel.legend(frameon=False)
    _clear(panel)
    ratios = [row["all, zca"] / row["batch normalization"] for row in (rows[0], rows[-1])]
    figure.suptitle(
        f"Whitening 16 channels together takes {ratios[0]:.0f} times as long as batch "
        f"normalization, 512 channels {ratios[1]:.0f} times",
        fontsize=11,
    )
    return figure


def _intervals(
    panel: Axes,
    places: Sequence[float],
    samples: Sequence[Sequence[float]],
    errors: float,
    style: Mapping[str, Any],
) -> None:
    """Draw means of accuracies as percentages, give or take so many standard errors."""
    found = [mean_and_error(values) for values in samples]
    means = [100 * mean for mean, _ in found]
    ends = [100 * errors * error for _, error in found]
    panel.errorbar(places, means, ends, marker="o", capsize=3, **style)


def _sizes(panel: Axes, sizes: Sequence[int]) -> None:
    """Give the panel a logarithmic axis with a tick at each size."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()


def _clear(panel: Axes) -> None:
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


Section = tuple[Callable[[Path], Data], Callable[[Data], Figure]]
SECTIONS: Mapping[str, Section] = {
    "chain": (_chain, _draw_chain),
    "rates": (_rates, _draw_rates),
    "delta": (_delta, _draw_delta),
    "digits": (_digits, _draw_digits),
    "before": (before, _draw_before),
    "whitening": (_whitening, _draw_whitening),
    "synchronising": (synchronising, _draw_synchronising),
}


if __name__ == "__main__":
    main()
