"""What every synchronized layer has: its process group, its reducer, and what it remembers."""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.comm.exchange import Exchange, Memory
from syncbn.comm.reducer import CHOICES, select_reducer
from syncbn.errors import InputError
from syncbn.ops.batch_norm import reason_to_refuse, reason_to_refuse_sharded


@dataclass(frozen=True)
class RanksOfGroup:
    """What is left of a process group in a pickled layer: the global ranks of its members."""

    ranks: tuple[int, ...]


class Synchronized(nn.Module):
    """What a layer needs to synchronize: its process group and reducer, and what it remembers.

    Attributes:
        num_features: C, the channels of its inputs.
        process_group: the replicas to synchronize with; None means the default group.
        reducer: who sums over the replicas; None for the environment's choice.
    """

    _memory: Memory
    num_features: int
    process_group: dist.ProcessGroup | RanksOfGroup | None
    # Of the class, so that a converted layer has it too.
    reducer: str | None = None

    def _exchange(self, input: Tensor) -> Exchange:
        """Return what a call of this layer with an input exchanges."""
        reducer = select_reducer(self._group(), input.device, self.reducer)
        return Exchange(reducer, self._memory, self.num_features, input.dtype)

    def _reason_to_refuse(self, input: Tensor, residual: Tensor | None = None) -> str:
        """Return what is wrong with an input; '' for nothing."""
        own = self._own
        tensors = residual, own("weight"), own("bias"), own("running_mean")
        if reason := reason_to_refuse_sharded(input, *tensors):
            return reason
        shape = input.shape
        if len(shape) < 2 or shape[1] != self.num_features:
            return f"expected an input of shape (N, {self.num_features}, *), got {tuple(shape)}"
        return reason_to_refuse(input)

    def _own(self, name: str) -> Tensor | None:
        """Return a parameter or buffer, for which nn.Module looks longer."""
        for tensors in (self._parameters, self._buffers):
            if name in tensors:
                return tensors[name]
        return getattr(self, name)

    def _group(self) -> dist.ProcessGroup | None:
        group = self.process_group
        if not isinstance(group, RanksOfGroup):
            return group
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                f"this layer was pickled with a process group of the ranks {list(group.ranks)}, "
                "and torch.distributed is not initialized; set its process_group, or use eval mode"
            )
        if list(group.ranks) != list(range(dist.get_world_size())):
            raise InputError(
                f"this layer was pickled with a process group of the ranks {list(group.ranks)}; "
                "process groups cannot be pickled: set its process_group to one of those ranks"
            )
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._memory.move(_device(self))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A process group stands for connections, which a copy shares.
        memo[id(self.process_group)] = self.process_group
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        state = {name: value for name, value in self.__dict__.items() if name != "_memory"}
        twin.__dict__.update(copy.deepcopy(state, memo))
        adopt(twin, self._memory.shift.clone())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_memory"] = self._memory.shift
        if self.process_group is not None and not isinstance(self.process_group, RanksOfGroup):
            ranks = dist.get_process_group_ranks(self.process_group)
            state["process_group"] = RanksOfGroup(tuple(ranks))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        adopt(self, state.get("_memory"))


def adopt(layer: Synchronized, shift: Tensor | None = None) -> None:
    """Give a layer, new or converted or copied, the memory that its forward needs."""
    memory = Memory(layer.num_features, _device(layer), layer)
    if shift is not None:
        memory.shift = shift
    layer._memory = memory  # pyright: ignore[reportPrivateUsage, reportArgumentType] -- of this very class


def shifts(model: nn.Module) -> dict[str, Tensor]:
    """Return what each synchronized layer of a model sums about, by the layer's name.

    The mean of its latest batch, shape (C,), float64, the same on all ranks: with the model's
    state, all that its next output depends on. Copy into them to go back to former ones.
    """
    return {
        name: layer._memory.shift  # pyright: ignore[reportPrivateUsage] -- of this very class
        for name, layer in model.named_modules()
        if isinstance(layer, Synchronized)
    }


def check_reducer(reducer: str | None) -> None:
    """Refuse a reducer that is none of `syncbn.comm.reducer.CHOICES`, nor None.

    Raises:
        InputError: there is no such choice.
    """
    if reducer is not None and reducer not in CHOICES:
        raise InputError(f"the reducer is {reducer!r}; choose {', '.join(CHOICES)} or None")


def refuse_join() -> None:
    """Raise where DDP's join() is active: ranks that ran out would not take part in our sums."""
    if torch.compiler.is_compiling():
        return
    wrapper = DistributedDataParallel._get_active_ddp_module()  # pyright: ignore[reportPrivateUsage] -- nothing public tells
    if wrapper is None:
        return
    join = wrapper._join_config  # pyright: ignore[reportPrivateUsage] -- as above
    if join.enable and not join.throw_on_early_termination:
        raise InputError(
            "a synchronized layer cannot run under join(): a rank that has run out "
            "of batches would leave the others waiting for its statistics; pass "
            "throw_on_early_termination=True to stop all ranks then, or, instead of join(), let "
            "such a rank go on with empty batches, such as x[:0], which change nothing"
        )


def _device(layer: Synchronized) -> torch.device:
    for tensor in (layer.running_mean, layer.weight):
        if isinstance(tensor, Tensor):
            return tensor.device
    return torch.device("cpu")
