"""Which cores and GPUs a job gets."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from syncbn.jobs.job import Job


@dataclass(frozen=True)
class Capacity:
    """What a dispatcher gives to jobs.

    An engine with a queue of its own gives cores and GPUs itself. Then `cores` are as many as jobs
    may have at a time, none if there is no such limit, and a job has GPUs without asking for them
    if there are enough `gpus` for its ranks.

    Attributes:
        cores: the numbers of the cores, as the operating system counts them; one that is there
            several times is shared by as many jobs.
        gpus: the numbers of the GPUs, as CUDA counts them.
        jobs_per_gpu: how many jobs may share a GPU.
    """

    cores: tuple[int, ...]
    gpus: tuple[int, ...] = ()
    jobs_per_gpu: int = 1


@dataclass(frozen=True)
class Sharing:
    """How a capacity is shared among those who want it.

    Attributes:
        aging_s: how many seconds of waiting count as much as one step of priority.
        patience_s: how long smaller jobs may go before one for which there is no room.
        cores_per_owner: how many cores the jobs of one owner may have at a time; None: all.
    """

    aging_s: float = 600.0
    patience_s: float = 60.0
    cores_per_owner: int | None = None


@dataclass(frozen=True)
class Free:
    """What of a capacity no job has."""

    cores: tuple[int, ...]
    gpus: tuple[int, ...]

    def place(self, cores: int, gpus: int) -> dict[str, list[int]] | None:
        """Return cores and GPUs for a job, those that are most free, or None if they lack."""
        distinct = tuple(dict.fromkeys(self.gpus))
        if cores > len(self.cores) or gpus > len(distinct):
            return None
        left, chosen = Counter(self.cores), list[int]()
        for _ in range(cores):
            core = max(+left, key=lambda each: (-chosen.count(each), left[each]))
            chosen.append(core)
            left[core] -= 1
        return {"cores": chosen, "gpus": list(distinct[:gpus])}

    def without(self, placement: Mapping[str, Sequence[int]]) -> "Free":
        """Return what is left once a job has its cores and GPUs.

        A dispatcher that was started again with less may have given what it has not got any more.
        """
        cores, gpus = list(self.cores), list(self.gpus)
        for free, taken in ((cores, "cores"), (gpus, "gpus")):
            for each in placement.get(taken, ()):
                if each in free:
                    free.remove(each)
        return Free(tuple(cores), tuple(gpus))


def free_of(capacity: Capacity, active: Iterable[Job]) -> Free:
    """Return what the active jobs leave of a capacity."""
    gpus = tuple(gpu for gpu in capacity.gpus for _ in range(capacity.jobs_per_gpu))
    free = Free(capacity.cores, gpus)
    for job in active:
        free = free.without(job.placement)
    return free


def rank(queued: float, priority: int, aging_s: float) -> float:
    """Return the place of a job in the queue; the lowest comes first.

    Waiting `aging_s` counts as much as one step of priority, so that no job waits for ever: one
    that comes later by `aging_s` times the difference of their priorities does not overtake it. As
    all jobs age alike, the number stays as it is.

    Args:
        queued: since when the job waits, in Unix seconds.
        priority: of the job.
        aging_s: in seconds.
    """
    return queued - priority * aging_s
