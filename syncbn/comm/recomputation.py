"""Which exchanges activation checkpointing repeats, told by control flow and never by values.

`torch.utils.checkpoint` (non-reentrant) pushes saved-tensor hooks: around the forward of a region
with the region's frame, and around each recomputation of it with the same frame. Within a region,
the exchanges of a recomputation come in the order of the forward's, on every rank alike. So the
n-th exchange of a recomputation takes what the n-th one of the forward received, and sends nothing.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage] -- nothing public hides an operation from modes

from syncbn.errors import ReplicaError

T = TypeVar("T")

# Nothing public tells of the hooks; a test holds that these are there, in every torch we support.
_autograd: Any = torch._C._autograd  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
_top: Callable[[bool], tuple[Any, Any] | None] = _autograd._top_saved_tensors_default_hooks
_SUPPORTED = all(hasattr(checkpoint, name) for name in ("_checkpoint_hook", "_recomputation_hook"))

# What the exchanges of a region's forward received, in their order, by the region's frame.
_received: "weakref.WeakKeyDictionary[Any, list[_Received]]" = weakref.WeakKeyDictionary()
# How many exchanges a recomputation has repeated, by the hook that it alone has.
_repeated: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()


class _Received(NamedTuple):
    call: object  # what tells this exchange from others, to be safe
    result: Any


class Region(NamedTuple):
    """The checkpointed regions that the current call is in.

    Attributes:
        frames: of regions in their forward, the innermost first.
        repeats: of the region that is being recomputed, the hook and the frame; None in a forward.
    """

    frames: tuple[Any, ...]
    repeats: tuple[Any, Any] | None

    def hidden(self) -> AbstractContextManager[Any]:
        """Return a context whose operations no dispatch mode sees.

        Selective checkpointing replays results in the order in which its mode saw the operations,
        so that an operation of the forward alone would shift all that follow.
        """
        return _disable_current_modes()

    def once(self, call: object, exchange: Callable[[], T], ahead: Callable[[], T]) -> T:
        """Return what the exchange receives, or, in a recomputation, what it received earlier.

        Args:
            call: what exchanges; the same in the forward and in the recomputation.
            exchange: does it.
            ahead: gives a stand-in, for a region that differentiates inside and does not let
                checkpointing stop early: it is recomputed before its forward is complete, and what
                comes after the place that the forward has reached is thrown away.

        Raises:
            ReplicaError: the recomputation makes a call that the forward did not make. On every
                rank, as control flow is the same on all of them.
        """
        if self.repeats is None:
            with self.hidden():
                result = exchange()
        else:
            hook, frame = self.repeats
            number = _repeated.get(hook, 0)
            _repeated[hook] = number + 1
            earlier = _received.get(frame, [])
            if number >= len(earlier) and not frame.forward_completed:
                return ahead()
            if number >= len(earlier) or earlier[number].call != call:
                made = earlier[number].call if number < len(earlier) else "no such call"
                raise ReplicaError(
                    f"activation checkpointing recomputes {call} of a synchronized layer, and at "
                    f"this place the forward made {made}; call the same layers both times, each in "
                    "training or in eval mode as it was."
                )
            result = earlier[number].result
        for frame in self.frames:
            _received.setdefault(frame, []).append(_Received(call, result))
        return result


def region() -> Region | None:
    """Return the checkpointed regions that the current call is in; None outside of any.

    Raises:
        ReplicaError: this torch's checkpointing cannot be read, so that a recomputation, which must
            not communicate, cannot be told from a forward. On every rank.
    """
    if _top(True) is None:
        if not _SUPPORTED and torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] -- as in torch.utils.checkpoint
            raise _unreadable()
        return None
    if not _autograd._saved_tensors_hooks_is_enabled():
        return None
    return _read_stack()


def unless_repeated(work: Callable[[], None]) -> None:
    """Do what a forward does once, such as to move running statistics, and a recomputation not."""
    current = None if torch.compiler.is_compiling() else region()
    if current is None:
        work()
    elif current.repeats is None:
        with current.hidden():
            work()


def _read_stack() -> Region | None:
    """Return what the stack of hooks says, which shows its top alone: it is taken off, and back."""
    frames: list[Any] = []
    repeats: tuple[Any, Any] | None = None
    taken: list[tuple[Any, Any]] = []
    try:
        while repeats is None and (hooks := _top(True)) is not None:
            variables = _variables(hooks[0])
            if "target_frame_ref" in variables:
                repeats = hooks[0], variables["target_frame_ref"]()
            elif "frame" in variables:
                frames.append(variables["frame"])
            elif variables:
                raise _unreadable()
            _autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
    finally:
        for pack, unpack in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)
    return Region(tuple(frames), repeats) if frames or repeats else None


def _variables(pack: Any) -> dict[str, Any]:
    """Return the variables that a hook of torch's checkpointing closes over; {} for another's."""
    function = getattr(pack, "__wrapped__", pack)
    if getattr(function, "__module__", None) != checkpoint.__name__:
        return {}
    names = function.__code__.co_freevars or ("nothing",)
    cells = function.__closure__ or (None,)
    return {n: None if c is None else c.cell_contents for n, c in zip(names, cells, strict=True)}


def _unreadable() -> ReplicaError:
    return ReplicaError(
        f"syncbn cannot read how torch {torch.__version__} checkpoints activations, and would send "
        "statistics twice; use a version of torch that syncbn supports, or no checkpointing around "
        "synchronized layers"
    )
