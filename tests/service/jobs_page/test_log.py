"""The log of a job in a browser: followed, read in parts, searched, kept."""

from pathlib import Path

from playwright.sync_api import expect

from tests.service.jobs_page.conftest import visit
from tests.support.browser import Tab
from tests.support.job_answers import job
from tests.support.page_jobs import FakeJobs

# How far the box can still be scrolled down, in pixels.
_BELOW = "box => box.scrollHeight - box.scrollTop - box.clientHeight"


def test_log_is_followed_as_it_grows(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running"))
    visit(tab, fake, "j000000001")
    lines, box = tab.page.locator(".line"), tab.page.get_by_role("log")
    expect(lines.first).to_have_text("=== attempt 1, 2026-11-30T14:00:00Z ===")
    number = lines.count()
    fake.write("j000000001", "half of a")
    expect(lines.last).to_have_text("half of a")
    fake.write("j000000001", " line\nμ ±\r10%\r20% done\n")
    expect(lines).to_have_count(number + 2)
    expect(lines.nth(-2)).to_have_text("half of a line")
    expect(lines.last).to_have_text("20% done")
    for start in range(0, 600, 200):
        fake.write("j000000001", "".join(f"line {n}\n" for n in range(start, start + 200)))
        expect(lines.last).to_have_text(f"line {start + 199}")
    assert box.evaluate(_BELOW) < 2


def test_long_log_is_read_in_parts_and_stays_small_in_the_document(
    tab: Tab, fake: FakeJobs
) -> None:
    fake.add(job(1, "running"))
    fake.logs["j000000001"] = "".join(f"line {n} of many\n" for n in range(200_000)).encode()
    visit(tab, fake, "j000000001")
    lines = tab.page.locator(".line")
    expect(lines.last).to_have_text("line 199999 of many")
    assert fake.log_bytes < 300_000
    box = tab.page.get_by_role("log")
    for _ in range(3):
        first = lines.first.inner_text()
        box.evaluate("box => box.scrollTo(0, 0)")
        expect(lines.first).not_to_have_text(first)
        expect(tab.page.get_by_label("Follow")).not_to_be_checked()
    numbers = [int(text.split()[1]) for text in lines.all_inner_texts()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len(numbers) <= 4000
    fake.write("j000000001", "the newest\n")
    tab.page.get_by_label("Follow").check()
    expect(lines.last).to_have_text("the newest")
    assert box.evaluate(_BELOW) < 2


def test_whole_log_is_searched(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running"))
    content = [f"line {n}: nothing μ" for n in range(150_000)]
    for number in (3, 70_000, 149_999):
        content[number] = f"line {number}: a Needle, and one more needle"
    fake.logs["j000000001"] = "\n".join(content).encode()
    visit(tab, fake, "j000000001")
    search, found = tab.page.get_by_label("Search the log"), tab.page.locator(".found")
    current = tab.page.locator(".line.current")
    search.fill("NEEDLE")
    expect(found).to_have_text("3 of 3", timeout=30_000)
    expect(current).to_contain_text("line 149999")
    search.press("Enter")
    expect(found).to_have_text("1 of 3")
    expect(current).to_contain_text("line 3:")
    expect(current).to_be_in_viewport()
    search.press("Enter")
    expect(current).to_contain_text("line 70000")
    expect(current.locator("mark")).to_have_text(["Needle", "needle"])
    tab.page.get_by_role("button", name="Previous").click()
    expect(current).to_contain_text("line 3:")
    search.fill("no such thing")
    expect(found).to_have_text("not found")


def test_whole_log_can_be_kept_as_a_file(tab: Tab, fake: FakeJobs, tmp_path: Path) -> None:
    fake.add(job(1, "running"))
    fake.logs["j000000001"] = b"".join(b"line %d\n" % n for n in range(300_000))
    visit(tab, fake, "j000000001")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == fake.logs["j000000001"]


def test_log_of_each_attempt_is_offered(tab: Tab, fake: FakeJobs) -> None:
    fake.add(job(1, "running", attempt=2))
    fake.logs["j000000001"] = b"=== attempt 1, t ===\nfirst\n=== attempt 2, t ===\nsecond\n"
    visit(tab, fake, "j000000001")
    lines = tab.page.locator(".line")
    expect(lines).to_have_count(4)
    tab.page.get_by_label("Of which attempt").select_option("attempt 1")
    expect(lines).to_have_text(["=== attempt 1, t ===", "first"])
    fake.write("j000000001", "third\n")
    tab.page.get_by_label("Of which attempt").select_option("attempt 2")
    expect(lines).to_have_text(["=== attempt 2, t ===", "second", "third"])
