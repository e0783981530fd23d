"""What other libraries look for in a model, before and after conversion."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from timm.layers import norm_act
from torch import Tensor, nn

import syncbn

_BASE = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage] -- the public classes have no other common base
PLAIN = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def _seen_by_detectron2(layer: nn.Module) -> bool:
    """Whether `get_default_optimizer_params` gives it WEIGHT_DECAY_NORM; precise BN of fvcore."""
    return isinstance(layer, (*PLAIN, nn.SyncBatchNorm))


def _frozen_by_detectron2(layer: nn.Module) -> bool:
    """Whether `FrozenBatchNorm2d.convert_frozen_batchnorm` replaces it."""
    return isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm))


def _seen_by_ultralytics(layer: nn.Module) -> bool:
    """Whether the trainer leaves its weight out of weight decay."""
    norms = tuple(value for name, value in vars(nn).items() if "Norm" in name)
    return isinstance(layer, norms)


def _converted_by_mmengine(layer: nn.Module) -> bool:
    """Whether `convert_sync_batchnorm` replaces it; Lightning's and torch's test the same."""
    return isinstance(layer, _BASE)


TESTS = [_seen_by_detectron2, _frozen_by_detectron2, _seen_by_ultralytics, _converted_by_mmengine]


@pytest.mark.parametrize("kind", [*PLAIN, nn.SyncBatchNorm])
@pytest.mark.parametrize("test", TESTS)
def test_tools_see_a_converted_layer_where_they_see_the_layer(
    kind: type[nn.Module], test: Callable[[nn.Module], bool]
) -> None:
    layer = kind(4)
    seen = test(layer)
    syncbn.convert_sync_batchnorm(layer)
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert test(layer) == seen
    if kind is not nn.SyncBatchNorm:
        assert isinstance(layer, kind)


def _filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[2] in ("running_mean", "running_var", "weight", "bias"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def _timm_blocks() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), norm_act.BatchNormAct2d(4, act_layer=nn.Tanh)
    )


@pytest.mark.parametrize("by_timm_first", [False, True])
def test_timm_freezes_a_converted_model_as_it_was(by_timm_first: bool) -> None:
    frozen: list[nn.Module] = []
    for convert in (False, True):
        model = _filled(_timm_blocks())
        if convert:
            if by_timm_first:
                model = norm_act.convert_sync_batchnorm(model)
            syncbn.convert_sync_batchnorm(model)
        frozen.append(norm_act.freeze_batch_norm_2d(model))
    assert [*map(type, frozen[1].modules())] == [*map(type, frozen[0].modules())]
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(frozen[1](x), frozen[0](x))


def test_model_that_timm_has_converted_gets_our_forward_and_keeps_activations() -> None:
    whole, model = (_filled(_timm_blocks()) for _ in range(2))
    model = norm_act.convert_sync_batchnorm(model)
    assert type(model.get_submodule("2")) is norm_act.SyncBatchNormAct
    syncbn.convert_sync_batchnorm(model)
    layer = model.get_submodule("2")
    assert isinstance(layer, syncbn.SyncBatchNorm)
    # Else DistributedDataParallel would refuse it on the CPU.
    assert not isinstance(layer, nn.SyncBatchNorm)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(nn.SyncBatchNorm, "forward", side_effect=AssertionError):
        torch.testing.assert_close(model(x), whole(x))
    syncbn.revert_sync_batchnorm(model)
    assert type(layer) is norm_act.SyncBatchNormAct


class _BatchNormXd(_BASE):  # as of mmengine and Lightning
    def _check_input_dim(self, input: Tensor) -> None:
        return


def _revert_as_mmengine(module: nn.Module) -> nn.Module:
    reverted = module
    if isinstance(module, nn.SyncBatchNorm):
        reverted = _BatchNormXd(module.num_features)
        reverted.load_state_dict(module.state_dict())
        reverted.train(module.training)
    for name, child in module.named_children():
        reverted.add_module(name, _revert_as_mmengine(child))
    return reverted


@pytest.mark.parametrize("training", [True, False])
def test_model_computes_the_same_whether_mmengine_reverts_torchs_layer_or_leaves_ours(
    training: bool,
) -> None:
    def make() -> nn.Module:
        return _filled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train(training)

    theirs = _revert_as_mmengine(nn.SyncBatchNorm.convert_sync_batchnorm(make()))
    ours = _revert_as_mmengine(syncbn.convert_sync_batchnorm(make()))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_torch_converts_our_layers_and_we_convert_them_back() -> None:
    model = _filled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    syncbn.convert_sync_batchnorm(model)
    state = model.state_dict()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model.get_submodule("1")) is nn.SyncBatchNorm
    syncbn.convert_sync_batchnorm(model)
    assert isinstance(model.get_submodule("1"), syncbn.SyncBatchNorm)
    assert str(model.state_dict()) == str(state)
