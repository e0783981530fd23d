"""Jobs beside each other in a browser: what differs, and means over seeds."""

import re

from playwright.sync_api import expect

from tests.service.jobs_page.conftest import visit
from tests.support.browser import Tab
from tests.support.job_answers import job
from tests.support.page_jobs import FakeJobs


def _sweep(fake: FakeJobs) -> list[str]:
    for number, (norm, seed) in enumerate([(n, s) for n in ("sync", "local") for s in (0, 1, 2)]):
        values = {"norm": norm, "seed": seed}
        fake.add(job(number + 1, "finished", name="norms", sweep="s1", sweep_values=values))
    return list(fake.jobs)


def test_chosen_jobs_are_compared_by_what_differs(tab: Tab, fake: FakeJobs) -> None:
    ids = _sweep(fake)
    visit(tab, fake)
    tab.page.get_by_label("Select all jobs on this page").check()
    tab.page.get_by_role("button", name="Compare").click()
    expect(tab.page.get_by_role("heading", name="Comparison of 6 jobs")).to_be_focused()
    picture = tab.page.locator(".picture")
    expect(picture).to_have_attribute("aria-label", re.compile("^accuracy, validation, over epoch"))
    expect(tab.page.locator(".u-legend .u-series")).to_have_count(7)
    table = tab.page.get_by_role("region", name="Jobs").locator("table")
    expect(table.locator("thead th")).to_have_text(
        ["job", "norm", "seed", "val loss", "val accuracy"]
    )
    answer = fake.compare(ids)
    best = max(entry["metrics"]["val_accuracy"] for entry in answer["jobs"])
    expect(table.locator("td.best").last).to_have_text(f"{100 * best:.1f}%")
    table.get_by_role("button", name="val accuracy").click()
    expect(table.locator("th[aria-sort=ascending]")).to_have_text("val accuracy")
    shown = [float(text.rstrip("%")) for text in table.locator("td:last-child").all_inner_texts()]
    assert shown == sorted(shown)


def test_means_over_seeds_are_told_with_their_deviations(tab: Tab, fake: FakeJobs) -> None:
    ids = _sweep(fake)
    visit(tab, fake, f"compare/{','.join(ids)}")
    rows = tab.page.locator("section[aria-labelledby=groups-title] tbody tr")
    expect(rows).to_have_count(2)
    group = next(g for g in fake.compare(ids)["groups"] if g["values"]["norm"] == "sync")
    mean, deviation = (100 * group[name]["val_accuracy"] for name in ("mean", "deviation"))
    expect(rows.first).to_contain_text("norm=sync")
    expect(rows.first.locator("td").last).to_have_text(f"{mean:.1f} ± {deviation:.1f}%")
    tab.page.get_by_label("Curves").select_option("mean ± deviation over seeds")
    names = tab.page.locator(".u-legend .u-label").filter(visible=True)
    expect(names).to_have_text(["epoch", "norm=sync", "norm=local"])
    expect(tab.page.locator(".picture")).to_have_attribute(
        "aria-label", re.compile("norm=sync .*norm=local")
    )
