import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize

import syncbn
from syncbn.errors import ConversionError, ConversionWarning
from syncbn.layers.converted import SyncBatchNorm2d
from syncbn.transforms.convert import BatchNorm


def _model() -> nn.Sequential:
    shared, unbiased = nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4)
    unbiased.register_parameter("bias", None)
    return nn.Sequential(nn.Conv2d(1, 4, 3), shared, nn.Sequential(unbiased, shared), nn.ReLU())


def _tensors(model: nn.Module) -> dict[str, int]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: id(tensor) for name, tensor in named}


def test_layers_keep_their_parameters_buffers_and_settings() -> None:
    model = _model().eval()
    before = _tensors(model)
    assert syncbn.convert_sync_batchnorm(model) is model
    assert _tensors(model) == before
    layers = [module for module in model.modules() if isinstance(module, syncbn.SyncBatchNorm)]
    assert len(layers) == 2
    assert layers[0].momentum is None
    assert not layers[0].training


def test_layer_in_two_places_stays_one_layer() -> None:
    model = _model()
    syncbn.convert_sync_batchnorm(model)
    inner = model[2]
    assert isinstance(inner, nn.Sequential)
    assert isinstance(model[1], syncbn.SyncBatchNorm)
    assert model[1] is inner[1]


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)]
)
def test_a_layer_alone_keeps_hooks_and_identity(layer: nn.Module) -> None:
    calls: list[str] = []
    layer.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    converted = syncbn.convert_sync_batchnorm(layer)
    converted(torch.randn(4, 3, 2))
    assert converted is layer
    assert isinstance(converted, syncbn.SyncBatchNorm)
    assert converted.process_group is None
    assert calls == [type(layer).__name__]


def test_converting_twice_changes_nothing() -> None:
    model = syncbn.convert_sync_batchnorm(_model())
    layers = [(layer, type(layer)) for layer in model.modules()]
    syncbn.convert_sync_batchnorm(model)
    assert [(layer, type(layer)) for layer in model.modules()] == layers


def test_only_chosen_layers_are_converted() -> None:
    model = _model()
    syncbn.convert_sync_batchnorm(model, only=lambda name, layer: name != "1")
    assert type(model[1]) is nn.BatchNorm2d
    inner = model[2]
    assert isinstance(inner, nn.Sequential)
    assert isinstance(inner[0], syncbn.SyncBatchNorm)


def test_converted_model_computes_the_same_in_one_process() -> None:
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []
    for convert in (lambda model: model, syncbn.convert_sync_batchnorm):
        torch.manual_seed(0)
        outputs.append(convert(_model())(x))
    torch.testing.assert_close(outputs[1], outputs[0])


class _ClippedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, None, None, training=True).clamp(-1, 1)


def test_layer_with_a_forward_of_its_own_is_refused_by_name() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(_ClippedNorm(4)))
    with pytest.raises(ConversionError, match=r"'1.0': _ClippedNorm has a forward of its own"):
        syncbn.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


class _DoubledNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", _Doubled())
    return layer


def _timm_layer() -> nn.Module:
    return timm.layers.BatchNormAct2d(4, act_layer=nn.Tanh)  # pyright: ignore[reportPrivateImportUsage] -- timm re-exports it without saying so


@pytest.mark.parametrize(
    "make",
    [lambda: _DoubledNorm(4), _parametrized, _timm_layer],
    ids=["super().forward", "parametrized", "timm's BatchNormAct2d"],
)
def test_behavior_of_a_subclass_stays(make: Any) -> None:
    layer: nn.Module = make()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    kind = type(layer)
    syncbn.convert_sync_batchnorm(layer)
    assert isinstance(layer, syncbn.SyncBatchNorm)
    for _ in range(2):
        torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    syncbn.revert_sync_batchnorm(layer)
    assert type(layer) is kind
    torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize("revert_first", [False, True])
def test_lazy_layer_gets_its_shape_from_the_first_batch(revert_first: bool) -> None:
    layer = syncbn.convert_sync_batchnorm(nn.LazyBatchNorm2d())
    if revert_first:
        syncbn.revert_sync_batchnorm(layer)
        assert type(layer) is nn.LazyBatchNorm2d
    layer(torch.randn(3, 4, 2, 2))
    assert type(layer) is (nn.BatchNorm2d if revert_first else SyncBatchNorm2d)
    syncbn.revert_sync_batchnorm(layer)
    assert type(layer) is nn.BatchNorm2d
    layer(torch.randn(3, 4, 2, 2))


class _LazyTwin(nn.LazyBatchNorm2d):
    pass


def test_lazy_subclass_is_still_synchronized_after_the_first_batch() -> None:
    layer = syncbn.convert_sync_batchnorm(_LazyTwin())
    layer(torch.randn(3, 4, 2, 2))
    assert type(layer) is SyncBatchNorm2d
    assert type(syncbn.revert_sync_batchnorm(layer)) is nn.BatchNorm2d


class _Clipped2dTwin(_ClippedNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class _OwnForward(nn.BatchNorm2d):
    forward = staticmethod(lambda input: input)  # pyright: ignore[reportAssignmentType] -- as odd as users can be


def _patched() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = layer.forward  # as tools do that wrap it
    return layer


@pytest.mark.parametrize(
    "make",
    [lambda: _Clipped2dTwin(4), lambda: _OwnForward(4), _patched],
    ids=["behind super()", "not a method", "of the layer"],
)
def test_forward_that_would_not_be_synchronized_is_refused(make: Any) -> None:
    with pytest.raises(ConversionError, match="has a forward of its own"):
        syncbn.convert_sync_batchnorm(nn.Sequential(make()))


def test_conversion_keeps_parametrizations_that_come_and_go() -> None:
    layer = _parametrized()
    syncbn.convert_sync_batchnorm(layer)
    copy.deepcopy(layer)(torch.randn(3, 4, 2, 2))
    parametrize.register_parametrization(layer, "bias", _Doubled())
    syncbn.revert_sync_batchnorm(layer)
    assert not isinstance(layer, syncbn.SyncBatchNorm)
    assert parametrize.is_parametrized(layer, "bias")
    syncbn.convert_sync_batchnorm(layer)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(layer, name)
    assert type(layer) is SyncBatchNorm2d
    parametrize.register_parametrization(layer, "weight", _Doubled())
    copied = copy.deepcopy(syncbn.revert_sync_batchnorm(layer))
    copied(torch.randn(3, 4, 2, 2))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.BatchNorm2d


def test_torchs_frozen_norm_is_left_alone() -> None:
    layer = torchvision.ops.FrozenBatchNorm2d(4)
    assert type(syncbn.convert_sync_batchnorm(layer)) is torchvision.ops.FrozenBatchNorm2d


class HeteroBatchNorm(nn.Module):  # as of torch_geometric
    def __init__(self, tracked: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("running_mean", torch.zeros(2, 3) if tracked else None)


@pytest.mark.parametrize("tracked", [True, False])
def test_layers_that_stay_local_are_named_in_a_warning(tracked: bool) -> None:
    evonorm = timm.layers.EvoNorm2dB0(4)  # pyright: ignore[reportPrivateImportUsage] -- as above
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(evonorm, HeteroBatchNorm(tracked)))
    with pytest.warns(ConversionWarning) as caught:
        syncbn.convert_sync_batchnorm(model)
    assert len(caught) == 1
    assert "'1.0', a EvoNorm2dB0; '1.1', a HeteroBatchNorm. They are not" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert isinstance(model[0], syncbn.SyncBatchNorm)


def test_layers_that_need_no_conversion_cause_no_warning() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True),
        torchvision.ops.FrozenBatchNorm2d(4),
        syncbn.SyncWhitening(4, 2),
        nn.BatchNorm2d(4),
    )
    syncbn.convert_sync_batchnorm(model, only=lambda name, layer: False)


def test_reverting_restores_every_class_and_attribute() -> None:
    model = _model()
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    tensors = _tensors(model)
    syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(model))
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before
    assert _tensors(model) == tensors


def test_layer_built_synchronized_reverts_to_a_plain_one_of_any_dimensions() -> None:
    layer = syncbn.revert_sync_batchnorm(nn.Sequential(syncbn.SyncBatchNorm(4)))
    for shape in ((3, 4), (3, 4, 2), (3, 4, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    assert type(layer[0]) is BatchNorm  # pyright: ignore[reportIndexIssue] -- revert is typed by its argument's base


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(),
        lambda: torchvision.models.mobilenet_v3_small(),
        lambda: timm.create_model("mobilenetv3_small_050"),
        lambda: timm.create_model("resnet10t"),
    ],
    ids=[
        "torchvision resnet18",
        "torchvision mobilenet_v3_small",
        "timm mobilenetv3",
        "timm resnet",
    ],
)
def test_models_of_the_field_train_converted_and_revert(make: Any) -> None:
    states: list[dict[str, Tensor]] = []
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for convert in (False, True):
        torch.manual_seed(0)
        model: nn.Module = make().double()
        kinds = [type(module) for module in model.modules()]
        if convert:
            syncbn.convert_sync_batchnorm(model)
            layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage] -- the common base
            assert layers
            assert all(isinstance(layer, syncbn.SyncBatchNorm) for layer in layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(2)  # dropout
        model(x.double()).square().mean().backward()
        optimizer.step()
        if convert:
            syncbn.revert_sync_batchnorm(model)
            assert [type(module) for module in model.modules()] == kinds
        states.append(model.state_dict())
    torch.testing.assert_close(states[1], states[0], rtol=1e-7, atol=1e-9)
