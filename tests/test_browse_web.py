"""The browser in a real browser: every page and action, both themes, a phone's width and a desk's; hostile text.

Needs Debian's `chromium`, or another in WRITESAE_CHROMIUM, and playwright; nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time

import pytest
from browse_stub import Atlas, Live

pytest.importorskip("starlette", reason="starlette is not installed: pip install writesae[browse]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install writesae[browse]")

from writesae.browse.command import address, make_server  # noqa: E402

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
WIDE, PHONE = (1440, 900), (380, 780)


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives Chromium, is not installed")
    names = (os.environ.get("WRITESAE_CHROMIUM"), shutil.which("chromium"), shutil.which("chromium-browser"))
    path = next((x for x in names if x), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or name it in WRITESAE_CHROMIUM")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


class Served:
    """A server of an atlas in a thread."""

    def __init__(self, atlas):
        self.atlas = atlas
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = address(self.listening).rstrip("/")
        self.server = make_server(atlas, self.listening)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.listening.close()


@pytest.fixture(scope="module")
def served():
    made = Served(Atlas(live=Live(0.005)))
    yield made
    made.close()


@pytest.fixture(params=[("light", WIDE), ("dark", PHONE)], ids=["light-wide", "dark-phone"])
def page(request, chromium):
    """A page of its own window; at the end nothing may have failed or been asked of another host."""
    yield from window(chromium, *request.param)


@pytest.fixture
def wide(chromium):
    yield from window(chromium, "light", WIDE)


def window(chromium, scheme, size):
    width, height = size
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(15_000)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith("http://127.0.0.1:") else wrong.append(asked.url))
    page.wrong = wrong
    yield page
    context.close()
    assert not wrong


def open_list(page, served, search=""):
    page.goto(f"{served.url}/{search}")
    page.wait_for_selector("html[data-ready]")


def until(page, expression, seconds=15):
    """Waits until a script's expression holds; Playwright's own way needs eval, which the pages forbid."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never: {expression}"
        time.sleep(0.02)


def arrives(page, end):
    """Waits until the page's address ends so."""
    page.wait_for_url(lambda url: url.endswith(end))


def fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def names(page, most=5):
    return page.evaluate(
        "[...document.querySelectorAll('#rows .row:not([hidden])')].sort((a, b) => "
        "a.ariaRowIndex - b.ariaRowIndex || a.getAttribute('aria-rowindex') - b.getAttribute('aria-rowindex'))"
        f".slice(0, {most}).map(r => r.querySelector('a').textContent)"
    )


def test_the_list_is_there_searched_and_left_for_a_feature(page, served):
    open_list(page, served)
    assert fits(page) and "6,144 features" in page.inner_text("#found")
    table = served.atlas.table
    best = max(range(len(table.count)), key=lambda i: (table.count[i], -i))
    where = served.atlas.info["sites"][table.site[best]]
    assert names(page, 1) == [f"L{where[0]}H{where[1]}/{table.feature[best]}"]
    page.keyboard.press("/")
    page.keyboard.type("5:3:1258")
    until(page, "document.querySelector('#found').textContent.startsWith('1 of')")
    assert page.url.endswith("/?q=5%3A3%3A1258") and names(page) == ["L5H3/1258"]
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    arrives(page, "/5/3/1258")
    assert page.inner_text("h1") == "L5H3/1258" and fits(page)
    page.keyboard.press("j")
    arrives(page, "/5/3/1259")
    page.keyboard.press("Escape")
    arrives(page, "/?q=5%3A3%3A1258")
