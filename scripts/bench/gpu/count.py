"""What a step gives a GPU to do, listed on the CPU: launches, bytes, new memory, and waits.

Kernels in Triton either are interpreted, which shows every load and store, or are only listed, on
tensors without memory, which may then be as large as those of a real network. torch's operations
are seen by a TorchDispatchMode, which the library does not notice here: it would compute in another
way while somebody listens.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from scripts.bench.gpu.interpreted import interpreting_quickly
from syncbn._native import plain
from syncbn.comm import exchange
from syncbn.kernels import triton as product
from syncbn.kernels import triton_launch, triton_source
from syncbn.mark import Mark, Marks

# The multiprocessors and the lanes of an H200's.
H200 = triton_launch.Processor(132, 32)
SECTOR_BYTES = 32
# What allocates or renames, and launches nothing; views are known by their schema.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# What makes the host wait for the device, by its very nature.
_WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"}
_BY_MASK = {"index", "index_put", "index_put_"}
# What takes its input for the dtype alone.
_UNREAD = {"batch_norm_gather_stats_with_counts"}


@dataclass
class Launch:
    """One launch on a GPU, or several of which torch knows as one operation.

    Attributes:
        name: of the kernel or operation.
        backward: whether it belongs to the backward pass.
        tensor_bytes: that it reads from and writes to tensors of the input's size.
        vector_bytes: that it reads and writes elsewhere; of one access of one program, each address
            counts once.
        sector_bytes: of the sectors of 32 bytes that hold these; a GPU moves no less.
    """

    name: str
    backward: bool = False
    tensor_bytes: int = 0
    vector_bytes: int = 0
    sector_bytes: int = 0


class Count(TorchDispatchMode):
    """Lists what is launched while it is entered.

    Attributes:
        launches: in their order.
        waits: operations for which the host waits for the device.
        allocated_bytes: all memory that was asked for, forward and backward.
        backward: set by the caller between the passes.
    """

    def __init__(self, large_numel: int) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.waits: list[str] = []
        self.allocated_bytes = [0, 0]
        self.backward = False
        self._large_numel = large_numel
        self._storages: dict[int, Any] = {}  # kept, so that no two have the same address
        self._large: list[range] | None = None  # of the kernel that is being interpreted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """List an operation, if it launches anything."""
        if self._large is not None:  # the interpreter's own
            return func(*args, **(kwargs or {}))
        inputs = _tensors(args)
        for tensor in inputs:
            self._know(tensor)
        name = func._schema.name.partition("::")[2]
        stand_in = STAND_INS.get(name)
        masked = name in _BY_MASK and any(t.dtype is torch.bool for t in inputs)
        if stand_in is not None and inputs[0].is_meta:
            result = stand_in(*args)
        elif masked and inputs[0].is_meta:
            result = inputs[0].clone()  # as if nothing was masked
        else:
            result = func(*args, **(kwargs or {}))
        outputs = _tensors((result,))
        if name in _WAITS or masked or _goes_to_host(name, inputs, outputs):
            self.waits.append(name)
        if name not in _FREE and not _is_view(func):
            if masked:
                self.launches.append(Launch("nonzero", self.backward))
            read = inputs[1:] if name in _UNREAD else inputs
            launch = Launch(name, self.backward)
            for tensor in [*read, *outputs]:
                launch.sector_bytes += tensor.nbytes
                if tensor.numel() == self._large_numel:
                    launch.tensor_bytes += tensor.nbytes
                else:
                    launch.vector_bytes += tensor.nbytes
            self.launches.append(launch)
        for tensor in outputs:
            self.allocated_bytes[self.backward] += self._know(tensor)
        return result

    def interpret(self, run: Any, kernel: Any, args: Any, options: Any) -> None:
        """List a kernel in Triton, and have it interpreted, if there is a function for that."""
        self.launches.append(Launch(kernel.__name__, self.backward))
        for tensor in args:
            if isinstance(tensor, Tensor):
                self._know(tensor)
        if run is None:
            return
        self._large = [
            range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
            for tensor in args
            if isinstance(tensor, Tensor) and tensor.numel() == self._large_numel
        ]
        try:
            run(kernel, *args, **options)
        finally:
            self._large = None

    def access(self, addresses: Any, mask: Any, itemsize: int) -> None:
        """Count a load or store of the kernel that is being interpreted."""
        assert self._large is not None
        # A mask that was computed from two is of whole numbers.
        touched = numpy.unique(addresses[mask.astype(bool)])
        if not touched.size:
            return
        launch, size = self.launches[-1], touched.size * itemsize
        if any(int(touched[0]) in span for span in self._large):
            launch.tensor_bytes += size
        else:
            launch.vector_bytes += size
        sectors = numpy.unique(touched // numpy.uint64(SECTOR_BYTES))
        launch.sector_bytes += sectors.size * SECTOR_BYTES

    def _know(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor's memory if it has not been seen before, else 0."""
        # By its storage: whoever holds a gradient itself has autograd copy it.
        storage = tensor.untyped_storage()
        address = storage._cdata  # pyright: ignore[reportPrivateUsage] -- meta tensors have no other
        if address in self._storages:
            return 0
        self._storages[address] = storage
        return storage.nbytes()


class _Spy:
    """The interpreter's access to memory, counted."""

    def __init__(self, original: Any, count: Count) -> None:
        self._original, self._count = original, count

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._count.access(addresses, mask, numpy.dtype(dtype).itemsize)
        return self._original.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, values: Any, mask: Any) -> Any:
        self._count.access(addresses, mask, values.dtype.itemsize)
        return self._original.store(addresses, values, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _Record:
    """Gives marks without a device to leave them, as the flight record of a GPU does."""

    def depart(self, *_: Any) -> Marks:
        slot = torch.empty(1, dtype=torch.int64, device="meta")
        return Marks(Mark(slot, 2), Mark(slot, 3))


@contextmanager
def counting(
    large_numel: int, processor: triton_launch.Processor, interpret: bool
) -> Generator[Count]:
    """List what is launched within, for a processor.

    Args:
        large_numel: values of the input.
        processor: to cut tensors into tiles for.
        interpret: whether to interpret kernels, on the CPU; else nothing is computed, and tensors
            are meta tensors.
    """
    count = Count(large_numel)
    kernel_class: Any = type(triton_source.merge)
    run = kernel_class.run if interpret else None

    def listed(kernel: Any, *args: Any, **options: Any) -> None:
        count.interpret(run, kernel, args, options)

    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(kernel_class, "run", listed)
        patch(plain, "listeners", lambda: 0)
        patch(triton_launch, "_processor", lambda _: processor)
        if interpret:
            assert triton_launch.INTERPRETED, "set TRITON_INTERPRET before the import"
            stack.enter_context(interpreting_quickly())
            patch(interpreter, "_interpreter", _Spy(vars(interpreter)["_interpreter"], count))
        else:
            patch(product, "are_here", lambda *_: True)
            patch(triton_launch, "INTERPRETED", False)
            patch(exchange, "record_of", lambda _: _Record())
        stack.enter_context(mock.patch.dict("os.environ", SYNCBN_KERNELS="triton"))
        stack.enter_context(count)
        yield count


def _stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _vector(x), _vector(x)


def _elemt(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _reduce(dy: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_vector(dy) for _ in range(4))


def _vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], device=x.device)


# What torch has for CUDA alone, for tensors without memory.
STAND_INS = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _reduce,
    "batch_norm_backward_elemt": _elemt,
}


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors among values, in lists and tuples too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _goes_to_host(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Return whether a device's values are copied to the host, or back, without pinned memory."""
    devices = {tensor.device.type for tensor in [*inputs, *outputs]}
    return name in ("_to_copy", "copy_") and len(devices) > 1
