"""Run the native code under sanitizers, and on arm64; say "clean", or show the report and fail.

python -m scripts.dev.sanitize             all three parts
python -m scripts.dev.sanitize address     its Python tests, with AddressSanitizer and UBSan
python -m scripts.dev.sanitize thread      tests/support/race.cpp, with ThreadSanitizer
python -m scripts.dev.sanitize arm64       the same for arm64, emulated by qemu; a check of numbers

Takes minutes, and needs Linux, g++ and its sanitizers; arm64 also Debian's packages
g++-aarch64-linux-gnu and qemu-user-static, and is skipped without them. qemu on x86-64 keeps that
processor's order of memory: whether the order asked for is enough, only the part `thread` tells.
"unexpected memory mapping" is ThreadSanitizer's word for a kernel that places memory where an older
one cannot use it: run the command under `setarch -R` then.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from scripts import REPOSITORY
from syncbn._native.build import FLAGS, HERE, compile_library

DRIVER = REPOSITORY / "tests" / "support" / "race.cpp"
SANITIZED = [*FLAGS, "-O1", "-g", "-fno-omit-frame-pointer"]  # the last -O counts
SUITES = [
    *("tests/contracts/test_kernels.py", "tests/contracts/test_reducers.py"),
    *("tests/syncbn/kernels/test_native.py", "tests/syncbn/ops/test_batch_norm.py"),
    *("tests/syncbn/test_moments.py", "tests/syncbn/comm/test_fingerprint.py"),
    "tests/syncbn/layers/test_residual_and_relu.py",
]
REPORTS = ("Sanitizer", "runtime error:")
# Loads the library as the tests will, and fails where it is another one, or none.
WHICH = """
import sys
from syncbn import _native
assert _native.library is not None and str(_native.LIBRARY) == sys.argv[1], _native.LIBRARY
"""


def check_address(directory: Path) -> str:
    """Run the tests of the native code on a copy whose library looks after every access."""
    for name in ("syncbn", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(REPOSITORY / name, directory / name, ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", directory)
    library = directory / "syncbn" / "_native" / "libsyncbn.so"
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    compile_library(library, "g++", [*SANITIZED, *flags])
    # Python itself knows nothing of the sanitizers, so that they must be loaded before it; and
    # libstdc++ with them, because they look for its functions at the start. Leaks are not looked
    # for: Python leaves thousands of objects to the end of the process, and the library keeps
    # its threads until then.
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so")
    environment = {
        "PYTHONPATH": str(directory),
        "LD_PRELOAD": " ".join(_output("g++", f"-print-file-name={name}") for name in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    _run([sys.executable, "-c", WHICH, str(library)], directory, **environment)
    # What a process writes as it dies would be lost if pytest caught more than Python's own output.
    pytest = [sys.executable, "-m", "pytest", "-q", "--capture=sys"]
    _run([*pytest, *SUITES], directory, **environment)
    return "clean"


def check_thread(directory: Path) -> str:
    """Run the driver and the library with every access checked for one that may race with it."""
    library, program = directory / "libsyncbn.so", directory / "race"
    flags = [*SANITIZED, "-fsanitize=thread"]
    compile_library(library, "g++", flags)
    linked = [f"-I{HERE}", str(DRIVER), str(library), f"-Wl,-rpath,{directory}"]
    _run(["g++", *flags, *linked, "-o", str(program)])
    _run([str(program), "3000"], TSAN_OPTIONS="halt_on_error=1")
    return "clean"


def check_arm64(directory: Path) -> str:
    """Run the driver and the library, compiled for arm64, in an emulator."""
    cxx = shutil.which("aarch64-linux-gnu-g++")
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if cxx is None or qemu is None:
        return "SKIPPED, for want of " + ("qemu-aarch64" if cxx else "aarch64-linux-gnu-g++")
    program = directory / "race"
    sources = [str(source) for source in (*sorted(HERE.glob("*.cpp")), DRIVER)]
    # Static, so that qemu needs no arm64 libraries. arm64 has one level of instructions.
    flags = [*FLAGS, "-Werror", "-static", "-DSYNCBN_LEVEL=kBaseline", f"-I{HERE}"]
    _run([cxx, *flags, *sources, "-o", str(program)])
    _run([qemu, str(program), "300"])
    return "clean"


PARTS: dict[str, Callable[[Path], str]] = {
    "address": check_address,
    "thread": check_thread,
    "arm64": check_arm64,
}


def _run(command: list[str], cwd: Path = REPOSITORY, **environment: str) -> None:
    """Run a command; stop at a failure, and at a report, for a test may get over a rank's death."""
    environment = {**os.environ, **environment}
    result = subprocess.run(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    print(result.stderr, end="", file=sys.stderr)
    if result.returncode != 0 or any(sign in result.stderr for sign in REPORTS):
        sys.exit(f"exit code {result.returncode}, or a report: {' '.join(command)}")


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    """Run the parts that were asked for, each in a directory of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="one part instead of all")
    part = parser.parse_args().part
    for name in [part] if part else PARTS:
        print(f"{name}: compiling and running", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            print(f"{name}: {PARTS[name](Path(directory))}", flush=True)


if __name__ == "__main__":
    main()
