"""The reducer of GPUs that reach each other's memory: one kernel of ours instead of a collective.

Off unless it is asked for: it has never run on several GPUs. See docs/gpu.md.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.comm.flight_record import timeout_s_of
from syncbn.comm.process_group import ProcessGroupReducer
from syncbn.comm.shared_memory import host
from syncbn.errors import InputError

# The values of a message, at least and at most; what has more goes over the process group.
_LEAST, _MOST = 2**13, 2**16
# Words between two flags, so that each has a cache line of its own; values at once of a program.
_LINE, _BLOCK = 16, 1024
# Nobody has measured a poll: a microsecond, rather more than less. If it takes half as long, a wait
# lasts as long as the time-out, and longer otherwise; to give up too early would spoil a job.
_POLLS_PER_S = 2_000_000
# How long the ranks may take to try new memory out, in which time each compiles the kernels.
_TRIAL_S = 60.0

T = TypeVar("T")


class Mailboxes(NamedTuple):
    """Memory of all ranks for messages to each other; `symmetric_source.py` has how it is used.

    Attributes:
        memory: this rank's, int64.
        addresses: where the device finds each rank's memory, shape (W,), int64.
        calls: how many calls were made with each rank, shape (W,), int64; −1 for a rank given up.
        rank: this rank's number.
        capacity: the most values of a message.
        polls: how often to look for a message before its sender is given up.
        keep: what keeps the memory of the others mapped.
    """

    memory: Tensor
    addresses: Tensor
    calls: Tensor
    rank: int
    capacity: int
    polls: int
    keep: object = None

    def gather(self, vector: Tensor) -> Tensor:
        """Return the vectors of all ranks, in their order; NaN for one that has not come.

        Does not make the host wait. Every rank must call it, in the same order, and a rank's calls
        must not overlap.

        Args:
            vector: contiguous, float64, of at most so many values as the capacity.

        Returns:
            Shape (W, n).
        """
        from syncbn.comm import symmetric_source as source

        n, world_size = vector.numel(), self.addresses.numel()
        rows = vector.new_empty(world_size, n)
        with _on(vector):
            kernel: Any = source.swap
            kernel[(world_size,)](
                vector, rows, self.addresses, self.calls, self.rank, world_size, n,
                self.capacity + 1, self.polls, LINE=_LINE, BLOCK=_BLOCK, num_warps=1, num_stages=1,
            )  # fmt: skip
        return rows


def add_up(rows: Tensor) -> Tensor:
    """Return the sum of the rows of a matrix of float64, added in their order; no communication."""
    from syncbn.comm import symmetric_source as source

    world_size, n = rows.shape
    total = rows.new_empty(n)
    if n > 0:
        with _on(rows):
            kernel: Any = source.add_up
            kernel[(-(-n // _BLOCK),)](rows, total, world_size, n, BLOCK=_BLOCK)
    return total


class SymmetricMemoryReducer(ProcessGroupReducer):
    """Gathers and sums float64 vectors over a group of GPUs of one host, through their memory.

    A sum is that of the gathered vectors, added by each rank in the order of ranks: the same bits
    on all of them and in every run. Other dtypes, and more than 65536 values, go over the process
    group.

    For the first vector of a size, rounded up to a power of two, the ranks open memory to each
    other, try it out, and tell each other over the group whether it works, for which the host
    waits. The memory stays for as long as the reducer, because CUDA graphs know its address.

    If a rank does not come within about the group's time-out, its row is NaN from then on, and so
    is every sum. Nothing is raised, as nobody looks.

    Does not keep the group alive. May be called by several threads.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._lock = threading.Lock()
        self._mailboxes: dict[tuple[torch.device, int], Mailboxes] = {}
        self._latest: torch.cuda.Stream | None = None

    def gather(self, vector: Tensor) -> Tensor:
        """Return the vectors of all ranks, in their order; NaN for one that has not come.

        Args:
            vector: shape (n,), of the same n and dtype on every rank.

        Returns:
            Shape (W, n).

        Raises:
            InputError: the ranks cannot reach each other's memory, or need more of it while a CUDA
                graph is captured; on every rank.
            ReplicaError: this process was forked from the group's member, or the group has been
                destroyed.
        """
        if vector.dtype is not torch.float64 or vector.numel() > _MOST:
            return super().gather(vector)
        self.require_own_process()
        with self._lock:
            mailboxes = self._open(vector)
            self._follow(vector.device)
            return mailboxes.gather(vector.detach().contiguous())

    def sum(self, vector: Tensor, overwrite: bool = False) -> Tensor:
        """Return the sum over the group's ranks.

        Args:
            vector: one of this rank's.
            overwrite: whether the sum may take its place, of which only what goes over the process
                group makes use.

        Raises:
            InputError: as for `gather`.
            ReplicaError: as for `gather`.
        """
        if vector.dtype is not torch.float64 or vector.numel() > _MOST:
            return super().sum(vector, overwrite)
        return add_up(self.gather(vector.flatten())).view_as(vector)

    def _follow(self, device: torch.device) -> None:
        """Let the current stream wait for the one of the latest call, so that none overlap.

        A graph's capture cannot wait for what is outside of it; it starts on an idle device.
        """
        if device.type != "cuda":
            return  # interpreted
        stream, latest = torch.cuda.current_stream(device), self._latest
        if latest is not None and latest != stream and _captured(latest) == _captured(stream):
            stream.wait_stream(latest)
        self._latest = stream

    def _open(self, vector: Tensor) -> Mailboxes:
        """Return memory for messages of a vector's size; collective if there is none yet."""
        device, n = vector.device, vector.numel()
        capacity = max(_LEAST, 1 << max(n - 1, 0).bit_length())
        mailboxes = self._mailboxes.get((device, capacity))
        if mailboxes is not None:
            return mailboxes
        if device.type == "cuda" and _captured(torch.cuda.current_stream(device)):
            raise InputError(
                f"symmetric memory was chosen, there is none yet for vectors of {n} values, and "
                "none can be made while a CUDA graph is captured; run the model once before, "
                "forward and backward"
            )
        hosts = {number for (number,) in self._tell([host()], device)}
        if len(hosts) > 1 or 0 in hosts:
            raise InputError(
                "symmetric memory was chosen, and the ranks are not of one host, user and "
                "container, as it takes; choose 'auto' or 'process_group'"
            )
        words = self.world_size * (_LINE + 2 * (capacity + 1))
        memory = self._on_all(lambda: allocate(words, device), device)
        addresses, keep = self._on_all(lambda: rendezvous(memory, self.group), device)
        mailboxes = Mailboxes(
            memory,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(self.world_size, dtype=torch.int64, device=device),
            self.rank,
            capacity,
            _polls(timeout_s_of(self.group, device)),
            keep,
        )
        self._on_all(lambda: _try_out(mailboxes), device)
        return self._mailboxes.setdefault((device, capacity), mailboxes)

    def _on_all(self, action: Callable[[], T], device: torch.device) -> T:
        """Return action(), or raise on every rank if it has failed on one; one all-gather."""
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(action())
        except Exception as error:  # whatever it is, the others must not wait
            failure = error
        failed = [rank for rank, (bad,) in enumerate(self._tell([1 - len(result)], device)) if bad]
        if failed:
            reason = f"see rank {failed[0]}" if failure is None else failure
            raise InputError(
                f"symmetric memory was chosen, and cannot be had ({reason}); it takes GPUs that "
                "are connected by NVLink or the like, Triton, and a PyTorch with symmetric "
                "memory; choose 'auto' or 'process_group'"
            ) from failure
        return result[0]

    def _tell(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        """Return every rank's numbers, by rank, once it has done all before; one all-gather."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        return super().gather(mine).tolist()


def allocate(words: int, device: torch.device) -> Tensor:
    """Return so many zeros of int64 that can be opened to other ranks; does not communicate.

    Not made by torch's `symm_mem.empty`, which may give a part of something larger.
    """
    # Not in every build of torch, and nothing public does the same.
    from torch._C._distributed_c10d import _SymmetricMemory  # pyright: ignore[reportPrivateUsage] -- as said

    with torch.cuda.device(device):
        return _SymmetricMemory.empty_strided_p2p((words,), (1,), torch.int64, device).zero_()


def rendezvous(memory: Tensor, group: dist.ProcessGroup) -> tuple[list[int], object]:
    """Return where this rank finds the memory of each, and what keeps it there; collective.

    Args:
        memory: of `allocate`, of the same size on every rank.
        group: the ranks.

    Raises:
        RuntimeError: the GPUs cannot reach each other.
    """
    import torch.distributed._symmetric_memory as symmetric  # takes a second

    with torch.cuda.device(memory.device):
        handle = symmetric.rendezvous(memory, group)
    addresses = list(handle.buffer_ptrs)
    if addresses[dist.get_rank(group)] != memory.data_ptr() or not all(addresses):
        raise RuntimeError(f"the ranks' memory is at {addresses}, which cannot be used")
    return addresses, handle


def _try_out(mailboxes: Mailboxes) -> None:
    """Raise if messages do not arrive, or not as they were sent; each place is used twice."""
    trial = mailboxes._replace(polls=min(mailboxes.polls, _polls(_TRIAL_S)))
    ramp = torch.arange(mailboxes.capacity, dtype=torch.float64, device=mailboxes.memory.device)
    ranks = torch.arange(len(mailboxes.addresses), dtype=torch.int64, device=ramp.device)[:, None]
    for call in range(1, 5):
        rows = trial.gather(ramp + call * (1 + mailboxes.rank))
        if not torch.equal(rows, ramp + call * (1 + ranks)):
            raise RuntimeError(f"of {call} messages the last did not arrive as it was sent")


def _polls(seconds: float) -> int:
    return int(min(max(seconds * _POLLS_PER_S, 1), 2**31 - 1))


def _captured(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched where a tensor lies."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
