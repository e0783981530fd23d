"""The exchange through peers' memory in Triton: what runs on a GPU, or interpreted on the CPU.

Each rank has memory that all others can write. In words of 8 bytes, it holds a flag for each
sender, LINE words apart, and then messages, one of each sender for even calls and one for odd ones:
the number of its values, and the values. A program of the grid serves one peer, the same one in
every call. It puts this rank's message and then its flag, the call's number, into the peer's
memory, and waits for the peer's flag in its own. So each pair of programs is on its own.

Two messages, by parity, suffice. When rank r puts its message of call k where that of call k − 2
was, it has got flag k − 1 of rank p, for without it r gives p up, and puts nothing there any more.
p put flag k − 1 after its kernel of call k − 2 was over, which had read r's message of that call.
So nothing is overwritten before it has been read. In the same way p is at most one call ahead: a
flag that is more than k when r looks is k + 1, and the message of call k is still there.

The flags alone keep two ranks in order. A release first makes visible what the program has written,
and lets it finish what it reads; what follows an acquire reads nothing older than the flag. One
thread does both, and a barrier before or after it lets them count for all threads of the program.
On AMD's GPUs, a release waits for the writes of the thread's own wave alone. Therefore a program
has to be a single warp.

Calls of one rank must not overlap; those of one stream do not. A call's number is counted in the
device's memory, so that a CUDA graph can be replayed. The programs of a call, one a rank, should
find room beside whatever else waits on the GPU. If they are started in order, even one at a time
gets through: program p of rank r waits for program r of rank p, and hence for those before that
one, for which the sum of both numbers is smaller.
"""

import triton
import triton.language as tl

# ruff: noqa: N803, ANN001, ANN201 -- arguments have no Python types; constants of the compilation
# are written in capitals, as in Triton's own kernels
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false


@triton.jit(do_not_specialize=["rank", "world_size", "n", "stride", "polls"])
def swap(
    vector, rows, addresses, calls, rank, world_size, n, stride, polls,
    LINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the vectors of n values of all ranks, in their order, to the rows.

    A row is NaN if its rank has not come after so many polls, or sent another number of values. A
    rank that has been given up once stays so, and is sent nothing any more: if it was late, it
    reads what is right or, in the next call, gives up as well, and never reads a mixture.

    `addresses` has where each rank's memory is; `calls` how many calls were made with each, −1 once
    it is given up; `stride` is the words of a message, at least n + 1.
    """
    peer = tl.program_id(0)
    done = tl.load(calls + peer)
    call = done + 1
    theirs = tl.load(addresses + peer).to(tl.pointer_type(tl.int64))
    mine = tl.load(addresses + rank).to(tl.pointer_type(tl.int64))
    messages = world_size * LINE + (call % 2) * world_size * stride
    seen = done
    if done >= 0:
        message = theirs + messages + rank * stride
        tl.store(message, n)
        values = (message + 1).to(tl.pointer_type(tl.float64), bitcast=True)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(values + i, tl.load(vector + i, i < n, 0.0), i < n)
        tl.debug_barrier()
        tl.atomic_xchg(theirs + rank * LINE, call, sem="release", scope="sys")
        while (seen < call) & (polls > 0):
            seen = tl.atomic_add(mine + peer * LINE, 0, sem="acquire", scope="sys")
            polls -= 1
        tl.debug_barrier()
    came = (done >= 0) & (seen >= call)
    tl.store(calls + peer, tl.where(came, call, -1))
    message = mine + messages + peer * stride
    fits = came & (tl.load(message) == n)
    values = (message + 1).to(tl.pointer_type(tl.float64), bitcast=True)
    row = rows + peer.to(tl.int64) * n
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(values + i, i < n, 0.0)
        tl.store(row + i, tl.where(fits, value, float("nan")), i < n)


@triton.jit(do_not_specialize=["world_size", "n"])
def add_up(rows, total, world_size, n, BLOCK: tl.constexpr):
    """Write the sum of rows of n values, added in their order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(rows + i, i < n, 0.0)
    for rank in range(1, world_size):
        value += tl.load(rows + n.to(tl.int64) * rank + i, i < n, 0.0)
    tl.store(total + i, value, i < n)
