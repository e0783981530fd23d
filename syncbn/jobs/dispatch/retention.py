"""Which files of ended jobs are removed, by age, number and size, and never what is published."""

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from syncbn.jobs.job import Footprint
from syncbn.jobs.offer.settings import Retention
from syncbn.jobs.states import ENDED
from syncbn.jobs.store.ledger import Ledger
from syncbn.jobs.workspace import ARRAYS, Workspace

log = logging.getLogger(__name__)


def expired(
    ended: Sequence[Footprint], sizes_bytes: Sequence[int], keep: Retention, now: float
) -> list[Footprint]:
    """Return the jobs of which the files are to be removed.

    Args:
        ended: jobs that have ended, in any order.
        sizes_bytes: of the files of each.
        keep: what is kept.
        now: in Unix seconds.
    """
    removed: list[Footprint] = []
    total_bytes = kept = 0
    newest = sorted(
        zip(ended, sizes_bytes, strict=True),
        key=lambda each: (each[0].ended or 0, each[0].number),
        reverse=True,
    )
    for job, size_bytes in newest:
        if job.is_published:
            continue
        age_s = now - (job.ended or now)
        too_old = keep.days is not None and age_s > keep.days * 86_400
        too_many = keep.jobs is not None and kept >= keep.jobs
        limit_bytes = keep.disk_bytes
        too_large = limit_bytes is not None and total_bytes + size_bytes > limit_bytes
        if too_old or too_many or too_large:
            removed.append(job)
        else:
            kept += 1
            total_bytes += size_bytes
    return removed


def tidy(ledger: Ledger, root: Path, keep: Retention, now: float) -> None:
    """Measure the files of jobs, and remove those of expired ones, which are put away.

    Args:
        ledger: writes that.
        root: of the store.
        keep: what is kept.
        now: in Unix seconds.
    """
    jobs = [job for job in ledger.footprints() if (root / "work" / job.id).is_dir()]
    sizes = {job.id: size_of(root / "work" / job.id) for job in jobs}
    ended = [job for job in jobs if job.state in ENDED]
    for job in expired(ended, [sizes[job.id] for job in ended], keep, now):
        workspace = Workspace.of_job(root, job.id)
        if workspace.is_held():
            continue
        # First what is written, so that nobody looks for files that are being removed.
        if not job.archived:
            ledger.archive(job.id, "its files were removed, as the rules for ended jobs say")
        shutil.rmtree(workspace.directory, ignore_errors=True)
        sizes[job.id] = 0
        log.info("job %s: files removed", job.id)
    for array in (root / ARRAYS).glob("*"):
        if not any(link.exists() for link in array.iterdir()):  # all of their jobs are gone
            shutil.rmtree(array, ignore_errors=True)
    ledger.note_sizes(sizes)


def size_of(directory: Path) -> int:
    """Return how many bytes the files below a directory have; those that vanish count nothing."""
    total_bytes = 0
    for place, _, files in os.walk(directory):
        for file in files:
            with suppress(OSError):
                total_bytes += (Path(place) / file).lstat().st_size
    return total_bytes
