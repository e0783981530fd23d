"""The list of jobs in a browser: narrowed, paged, selected, kept current by events."""

from playwright.sync_api import expect

from tests.service.jobs_page.conftest import row, visit
from tests.support.browser import Chromium, Tab
from tests.support.job_answers import job
from tests.support.page_jobs import FakeJobs

# A headless browser shows all its tabs, always.
_LOOK = """seen => {
  Object.defineProperty(document, "visibilityState", { value: seen, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_list_shows_state_reason_progress_and_accuracy(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "failed", name="bad"), job(2, "running", name="good"), job(3, name="next"))
    visit(tab, fake)
    rows = tab.page.locator("#rows tr")
    expect(rows).to_have_count(3)
    expect(rows.locator("th a")).to_have_text(["next", "good", "bad"])
    expect(row(tab, "next")).to_contain_text("queued")
    expect(row(tab, "next")).to_contain_text("2 cores, 1 free; third in line")
    expect(row(tab, "good")).to_contain_text("step 180 of 480, 42 s left")
    bar = row(tab, "good").get_by_role("progressbar", name="progress of good")
    expect(bar).to_have_attribute("aria-valuenow", "38")
    accuracy = fake.jobs["j000000002"]["metrics"]["val_accuracy"]
    expect(row(tab, "good").locator("td.number")).to_have_text(f"{100 * accuracy:.1f}%")
    expect(row(tab, "bad")).to_contain_text("the loss is nan at step 37")
    assert tab.page.title() == "Jobs, syncbn"


def test_list_is_narrowed_by_state_text_and_name_and_the_address_keeps_it(
    tab: Tab, fake: FakeJobs
) -> None:
    fake.add(job(1, "failed", name="bad"), job(2, "running", name="good"), job(3, name="good"))
    visit(tab, fake)
    rows = tab.page.locator("#rows tr")
    expect(tab.page.get_by_role("button", name="failed 1")).to_be_visible()
    tab.page.get_by_role("button", name="running 1").click()
    expect(rows).to_have_count(1)
    expect(tab.page.locator("#announcement")).to_have_text("1 job")
    expect(tab.page).to_have_url(f"{fake.url}/jobs#?state=running")
    tab.page.reload()
    expect(tab.page.get_by_role("button", name="running 1")).to_have_attribute(
        "aria-pressed", "true"
    )
    expect(rows).to_have_count(1)
    tab.page.get_by_role("button", name="All 3").click()
    expect(rows).to_have_count(3)
    tab.page.get_by_label("Search").fill("is nan")
    expect(rows).to_have_count(1)
    tab.page.get_by_label("Search").fill("")
    tab.page.get_by_label("Name").fill("good")
    expect(rows).to_have_count(2)
    expect(tab.page).to_have_url(f"{fake.url}/jobs#?name=good")
    tab.page.get_by_label("Owner").fill("nobody")
    expect(tab.page.locator("#list-state")).to_have_text("No job is like that.")


def test_change_of_a_state_is_seen_at_once_and_moves_no_focus(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"), job(2, name="second"))
    visit(tab, fake)
    link = tab.page.get_by_role("link", name="first")
    link.focus()
    fake.make_progress("j000000001", 400)
    expect(row(tab, "first")).to_contain_text("step 400 of 480")
    fake.change("j000000001", "finished")
    expect(row(tab, "first")).to_contain_text("finished")
    expect(tab.page.get_by_role("button", name="finished 1")).to_be_visible()
    fake.submit({"name": "third"})
    expect(tab.page.locator("#rows th a")).to_have_text(["third", "second", "first"])
    expect(link).to_be_focused()


def test_stream_that_was_cut_goes_on_after_the_last_event(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"))
    visit(tab, fake)
    expect(row(tab, "first")).to_be_visible()
    fake.make_progress("j000000001", 240)
    expect(row(tab, "first")).to_contain_text("step 240")
    fake.cut()
    fake.change("j000000001", "paused")
    expect(row(tab, "first")).to_contain_text("paused")
    assert fake.streams == ["0", "1"]
    expect(tab.page.locator("#connection")).to_be_hidden()


def test_lost_connection_is_said_until_it_stands_again(browser: Chromium, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"))
    with browser.tab("about:blank") as tab:
        visit(tab, fake)
        expect(row(tab, "first")).to_be_visible()
        expect(tab.page.locator("#connection")).to_be_hidden()
        tab.page.route("**/v1/events", lambda route: route.abort())
        fake.cut()
        expect(tab.page.locator("#connection")).to_be_visible()
        tab.page.unroute("**/v1/events")
        expect(tab.page.locator("#connection")).to_be_hidden()


def test_page_that_nobody_looks_at_holds_no_connection(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"))
    visit(tab, fake)
    expect(row(tab, "first")).to_be_visible()
    with tab.page.expect_event("requestfailed", lambda each: each.url.endswith("/v1/events")):
        tab.page.evaluate(_LOOK, "hidden")
    fake.change("j000000001", "finished")
    with tab.page.expect_request("**/v1/events"):
        tab.page.evaluate(_LOOK, "visible")
    expect(row(tab, "first")).to_contain_text("finished")
    expect(tab.page.locator("#connection")).to_be_hidden()


def test_thousands_of_jobs_are_shown_a_page_at_a_time(tab: Tab, fake: FakeJobs) -> None:
    fake.add(*(job(number, "finished", name=f"job-{number}") for number in range(1, 5001)))
    visit(tab, fake)
    rows = tab.page.locator("#rows tr")
    expect(rows).to_have_count(50)
    expect(tab.page.locator("#list-summary")).to_have_text("5,000 jobs")
    expect(rows.first).to_contain_text("job-5000")
    tab.page.get_by_role("button", name="Older").click()
    expect(rows.first).to_contain_text("job-4950")
    tab.page.get_by_role("button", name="Older").click()
    expect(rows.first).to_contain_text("job-4900")
    expect(rows).to_have_count(50)
    tab.page.get_by_role("button", name="Newer").click()
    expect(rows.first).to_contain_text("job-4950")
    tab.page.get_by_role("button", name="Newest").click()
    expect(rows.first).to_contain_text("job-5000")
    expect(tab.page.get_by_role("button", name="Newer")).to_be_disabled()


def test_selection_is_kept_over_pages_and_acts_on_all_that_are_able(
    tab: Tab, fake: FakeJobs
) -> None:
    fake.add(*(job(number, name=f"job-{number}") for number in range(1, 61)))
    fake.add(job(61, "finished", name="done"))
    visit(tab, fake)
    tab.page.get_by_role("checkbox", name="Select done").check()
    tab.page.get_by_role("checkbox", name="Select job-60").check()
    tab.page.get_by_role("checkbox", name="Select job-58").click(modifiers=["Shift"])
    tab.page.get_by_role("button", name="Older").click()
    tab.page.get_by_role("checkbox", name="Select job-1", exact=True).check()
    chosen = tab.page.locator("#chosen")
    expect(chosen).to_contain_text("5 jobs selected")
    chosen.get_by_role("button", name="Cancel 4").click()
    dialog = tab.page.get_by_role("dialog", name="Cancel 4 jobs?")
    dialog.get_by_role("button", name="Cancel 4 jobs").click()
    expect(dialog).to_be_hidden()
    paths = sorted(path for path, _, _ in fake.posts)
    assert paths == [f"/v1/jobs/j{n:09d}/cancel" for n in (1, 58, 59, 60)]
    expect(row(tab, "job-1")).to_contain_text("cancelled")
    chosen.get_by_role("button", name="Select none").click()
    expect(chosen).to_be_hidden()


def test_missing_dispatcher_is_said(tab: Tab, fake: FakeJobs) -> None:
    fake.dispatcher = False
    visit(tab, fake)
    expect(tab.page.get_by_text("No dispatcher is at work")).to_be_visible()
    expect(tab.page.locator("#list-state")).to_have_text("There is no job yet.")
