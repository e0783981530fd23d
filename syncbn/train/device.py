"""Where a rank computes: its device, its process group, and whether repetitions may differ."""

import faulthandler
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import (
    Store,  # pyright: ignore[reportPrivateImportUsage] -- documented
)

from syncbn.errors import ConfigError, TrainingError
from syncbn.train.run.reasons import RANK_FAILED
from syncbn.train.schema import Device, LaunchConfig

# What cuBLAS needs to compute the same each time; it reads it when it is first used.
_WORKSPACE, _DETERMINISTIC_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
# How long leaving NCCL's communicator may take, which waits for what the GPU still does.
_LEAVE_TIMEOUT_S = 60


def choose_device(launch: LaunchConfig, local_rank: int, nproc: int) -> torch.device:
    """Return the device of a rank of this machine, and make a GPU the current one.

    Args:
        launch: which devices are wanted, and how many ranks share a GPU.
        local_rank: the rank's number on this machine.
        nproc: how many ranks there are on this machine.

    Raises:
        ConfigError: GPUs are insisted on, and there are too few.
    """
    if launch.device is Device.cpu:
        return torch.device("cpu")
    found, needed = _gpus(launch, nproc)
    if found < needed:
        if launch.device is Device.auto:
            return torch.device("cpu")
        ways = "launch.device=cpu"
        if found > 0:
            ways = f"{_fitting(launch, found)}, {ways}, or, slowly, {_sharing(nproc, found)}"
        raise ConfigError(f"launch.device=cuda needs {needed} GPUs, found {found}; use {ways}")
    device = torch.device("cuda", local_rank // launch.ranks_per_gpu)
    torch.cuda.set_device(device)
    return device


def why_not_on_gpus(launch: LaunchConfig, nproc: int) -> str | None:
    """Return why a machine's GPUs are left alone though they might have been used, or None.

    Args:
        launch: as for `choose_device`.
        nproc: how many ranks there are on this machine.
    """
    if launch.device is not Device.auto:
        return None
    found, needed = _gpus(launch, nproc)
    if not 0 < found < needed:
        return None
    return (
        f"launch.device=auto takes the CPU, because {nproc} ranks need {needed} GPUs and there are "
        f"{found}; to use them, say {_fitting(launch, found)}, or, slowly, "
        f"{_sharing(nproc, found)}"
    )


def _gpus(launch: LaunchConfig, nproc: int) -> tuple[int, int]:
    """Return how many GPUs there are, and how many the ranks need."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return found, math.ceil(nproc / launch.ranks_per_gpu)


def _fitting(launch: LaunchConfig, found: int) -> str:
    return f"launch.nproc={found * launch.ranks_per_gpu}"


def _sharing(nproc: int, found: int) -> str:
    return f"launch.ranks_per_gpu={math.ceil(nproc / found)}"


def choose_backend(device: torch.device, launch: LaunchConfig) -> str:
    """Return the backends of the process group: gloo, and NCCL for GPUs that no ranks share.

    NCCL refuses two ranks on one GPU. Gloo sums a GPU's memory in the host's, which is slow.
    """
    if device.type == "cpu":
        return "gloo"
    alone = launch.ranks_per_gpu == 1 and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if alone else "cpu:gloo,cuda:gloo"


def join_process_group(
    device: torch.device, launch: LaunchConfig, store: Store, rank: int, world_size: int
) -> None:
    """Join the default process group, with NCCL's communicator at once, if there shall be one.

    Waits for other ranks end with an error after `launch.timeout_s`. NCCL's own watchdog, which
    aborts the process instead, gets three times as long: it shall come last.

    Raises:
        TrainingError: the GPUs cannot reach each other by NCCL.
    """
    backend = choose_backend(device, launch)
    with_nccl = "nccl" in backend
    timeout = timedelta(seconds=launch.timeout_s)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if with_nccl else None,
        )
    except dist.DistBackendError as error:
        if not with_nccl:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainingError(
            f"rank {rank}, on {device}: NCCL cannot connect the GPUs of the {world_size} ranks: "
            f"{lines[-1]}; NCCL_DEBUG=INFO in the environment says more, and ranks that share a "
            "GPU need launch.ranks_per_gpu"
        ).because(RANK_FAILED) from error
    if with_nccl:
        assert dist.group.WORLD is not None
        nccl = dist.group.WORLD._get_backend(device)  # pyright: ignore[reportPrivateUsage] -- torch 2.11 has no other way
        nccl._set_default_timeout(3 * timeout)  # pyright: ignore[reportPrivateUsage] -- as above


def leave_process_group(failed: bool) -> None:
    """Leave the default process group, in limited time.

    Args:
        failed: whether this rank failed amid its work, so that others may not come here: NCCL would
            wait for them. The end of the process is the end of its communicator then.
    """
    with_nccl = "nccl" in dist.get_backend_config()
    if with_nccl:
        faulthandler.dump_traceback_later(_LEAVE_TIMEOUT_S, exit=True)
        if failed:
            return
    dist.destroy_process_group()
    if with_nccl:
        faulthandler.cancel_dump_traceback_later()


def compute_deterministically() -> None:
    """Have torch refuse, in this process, operations of which repetitions may differ.

    To be called before a GPU has been computed on.
    """
    os.environ.setdefault(_WORKSPACE, _DETERMINISTIC_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # Which would fill fresh memory, to find those who read it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] -- documented
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
