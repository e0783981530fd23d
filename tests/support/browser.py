"""A headless browser, for tests of pages as people see them."""

import base64
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOST = "127.0.0.1"
# As a person's hand does it, with files from outside the browser.
_HAND_OVER = """([files, way]) => {
  const held = new DataTransfer();
  for (const { name, data } of files) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    held.items.add(new File([bytes], name));
  }
  const send = (Kind, type, key) =>
    document.body.dispatchEvent(
      new Kind(type, { bubbles: true, cancelable: true, [key]: held }),
    );
  if (way === "paste") {
    send(ClipboardEvent, "paste", "clipboardData");
  } else {
    for (const type of ["dragenter", "dragover", "drop"]) send(DragEvent, type, "dataTransfer");
  }
}"""


@dataclass(frozen=True)
class File:
    """What a person hands over to a page."""

    name: str
    data: bytes


class Tab:
    """A page, and what it did that nobody sees.

    Attributes:
        complaints: what its console was told of errors, violations of its Content-Security-Policy
            among them, and exceptions that its scripts did not catch.
        strangers: addresses beyond the service's host that were asked for anything.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._follow)

    def hand_over(self, *files: File, way: Literal["drop", "paste"]) -> None:
        """Drop files on the page, or paste them into it."""
        given = [{"name": f.name, "data": base64.b64encode(f.data).decode()} for f in files]
        self.page.evaluate(_HAND_OVER, [given, way])

    def choose(self, selector: str, *files: File) -> None:
        """Choose files in the dialog of an input."""
        self.page.set_input_files(
            selector,
            [{"name": f.name, "mimeType": "", "buffer": f.data} for f in files],
        )

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that match, as they are seen."""
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _follow(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("blob", "data") and address.hostname != HOST:
            self.strangers.append(request.url)


class Chromium:
    """A browser that reaches no host but HOST."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    @contextmanager
    def tab(self, url: str, width: int = 1200, **options: Any) -> Generator[Tab]:
        """Open a page with nothing kept of those before it."""
        viewport = {"width": width, "height": 800}
        with self._browser.new_context(viewport=viewport, **options) as context:  # pyright: ignore[reportArgumentType] -- a TypedDict of the same keys
            context.set_default_timeout(10_000)
            tab = Tab(context.new_page())
            tab.page.goto(url)
            yield tab


@contextmanager
def chromium() -> Generator[Chromium]:
    """Start the system's Chromium; skips the test where there is none."""
    paths: Sequence[str] = [path for name in CHROMIUMS if (path := shutil.which(name))]
    if not paths:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUMS)} is installed")
    arguments = [
        "--no-sandbox",  # root may not use it
        "--no-proxy-server",
        f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HOST}",
    ]
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=paths[0], args=arguments) as browser,
    ):
        yield Chromium(browser)
