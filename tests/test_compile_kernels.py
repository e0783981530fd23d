"""The Triton kernels compile for GPUs that are not here, and what is bad about one is said."""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.processes import REPOSITORY, run

WIDE = {"x load": 16, "y store": 16}
# What spoils the kernels, and what is said of them: a thread with 2 values of a tile cannot load
# 16 bytes, one with 64 values has too few registers, and no tile may have more than 2^20 values.
SPOILED = {
    "narrow": ("_THREADS = 1024", "x loads have 4 bytes, 16 are possible"),
    "spilling": ("_TILE = 2**14", "spills "),
    "not compiled": ("_TILE = 2**21", "does not compile: "),
}

# Prints the code of a single launch. It needs no GPU, but a process in which Triton compiles.
RUNNING = """
import torch
from scripts.dev.compile_kernels import launches_on
from syncbn.kernels.triton import TritonKernels
from syncbn.moments import Moments

with torch.device("meta"), launches_on("sm_90") as launches:
    tracked = torch.zeros((), dtype=torch.int64)
    moments = Moments(torch.empty(7, dtype=torch.float64))
    TritonKernels().update_running(moments, torch.empty(3), torch.empty(3), tracked, None)
print(launches[0].kernel.asm["ptx"])
"""


def _compile(
    *options: str, cache: Path, spoil: str = "pass", interpret: str = "0"
) -> CompletedProcess[str]:
    program = (
        "from syncbn.kernels import triton_launch as kernels\n"
        f"{spoil}\n"
        "from scripts.dev.compile_kernels import main\n"
        "main()"
    )
    command = [sys.executable, "-c", program, *options]
    # Without a cache of its own a test might find kernels that no longer compile.
    environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": interpret}
    return run(command, REPOSITORY, timeout_s=600, **environment)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernel_compiles_with_wide_accesses(target: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    options = ["--target", target, "--kernel", "normalize", "--dtype", "bfloat16"]
    result = _compile(*options, "--json", str(file), cache=tmp_path)
    assert result.returncode == 0, result.stdout
    rows = {
        (row["kernel"], f"{row['layout']} {row['shape']}"): row
        for row in json.loads(file.read_text())
    }
    for kind in ("contiguous 56×56", "contiguous 7×7", "channels_last 56×56"):
        assert rows["normalize", kind]["bytes"] == WIDE
        row = rows["normalize + residual + relu", kind]
        assert row["bytes"] == WIDE | {"residual load": 16}
        assert 0 < row["registers"] <= 80
        assert f"| {row['kernel']} | bfloat16 | {kind} | {target} | " in result.stdout


@pytest.mark.long
def test_every_kernel_compiles_for_every_target(tmp_path: Path) -> None:
    result = _compile(cache=tmp_path)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("target", "release", "acquire"),
    [
        ("sm_80", "atom.global.sys.release.exch.b64", "ld.global.sys.acquire.b64"),
        ("sm_100", "atom.global.sys.release.exch.b64", "ld.global.sys.acquire.b64"),
        ("gfx942", "buffer_wbl2 sc0 sc1", "buffer_inv sc0 sc1"),
    ],
)
def test_exchange_through_peers_memory_is_ordered_for_the_whole_system(
    target: str, release: str, acquire: str, tmp_path: Path
) -> None:
    program = (
        "import torch\n"
        "from scripts.dev.compile_kernels import launches_on, run_layer\n"
        f"with launches_on({target!r}, 'swap') as launches:\n"
        "    run_layer((2, 8, 4, 4), torch.float32, 'contiguous')\n"
        "kernel = launches[0].kernel\n"
        "print('warps', kernel.metadata.num_warps)\n"
        "print(kernel.asm.get('ptx') or kernel.asm['amdgcn'])"
    )
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = run([sys.executable, "-c", program], REPOSITORY, timeout_s=300, **environment)
    assert result.stdout.startswith("warps 1\n"), result.stdout
    # Of the message before the flag, and of the flag before the peer's message.
    assert result.stdout.count(release) == result.stdout.count(acquire) == 1
    assert result.stdout.index(release) < result.stdout.index(acquire)


@pytest.mark.parametrize(("spoil", "fault"), SPOILED.values(), ids=SPOILED.keys())
def test_bad_kernel_is_named(spoil: str, fault: str, tmp_path: Path) -> None:
    options = ["--target", "sm_90", "--kernel", "local_moments", "--dtype", "bfloat16"]
    result = _compile(*options, cache=tmp_path, spoil=f"kernels.{spoil}")
    assert result.returncode == 1
    assert f"local_moments, bfloat16, contiguous, 56×56, sm_90: {fault}" in result.stdout
    assert " are bad" in result.stdout


def test_what_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    result = _compile(cache=tmp_path, interpret="1")
    assert result.returncode == 1
    assert result.stdout.strip().endswith("unset TRITON_INTERPRET")
    result = _compile("--target", "sm_90", "--kernel", "softmax", cache=tmp_path)
    assert result.returncode == 1
    assert "the layer launches no kernel named 'softmax'" in result.stdout


def test_all_threads_have_loaded_the_number_tracked_before_one_stores_it() -> None:
    result = run([sys.executable, "-c", RUNNING], REPOSITORY)
    assert result.returncode == 0, result.stdout
    before_the_store = result.stdout[: result.stdout.index("st.global")]
    assert "bar.sync" in before_the_store[before_the_store.rindex("ld.global") :]
