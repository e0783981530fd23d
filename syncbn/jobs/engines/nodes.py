"""How the ranks of an attempt are spread over the machines of a cluster, and started there."""

from dataclasses import dataclass

from syncbn.jobs.engines.protocol import Attempt
from syncbn.jobs.workspace import Workspace


@dataclass(frozen=True)
class Shares:
    """What each machine gets of an attempt, the same of each.

    Attributes:
        nodes: how many machines.
        ranks: how many ranks a machine has.
        cores: how many cores they take there.
        gpus: how many GPUs.
    """

    nodes: int
    ranks: int
    cores: int
    gpus: int


def shares_of(attempt: Attempt, ranks_per_node: int | None) -> Shares:
    """Return how an attempt is spread, over as few machines as hold the same number of ranks each.

    Args:
        attempt: what is to be started.
        ranks_per_node: at most; None: all ranks go on one machine.
    """
    most = ranks_per_node or attempt.nproc
    nodes = -(-attempt.nproc // most)
    while attempt.nproc % nodes:
        nodes += 1
    return Shares(
        nodes=nodes,
        ranks=attempt.nproc // nodes,
        cores=max(1, -(-attempt.cores_wanted // nodes)),
        gpus=-(-attempt.gpus_wanted // nodes),
    )


def batch_arguments(attempt: Attempt) -> list[str]:
    """Return the arguments of `syncbn.train.launch.batch` for an attempt on one machine."""
    workspace = Workspace(attempt.directory)
    permit, text = workspace.permit(attempt.number)
    threads = max(1, attempt.cores_wanted // attempt.nproc)
    return [
        str(workspace.run.path),
        *("--attempt", str(attempt.number)),
        *("--permit", str(permit), text.strip()),
        *("--threads", str(threads)),
    ]
