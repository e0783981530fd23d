"""The layer within what people build around it; named after the complaints that it answers."""

import copy
import io
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.errors import InputError
from syncbn.layers.base import RanksOfGroup
from tests.support.traffic import recorded_all_reduces
from tests.support.world import run_world


def _network(norm: Callable[[int], nn.Module] = nn.BatchNorm1d, seed: int = 0) -> nn.Sequential:
    """Return a float64 network of two normalized layers, and values that differ by channel."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), norm(4), nn.Tanh(), nn.Linear(4, 2, bias=False), norm(2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.double()


def _share(seed: int = 0, rows: int = 4) -> Tensor:
    """Return this rank's rows of a batch of `rows` for each rank."""
    return _whole(seed, rows).chunk(dist.get_world_size())[dist.get_rank()]


def _whole(seed: int = 0, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows * dist.get_world_size(), 3, dtype=torch.float64, generator=generator)


def _summed_gradients(model: nn.Module) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.parameters()]
    for gradient in gradients:
        assert gradient is not None
        dist.all_reduce(gradient)
    return [gradient for gradient in gradients if gradient is not None]


# Compilation breaks the graph: pytorch#161302, #156680, #107372.


def _compiled_like_eager(dynamic: bool | None, wrapped: bool, backend: str) -> int:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # pyright: ignore[reportPrivateUsage] -- nothing public counts graphs
    eager, compiled = _network(syncbn.SyncBatchNorm), _network(syncbn.SyncBatchNorm)
    run: Any = torch.compile(compiled, fullgraph=True, dynamic=dynamic, backend=backend)
    alone = run
    if wrapped:  # DDP itself does not compile to one graph
        run = DistributedDataParallel(run)
    for step, rows in enumerate((4, 6, 3)):
        outputs: list[Tensor] = []
        for model in (eager, run):
            x = _share(step, rows).requires_grad_()
            y = model(x)
            y.square().sum().backward()
            assert x.grad is not None
            outputs += [y.detach(), x.grad]
        torch.testing.assert_close(outputs[2:], outputs[:2], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
        if wrapped:
            for gradient in _summed_gradients(eager):
                gradient.div_(dist.get_world_size())
        for mine, other in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)
        for model in (eager, compiled):
            model.zero_grad()
    with pytest.raises(InputError, match="got 1, whose"):
        alone(_share()[: 1 - dist.get_rank()])
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore[reportPrivateUsage] -- as above


def _compiled_in_turn(ways: list[tuple[bool | None, bool, str]]) -> list[int]:
    return [_compiled_like_eager(*way) for way in ways]


# One world for all ways, because loading the compiler takes longest.
@pytest.mark.parametrize(
    "ways",
    [
        [(None, False, "aot_eager")],
        pytest.param([(None, True, "aot_eager")], marks=pytest.mark.long),
        pytest.param(
            [(True, False, "aot_eager"), (None, False, "inductor")], marks=pytest.mark.long
        ),
    ],
    ids=["captured", "captured in DDP", "compiled"],
)
def test_compiles_to_one_graph_with_the_numbers_of_eager(
    ways: list[tuple[bool | None, bool, str]],
) -> None:
    for graphs in run_world(2, _compiled_in_turn, ways, deadline_s=200):
        assert all(0 < count <= 5 for count in graphs)  # fixed sizes, any size, none, one


# No double backward: pytorch#61222.


class _Share(torch.autograd.Function):
    """The whole batch to this rank's share; its gradient comes from all ranks."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- torch's own signature is (*args: Any)
        return whole.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return _Gather.apply(grads[0])  # pyright: ignore[reportReturnType] -- as above


class _Gather(torch.autograd.Function):
    """This rank's share to the whole batch."""

    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, share.contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] -- as above
        return _Share.apply(grads[0])  # pyright: ignore[reportReturnType] -- as above


def _gradchecks() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 2 * dist.get_world_size()
    x = torch.randn(rows, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    weight, bias = (
        torch.randn(2, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(2)
    )

    def of_input(whole: Tensor, **options: Any) -> Tensor:
        share: Tensor = _Share.apply(whole)  # pyright: ignore[reportAssignmentType] -- as above
        return _Gather.apply(syncbn.sync_batch_norm(share, weight, bias, **options)[0])  # pyright: ignore[reportReturnType] -- as above

    def with_residual(whole: Tensor) -> Tensor:
        return of_input(whole, residual=_Share.apply(whole.sin()), relu=True)

    for function in (of_input, lambda whole: of_input(whole, relu=True), with_residual):
        torch.autograd.gradcheck(function, (x,))
        torch.autograd.gradgradcheck(function, (x,))
    if dist.get_world_size() == 1:  # on more ranks, each has its share of these gradients
        normalize = syncbn.sync_batch_norm
        torch.autograd.gradcheck(lambda *of: normalize(*of)[0], (x, weight, bias))
        torch.autograd.gradgradcheck(lambda *of: normalize(*of)[0], (x, weight, bias))


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_first_and_second_derivatives_match_finite_differences(world_size: int) -> None:
    run_world(world_size, _gradchecks)


def _penalized(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    y = model(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (y.sin().sum() + gradient.square().sum()).backward()


def _gradient_penalty() -> None:
    ours, truth = _network(syncbn.SyncBatchNorm), _network()
    _penalized(ours, _share())
    _penalized(truth, _whole())
    for mine, other in zip(_summed_gradients(ours), truth.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradient_penalty_equals_that_of_one_process(world_size: int) -> None:
    run_world(world_size, _gradient_penalty)


# Checkpointing updates the running statistics twice: pytorch#96136.


def _checkpointed(world_size: int) -> None:
    plain, other = _network(syncbn.SyncBatchNorm), _network(syncbn.SyncBatchNorm)
    counts: list[int] = []
    for model, run in (
        (plain, lambda x: plain(x)),
        (other, lambda x: checkpoint(other, x, use_reentrant=False)),
    ):
        with recorded_all_reduces() as sent:
            # Two micro-batches at once, the first of them backward last.
            losses = [run(_share(seed)).square().sum() for seed in range(2)]
            for loss in reversed(losses):
                loss.backward()
        counts.append(len(sent))
        assert not any(parameter.grad is None for parameter in model.parameters())
    assert counts == [8 if world_size > 1 else 0] * 2
    assert str(plain.state_dict()) == str(other.state_dict())
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # pyright: ignore[reportArgumentType] -- checked above
    assert other[1].num_batches_tracked == 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpointing_tracks_once_and_sends_nothing_again(world_size: int) -> None:
    run_world(world_size, _checkpointed, world_size)


# Two forwards before one backward under DDP: pytorch#175024, #24397.


def _two_forwards(training: bool) -> None:
    ours, truth = _network(syncbn.SyncBatchNorm), _network()
    for model in (ours, truth):
        model.train(training)
    wrapped = DistributedDataParallel(ours)
    (wrapped(_share(0)).sin() * wrapped(_share(1)).cos()).sum().backward()
    (truth(_whole(0)).sin() * truth(_whole(1)).cos()).sum().backward()
    for mine, other in zip(ours.parameters(), truth.parameters(), strict=True):
        assert mine.grad is not None
        total = mine.grad * dist.get_world_size()  # DDP averages
        torch.testing.assert_close(total, other.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), truth.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_before_one_backward_under_ddp(training: bool) -> None:
    run_world(2, _two_forwards, training)


def _accumulated() -> None:
    ours, truth = _network(syncbn.SyncBatchNorm), _network()
    wrapped = DistributedDataParallel(ours)
    with wrapped.no_sync():
        wrapped(_share(0)).sin().sum().backward()
    wrapped(_share(1)).sin().sum().backward()
    for seed in range(2):
        truth(_whole(seed)).sin().sum().backward()
    for mine, other in zip(ours.parameters(), truth.parameters(), strict=True):
        assert mine.grad is not None
        total = mine.grad * dist.get_world_size()
        torch.testing.assert_close(total, other.grad, rtol=1e-10, atol=1e-10)


def test_gradient_accumulation_with_no_sync() -> None:
    run_world(2, _accumulated)


def _joined() -> None:
    wrapped = DistributedDataParallel(_network(syncbn.SyncBatchNorm))
    with wrapped.join(), pytest.raises(InputError, match="cannot run under join"):
        wrapped(_share())


def test_join_is_refused_before_anything_hangs() -> None:
    run_world(2, _joined)


def _ran_out() -> None:
    ours, truth = _network(syncbn.SyncBatchNorm), _network()
    last = _share(0)
    (ours(last[:0]) if dist.get_rank() else ours(last)).sin().sum().backward()
    truth(_whole(0).chunk(dist.get_world_size())[0]).sin().sum().backward()
    for mine, other in zip(_summed_gradients(ours), truth.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=1e-10, atol=1e-10)


def test_rank_that_ran_out_goes_on_with_empty_batches() -> None:
    run_world(3, _ran_out)


# Half precision with FSDP: pytorch#96203.


def _sharded(mixed: bool) -> None:
    ours, truth = _network(syncbn.SyncBatchNorm), _network()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(ours, mesh=mesh, mp_policy=policy)
    y = ours(_share())
    assert y.dtype == (torch.bfloat16 if mixed else torch.float64)
    y.sin().sum().backward()
    truth(_whole()).sin().sum().backward()
    rounding = 0.05 if mixed else 1e-10
    for mine, other in zip(ours.parameters(), truth.parameters(), strict=True):
        gradient: Any = mine.grad
        total = gradient.full_tensor() * dist.get_world_size()
        torch.testing.assert_close(total, other.grad, rtol=rounding, atol=rounding)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, truth.get_buffer(name), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("mixed", [False, True])
def test_fully_sharded_on_cpu(mixed: bool) -> None:
    run_world(2, _sharded, mixed)


def test_evaluation_can_be_exported() -> None:
    model = _network(syncbn.SyncBatchNorm).eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    exported = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module()
    torch.testing.assert_close(exported(x[:3]), model(x[:3]))


# vmap: pytorch#91629.


def _transformed() -> None:
    torch.manual_seed(dist.get_rank())
    x, weight = torch.randn(2, 4, 3), torch.randn(2, 3)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return syncbn.sync_batch_norm(x, weight)[0].pow(3).sum()

    together = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, weight)
    alone = [torch.func.grad(loss, argnums=(0, 1))(x[i], weight[i]) for i in range(2)]
    for argument in range(2):
        expected = torch.stack([gradients[argument] for gradients in alone])
        torch.testing.assert_close(together[argument], expected)
    tracking = syncbn.SyncBatchNorm(3)
    of_layer = torch.func.grad(lambda x: tracking(x).sum())
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        of_layer(x[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_work_unless_statistics_are_tracked() -> None:
    run_world(2, _transformed)


def _ensemble_differentiated_outside(relu: bool, added: bool) -> None:
    torch.manual_seed(dist.get_rank())
    x, residual = torch.randn(2, 2, 4, 3).unbind()
    weight, bias = torch.randn(2, 2, 3).unbind()

    def member(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        added_to = residual if added else None
        return syncbn.sync_batch_norm(x, weight, bias, relu=relu, residual=added_to)[0]

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.vmap(member)(x, weight, bias, residual).pow(3).sum()

    parts = tuple(part.requires_grad_() for part in (x, weight, bias))
    alone = [member(*each) for each in zip(*parts, residual, strict=True)]
    expected = torch.autograd.grad(torch.stack(alone).pow(3).sum(), parts)
    torch.testing.assert_close(torch.autograd.grad(loss(x, weight, bias), parts), expected)
    of_parts = torch.func.grad(loss, argnums=(0, 1, 2))
    torch.testing.assert_close(of_parts(*(part.detach() for part in parts)), expected)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_gradient_through_an_ensemble_is_that_of_its_members(relu: bool, added: bool) -> None:
    run_world(2, _ensemble_differentiated_outside, relu, added)


def _recorded(tracing_mode: Literal["real", "fake"]) -> None:
    x = _share(rows=8)
    recorded = _network(syncbn.SyncBatchNorm)
    recorded(x)  # the ranks share memory now

    def step(x: Tensor) -> list[Tensor]:
        output = recorded(x)
        return [output, *torch.autograd.grad(output.pow(3).sum(), list(recorded.parameters()))]

    graph = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
    recorded.load_state_dict(_network(syncbn.SyncBatchNorm).state_dict())
    model = _network(syncbn.SyncBatchNorm)
    for step_number in range(3):
        batch = x * (step_number + 2) + 100
        output = model(batch)
        expected = torch.autograd.grad(output.pow(3).sum(), list(model.parameters()))
        torch.testing.assert_close(graph(batch), [output, *expected])
    torch.testing.assert_close(recorded.state_dict(), model.state_dict())


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_recorded_operations_sum_over_ranks_where_they_run(tracing_mode: str) -> None:
    run_world(2, _recorded, tracing_mode)


def _tried_out() -> None:
    syncbn.SyncBatchNorm(3)(torch.randn(4, 3))  # the ranks share memory now
    with FakeTensorMode():
        layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
        with recorded_all_reduces() as sent:
            layer(x).sum().backward()
        assert isinstance(x.grad, FakeTensor)
    assert not sent


def test_tensors_without_values_are_normalized_without_a_sum() -> None:
    run_world(2, _tried_out)


# A layer with a process group can be copied and pickled.


def _copied_and_pickled() -> None:
    group = dist.new_group([0, 1])
    assert isinstance(group, dist.ProcessGroup)
    layer = syncbn.SyncBatchNorm(3, process_group=group).double()
    layer(_share())
    twin = copy.deepcopy(layer)
    assert twin.process_group is group
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    outputs = [each(_share(1)) for each in (layer, twin, loaded)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    for each in (twin, loaded):
        assert str(each.state_dict()) == str(layer.state_dict())
    state = layer.__getstate__()
    state["process_group"] = RanksOfGroup((0, 1, 2))  # as from a larger job
    layer.__setstate__(state)
    assert layer.eval()(_share()).shape == (4, 3)
    with pytest.raises(InputError, match=r"ranks \[0, 1, 2\]; process groups cannot be pickled"):
        layer.train()(_share())


def test_layer_with_a_process_group_is_copied_and_pickled() -> None:
    run_world(2, _copied_and_pickled)
