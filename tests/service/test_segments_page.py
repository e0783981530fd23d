"""The page with models that answer masks and tensors."""

import io
import re
from collections.abc import Generator

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.support.browser import Chromium, File, Tab, chromium
from tests.support.serving import Service, served
from tests.support.task_bundles import (
    EVALUATION,
    PALETTE,
    write_segmenter,
    write_vectors,
)

MARKUP = "<img src=x onerror=document.title='owned'>"


def _picture(name: str = "scene.png", size: tuple[int, int] = (24, 12)) -> File:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0]), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return File(name, file.getvalue())


@pytest.fixture(scope="module")
def browser() -> Generator[Chromium]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(browser: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    directory = tmp_path_factory.mktemp("segments")
    models = directory / "models"
    write_segmenter(models / "segments", palette=PALETTE, evaluations=(EVALUATION,))
    digits = ("ground", "1", "0")  # which JavaScript puts into another order
    write_segmenter(models / "digits", name="digits", classes=digits, palette=PALETTE)
    write_segmenter(models / "many", name="many", classes=tuple(map(str, range(300))))
    write_segmenter(models / "markup", name="markup", classes=(MARKUP, "b", "c"))
    write_vectors(models / "vectors")
    with served(models, directory / "log", "--allow-imports") as service:
        yield service


@pytest.fixture
def tab(browser: Chromium, service: Service) -> Generator[Tab]:
    with browser.tab(service.url) as tab:
        yield tab
        assert tab.strangers == []
        assert tab.complaints == []


def _drop_on(tab: Tab, model: str, file: File) -> None:
    tab.page.get_by_role("radio", name=model).check()
    tab.hand_over(file, way="drop")


def _answer(service: Service, model: str, file: File) -> dict[str, float]:
    files = {"files": (file.name, file.data)}
    answer = service.ask("POST", f"/predict/{model}", files=files).json()
    return answer["predictions"][0]["shares"]


def test_evaluations_are_told_in_words_instead_of_the_metrics(tab: Tab) -> None:
    model = tab.page.locator(".model").filter(has_text="segments")
    expect(model).to_contain_text(re.compile(r"task\s*segmentation"))
    expect(model.locator(".quality li")).to_have_text(
        "mean IoU 81.2% (79.0 to 83.4), loss 0.25 on 360 test images, statistics as trained"
    )
    assert "test mean IoU" not in model.inner_text()
    # Without evaluations, the metrics are told as before.
    expect(tab.page.locator(".model").filter(has_text="vectors")).to_contain_text(
        re.compile(r"test mean IoU\s*81\.2%")
    )


@pytest.mark.parametrize("model", ["segments", "digits"])
def test_mask_lies_over_the_middle_of_the_picture_and_the_legend_has_its_colors(
    tab: Tab, service: Service, model: str
) -> None:
    picture = _picture()
    _drop_on(tab, model, picture)
    shares = _answer(service, model, picture)
    mask = tab.page.locator(".overlaid .mask")
    expect(mask).to_be_visible()
    assert mask.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8, 6]
    boxes = [image.bounding_box() for image in tab.page.locator(".overlaid img").all()]
    assert boxes[0] is not None
    assert boxes[0] == boxes[1]
    assert boxes[0]["width"] / boxes[0]["height"] == pytest.approx(8 / 6, rel=0.02)

    told = sorted(shares.items(), key=lambda item: -item[1])
    # To the nearest tenth, and a half upwards, as JavaScript rounds.
    told = [(name, f"{int(1000 * share + 0.5) / 10:.1f}%") for name, share in told if share > 0]
    assert len(told) > 1
    legend = tab.page.locator(".legend")
    labels, numbers = (legend.locator(f".{part}").all_inner_texts() for part in ("class", "share"))
    assert list(zip(labels, numbers, strict=True)) == told
    names = list(shares)
    for (name, _), swatch in zip(told, legend.locator(".swatch").all(), strict=True):
        color = swatch.evaluate("each => getComputedStyle(each).backgroundColor")
        assert color == f"rgb{PALETTE[names.index(name)]}"
    in_words = ", ".join(f"{name} {share}" for name, share in told)
    expect(mask).to_have_attribute("alt", f"mask of scene.png: {in_words}")
    expect(tab.page.locator("#announcement")).to_have_text(f"scene.png: {in_words}")


def test_opacity_of_the_mask_is_set_by_keyboard(tab: Tab) -> None:
    _drop_on(tab, "segments", _picture())
    slider = tab.page.get_by_role("slider", name="Mask opacity")
    mask = tab.page.locator(".overlaid .mask")
    expect(mask).to_have_css("opacity", "0.6")
    slider.press("ArrowRight")
    expect(mask).to_have_css("opacity", "0.61")
    expect(tab.page.locator(".opacity output")).to_have_text("61%")
    slider.press("Home")
    expect(mask).to_have_css("opacity", "0")


def test_mask_of_too_many_classes_is_told_without_a_picture(tab: Tab) -> None:
    _drop_on(tab, "many", _picture())
    expect(tab.page.locator(".legend li").first).to_be_visible()
    expect(tab.page.locator(".result")).to_contain_text("it has more than 256 classes")
    assert tab.page.locator(".mask").count() == 0
    assert tab.page.locator(".legend li").count() <= 12


def test_tensor_is_shown_by_its_first_numbers(tab: Tab) -> None:
    _drop_on(tab, "vectors", _picture())
    expect(tab.page.locator(".result .hint")).to_have_text("output of shape 3")
    assert len(tab.texts(".result .values")[0].split()) == 3


def test_names_of_segments_are_never_taken_for_markup(tab: Tab) -> None:
    _drop_on(tab, "markup", _picture(f"{MARKUP}.png"))
    expect(tab.page.locator(".legend .class").filter(has_text=MARKUP)).to_be_visible()
    expect(tab.page.locator("img")).to_have_count(3)  # the icon, the picture and the mask
    assert tab.page.title() == "Models served by syncbn"


def test_segments_fit_a_phone(browser: Chromium, service: Service) -> None:
    with browser.tab(service.url, width=360) as tab:
        _drop_on(tab, "segments", _picture(f"{'long' * 20}.png"))
        expect(tab.page.locator(".mask")).to_be_visible()
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.complaints == []
