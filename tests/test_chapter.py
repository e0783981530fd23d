"""The claims of the chapter, each as a test that can fail; docs/why.md shows them as figures."""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from scripts.chapter import jobs
from scripts.chapter.claims import (
    PositionNorm,
    before_and_after_moving,
    chain_gradient,
    chain_step,
    cost_of_order,
    followed_gradient,
    gamma_and_beta_of,
    gradient_at_zero_variance,
    gradient_with_delta_outside,
    means_while_learning,
    newton_step,
    second_order_term,
    steps_until_there,
    train_chain,
)
from scripts.chapter.digits import Digits, accuracy_by_batch
from syncbn.errors import InputError
from syncbn.train.run.directory import RunDirectory
from tests.support.world import run_world

EPSILON = 1e-3


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# 1. The deep linear chain


def test_terms_of_a_step_are_sums_over_sets_of_layers() -> None:
    weights = torch.tensor([1.5, -0.75, 2.0, 0.5], dtype=torch.float64)
    exact = [Fraction(float(weight)) for weight in weights]
    layers = range(len(exact))
    gradient = [math.prod(exact[j] for j in layers if j != i) for i in layers]
    found = chain_step(weights, EPSILON).orders
    for order in range(len(exact) + 1):
        term = sum(
            math.prod(-Fraction(EPSILON) * gradient[i] if i in moved else exact[i] for i in layers)
            for moved in itertools.combinations(layers, order)
        )
        assert float(found[order]) == float(term)


@pytest.mark.parametrize("layers", [2, 3, 10, 50])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_terms_add_up_to_the_step(layers: int, scale: float) -> None:
    weights = scale * (1 + 0.1 * _normal(layers, seed=layers))
    step = chain_step(weights, EPSILON)
    torch.testing.assert_close(float(step.orders[0]), float(weights.prod()), rtol=1e-13, atol=0)
    gradient = chain_gradient(weights)
    assert step.predicted == pytest.approx(-EPSILON * float(gradient @ gradient), rel=1e-12)
    actual = float((weights - EPSILON * gradient).prod() - weights.prod())
    # The difference of two products rounds in their size.
    size = float(max(weights.prod().abs(), abs(step.actual)))
    assert step.actual == pytest.approx(actual, rel=1e-8, abs=1e-13 * size)


def test_gradient_of_a_chain_is_that_of_autograd() -> None:
    for weights in (_normal(6), torch.tensor([1.0, 0, 2]).double()):
        weights.requires_grad_()
        (truth,) = torch.autograd.grad(3 * weights.prod(), weights)
        torch.testing.assert_close(chain_gradient(weights.detach(), 3.0), truth)


def test_second_order_term_is_negligible_or_exponentially_large() -> None:
    sizes = {
        scale: [
            abs(second_order_term(torch.full((layers,), scale).double(), EPSILON))
            for layers in (10, 20, 40)
        ]
        for scale in (0.5, 1.5)
    }
    # ε²·w^(2(l−1))·w^(l−2): with ten more layers, w^30 times as much.
    for scale, (ten, twenty, forty) in sizes.items():
        assert twenty / ten == pytest.approx(scale**30)
        assert forty / twenty == pytest.approx(scale**60)
    assert sizes[0.5][-1] < 1e-40
    assert sizes[1.5][-1] > 1e12


def test_first_order_misjudges_the_step_of_a_deep_chain() -> None:
    shallow, deep = (chain_step(torch.full((n,), 1.1).double(), 1e-2) for n in (3, 50))
    assert shallow.actual == pytest.approx(shallow.predicted, rel=0.05)
    assert abs(deep.actual / deep.predicted) < 0.05


def test_model_of_second_order_misses_the_orders_from_three_up() -> None:
    step = chain_step(torch.full((30,), 1.1).double(), 1e-2)
    error = step.actual - step.predicted - float(step.orders[2])
    assert error == pytest.approx(step.beyond_second, rel=1e-9)
    assert abs(step.beyond_second) > abs(step.predicted)
    assert [cost_of_order(50, order) for order in (1, 2, 3, 10)] == [50, 1225, 19600, 10272278170]


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_newton_step_is_that_of_the_hessian_and_misses_all_from_three_up(layers: int) -> None:
    weights = _normal(layers, seed=layers)

    def output(w: Tensor) -> Tensor:
        return 3 * w.prod()

    gradient = torch.func.grad(output)(weights)
    hessian = torch.autograd.functional.hessian(output, weights)
    assert isinstance(hessian, Tensor)
    step = -torch.linalg.solve(hessian, gradient)
    model, actual = newton_step(weights, 3.0)
    torch.testing.assert_close(step, -weights / (layers - 1))
    assert model == pytest.approx(float(gradient @ step + step @ hessian @ step / 2))
    whole = float(output(weights + step) - output(weights))
    assert actual == pytest.approx(whole, abs=1e-14)
    if layers == 2:
        assert actual == pytest.approx(model)  # nothing is of order three


def test_newton_step_of_a_deep_chain_misses_a_quarter_whatever_the_weights() -> None:
    for scale in (0.5, 1.0, 1.5):
        model, actual = newton_step(torch.full((50,), scale).double())
        assert actual / model == pytest.approx(1.261, abs=1e-3)


# 2. With batch normalization the chain is easy


def test_normalized_unit_is_standard_whatever_the_lower_layers_do() -> None:
    x = _normal(64, 1)
    for seed in range(20):
        hidden = x * (3 * _normal(9, seed=seed)).prod() + _normal(1, seed=seed)
        normal = syncbn.sync_batch_norm(hidden, eps=1e-30)[0]
        assert abs(float(normal.mean())) < 1e-10
        assert float(normal.var(correction=0)) == pytest.approx(1, abs=1e-10)


def test_lower_layers_matter_only_by_a_sign_or_a_zero() -> None:
    x, weights = _normal(64, 1), 1 + 0.1 * _normal(9)

    def output(factor: float) -> Tensor:
        changed = weights.clone()
        changed[4] *= factor
        return syncbn.sync_batch_norm(x * changed.prod(), eps=1e-30)[0]

    for factor in (0.01, 3.0, 100.0):
        torch.testing.assert_close(output(factor), output(1))
    torch.testing.assert_close(output(-2), -output(1))
    assert torch.equal(output(0), torch.zeros_like(x))


def test_delta_shows_where_the_variance_below_is_small() -> None:
    x = _normal(64, 1)
    x = (x - x.mean()) / x.std(correction=0)
    for weight, kept in ((1.0, 0.99999), (0.7, 0.116), (0.5, 3.64e-7)):
        normal = syncbn.sync_batch_norm(x * weight**19)[0]  # with the usual eps of 1e-5
        variance = weight**38
        assert float(normal.var(correction=0)) == pytest.approx(variance / (variance + 1e-5))
        assert variance / (variance + 1e-5) == pytest.approx(kept, rel=1e-2)


def test_normalized_chain_learns_at_the_same_rates_whatever_its_weights_and_depth() -> None:
    rates = torch.tensor([0.03, 0.1, 1.0], dtype=torch.float64)
    for layers, scale in ((5, 1.0), (20, 0.8), (20, 1.2), (50, 1.0)):
        assert (train_chain(True, rates, layers, 300, 0, scale)[-1] < 1e-6).all()
    for scale, works in ((0.8, [True, False]), (1.2, [False, False])):
        plain = train_chain(False, torch.tensor([1e-2, 1e-1]).double(), 20, 300, 0, scale)[-1]
        assert (plain < 1e-2).tolist() == works


def test_chains_of_several_rates_are_those_of_each_rate() -> None:
    rates = torch.tensor([0.01, 0.3], dtype=torch.float64)
    for normalize in (True, False):
        together = train_chain(normalize, rates, 5, 30, 1)
        alone = [train_chain(normalize, rate[None], 5, 30, 1) for rate in rates]
        torch.testing.assert_close(together, torch.cat(alone, 1))


# 3. What the gradient never proposes


def _share(sizes: tuple[int, ...], rank: int) -> Tensor:
    return rank + _normal(sizes[rank], 3, seed=rank)


def _upstream(sizes: tuple[int, ...], rank: int) -> Tensor:
    return _normal(sizes[rank], 3, seed=10 + rank)


def _components(sizes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = _share(sizes, dist.get_rank()).requires_grad_()
    y, moments = syncbn.sync_batch_norm(x, eps=eps)
    y.backward(_upstream(sizes, dist.get_rank()))
    assert x.grad is not None
    normal = (x.detach() - moments.mean) * moments.variance().rsqrt()
    along_normal = (x.grad * normal).sum(0)
    return x.grad.sum(0), along_normal, x.grad.abs().sum(0)


def _summed(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    mean, deviation, size = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    return mean, deviation, size


@pytest.mark.parametrize("sizes", [(9,), (4, 6), (1, 0, 7)])
def test_gradient_has_no_part_that_only_moves_mean_or_deviation(sizes: tuple[int, ...]) -> None:
    parts = run_world(len(sizes), _components, sizes, 1e-14)
    mean, deviation, size = _summed(parts)
    assert (mean.abs() < 1e-13 * size).all()
    assert (deviation.abs() < 1e-13 * size).all()


@pytest.mark.parametrize("sizes", [(9,), (4, 6), (1, 0, 7)])
def test_part_along_the_deviation_is_small_by_delta(sizes: tuple[int, ...]) -> None:
    eps = 1e-3
    x = torch.cat([_share(sizes, rank) for rank in range(len(sizes))])
    dy = torch.cat([_upstream(sizes, rank) for rank in range(len(sizes))])
    variance = x.var(0, correction=0)
    normal = (x - x.mean(0)) / variance.sqrt()
    # Were σ a constant, dx along x̂ would be Σ dy·x̂/√(σ² + δ).
    of_constant = (dy * normal).sum(0) / (variance + eps).sqrt()
    mean, deviation, size = _summed(run_world(len(sizes), _components, sizes, eps))
    assert (mean.abs() < 1e-13 * size).all()
    assert ((deviation - eps / (variance + eps) * of_constant).abs() < 1e-13 * size).all()


def test_following_the_gradient_moves_no_mean_and_a_deviation_in_second_order_only() -> None:
    h, dy = 3 + 2 * _normal(40, 1), 1 + _normal(40, 1, seed=1)
    mean, variance = h.mean(), h.var(correction=0)
    for step in (0.1, 2.0):
        ours, constant = (followed_gradient(h, dy, step, constants) for constants in (False, True))
        assert float(ours.mean()) == pytest.approx(float(mean), abs=1e-13)
        # Pythagoras: what is added has no part along ĥ.
        added = (ours - h).square().mean()
        assert float(ours.var(correction=0)) == pytest.approx(float(variance + added), rel=1e-11)
        # Were σ a constant, the gradient would be dy/σ.
        expected = h - step * dy / variance.sqrt()
        torch.testing.assert_close(constant, expected, rtol=0, atol=1e-13)
        assert abs(float(constant.mean() - mean)) > 0.3 * step


# 4. δ inside the root


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_finite_at_zero_variance(dtype: torch.dtype) -> None:
    gradient = gradient_at_zero_variance(1e-8, dtype)
    unit = torch.finfo(dtype).eps
    expected = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]])
    torch.testing.assert_close(gradient.float(), expected, rtol=2 * unit, atol=0)
    for delta in (1e-8, 1.0):  # whatever it is: the root's own derivative is infinite
        assert gradient_with_delta_outside(delta, dtype).isnan().any()


def test_half_precision_supports_no_smaller_delta_than_its_largest_number() -> None:
    # The gradient is δ^(−1/2), and 65504 the largest number of float16.
    assert gradient_at_zero_variance(2.4e-10, torch.float16).isfinite().all()
    with pytest.warns(UserWarning, match=r"eps is 2.2e-10: .*float16 cannot hold; .* 2.3e-10"):
        gradient = gradient_at_zero_variance(2.2e-10, torch.float16)
    assert not gradient.isfinite().any()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert gradient_at_zero_variance(1e-30, dtype).isfinite().all()
        with pytest.warns(UserWarning, match="eps is 0"):
            gradient_at_zero_variance(0, dtype)


# 5. γ and β


def test_reparametrised_layer_represents_the_same_functions() -> None:
    x, weight, bias = _normal(20, 5), _normal(4, 5, seed=1), _normal(4, seed=2)
    gamma, beta = gamma_and_beta_of(weight, bias, x)
    normalized = syncbn.sync_batch_norm(x @ weight.T, gamma, beta, eps=1e-30)[0]
    torch.testing.assert_close(normalized, x @ weight.T + bias, rtol=0, atol=1e-14)


def test_mean_of_the_output_is_beta_whatever_happens_below() -> None:
    beta = _normal(4)
    for seed in range(5):
        hidden = 10 * _normal(20, 5, seed=seed) @ _normal(5, 4, seed=seed) + seed
        y = syncbn.sync_batch_norm(hidden, _normal(4, seed=seed), beta)[0]
        torch.testing.assert_close(y.mean(0), beta, rtol=0, atol=1e-14)


def test_beta_moves_the_mean_in_as_many_steps_whatever_is_below() -> None:
    for seed in range(4):
        means = means_while_learning(True, 0.5, seed, 10)
        # The error halves with each step: 2⁻⁷ < 0.01.
        assert means == pytest.approx([1 - 0.5**step for step in range(11)], abs=1e-12)
        assert steps_until_there(means) == 7
    plain = {steps_until_there(means_while_learning(False, 0.5, seed, 30)) for seed in range(4)}
    assert len(plain - {None}) > 1
    assert steps_until_there([0, 0.5]) is None


# 6. The bias


def test_bias_before_batch_normalization_does_nothing() -> None:
    x, weight = _normal(20, 5), _normal(5, 4)
    bias = _normal(4).requires_grad_()
    y = syncbn.sync_batch_norm(x @ weight + bias)[0]
    torch.testing.assert_close(y, syncbn.sync_batch_norm(x @ weight)[0], rtol=0, atol=1e-14)
    y.backward(dy := _normal(20, 4, seed=1))
    assert bias.grad is not None
    assert (bias.grad.abs() < 1e-14 * dy.abs().sum(0) * 10).all()


# 7. Convolution


def test_same_statistics_at_all_positions_keep_translation() -> None:
    x = _normal(8, 3, 6, 6)
    x[..., :3] += 5  # positions differ
    shared = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    before, after = before_and_after_moving(shared, x, 2)
    torch.testing.assert_close(after, before.roll(2, 2), rtol=0, atol=1e-13)
    before, after = before_and_after_moving(PositionNorm(), x, 2)
    assert (after - before.roll(2, 2)).abs().mean() > 0.5


# 8. Test time


def test_single_sample_needs_running_statistics() -> None:
    layer = syncbn.SyncBatchNorm(4)
    with pytest.raises(InputError, match="expected more than 1 value per channel"):
        layer(torch.randn(1, 4))
    layer(torch.randn(16, 4))
    assert layer.eval()(torch.randn(1, 4)).isfinite().all()


def test_accuracy_by_batch_is_that_of_all_samples_in_their_company() -> None:
    x = torch.tensor([[2.0, 1], [3, 0], [0, 3], [1, 2]])
    data = Digits(x, torch.zeros(4), x, torch.tensor([0, 0, 1, 1]))
    model = syncbn.SyncBatchNorm(2)
    assert accuracy_by_batch(data, model, 4, torch.arange(4)) == 1
    assert accuracy_by_batch(data, model, 2, torch.tensor([0, 2, 1, 3])) == 1
    # Within a class, x̂ is (−1, 1) and (1, −1).
    assert accuracy_by_batch(data, model, 2, torch.arange(4)) == 0.5
    with pytest.raises(RuntimeError, match="invalid for input of size 4"):
        accuracy_by_batch(data, model, 3, torch.arange(4))


def test_statistics_of_two_samples_leave_only_their_order() -> None:
    y = syncbn.sync_batch_norm(_normal(2, 4) * 7 + 3, eps=1e-30)[0]
    torch.testing.assert_close(y.abs(), torch.ones(2, 4).double())
    model = nn.Sequential(nn.Linear(4, 4), syncbn.SyncBatchNorm(4)).double()
    x, other = _normal(1, 4), _normal(3, 4, seed=1)
    first, second = (model(torch.cat([x, mate]))[0] for mate in (other[:1], other[1:]))
    assert (first - second).abs().max() > 0.01  # the same sample in other company
    model.eval()
    torch.testing.assert_close(model(torch.cat([x, other]))[0], model(x)[0])


# 9. What is trained on several ranks


def test_jobs_choose_no_epoch_and_are_tested_at_the_end_in_both_ways(tmp_path: Path) -> None:
    job = ["model.width=4", "data.batch_size=64", "epochs=2", "recalibrate=true"]
    (place,) = jobs.train_jobs(tmp_path, 1, [job])
    run = RunDirectory(place)
    epochs, result = run.read_metrics(), run.read_result()
    assert result is not None
    assert [epoch["best"] for epoch in epochs] == [1, 1]
    assert not any("val_" in name or "test_" in name for name in epochs[-1])
    assert result.metrics["epoch"] == 2
    ways = ("as trained", "recalibrated")
    as_trained, recalibrated = (jobs.accuracy_at_end(place, how) for how in ways)
    found = [each["metrics"]["accuracy"]["value"] for each in result.evaluations]
    assert found == [as_trained, recalibrated]
    assert result.metrics["test_accuracy"] == recalibrated
