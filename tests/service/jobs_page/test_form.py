"""The form for new jobs in a browser: what it posts, counts, refuses, and clones."""

import re

import pytest
from playwright.sync_api import Route, expect

from tests.service.jobs_page.conftest import setting, submit, visit
from tests.support.browser import Chromium, Tab
from tests.support.job_answers import job
from tests.support.page_jobs import FakeJobs


def test_form_posts_what_differs_from_the_defaults(tab: Tab, fake: FakeJobs) -> None:
    visit(tab, fake)
    tab.page.get_by_role("link", name="New job").click()
    expect(tab.page.get_by_role("heading", name="New job")).to_be_focused()
    setting(tab, "name").locator("input").fill("mine")
    setting(tab, "priority").locator("input").fill("-3")
    setting(tab, "norm").locator("select").select_option("local")
    setting(tab, "epochs").locator("input").fill("20")
    setting(tab, "max_steps").locator("input").fill("1000")
    setting(tab, "optim.lr").locator("input").fill("5e-2")
    setting(tab, "optim.nesterov").locator("select").select_option("true")
    setting(tab, "seed").locator("input").fill("7")
    setting(tab, "seed").get_by_role("button", name="Reset seed to 0").click()
    expect(tab.page.locator("#sweep-count")).to_have_text("Makes one job")
    submit(tab)
    expect(tab.page.get_by_role("heading", name="mine")).to_be_visible()
    expect(tab.page).to_have_url(f"{fake.url}/jobs#j000000001")
    [(path, headers, body)] = fake.posts
    assert path == "/v1/jobs"
    assert headers["content-type"] == "application/json"
    assert re.fullmatch("[0-9a-f]{32}", headers["idempotency-key"])
    assert body == {
        "name": "mine",
        "priority": -3,
        "choices": {"norm": "local"},
        "values": {
            "epochs": 20,
            "max_steps": 1000,
            "optim.lr": 0.05,
            "optim.nesterov": True,
        },
    }


def test_any_value_or_choice_becomes_a_list_and_the_jobs_are_counted(
    tab: Tab, fake: FakeJobs
) -> None:
    visit(tab, fake, "new")
    for key in ("norm", "seed", "optim.lr", "numerics.compile"):
        setting(tab, key).get_by_role("button", name=f"Several values of {key}").click()
    setting(tab, "norm").get_by_label("local").check()
    setting(tab, "seed").locator("input").fill("0..2, 10")
    setting(tab, "optim.lr").locator("input").fill("0.05, 0.1")
    setting(tab, "numerics.compile").get_by_label("true").check()
    count = tab.page.locator("#sweep-count")
    expect(count).to_contain_text("Makes 32 jobs: ")
    for part in ("norm (2)", "seed (4)", "optim.lr (2)", "numerics.compile (2)"):
        expect(count).to_contain_text(part)
    tab.page.get_by_role("button", name="Submit 32 jobs").click()
    expect(tab.page.locator("#rows tr")).to_have_count(32)
    expect(tab.page.locator("#sweep")).to_contain_text("Jobs of the sweep s000000001")
    [(_, _, body)] = fake.posts
    assert body == {
        "sweep": {
            "norm": ["sync", "local"],
            "seed": [0, 1, 2, 10],
            "numerics.compile": [True, False],
            "optim.lr": [0.05, 0.1],
        }
    }


def test_settings_follow_the_choice_and_keep_what_was_entered(tab: Tab, fake: FakeJobs) -> None:
    visit(tab, fake, "new")
    setting(tab, "optim.lr").locator("input").fill("0.3")
    setting(tab, "optim.momentum").locator("input").fill("0.8")
    setting(tab, "optim").locator("select").select_option("adamw")
    expect(tab.page.locator('[data-key="optim.momentum"]')).to_have_count(0)
    expect(setting(tab, "optim.lr").locator("input")).to_have_value("0.3")
    setting(tab, "model").locator("select").select_option("mlp")
    setting(tab, "model.hidden").locator("input").fill("64, 32, 16")
    submit(tab)
    expect(tab.page.get_by_role("heading", name="digits-cnn")).to_be_visible()
    assert fake.posts[0][2] == {
        "choices": {"model": "mlp", "optim": "adamw"},
        "values": {"optim.lr": 0.3, "model.hidden": [64, 32, 16]},
    }


@pytest.mark.parametrize(
    ("key", "text", "wrong"),
    [
        ("optim.lr", "0", "0 must be above 0, at most 100"),
        ("optim.lr", "fast", "fast is not a number"),
        ("optim.lr", "", "a value is needed"),
        ("epochs", "1.5", "1.5 is not a whole number"),
        ("epochs", "0", "0 must be from 1 to 10,000"),
        ("launch.nproc", "100000", "100000 must be from 1 to 8"),
        ("data.validation", "1", "1 must be at least 0, below 1"),
        ("name", "a/b", "a/b must be letters, digits, '.', '_' and '-', at most 100"),
    ],
)
def test_wrong_value_is_said_where_it_stands_and_is_not_sent(
    tab: Tab, fake: FakeJobs, key: str, text: str, wrong: str
) -> None:
    visit(tab, fake, "new")
    field = setting(tab, key)
    field.locator("input").fill(text)
    expect(field.locator(".wrong")).to_have_text(wrong)
    expect(field.locator("input")).to_have_attribute("aria-invalid", "true")
    submit(tab)
    expect(field.locator("input")).to_be_focused()
    assert fake.posts == []


def test_sweep_beyond_the_limit_cannot_be_submitted(tab: Tab, fake: FakeJobs) -> None:
    visit(tab, fake, "new")
    seed = setting(tab, "seed")
    seed.get_by_role("button", name="Several values of seed").click()
    seed.locator("input").fill("0..1000")
    expect(tab.page.locator("#sweep-count")).to_contain_text("a sweep may have 1,000 at most")
    expect(tab.page.get_by_role("button", name="Submit 1,001 jobs")).to_be_disabled()
    seed.locator("input").fill("0..999")
    expect(tab.page.get_by_role("button", name="Submit 1,000 jobs")).to_be_enabled()
    seed.locator("input").fill("1, 2, 1")
    expect(seed.locator(".wrong")).to_have_text("1 is there twice")


def test_refusal_of_the_service_is_shown_at_the_setting_it_names(
    browser: Chromium, fake: FakeJobs
) -> None:
    fake.refusal = "optim.lr=0.05: the administrator allows at most 0.01"
    with browser.tab("about:blank") as tab:
        visit(tab, fake, "new")
        setting(tab, "optim.lr").locator("input").fill("0.05")
        submit(tab)
        field = setting(tab, "optim.lr")
        expect(field.locator(".wrong")).to_have_text(
            "optim.lr=0.05: the administrator allows at most 0.01"
        )
        expect(field.locator("input")).to_be_focused()
        field.locator("input").fill("0.01")
        expect(field.locator(".wrong")).to_be_hidden()
        submit(tab)
        expect(tab.page.get_by_role("heading", name="digits-cnn")).to_be_visible()


def test_request_whose_answer_was_lost_is_repeated_with_the_same_key(
    browser: Chromium, fake: FakeJobs
) -> None:
    sent: list[str] = []

    def lose(route: Route) -> None:
        sent.append(route.request.headers["idempotency-key"])
        if len(sent) == 1:
            route.abort()
        else:
            route.fallback()

    with browser.tab("about:blank") as tab:
        visit(tab, fake, "new")
        tab.page.route("**/v1/jobs", lose)
        submit(tab)
        expect(tab.page.get_by_role("alert").filter(visible=True)).to_contain_text("not reachable")
        submit(tab)
        expect(tab.page.get_by_role("heading", name="digits-cnn")).to_be_visible()
        assert len(sent) == 2
        assert sent[0] == sent[1]
        tab.page.get_by_role("link", name="Clone").click()
        submit(tab)
        expect(tab.page).to_have_url(f"{fake.url}/jobs#j000000002")
        assert sent[2] != sent[0]


def test_earlier_job_is_cloned_and_edited(tab: Tab, fake: FakeJobs) -> None:
    earlier = job(
        1,
        "failed",
        name="first",
        choices={"norm": "local", "optim": "adamw"},
        values={"optim.lr": 0.3, "epochs": 5, "gone.key": 1},
        sweep="s1",
        sweep_values={"seed": 4, "data": "synthetic"},
        priority=2,
        publish="digits",
    )
    fake.add(earlier)
    visit(tab, fake, "j000000001")
    tab.page.get_by_role("link", name="Clone").click()
    expect(tab.page.get_by_role("heading", name="New job like first")).to_be_focused()
    expect(tab.page.get_by_text("without gone.key, which are not offered")).to_be_visible()
    setting(tab, "optim.lr").locator("input").fill("0.03")
    submit(tab)
    expect(tab.page).to_have_url(f"{fake.url}/jobs#j000000002")
    assert fake.posts[0][2] == {
        "name": "first",
        "priority": 2,
        "publish": "digits",
        "choices": {"norm": "local", "optim": "adamw", "data": "synthetic"},
        "values": {"optim.lr": 0.03, "epochs": 5, "seed": 4},
    }


def test_settings_are_found_by_name_and_by_help(tab: Tab, fake: FakeJobs) -> None:
    visit(tab, fake, "new")
    visible = tab.page.locator(".sections .field").filter(visible=True)
    tab.page.get_by_label("Find").fill("gradients")
    expect(visible).to_have_count(1)
    expect(visible).to_contain_text("optim.clip_norm")
    tab.page.get_by_label("Find").fill("")
    setting(tab, "epochs").locator("input").fill("3")
    tab.page.get_by_label("Only what differs").check()
    expect(visible).to_have_count(1)
    expect(visible).to_contain_text("epochs")
