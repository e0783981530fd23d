from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from syncbn.errors import ModelError
from syncbn.models import (
    ARCHITECTURES,
    ChannelAffine,
    build_model,
    build_without_memory,
    model_names,
)

SIZES: dict[str, Any] = {"in_channels": 1, "num_classes": 10}
NORMS = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base


def norms(model: nn.Module) -> list[NORMS]:
    return [module for module in model.modules() if isinstance(module, NORMS)]


def affines(model: nn.Module) -> list[ChannelAffine]:
    return [module for module in model.modules() if isinstance(module, ChannelAffine)]


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", ["cnn", "mlp", "torchvision.resnet18"])
def test_images_of_any_channels_are_classified(name: str, norm: str) -> None:
    model = build_model(name, {**SIZES, "norm": norm})
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert bool(norms(model)) == (norm == "batch")
    assert bool(affines(model)) == (norm == "none")


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_convolutions_of_our_own_have_no_bias(norm: str) -> None:
    model = build_model("cnn", {**SIZES, "norm": norm})
    assert len(norms(model) + affines(model)) == 4
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.long)])
def test_every_model_of_torchvision_can_be_built_and_loaded(every: int) -> None:
    names = [name for name in model_names() if name not in ARCHITECTURES]
    assert len(names) >= 80
    for name in names[::every]:
        model = build_without_memory(name, {"in_channels": 1, "num_classes": 7})
        state = model.state_dict()
        assert {value.device.type for value in state.values()} == {"meta"}, name
        assert 7 in [len(value) for value in state.values() if value.dim()], name
        convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        assert convolution.in_channels == 1, name
        model.load_state_dict(state, assign=True)
        assert list(model.state_dict()) == list(state), name


def test_first_convolution_keeps_its_other_settings() -> None:
    with torch.device("meta"):
        three, one = (
            build_model("torchvision.vgg11", {"in_channels": n, "num_classes": 2}).get_submodule(
                "features.0"
            )
            for n in (3, 1)
        )
    assert repr(three).replace("Conv2d(3,", "Conv2d(1,") == repr(one)


def test_eps_and_momentum_are_those_of_every_normalization_where_given() -> None:
    arguments = {**SIZES, "eps": 0.25, "momentum": 0.5}
    for name in ("cnn", "torchvision.mnasnet0_5"):
        with torch.device("meta"):
            layers = norms(build_model(name, arguments))
            default = norms(build_model(name, SIZES))
        assert {(layer.eps, layer.momentum) for layer in layers} == {(0.25, 0.5)}
        assert {layer.eps for layer in default} == {1e-5}
    with torch.device("meta"):  # nothing to set, and nothing to leave out
        build_model("torchvision.squeezenet1_0", arguments)
        model = build_model("torchvision.squeezenet1_0", {**arguments, "norm": "none"})
    assert not norms(model)
    assert not affines(model)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (0, 3, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_without_normalization_keeps_scale_and_shift(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = ChannelAffine(norm)
    assert layer.weight is norm.weight
    assert layer.bias is norm.bias
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert repr(layer) == "ChannelAffine(3)"
    x = torch.randn(shape).to(dtype)
    expected = norm.weight * x.movedim(1, -1) + norm.bias
    torch.testing.assert_close(layer(x), expected.movedim(-1, 1).to(dtype))


def test_layer_without_parameters_is_the_identity() -> None:
    layer = ChannelAffine(nn.BatchNorm1d(3, affine=False).eval())
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), x)
    assert not list(layer.parameters())
    assert not layer.training


COMMON = "it takes in_channels, num_classes"
DOWNLOAD = "here: pretrained weights are never downloaded"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "vgg",
            SIZES,
            "unknown architecture 'vgg'; choose one of cnn, mlp, unet, torchvision.NAME, "
            "timm.NAME, unet.timm.NAME or package.module:factory$",
        ),
        ("cnm", SIZES, "package.module:factory; did you mean 'cnn'?"),
        ("torchvision.resnt18", SIZES, "did you mean 'torchvision.resnet18' or "),
        ("torchvision.fcn_resnet", SIZES, "did you mean 'torchvision.fcn_resnet50' or "),
        ("torchvision.fasterrcnn_resnet50_fpn", SIZES, "unknown architecture"),
        ("torchvision.fcn_resnet50", {**SIZES, "widht": 2}, "it takes num_classes, aux_loss, in_"),
        (
            "torchvision.fcn_resnet50",
            {**SIZES, "weights_backbone": "DEFAULT"},
            f"_backbone' {DOWNLOAD}",
        ),
        (
            "torchvision.lraspp_mobilenet_v3_large",
            {**SIZES, "aux_loss": True},
            "no argument 'aux_loss'",
        ),
        ("torchvision.list_models", SIZES, "unknown architecture 'torchvision.list_models'"),
        ("cnn", {**SIZES, "depth": 3}, f"no argument 'depth'; {COMMON}, width, norm"),
        ("cnn", {"in_channels": 1}, "needs num_classes"),
        ("cnn", {**SIZES, "width": "wide"}, "'width' .* must be of type int, got 'wide'"),
        ("cnn", {**SIZES, "width": 2.5}, "'width' .* must be of type int, got 2.5"),
        ("cnn", {**SIZES, "width": True}, "'width' .* must be of type int, got True"),
        ("cnn", {**SIZES, "width": [3]}, r"'width' .* must be of type int, got \[3\]"),
        ("cnn", {**SIZES, "width": 0}, "'width' .* must be positive, got 0"),
        ("cnn", {**SIZES, "eps": -1.0}, "'eps' .* must be 0 or more, and finite, got -1.0"),
        (
            "cnn",
            {**SIZES, "norm": "layer"},
            "'norm' .* must be one of batch, whitening, none, got 'layer'",
        ),
        ("torchvision.resnet18", {"in_channels": 1}, "needs num_classes"),
        ("torchvision.resnet18", SIZES | {"num_classes": 0}, "'num_classes' .* must be positive"),
        ("torchvision.resnet18", {**SIZES, "momentum": "x"}, "'momentum' .* must be of type float"),
        (
            "torchvision.resnet18",
            {**SIZES, "depth": 3},
            "'torchvision.resnet18' takes no argument 'depth'; it takes layers, num_classes, "
            "zero_init_residual, groups, width_per_group, replace_stride_with_dilation, "
            "in_channels, norm, eps, momentum",
        ),
        ("torchvision.mobilenet_v3_small", {**SIZES, "widht_mult": 2.0}, "dropout, width_mult"),
        ("torchvision.resnet18", {**SIZES, "norm_layer": "x"}, "takes no argument 'norm_layer'"),
        ("torchvision.resnet18", {**SIZES, "layers": [1]}, "cannot be built: TypeError: .*layers"),
        (
            "torchvision.resnet18",
            {**SIZES, "replace_stride_with_dilation": [False, False, True]},
            "cannot be built: NotImplementedError: Dilation",
        ),
        (
            "torchvision.resnet18",
            {**SIZES, "zero_init_residual": None},
            "must be a boolean, a number, a string or a list of these, got None",
        ),
        ("torchvision.resnet18", {**SIZES, "groups": [[1]]}, r"list of these, got \[\[1\]\]"),
        ("torchvision.resnet18", {**SIZES, "weights": "DEFAULT"}, f"'weights' {DOWNLOAD}"),
        ("torchvision.resnet18", {**SIZES, "pretrained": True}, f"'pretrained' {DOWNLOAD}"),
        ("torchvision.resnet18", {**SIZES, "progress": True}, f"'progress' {DOWNLOAD}"),
        (
            "torchvision.googlenet",
            {**SIZES, "aux_logits": True},
            "'aux_logits' .* must be False: the output would be more than one tensor of logits",
        ),
    ],
)
def test_unfit_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        build_model(name, arguments)


def test_model_of_immense_size_costs_nothing_or_is_refused() -> None:
    model = build_without_memory("cnn", {**SIZES, "num_classes": 2**31 - 1})
    assert sum(parameter.nbytes for parameter in model.parameters()) > 2**38
    with pytest.raises(ModelError, match="architecture 'cnn' cannot be built: RuntimeError: "):
        build_without_memory("cnn", {**SIZES, "width": 2**31 - 1})


def test_arguments_reach_torchvision() -> None:
    dilated = {"replace_stride_with_dilation": [False, False, True]}
    with torch.device("meta"):
        model = build_model("torchvision.resnet50", {**SIZES, **dilated})
        narrow = build_model("torchvision.mobilenet_v3_small", {**SIZES, "width_mult": 0.5})
        build_model("torchvision.inception_v3", {**SIZES, "aux_logits": False})
    assert any(isinstance(m, nn.Conv2d) and m.dilation == (2, 2) for m in model.modules())
    assert narrow.get_submodule("features.0.0").out_channels == 8


USERS = """
import torch
from torch import nn

CONSTANT = torch.ones(1)
NUMBER = 3

class Loud(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()

class Net(nn.Sequential):
    @classmethod
    def make(cls, in_channels, num_classes, layers=()):
        shared = nn.BatchNorm2d(in_channels)
        return cls(shared, shared, nn.Flatten(), nn.Linear(in_channels, num_classes))

def net(in_channels, num_classes, loud=False):
    norm = Loud if loud else nn.BatchNorm2d
    return norm(in_channels)

def lazy(in_channels, num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def text(in_channels, num_classes):
    return "model"

def fails(in_channels, num_classes):
    raise KeyError("no")
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user's own, under a name that no other test has imported."""
    name = f"users_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USERS)
    (tmp_path / f"{name}_broken.py").write_text("raise ValueError('not today')")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_import_path_is_refused_unless_allowed(users: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(f"{users}:Net.make", SIZES)
    assert str(caught.value) == (
        f"architecture '{users}:Net.make' is an import path, which is refused because building it "
        "would run that code; if you trust it and whoever named it, allow imports "
        "(--allow-imports)"
    )


def test_import_path_is_built_where_allowed(users: str) -> None:
    arguments = {**SIZES, "layers": [1, 2], "eps": 0.5}
    with torch.device("meta"):
        model = build_model(f"{users}:Net.make", arguments, allow_imports=True)
    assert {layer.eps for layer in norms(model)} == {0.5}
    module = __import__(users)
    assert isinstance(model, module.Net)
    assert module.CONSTANT.device.type == "cpu"  # although the model has no memory


def test_normalization_is_left_out_wherever_it_sits(users: str) -> None:
    arguments = {**SIZES, "norm": "none"}
    model = build_model(f"{users}:Net.make", arguments, allow_imports=True)
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], ChannelAffine)
    assert model[0] is model[1]
    assert repr(build_model(f"{users}:net", arguments, allow_imports=True)) == "ChannelAffine(1)"


@pytest.mark.parametrize(
    ("path", "arguments", "message", "cause"),
    [
        ("{}:none", {}, "cannot be imported: AttributeError: ", AttributeError),
        ("{}_none:net", {}, "cannot be imported: ModuleNotFoundError: No mod", ModuleNotFoundError),
        ("{}_broken:net", {}, "cannot be imported: ValueError: not today", ValueError),
        (":net", {}, "cannot be imported: ValueError: Empty module name", ValueError),
        ("{}:", {}, "cannot be imported: AttributeError: ", AttributeError),
        ("{}:NUMBER", {}, "cannot be built: TypeError: 'int' object is not callable", TypeError),
        ("{}:net", {"depth": 3}, "cannot be built: TypeError: .*argument 'depth'", TypeError),
        ("{}:fails", {}, "cannot be built: KeyError: 'no'", KeyError),
        ("{}:text", {}, "made a str, not a module", None),
        ("{}:lazy", {}, "leaves the shape of 1.weight, 1.bias open; give its layers", None),
        ("{}:net", {"loud": {}}, "'loud' .* must be a boolean, a number", None),
        (
            "{}:net",
            {"loud": True, "norm": "none"},
            "cannot have norm 'none': '', a Loud, has a forward of its own",
            None,
        ),
    ],
)
def test_unfit_import_path_is_refused(
    users: str,
    path: str,
    arguments: dict[str, Any],
    message: str,
    cause: type[Exception] | None,
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build_model(path.format(users), {**SIZES, **arguments}, allow_imports=True)
    assert type(caught.value.__cause__) is (cause or type(None))
