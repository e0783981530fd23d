"""Compare the rounding error of the variance with other ways to compute it; print a table.

python -m scripts.bench.numerics          prints the table
python -m scripts.bench.numerics --write  also puts it into docs/numerics.md
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scripts.dev.document import write_table
from syncbn.kernels.reference import ReferenceKernels
from syncbn.moments import Moments, from_summable, to_summable

WORLD_SIZE = 4
SHAPE = (8, 16, 14, 14)  # of each replica
CASES = [
    (torch.float32, 0.0, 1.0),
    (torch.float32, 1e2, 1.0),
    (torch.float32, 1e4, 1.0),
    (torch.float32, 1e6, 1.0),
    (torch.float32, 1e4, 1e-2),
    (torch.float32, -1e-3, 1e-9),
    (torch.bfloat16, 0.0, 1.0),
    (torch.bfloat16, 1e1, 1.0),
    (torch.bfloat16, 1e2, 1.0),
    (torch.bfloat16, 1e4, 1e2),
]

Replicas = Sequence[Tensor]


def one_process(replicas: Replicas) -> Tensor:
    """nn.BatchNorm2d on the concatenation."""
    layer = nn.BatchNorm2d(SHAPE[1], momentum=1.0)
    x = torch.cat(list(replicas))
    layer(x)
    assert layer.running_var is not None
    count = x[:, 0].numel()
    return layer.running_var.double() * (count - 1) / count


def torch_merge(replicas: Replicas) -> Tensor:
    """Mean and variance of each replica in float32, merged in float32, as in torch's SyncBatchNorm.

    Its kernels run on CUDA alone; these are the steps of batch_norm_gather_stats_with_counts, with
    local statistics that are as good as float32 can hold.
    """
    count = torch.zeros(())
    mean = variance_sum = torch.zeros(SHAPE[1])
    for x in replicas:
        values = x.double().transpose(0, 1).flatten(1)
        local_mean, local_variance = values.mean(1).float(), values.var(1, correction=0).float()
        n = torch.tensor(float(values.shape[1]))
        factor = 1 / (count + n)
        delta = mean - local_mean
        variance_sum = variance_sum + local_variance * n + delta * delta * n * count * factor
        mean = mean * (count * factor) + local_mean * (n * factor)
        count = count + n
    return (variance_sum / count).double()


def difference_of_squares(replicas: Replicas) -> Tensor:
    """E[x²] − E[x]² from float32 sums."""
    values = [x.float().transpose(0, 1).flatten(1) for x in replicas]
    count = sum(value.shape[1] for value in values)
    first = torch.stack([value.sum(1) for value in values]).sum(0) / count
    second = torch.stack([value.square().sum(1) for value in values]).sum(0) / count
    return (second - first.square()).double()


def cold(replicas: Replicas) -> Tensor:
    """SyncBatchNorm's first batch: summed about 0 in float64."""
    return _ours(replicas, None).variance()


def warm(replicas: Replicas) -> Tensor:
    """SyncBatchNorm afterwards: summed about the mean of an earlier batch, here half a σ away."""
    earlier = _ours(replicas, None)
    return _ours(replicas, earlier.mean + 0.5 * earlier.variance().sqrt()).variance()


def _ours(replicas: Replicas, shift: Tensor | None) -> Moments:
    sent = [to_summable(ReferenceKernels().local_moments(x), shift) for x in replicas]
    return from_summable(torch.stack(sent).sum(0), shift)


METHODS: dict[str, Callable[[Replicas], Tensor]] = {
    "E[x²] − E[x]²": difference_of_squares,
    "nn.BatchNorm2d, one process": one_process,
    "torch's merge": torch_merge,
    "ours, first batch": cold,
    "ours, later": warm,
}


def main() -> None:
    """Print the table, and write it where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    arguments = parser.parse_args()
    lines = [
        f"| dtype | mean | σ | {' | '.join(METHODS)} |",
        "|---" * (3 + len(METHODS)) + "|",
    ]
    for dtype, mean, deviation in CASES:
        generator = torch.Generator().manual_seed(0)
        replicas = [
            (mean + deviation * torch.randn(SHAPE, dtype=torch.float64, generator=generator)).to(
                dtype
            )
            for _ in range(WORLD_SIZE)
        ]
        truth = torch.cat(replicas).double().var((0, 2, 3), correction=0)
        errors = [
            ((method(replicas) - truth).abs() / truth).max().item() for method in METHODS.values()
        ]
        kind = str(dtype).removeprefix("torch.")
        cells = [kind, f"{mean:g}", f"{deviation:g}", *(f"{error:.1e}" for error in errors)]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    if arguments.write:
        write_table("numerics.md", "scripts.bench.numerics", table)


if __name__ == "__main__":
    main()
