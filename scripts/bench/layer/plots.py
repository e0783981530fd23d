"""The pictures of what was measured of the layer; needs matplotlib.

Titles say what the figures show, and are computed from them, so that they stay true.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.dev.colors import BLUE, GRAY, GREEN, ORANGE

LAYOUT_COLORS = {"contiguous": BLUE, "channels_last": ORANGE}
DTYPES = ["float32", "bfloat16"]
KERNELS = ["moments", "normalize", "reduce", "input"]
BAR = 0.38
# So that a line behind a number does not strike it through.
NUMBER_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}

Rows = list[dict[str, Any]]


def draw(figures: dict[str, Any], directory: Path) -> None:
    """Write a picture of every section that was measured and has one."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in {"layer": _layer, "growth": _growth, "kernels": _kernels}.items():
        if name in figures:
            picture(figures[name]).savefig(directory / f"{name}.png", dpi=120, facecolor="white")


def _layer(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    for panel, dtype in zip(panels, DTYPES, strict=True):
        shapes = _shapes(rows)
        for offset, (layout, color) in zip((-0.5, 0.5), LAYOUT_COLORS.items(), strict=True):
            ratios = [_find(rows, dtype, shape, layout)["ratio"] for shape in shapes]
            places = [place + offset * BAR for place in range(len(shapes))]
            bars = panel.bar(places, ratios, BAR, color=color, label=layout)
            panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, bbox=NUMBER_BOX)
        panel.axhline(1, color="black", linewidth=1, linestyle="--", label="equally fast", zorder=2)
        panel.set_xticks(range(len(shapes)), [_short(shape) for shape in shapes], fontsize=8)
        panel.set_xlabel("input of a rank: batch × channels × height × width")
        panel.set_title(dtype, fontsize=10)
        _clear(panel)
    panels[0].set_ylabel("time of SyncBatchNorm /\ntime of nn.BatchNorm2d")
    panels[0].legend(frameon=False, fontsize=8)
    ratios = [row["ratio"] for row in rows]
    figure.suptitle(
        f"On 2 ranks, forward and backward take {min(ratios):.1f} to {max(ratios):.1f} times as "
        "long as without synchronizing"
    )
    return figure


def _growth(rows: Rows) -> Figure:
    lines = {
        "sum, shared memory": (BLUE, "o"),
        "sum, gloo": (ORANGE, "s"),
        "all-gather": (GREEN, "^"),
    }
    rows = [row for row in rows if row["W"] > 1]  # one rank alone sends nothing
    channels = sorted({row["C"] for row in rows})
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(channels), sharey=True))
    for panel, c in zip(panels, channels, strict=True):
        ours = [row for row in rows if row["C"] == c]
        worlds = [row["W"] for row in ours]
        for name, (color, marker) in lines.items():
            times = [row[f"{name} µs"] for row in ours]
            label = name if name.startswith("sum") else "all-gather over gloo"
            panel.plot(worlds, times, color=color, marker=marker, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(worlds, [str(w) for w in worlds])
        panel.set_xlabel("ranks W")
        panel.set_title(f"C = {c}: {2 * c + 1} values", fontsize=10)
        _clear(panel)
    panels[0].set_ylabel("time of one sum / µs")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(lines),
        frameon=False,
        fontsize=9,
    )
    factors = [row["sum, gloo µs"] / row["sum, shared memory µs"] for row in rows]
    figure.suptitle(
        f"A sum over gloo takes {min(factors):.1f} to {max(factors):.0f} times as long as one in "
        "shared memory"
    )
    return figure


def _kernels(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels: list[list[Axes]] = figure.subplots(2, len(KERNELS), sharex=True, sharey=True).tolist()
    shapes = _shapes(rows)
    for line, dtype in zip(panels, DTYPES, strict=True):
        for panel, kernel in zip(line, KERNELS, strict=True):
            for offset, (layout, color) in zip((-0.5, 0.5), LAYOUT_COLORS.items(), strict=True):
                found = [_find(rows, dtype, shape, layout) for shape in shapes]
                places = [place + offset * BAR for place in range(len(shapes))]
                native = [row[f"native {kernel}"] for row in found]
                panel.barh(places, native, BAR, color=color, label=f"native, {layout}")
                reference = [row[f"reference {kernel}"] for row in found]
                panel.plot(
                    reference, places, "|", color="black", markersize=7, label="PyTorch operations"
                )
            panel.axvline(1, color=GRAY, linewidth=1, linestyle="--")
            panel.set_title(f"{kernel}, {dtype}", fontsize=10)
            _clear(panel)
            panel.grid(visible=False, axis="y")
            panel.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
        labels = [_short(shape, "×") for shape in shapes]
        line[0].set_yticks(range(len(shapes)), labels, fontsize=8)
    panels[0][0].invert_yaxis()  # shared by all
    for panel in panels[1]:
        panel.set_xlabel("fraction of copy's bytes/s", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=9,
    )
    native = [row[f"native {kernel}"] for row in rows for kernel in KERNELS]
    figure.suptitle(
        f"Native kernels move bytes at {min(native):.2f} to {max(native):.2f} of a copy's speed"
    )
    return figure


def _shapes(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def _short(shape: str, halves: str = "×\n") -> str:
    n, c, h, w = shape.strip("()").split(", ")
    return f"{n}×{c}{halves}{h}×{w}"


def _find(rows: Rows, dtype: str, shape: str, layout: str) -> dict[str, Any]:
    wanted = {"dtype": dtype, "shape": shape, "layout": layout}
    return next(row for row in rows if wanted.items() <= row.items())


def _clear(panel: Axes) -> None:
    """Leave of a panel's frame what is needed to read values."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
