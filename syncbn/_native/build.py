"""Compile the native library beside this file: a build hook of hatchling, and a command.

python syncbn/_native/build.py     compiles; needs a C++17 compiler: $CXX, c++, g++ or clang++

Without a compiler the package is built all the same, and computes with PyTorch operations.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).parent
LIBRARY = HERE / "libsyncbn.so"
# No fast-math: NaN and infinities must come through, and sums keep their order.
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"),
    *("-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


def levels(machine: str) -> dict[str, list[str]]:
    """Return the levels of instructions to compile the kernels for, with their flags."""
    levels: dict[str, list[str]] = {"kBaseline": []}
    if machine.lower() in ("x86_64", "amd64"):
        levels["kAvx2"] = _AVX2
        levels["kAvx512"] = [*_AVX512, "-mprefer-vector-width=512"]
    return levels


def compiler() -> str | None:
    """Return the C++ compiler's path: $CXX, which must exist, or the first one found."""
    if named := os.environ.get("CXX"):
        return shutil.which(named)
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def compile_library(to: Path, cxx: str, flags: list[str] | None = None) -> None:
    """Compile the sources in this directory into a shared library.

    Written under another name first and moved then, so that nobody loads half a library.

    Raises:
        subprocess.CalledProcessError: the compiler failed; it has said why.
    """
    flags = FLAGS if flags is None else flags
    with tempfile.TemporaryDirectory(dir=to.parent) as directory:
        jobs = [(source, source.stem, list[str]()) for source in sorted(HERE.glob("*.cpp"))]
        jobs = [job for job in jobs if job[1] != "kernels"]
        for level, extra in levels(platform.machine()).items():
            jobs.append((HERE / "kernels.cpp", level, [f"-DSYNCBN_LEVEL={level}", *extra]))
        objects = [str(Path(directory) / f"{name}.o") for _, name, _ in jobs]

        def compile_one(job: tuple[Path, str, list[str]], to: str) -> None:
            subprocess.run([cxx, *flags, *job[2], "-c", str(job[0]), "-o", to], check=True)

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs, objects))
        whole = Path(directory) / to.name
        subprocess.run([cxx, *flags, "-shared", *objects, "-o", str(whole)], check=True)
        whole.replace(to)


class NativeBuildHook(BuildHookInterface[Any]):
    """Compiles before a wheel or an editable installation is made."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the library into the build, or say why it is not in it."""
        if self.target_name != "wheel":
            return
        cxx = compiler()
        if sys.platform != "linux" or cxx is None:
            missing = "a C++ compiler" if sys.platform == "linux" else "Linux"
            self.app.display_warning(
                f"syncbn is built without its native kernels, for want of {missing}"
            )
            return
        compile_library(LIBRARY, cxx)
        if version != "editable":
            build_data["artifacts"].append("syncbn/_native/libsyncbn.so")
        build_data["pure_python"] = False
        # It is loaded as a plain library and knows nothing of Python: any version 3 will do.
        where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{where}"


if __name__ == "__main__":
    found = compiler()
    if found is None:
        sys.exit("no C++ compiler found; install g++ or clang++, or set CXX to one")
    compile_library(LIBRARY, found)
    print(f"compiled {LIBRARY}")  # noqa: T201 -- a command's own output
