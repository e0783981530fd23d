"""Goes on with a run where a batch system starts processes: a supervisor, or torchruns.

`python -m syncbn.train.launch.batch RUN_DIR --attempt N --permit FILE TEXT` becomes the supervisor
of the run, unless the permit says otherwise. With `--nodes`, started on each of several machines,
it becomes torchrun, and rank 0 looks at the permit. SIGTERM has the ranks write their state, also
one that comes while this process is still loading.
"""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from syncbn.errors import SyncBNError
from syncbn.train.launch.console import append_to, header
from syncbn.train.launch.permit import check_permit, permit_variables
from syncbn.train.launch.variables import is_secret

# torchrun ends ranks 30 s after it was told to stop; before that they say what keeps them.
_STOP_S = 25
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Go on with a run to its end, and return the exit code."""
    options = _parser().parse_args(arguments)
    run_dir = options.run_dir.resolve()
    if options.with_parent:
        _end_with_parent()
    for name in [name for name in os.environ if is_secret(name)]:
        del os.environ[name]  # of the cluster's, most likely
    # Which batch systems set as they like, and numpy heeds when it is imported.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if options.nodes > 1:
        _be_torchrun(options, run_dir)
    # The supervisor lets it through once it can heed it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    from syncbn.train.launch.preload import preload_for  # brings torch, which takes seconds
    from syncbn.train.launch.supervisor import supervise
    from syncbn.train.run.directory import RunDirectory

    run = RunDirectory(run_dir)
    try:
        lock = run.lock()
        check_permit(*options.permit)
        _begin_console(options)
        preload_for(run.read_config())
    except (SyncBNError, OSError) as error:
        print(f"syncbn-train: {error}", file=sys.stderr)
        return 2
    return supervise(run, lock)


def _be_torchrun(options: argparse.Namespace, run_dir: Path) -> NoReturn:
    """Become the torchrun of one of several machines."""
    if options.node_rank == 0:
        _begin_console(options)
    elif options.console is not None:
        append_to(str(options.console), "")
    os.environ.update(permit_variables(*options.permit))
    os.execv(  # noqa: S606 -- our own command
        sys.executable,
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nnodes={options.nodes}",
            f"--node-rank={options.node_rank}",
            f"--nproc-per-node={options.ranks}",
            f"--master-addr={options.master_addr}",
            f"--master-port={options.master_port}",
            *("-m", "syncbn.train", f"run_dir={_quoted(run_dir)}"),
            f"launch.stop_timeout_s={_STOP_S}",
        ],
    )


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the process ends that has started this one."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


def _begin_console(options: argparse.Namespace) -> None:
    """Write the line that begins an attempt, to where this process prints from now on."""
    line = header(options.attempt)
    if options.console is not None:
        append_to(str(options.console), line)
    else:
        print(line, flush=True)


def _quoted(path: Path) -> str:
    """Return a path as a value on the command line, whatever is in it."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m syncbn.train.launch.batch")
    parser.add_argument("run_dir", type=Path, help="the run's directory, with its configuration")
    parser.add_argument("--attempt", type=int, required=True, help="its number")
    parser.add_argument(
        "--permit",
        nargs=2,
        required=True,
        metavar=("FILE", "TEXT"),
        help="a file, and what it must say once the run is locked",
    )
    parser.add_argument("--console", type=Path, help="gets what is printed, at its end")
    parser.add_argument("--threads", type=int, default=1, help="of each rank; default: 1")
    parser.add_argument(
        "--with-parent", action="store_true", help="stop when the process ends that started it"
    )
    several = parser.add_argument_group("of one of several machines")
    several.add_argument("--nodes", type=int, default=1, help="how many there are; default: 1")
    several.add_argument(
        "--node-rank",
        type=int,
        default=os.environ.get("SLURM_NODEID", "0"),
        help="which one this is; default: what Slurm says",
    )
    several.add_argument("--ranks", type=int, default=1, help="of each machine; default: 1")
    several.add_argument("--master-addr", default="127.0.0.1", help="of the first machine")
    several.add_argument("--master-port", type=int, default=29500, help="free on that machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
