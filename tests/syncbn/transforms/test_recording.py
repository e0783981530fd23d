"""Models with the layer, recorded by torch.fx and torch.jit.trace."""

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from timm.layers import norm_act
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import syncbn
from syncbn.errors import InputError

QUANTIZATION: Any = importlib.import_module("torch.ao.quantization.quantize_fx")  # is deprecated

pytestmark = [
    # Of torch's tools; they are what users have.
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*quant.*:UserWarning:torch"),
]


def _x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _filled(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[2] in ("running_mean", "running_var", "weight", "bias"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(4, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, x.sin())


def _converted(norm: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU())
    return syncbn.convert_sync_batchnorm(model)


def _add_one(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 1


def _hooked() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.register_forward_hook(_add_one)
    return _converted(layer)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), syncbn.SyncBatchNorm(4)),
    "converted": lambda: _converted(nn.BatchNorm2d(4)),
    "without statistics": lambda: _converted(nn.BatchNorm2d(4, track_running_stats=False)),
    "without parameters": lambda: _converted(nn.BatchNorm2d(4, affine=False)),
    "double in a float model": lambda: nn.Sequential(syncbn.SyncBatchNorm(4, dtype=torch.double)),
    "a subclass": lambda: _converted(Doubled(4)),
    "timm's BatchNormAct2d": lambda: _converted(norm_act.BatchNormAct2d(4, act_layer=nn.ELU)),
    "with hooks": _hooked,
    "with a residual": Residual,
}


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest) -> Any:
    return _filled(MAKERS[request.param]())


@pytest.fixture(params=[True, False], ids=["grad", "no grad"])
def _grad(request: pytest.FixtureRequest) -> Any:
    with torch.set_grad_enabled(request.param):
        yield


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.usefixtures("_grad")
def test_fx_records_evaluation_and_training(model: Any) -> None:
    twin = copy.deepcopy(model)
    model.eval()
    twin.eval()
    recorded = fx.symbolic_trace(model)
    for copied in (recorded, copy.deepcopy(recorded), _pickled(recorded)):
        torch.testing.assert_close(copied(_x(3, 4, 2, 2)), twin(_x(3, 4, 2, 2)))
    recorded.train()
    twin.train()
    torch.testing.assert_close(recorded(_x(3, 4, 2, 2, seed=1)), twin(_x(3, 4, 2, 2, seed=1)))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    recorded.eval()
    twin.eval()
    x = _x(5, 4, 3, 3, seed=2)
    torch.testing.assert_close(recorded(x), twin(x))
    torch.testing.assert_close(fx.Interpreter(recorded).run(x), twin(x))
    torch.testing.assert_close(fx.Transformer(recorded).transform()(x), twin(x))


def test_fx_calls_the_layer_as_it_calls_torchs() -> None:
    graphs: list[list[tuple[str, str]]] = []
    for convert in (syncbn.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm):
        model = convert(torchvision.models.resnet18())
        graph = fx.symbolic_trace(model).graph
        graphs.append([(node.op, str(node.target)) for node in graph.nodes])
    assert graphs[0] == graphs[1]


def test_fx_refuses_a_layer_by_itself() -> None:
    with pytest.raises(InputError, match=r"trace nn.Sequential\(layer\)"):
        fx.symbolic_trace(syncbn.SyncBatchNorm(4))


@pytest.mark.parametrize("training", [True, False])
def test_torchvision_extracts_features(training: bool) -> None:
    features: list[dict[str, Tensor]] = []
    names: list[Any] = []
    for convert in (lambda model: model, syncbn.convert_sync_batchnorm):
        model = convert(_filled(torchvision.models.resnet18(num_classes=2)))
        names.append(get_graph_node_names(model))
        extractor = create_feature_extractor(model, ["bn1", "layer1.0.bn2", "layer2"])
        features.append(extractor.train(training)(_x(2, 3, 32, 32)))
    assert names[1] == names[0]
    torch.testing.assert_close(features[1], features[0])


@pytest.mark.usefixtures("_grad")
@pytest.mark.parametrize("prepare", ["prepare_qat_fx", "prepare_fx"])
def test_quantization_prepares_a_model(prepare: str, model: Any) -> None:
    model.train(prepare == "prepare_qat_fx")
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    mapping.set_global(None)  # observe nothing, so that results are those of the model
    make: Any = getattr(QUANTIZATION, prepare)
    prepared = make(copy.deepcopy(model), mapping, (_x(3, 4, 2, 2),)).eval()
    torch.testing.assert_close(prepared(_x(3, 4, 2, 2)), model.eval()(_x(3, 4, 2, 2)))


def test_quantization_aware_training_keeps_the_layer() -> None:
    model = _filled(_converted(nn.BatchNorm2d(4))).train()
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = QUANTIZATION.prepare_qat_fx(model, mapping, (_x(3, 4, 2, 2),))
    prepared(_x(3, 4, 2, 2)).sum().backward()
    assert isinstance(prepared.get_submodule("1"), syncbn.SyncBatchNorm)
    converted = QUANTIZATION.convert_fx(prepared.eval())
    assert converted(_x(3, 4, 2, 2)).shape == (3, 4, 2, 2)


@pytest.mark.usefixtures("_grad")
def test_jit_traces_evaluation(model: Any) -> None:
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*torch.jit.* is deprecated")
        traced: Any = torch.jit.trace(model, _x(3, 4, 2, 2))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for each in (traced, torch.jit.load(file), torch.jit.freeze(traced)):
        for shape in ((3, 4, 2, 2), (5, 4, 3, 1)):
            torch.testing.assert_close(each(_x(*shape)), model(_x(*shape)))


def test_traced_model_follows_the_running_statistics_and_has_gradients() -> None:
    model = _filled(_converted(nn.BatchNorm2d(4))).eval()
    traced: Any = torch.jit.trace(model, _x(3, 4, 2, 2))
    model[1].running_mean.add_(1)
    torch.testing.assert_close(traced(_x(3, 4, 2, 2)), model(_x(3, 4, 2, 2)))
    gradients: list[Tensor] = []
    for each in (traced, model):
        x = _x(3, 4, 2, 2).requires_grad_()
        gradients += torch.autograd.grad(each(x).square().sum(), x)
    torch.testing.assert_close(*gradients)


def test_jit_tracing_of_training_is_refused() -> None:
    layer = syncbn.SyncBatchNorm(4)
    with pytest.raises(InputError, match=r"cannot record the training .* call model.eval\(\)"):
        torch.jit.trace(layer, _x(3, 4, 2, 2))
    layer(_x(3, 4, 2, 2))
