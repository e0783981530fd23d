import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import syncbn
from tests.support.world import run_world

C = 4


class _Block(nn.Module):
    """A residual block: one ReLU for both places, as torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def _values(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def _assert_computes_the_same(ours: nn.Module, truth: nn.Module, x: Tensor) -> None:
    for training in (True, True, False):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [
            model.train(training)(each) for model, each in zip((ours, truth), inputs, strict=True)
        ]
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-7, atol=1e-7)
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in (ours, truth)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.state_dict(), truth.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("resnet18", 17),
        pytest.param("mobilenet_v2", 10, marks=pytest.mark.long),
        pytest.param("densenet121", 121, marks=pytest.mark.long),
    ],
)
def test_architectures_of_torchvision_compute_the_same(name: str, fused: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=3).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fusion = syncbn.fuse(syncbn.convert_sync_batchnorm(copy.deepcopy(model)))
    assert len(fusion.fused) == fused
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted([*fusion.fused, *fusion.kept]) == sorted(norms)
    assert list(fusion.model.state_dict()) == list(model.state_dict())
    _assert_computes_the_same(fusion.model, model, _batch(4, 3, 64, 64))


def _calls(model: nn.Module, *inputs: Tensor) -> list[str]:
    """Return what each call of a SyncBatchNorm took along, in order."""
    calls: list[str] = []
    original = syncbn.SyncBatchNorm.forward

    def spy(self: syncbn.SyncBatchNorm, input: Tensor, residual: Tensor | None = None) -> Tensor:
        what = [*(["add"] if residual is not None else []), *(["relu"] if self.fuses_relu else [])]
        calls.append(", ".join(what))
        return original(self, input, residual)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syncbn.SyncBatchNorm, "forward", spy)
        model(*inputs)
    return calls


def test_residual_block_calls_its_two_layers_with_what_follows_them() -> None:
    model = syncbn.convert_sync_batchnorm(_Block())
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn1": "relu", "bn2": "add, relu"}
    x = torch.randn(4, C, 3, 3)
    assert _calls(fusion.model, x) == ["relu", "add, relu"]
    assert _calls(fusion.model.eval(), x) == ["", ""]
    assert _calls(model, x) == ["", ""]  # the model itself is as it was
    assert type(fusion.model).__name__ == "_Block"
    assert isinstance(fusion.model, _Block)


def _block_on_two_ranks() -> list[Tensor]:
    model = syncbn.fuse(syncbn.convert_sync_batchnorm(_values(_Block()).double())).model
    x = _batch(8, C, 5, 5).chunk(2)[dist.get_rank()].requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_replicas_match_one_process_on_the_concatenated_batch() -> None:
    ours = run_world(2, _block_on_two_ranks)
    truth, x = _values(_Block()).double(), _batch(8, C, 5, 5).requires_grad_()
    y = truth(x)
    y.square().sum().backward()
    expected = [y.detach(), x.grad, *(parameter.grad for parameter in truth.parameters())]
    for number, exact in enumerate(expected):
        mine = torch.cat([rank[number] for rank in ours]) if number < 2 else ours[0][number]
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


class _One(nn.Module):
    """A normalization, and whatever follows it."""

    def __init__(self, follow: Callable[["_One", Tensor, Tensor], object]) -> None:
        super().__init__()
        self.bn = syncbn.SyncBatchNorm(C)
        self.relu, self.relu_, self.follow = nn.ReLU(), nn.ReLU(inplace=True), follow

    def forward(self, x: Tensor) -> object:
        return self.follow(self, self.bn(x), x)


def _augmented(net: _One, y: Tensor, x: Tensor) -> Tensor:
    z = x
    z *= 2
    return y + x


FUSED: dict[str, tuple[Callable[[_One, Tensor, Tensor], object], str]] = {
    "a module": (lambda net, y, x: net.relu(y), "relu"),
    "a function": (lambda net, y, x: functional.relu(y, inplace=True), "relu"),
    "torch's": (lambda net, y, x: torch.relu(y), "relu"),
    "a method": (lambda net, y, x: y.relu_(), "relu"),
    "a sum": (lambda net, y, x: y + x, "add"),
    "a sum the other way": (lambda net, y, x: (x + y).relu(), "add, relu"),
    "a sum by function": (lambda net, y, x: torch.add(y, x).relu(), "add, relu"),
    "a sum in place": (lambda net, y, x: y.add_(x).relu(), "add, relu"),
    "a sum that goes elsewhere too": (lambda net, y, x: (s := y + x, s.relu()), "add"),
}
KEPT: dict[str, tuple[Callable[[_One, Tensor, Tensor], object], str]] = {
    "tanh comes after it": (lambda net, y, x: y.tanh(), "tanh comes after it, and neither"),
    "its output goes elsewhere": (lambda net, y, x: y.relu() * y, "its output goes to 2 places"),
    "to itself": (lambda net, y, x: y + y, "what is added to it is no other tensor"),
    "a number": (lambda net, y, x: y + 1.0, "what is added to it is no other tensor"),
    "a size": (lambda net, y, x: y + x.size(0), "size, is computed after it|no other tensor"),
    "computed later": (lambda net, y, x: y + x.sin(), "sin, is computed after it"),
    "scaled": (lambda net, y, x: torch.add(y, x, alpha=2), "add comes after it, and neither"),
    "changed in place": (lambda net, y, x: (x.mul_(2), y.relu())[1], "mul_ may change a tensor"),
    "added in place to what is used": (
        lambda net, y, x: (z := x.neg(), x.add_(y), z)[1],
        "it is added in place to x, which may be used elsewhere",
    ),
    "changed by out=": (
        lambda net, y, x: (torch.add(x, 100, out=x), y + x)[1],
        "add may change a tensor in place before add_1",
    ),
    "changed through a view": (
        lambda net, y, x: (x.view(-1).add_(100), y + x)[1],
        "add_ may change a tensor",
    ),
    "changed by an augmented assignment": (_augmented, "imul may change a tensor in place"),
    "changed by a module": (lambda net, y, x: (net.relu_(x), y + x)[1], "relu_ may change"),
    "changed by a function": (
        lambda net, y, x: (functional.relu(x, True), y + x)[1],
        "relu may change a tensor",
    ),
    "moved like a running mean": (
        lambda net, y, x: (functional.instance_norm(y, x[0, :, 0], x[1, :, 0]), x + x)[1],
        "instance_norm comes after it",
    ),
}


@pytest.mark.parametrize(("follow", "taken"), FUSED.values(), ids=FUSED)
def test_what_follows_is_taken_along(
    follow: Callable[[_One, Tensor, Tensor], object], taken: str
) -> None:
    model = _One(follow)
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": taken}
    assert fusion.kept == {}
    x = _batch(6, C, 3)
    assert _calls(fusion.model, x.clone()) == [taken]
    torch.testing.assert_close(fusion.model(x.clone()), model(x.clone()))


@pytest.mark.parametrize(("follow", "reason"), KEPT.values(), ids=KEPT)
def test_what_is_not_certain_is_kept_with_the_reason(
    follow: Callable[[_One, Tensor, Tensor], object], reason: str
) -> None:
    model = _One(follow)
    fusion = syncbn.fuse(model)
    assert fusion.fused == {}
    (why,) = fusion.kept.values()
    assert any(part in why for part in reason.split("|")), why
    assert type(fusion.model) is _One
    x = _batch(6, C, 3)
    torch.testing.assert_close(fusion.model(x.clone()), model(x.clone()))


def _hooked(model: nn.Module) -> None:
    model.get_submodule("bn").register_forward_hook(lambda *_: None)


def _unsynchronized(model: nn.Module) -> None:
    syncbn.revert_sync_batchnorm(model)


def _with_relu(model: nn.Module) -> None:
    model.get_submodule("bn").__dict__["fuses_relu"] = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "it has hooks or an exchanged forward"),
        (_unsynchronized, "it is a BatchNorm, and not a SyncBatchNorm"),
        (_with_relu, "it takes a ReLU or a residual along already"),
    ],
)
def test_layer_that_is_not_plain_is_kept(change: Callable[[nn.Module], None], reason: str) -> None:
    model = _One(lambda net, y, x: y.relu())
    change(model)
    assert syncbn.fuse(model).kept == {"bn": reason}


def test_layer_that_is_called_twice_is_kept() -> None:
    model = _One(lambda net, y, x: net.bn(y.relu()).relu())
    assert syncbn.fuse(model).kept == {"bn": "it is called more than once"}


def test_fused_model_can_be_reverted_converted_copied_and_pickled() -> None:
    plain = _values(_Block()).double()
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
    x = _batch(4, C, 5, 5)
    calls = [["relu", "add, relu"], ["relu", "add, relu"], ["", ""]]
    for make, expected in zip(
        (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), calls, strict=True
    ):
        fused = make(syncbn.fuse(model).model)
        assert _calls(copy.deepcopy(fused), x) == expected
        _assert_computes_the_same(fused, copy.deepcopy(plain), x)
    reverted = syncbn.revert_sync_batchnorm(syncbn.fuse(model).model)
    assert type(reverted.get_submodule("bn2")) is nn.BatchNorm2d
    _assert_computes_the_same(reverted, copy.deepcopy(plain), x)
    again = syncbn.convert_sync_batchnorm(syncbn.revert_sync_batchnorm(syncbn.fuse(model).model))
    assert _calls(copy.deepcopy(again), x) == ["relu", "add, relu"]
    _assert_computes_the_same(again, copy.deepcopy(plain), x)


def test_fused_model_is_left_as_it_is() -> None:
    fused = syncbn.fuse(syncbn.convert_sync_batchnorm(_Block())).model
    again = syncbn.fuse(fused)
    assert again.fused == {}
    assert again.kept == dict.fromkeys(("bn1", "bn2"), "its model is fused already")
    assert _calls(again.model, torch.randn(4, C, 3, 3)) == ["relu", "add, relu"]


class _Total:
    """Adds what it is given, and is no tensor."""

    def add(self, other: Tensor) -> Tensor:
        return 2 * other


class _MakesTotal(nn.Module):
    def forward(self, x: Tensor) -> _Total:
        return _Total()


class _AddsToTotal(_One):
    def __init__(self) -> None:
        super().__init__(lambda net, y, x: y)
        self.total = _MakesTotal()

    def forward(self, x: Tensor) -> object:
        return self.total(x).add(self.bn(x))


def test_addition_by_what_may_be_no_tensor_is_kept() -> None:
    model = _AddsToTotal()
    fusion = syncbn.fuse(model)
    assert fusion.kept == {"bn": "it is added by a method of total, which may be no tensor"}
    x = torch.randn(3, C, 2)
    torch.testing.assert_close(fusion.model(x), model(x))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), syncbn.SyncBatchNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y, y)


def test_fused_model_is_folded_as_the_model_is() -> None:
    model = syncbn.convert_sync_batchnorm(_values(_Block())).double()
    folding = syncbn.fold(syncbn.fuse(model).model)
    assert folding.folded == ("bn1", "bn2")
    x = _batch(4, C, 5, 5)
    torch.testing.assert_close(folding.model(x), model.eval()(x))


def test_layers_that_take_something_along_themselves_are_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), syncbn.SyncBatchNorm(C, relu=True))
    assert "takes a ReLU itself" in syncbn.fold(model).kept["1"]
    # The convolution's output goes into the normalization alone, but in two ways.
    assert "adds a residual itself" in syncbn.fold(_Twice()).kept["bn"]
