"""The pictures of the chapter, drawn from the data of its experiments.

Titles say what the figures show, and are computed from them, so that they stay true.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.chapter.digits import mean_and_error
from scripts.dev.colors import BLUE, GRAY, GREEN, ORANGE

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "savefig.facecolor": "white",
}
DIVERGED = 1e3
Data = dict[str, Any]


def chain(data: Data) -> Figure:
    """Draw the terms of a step by order, and the whole change over the predicted one."""
    figure = Figure(figsize=(10, 4.2))
    left, right = list(figure.subplots(1, 2))
    most = max(row["layers"] for row in data["rows"])
    deep = [row for row in data["rows"] if row["layers"] == most]
    for row, color in zip(deep, (GRAY, GREEN, BLUE, ORANGE, "black"), strict=True):
        sizes = [abs(term) for term in row["orders"][1:]]
        shown = [(order, size) for order, size in enumerate(sizes, 1) if size > 1e-300]
        left.plot(*zip(*shown, strict=True), color=color, label=f"w = {row['scale']}")
        rows = [each for each in data["rows"] if each["scale"] == row["scale"]]
        ratios = [abs(each["actual"] / each["predicted"]) for each in rows]
        right.plot([each["layers"] for each in rows], ratios, color=color)
    left.set(xlabel="order k in ε", ylabel=f"|term of order k|, {most} layers", yscale="log")
    left.set_ylim(1e-60, 1e100)
    left.set_title("one step, term by term")
    right.set(xlabel="layers l", ylabel="|actual change| / |predicted by εgᵀg|", yscale="log")
    right.set_ylim(1e-3, 1e5)  # the largest weights go on to 1e86
    right.set_title("what the whole step does: as predicted where this is 1")
    left.legend()
    terms = [abs(term) for term in deep[-2]["orders"][1:]]
    figure.suptitle(
        f"With weights of {deep[-2]['scale']} and {most} layers, the term of order "
        f"{terms.index(max(terms)) + 1} is the largest, not the first"
    )
    return figure


def rates(data: Data) -> Figure:
    """Draw the losses that chains with and without BN end with, over the learning rate."""
    figure = Figure(figsize=(9, 4.4))
    panel = figure.subplots()
    good: dict[bool, list[set[float]]] = {True: [], False: []}
    scales = list(dict.fromkeys(row["scale"] for row in data["rows"]))
    for normalized, color in ((True, BLUE), (False, ORANGE)):
        for scale, line in zip(scales, (":", "-", "--"), strict=True):
            wanted = normalized, scale
            rows = [row for row in data["rows"] if (row["normalized"], row["scale"]) == wanted]
            middle = [min(max(median(row["losses"]), 1e-12), DIVERGED) for row in rows]
            places = [row["lr"] for row in rows]
            label = f"{'with BN' if normalized else 'without'}, weights of about {scale}"
            panel.plot(places, middle, line, color=color, label=label)
            found = zip(places, middle, strict=True)
            good[normalized].append({rate for rate, loss in found if loss < 1e-2})
    panel.set(xscale="log", yscale="log", xlabel="learning rate")
    panel.set_ylabel("loss after 300 steps, median of 5 seeds\n(1000: diverged; 1e-12 or less)")
    panel.legend(fontsize=7, loc="lower left")
    with_bn, without = (set.intersection(*good[normalized]) for normalized in (True, False))
    also = f"{min(without):.2g} to {max(without):.2g}" if without else "none"
    figure.suptitle(
        f"20 layers: with BN, rates from {min(with_bn):.2g} to {max(with_bn):.2g} work for all of "
        f"these weights; without BN, {also}"
    )
    return figure


def gradient(data: Data) -> Figure:
    """Draw how far a gradient moves the mean and the deviation of a unit on two ranks."""
    figure = Figure(figsize=(10, 4.2))
    left, right = list(figure.subplots(1, 2))
    for name, color in (("through μ and σ", BLUE), ("μ and σ as constants", ORANGE)):
        rows = [row for row in data["rows"] if row["gradient"] == name]
        steps = [row["step"] for row in rows]
        for panel, what in ((left, "mean"), (right, "deviation")):
            panel.plot(steps, [row[what] for row in rows], color=color, label=name)
        for means in zip(*(row["means of the ranks"] for row in rows), strict=True):
            left.plot(steps, means, ":", color=color)
    for rank, mean in enumerate(data["rows"][0]["means of the ranks"]):
        left.annotate(f"rank {rank}", (0, mean + 0.12), fontsize=8, color=GRAY)
    left.set(xlabel="step along the gradient", ylabel="mean of h\n(dotted: of one rank)")
    right.set(xlabel="step along the gradient", ylabel="standard deviation of h")
    right.set_ylim(0)
    right.legend(loc="lower left")
    figure.suptitle(
        "BN's gradient moves samples and ranks, not their mean, and the deviation in second order"
    )
    return figure


def delta(data: Data) -> Figure:
    """Draw the gradient at zero variance over δ."""
    figure = Figure(figsize=(8, 4.2))
    panel = figure.subplots()
    kinds = {"float32": (BLUE, "o"), "bfloat16": (ORANGE, "x"), "float16": (GREEN, "s")}
    for dtype, (color, marker) in kinds.items():
        rows = [row for row in data["rows"] if row[dtype] < float("inf")]
        panel.plot(
            *([row[key] for row in rows] for key in ("eps", dtype)),
            color=color, marker=marker, label=dtype, linestyle="none", markerfacecolor="none",
        )  # fmt: skip
    lowest = min(row["eps"] for row in data["rows"] if row["float16"] < float("inf"))
    panel.axhline(65504, color=GREEN, linewidth=1, linestyle="--")
    panel.annotate("float16 ends here", (1e-4, 8e4), fontsize=8, color=GREEN)
    panel.set(xscale="log", yscale="log", xlabel="δ (eps)", ylabel="|gradient| at zero variance")
    panel.legend()
    figure.suptitle(
        f"The gradient is 1/√δ: finite down to δ = {lowest:.0e} in float16, and beyond in the "
        "others"
    )
    return figure


def mean(data: Data) -> Figure:
    """Draw how far a unit's mean is from 1 while gradient descent moves it there."""
    places = list(dict.fromkeys(row["lr"] for row in data["rows"]))
    figure = Figure(figsize=(12, 3.8))
    panels: list[Axes] = list(figure.subplots(1, len(places), sharey=True))
    for panel, rate in zip(panels, places, strict=True):
        for normalized, color in ((False, ORANGE), (True, BLUE)):
            (row,) = [r for r in data["rows"] if (r["lr"], r["normalized"]) == (rate, normalized)]
            for number, means in enumerate(row["means"]):
                label = "with BN" if normalized else "without, ten networks"
                panel.plot(
                    [max(abs(mean - 1), 1e-9) for mean in means],
                    color=color,
                    alpha=0.7,
                    label=None if number else label,
                )
        panel.axhline(0.01, color=GRAY, linewidth=1, linestyle="--")
        panel.set(xlabel="steps", yscale="log", ylim=(1e-5, 1e3), title=f"learning rate {rate}")
    panels[0].set_ylabel("|mean of the unit's output − 1|")
    panels[0].legend(loc="lower left")
    figure.suptitle(
        "With BN the mean gets to where it is wanted as the rate says, on each of ten networks; "
        "without, as the network says"
    )
    return figure


def translation(data: Data) -> Figure:
    """Draw an image, moved among others, and what normalizing makes of it."""
    figure = Figure(figsize=(9, 3.9))
    panels: list[list[Axes]] = figure.subplots(2, len(data["images"])).tolist()
    for column, (name, pair) in enumerate(data["images"].items()):
        every = [value for image in pair for row in image for value in row]
        for line, image in zip(panels, pair, strict=True):
            panel = line[column]
            panel.imshow(image, cmap="gray", vmin=min(every), vmax=max(every))
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
        panels[0][column].set_title(name)
    for line, label in zip(panels, ("before", "moved"), strict=True):
        line[0].set_ylabel(label)
    figure.suptitle("With a μ and σ for each position, an object that moves becomes another one")
    return figure


def digits(data: Data) -> Figure:
    """Draw accuracies by the place of BN, and by the statistics of test batches."""
    figure = Figure(figsize=(10, 4.2))
    left, right = list(figure.subplots(1, 2, width_ratios=[1, 2]))
    places: Mapping[str, Sequence[float]] = data["places"]
    for number, values in enumerate(places.values()):
        _seeds(left, number, values, {"color": BLUE})
    left.set_xticks(range(len(places)), ["before\nReLU", "after\nReLU", "no BN"])
    left.set_xlim(-0.5, len(places) - 0.5)
    left.set_ylabel("test accuracy / % (points: seeds, bar: mean)")
    for (name, by_size), color in zip(data["batch"].items(), (BLUE, ORANGE), strict=True):
        style = {"color": color, "label": f"statistics of the batch, {name}"}
        _intervals(right, [int(size) for size in by_size], list(by_size.values()), 2, style)
    running, _ = mean_and_error(places["before"])
    right.axhline(100 * running, color=GREEN, linestyle="--", label="running averages, any batch")
    _sizes(right, [int(size) for size in data["batch"]["mixed"]])
    right.set(xlabel="samples in a test batch", ylabel="test accuracy / %, ± 2 standard errors")
    right.legend()
    two, _ = mean_and_error(data["batch"]["mixed"]["2"])
    figure.suptitle(
        f"Evaluated in pairs by their own statistics, {100 * two:.0f} % are right; by running "
        f"averages, {100 * running:.0f} %, one by one"
    )
    return figure


def before(data: Data) -> Figure:
    """Draw accuracies of what came before BN, BN and whitening; and what renormalizing undoes."""
    models = list(dict.fromkeys(row["model"] for row in data["rows"]))
    kinds = list(dict.fromkeys(row["norm"] for row in data["rows"]))
    rates = list(dict.fromkeys(row["lr"] for row in data["rows"]))
    figure = Figure(figsize=(12, 4.4))
    *panels, last = list(figure.subplots(1, len(models) + 1))
    colors = dict(zip(rates, (GREEN, BLUE, ORANGE), strict=True))
    for panel, model in zip(panels, models, strict=True):
        for row in [row for row in data["rows"] if row["model"] == model]:
            place = kinds.index(row["norm"]) + 0.22 * (rates.index(row["lr"]) - 1)
            label = f"rate {row['lr']:g}" if row["norm"] == kinds[0] else None
            _seeds(panel, place, row["accuracies"], {"color": colors[row["lr"]], "label": label})
        panel.set_xticks(range(len(kinds)), kinds, rotation=30)
        panel.set(title=f"model={model}", ylim=(0, 102))
        panel.legend(loc="lower right")
    panels[0].set_ylabel("test accuracy / % after 3 epochs\n(points: seeds, bar: mean)")
    for row in data["undone"]:
        color = (BLUE, ORANGE)[models.index(row["model"])]
        rate = f"rate {row['lr']:g}" if row["lr"] else "not learning"
        label = f"{row['model']}, {rate}"
        last.plot(row["ln σ"][1:], "-" if row["lr"] else ":", color=color, label=label)
    last.set(yscale="log", xlabel="step", ylabel="change of ln σ, root mean square")
    last.set_title("what renormalizing undoes")
    last.legend()

    def worst(norm: str) -> float:
        found = [row["accuracies"] for row in data["rows"] if row["norm"] == norm]
        return min(100 * mean_and_error(values)[0] for values in found)

    figure.suptitle(
        "The least accuracy at any of these models and rates: "
        + ", ".join(f"{kind} {worst(kind):.0f} %" for kind in kinds)
    )
    return figure


def whitening(data: Data) -> Figure:
    """Draw the time of whitening and of batch normalization over the number of channels."""
    figure = Figure(figsize=(10, 4.2))
    found = data["milliseconds by ranks"]
    names = [name for name in found["1"][0] if name != "C"]
    panels: list[Axes] = list(figure.subplots(1, len(found), sharey=True))
    for panel, (ranks, rows) in zip(panels, found.items(), strict=True):
        channels = [row["C"] for row in rows]
        for name, color in zip(names, (BLUE, "black", ORANGE, GREEN, GRAY), strict=True):
            panel.plot(channels, [row[name] for row in rows], "o-", color=color, label=name)
        _sizes(panel, channels)
        panel.set(yscale="log", xlabel="channels C", title=f"ranks: {ranks}")
        panel.legend()
    panels[0].set_ylabel("forward and backward / ms")
    last = found["1"][-1]
    one, *others = (last[name] for name in ("all, zca", "batch normalization", names[1]))
    ratios = [one / other for other in others]
    figure.suptitle(
        f"{last['C']} channels whitened together take {ratios[0]:.0f} times batch normalization's "
        f"time, and {ratios[1]:.0f} times that of each alone"
    )
    return figure


def synchronizing(data: Data) -> Figure:
    """Draw accuracies with statistics of each rank and of all, over the batch of a rank."""
    worlds = [(1, "mixed"), (2, "mixed"), (4, "mixed"), (2, "by_class"), (4, "by_class")]
    figure = Figure(figsize=(15, 4.4))
    panels: list[Axes] = list(figure.subplots(1, len(worlds), sharey=True))
    for panel, (ranks, share) in zip(panels, worlds, strict=True):
        for norm, color, shift in (("local", ORANGE, 0.96), ("sync", BLUE, 1.04)):
            wanted = ranks, share, norm
            found = [r for r in data["rows"] if (r["ranks"], r["shares"], r["norm"]) == wanted]
            places = [row["batch"] * shift for row in found]
            averages = [row["running averages"] for row in found]
            _intervals(panel, places, averages, data["t"], {"color": color, "label": norm})
            again = [
                100 * mean_and_error(r["recalibrated"])[0] for r in found if "recalibrated" in r
            ]
            if again:
                panel.plot(places, again, ":", color=color, label=f"{norm}, recalibrated")
        _sizes(panel, [row["batch"] for row in data["rows"] if row["ranks"] == 1])
        plural = "s" if ranks > 1 else ""
        panel.set(title=f"{ranks} rank{plural}, data.shares={share}", xlabel="batch of a rank")
    panels[3].legend(loc="lower left")
    panels[0].set_ylabel("test accuracy / % after an epoch\n(95 % intervals)")
    gains = [row for row in data["gains of sync over local"] if row["batch"] == "all"]
    parts = [
        f"{100 * row['gain']:+.1f} ± {100 * row['95 %']:.1f} points on {row['ranks']} ranks"
        for row in gains
        if (row["shares"], row["statistics"]) == ("by_class", "running averages")
    ]
    figure.suptitle(
        f"What synchronizing gains where ranks have classes of their own, over all batches: "
        f"{', '.join(parts)} (95 %)".replace("-", "−")
    )
    return figure


def _seeds(
    panel: Axes, place: float, accuracies: Sequence[float], style: Mapping[str, Any]
) -> None:
    """Draw accuracies as percentages, one above the other, and their mean as a bar."""
    values = [100 * value for value in accuracies]
    panel.plot([place] * len(values), values, ".", **style, alpha=0.6)
    panel.plot(place, sum(values) / len(values), "_", color=style["color"], markersize=10)


def _intervals(
    panel: Axes,
    places: Sequence[float],
    samples: Sequence[Sequence[float]],
    errors: float,
    style: Mapping[str, Any],
) -> None:
    """Draw means of accuracies as percentages, give or take so many standard errors."""
    found = [mean_and_error(values) for values in samples]
    means = [100 * average for average, _ in found]
    ends = [100 * errors * error for _, error in found]
    panel.errorbar(places, means, ends, marker="o", capsize=3, **style)


def _sizes(panel: Axes, sizes: Sequence[int]) -> None:
    """Give the panel a logarithmic axis with a tick at each size."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()
