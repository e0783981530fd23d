"""Draws the pictures of the page /jobs in docs/images: python -m tests.support.page_pictures."""

from pathlib import Path
from typing import Any

from tests.support.browser import Chromium, chromium
from tests.support.job_answers import NOW, job
from tests.support.page_jobs import FakeJobs, fake_jobs
from tests.support.processes import REPOSITORY

IMAGES = REPOSITORY / "docs" / "images"
_MINUTE_S = 60.0
# What a small team has: name, owner, state, what it told, minutes since it was submitted.
_JOBS: list[tuple[str, str, str, dict[str, Any], float]] = [
    ("digits-cnn", "anna", "finished", {"epochs": 12}, 190),
    ("digits-mlp", "ben", "finished", {"model.depth": 4}, 171),
    ("digits-cnn", "ben", "failed", {"optim.lr": 2.0}, 152),
    ("digits-cnn-wide", "anna", "finished", {"model.width": 64, "optim.lr": 0.05}, 97),
    ("streets-unet", "cara", "cancelled", {"data.batch_size": 8}, 70),
    *(
        ("norms", "cara", "finished", {"norm": norm, "seed": seed}, 55 - 3 * seed)
        for norm in ("local", "sync")
        for seed in (0, 1, 2)
    ),
    ("digits-whitening", "anna", "running", {"norm": "whitening"}, 3),
    ("streets-unet", "cara", "running", {"data.batch_size": 16}, 2.5),
    ("digits-cnn-wide", "ben", "queued", {"model.width": 128}, 1),
]


def _fill(fake: FakeJobs) -> None:
    for number, (name, owner, state, told, minutes) in enumerate(_JOBS, 1):
        submitted = NOW - minutes * _MINUTE_S
        made = job(number, state, name=name, owner=owner, values=told, submitted=submitted)
        if made["started"] is not None:
            made["started"] = submitted + 2
        if made["ended"] is not None:
            made["ended"] = submitted + 150 + 3.0 * number
        if name == "norms":
            made |= {"sweep": "s4k9x0q2ma", "values": {}, "sweep_values": told}
        if state == "running":
            step = 180 + 90 * (number % 3)
            left_s = 0.1 * (480 - step)
            made["progress"] |= {"step": step, "fraction": step / 480, "time_left_s": left_s}
        fake.add(made)
    fake.jobs["j000000001"]["published"] = [{"model": "digits-cnn", "version": "3"}]


def _take(browser: Chromium, address: str, parts: list[str], file: Path, height: int) -> None:
    with browser.tab("about:blank", color_scheme="light", timezone_id="UTC") as tab:
        tab.page.clock.set_fixed_time(NOW)
        tab.page.set_viewport_size({"width": 1200, "height": height})
        tab.page.goto(address)
        for part in parts:
            tab.page.locator(part).first.wait_for()
        tab.page.screenshot(path=file, animations="disabled")


def main() -> None:
    """Draw jobs.png, of the list, and job.png, of a job with its curves."""
    with chromium() as browser, fake_jobs() as fake:
        _fill(fake)
        address = f"{fake.url}/jobs"
        _take(browser, address, ["#rows tr"], IMAGES / "jobs.png", 860)
        parts = [".line", ".u-legend >> nth=1"]
        _take(browser, f"{address}#j000000001", parts, IMAGES / "job.png", 1000)


if __name__ == "__main__":
    main()
