"""The pictures of a run on a GPU; needs matplotlib.

Titles say what the figures show, and are computed from them, so that they stay true.
"""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.gpu.cases import LARGE_BYTES, VARIANTS
from scripts.bench.gpu.kernels import STAGES, is_large
from scripts.bench.measure import Rows
from scripts.dev.colors import BLUE, GRAY, GREEN, ORANGE

_COLORS = [BLUE, ORANGE, GREEN]
_MARKERS = {"channels_last": "o", "contiguous": "^"}


def draw(figures: dict[str, Any], directory: Path) -> None:
    """Write a picture of every section that was measured and has one."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in {"kernels": _kernels, "layers": _layers, "resnet": _resnet}.items():
        if figures.get(name):
            file = directory / f"gpu-{name}.png"
            picture(figures[name]).savefig(file, dpi=120, facecolor="white")


def _kernels(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panel: Axes = figure.subplots()
    rows = [row for row in rows if is_large(row)] or rows
    dtypes = sorted({row["dtype"] for row in rows})
    for number, dtype in enumerate(dtypes):
        for layout, marker in _MARKERS.items():
            wanted = {"dtype": dtype, "layout": layout}
            found = [row for row in rows if wanted.items() <= row.items()]
            shift = 0.24 * (number - (len(dtypes) - 1) / 2)
            places = [stage + shift for stage in range(len(STAGES)) for _ in found]
            values = [row[stage] for stage in STAGES for row in found]
            color, label = _COLORS[number], f"{dtype}, {layout}"
            panel.plot(places, values, marker, color=color, alpha=0.6, label=label)
    panel.axhline(0.85, color="black", linewidth=1, linestyle="--", label="the bar")
    panel.set_xticks(range(len(STAGES)), STAGES)
    panel.set_ylabel("fraction of copy's bytes/s")
    panel.set_ylim(bottom=0)
    _clear(panel)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    large = [row[stage] for row in rows if is_large(row) for stage in STAGES]
    figure.suptitle(
        f"Stages move the bytes of large tensors at {min(large):.2f} to {max(large):.2f} of a "
        "copy's speed"
        if large
        else "No large tensor was measured"
    )
    return figure


def _layers(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    rivals = {"/ chain": "chain of torch's SyncBatchNorm", "/ BatchNorm2d": "nn.BatchNorm2d"}
    for panel, (column, rival) in zip(panels, rivals.items(), strict=True):
        for variant, color in zip(VARIANTS, _COLORS, strict=True):
            for layout, marker in _MARKERS.items():
                wanted = {"variant": variant, "layout": layout}
                found = [row for row in rows if wanted.items() <= row.items()]
                sizes, ratios = [row["MB"] for row in found], [row[column] for row in found]
                label = f"{variant}, {layout}"
                panel.plot(sizes, ratios, marker, color=color, alpha=0.6, label=label)
        panel.axhline(1, color="black", linewidth=1, linestyle="--", label="equally fast")
        panel.axvline(LARGE_BYTES / 1e6, color=GRAY, linewidth=1, linestyle=":")
        panel.set_xscale("log")
        panel.set_xlabel("size of the input / MB")
        panel.set_title(f"our time / time of {rival}", fontsize=10)
        _clear(panel)
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    means = [statistics.geometric_mean(row[column] for row in rows) for column in rivals]
    figure.suptitle(
        f"Forward and backward take {means[0]:.2f} times as long as torch's chain, and "
        f"{means[1]:.2f} times as long as nn.BatchNorm2d"
    )
    return figure


def _resnet(rows: Rows) -> Figure:
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panel: Axes = figure.subplots()
    names = [name for name in rows[0] if name.endswith(" ms")]
    for number, row in enumerate(rows):
        places = [place + 0.4 * (number - (len(rows) - 1) / 2) for place in range(len(names))]
        values = [row[name] / row["nn.BatchNorm2d ms"] for name in names]
        label, color = f"batch {row['batch']}", _COLORS[number]
        bars = panel.barh(places, values, 0.38, color=color, label=label)
        panel.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    panel.set_yticks(range(len(names)), [name.removesuffix(" ms") for name in names])
    panel.invert_yaxis()
    panel.set_xlabel("time of a step / with nn.BatchNorm2d")
    panel.legend(frameon=False, fontsize=8)
    _clear(panel)
    figure.suptitle(
        f"A step of {rows[0]['model']} takes {rows[0]['/ chain']:.2f} times as long as with "
        "torch's chain"
    )
    return figure


def _clear(panel: Axes) -> None:
    """Leave of a panel's frame what is needed to read values."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
