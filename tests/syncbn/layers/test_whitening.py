"""`SyncWhitening` against float64 PyTorch, in one process, on the concatenated batch."""

import copy
import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, SyncWhitening
from syncbn.errors import InputError, ReplicaError
from syncbn.ops.inverse_sqrt import inverse_root
from tests.support.one_process import rows
from tests.support.tolerance import assert_as_exact
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world

CHANNELS = 6
STEPS = 2


@dataclass(frozen=True)
class Case:
    """Each rank's input shape, (N, 6, *), and the layer's arguments."""

    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    dtype: torch.dtype = torch.float64

    def share(self, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """Return a rank's input, of related channels, and its upstream gradient."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x, dy = (torch.randn(self.shapes[rank], generator=generator).double() for _ in range(2))
        mixing = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(7))
        x = torch.einsum("ij,nj...->ni...", mixing.double(), x) + 1 + rank
        return x.to(self.dtype), dy.to(self.dtype)


def _layer(options: dict[str, Any], dtype: torch.dtype) -> SyncWhitening:
    arguments: dict[str, Any] = {"group_size": 3, **options}
    layer = SyncWhitening(CHANNELS, **arguments, dtype=dtype)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(0.5, 2, CHANNELS) - number)
    return layer


Outcome = dict[str, list[Tensor]]


def _on_a_rank(case: Case) -> Outcome:
    layer = _layer(case.options, torch.promote_types(case.dtype, torch.float32))
    found: Outcome = {"y": [], "dx": []}
    for step in range(STEPS):
        x, dy = case.share(dist.get_rank(), step)
        y = layer(x.requires_grad_())
        assert y.dtype == x.dtype
        y.backward(dy)
        assert x.grad is not None
        found["y"].append(y.detach())
        found["dx"].append(x.grad)
    found["state"] = list(layer.state_dict().values())[-3:]
    found["gradients"] = [p.grad for p in layer.parameters() if p.grad is not None]
    return found


def _root(matrix: Tensor, options: dict[str, Any]) -> Tensor:
    """Return Σ^(−1/2) by another way than the layer's: the iteration of Denman and Beavers."""
    root = torch.eye(len(matrix)).double()
    if options.get("method") != "newton":
        for _ in range(15):
            matrix, root = (matrix + root.inverse()) / 2, (root + matrix.inverse()) / 2
        return root
    trace = matrix.trace()
    for _ in range(options.get("iterations", 5)):
        root = (3 * root - torch.linalg.matrix_power(root, 3) @ matrix / trace) / 2
    return root / trace.sqrt()


def _regular(covariance: Tensor, count: int, options: dict[str, Any]) -> Tensor:
    size = len(covariance)
    share = options.get("shrinkage")
    if share is None:
        both, trace = (covariance @ covariance).trace(), covariance.trace()
        share = ((1 - 2 / size) * both + trace**2) / (
            (count + 1 - 2 / size) * (both - trace**2 / size)
        )
        share = torch.minimum(share, torch.ones_like(share))
    identity = torch.eye(size).double()
    shrunk = (1 - share) * covariance + share * covariance.trace() / size * identity
    return shrunk + 1e-5 * identity


def _in_one_process(case: Case) -> Outcome:
    weight = torch.linspace(0.5, 2, CHANNELS).double().requires_grad_()
    bias = (torch.linspace(0.5, 2, CHANNELS) - 1).double().requires_grad_()
    size = case.options.get("group_size", 3)
    mean = torch.zeros(CHANNELS).double()
    whitening = torch.eye(size).double().expand(CHANNELS // size, size, size)
    found: Outcome = {"y": [], "dx": []}
    for step in range(STEPS):
        shares = [case.share(rank, step) for rank in range(len(case.shapes))]
        x, dy = (torch.cat([rows(t.double()) for t in ts]) for ts in zip(*shares, strict=True))
        x.requires_grad_()
        count = len(x)
        outputs: list[Tensor] = []
        roots: list[Tensor] = []
        for group in x.split(size, 1):
            centered = group - group.mean(0)
            root = _root(_regular(centered.T @ centered / count, count, case.options), case.options)
            outputs.append(centered @ root.T)
            roots.append(root.detach() * ((count - 1) / count) ** 0.5)
        y = torch.cat(outputs, 1) * weight + bias
        y.backward(dy)
        assert x.grad is not None
        found["y"].append(y.detach())
        found["dx"].append(x.grad)
        newest = max(0.1, 1 / (step + 1))
        mean = (1 - newest) * mean + newest * x.detach().mean(0)
        whitening = (1 - newest) * whitening + newest * torch.stack(roots)
    found["state"] = [mean, whitening, torch.tensor(STEPS)]
    found["gradients"] = [t.grad for t in (weight, bias) if t.grad is not None]
    return found


CASES = {
    "one": Case(((9, 6),)),
    "even": Case(((4, 6, 3), (4, 6, 3))),
    "uneven": Case(((5, 6, 2, 2), (2, 6, 3, 1), (1, 6, 1, 3))),
    "empty": Case(((0, 6, 2, 2), (7, 6, 2, 2))),
    "volumes": Case(((3, 6, 2, 2, 2), (2, 6, 2, 2, 2))),
    "all channels": Case(((9, 6), (12, 6)), {"group_size": 6}),
    "pairs, no shrinkage": Case(((9, 6), (3, 6)), {"group_size": 2, "shrinkage": 0.0}),
    "much shrinkage": Case(((9, 6), (3, 6)), {"shrinkage": 0.5}),
    "newton": Case(((9, 6), (3, 6)), {"method": "newton"}),
    "newton, 9 iterations": Case(((2, 6, 4), (3, 6, 4)), {"method": "newton", "iterations": 9}),
    "float32": Case(((5, 6, 2, 2), (2, 6, 3, 1)), dtype=torch.float32),
    "bfloat16": Case(((5, 6, 2, 2), (2, 6, 3, 1)), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does_on_all_their_samples(name: str) -> None:
    case = CASES[name]
    truth = _in_one_process(case)
    ranks = run_world(len(case.shapes), _on_a_rank, case)
    for what in ("y", "dx"):
        for step in range(STEPS):
            ours = torch.cat([rows(rank[what][step]) for rank in ranks])
            exact = truth[what][step]
            # Rounded once; in float64, the root's rounding is what counts.
            terms = 100.0 * float(exact.abs().max()) if case.dtype == torch.float64 else None
            assert_as_exact(ours, exact, exact.to(case.dtype), what, terms)
    for number, exact in enumerate(truth["gradients"]):
        ours = torch.stack([rank["gradients"][number] for rank in ranks]).sum(0)
        terms = 100.0 * float(exact.abs().max())
        assert_as_exact(ours, exact, exact.to(ours.dtype), f"gradient {number}", terms)
    for rank in ranks:
        for ours, first, exact in zip(
            rank["state"], ranks[0]["state"], truth["state"], strict=True
        ):
            assert torch.equal(ours, first)
            if ours.is_floating_point():
                terms = 100.0 if ours.dtype == torch.float64 else None
                assert_as_exact(ours, exact, exact.to(ours.dtype), "running", terms)
            else:
                assert ours == exact


@pytest.mark.parametrize("method", ["zca", "newton"])
def test_channels_of_a_group_have_no_linear_relation_any_more(method: Any) -> None:
    x, _ = CASES["all channels"].share(1, 0)
    layer = SyncWhitening(6, 6, method, 25, shrinkage=0.0, eps=1e-12, dtype=torch.float64)
    y = layer(x).detach()
    torch.testing.assert_close(y.mean(0), torch.zeros(6).double())
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(6).double(), rtol=0, atol=1e-8)
    # The symmetric root: the output is the input moved least, so each channel stays itself.
    assert all(torch.corrcoef(torch.stack([x[:, c], y[:, c]]))[0, 1] > 0 for c in range(6))


def test_groups_of_one_channel_are_batch_normalization() -> None:
    x, dy = Case(((5, 6, 3),)).share(0, 0)
    found: list[Tensor] = []
    for layer in (SyncWhitening(6, 1, dtype=torch.float64), SyncBatchNorm(6, dtype=torch.float64)):
        mine = x.clone().requires_grad_()
        y = layer(mine)
        y.backward(dy)
        assert mine.grad is not None
        found.extend((y.detach(), mine.grad))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


@pytest.mark.parametrize("method", ["zca", "newton"])
def test_first_and_second_derivatives_match_finite_differences(method: Any) -> None:
    x, _ = Case(((5, 6),)).share(0, 0)
    layer = _layer({"method": method}, torch.float64)
    tensors = (x.requires_grad_(), *layer.parameters())

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, tensors)
    assert torch.autograd.gradgradcheck(forward, tensors, atol=1e-4)


def _second_derivative(case: Case) -> tuple[Tensor, Tensor]:
    x, dy = case.share(dist.get_rank(), 0)
    x.requires_grad_()
    y = _layer(case.options, torch.float64)(x)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    dx.square().sum().backward()
    assert x.grad is not None
    return dx.detach(), x.grad


@pytest.mark.parametrize("method", ["zca", "newton"])
def test_second_derivative_leads_over_all_ranks(method: str) -> None:
    case = Case(((4, 6), (0, 6), (5, 6)), {"method": method})
    parts = run_world(3, _second_derivative, case)
    shares = [case.share(rank, 0) for rank in range(3)]
    x, dy = (torch.cat(tensors) for tensors in zip(*shares, strict=True))
    x.requires_grad_()
    y = _layer(case.options, torch.float64)(x)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    dx.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), dx.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad)


def test_many_gradients_at_once_are_each_ones() -> None:
    case = Case(((4, 6, 3),))
    x, _ = case.share(0, 0)
    y = _layer({}, torch.float64)(x.requires_grad_())
    dys = torch.stack([case.share(0, step)[1] for step in (1, 2)])
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(together, torch.stack(alone))


def test_root_is_differentiable_where_eigenvalues_are_equal() -> None:
    directions = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    identity = 2 * torch.eye(4).double().expand(2, 4, 4)

    def root(amount: Tensor) -> Tensor:
        return inverse_root(identity + amount * (directions + directions.mT))

    amount = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(root, amount)
    assert torch.autograd.gradgradcheck(root, amount)


def test_fewer_samples_than_channels_keep_their_differences() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    x[1] = x[0] + 0.1 * x[2]  # two that are alike
    spread: list[float] = []
    for shrinkage in (0.0, None):
        mine = x.clone().requires_grad_()
        y = SyncWhitening(6, 6, eps=1e-12, shrinkage=shrinkage, dtype=torch.float64)(mine)
        y[:, 0].square().sum().backward()
        assert mine.grad is not None
        assert mine.grad.isfinite().all()
        distances = torch.pdist(y.detach())
        spread.append(float(distances.max() / distances.min()))
    # Without shrinkage, whitening puts all samples at one distance from each other.
    assert spread[0] == pytest.approx(1, abs=1e-6)
    assert spread[1] > 3


def test_evaluation_uses_running_statistics_and_knows_no_batch() -> None:
    case = Case(((9, 6, 2),))
    layer = _layer({}, torch.float32)
    for step in range(30):
        layer(case.share(0, step)[0].float())
    layer.eval()
    x = case.share(0, 99)[0].float()
    together = layer(x)
    torch.testing.assert_close(torch.cat([layer(one[None]) for one in x]), together)
    assert layer.running_mean is not None
    assert layer.running_whitening is not None
    centered = (x - layer.running_mean[:, None]).movedim(1, 2).unflatten(2, (2, 3))
    expected = torch.einsum("gij,nlgj->nlgi", layer.running_whitening, centered).flatten(2)
    assert layer.weight is not None
    assert layer.bias is not None
    torch.testing.assert_close(together.movedim(1, 2), expected * layer.weight + layer.bias)


def test_running_statistics_may_be_a_plain_average_or_none() -> None:
    case = Case(((9, 6),))
    layer = _layer({"momentum": None}, torch.float64)
    single = [_layer({"momentum": 1.0}, torch.float64) for _ in range(3)]
    for step in range(3):
        for each in (layer, single[step]):
            each(case.share(0, step)[0])
    for name in ("running_mean", "running_whitening"):
        mean = torch.stack([getattr(each, name) for each in single]).mean(0)
        torch.testing.assert_close(getattr(layer, name), mean)
    without = _layer({"track_running_stats": False}, torch.float64)
    assert set(without.state_dict()) == {"weight", "bias"}
    x = case.share(0, 0)[0]
    torch.testing.assert_close(without.eval()(x), without.train()(x))


def test_values_before_the_first_batch_leave_no_trace() -> None:
    layer = SyncWhitening(6, 1, affine=False, dtype=torch.float64)
    x = 1000 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
    layer(x)
    torch.testing.assert_close(layer.eval()(x).std(0), torch.ones(6).double())
    frozen = SyncWhitening(6, 3, momentum=0.0, dtype=torch.float64)
    frozen(x)
    assert torch.equal(frozen.eval()(x), x)


def test_layers_without_parameters_have_none() -> None:
    layer = SyncWhitening(6, 3, affine=False)
    assert list(layer.parameters()) == []
    layer(torch.randn(4, 6))


@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (4, 6, 3, 5, 5)])
def test_memory_format_and_dtype_are_the_inputs(shape: tuple[int, ...]) -> None:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=last)
    layer = SyncWhitening(6, 3)
    for mode in (True, False):
        layer.train(mode)
        assert layer(x).is_contiguous(memory_format=last)
        assert layer(x.contiguous()).is_contiguous()
        assert layer(x.half()).dtype == torch.float16
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), layer(x.contiguous()))
            assert layer(x).dtype == torch.float32


def _one_infinity() -> tuple[Tensor, list[Tensor]]:
    layer, clean = _layer({}, torch.float64), _layer({}, torch.float64)
    x, _ = Case(((9, 6), (12, 6))).share(dist.get_rank(), 0)
    spoilt = x.clone()
    if dist.get_rank() == dist.get_world_size() - 1:
        spoilt[0, 0] = torch.inf
    y = layer(spoilt).detach()
    assert torch.equal(y[:, 3:], clean(x)[:, 3:])
    assert not y[:, :3].isfinite().any()
    layer(x)  # it raises nothing then either
    return y, list(layer.state_dict().values())


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_not_finite_spoils_its_group_on_all_ranks_and_raises_nothing(
    world_size: int,
) -> None:
    ranks = run_world(world_size, _one_infinity)
    for _, state in ranks:
        torch.testing.assert_close(state, ranks[0][1], rtol=0, atol=0, equal_nan=True)
        assert state[2][3:].isfinite().all()
        assert state[3][1].isfinite().all()


def _alike(method: Any, scale: float) -> list[Tensor]:
    """Return y and dx for values that are all alike, and for channels that are, up to a factor."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    line = scale * torch.randn(7, 1, generator=generator) * torch.linspace(1, 2, 6)
    found: list[Tensor] = []
    for x in (torch.full((7, 6), scale), line):
        layer = SyncWhitening(6, 6, method, shrinkage=0.0, dtype=torch.float64)
        y = layer(x.double().requires_grad_())
        (y * torch.arange(6)).sum().backward()
        found.append(y.detach())
        found.extend(p.grad for p in layer.parameters() if p.grad is not None)
    return found


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("method", ["zca", "newton"])
@pytest.mark.parametrize("scale", [1e6 + 0.3, 1e9])
def test_covariance_of_rounding_errors_alone_has_a_root(
    world_size: int, method: str, scale: float
) -> None:
    for found in run_world(world_size, _alike, method, scale):
        assert all(each.isfinite().all() for each in found)
        assert found[0].abs().max() < 1  # no difference is made of none
        assert found[3].abs().max() < 10


FAR = 1e6


def _far_away(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    case = Case(((9, 6), (12, 6)), options)
    layer = _layer({"momentum": 1.0, **options}, torch.float64)
    found: list[Tensor] = []
    for step in range(2):
        x, dy = case.share(dist.get_rank(), 0)
        x = (x + FAR + step).requires_grad_()
        layer(x).backward(dy)
        assert x.grad is not None
        found.append(x.grad)
    return found[0], found[1]


def test_sums_about_the_running_mean_do_not_cancel_far_from_zero() -> None:
    case = Case(((9, 6), (12, 6)))
    shares = [case.share(rank, 0) for rank in range(2)]
    # Rounded to where the layer sees them, and back.
    x, dy = (torch.cat(each) for each in zip(*shares, strict=True))
    x = ((x + FAR) - FAR).requires_grad_()
    _layer({}, torch.float64)(x).backward(dy)
    assert x.grad is not None
    parts = run_world(2, _far_away, {})
    cold, warm = (torch.cat(each) for each in zip(*parts, strict=True))
    size = x.grad.abs().max()
    assert (cold - x.grad).abs().max() > 1e-6 * size
    assert (warm - x.grad).abs().max() < 1e-8 * size


def _distant(distance: float, group_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, 8, generator=generator).double()
    layer = SyncWhitening(8, group_size, eps=1e-20, shrinkage=0.0, dtype=torch.float64)
    return layer(distance + x[dist.get_rank()]).detach()


@pytest.mark.parametrize("group_size", [2, 8])
@pytest.mark.parametrize("distance", [1e3, 1e5])
def test_error_of_sums_far_from_the_mean_is_as_documented(distance: float, group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, 8, generator=generator).double().flatten(0, 1)
    x = (distance + x) - distance  # rounded to where the layer sees them, and back
    layer = SyncWhitening(8, group_size, eps=1e-20, shrinkage=0.0, dtype=torch.float64)
    exact = layer(x).detach()
    ours = torch.cat(run_world(2, _distant, distance, group_size))
    error = float((ours - exact).abs().max() / exact.abs().max())
    kappa = float(torch.linalg.cond(torch.cov(x.T)))
    documented = (2 + 3) * group_size * 2**-53 * distance**2 * kappa
    assert 0.05 * documented < error < documented


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_grows_with_the_condition_number_as_documented(
    condition: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 6, generator=generator).double())[0]
    scales = torch.logspace(0, -0.5 * torch.tensor(condition).log10().item(), 6).double()
    x = (torch.randn(500, 6, generator=generator).double() * scales @ directions).to(dtype)
    layer = SyncWhitening(6, 6, eps=1e-20, shrinkage=0.0, dtype=dtype)
    centered = x.double() - x.double().mean(0)
    # From singular values, whose relative error grows with √κ alone.
    left, _, right = torch.linalg.svd(centered, full_matrices=False)
    exact = 500**0.5 * left @ right
    error = (layer(x).detach().double() - exact).abs().max() / exact.abs().max()
    assert error < 0.5 * torch.finfo(dtype).eps + 1e-15 * condition


def test_newton_leaves_small_eigenvalues_as_documented() -> None:
    scales = torch.tensor([1, 1, 1, 1e-2, 1e-3, 1e-4]).double()
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0))).T
    layer = SyncWhitening(6, 6, "newton", eps=1e-20, shrinkage=0.0, dtype=torch.float64)
    variances = layer(x * scales).detach().var(0, correction=0)
    expected = scales.square() / scales.square().sum() * (9 / 4) ** 5
    torch.testing.assert_close(variances[3:], expected[3:], rtol=1e-2, atol=0)


def _checkpointed() -> list[int]:
    layers = [_layer({}, torch.float64) for _ in range(2)]
    found: list[list[Tensor]] = []
    sums: list[int] = []
    for layer, repeats in zip(layers, (False, True), strict=True):
        gradients: list[Tensor] = []
        for step in range(2):  # the second about another shift
            x, dy = Case(((9, 6), (0, 6))).share(dist.get_rank(), step)
            x.requires_grad_()
            with recorded_all_reduces() as sent:
                y = checkpoint(layer, x, use_reentrant=False) if repeats else layer(x)
                y.backward(dy)  # pyright: ignore[reportOptionalMemberAccess] -- torch types checkpoint's result as perhaps None
            assert x.grad is not None
            gradients.append(x.grad)
            sums.append(len(sent))
        found.append([*gradients, *layer.state_dict().values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    return sums


@pytest.mark.parametrize("world_size", [1, 2])
def test_repetition_by_checkpointing_tracks_and_sends_nothing(world_size: int) -> None:
    for sums in run_world(world_size, _checkpointed):
        assert sums == [2 if world_size > 1 else 0] * 4


def _traffic() -> list[int]:
    x, _ = Case(((4, 6), (5, 6))).share(dist.get_rank(), 0)
    layer = _layer({}, torch.float64)
    with recorded_all_reduces() as sent:
        layer(x.requires_grad_()).sum().backward()
        layer.eval()(x)
    return [vector.numel() for vector in sent]


def test_one_sum_is_sent_forward_and_one_backward() -> None:
    # 1 + C + C·(D + 1)/2 of C = 6 and D = 3, and the same but the count.
    assert run_world(2, _traffic) == [[19, 18]] * 2


def test_copies_and_pickles_compute_the_same() -> None:
    layer = _layer({}, torch.float64)
    x, _ = Case(((9, 6),)).share(0, 0)
    layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = SyncWhitening(6, 3, dtype=torch.float64)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = layer.eval()(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded.eval()):
        assert torch.equal(twin(x), expected)


def _compiled() -> None:
    layer = _layer({}, torch.float64)
    twin = copy.deepcopy(layer)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found: list[list[Tensor]] = [[], []]
    for step in range(3):  # also about a mean that is not 0
        x, dy = Case(((4, 6), (5, 6))).share(dist.get_rank(), step)
        for forward, results in ((compiled, found[0]), (twin, found[1])):
            mine = x.clone().requires_grad_()
            y = forward(mine)
            y.backward(dy)
            assert mine.grad is not None
            results.extend((y.detach(), mine.grad))
    for module, results in ((layer, found[0]), (twin, found[1])):
        results.extend(p.grad for p in module.parameters() if p.grad is not None)
        results.extend(module.state_dict().values())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_compiles_without_a_break_and_computes_the_same(world_size: int) -> None:
    run_world(world_size, _compiled, deadline_s=120)


def _compiled_and_wrong() -> tuple[str, str]:
    alone = SyncWhitening(6, 3)
    compiled: Any = torch.compile(alone, fullgraph=True, backend="aot_eager")
    before = copy.deepcopy(alone.state_dict())
    with pytest.raises(InputError) as single:
        compiled(torch.zeros(1 - dist.get_rank(), 6))
    assert all(torch.equal(value, before[name]) for name, value in alone.state_dict().items())
    x, _ = Case(((4, 6), (5, 6))).share(dist.get_rank(), 0)
    layer = _layer({}, torch.float64)
    layer(x)
    if dist.get_rank() == 1:
        layer = _layer({}, torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(ReplicaError) as other:
        compiled(x)
    return str(single.value), str(other.value)


@pytest.mark.long
def test_compiled_code_refuses_what_eager_code_refuses() -> None:
    for single, other in run_world(2, _compiled_and_wrong, deadline_s=120):
        assert single.startswith("expected more than 1 value per channel over all replicas")
        assert "in compiled code, where the ranks sum about different shifts" in other


def _without_samples() -> tuple[bool, bool]:
    layer = _layer({}, torch.float32)
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, 6, 2, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    after = layer.state_dict()
    return y.shape == x.shape, all(torch.equal(after[name], before[name]) for name in before)


def test_batch_without_samples_changes_nothing() -> None:
    assert run_world(2, _without_samples) == [(True, True)] * 2


def _with_ddp() -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), _layer({}, torch.float64))
    replica = DistributedDataParallel(model)
    x, dy = Case(((4, 6), (4, 6))).share(dist.get_rank(), 0)
    (replica(x) * dy).sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_ddp_averages_to_the_gradient_of_the_mean() -> None:
    parts = run_world(2, _with_ddp)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), _layer({}, torch.float64))
    shares = [Case(((4, 6), (4, 6))).share(rank, 0) for rank in range(2)]
    x, dy = (torch.cat(tensors) for tensors in zip(*shares, strict=True))
    ((model(x) * dy).sum() / 2).backward()
    for number, parameter in enumerate(model.parameters()):
        assert parameter.grad is not None
        torch.testing.assert_close(parts[0][number], parameter.grad)
        assert torch.equal(parts[0][number], parts[1][number])


def _single() -> str:
    with pytest.raises(InputError) as caught:
        _layer({}, torch.float32)(torch.zeros(1 - dist.get_rank(), 6))
    return str(caught.value)


def test_single_value_of_all_ranks_is_refused_on_all() -> None:
    texts = run_world(2, _single)
    assert texts[0] == texts[1]
    assert texts[0].startswith("expected more than 1 value per channel over all replicas")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 4}, r"6 channels .* groups of 4; choose a group_size of 1, 2, 3, 6"),
        ({"method": "pca"}, r"the method is 'pca'; choose zca or newton"),
        ({"iterations": 0}, r"iterations is 0; choose 1 or more"),
        ({"eps": 0.0}, r"eps is 0.0; choose a positive one"),
        ({"eps": float("inf")}, r"eps is inf; choose a positive one"),
        ({"shrinkage": 1.5}, r"shrinkage is 1.5; choose one from 0 to 1, or None"),
        ({"reducer": "mpi"}, r"the reducer is 'mpi'"),
    ],
)
def test_wrong_arguments_are_explained(arguments: dict[str, Any], message: str) -> None:
    every: dict[str, Any] = {"group_size": 3, **arguments}
    with pytest.raises(InputError, match=message):
        SyncWhitening(6, **every)


@pytest.mark.parametrize("training", [True, False])
def test_wrong_inputs_are_explained(training: bool) -> None:
    layer = SyncWhitening(6, 3).train(training)
    for x, message in (
        (torch.zeros(6), r"\(N, 6, \*\), got \(6,\)"),
        (torch.zeros(2, 5), r"\(N, 6, \*\), got \(2, 5\)"),
        (torch.zeros(2, 6, dtype=torch.long), "floating-point input, got torch.int64"),
    ):
        with pytest.raises(InputError, match=message):
            layer(x)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_parameter_of_one_group_is_not_taken_for_those_of_all(name: str, training: bool) -> None:
    layer = SyncWhitening(6, 3).train(training)
    setattr(layer, name, nn.Parameter(torch.ones(3)))
    with pytest.raises(InputError, match=rf"a {name} of shape \(6,\) .* got \(3,\)"):
        layer(torch.randn(8, 6))
