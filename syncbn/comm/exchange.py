"""One call's exchange with the other replicas: summed, checked, repeated and remembered in one way.

Every layer, gradient and baseline that adds something up over replicas does it by an `Exchange`.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import _native
from syncbn._native.plain import are_plain, has_memory, is_unobserved, listeners
from syncbn.comm.diagnose import require_agreement
from syncbn.comm.fingerprint import add_fingerprint, count_of, invalidate, is_valid
from syncbn.comm.flight_record import record_of, timeout_s_of
from syncbn.comm.recomputation import region
from syncbn.comm.reducer import Reducer, select_reducer
from syncbn.environment import DEBUG, KERNELS, variable
from syncbn.errors import InputError, ReplicaError
from syncbn.mark import Mark, Marks
from syncbn.moments import Moments, move_shift

_mode_of: Callable[[Any], object] = torch._C._get_dispatch_mode  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- nothing public tells
_RECORDING = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE  # pyright: ignore[reportPrivateUsage] -- as above
# How long to wait for the other ranks' account of what they are doing, once something is wrong.
_ACCOUNT_TIMEOUT_S = 30.0

# More ranks add their moments up instead of gathering them: to merge W moments takes W reads.
MOST_GATHERED = 32

T = TypeVar("T")
# Makes the vector to sum, about a shift; None stands for 0.
Pack = Callable[[Tensor | None], Tensor]
# Makes a replica's row, stamped by a shift, and merges those of all; see `syncbn.kernels.protocol`.
Row = Callable[[Tensor | None, Mark | None], Tensor]
Merge = Callable[[Tensor, Tensor | None, Mark | None], Moments]


class Memory:
    """What one layer remembers from call to call: what it sums about, and its name.

    Attributes:
        shift: K, shape (C,), float64: the mean of the latest batch, near which sums cancel least.
            The same on every rank, because it came out of an all-reduce.
        layer: whose memory this is, to name it in errors; None for none.
    """

    def __init__(self, channels: int, device: torch.device, layer: nn.Module | None = None) -> None:
        self.shift = torch.zeros(channels, dtype=torch.float64, device=device)
        self.layer = None if layer is None else weakref.ref(layer)
        self._name: str | None = None

    def name(self) -> str | None:
        """Return the layer's qualified name, looked up once; None if there is no layer."""
        layer = None if self.layer is None else self.layer()
        if layer is not None and self._name is None:
            self._name = qualified_name(layer)
        return self._name

    def move(self, device: torch.device) -> None:
        """Take the shift to another device; from the meta device, which has no values, to 0."""
        if self.shift.is_meta:
            self.shift = torch.zeros_like(self.shift, device=device)
        self.shift = self.shift.to(device)

    def shift_for(self, channels: int, device: torch.device) -> Tensor:
        """Return the shift for a batch of so many channels on a device."""
        if self.shift.shape[0] != channels or self.shift.device != device:
            with torch.inference_mode(False):  # or it could not be moved outside of it
                self.shift = torch.zeros(channels, dtype=torch.float64, device=device)
        return self.shift


class Exchange:
    """What one call of a layer adds up over the replicas.

    Inside a region of activation checkpointing, the forward of a recomputation receives what the
    first one received, and sends nothing; see `syncbn.comm.recomputation`.

    Attributes:
        reducer: sums over the replicas.
        memory: of the layer; None for a function call.
        channels: C.
        dtype: of the input.
    """

    __slots__ = ("channels", "dtype", "memory", "reducer")

    def __init__(
        self, reducer: Reducer, memory: Memory | None, channels: int, dtype: torch.dtype
    ) -> None:
        self.reducer = reducer
        self.memory = memory
        self.channels = channels
        self.dtype = dtype

    @property
    def world_size(self) -> int:
        """How many replicas take part."""
        return self.reducer.world_size

    def sum(
        self,
        vector: Tensor,
        direction: str = "backward",
        *,
        overwrite: bool = False,
        marked: bool = False,
    ) -> Tensor:
        """Return the sum of all replicas' vectors, bit-identical on all of them.

        Communicates: one all-reduce of the vector; none in a world of one.

        Args:
            vector: this replica's.
            direction: forward or backward, for errors.
            overwrite: whether the sum may take the vector's place.
            marked: whether the caller leaves the marks of `marks` around it, or does without.

        Raises:
            ReplicaError: the replicas did not make the same call, or one is gone.
        """
        if self.reducer.world_size == 1:
            return vector
        # Without memory in `is_grads_batched`, which calls an operator for each member.
        if _recording() or not has_memory(vector):
            return torch.ops.syncbn.sum(vector, _group_name(self.reducer))
        return self._sum(vector, direction, overwrite, marked)

    def gathers(self, device: torch.device) -> bool:
        """Return whether replicas gather their moments, by `gather`, or sum them, by `sum_about`.

        They gather on GPUs, where nobody can look at a sum to repeat it about another shift, unless
        they are too many. The answer is the same on every rank.
        """
        return 1 < self.reducer.world_size <= MOST_GATHERED and (
            device.type != "cpu" or variable(KERNELS) == "triton"
        )

    def gather(self, row: Row, merge: Merge, device: torch.device) -> Moments:
        """Return merge(rows of all replicas, in the order of their ranks).

        The shift that the memory knows stamps a row, and becomes the mean of this batch: different
        stamps show that ranks call different layers. On a GPU the moments are NaN then; on the CPU
        every rank raises.

        Communicates: one all-gather.

        Args:
            row: returns this replica's row, given a shift, or None for no stamp.
            merge: merges the rows, and moves the shift, if it is given one.
            device: of the rows.

        Raises:
            ReplicaError: the replicas did not make the same call, or one is gone.
        """
        shift = None if self.memory is None else self.memory.shift_for(self.channels, device)
        if _recording():
            rows = torch.ops.syncbn.gather(row(shift, None), _group_name(self.reducer))
            return merge(rows, shift, None)

        def exchange() -> Moments:
            before, after = self.marks("forward", device) or (None, None)
            rows = self._gather(row(shift, before))
            moments = merge(rows, shift, after)
            if device.type == "cpu" and not is_valid(count_of(moments.packed)):
                self._require_same_call()
                rows[:, -1] = 0  # the moments need no shift, whatever one rank's was
                moments = merge(rows, shift, None)
            return moments

        return self._once(exchange, lambda: merge(row(None, None).unsqueeze(0), None, None))

    def marks(self, direction: str, device: torch.device) -> Marks | None:
        """Return what a device shall leave around an exchange, for its flight record; None if none.

        None where torch records, tries out or transforms what is done: a mark is written in place.
        Does not communicate.
        """
        if self.reducer.world_size == 1 or not is_unobserved():
            return None
        record = record_of(device)
        if record is None:
            return None
        assert self.reducer.group is not None
        timeout_s = timeout_s_of(self.reducer.group, device)
        return record.depart(partial(self._account, direction), timeout_s)

    def sum_about(
        self,
        pack: Pack,
        unpack: Callable[[Tensor, Tensor | None], T],
        device: torch.device,
        tag: Tensor | None = None,
    ) -> T:
        """Return unpack(Σ pack(shift), shift), the sum being over all replicas.

        The shift is the mean of the batch that the memory knows, and moves to that of this batch;
        None stands for 0. A fingerprint shows whether all ranks used the same. If not, because one
        of them reloaded its layer, say, they sum pack(None), and agree again afterwards.

        Communicates: one all-reduce; a second one if shifts differed.

        Args:
            pack: returns a vector of float64: the count, the C sums of x − shift, and more.
            unpack: takes the sum apart.
            device: of the vectors.
            tag: what ranks must agree on instead of the shift, which is 0 then; float64.

        Raises:
            ReplicaError: the replicas did not make the same call, or one is gone.
            InputError: in compiled code, all replicas together hold a single value per channel.
        """
        shift = None
        if tag is None and self.memory is not None:
            shift = self.memory.shift_for(self.channels, device)
        if _recording():
            return unpack(*self._sum_recorded(pack, shift))

        def exchange() -> T:
            total, about = self._sum_about(pack, shift, tag)
            result = unpack(total, about)
            if shift is not None:
                _move(shift, total, about is not None)
            return result

        return self._once(exchange, lambda: unpack(pack(None), None))

    def alone(self, compute: Callable[[], T]) -> T:
        """Return what needs no exchange, in a world of one; in a recomputation, the forward's.

        Does not communicate.
        """
        return compute() if torch.compiler.is_compiling() else self._once(compute, compute)

    def _once(self, exchange: Callable[[], T], ahead: Callable[[], T]) -> T:
        checkpointed = region()
        if checkpointed is None:
            return exchange()
        call = f"a training-mode call with {self.channels} channels"
        return checkpointed.once(call, exchange, ahead)

    def _sum_about(
        self, pack: Pack, shift: Tensor | None, tag: Tensor | None, marked: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum, and what it was made about: the shift, or None for 0."""
        vector, agreed = pack(shift), shift if tag is None else tag
        if agreed is not None:
            reducer = self.reducer
            vector = add_fingerprint(vector, agreed, reducer.rank, reducer.world_size)
        total = self._sum(vector, "forward", marked=marked)
        if total.device.type != "cpu":
            return invalidate(total), shift
        if is_valid(count_of(total)):
            return total, shift
        self._require_same_call()
        return self._sum(pack(None), "forward"), None

    def _sum_recorded(self, pack: Pack, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Do the same as one operation of a graph, in which nothing may branch on the sum."""
        name = _group_name(self.reducer)
        if shift is None:
            return torch.ops.syncbn.sum_about(pack(None), None, None, name)[0], None
        total, about = torch.ops.syncbn.sum_about(pack(shift), pack(None), shift, name)
        _set_to_mean(shift, total, about)
        return total, about

    def refuse(self, device: torch.device, reason: str, size: int | None = None) -> None:
        """Let the other replicas know that this one refuses its input, so that they do not wait.

        Communicates: takes part in the forward's all-reduce, with an invalid count; the others
        raise a ReplicaError with the reason.

        Args:
            device: of the vector.
            reason: what is wrong with the input.
            size: of the vector that the forward sums; None for that of moments, 2C + 1.
        """
        if self.world_size == 1 or torch.compiler.is_compiling():
            return
        # The sum fails where the size is wrong, as that of an output without channels; the
        # agreement always does. The caller raises what is wrong here.
        with suppress(RuntimeError):
            if _debug_timeout_s() is None:
                gathers = size is None and self.gathers(device)
                size = size or 2 * self.channels + 1 + gathers
                invalid = torch.full((size,), torch.nan, dtype=torch.float64, device=device)
                if gathers:
                    self.reducer.gather(invalid)
                else:
                    self.reducer.sum(invalid)
                if device.type != "cpu":
                    return
            refusal = f"{self._position('forward')} and refuses its input: {reason}"
            self._require_agreement(refusal)

    def require_two_values(self, count: Tensor, local_count: int) -> None:
        """Raise, on every rank, if all replicas together hold one value per channel.

        Looking at the count makes the host wait for a GPU, so a replica that has two values itself
        does not look. In compiled code `sum_about` looks.

        Raises:
            InputError: the count is 1.
        """
        if self.world_size == 1:
            single = local_count == 1
        elif torch.compiler.is_compiling() or local_count > 1:
            single = False
        elif count.is_cuda and torch.cuda.is_current_stream_capturing():
            single = False  # looking is impossible while a CUDA graph is captured
        else:
            single = bool(count == 1)
        if single:
            raise _single_value()

    def of_members(self, members: int) -> "Exchange":
        """Return the exchange of an ensemble, whose channels stand beside each other."""
        return Exchange(self.reducer, None, members * self.channels, self.dtype)

    def _sum(
        self, vector: Tensor, direction: str, overwrite: bool = False, marked: bool = False
    ) -> Tensor:
        def add_up() -> Tensor:
            if type(vector) is not Tensor and _is_stand_in(vector):
                return torch.ops.syncbn.sum(vector, _group_name(self.reducer))
            return self.reducer.sum(vector, overwrite)

        marks = None if marked else self.marks(direction, vector.device)
        if marks is None:
            return self._exchange(direction, add_up)
        marks.before.leave(vector.device)
        total = self._exchange(direction, add_up)
        marks.after.leave(vector.device)
        return total

    def _gather(self, row: Tensor) -> Tensor:
        return self._exchange("forward", lambda: self.reducer.gather(row))

    def _exchange(self, direction: str, collective: Callable[[], Tensor]) -> Tensor:
        if _debug_timeout_s() is not None:
            self._require_agreement(self._position(direction))
        try:
            return collective()
        except RuntimeError as error:
            raise ReplicaError(
                f"rank {self.reducer.rank} {self._position(direction)} and got nothing of the "
                f"{self.world_size} ranks: {error}. A rank died, or did not call this layer; "
                f"{DEBUG}=60 in the environment makes every call say which"
            ) from error

    def _account(self, direction: str) -> str:
        """Return the same with the rank, once somebody asks; raises if the group is gone."""
        assert self.reducer.group is not None
        return f"rank {self.reducer.rank} {self._position(direction)}"

    def _position(self, direction: str) -> str:
        """Return what the calling rank is doing, as in "is at the forward of 'bn1' (...)"."""
        name = None if self.memory is None else self.memory.name()
        name = "sync_batch_norm()" if name is None else repr(name)
        kind = str(self.dtype).removeprefix("torch.")
        return f"is at the {direction} of {name} ({self.channels} channels, {kind})"

    def _require_same_call(self) -> None:
        """Raise, on every rank, if the replicas did not make the same call.

        For an invalid count: the vectors were not made for the same sum. All replicas see that, and
        all come here. Communicates: one exchange of texts over the group.
        """
        position = self._position("forward")
        self._require_agreement(position)
        if self.memory is None:
            raise ReplicaError(
                f"rank {self.reducer.rank} {position} in compiled code, where the ranks sum about "
                "different shifts: they call different layers, or one rank alone reloaded its "
                "layer; run once without torch.compile, which names the layer"
            )

    def _require_agreement(self, position: str) -> None:
        assert self.reducer.group is not None  # a replica alone has nobody to disagree with
        timeout_s = _debug_timeout_s() or _ACCOUNT_TIMEOUT_S
        require_agreement(self.reducer.group, position, timeout_s)


def qualified_name(layer: nn.Module) -> str:
    """Return a layer's name within the outermost module that holds it, or its class's name.

    For error messages: looks through all objects of the process, and does not communicate.
    """
    holders: dict[int, tuple[nn.Module, str]] = {}
    # By type(), for isinstance() asks each object for its class, and some answer with a warning.
    for module in [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]:
        for name, child in module.__dict__.get("_modules", {}).items():
            if child is not None:
                holders.setdefault(id(child), (module, name))
    path: list[str] = []
    module = layer
    while id(module) in holders and len(path) < 100:  # should modules hold each other in a circle
        module, name = holders[id(module)]
        path.insert(0, name)
    return ".".join(path) or type(layer).__name__


def _move(shift: Tensor, total: Tensor, about_shift: bool) -> None:
    """Set a shift, in place, to the mean of what was summed about it, or about 0."""
    channels = shift.shape[0]
    if _native.library is not None and are_plain(shift, total):
        address = shift.data_ptr()
        _native.library.syncbn_move_shift(total.data_ptr(), channels, about_shift, address)
        return
    _set_to_mean(shift, total, shift if about_shift else None)


def _set_to_mean(shift: Tensor, total: Tensor, about: Tensor | None) -> None:
    mean = total[1 : 1 + shift.shape[0]] / total[0].clamp(min=1)
    if about is not None:
        mean = mean + about
    move_shift(shift, total[0], mean)


def _debug_timeout_s() -> float | None:
    setting = variable(DEBUG)
    if not setting:
        return None
    try:
        timeout_s = float(setting)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < float("inf"):
        raise InputError(
            f"{DEBUG} is {setting!r}; set it to a positive number of seconds, such as 60, "
            "or unset it"
        )
    return timeout_s


def _recording() -> bool:
    """Return whether operations are recorded or only tried out, which sees nothing but operations.

    So do torch.compile, `make_fx` and FakeTensorMode.
    """
    return torch.compiler.is_compiling() or (
        listeners() > 0 and any(_mode_of(key) is not None for key in _RECORDING)
    )


def _is_stand_in(tensor: Tensor) -> bool:
    """Return whether a tensor stands for others, or for none, and has no memory of its own."""
    keys = torch._C._dispatch_keys(tensor)  # pyright: ignore[reportPrivateUsage] -- nothing public tells
    return keys.has(torch._C.DispatchKey.Python)  # pyright: ignore[reportPrivateUsage] -- as above


def _single_value() -> InputError:
    return InputError(
        "expected more than 1 value per channel over all replicas when training, got 1, whose "
        "variance is undefined; use a larger batch, or eval mode"
    )


def _group_name(reducer: Reducer) -> str:
    """Return the name by which a graph holds the process group of several replicas."""
    assert reducer.group is not None  # a replica alone has nothing to sum
    return reducer.group.group_name


# What torch.compile puts into its graphs, if it may not look into the communication. The calls have
# no layer's name there, and leave no marks, which would cost more than the call.
@torch.library.custom_op("syncbn::sum_about", mutates_args=())
def _sum_about(
    vector: Tensor, about_zero: Tensor | None, shift: Tensor | None, group_name: str
) -> tuple[Tensor, Tensor]:
    # Gives the shift too, for the graph's own is another one by the time of the backward pass.
    channels = 0 if shift is None else len(shift)
    exchange = _compiled_exchange(vector.device, channels, group_name)

    def pack(about: Tensor | None) -> Tensor:
        chosen = vector if about is not None or about_zero is None else about_zero
        return chosen.clone()

    total, about = exchange._sum_about(pack, shift, None, marked=True)  # pyright: ignore[reportPrivateUsage] -- the same module
    if total.device.type == "cpu" and total[0] == 1:
        raise _single_value()
    if about is None:
        return total, vector.new_zeros(channels)
    return total, about.clone()


@_sum_about.register_fake
def _(
    vector: Tensor, about_zero: Tensor | None, shift: Tensor | None, group_name: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(vector), vector.new_empty(0 if shift is None else len(shift))


@torch.library.custom_op("syncbn::gather", mutates_args=())
def _gather(row: Tensor, group_name: str) -> Tensor:
    exchange = _compiled_exchange(row.device, len(row) // 2 - 1, group_name)
    rows = exchange._gather(row)  # pyright: ignore[reportPrivateUsage] -- the same module
    if row.device.type == "cpu" and rows[:, 0].sum() == 1:
        raise _single_value()
    return rows


@_gather.register_fake
def _(row: Tensor, group_name: str) -> Tensor:
    return row.new_empty((dist.get_world_size(_resolve(group_name)), len(row)))


@torch.library.custom_op("syncbn::sum", mutates_args=())
def _sum(vector: Tensor, group_name: str) -> Tensor:
    exchange = _compiled_exchange(vector.device, len(vector) // 2, group_name)
    return exchange._sum(vector, "backward", marked=True)  # pyright: ignore[reportPrivateUsage] -- as above


@_sum.register_fake
def _(vector: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(vector)


def _compiled_exchange(device: torch.device, channels: int, group_name: str) -> Exchange:
    """Return the exchange of compiled code, which knows neither layer nor memory."""
    reducer = select_reducer(_resolve(group_name), device)
    return Exchange(reducer, None, channels, torch.float64)


def _resolve(group_name: str) -> dist.ProcessGroup:
    resolve: Any = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] -- a graph holds a group by its name
    return resolve(group_name)
