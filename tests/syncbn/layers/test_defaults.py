"""Whatever torch's default dtype and device are, the library computes the same."""

import ast
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.baselines import Renormalizer, StatisticsPenalty, Unit
from tests.support.world import run_world

CHANNELS = 4
Results = dict[str, Tensor]
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _default_device(device: str) -> Generator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def _both() -> Generator[None]:
    with _default_dtype(torch.float64), torch.device("meta"):
        yield


# torch.device is a context too, which torch's annotations leave out.
DEFAULTS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "float16": lambda: _default_dtype(torch.float16),
    "float64": lambda: _default_dtype(torch.float64),
    "meta context": lambda: torch.device("meta"),
    "meta device": lambda: _default_device("meta"),
    "float64 and meta": _both,
}


def _random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(10 * seed + dist.get_rank())
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def _spread(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.linspace(-0.3, 0.4, CHANNELS, **FLOAT32))


def _trained(layer: nn.Module, dtype: torch.dtype, residual: bool) -> Results:
    """Return what two steps, two derivatives and an evaluation of a layer give."""
    _spread(layer)
    found: Results = {}
    for step in range(2):
        x = _random(step, 5, CHANNELS, 6, dtype=dtype).requires_grad_()
        other = _random(step + 5, 5, CHANNELS, 6, dtype=dtype).requires_grad_()
        y = layer(x, other) if residual else layer(x)
        y.pow(3).sum().backward()
        found |= {f"y{step}": y, f"dx{step}": _gradient(x)}
        if residual:
            found[f"dresidual{step}"] = _gradient(other)
    x = _random(3, 5, CHANNELS, dtype=dtype).requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    slope.square().sum().backward()
    found["second derivative"] = _gradient(x)
    found |= {
        f"gradient of {name}": _gradient(parameter) for name, parameter in layer.named_parameters()
    }
    found |= layer.state_dict()
    found["evaluation"] = layer.eval()(_random(4, 3, CHANNELS, dtype=dtype))
    return found


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _of_layers() -> Results:
    found: Results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for relu, residual in ((False, False), (True, False), (True, True)):
            norm = syncbn.SyncBatchNorm(CHANNELS, relu=relu, **FLOAT32)
            for name, value in _trained(norm, dtype, residual).items():
                found[f"{dtype}, relu={relu}, residual={residual}, {name}"] = value
    plain = syncbn.SyncBatchNorm(CHANNELS, momentum=None, affine=False, **FLOAT32)
    wide = syncbn.SyncBatchNorm(CHANNELS, dtype=torch.float64, device="cpu")
    half = syncbn.SyncBatchNorm(CHANNELS, dtype=torch.bfloat16, device="cpu")
    for kind, norm in {"no parameters": plain, "float64": wide, "bfloat16": half}.items():
        for name, value in _trained(norm, torch.float32, False).items():
            found[f"{kind}, {name}"] = value
    return found


def _of_whitening() -> Results:
    found: Results = {}
    methods: tuple[Literal["zca", "newton"], ...] = ("zca", "newton")
    for method in methods:
        layer = syncbn.SyncWhitening(CHANNELS, group_size=2, method=method, **FLOAT32)
        for name, value in _trained(layer, torch.float32, False).items():
            found[f"whitening by {method}, {name}"] = value
        empty = layer.train()(_random(0, 0, CHANNELS))
        found |= {f"empty, {method}": empty}
    return found


def _of_the_rest() -> Results:
    """Return what functions, baselines and recalibration give."""
    x = _random(0, 5, CHANNELS, 6).requires_grad_()
    weight = torch.linspace(-0.3, 0.4, CHANNELS, **FLOAT32).requires_grad_()
    y, moments = syncbn.sync_batch_norm(x, weight, relu=True)
    y.sum().backward()
    found = {"y": y, "dx": _gradient(x), "dweight": _gradient(weight)}
    found |= {"count": moments.count, "mean": moments.mean, "m2": moments.m2}

    unit = nn.Linear(CHANNELS, CHANNELS, **FLOAT32)
    _fill(unit)
    penalty = StatisticsPenalty({"unit": unit}, 0.3)
    found["no penalty"] = penalty.value()
    with penalty.watch():
        unit(_random(1, 5, CHANNELS))
    found["penalty"] = penalty.value()
    found["penalty"].backward()
    found["gradient of the penalty"] = _gradient(unit.weight)
    penalty.remove()

    renormalizer = Renormalizer({"unit": Unit(unit.weight, unit.bias, unit)}, 1e-3)
    done = renormalizer.step(lambda: unit(_random(2, 5, CHANNELS)))
    found |= {"renormalized weight": unit.weight, "renormalized bias": unit.bias}
    shifts = [done.mean_shift, done.log_scale]
    found["renormalization"] = torch.tensor(shifts, dtype=torch.float64, device="cpu")

    norm = syncbn.SyncBatchNorm(CHANNELS, **FLOAT32)
    model = nn.Sequential(unit, norm)
    assert syncbn.recalibrate(model, [_random(3, 5, CHANNELS), _random(4, 3, CHANNELS)]) == ("1",)
    found |= {f"recalibrated {name}": value for name, value in model.state_dict().items()}
    return found


def _fill(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            size = parameter.numel()
            values = torch.linspace(-1, 1, size, **FLOAT32).sin()
            parameter.copy_(values.reshape(parameter.shape))


def _results() -> Results:
    found: Results = {}
    for kernels in ("native", "reference"):
        os.environ["SYNCBN_KERNELS"] = kernels
        found |= {f"{kernels}, {name}": value.detach() for name, value in _of_layers().items()}
    return found | {
        name: value.detach() for name, value in {**_of_whitening(), **_of_the_rest()}.items()
    }


def _same_as_usual(name: str) -> None:
    with DEFAULTS[name]():
        # First, so that whatever is set up once is set up here.
        ours = _results()
    usual = _results()
    assert ours.keys() == usual.keys()
    for what, value in usual.items():
        mine = ours[what]
        assert (mine.dtype, mine.device) == (value.dtype, value.device), what
        assert torch.equal(mine, value), f"{what}: {mine}, usually {value}"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", DEFAULTS)
def test_results_do_not_depend_on_the_defaults(name: str, world_size: int) -> None:
    # In a process of its own in a world of one too, for what writes past its memory ends it.
    run_world(world_size, _same_as_usual, name)


LAYERS: tuple[Callable[..., Any], ...] = (
    partial(syncbn.SyncBatchNorm, CHANNELS),
    partial(syncbn.SyncWhitening, CHANNELS, 2),
)


def _of_the_default_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for kind in LAYERS:
            with _default_dtype(dtype):
                layer = kind()
                assert {p.dtype for p in layer.parameters()} == {dtype}
                ours = _trained(layer, torch.float32, False)
            usual = _trained(kind(dtype=dtype), torch.float32, False)
            for name, value in usual.items():
                assert ours[name].dtype == value.dtype, name
                assert torch.equal(ours[name], value), name


def test_layer_made_without_a_dtype_has_the_default_one_and_computes_as_with_it() -> None:
    run_world(1, _of_the_default_dtype)


def _made_on_meta() -> None:
    for kind in LAYERS:
        with torch.device("meta"):
            layer = kind()
            assert all(tensor.is_meta for tensor in layer.state_dict().values())
            layer.to_empty(device="cpu")
            layer.reset_parameters()
            ours = _trained(layer, torch.float32, False)
        usual = _trained(kind(), torch.float32, False)
        for name, value in usual.items():
            assert torch.equal(ours[name], value), name


def test_layer_made_on_meta_computes_on_the_device_that_it_is_moved_to() -> None:
    run_world(2, _made_on_meta)


# What fills the new tensor of a call without `dtype` and `device` with the defaults.
ALLOCATIONS = {
    *("arange", "as_tensor", "empty", "empty_permuted", "empty_strided", "eye", "full"),
    *("linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range"),
    *("scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
CONSTRUCTORS = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor"}


def _incomplete_allocations(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines, and names, of allocations that leave dtype or device to the defaults.

    An argument of the form **options counts as both.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        function = node.func
        if not isinstance(function.value, ast.Name) or function.value.id != "torch":
            continue
        given = {keyword.arg for keyword in node.keywords}
        complete = None in given or {"dtype", "device"} <= given
        if function.attr in CONSTRUCTORS or (function.attr in ALLOCATIONS and not complete):
            yield node.lineno, f"torch.{function.attr}"


def test_every_allocation_of_the_library_names_its_dtype_and_device() -> None:
    root = Path(syncbn.__file__).parent
    found = [
        f"{path.relative_to(root.parent)}:{line}: {name}"
        for path in sorted(root.rglob("*.py"))
        if "train" not in path.relative_to(root).parts
        for line, name in _incomplete_allocations(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.empty(3)", ["torch.empty"]),
        ("torch.zeros(3, dtype=torch.float32)", ["torch.zeros"]),
        ("torch.triu_indices(3, 3, device=x.device)", ["torch.triu_indices"]),
        ("torch.Tensor([1.0])", ["torch.Tensor"]),
        ("torch.ones(3, dtype=x.dtype, device=x.device)", []),
        ("torch.full((), 1.0, **like)", []),
        ("torch.empty_like(x), x.new_zeros(3)", []),
    ],
)
def test_allocations_that_leave_something_to_the_defaults_are_found(
    source: str, found: list[str]
) -> None:
    assert [name for _, name in _incomplete_allocations(source)] == found
