"""What a kernel that Triton has compiled asks of a GPU, read from its code; needs no GPU."""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

from triton import knobs

_TYPE = re.compile(r"(?:v(\d+)|(\d+) x )?(i|f|bf|half|bfloat|float|double)(\d*)$")
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
# Triton writes NVIDIA's accesses as lines of PTX, and AMD's as LLVM's or as those of a buffer.
_PTX = re.compile(r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)")
_BUFFER = re.compile(r"call .*\.buffer\.(load|store)\.(\w+)\(")
_LLVM = re.compile(r"\b(load|store) (<[^>]*>|\w+)[ ,].*ptr addrspace\(1\).* align (\d+)")
_POINTER = re.compile(r"ptr(?: addrspace\(\d\))? (?:[a-z]+(?:\([^)]*\))? )*(%[\w.]+)")


class Access(NamedTuple):
    """A load or a store of a kernel's argument, by its index among those that are not constants."""

    argument: int
    kind: str
    size_bytes: int


class Usage(NamedTuple):
    """Registers of a thread, spills of a thread in bytes or registers, shared memory in bytes."""

    registers: int
    spills: int
    shared_bytes: int


def usage(kernel: Any) -> Usage:
    """Return what a compiled kernel needs."""
    if "amdgcn" in kernel.asm:
        found = _numbers(kernel.asm["amdgcn"], r"\.(\w+): +(\d+)$")
        spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        return Usage(
            found["vgpr_count"],
            # Memory of a thread holds spills, and arrays, of which the kernels have none.
            max(spills, found["private_segment_fixed_size"]),
            kernel.metadata.shared,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = _numbers(text, r"\b(\w+):(\d+)\b")
    return Usage(found["REG"], max(found["STACK"], found["LOCAL"]), kernel.metadata.shared)


def accesses(kernel: Any) -> list[Access]:
    """Return a compiled kernel's accesses to global memory, in their order.

    Read from LLVM's code, the last in which a pointer's origin can be followed: each value is
    assigned once. What becomes of an access thereafter is one instruction of its width.
    """
    origins: dict[str, int] = {}
    found: list[Access] = []
    for line in kernel.asm["llir"].splitlines():
        if line.startswith("define"):
            # The arguments are numbered: %0, %1 and so on.
            origins |= {f"%{number}": number for number in map(int, re.findall(r"%(\d+)", line))}
            continue
        if " phi ptr" in line:
            pointers = re.findall(r"\[ (%[\w.]+),", line)
        else:
            pointers = _POINTER.findall(line)
        known = [origins[pointer] for pointer in pointers if pointer in origins]
        if not known:
            continue
        access = _access(line)
        if access is not None:
            # A store's value comes before its pointer.
            found.append(Access(known[-1], *access))
        elif defined := re.match(r"\s*(%[\w.]+) =", line):
            origins[defined[1]] = known[0]
    return found


def _access(line: str) -> tuple[str, int] | None:
    """Return what a line of LLVM's code does to global memory, load or store, and its bytes."""
    if match := _PTX.search(line):
        kind = "load" if match[1] == "ld" else "store"
        return kind, int(match[2] or 1) * int(match[3]) // 8
    if match := _BUFFER.search(line):
        return match[1], _size_bytes(match[2])
    if match := _LLVM.search(line):
        return match[1], min(_size_bytes(match[2].strip("<>")), int(match[3]))
    return None


def _size_bytes(kind: str) -> int:
    """Return the size of one of LLVM's types, such as v4i32 in a name, 4 x i32, and bfloat."""
    match = _TYPE.match(kind)
    if match is None:
        raise ValueError(f"the type {kind!r} is unknown")
    bits = _BITS.get(match[3]) or int(match[4])
    return int(match[1] or match[2] or 1) * bits // 8


def _numbers(text: str, pattern: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(pattern, text, re.MULTILINE)}
