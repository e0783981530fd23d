"""What remains of a model when it is fused, and what its users may do with it afterwards."""

import copy
import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import syncbn
from tests.support.step import assert_same_step, fused_calls, results_of_step
from tests.support.world import run_world

C = 4


class _Shortcut(nn.Module):
    """A residual block with a shortcut of its own, and more than its forward needs."""

    scale = 1.0

    def __init__(self, shortcut: bool = False) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.spare = nn.Parameter(torch.ones(3))
        self.register_buffer("first", torch.zeros(2), persistent=False)
        self.register_buffer("second", torch.zeros(2))
        self.conv1, self.bn1 = nn.Conv2d(C, C, 1), syncbn.SyncBatchNorm(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 1), syncbn.SyncBatchNorm(C)
        self.relu = nn.ReLU()
        self.shortcut = None
        if shortcut:
            self.shortcut = nn.Sequential(nn.Conv2d(C, C, 1), syncbn.SyncBatchNorm(C))

    def features(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        return self.relu(y + identity) * self.scale


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(2, C, 1), syncbn.SyncBatchNorm(C), nn.ReLU())
    net = nn.Sequential(stem, _Shortcut(), nn.Sequential(_Shortcut(True)), nn.Conv2d(C, 2, 1))
    for number, parameter in enumerate(net.parameters()):
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
        parameter.requires_grad_(number % 7 != 0)
    return net.double()


FUSED = {
    "0.1": "relu",
    "1.bn1": "relu",
    "1.bn2": "add, relu",
    "2.0.bn1": "relu",
    "2.0.shortcut.1": "add, relu",
}
X = torch.randn(3, 2, 4, 4, dtype=torch.float64)


def test_everything_of_the_model_stays_in_its_place() -> None:
    model = _net()
    fusion = syncbn.fuse(model)
    fused = fusion.model
    assert fusion.fused == FUSED
    assert fused_calls(fused, X) == 5
    for of in ("named_modules", "named_parameters", "named_buffers"):
        ours, theirs = list(getattr(fused, of)()), list(getattr(model, of)())
        assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, ours), (_, theirs) in zip(
        fused.named_parameters(), model.named_parameters(), strict=True
    ):
        assert ours.requires_grad == theirs.requires_grad, name
        assert ours is not theirs
    for ours, theirs in zip(fused.modules(), model.modules(), strict=True):
        assert isinstance(ours, type(theirs))
        assert type(ours).__qualname__ == type(theirs).__qualname__
    assert repr(fused) == repr(model)
    states = fused.state_dict(), model.state_dict()
    assert list(states[0]) == list(states[1])
    assert states[0]._metadata == states[1]._metadata  # pyright: ignore[reportAttributeAccessIssue] -- what load_state_dict reads
    assert fused.load_state_dict(states[1]).missing_keys == []
    assert_same_step(fused, model, X)


def test_state_of_an_optimizer_fits_both() -> None:
    model = _net()
    fused = syncbn.fuse(model).model
    optimizers = [torch.optim.SGD(each.parameters(), 1e-3, momentum=0.9) for each in (model, fused)]
    for each, optimizer in zip((model, fused), optimizers, strict=True):
        each(X).square().sum().backward()
        optimizer.step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for each, optimizer in zip((model, fused), optimizers, strict=True):
        optimizer.zero_grad()
        each(X).square().sum().backward()
        optimizer.step()
    assert_same_step(fused, model, X)


def test_methods_compute_what_they_did() -> None:
    model = _Shortcut().double()
    fused = syncbn.fuse(model).model
    x = torch.randn(3, C, 2, 2, dtype=torch.float64)
    assert isinstance(fused, _Shortcut)
    torch.testing.assert_close(fused.features(x), model.features(x))
    torch.testing.assert_close(fused.bn2(x), model.bn2(x))


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 2, 1), syncbn.SyncBatchNorm(2), nn.ReLU()),
        *(nn.Conv2d(2, 2, 1), syncbn.SyncBatchNorm(2), nn.ReLU()),
    ).double()
    model[3].weight, model[4].running_mean = model[0].weight, model[1].running_mean
    fused = syncbn.fuse(model).model
    assert isinstance(fused, nn.Sequential)
    assert fused[3].weight is fused[0].weight
    assert fused[4].running_mean is fused[1].running_mean
    assert fused_calls(fused, X) == 2
    assert_same_step(fused, model, X)
    assert_same_step(fused, model, X)


def test_parametrized_layers_are_called_as_before() -> None:
    model = _net()
    parametrizations.weight_norm(model.get_submodule("1.conv1"))
    fused = syncbn.fuse(model).model
    assert fused_calls(fused, X) == 5
    assert_same_step(fused, model, X)


KINDS: dict[str, Callable[[nn.Module, Callable[[], None]], object]] = {
    "forward": lambda module, note: module.register_forward_hook(lambda *_: note()),
    "forward pre": lambda module, note: module.register_forward_pre_hook(lambda *_: note()),
    "full backward": lambda module, note: module.register_full_backward_hook(lambda *_: note()),
    "backward pre": lambda module, note: module.register_full_backward_pre_hook(lambda *_: note()),
    "state dict": lambda module, note: module.register_state_dict_post_hook(lambda *_: note()),
    "state dict pre": lambda module, note: module.register_state_dict_pre_hook(lambda *_: note()),
    "load state dict pre": lambda module, note: module.register_load_state_dict_pre_hook(
        lambda *_: note()
    ),
    "load state dict": lambda module, note: module.register_load_state_dict_post_hook(
        lambda *_: note()
    ),
}


def _register(model: nn.Module, name: str) -> Counter[str]:
    """Register a hook of each kind on a submodule, and return how often each will be called."""
    counts: Counter[str] = Counter()
    for kind, register in KINDS.items():
        register(model.get_submodule(name), partial(counts.update, [kind]))
    return counts


HOOKED = ["", "1", "2.0.shortcut", "1.bn1", "1.relu"]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_are_called_as_often_as_before(name: str) -> None:
    model = _net()
    counts = _register(model, name)
    fused = syncbn.fuse(model).model  # its hooks count in the same place
    called: list[Counter[str]] = []
    for each in (fused, model):
        results_of_step(each, X)
        each.load_state_dict(each.state_dict())
        called.append(counts.copy())
        counts.clear()
    assert called[0] == called[1]
    assert set(called[0]) == set(KINDS)
    assert_same_step(fused, model, X)


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_are_registered_afterwards_are_called_as_often(name: str) -> None:
    model = _net()
    fused = syncbn.fuse(model).model
    counts = _register(model, name), _register(fused, name)
    assert_same_step(fused, model, X)
    for each in (fused, model):
        each.load_state_dict(each.state_dict())
    assert counts[0] == counts[1]
    assert set(counts[0]) == set(KINDS)


def test_hooks_of_a_container_leave_what_is_in_it_fused() -> None:
    model = _net()
    model.get_submodule("1").register_full_backward_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: None)
    fusion = syncbn.fuse(model)
    assert fusion.fused == FUSED
    assert fused_calls(fusion.model, X) == 5


def test_hooks_of_all_modules_see_every_module() -> None:
    seen: list[str] = []
    model = _net()
    fused = syncbn.fuse(model).model
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        model(X)
        expected = seen.copy()
        seen.clear()
        fused(X)
    finally:
        handle.remove()
    assert seen == expected


def _exchange_relu(model: nn.Module) -> None:
    model.get_submodule("1").relu = nn.Tanh()


def _exchange_forward(model: nn.Module) -> None:
    model.get_submodule("1.bn1").forward = lambda x: x  # pyright: ignore[reportAttributeAccessIssue] -- as some libraries do


def _freeze(model: nn.Module) -> None:
    model.get_submodule("1.bn2").eval()


def _rescale(model: nn.Module) -> None:
    model.get_submodule("1").scale = 3.0  # pyright: ignore[reportArgumentType] -- an attribute that a module may be given


def _shortcut(model: nn.Module) -> None:
    model.get_submodule("1").shortcut = nn.Identity()


def _append(model: nn.Module) -> None:
    stem = model.get_submodule("0")
    assert isinstance(stem, nn.Sequential)
    stem.append(nn.Tanh())


def _revert(model: nn.Module) -> None:
    syncbn.revert_sync_batchnorm(model)


def _take_relu(model: nn.Module) -> None:
    model.get_submodule("1.bn2").fuses_relu = True  # pyright: ignore[reportArgumentType] -- an attribute of the layer


CHANGES: dict[str, tuple[Callable[[nn.Module], None], int]] = {
    "another activation": (_exchange_relu, 3),
    "another forward": (_exchange_forward, 3),
    "a frozen layer": (_freeze, 3),
    "another attribute": (_rescale, 3),
    "a new submodule": (_shortcut, 3),
    "one more member": (_append, 4),
    "reverted": (_revert, 0),
    "a ReLU of its own": (_take_relu, 4),
}


@pytest.mark.parametrize(("change", "left"), CHANGES.values(), ids=CHANGES)
def test_what_is_changed_afterwards_counts(change: Callable[[nn.Module], None], left: int) -> None:
    model = _net()
    fused = syncbn.fuse(model).model
    for each in (model, fused):
        change(each)
    assert fused_calls(fused, X) == left
    assert_same_step(fused, model, X)
    assert_same_step(fused.eval(), model.eval(), X)


def test_class_whose_forward_is_exchanged_afterwards_runs_the_new_one() -> None:
    model = _net()
    fused = syncbn.fuse(model).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Shortcut, "forward", lambda self, x: x * 2)
        assert_same_step(fused, model, X)


def test_saved_model_is_loaded_as_it_was_before() -> None:
    model = _net()
    fused = syncbn.fuse(model).model
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(each) for each in loaded.modules()] == [type(each) for each in model.modules()]
    assert fused_calls(loaded, X) == 0
    assert_same_step(loaded, model, X)
    assert syncbn.fuse(loaded).fused == FUSED


class _OwnCopy(_Shortcut):
    def __deepcopy__(self, memo: dict[int, Any]) -> "_OwnCopy":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def test_copies_are_fused_and_independent() -> None:
    for model in (_Shortcut().double(), _OwnCopy().double()):
        fused = syncbn.fuse(model).model
        twin = copy.deepcopy(fused)
        assert type(twin) is type(fused)
        x = torch.randn(3, C, 2, 2, dtype=torch.float64)
        assert_same_step(twin, copy.deepcopy(model), x)
        twin.get_submodule("relu").register_forward_hook(lambda *_: None)
        assert_same_step(fused, model, x)


def _step_of_ddp() -> list[Any]:
    model = _net()
    results: list[Any] = []
    for each in (syncbn.fuse(model).model, model):
        for parameter in each.parameters():
            parameter.requires_grad_()
        wrapped = DistributedDataParallel(each, find_unused_parameters=True)
        results.append(results_of_step(wrapped, X))
    return results


def test_fused_model_trains_under_ddp() -> None:
    for ours, truth in run_world(2, _step_of_ddp):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_fused_model_compiles_without_a_graph_break() -> None:
    model = _net()
    fused = syncbn.fuse(model).model
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(dict(fused.state_dict()), dict(model.state_dict()))
    assert all(not each.fuses_relu for each in fused.modules() if hasattr(each, "fuses_relu"))
    fused.eval()
    torch.testing.assert_close(compiled(X), model.eval()(X))
