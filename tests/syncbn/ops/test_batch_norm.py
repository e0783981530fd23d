from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.comm.exchange import Exchange, Memory
from syncbn.errors import InputError
from syncbn.kernels.choice import select_kernels
from syncbn.kernels.reference import ReferenceKernels
from syncbn.ops.batch_norm import global_moments, normalize
from tests.support.tolerance import assert_as_exact


def test_moments_are_those_of_the_batch_and_carry_no_gradient() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    y, moments = syncbn.sync_batch_norm(x)
    torch.testing.assert_close(moments.mean, x.mean((0, 2)))
    torch.testing.assert_close(moments.variance(), x.var((0, 2), correction=0))
    assert moments.count == 18
    assert y.requires_grad
    assert not moments.packed.requires_grad


def test_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda *tensors: syncbn.sync_batch_norm(*tensors)[0], (x, weight, bias)
    )


def _network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), norm(4), nn.Tanh(), nn.Linear(4, 2), norm(2))


def _penalized(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (y.sin().sum() + gradient.square().sum()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_gradient_can_be_differentiated_again(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCBN_KERNELS", kernels)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    ours, plain = _network(syncbn.SyncBatchNorm), _network(nn.BatchNorm1d)
    truth = _penalized(_network(nn.BatchNorm1d).double(), x.double())
    for mine, exact, rounded in zip(_penalized(ours, x), truth, _penalized(plain, x), strict=True):
        assert_as_exact(mine, exact, rounded, "gradient of the penalty")


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_tensors_get_no_gradient(frozen: str) -> None:
    tensors = {"x": torch.randn(4, 2), "weight": torch.ones(2), "bias": torch.zeros(2)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    syncbn.sync_batch_norm(*tensors.values())[0].square().sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_vector_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(N, C, \*\), got \(4,\); add a batch dimension"):
        syncbn.sync_batch_norm(torch.zeros(4))


def test_input_without_channels_is_refused() -> None:
    for refuse in (syncbn.sync_batch_norm, syncbn.SyncBatchNorm(0)):
        with pytest.raises(InputError, match=r"expected channels .* of shape \(2, 0, 3\)"):
            refuse(torch.zeros(2, 0, 3))


def test_residual_unlike_the_input_is_refused() -> None:
    x = torch.randn(4, 5)
    for residual, got in (
        (x[:1], r"got \(1, 5\), torch.float32, on cpu"),
        (x.double(), r"got \(4, 5\), torch.float64, on cpu"),
        (x.to("meta"), r"got \(4, 5\), torch.float32, on meta"),
    ):
        with pytest.raises(InputError, match=rf"residual like the input, of .*\(4, 5\), .*{got}"):
            syncbn.sync_batch_norm(x, residual=residual)


class _TwoLikeThis:
    """A reducer whose other replica sends the same."""

    group = None
    world_size = 2
    rank = 0

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        return 2 * vector

    def gather(self, vector: Tensor) -> Tensor:
        return torch.stack([vector, vector])


# The host waits for the GPU: pytorch#78656, #36452.
def test_nothing_off_the_cpu_looks_at_a_value() -> None:
    # A meta tensor has no values: looking at one raises, where on CUDA the host would wait.
    layer = syncbn.SyncBatchNorm(3, device="meta")
    x = torch.randn(4, 3, 2, device="meta", requires_grad=True)
    exchange = Exchange(_TwoLikeThis(), Memory(3, x.device), 3, x.dtype)
    kernels = select_kernels(x, layer.weight, layer.bias)
    assert isinstance(kernels, ReferenceKernels)
    moments = global_moments(x, kernels, exchange)
    parameters = layer.weight, layer.bias, x
    y = normalize(x, moments, *parameters, layer.eps, True, kernels, exchange)
    layer._track(moments, kernels)  # pyright: ignore[reportPrivateUsage] -- what forward does next
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        moments.count.item()
