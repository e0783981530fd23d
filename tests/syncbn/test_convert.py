import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.errors import ConversionError


def _model() -> nn.Sequential:
    shared = nn.BatchNorm2d(4, momentum=None)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), shared, nn.Sequential(nn.BatchNorm2d(4, bias=False), shared), nn.ReLU()
    )


def test_layers_keep_their_parameters_buffers_and_settings() -> None:
    model = _model().eval()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = syncbn.convert_sync_batchnorm(model)
    after = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert converted is model
    assert {name: id(tensor) for name, tensor in after.items()} == {
        name: id(tensor) for name, tensor in before.items()
    }
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
def test_a_layer_alone_is_replaced(layer: nn.Module) -> None:
    calls: list[str] = []
    layer.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    converted = syncbn.convert_sync_batchnorm(layer)
    converted(torch.randn(4, 3, 2))
    assert isinstance(converted, syncbn.SyncBatchNorm)
    assert converted.process_group is None
    assert calls == ["SyncBatchNorm"]


def test_converting_twice_changes_nothing() -> None:
    model = syncbn.convert_sync_batchnorm(_model())
    layers = list(model.modules())
    assert list(syncbn.convert_sync_batchnorm(model).modules()) == layers


def test_converted_model_computes_the_same_in_one_process() -> None:
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []
    for convert in (lambda model: model, syncbn.convert_sync_batchnorm):
        torch.manual_seed(0)
        outputs.append(convert(_model())(x))
    torch.testing.assert_close(outputs[1], outputs[0])


class _ClippedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)


@pytest.mark.parametrize("layer", [_ClippedNorm(4), nn.LazyBatchNorm2d()])
def test_layer_with_behaviour_of_its_own_is_refused_by_name(layer: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(layer))
    with pytest.raises(ConversionError, match=rf"'1.0': {type(layer).__name__} is not one of"):
        syncbn.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
