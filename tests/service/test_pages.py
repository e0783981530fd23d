import io
import json
import re
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from playwright.sync_api import Locator, Route, expect

from tests.service.conftest import write_small_bundle
from tests.support.browser import Chromium, File, Tab, chromium
from tests.support.processes import REPOSITORY, run
from tests.support.serving import Service, served

PAGES = ["/", "/jobs", "/docs"]
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_OWN = REPOSITORY / "service" / "static"
STATIC = {
    name: _TYPES[name.rpartition(".")[2]]
    for name in (
        *(file.name for file in _OWN.iterdir() if file.suffix in (".css", ".js", ".svg")),
        "swagger-ui-bundle.js",
        "swagger-ui.css",
        "uPlot.iife.min.js",
        "uPlot.min.css",
    )
}
BROKEN = File("broken.png", b"\x89PNG\r\n\x1a\n and no more")
MARKUP = "<img src=x onerror=document.title='owned'>"
# A headless browser shows all its tabs, always.
_LOOK = """seen => Object.defineProperty(
  document, "visibilityState", { value: seen, configurable: true }
)"""


def _refusal(status: int, reason: str) -> str:
    return f"Failed to load resource: the server responded with a status of {status} ({reason})"


def _picture(name: str = "shape.png", shade: int = 90) -> File:
    image = Image.new("L", (4, 4), shade)
    image.putpixel((1, 2), 255)
    file = io.BytesIO()
    image.save(file, "PNG")
    return File(name, file.getvalue())


# The answers themselves


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_html(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text.startswith("<!doctype html>")


@pytest.mark.parametrize("path", PAGES)
def test_pages_hold_no_script_or_style_and_no_address_of_others(
    client: TestClient, path: str
) -> None:
    text = client.get(path).text
    assert "http" not in text
    assert "//" not in text
    assert "<style" not in text
    assert not re.search(r"\s(style|on\w+)=", text)
    assert all("src=" in script for script in re.findall("<script.*?>", text))
    named = re.findall(r'(?:src|href)="static/(.*?)"', text)
    assert named
    assert set(named) <= set(STATIC)


@pytest.mark.parametrize(("name", "content_type"), STATIC.items())
def test_files_of_the_pages_have_their_content_types(
    client: TestClient, name: str, content_type: str
) -> None:
    response = client.get(f"/static/{name}")
    assert response.status_code == 200
    assert response.headers["content-type"] == content_type
    assert len(response.content) > 100


@pytest.mark.parametrize("path", [*PAGES, "/static/page.js"])
def test_file_is_sent_again_only_if_it_changed(client: TestClient, path: str) -> None:
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content


@pytest.mark.parametrize(
    "name",
    [
        "unknown.js",
        "page.html",
        "jobs.html",
        "LICENSE",
        "vendor%2fuplot%2fLICENSE",
        "PAGE.JS",
        "page.js/",
        "..%2fapp.py",
        "..%2f..%2fapp.py",
        "%2e%2e%2f%2e%2e%2fapp.py",
        "..%5capp.py",
        "%2fetc%2fpasswd",
        "page.js%00",
        "",
    ],
)
def test_no_other_file_is_to_be_had(client: TestClient, name: str) -> None:
    response = client.get(f"/static/{name}")
    assert response.status_code == 404
    assert list(response.json()) == ["error"]


def test_short_address_of_a_job_leads_to_the_page_of_jobs(client: TestClient) -> None:
    response = client.get("/jobs/k3v9x0q2ma", follow_redirects=False)
    assert response.status_code == 307
    assert response.headers["location"] == "../jobs#k3v9x0q2ma"
    for wrong in ("a%0d%0ab", "..%2fx", "%2f%2fother.example", "a.b", "ä"):
        assert client.get(f"/jobs/{wrong}", follow_redirects=False).status_code == 404


# What a person sees


def _predict(service: Service, file: File, model: str = "shapes") -> Any:
    files = {"files": (file.name, file.data)}
    return service.ask("POST", f"/predict/{model}", files=files).json()


def _models(directory: Path) -> Path:
    models = directory / "models"
    write_small_bundle(models / "one")
    write_small_bundle(models / "two", "twins")
    return models


@pytest.fixture(scope="module")
def browser() -> Generator[Chromium]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def services(
    browser: Chromium, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[Service, Service]]:
    """One that is open to all, one with keys; after the browser, without which none is needed."""
    free, locked = (tmp_path_factory.mktemp(name) for name in ("free", "locked"))
    keys = locked / "keys"
    made = run([sys.executable, "-m", "service.keys", str(keys), "--role", "read"], locked)
    assert made.returncode == 0, made.stdout
    key = made.stdout.split()[0]
    with (
        served(_models(free), free / "log", "--poll-s", "0.1") as open_to_all,
        served(_models(locked), locked / "log", "--api-keys", str(keys), key=key) as with_keys,
    ):
        yield open_to_all, with_keys


@pytest.fixture
def service(services: tuple[Service, Service]) -> Service:
    return services[0]


@pytest.fixture
def locked_service(services: tuple[Service, Service]) -> Service:
    return services[1]


@pytest.fixture
def tab(browser: Chromium, service: Service) -> Generator[Tab]:
    with browser.tab(service.url) as tab:
        expect(tab.page.get_by_role("radio", name="shapes")).to_be_checked()
        yield tab
        assert tab.strangers == []


def _result(tab: Tab, name: str) -> Locator:
    heading = tab.page.locator("h3", has_text=re.compile(f"^{re.escape(name)} "))
    return tab.page.locator(".result").filter(has=heading)


def _shown(tab: Tab, name: str) -> list[tuple[str, str]]:
    """Return the classes and percentages of the result for a file."""
    result = _result(tab, name)
    expect(result.locator(".share").first).to_be_visible()
    labels, shares = (result.locator(f".{part}").all_inner_texts() for part in ("class", "share"))
    return list(zip(labels, shares, strict=True))


def _expected(answer: Any) -> list[tuple[str, str]]:
    [prediction] = answer["predictions"]
    best = sorted(prediction["probabilities"].items(), key=lambda item: -item[1])[:5]
    return [
        (label, "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%") for label, share in best
    ]


def test_models_are_listed_with_what_is_known_of_them(tab: Tab) -> None:
    shapes, twins = tab.texts(".model")
    facts = ["version 1", "input 1 × 4 × 4", "architecture cnn", "classes 3", "test accuracy 87.5%"]
    for name, shown in (("shapes", shapes), ("twins", twins)):
        words = " ".join(shown.split())
        assert words.startswith(name)
        assert all(fact in words for fact in facts), words
    assert tab.texts("#problem") == [""]
    assert tab.complaints == []


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_image_shows_what_the_service_predicts(tab: Tab, service: Service, way: str) -> None:
    picture = _picture()
    if way == "choose":
        tab.choose("#files", picture)
    else:
        tab.hand_over(picture, way="drop" if way == "drop" else "paste")
    assert _shown(tab, "shape.png") == _expected(_predict(service, picture))
    assert re.search(r"shapes, version 1, \d+ m?s", tab.texts(".result h3")[0])
    label = _predict(service, picture)["predictions"][0]["label"]
    assert tab.texts("#announcement")[0].startswith(f"shape.png: {label}, ")
    image = tab.page.locator(".result img")
    assert image.evaluate("image => image.naturalWidth") == 4
    assert tab.complaints == []


def test_chosen_model_is_the_one_asked(tab: Tab) -> None:
    tab.page.get_by_role("radio", name="shapes").press("ArrowDown")
    expect(tab.page.get_by_role("radio", name="twins")).to_be_checked()
    tab.hand_over(_picture(), way="drop")
    _shown(tab, "shape.png")
    assert "twins, version 1" in tab.texts(".result h3")[0]


def test_address_chooses_a_model(browser: Chromium, service: Service) -> None:
    with browser.tab(f"{service.url}/#twins") as tab:
        expect(tab.page.get_by_role("radio", name="twins")).to_be_checked()
        tab.page.goto(f"{service.url}/#shapes")
        expect(tab.page.get_by_role("radio", name="shapes")).to_be_checked()
        tab.page.goto(f"{service.url}/#%E0%A4%A")
        expect(tab.page.get_by_role("radio", name="shapes")).to_be_checked()
        assert tab.complaints == []


@pytest.mark.parametrize("path", PAGES)
def test_every_page_leads_to_the_others(browser: Chromium, service: Service, path: str) -> None:
    with browser.tab(service.url + path) as tab:
        links = tab.page.get_by_role("navigation", name="Service").get_by_role("link")
        addresses = [link.get_attribute("href") for link in links.all()]
        assert addresses[:3] == ["./", "jobs", "docs"]
        current = {"/": "Models", "/jobs": "Jobs", "/docs": "API"}[path]
        expect(links.and_(tab.page.locator("[aria-current=page]"))).to_have_text(current)


def test_service_without_jobs_says_so_on_their_page(browser: Chromium, service: Service) -> None:
    with browser.tab(f"{service.url}/jobs", width=360) as tab:
        expect(tab.page.get_by_text("This service serves models alone.")).to_be_visible()
        expect(tab.page.get_by_role("link", name="New job")).to_be_hidden()
        expect(tab.page.get_by_role("alert")).to_be_hidden()
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.complaints == [_refusal(404, "Not Found")]


def test_error_of_one_file_is_shown_as_the_service_says_it_and_harms_no_other(
    tab: Tab, service: Service
) -> None:
    pictures = [_picture(f"{shade}.png", shade) for shade in range(0, 200, 20)]
    tab.hand_over(BROKEN, *pictures, way="drop")
    expect(_result(tab, BROKEN.name).locator(".error")).to_have_text(
        _predict(service, BROKEN)["error"]
    )
    for picture in pictures:
        assert _shown(tab, picture.name) == _expected(_predict(service, picture))
    assert tab.texts(".result .thumbnail")[0] == "no preview"
    assert tab.complaints == [_refusal(400, "Bad Request")]


def test_service_that_went_away_is_said(tab: Tab) -> None:
    tab.page.route("**/predict/**", lambda route: route.abort())
    tab.hand_over(_picture(), way="drop")
    expect(tab.page.locator(".result .error")).to_contain_text("the service is not reachable")


def test_key_is_asked_for_where_the_service_wants_one(
    browser: Chromium, locked_service: Service
) -> None:
    with browser.tab(locked_service.url) as tab:
        field, hint = tab.page.get_by_label("API key"), tab.page.locator("#key-hint")
        expect(field).to_be_visible()
        without = httpx2.get(f"{locked_service.url}/v2/models").json()["error"]
        expect(hint).to_contain_text(without)
        assert tab.texts(".model") == []

        field.fill("no such key")
        field.press("Enter")
        headers = {"Authorization": "Bearer no such key"}
        wrong = httpx2.get(f"{locked_service.url}/v2/models", headers=headers).json()["error"]
        expect(hint).to_contain_text(wrong)
        expect(field).to_be_visible()
        assert tab.page.evaluate("sessionStorage.length") == 0

        field.fill(locked_service.key)
        field.press("Enter")
        expect(tab.page.get_by_role("radio", name="shapes")).to_be_checked()
        expect(field).to_be_hidden()
        tab.hand_over(_picture(), way="drop")
        assert _shown(tab, "shape.png") == _expected(_predict(locked_service, _picture()))
        assert tab.page.evaluate("Object.values(sessionStorage)") == [locked_service.key]
        assert tab.page.evaluate("localStorage.length + document.cookie.length") == 0

        tab.page.get_by_role("link", name="Metrics").click()
        expect(tab.page.locator("body")).to_contain_text("syncbn_http_requests_total")
        assert tab.complaints == [_refusal(401, "Unauthorized")] * 2
        assert tab.strangers == []


def test_drift_is_shown_in_plain_words(tab: Tab, service: Service) -> None:
    rows = tab.page.locator("#drift-rows tr")
    expect(rows.first).to_be_visible()
    for name in ("shapes", "twins"):
        told = service.ask("GET", f"/v2/models/{name}/drift").json()
        shown = rows.filter(has_text=name)
        expect(shown.locator("td").first).to_have_text(f"{told['samples']:,}")
    assert "0: as in training; above 1: " in tab.texts("#drift .hint")[0]


def test_layers_that_drifted_most_are_shown(browser: Chromium, service: Service) -> None:
    distances = [0.1, 1.5, None, 0.9, 12345.0, 0.2]
    drift = {
        "model_name": "shapes",
        "model_version": "1",
        "samples": 1234567,
        "input": {"distance": 1.001, "channels": [1.001]},
        "layers": [
            {"name": f"layer{index}", "distance": distance, "batches": 9}
            for index, distance in enumerate(distances)
        ],
    }

    def answer(route: Route) -> None:
        known = "shapes" in route.request.url
        empty = {"samples": 2, "input": {"distance": None, "channels": None}, "layers": []}
        route.fulfill(json=drift if known else drift | empty)

    with browser.tab("about:blank") as tab:
        tab.page.route("**/drift", answer)
        tab.page.goto(service.url)
        expect(tab.page.locator("#drift-rows tr").first).to_be_visible()
        rows = [" ".join(row.split()) for row in tab.texts("#drift-rows tr")]
    assert rows[:2] == [
        "shapes 1,234,567 1.00 drifted layer4 1.2e+4 drifted layer1 1.50 drifted layer3 0.90",
        "twins 2 too few samples yet –",
    ]


def test_page_keeps_up_with_the_service_while_it_is_looked_at(
    browser: Chromium, service: Service, tmp_path: Path
) -> None:
    with browser.tab("about:blank") as tab:
        asked: list[str] = []
        tab.page.on("request", lambda request: asked.append(request.url))
        tab.page.clock.install()
        tab.page.goto(service.url)
        expect(tab.page.locator("#drift")).to_be_visible()  # the first round is over
        twins = tab.page.get_by_role("radio", name="twins")
        twins.check()
        write_small_bundle(tmp_path / "new", "zebras")
        (tmp_path / "new").rename(service.models / "three")
        deadline = time.monotonic() + 20
        while service.ask("GET", "/v2/models/zebras").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

        tab.page.evaluate(_LOOK, "hidden")
        before = list(asked)
        tab.page.clock.run_for(60_000)
        assert asked == before
        tab.page.evaluate(_LOOK, "visible")
        tab.page.clock.run_for(10_000)
        expect(tab.page.get_by_role("radio", name="zebras")).to_be_visible()
        expect(twins).to_be_checked()
        expect(twins).to_be_focused()
        assert tab.complaints == []


def test_names_are_never_taken_for_markup(browser: Chromium, service: Service) -> None:
    listed = service.ask("GET", "/v2/models").json()
    listed["models"][0]["name"] = MARKUP
    listed["models"][0]["parameters"] |= {"architecture": MARKUP, "metrics": {MARKUP: 1.0}}
    answer = {
        "model_name": MARKUP,
        "model_version": MARKUP,
        "predictions": [
            {"file": "x", "label": MARKUP, "probability": 1, "probabilities": {MARKUP: 1}}
        ],
    }
    with browser.tab("about:blank") as tab:
        tab.page.route("**/v2/models", lambda route: route.fulfill(json=listed))
        tab.page.route("**/drift", lambda route: route.fulfill(json={"error": MARKUP}, status=500))
        tab.page.route("**/predict/*", lambda route: route.fulfill(json=answer))
        tab.page.goto(service.url)
        expect(tab.page.locator("#drift-rows .error").first).to_have_text(MARKUP)
        tab.hand_over(File(f"{MARKUP}.png", _picture().data), way="drop")
        expect(tab.page.locator(".class")).to_have_text(MARKUP)
        expect(tab.page.locator("img")).to_have_count(2)  # the icon and the thumbnail
        assert tab.page.title() == "Models served by syncbn"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_fit_a_phone(browser: Chromium, service: Service, path: str) -> None:
    with browser.tab(service.url + path, width=360) as tab:
        if path == "/":
            expect(tab.page.get_by_role("radio", name="shapes")).to_be_checked()
            name = f"{'long' * 20}.png"
            tab.hand_over(_picture(name), way="drop")
            _shown(tab, name)
        else:
            expect(tab.page.locator(".opblock").first).to_be_visible()
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.complaints == []


def test_api_page_shows_every_operation_without_internet(
    browser: Chromium, locked_service: Service
) -> None:
    document = locked_service.ask("GET", "/openapi.json").json()
    operations = [
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    ]
    with browser.tab(f"{locked_service.url}/docs") as tab:
        expect(tab.page.locator(".opblock")).to_have_count(len(operations))
        methods = tab.texts(".opblock-summary-method")
        # Within a path, marks say where a line may break.
        paths = [path.replace("\u200b", "") for path in tab.texts(".opblock-summary-path")]
        assert sorted(zip(methods, paths, strict=True)) == sorted(operations)
        assert tab.complaints == []
        assert tab.strangers == []


def test_api_page_sends_the_key_and_files_that_it_is_given(
    browser: Chromium, locked_service: Service
) -> None:
    with browser.tab(f"{locked_service.url}/docs") as tab:
        page = tab.page
        page.get_by_role("button", name="Authorize").first.click()
        dialog = page.locator(".modal-ux")
        dialog.get_by_role("textbox").first.fill(locked_service.key)
        dialog.get_by_role("button", name="Apply credentials").first.click()
        dialog.get_by_role("button", name="Close").first.click()
        predict = page.locator(".opblock").filter(has_text="/predict/").first
        predict.locator(".opblock-summary-control").click()
        predict.get_by_role("button", name="Try it out").click()
        predict.get_by_placeholder("name").fill("shapes")
        tab.choose(".opblock input[type=file]", _picture())
        predict.get_by_role("button", name="Execute").click()
        answer = predict.locator(".live-responses-table .response .microlight").first
        expect(answer).to_contain_text("model_name")
        assert json.loads(answer.inner_text()) == _predict(locked_service, _picture())
        assert tab.complaints == []
        assert tab.strangers == []


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_policy_of_the_pages_is_enforced(browser: Chromium, service: Service, path: str) -> None:
    with browser.tab(service.url + path) as tab:
        assert tab.complaints == []
        tab.page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<a id=bait onclick=alert(1)>bait</a>')"
        )
        tab.page.evaluate("document.getElementById('bait').click()")
        tab.page.evaluate("fetch('http://127.0.0.2:9/').catch(() => null)")
        violated = [text for text in tab.complaints if "Content Security Policy" in text]
        assert any("script-src 'self'" in text for text in violated), tab.complaints
        assert any("connect-src 'self'" in text for text in violated), tab.complaints
