"""A browser, jobs that are made up, and what tests of the page /jobs do in all its views."""

import re
from collections.abc import Generator

import pytest
from playwright.sync_api import Locator, expect

from tests.support.browser import Chromium, Tab, chromium
from tests.support.page_jobs import FakeJobs, fake_jobs


@pytest.fixture(scope="package")
def browser() -> Generator[Chromium]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def fake() -> Generator[FakeJobs]:
    with fake_jobs() as fake:
        yield fake


@pytest.fixture
def tab(browser: Chromium) -> Generator[Tab]:
    """A tab in which nothing goes wrong; tests in which something does open their own."""
    with browser.tab("about:blank") as tab:
        yield tab
        assert tab.complaints == []
        assert tab.strangers == []


def visit(tab: Tab, fake: FakeJobs, place: str = "") -> None:
    """Open a view by what stands behind the # of its address."""
    tab.page.goto(f"{fake.url}/jobs#{place}" if place else f"{fake.url}/jobs")


def wait_for_view(tab: Tab) -> None:
    """Wait until the view that was opened shows what it is for."""
    shown = tab.page.locator("#rows tr, .field, .u-legend").filter(visible=True)
    expect(shown.first).to_be_visible()


def row(tab: Tab, name: str) -> Locator:
    """Return the row of the list with a job of this name."""
    link = tab.page.get_by_role("link", name=name, exact=True)
    return tab.page.locator("#rows tr").filter(has=link)


def setting(tab: Tab, key: str) -> Locator:
    """Return a setting of the form, whose section is unfolded if it has to be."""
    field = tab.page.locator(f'.field[data-key="{key}"]')
    field.wait_for(state="attached")
    section = tab.page.locator("details", has=field)
    if section.count() and section.get_attribute("open") is None:
        section.locator("summary").click()
    return field


def submit(tab: Tab) -> None:
    """Press the form's button."""
    tab.page.get_by_role("button", name=re.compile("^Submit")).click()
