"""From the form to a prediction, with the service itself and jobs that train."""

import re
from collections.abc import Generator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.service.jobs_page.conftest import row, setting, submit
from tests.support.browser import Chromium
from tests.support.serving import Service, served

# Processes start, and a machine may have much else to do.
_PATIENCE_MS = 180_000


@pytest.fixture
def service(browser: Chromium, tmp_path: Path) -> Generator[Service]:
    """A service with a dispatcher; after the browser, without which none is needed."""
    (tmp_path / "models").mkdir()
    options = ("--jobs", str(tmp_path / "jobs"), "--dispatcher-cores", "2", "--poll-s", "0.1")
    with served(tmp_path / "models", tmp_path / "log", *options) as service:
        yield service


def test_sweep_is_submitted_watched_compared_and_published(
    browser: Chromium, service: Service
) -> None:
    with browser.tab(f"{service.url}/jobs") as tab:
        page = tab.page
        expect(page.locator("#list-state")).to_have_text("There is no job yet.")
        page.get_by_role("link", name="New job").click()
        page.locator(".field").first.wait_for(timeout=_PATIENCE_MS)
        setting(tab, "name").locator("input").fill("first")
        setting(tab, "epochs").locator("input").fill("2")
        setting(tab, "launch.nproc").locator("input").fill("1")
        seed = setting(tab, "seed")
        seed.get_by_role("button", name="Several values of seed").click()
        seed.locator("input").fill("0, 1")
        submit(tab)
        expect(page.locator("#rows tr")).to_have_count(2)
        page.get_by_role("link", name="first-1").click()

        state = page.locator(".head .state")
        expect(state).to_have_text("finished", timeout=_PATIENCE_MS)
        accuracy = page.locator(".picture").nth(1)
        expect(accuracy).to_have_attribute("aria-label", re.compile(r"validation \d+\.\d%"))
        expect(page.locator(".line", has_text="epoch 2/2")).to_have_count(1)
        expect(page.locator(".history .state")).to_have_text(
            ["submitted", "queued", "starting", "running", "finished"]
        )
        changed = page.locator(".config tbody th")
        expect(changed).to_have_text(["epochs", "launch.nproc"])

        page.get_by_role("button", name="Publish").click()
        page.get_by_label("Name of the model").fill("digits")
        page.keyboard.press("Enter")
        link = page.get_by_role("link", name="digits, version 1")
        link.click(timeout=_PATIENCE_MS)
        expect(page.get_by_role("radio", name="digits")).to_be_checked(timeout=_PATIENCE_MS)

        page.get_by_role("link", name="Jobs").click()
        expect(row(tab, "first-2")).to_contain_text("finished", timeout=_PATIENCE_MS)
        page.get_by_label("Select all jobs on this page").check()
        page.get_by_role("button", name="Compare").click()
        means = page.locator("section[aria-labelledby=groups-title] tbody tr")
        expect(means).to_contain_text(re.compile(r"\d+\.\d ± \d+\.\d%"))
        assert tab.complaints == []
        assert tab.strangers == []
