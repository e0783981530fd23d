"""What a forward may do for its graph to stand for it, and what makes `fuse` leave it alone."""

import io
from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn

C = 4


class _Net(nn.Module):
    """A normalization, and whatever follows it."""

    def __init__(self, follow: Callable[["_Net", Tensor, Tensor], object]) -> None:
        super().__init__()
        self.bn, self.follow = syncbn.SyncBatchNorm(C), follow
        self.doubling, self.appending = _Doubling(), _Appending()
        self.number, self.scales, self.constant = 0, [2.0], torch.ones(1)

    def forward(self, x: Tensor) -> object:
        return self.follow(self, self.bn(x), x)


def _prints(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    print("a batch")  # noqa: T201 -- what a forward may do besides
    return y.relu()


def _tries(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    try:
        return y.relu()
    finally:
        pass


def _without_gradient(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = x.sin()
    return net.bn(z).relu() + y


def _counts(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    net.number += 1
    return y.relu()


def _records(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    context = torch.autocast("cpu", torch.bfloat16)
    context.__enter__()
    z = y.relu() @ x.transpose(1, 2)
    context.__exit__(None, None, None)
    return z


@torch.autocast("cpu", torch.bfloat16)  # pyright: ignore[reportUntypedFunctionDecorator] -- as torch has it
def _in_half_precision(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    return y.relu() @ x.transpose(1, 2)


@torch.inference_mode()
def _in_inference_mode(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    return y.relu()


def _with_memory(y: Tensor, seen: list[float] | None = [2.0]) -> Tensor:  # noqa: B006 -- what is tested
    return y if seen is None else y * seen[0]


def _with_attribute(y: Tensor) -> Tensor:
    return y * _with_attribute.scale  # pyright: ignore[reportFunctionMemberAccess] -- set below


_with_attribute.scale = 2.0  # pyright: ignore[reportFunctionMemberAccess] -- functions may have attributes


class _Scale:
    def __init__(self) -> None:
        self.scale = 2.0

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.scale


def _applied(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: function(y)


_plain, _scaled = _applied(torch.tanh), _applied(_Scale())


class _Settings:
    scale = 2.0


def _reads_a_class(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    settings = _Settings
    return y.relu() * settings.scale


class _Doubling(nn.Identity):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


class _Appending(nn.Module):
    def forward(self, tensors: list[Tensor]) -> Tensor:
        tensors.append(tensors[0] * 2)
        return tensors[0]


def _gives_a_list(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    tensors = [y.relu()]
    net.appending(tensors)
    return torch.cat(tensors)


_SCALES = [2.0]


WHOLES: dict[str, tuple[Callable[[_Net, Tensor, Tensor], object], str]] = {
    "depends on values": (
        lambda net, y, x: y.relu() + 1 if x.sum() > 0 else y.relu(),
        "torch.fx cannot trace its model, TraceError",
    ),
    "depends on types": (
        lambda net, y, x: y.relu() if isinstance(x.sin(), list) else y.tanh(),
        "its model's forward looks at the type of what it computes",
    ),
    "compares identities": (
        lambda net, y, x: y.relu() if x.dtype is torch.float64 else y.tanh(),
        "<lambda>() in its model compares identities",
    ),
    "prints": (_prints, "_prints() in its model uses 'print'"),
    "catches": (_tries, "_tries() in its model has a with or try statement"),
    "without gradient": (
        _without_gradient,
        "its forward calls _set_grad_enabled without any of its inputs",
    ),
    "counts": (_counts, "_counts() in its model sets an attribute"),
    "asks for the mode": (
        lambda net, y, x: y.relu() if torch.is_grad_enabled() else y.tanh(),
        "<lambda>() in its model uses 'torch.is_grad_enabled'",
    ),
    "a global": (lambda net, y, x: y.relu() * _SCALES[0], "<lambda>() in its model uses '_SCALES'"),
    "random": (
        lambda net, y, x: y.relu() + torch.rand(()).item(),
        "its forward calls rand without any of its inputs",
    ),
    "what may change": (
        lambda net, y, x: y.relu() * net.scales[0],
        "its model's forward may read 'scales', which may change",
    ),
    "a decorator of torch": (
        lambda net, y, x: _in_half_precision(net, y, x),
        "_in_half_precision() in its model is called by torch.amp.autocast_mode",
    ),
    "another decorator of torch": (
        lambda net, y, x: _in_inference_mode(net, y, x),
        "_in_inference_mode() in its model is called by torch.utils._contextlib",
    ),
    "enters a context": (_records, "_records() in its model calls __enter__"),
    "a default that may change": (
        lambda net, y, x: _with_memory(y.relu()),
        "<lambda>() in its model uses '_with_memory'",
    ),
    "an attribute of a function": (
        lambda net, y, x: _with_attribute(y.relu()),
        "<lambda>() in its model uses '_with_attribute'",
    ),
    "a closure that another one hides": (
        lambda net, y, x: _plain(_scaled(_plain(y.relu()))),
        "<lambda>() in its model uses 'function'",
    ),
    "an attribute of a class": (_reads_a_class, "its model's forward may read _Settings.scale"),
    "an attribute by a method": (
        lambda net, y, x: y.relu() * net.__getattribute__("number"),
        "<lambda>() in its model calls __getattribute__",
    ),
    "a module called in its own way": (
        lambda net, y, x: net.doubling(y.relu()),
        "its model's forward calls a _Doubling, which has its own __call__",
    ),
    "a list that a module may change": (
        _gives_a_list,
        "its model's forward gives a list or dict to a _Appending, which may change it",
    ),
    "a kind of dict": (
        lambda net, y, x: OrderedDict(out=y.relu()),
        "its model's forward makes an OrderedDict, which a graph cannot repeat",
    ),
    "a method of no tensor": (
        lambda net, y, x: y.relu().append([x]),  # pyright: ignore[reportAttributeAccessIssue] -- a subclass may have it
        "its model's forward calls the method 'append', which tensors do not have",
    ),
    "a tensor of its own": (
        lambda net, y, x: y.relu() * net.constant,
        "its model's forward may read 'constant', which may change",
    ),
}


@pytest.mark.parametrize(("follow", "reason"), WHOLES.values(), ids=WHOLES)
def test_forward_that_may_be_more_than_its_calls_is_left_alone(
    follow: Callable[[_Net, Tensor, Tensor], object], reason: str
) -> None:
    model = _Net(follow)
    model.bn.eval()
    # To where no library watches it, as one of another test may: `print` would call its functions.
    with redirect_stdout(io.StringIO()):
        fusion = syncbn.fuse(model)
    assert fusion.fused == {}
    assert fusion.kept["bn"].startswith(reason)
    assert type(fusion.model) is _Net
    training = {name: module.training for name, module in fusion.model.named_modules()}
    assert training == {"": True, "bn": False, "doubling": True, "appending": True}


class _Average(nn.Module):
    """Replaces its buffer by another tensor, at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.5 * self.average + x.detach().mean()
        return x * 1.0


class _ReadsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.ema = syncbn.SyncBatchNorm(C), _Average()

    def forward(self, x: Tensor) -> Tensor:
        before = self.ema.average
        return self.bn(self.ema(x)).relu() + self.ema.average - 3 * before


def test_buffer_that_a_module_replaces_is_read_anew() -> None:
    model = _ReadsTwice()
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "relu"}
    for seed in range(2):
        x = torch.randn(6, C, 3, generator=torch.Generator().manual_seed(seed)) + 1
        torch.testing.assert_close(fusion.model(x), model(x))


def _reads_a_shape_early(net: _Net, y: Tensor, x: Tensor) -> Tensor:
    z = y.relu() * 1.0
    shape = z.shape
    z.unsqueeze_(0)
    return (z * 2).view(shape)


def test_attribute_of_a_tensor_is_read_before_the_tensor_changes() -> None:
    model = _Net(_reads_a_shape_early)
    fusion = syncbn.fuse(model)
    assert fusion.fused == {"bn": "relu"}
    x = torch.randn(6, C, 3)
    ours, truth = fusion.model(x), model(x)
    assert ours.shape == truth.shape
    torch.testing.assert_close(ours, truth)


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.block = syncbn.SyncBatchNorm(C), _Net(lambda net, y, x: (x + y).relu())

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.block(self.bn(x).relu())
        return y if scale is None else y * scale


def test_forward_with_optional_arguments_is_left_alone_and_its_blocks_are_fused() -> None:
    fusion = syncbn.fuse(_Optional())
    assert "may do without scale" in fusion.kept["bn"]
    assert fusion.fused == {"block.bn": "add, relu"}


class _Modes(_Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y.relu() if self.training else y.tanh()


def test_forward_that_takes_another_way_in_evaluation_is_fused_for_training() -> None:
    model = _Modes(lambda net, y, x: y)
    fusion = syncbn.fuse(model.eval())
    assert fusion.fused == {"bn": "relu"}
    assert not any(module.training for module in fusion.model.modules())
    x = torch.randn(6, C, 3)
    for training in (False, True):
        expected = model.train(training)(x)
        torch.testing.assert_close(fusion.model.train(training)(x), expected)


class _Lists(nn.Module):
    """Takes a tensor or several, as DenseNet's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = syncbn.SyncBatchNorm(C), nn.ReLU()

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        several = [input] if isinstance(input, Tensor) else input
        return self.relu(self.bn(torch.cat(several, 1)))


@pytest.mark.parametrize(
    "given", [torch.randn(3, C, 2), [torch.randn(3, 1, 2), torch.randn(3, C - 1, 2)]]
)
def test_forward_for_a_tensor_or_a_list_is_fused_for_both(given: Any) -> None:
    model = _Lists()
    fused = syncbn.fuse(model).model
    torch.testing.assert_close(fused(given), model(given))
    torch.testing.assert_close(fused(input=given), model(input=given))
    if isinstance(given, list):
        torch.testing.assert_close(fused(tuple(given)), model(tuple(given)))


class _Final(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(syncbn.SyncBatchNorm(C), nn.ReLU())
        self.bn = syncbn.SyncBatchNorm(C)

    def __init_subclass__(cls) -> None:
        raise TypeError("no heirs")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.block(x)).relu()


def test_class_that_refuses_subclasses_is_left_alone() -> None:
    fusion = syncbn.fuse(_Final())
    assert fusion.fused == {"block.0": "relu"}
    assert fusion.kept == {"bn": "_Final cannot have a subclass: no heirs"}
    assert type(fusion.model) is _Final
