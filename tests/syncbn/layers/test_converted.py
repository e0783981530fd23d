"""The classes of converted layers: pickled, copied, and given back."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from timm.layers import norm_act
from torch import Tensor, nn

import syncbn
from syncbn.layers.batch_norm import BatchNorm


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Scaled(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Silent(nn.BatchNorm2d):
    pass


class Fused(BatchNorm):
    pass


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4),
    "torch's SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "our BatchNorm": lambda: BatchNorm(4),
    "a subclass with a forward": lambda: Doubled(4),
    "a subclass without": lambda: Silent(4),
    "a subclass of torch's SyncBatchNorm": lambda: Scaled(4),
    "timm's BatchNormAct2d": lambda: norm_act.BatchNormAct2d(4),
    "timm's SyncBatchNormAct": lambda: norm_act.SyncBatchNormAct(4),
    "lazy": nn.LazyBatchNorm2d,
}


@pytest.fixture(params=MAKERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return MAKERS[request.param]()


def _saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [_pickled, _saved, copy.deepcopy, copy.copy])
def test_converted_layer_is_copied_and_reverted(
    layer: nn.Module, copied: Callable[[nn.Module], nn.Module]
) -> None:
    kind = type(layer)
    if kind is nn.LazyBatchNorm2d and copied in (copy.deepcopy, copy.copy):
        pytest.skip("torch's own layer, without a shape, cannot be copied so")
    syncbn.convert_sync_batchnorm(layer)
    made = type(layer)
    twin = copied(layer)
    assert type(twin) is made
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    x = x if isinstance(layer, nn.BatchNorm1d) else x[..., None]
    x = x[..., None] if isinstance(layer, nn.BatchNorm3d) else x
    for each in (layer, twin):
        each.eval()
    torch.testing.assert_close(twin(x), layer(x))
    for each in (layer, twin):
        syncbn.revert_sync_batchnorm(each)
        assert type(each) is (nn.BatchNorm2d if kind is nn.LazyBatchNorm2d else kind)
        each(x)
    assert twin.__dict__.keys() == layer.__dict__.keys()


def test_layers_of_one_class_are_converted_to_one_class(layer: nn.Module) -> None:
    twin = pickle.loads(pickle.dumps(layer))
    syncbn.convert_sync_batchnorm(layer)
    syncbn.convert_sync_batchnorm(twin)
    assert type(layer) is type(twin)
    made = type(layer)
    syncbn.convert_sync_batchnorm(layer)
    assert type(layer) is made
    syncbn.convert_sync_batchnorm(syncbn.revert_sync_batchnorm(layer))
    assert type(layer) is made


def test_converted_layer_is_unpickled_in_a_fresh_process() -> None:
    # The lazy one has a class that is made when it is needed; and neither needs other libraries.
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d(), nn.BatchNorm2d(4)))
    script = (
        "import pickle, sys; model = pickle.load(sys.stdin.buffer); import syncbn;"
        "print([type(m).__name__ for m in model]);"
        "print([type(m).__name__ for m in syncbn.revert_sync_batchnorm(model)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(model), capture_output=True, check=True
    ).stdout.decode()
    assert printed.split("\n")[:2] == [
        "['SyncLazyBatchNorm2d', 'SyncBatchNorm2d']",
        "['LazyBatchNorm2d', 'BatchNorm2d']",
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, Silent])
def test_inputs_of_any_dimensions_are_taken_as_by_torchs_converted_layer(
    kind: type[nn.Module], training: bool
) -> None:
    layer = syncbn.convert_sync_batchnorm(kind(4)).train(training)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(kind(4)).train(training)
    for shape in ((3, 4), (3, 4, 2), (3, 4, 2, 2), (3, 4, 2, 2, 2)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), theirs(x))


class Strict(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.shape[-1] != 8:
            raise ValueError("of width 8, please")


def test_check_of_a_users_class_stays_in_force() -> None:
    layer = syncbn.convert_sync_batchnorm(Strict(4))
    with pytest.raises(ValueError, match="of width 8"):
        layer(torch.randn(2, 4, 2, 2))


def test_residual_is_added_before_the_relu_in_a_subclass_of_our_plain_layer() -> None:
    layer = Fused(4).eval()
    layer.fuses_relu = True
    x, residual = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    expected = layer(x, residual)
    syncbn.convert_sync_batchnorm(layer)
    torch.testing.assert_close(layer(x, residual), expected)
