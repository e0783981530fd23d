"""What holds in all views of the page /jobs: phone, keyboard, names, policy, key."""

import sys
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import expect

from service.auth import Keys
from tests.service.jobs_page.conftest import row, visit, wait_for_view
from tests.support.browser import Chromium, Tab
from tests.support.job_answers import job
from tests.support.page_jobs import FakeJobs, fake_jobs
from tests.support.processes import run

MARKUP = "<img src=x onerror=document.title='owned'>"
VIEWS = ["", "new", "j000000001", "compare/j000000001,j000000002"]
# Whatever can be used must be called something.
_NAMELESS = """() => [...document.querySelectorAll("input, select, button, a")]
  .filter((each) => each.checkVisibility())
  .filter((each) => !(each.labels?.length || each.ariaLabel || each.textContent.trim()))
  .map((each) => each.outerHTML)"""


def _fill(fake: FakeJobs) -> None:
    fake.add(
        job(1, "running", name="long" * 20, values={"optim.lr": 0.05}, attempt=2),
        job(2, "failed", reason="because" * 40, owner="somebody-with-a-name"),
    )


@pytest.mark.parametrize("place", VIEWS)
def test_views_fit_a_phone(browser: Chromium, fake: FakeJobs, place: str) -> None:
    _fill(fake)
    with browser.tab("about:blank", width=360) as tab:
        visit(tab, fake, place)
        wait_for_view(tab)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.complaints == []


@pytest.mark.parametrize("place", VIEWS)
def test_all_that_can_be_used_has_a_name(tab: Tab, fake: FakeJobs, place: str) -> None:
    _fill(fake)
    visit(tab, fake, place)
    wait_for_view(tab)
    assert tab.page.evaluate(_NAMELESS) == []


def test_job_is_found_opened_and_cancelled_from_the_keyboard(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"), job(2, "running", name="second"))
    visit(tab, fake)
    expect(tab.page.locator("#rows tr")).to_have_count(2)
    tab.page.get_by_role("link", name="second").focus()
    tab.page.keyboard.press("ArrowDown")
    expect(tab.page.get_by_role("link", name="first")).to_be_focused()
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_role("heading", name="first")).to_be_focused()
    for _ in range(2):
        tab.page.keyboard.press("Tab")
    expect(tab.page.get_by_role("button", name="Cancel", exact=True)).to_be_focused()
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_role("button", name="Back")).to_be_focused()
    tab.page.keyboard.press("Shift+Tab")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator(".head .state")).to_have_text("cancelled")
    tab.page.go_back()
    expect(tab.page.get_by_role("heading", name="Jobs")).to_be_focused()
    expect(row(tab, "first")).to_contain_text("cancelled")


def test_what_the_service_says_is_never_taken_for_markup(tab: Tab, fake: FakeJobs) -> None:
    fake.add(
        job(1, "finished", name=MARKUP, owner=MARKUP, reason=MARKUP, values={"epochs": MARKUP}),
        job(2, "finished", name=MARKUP, published=[{"model": MARKUP, "version": MARKUP}]),
    )
    fake.logs["j000000001"] = f"{MARKUP}\n".encode()
    for place in VIEWS:
        visit(tab, fake, place)
        wait_for_view(tab)
        expect(tab.page.locator("img")).to_have_count(1)  # the icon
        assert tab.page.title() != "owned"


def test_policy_of_the_page_is_enforced(browser: Chromium, fake: FakeJobs) -> None:
    _fill(fake)
    with browser.tab("about:blank") as tab:
        visit(tab, fake, "j000000001")
        expect(tab.page.locator(".u-legend").first).to_be_visible()
        assert tab.complaints == []
        tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=color:red>x')")
        assert any("style-src 'self'" in text for text in tab.complaints), tab.complaints


def test_key_is_asked_for_and_sent_with_every_request(browser: Chromium, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made = run([sys.executable, "-m", "service.keys", str(file), "--role", "admin"], tmp_path)
    key = made.stdout.split()[0]
    with fake_jobs(Keys(file)) as fake, browser.tab("about:blank") as tab:
        fake.add(job(1, "running", name="first"))
        visit(tab, fake)
        field = tab.page.get_by_label("API key")
        expect(field).to_be_visible()
        refused = httpx2.get(f"{fake.url}/v1/jobs").json()["error"]
        expect(tab.page.locator("#key-hint")).to_contain_text(refused)
        assert fake.streams == []
        field.fill(key)
        field.press("Enter")
        expect(row(tab, "first")).to_be_visible()
        expect(field).to_be_hidden()
        fake.make_progress("j000000001", 400)
        expect(row(tab, "first")).to_contain_text("step 400")
        tab.page.get_by_role("link", name="first").click()
        expect(tab.page.locator(".line").first).to_be_visible()
        assert tab.strangers == []
