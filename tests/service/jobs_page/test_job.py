"""A job's page in a browser: curves, configuration, history, and what can be done with it."""

import re

from playwright.sync_api import expect

from tests.service.jobs_page.conftest import visit
from tests.support.browser import Chromium, Tab
from tests.support.job_answers import job
from tests.support.page_jobs import FakeJobs


def test_job_shows_configuration_attempts_and_history(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first", values={"optim.lr": 0.05}, attempt=2))
    visit(tab, fake, "j000000001")
    expect(tab.page.get_by_role("heading", name="first")).to_be_visible()
    config = tab.page.locator(".config tbody tr")
    expect(config).to_have_count(1)
    assert config.inner_text().split() == ["optim.lr", "0.05", "0.1"]
    tab.page.get_by_label("Defaults too").check()
    expect(config.filter(has_text=re.compile("^epochs"))).to_contain_text("12")
    attempts = tab.page.locator(".past tbody tr")
    expect(attempts).to_have_count(2)
    expect(attempts.first).to_contain_text("rank_killed: rank 1 was killed by signal 9")
    history = tab.page.locator(".history li .state")
    expect(history).to_have_text(["submitted", "queued", "starting", "running"])
    assert tab.page.title() == "first: running, syncbn"


def test_curves_grow_while_the_job_trains(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"))
    visit(tab, fake, "j000000001")
    loss, accuracy = tab.page.locator(".picture").nth(0), tab.page.locator(".picture").nth(1)
    expect(loss).to_have_attribute("aria-label", re.compile("^loss of first over epochs; last"))
    last = f"validation {100 * fake.epochs['j000000001'][-1]['val_accuracy']:.1f}%"
    expect(accuracy).to_have_attribute("aria-label", re.compile(re.escape(last)))
    expect(loss.locator("canvas")).to_be_visible()
    fake.add_epoch("j000000001")
    newest = f"validation {100 * fake.epochs['j000000001'][-1]['val_accuracy']:.1f}%"
    assert newest != last
    expect(accuracy).to_have_attribute("aria-label", re.compile(re.escape(newest)))
    tab.page.get_by_text("Values of each epoch").click()
    expect(tab.page.locator(".values tbody tr")).to_have_count(5)
    tab.page.get_by_label("Horizontal axis").select_option("step")
    expect(loss).to_have_attribute("aria-label", re.compile("^loss of first over steps"))
    tab.page.get_by_label("What the second chart shows").select_option("lr")
    expect(accuracy).to_have_attribute("aria-label", re.compile("^lr of first"))


def test_curve_is_hidden_and_shown_from_the_keyboard(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "finished"))
    visit(tab, fake, "j000000001")
    button = tab.page.get_by_role("button", name="validation").first
    button.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "false")
    button.press(" ")
    expect(button).to_have_attribute("aria-pressed", "true")


def test_job_follows_its_states_and_offers_what_they_allow(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, name="first"))
    visit(tab, fake, "j000000001")
    buttons = tab.page.locator(".head .buttons").locator("button, a")
    expect(buttons).to_have_text(["Pause", "Cancel", "Clone"])
    fake.change("j000000001", "finished")
    expect(tab.page.locator("#announcement")).to_have_text("first is finished")
    expect(buttons).to_have_text(["Resume", "Publish", "Archive", "Clone"])
    expect(tab.page.locator(".history li").last).to_contain_text("finished")


def test_cancelling_asks_first(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"))
    visit(tab, fake, "j000000001")
    cancel = tab.page.get_by_role("button", name="Cancel", exact=True)
    cancel.click()
    dialog = tab.page.get_by_role("dialog", name="Cancel first?")
    expect(dialog.get_by_role("button", name="Back")).to_be_focused()
    tab.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(cancel).to_be_focused()
    assert fake.posts == []
    cancel.click()
    dialog.get_by_role("button", name="Cancel the job").click()
    expect(tab.page.locator(".head .state")).to_have_text("cancelled")
    assert [path for path, _, _ in fake.posts] == ["/v1/jobs/j000000001/cancel"]


def test_publishing_leads_to_the_model_on_the_page_of_predictions(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "finished", name="first"))
    visit(tab, fake, "j000000001")
    tab.page.get_by_role("button", name="Publish").click()
    field = tab.page.get_by_label("Name of the model")
    expect(field).to_be_focused()
    expect(field).to_have_value("first")
    field.fill("digits")
    field.press("Enter")
    link = tab.page.get_by_role("link", name="digits, version 1")
    expect(link).to_have_attribute("href", "./#digits")
    assert fake.posts[0][2] == {"model": "digits"}


def test_finished_job_goes_on_for_more_epochs(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "finished", name="first"))
    visit(tab, fake, "j000000001")
    tab.page.get_by_role("button", name="Resume").click()
    epochs = tab.page.get_by_label("Epochs in all")
    expect(epochs).to_have_value("24")
    epochs.fill("20")
    tab.page.get_by_role("button", name="Go on").click()
    expect(tab.page.locator(".head .state")).to_have_text("queued")
    assert fake.posts[0][2] == {"values": {"epochs": 20}}
    fake.change("j000000001", "running")
    expect(tab.page.locator(".head .state")).to_have_text("running")


def test_refused_action_is_said(browser: Chromium, fake: FakeJobs) -> None:
    fake.add(job(1, "running", name="first"))
    with browser.tab("about:blank") as tab:
        visit(tab, fake, "j000000001")
        expect(tab.page.get_by_role("button", name="Pause")).to_be_visible()
        error = {"error": "pause: the job has just ended"}
        tab.page.route("**/pause", lambda route: route.fulfill(json=error, status=409))
        tab.page.get_by_role("button", name="Pause").click()
        expect(tab.page.locator("#problem")).to_have_text("pause: the job has just ended")


def test_job_that_does_not_exist_is_said(browser: Chromium, fake: FakeJobs) -> None:
    with browser.tab("about:blank") as tab:
        visit(tab, fake, "nothing")
        expect(tab.page.locator("#problem")).to_have_text("there is no job nothing")


def test_request_that_came_to_nothing_is_told(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "finished", name="first"))
    visit(tab, fake, "j000000001")
    expect(tab.page.get_by_role("heading", name="first")).to_be_visible()
    time = fake.jobs["j000000001"]["submitted"] + 900
    asked = {"action": "resume", "arguments": {"values": {"epochs": 3}}, "by": "anna"}
    refused = {"text": "resume was refused: epochs=3: it has trained for 12"}
    events = [
        {"time": time, "kind": "request", "data": asked},
        {"time": time + 1, "kind": "note", "data": refused},
    ]
    fake.change("j000000001", events=events)
    expect(tab.page.locator(".head .warning")).to_have_text(refused["text"])
    history = tab.page.locator(".history li")
    expect(history.nth(-2)).to_contain_text('resume {"values":{"epochs":3}} by anna')


def test_short_address_leads_to_a_job(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "finished", name="first"))
    tab.page.goto(f"{fake.url}/jobs/j000000001")
    expect(tab.page.get_by_role("heading", name="first")).to_be_visible()
    expect(tab.page).to_have_url(f"{fake.url}/jobs#j000000001")
