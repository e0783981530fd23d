"""A model of what sums between hosts cost; computed, not timed."""

import math
from collections.abc import Callable

from scripts.bench.measure import Rows

# Seconds per message, and per byte.
NETWORKS = {
    "10 Gbit Ethernet, TCP": (30e-6, 1 / 1.25e9),
    "InfiniBand or NVLink": (3e-6, 1 / 25e9),
}
# Of a world's size: how many messages follow each other, and how many times the vector's bytes they
# have together. docs/performance.md cites the sources.
ALGORITHMS: dict[str, Callable[[int], tuple[int, float]]] = {
    "ring": lambda w: (2 * (w - 1), 2 * (w - 1) / w),
    "tree": lambda w: (2 * _log2(w), 2 * _log2(w)),
    "doubling": lambda w: (_log2(w), _log2(w)),
    "ring all-gather": lambda w: (w - 1, w - 1),
    "Bruck's all-gather": lambda w: (_log2(w), w - 1),
}
PAIRS = [("ring", "tree"), ("ring", "ring all-gather"), ("tree", "Bruck's all-gather")]
MODEL_WORLDS = [8, 64, 512, 4096]
# By stage: C of a block's three layers, and how many blocks. The first block of a stage has a layer
# more, as wide as its last, and one of 64 channels stands before all stages.
RESNET50 = [((64, 64, 256), 3), ((128, 128, 512), 4), ((256, 256, 1024), 6), ((512, 512, 2048), 3)]
RESNET50_LAYERS = [64, *(c for block, n in RESNET50 for c in (*(block * n), block[-1]))]


def _log2(w: int) -> int:
    return (w - 1).bit_length()  # rounded up


def model_costs(_turns: int) -> Rows:
    """Sums of one layer, of ResNet-50, and from how many channels on one way beats another."""
    cases = [(name, *network, w) for name, network in NETWORKS.items() for w in MODEL_WORLDS]
    rows: Rows = [
        {"network": name, "C": c, "W": w}
        | {f"{a} µs": _step_s(a, w, [c], alpha, beta) * 1e6 for a in ALGORITHMS}
        | {"gathered MB": w * (16 * c + 8) / 1e6}
        for c in (256, 2048)
        for name, alpha, beta, w in cases
    ]
    rows += [
        {"network": name, "layers": len(RESNET50_LAYERS), "W": w}
        | {f"{a} ms": _step_s(a, w, RESNET50_LAYERS, alpha, beta) * 1e3 for a in ALGORITHMS}
        for name, alpha, beta, w in cases
    ]
    return rows + [
        {"network": name, "W": w}
        | {f"{a} beats {b} from C =": _least_channels(a, b, w, alpha / beta) for a, b in PAIRS}
        for name, alpha, beta, w in cases
    ]


def _step_s(algorithm: str, w: int, layers: list[int], alpha: float, beta: float) -> float:
    """Return how long the two sums of a training step take, over layers of so many channels."""
    messages, times = ALGORITHMS[algorithm](w)
    return sum(2 * messages * alpha + times * (32 * c + 8) * beta for c in layers)


def _least_channels(winner: str, loser: str, w: int, bytes_per_message: float) -> int:
    """Return from where on the winner, of more messages and fewer bytes, is the faster one."""
    messages, times = ALGORITHMS[winner](w)
    others, other_times = ALGORITHMS[loser](w)
    step_bytes = 2 * (messages - others) * bytes_per_message / (other_times - times)
    return math.floor((step_bytes - 8) / 32) + 1
