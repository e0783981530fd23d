import copy
import re
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from syncbn import SyncBatchNorm
from syncbn.errors import ConversionError
from syncbn.transforms.fold import drop_redundant_bias, fold


def _realistic(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BN statistics and parameters, and biases, that change the output when they are lost."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            value = torch.randn(tensor.shape, generator=generator)
            owner = model.get_submodule(name.rpartition(".")[0])
            if name.endswith("running_var"):
                tensor.copy_(value.exp())
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(value)
            elif name.endswith("weight") and isinstance(owner, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage] -- the classes' common base
                tensor.copy_(1 + value / 3)
    return model


def _input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _assert_near(ours: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    error = (ours.double() - expected.double()).abs().max()
    assert error <= relative * expected.double().abs().max()


def _assert_same_evaluation(model: nn.Module, x: Tensor, relative: float = 1e-5) -> None:
    folding = fold(model)
    assert not any(module.training for module in folding.model.modules())
    _assert_near(folding.model(x.clone()), copy.deepcopy(model).eval()(x.clone()), relative)


PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 7)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)), (2, 4, 3, 3, 3)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)),
        (2, 4, 5, 5),
    ),
    "transposed 1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)),
        (2, 4, 5),
    ),
    "transposed 2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)),
        (2, 4, 4, 4),
    ),
    "transposed 3d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(4, 2, 2), nn.BatchNorm3d(2)),
        (2, 4, 2, 2, 2),
    ),
    "transposed, grouped": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 3, 3),
    ),
    "transposed, depthwise": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
        (2, 4, 3, 3),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)),
        (5, 4),
    ),
    "torch's SyncBatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.SyncBatchNorm(6)),
        (2, 4, 5, 5),
    ),
    "our SyncBatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), SyncBatchNorm(6, bias=False)),
        (2, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_is_folded_and_computes_the_same(name: str) -> None:
    make, shape = PAIRS[name]
    model = nn.Sequential(nn.Flatten() if name == "linear" else nn.Identity(), _realistic(make()))
    before = copy.deepcopy(model.state_dict())
    folding = fold(model)
    assert folding.folded == ("1.1",)
    assert folding.kept == {}
    assert type(folding.model.get_submodule("1.1")) is nn.Identity
    _assert_same_evaluation(model, _input(*shape))
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "folded", "kept"),
    [
        ("resnet18", 20, 0),
        ("mobilenet_v3_small", 34, 0),
        pytest.param("densenet121", 59, 62, marks=pytest.mark.long),
    ],
)
def test_architectures_of_torchvision_compute_the_same(name: str, folded: int, kept: int) -> None:
    models: Any = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = _realistic(getattr(models, name)())
    folding = fold(model)
    assert (len(folding.folded), len(folding.kept)) == (folded, kept)
    _assert_same_evaluation(model, _input(1, 3, 64, 64))


class _Dense(nn.Module):
    """A residual block and a dense one, in small: their BNs in every position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.pre = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.bn_squeeze = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.bn_head = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.bn(self.conv(x)))
        x = self.pre(torch.cat([x, x.neg()], 1))
        x = self.bn_squeeze(self.squeeze(x)).mean((2, 3)).flatten(1)
        return self.bn_head(self.head(x))


def test_normalizations_before_convolutions_stay_and_the_reason_is_told() -> None:
    model = _realistic(_Dense())
    folding = fold(model)
    assert folding.folded == ("stem.1", "bn", "bn_squeeze", "bn_head")
    assert folding.kept == {"pre": "it follows cat, and not a convolution or linear layer"}
    assert type(folding.model) is _Dense
    _assert_same_evaluation(model, _input(2, 3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_keep_theirs_and_round_once(dtype: torch.dtype) -> None:
    make, shape = PAIRS["conv2d"]
    model = _realistic(make()).to(dtype).eval()
    folded = fold(model).model
    exact = fold(copy.deepcopy(model).double()).model
    for ours, truth in zip(folded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, truth.to(dtype))
    _assert_same_evaluation(model, _input(*shape, dtype=dtype), 8 * torch.finfo(dtype).eps)


def test_weights_that_overflow_when_folded_stay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=0.0)).half()
    nn.init.constant_(model[1].running_var, 1e-6)  # pyright: ignore[reportArgumentType] -- a buffer
    nn.init.constant_(model[0].weight, 1e3)  # pyright: ignore[reportArgumentType] -- a parameter
    assert fold(model).kept == {"1": "the folded weights of '0' are not finite in torch.float16"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_last_and_requires_grad_stay(
    kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], groups: int
) -> None:
    model = nn.Sequential(kind(4, 6, 3, groups=groups), nn.BatchNorm2d(6))
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch's overloads lack it
    model.requires_grad_(False)
    layer = fold(model).model.get_submodule("0")
    assert isinstance(layer.weight, Tensor)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_process_group_that_cannot_be_copied_is_shared() -> None:
    class Group:
        def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
            raise TypeError("cannot be copied")

    norm = nn.SyncBatchNorm(6, process_group=Group())
    model = nn.Sequential(nn.BatchNorm2d(3), norm, nn.Conv2d(6, 6, 1), nn.SyncBatchNorm(6))
    folding = fold(model)
    assert folding.folded == ("3",)
    assert folding.model.get_submodule("1").process_group is norm.process_group


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), SyncBatchNorm(3)])
def test_a_normalization_alone_stays(norm: nn.Module) -> None:
    assert fold(norm).kept == {"": "it follows input, and not a convolution or linear layer"}
    assert drop_redundant_bias(norm) == ()
    _assert_same_evaluation(_realistic(norm), _input(2, 3, 4, 4))


def test_model_without_normalization_is_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    folding = fold(model)
    assert (folding.folded, folding.kept) == ((), {})
    assert folding.model is not model
    _assert_same_evaluation(model, _input(2, 3, 4, 4))


# Models of which nothing may be folded, each with a word of the reason, and whether the bias of
# their convolution, which is called "conv", has to stay as well.
class _Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(3, 3, 3, padding=1)
        self.bn: nn.Module = norm or nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x))


class _UsedTwice(_Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y


class _ConvCalledTwice(_Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(self.conv(x)))


class _NormCalledTwice(_Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.bn(self.conv(x)))


class _Stored(_Net):
    last: Any = None

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        self.last = y  # pyright: ignore[reportArgumentType] -- torch types attributes as tensors or modules
        return self.bn(y)


class _ReadsWeight(_Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y + nn.functional.conv2d(y, self.conv.weight, self.conv.bias, padding=1)  # pyright: ignore[reportArgumentType, reportCallIssue] -- torch types attributes as tensors or modules


class _ReadsStatistics(_Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.bn.running_var.sum()  # pyright: ignore[reportCallIssue] -- as above


class _DependsOnData(_Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) if x.sum() > 0 else y


class _DependsOnOption(_Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        y = self.conv(x)
        if mask is None:  # a proxy never is
            y = y.square()
        return self.bn(y)


class _DependsOnFlag(_Net):
    def forward(self, x: Tensor, raw: bool = False) -> Any:
        y = self.conv(x)
        return y if raw else self.bn(y)


class _LooksAtClass(_Net):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return y if isinstance(self.bn, nn.BatchNorm2d) else y + 1


class _HidesNorm(_Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.bn]  # not a module's child, so that replacing self.bn is not enough

    def forward(self, x: Tensor) -> Any:
        return self.hidden[0](self.conv(x))


class _ManyArguments(_Net):
    def forward(self, *x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] -- never called as the base
        return self.bn(self.conv(x[0]))


class _ManyOptions(_Net):
    def forward(self, x: Tensor, a: Any = 0, b: Any = 0, c: Any = 0, d: Any = 0, e: Any = 0) -> Any:
        return self.bn(self.conv(x))


class _ClippedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)


class _KeepsNormTraining(_Net):
    def train(self, mode: bool = True) -> Any:  # which forgets to return itself, as some do
        super().train(mode)
        self.bn.train()


def _with(change: Callable[[_Net], object]) -> _Net:
    net = _Net()
    change(net)
    return net


def _share_weight(net: _Net) -> None:
    other = nn.Conv2d(3, 3, 3, padding=1)
    net.conv.weight = other.weight
    net.add_module("other", other)


def _share_statistics(net: _Net) -> None:
    other = nn.BatchNorm2d(3)
    other.running_mean = net.bn.get_buffer("running_mean")
    net.add_module("other", nn.Sequential(nn.Conv2d(3, 3, 1), other))


def _exchange_forward(net: _Net) -> None:
    forward = net.conv.forward
    net.conv.forward = lambda x: 2 * forward(x)


def _double(module: nn.Module, args: Any, output: Any) -> Any:
    return 2 * output


def _box(net: _Net) -> None:
    inner = nn.Sequential(nn.Identity())
    inner.register_forward_hook(_double)
    net.conv = nn.Sequential(net.conv, inner)


STAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "output used twice": (_UsedTwice, "used elsewhere too"),
    "output stored": (_Stored, "used elsewhere too"),
    "convolution called twice": (_ConvCalledTwice, "'conv' is used in more than one place"),
    "normalization called twice": (_NormCalledTwice, "'bn' is used in more than one place"),
    "same module in two places": (
        lambda: _with(lambda net: net.add_module("alias", net.conv)),
        "'conv' is used in more than one place",
    ),
    "weight read": (_ReadsWeight, "'conv' has parameters or buffers that the forward reads"),
    "statistics read": (_ReadsStatistics, "'bn' has parameters or buffers that the forward"),
    "data decide": (_DependsOnData, "TraceError: symbolically traced variables"),
    "option decides": (_DependsOnOption, "it follows square"),
    "flag decides": (_DependsOnFlag, "for some arguments or modes only"),
    "any arguments": (_ManyArguments, r"any number of arguments, \*x"),
    "too many options": (_ManyOptions, "5 optional arguments"),
    "subclass": (lambda: _Net(_ClippedNorm(3)), "'bn' is a _ClippedNorm"),
    "hook on the convolution": (
        lambda: _with(lambda net: net.conv.register_forward_hook(_double)),
        "'conv' has hooks",
    ),
    "hook on the normalization": (
        lambda: _with(lambda net: net.bn.register_forward_pre_hook(lambda *_: None)),
        "'bn' has hooks",
    ),
    "hook on what is around them": (
        lambda: nn.Sequential(_with(lambda net: net.register_forward_hook(_double))),
        "is inside '0', which is torch's own or has hooks",
    ),
    "hook between them": (lambda: _with(_box), "it follows 'conv.1', a Sequential"),
    "exchanged forward": (lambda: _with(_exchange_forward), "exchanged forward"),
    "parametrized": (
        lambda: _with(lambda net: parametrizations.weight_norm(net.conv)),
        "a ParametrizedConv2d",
    ),
    "shared weight": (lambda: _with(_share_weight), "'conv' shares a parameter or buffer"),
    "shared statistics": (lambda: _with(_share_statistics), "'bn' shares a parameter or buffer"),
    "in a wrapper of torch's": (
        lambda: nn.Sequential(nn.DataParallel(_Net())),
        "is inside '0', which is torch's own",
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_certain_stays_and_the_reason_is_told(name: str) -> None:
    make, reason = STAYS[name]
    model = make()
    names = [name for name, _ in model.named_parameters()]
    norm = next(name for name, _ in model.named_modules() if name.rpartition(".")[2] == "bn")
    folding = fold(model)
    assert folding.folded == ()
    assert re.search(reason, folding.kept[norm]), folding.kept
    assert drop_redundant_bias(model) == ()
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(folding.model(_input(2, 3, 5, 5)), model.eval()(_input(2, 3, 5, 5)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_LooksAtClass, "takes another way once anything is folded"),
        (_HidesNorm, "takes another way once anything is folded"),
        (_KeepsNormTraining, "stays in training mode in eval"),
        (lambda: _Net(nn.BatchNorm2d(3, track_running_stats=False)), "no running statistics"),
    ],
)
def test_what_only_folding_would_break_stays(make: Callable[[], nn.Module], reason: str) -> None:
    model = _realistic(make())
    folding = fold(model)
    assert folding.folded == ()
    assert re.search(reason, folding.kept["bn"]), folding.kept
    model.eval()
    _assert_near(folding.model(_input(2, 3, 5, 5)), model(_input(2, 3, 5, 5)))


def test_lazy_layers_are_refused_by_name_and_their_biases_stay() -> None:
    model = nn.Sequential(_Net(nn.LazyBatchNorm2d()), nn.LazyConv2d(4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ConversionError, match=r"'0\.bn\.weight' has no shape yet; pass a batch"):
        fold(model)
    assert drop_redundant_bias(model) == ()
    model(_input(2, 3, 5, 5))
    assert fold(model).folded == ("0.bn", "2")
    assert drop_redundant_bias(model) == ("0.conv.bias", "1.bias")


def test_parts_of_a_model_that_cannot_be_traced_fold_on_their_own() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone: nn.Module = _Net()

        def forward(self, x: Tensor) -> Any:
            return self.backbone(x) if x.sum() > 0 else x

    model = _realistic(Detector())
    x = _input(2, 3, 5, 5).abs()
    expected = copy.deepcopy(model).eval()(x)
    assert "what the model only calls can be passed on its own" in fold(model).kept["backbone.bn"]
    setattr(model, "backbone", fold(model.get_submodule("backbone")).model)  # noqa: B010 -- torch's annotation
    assert type(model.get_submodule("backbone.bn")) is nn.Identity
    _assert_near(model.eval()(x), expected)


class _Mlp(nn.Module):
    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prepare = prepare
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.prepare(x))


@pytest.mark.parametrize(
    ("prepare", "folded"),
    [
        (lambda x: x, False),  # (N, C, C) is possible
        (lambda x: torch.flatten(x, 2), False),
        (lambda x: x.flatten(end_dim=1), False),
        (lambda x: x.view((2, 3, 3)), False),
        (lambda x: torch.flatten(x, 1), True),
        (lambda x: torch.flatten(x, start_dim=1), True),
        (lambda x: x.flatten(1, -1), True),
        (lambda x: x.view(x.size(0), -1).relu(), True),
        (lambda x: nn.functional.dropout(x.reshape(-1, 3), 0.5, False), True),
    ],
)
def test_linear_is_folded_only_where_its_input_is_a_matrix(
    prepare: Callable[[Any], Any], folded: bool
) -> None:
    model = _realistic(_Mlp(prepare))
    folding = fold(model)
    assert folding.folded == (("layers.3",) if folded else ())
    assert folded or "may be (N, L, C)" in folding.kept["layers.3"]
    assert drop_redundant_bias(model) == (("layers.2.bias",) if folded else ())
    x = _input(6, 3) if folded else _input(2, 3, 3)
    _assert_same_evaluation(model, x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "plain": nn.BatchNorm2d,
    "average of all batches": lambda n: nn.BatchNorm2d(n, momentum=None),
    "not affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "no statistics": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "ours": SyncBatchNorm,
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_model_without_redundant_biases_trains_and_evaluates_the_same(
    name: str, training: bool
) -> None:
    norm = NORMS[name]
    biased = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), norm(2)),
        *(nn.Flatten(), nn.Linear(50, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
    )
    _realistic(biased).double().train(training)
    model = copy.deepcopy(biased)
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert drop_redundant_bias(model) == ("0.bias", "3.bias", "6.bias")
    assert all(id(p) == weights[name] for name, p in model.named_parameters())
    assert [child.training for child in model.modules()] == [training] * 10
    assert drop_redundant_bias(model) == ()
    offsets = {"1": "0.bias", "4": "3.bias", "7": "6.bias"}

    def compare() -> None:
        x = _input(5, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(model.eval()(x), biased.eval()(x))
        expected = biased.state_dict()
        for key, ours in model.state_dict().items():
            layer, _, tensor = key.partition(".")
            shift = expected[offsets[layer]] if tensor == "running_mean" else 0
            torch.testing.assert_close(ours, expected[key] - shift, msg=key)

    compare()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, biased)]
    for step in range(3):
        x = _input(5, 3, 4, 4, dtype=torch.float64) * (1 + step)
        outputs = [each.train()(x) for each in (model, biased)]
        torch.testing.assert_close(*outputs)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in biased.named_parameters()}
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], msg=key)
        for optimizer in optimizers:
            optimizer.step()
    compare()


@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 2),
    outputs=st.integers(1, 3),
    kind=st.sampled_from([nn.Conv1d, nn.ConvTranspose1d]),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_grouping_and_any_order_of_the_two_compute_the_same(
    groups: int,
    inputs: int,
    outputs: int,
    kind: type[nn.Conv1d] | type[nn.ConvTranspose1d],
    bias: bool,
    affine: bool,
    seed: int,
) -> None:
    layer = kind(groups * inputs, groups * outputs, 2, groups=groups, bias=bias)
    model = nn.Sequential(layer, nn.BatchNorm1d(groups * outputs, affine=affine))
    _realistic(model, seed).double()
    x = _input(3, groups * inputs, 4, dtype=torch.float64)
    expected = copy.deepcopy(model).eval()(x)
    _assert_near(fold(model).model(x), expected, 1e-12)
    assert drop_redundant_bias(model) == (("0.bias",) if bias else ())
    _assert_near(fold(model).model(x), expected, 1e-12)


class _AuxiliaryInTraining(_Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return (self.bn(y), y) if self.training else self.bn(y)


def test_bias_that_matters_in_training_alone_stays() -> None:
    assert fold(_AuxiliaryInTraining()).folded == ("bn",)
    for training in (True, False):
        assert drop_redundant_bias(_AuxiliaryInTraining().train(training)) == ()


class _FreezesNorm(_Net):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.bn.eval()
        return self


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bias_before_frozen_statistics_stays(training: bool) -> None:
    model = _FreezesNorm().train(training)
    assert drop_redundant_bias(model) == ()
    frozen = nn.Sequential(_Net(), _Net())
    frozen[0].eval()
    assert drop_redundant_bias(frozen) == ("1.conv.bias",)


def test_bfloat16_bias_moves_into_float32_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1).bfloat16(), nn.BatchNorm2d(4))
    _realistic(model)
    bias, mean = (model.get_parameter("0.bias").float(), model.get_buffer("1.running_mean").clone())
    assert drop_redundant_bias(model) == ("0.bias",)
    assert torch.equal(model.get_buffer("1.running_mean"), mean - bias)


def test_other_threads_may_call_models_meanwhile() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(50))).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = model(x)
    done = threading.Event()
    wrong: list[object] = []

    def call() -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    if not torch.equal(model(x), expected):
                        wrong.append("another output")
            except Exception as error:  # whatever a trace makes of it
                wrong.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert len(fold(_stack()).folded) == 20
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    assert wrong == []


def _stack() -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(20)]
    return nn.Sequential(*layers).eval()
