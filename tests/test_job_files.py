"""The files in docs/jobs start jobs that torchrun and training accept.

Slurm and Kubernetes themselves are not here: stand-ins tell what the script asks of Slurm.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from syncbn.train.config import compose_config
from syncbn.train.run.directory import Result, RunDirectory
from syncbn.train.schema import TrainConfig
from tests.support.processes import REPOSITORY

SLURM = REPOSITORY / "docs" / "jobs" / "slurm.sh"
TRAINJOB = REPOSITORY / "docs" / "jobs" / "trainjob.yaml"

STAND_INS = {
    # Runs the command on two machines, one after the other; options come first, with a dash.
    "srun": """
        while [ "${1#-}" != "$1" ]; do echo "$1" >> srun.options; shift; done
        for machine in 0 1; do SLURM_NODEID=$machine "$@" || code=$?; done
        exit "${code:-0}"
    """,
    "torchrun": """
        printf '%s\\n' "$@" > "torchrun.$SLURM_NODEID"
        [ ! -f result.json ] || cp result.json runs/slurm-42/
        exit "${CODE:-0}"
    """,
    "scontrol": """
        case "$1" in
            show) printf 'host-a\\nhost-b\\n' ;;
            *) echo "$@" > scontrol.told ;;
        esac
    """,
}


def _slurm(at: Path, *overrides: str, code: int = 0) -> int:
    """Run the script as Slurm would, and return its exit code."""
    tools = at / "tools"
    tools.mkdir()
    for name, script in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CODE": str(code),
        "SLURM_SUBMIT_DIR": str(at),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "host-[a-b]",
        "SLURM_CPUS_PER_TASK": "4",
    }
    command = ["bash", str(SLURM), *overrides]
    return subprocess.run(command, cwd=at, env=environment, timeout=20, check=False).returncode


def _accepted(arguments: list[str]) -> tuple[Any, TrainConfig]:
    """Return how torchrun and training understand their arguments."""
    torchrun = get_args_parser().parse_args(arguments)
    assert torchrun.module
    assert torchrun.training_script == "syncbn.train"
    return torchrun, compose_config(torchrun.training_script_args)


def test_slurm_script_starts_one_job_on_both_machines(tmp_path: Path) -> None:
    assert _slurm(tmp_path, "epochs=3", "norm=local") == 0
    for machine in (0, 1):
        arguments = (tmp_path / f"torchrun.{machine}").read_text().splitlines()
        torchrun, job = _accepted(arguments)
        assert (torchrun.nnodes, torchrun.node_rank) == ("2", machine)
        assert (torchrun.master_addr, torchrun.master_port) == ("host-a", 20042)
        assert job.run_dir == str(tmp_path / "runs" / "slurm-42")
        assert (job.epochs, job.norm.name) == (3, "local")
    assert "--kill-on-bad-exit=1" in (tmp_path / "srun.options").read_text()
    assert not (tmp_path / "scontrol.told").exists()


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [("interrupted", 1, "requeue 42\n"), ("failed", 1, None), ("finished", 0, None)],
)
def test_slurm_script_queues_an_interrupted_job_again(
    tmp_path: Path, status: Any, code: int, told: str | None
) -> None:
    run_dir = tmp_path / "runs" / "slurm-42"
    run_dir.mkdir(parents=True)
    # Written as a run does, where the stand-in for torchrun takes it from.
    RunDirectory(run_dir).write_result(Result(status, None, {}, 0, code))
    assert json.loads((run_dir / "result.json").read_text())["status"] == status
    (run_dir / "result.json").rename(tmp_path / "result.json")
    assert _slurm(tmp_path, code=code) == code
    file = tmp_path / "scontrol.told"
    assert (file.read_text() if file.exists() else None) == told


def test_slurm_script_does_not_take_an_earlier_attempt_for_this_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "slurm-42"
    run_dir.mkdir(parents=True)
    RunDirectory(run_dir).write_result(Result("interrupted", None, {}, 0, 143))
    assert _slurm(tmp_path, code=1) == 1  # before the ranks could say why
    assert not (tmp_path / "scontrol.told").exists()


def test_slurm_script_has_time_to_stop_before_it_is_killed() -> None:
    options = [line for line in SLURM.read_text().splitlines() if line.startswith("#SBATCH")]
    (signal,) = [line for line in options if "--signal" in line]
    assert "=TERM@" in signal  # not B:TERM, which the script alone would hear
    # torchrun's 30 s for ranks to stop, and Slurm may be a minute late.
    assert int(signal.rpartition("@")[2]) >= 30 + 60
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --requeue"} < set(options)


def test_slurm_script_satisfies_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, str(SLURM)], check=True, timeout=60)


def test_manifest_starts_one_job_on_both_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    claim, job = yaml.safe_load_all(TRAINJOB.read_text())
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["kind"] == "TrainJob"
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    for name, value in {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "syncbn-node-0-0.syncbn",
        "PET_MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    torchrun, config = _accepted(trainer["args"])
    assert (torchrun.nnodes, torchrun.node_rank, torchrun.nproc_per_node) == ("2", 1, "1")
    assert torchrun.master_addr == "syncbn-node-0-0.syncbn"
    # The run directory lies on the volume that the claim stands for.
    pod = _pod_patch(job)
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert container["name"] == "node"
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert str(config.run_dir).startswith(f"{mount['mountPath']}/")
    assert pod["terminationGracePeriodSeconds"] > 30


def _pod_patch(job: Any) -> Any:
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    return replicated["template"]["spec"]["template"]["spec"]
