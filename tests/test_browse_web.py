"""The browser in a real browser: every page and action, both themes, a phone's width and a desk's; hostile text.

Needs Debian's `chromium`, or another in WRITESAE_CHROMIUM, and playwright; nothing is downloaded.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import threading
import time

import numpy as np
import pytest
from browse_stub import WORDS, Atlas, Live, Served, hostile

from writesae.browse import link, show
from writesae.browse.static_site import chosen, write

pytest.importorskip("starlette", reason="starlette is not installed: pip install writesae[browse]")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install writesae[browse]")

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


def window(chromium, scheme, size, **options):
    width, height = size
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
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


FIRST = "Math.min(...[...document.querySelectorAll('#rows .row:not([hidden])')].map(r => +r.ariaRowIndex))"


def names(page, most=5):
    return page.evaluate(
        "[...document.querySelectorAll('#rows .row:not([hidden])')].sort((a, b) => "
        "a.ariaRowIndex - b.ariaRowIndex)"
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
    open_list(page, served)
    page.focus("#grid")
    for _ in range(3):
        page.keyboard.press("PageDown")
    first, chosen = names(page, 1), page.inner_text(".row.at a")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1 >> text=L5H")
    page.go_back()
    until(page, "document.querySelector('.row.at a')")
    assert names(page, 1) == first and page.inner_text(".row.at a") == chosen


def found(page):
    """How many features the list says it shows."""
    return int(page.inner_text("#found b").replace(",", ""))


def test_the_list_is_filtered_and_sorted_as_the_columns_say(wide, served):
    """Against numpy, through the address, which brings it all back."""
    page, table = wide, served.atlas.table
    open_list(page, served)
    page.fill("#q", "HOUSE")
    page.select_option("#in", "promoted")
    ids = [i for i, t in enumerate(table.tokens) if "house" in t.lower()]
    wanted = np.isin(table.promoted, ids).any(1)
    assert wanted.any()
    until(page, f"document.querySelector('#found b').textContent === '{wanted.sum()}'")
    page.fill("#q", '" house"')
    wanted = (table.promoted == WORDS.index(" house")).any(1)
    page.select_option("#site", "5:1")
    page.select_option("#partition", "2")
    page.fill("#density-min", "2")
    page.fill("#win_rate-max", "50")
    wanted &= (table.site == 1) & (table.partition == 2) & (table.density >= np.float32(0.02)) & (table.win_rate <= 0.5)
    until(page, f"document.querySelector('#found b').textContent === '{wanted.sum()}'")
    assert wanted.any()
    page.click("[data-name=cosine] button")
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(-table.cosine[rows], kind="stable")]
    assert names(page, 3) == [f"L5H1/{table.feature[i]}" for i in rows[:3]]
    page.click("[data-name=cosine] button")
    assert page.get_attribute("[data-name=cosine]", "aria-sort") == "ascending"
    assert names(page, 3) == [f"L5H1/{table.feature[i]}" for i in rows[::-1][:3]]
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert found(page) == wanted.sum() and names(page, 1) == [f"L5H1/{table.feature[rows[-1]]}"]
    page.goto(f"{served.url}/about")
    page.click("nav >> text=Features")
    page.wait_for_selector("html[data-ready]")
    assert found(page) == wanted.sum()
    page.click("#clear")
    until(page, "document.querySelector('#found').textContent.startsWith('6,144')")
    page.fill("#q", "no such token at all")
    until(page, "document.querySelector('#found').textContent.includes('none is like that')")


def test_not_tested_sorts_last_either_way(wide, served):
    page, table = wide, served.atlas.table
    for search, ends in (("?sort=win_rate", np.nanmax), ("?sort=win_rate&up", np.nanmin)):
        open_list(page, served, search)
        assert page.inner_text("#rows .row:not([hidden]) .win_rate") == show.percent(float(ends(table.win_rate)))
        page.focus("#grid")
        page.keyboard.press("End")
        assert page.inner_text("#rows .row.at .win_rate") == "–"
        assert page.get_attribute("#rows .row.at", "aria-rowindex") == str(len(table.count) + 1)


def test_a_phone_folds_the_filters(chromium, served):
    for page in window(chromium, "light", PHONE):
        open_list(page, served)
        assert not page.is_visible("#site") and fits(page)
        page.click("#more")
        page.select_option("#site", "5:0")
        until(page, "document.querySelector('#found').textContent.startsWith('2,048 of')")
        assert page.inner_text("#more") == "Filters (1)" and fits(page)


def test_a_feature_is_read(page, served):
    page.goto(f"{served.url}/5/3/1258")
    told = served.atlas.feature(5, 3, 1258).as_dict()
    context = told["levels"][0]["contexts"][0]
    shown = page.evaluate("document.querySelector('.contexts .text').textContent")
    assert shown.replace("⏎\n", "\n") == "".join(context["tokens"])  # indentation and all
    assert page.evaluate("getComputedStyle(document.querySelector('.text')).whiteSpace") in (
        "pre-wrap",
        "preserve wrap",
    )
    here = page.locator(".contexts .text").first.locator("mark.here")
    largest = float(served.atlas.table.max[served.atlas.info["sites"].index((5, 3)) * 2048 + 1258])
    assert here.get_attribute("class") == f"a{show.level(context['activation'], largest)} here"
    here.hover()
    assert page.inner_text("#tip") == show.number(context["activation"])
    page.mouse.move(1, 1)
    page.locator(".contexts .text").first.focus()
    values = [show.number(x) for i, x in enumerate(context["activations"]) if x > 0 or i == context["at"]]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip").endswith(f": {values[1]}")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip") and page.url.endswith("/1258")
    assert page.locator(".histogram rect").count() == 30 and "93.0" in page.inner_text(
        "[aria-labelledby=h-replacement]"
    )
    assert page.locator("table[aria-label='Tokens it makes more likely'] tr").count() == 10 and fits(page)
    page.click("[aria-labelledby=h-neighbours] tbody a")
    page.wait_for_url(lambda url: url.endswith("/5/3/0"))


def test_what_is_not_there_says_what_is(wide, served):
    page = wide
    for path, told in (("/5/9/1", "L5H0, L5H1, L5H3"), ("/5/3/2048", "from 0 to 2047"), ("/x/y/z/", "/5/3/1258"),
                       (f"/5/3/{10**30}", "from 0 to 2047")):  # fmt: skip
        assert page.goto(served.url + path).status == 404
        assert told in page.inner_text("main")
        assert (
            page.evaluate("getComputedStyle(document.body).display")
            and page.evaluate("document.styleSheets.length") == 1
        )
    page.wrong[:] = [x for x in page.wrong if "404" not in x]
    page.click("main >> text=All features")
    page.wait_for_selector("html[data-ready]")
    silent = int(np.flatnonzero(served.atlas.table.count == 0)[0])
    page.goto(f"{served.url}/5/0/{silent}")
    assert "never fired" in page.inner_text("main")


def test_your_own_text(page, served):
    page.goto(f"{served.url}/text")
    page.fill("#text", "one two\nthree <b>four</b>")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#result:not([hidden])")
    assert "12 features" in page.inner_text("#state") and fits(page)
    assert page.evaluate("document.querySelector('#tokens').textContent") == "one two⏎\nthree <b>four</b>"
    page.locator("#tokens .t").nth(1).click()
    assert page.locator("#features tbody tr").count() == 4 and page.inner_text("#h-features").startswith("At")
    name = page.inner_text("#features tbody a >> nth=0")
    page.locator("#features tbody button").first.click()
    assert name in page.inner_text("#shading") and page.locator("#tokens .a0").count() == 2
    page.fill("#text", "refuse this")
    page.click(".go")
    until(page, "document.querySelector('#state.bad')")
    assert page.inner_text("#state") == "text: expected at most 10 tokens, got 11" and page.is_enabled(".go")
    page.wrong[:] = [x for x in page.wrong if "400" not in x]


def test_try_it_beside_the_plain_model(page, served):
    page.goto(f"{served.url}/5/3/1258")
    page.click("text=erase this")
    page.wait_for_selector("#edits li a")
    assert page.inner_text("#edits li a") == "L5H3/1258"
    page.fill("#feature", "5:3:8")
    page.select_option("#kind", "scale")
    page.fill("#amount", "3")
    page.click("#add")
    page.fill("#prompt", "Once upon")
    page.fill("#length", "6")
    page.click("#go")
    page.wait_for_selector("#done:not([hidden])")
    assert page.inner_text("#state") == "done: 6 and 6 tokens, they differ from token 4 on"
    assert page.url.endswith("?edit=erase:5:3:1258&edit=scale:5:3:8:3&prompt=Once+upon&tokens=6")
    assert page.locator("#plain .differs").all_inner_texts() == [" of"] and fits(page)
    told = page.inner_text("#done").split("\n")
    assert told == ["erase L5H3/1258", "at 3 tokens", "scale L5H3/8", "never fired", "KL, mean", "0.17 nats",
                    "KL, largest", "0.50 nats at token 2"]  # fmt: skip
    page.reload()
    assert page.locator("#edits li").count() == 2 and page.input_value("#prompt") == "Once upon"
    closed = served.atlas.live.closed
    page.fill("#length", "200")
    page.click("#go")
    until(page, "document.querySelectorAll('#plain .new').length > 5")
    page.click("#stop")
    until(page, "document.querySelector('#state').textContent.startsWith('stopped')")
    end = time.monotonic() + 5
    while served.atlas.live.closed == closed:  # the model's side stops too
        assert time.monotonic() < end
        time.sleep(0.02)
    page.fill("#prompt", "refuse")
    page.click("#go")
    until(page, "document.querySelector('#state.bad')")
    assert page.inner_text("#state") == "prompt: expected at most 10 tokens, got 11"
    page.wrong[:] = [x for x in page.wrong if "400" not in x]


def test_the_model_itself_behind_the_pages(chromium):
    """The embedded model, not a stand-in: what it answers is what the pages read."""
    from writesae import load_default
    from writesae.browse.live import Live as RealLive

    model, tokenizer, saes = load_default()
    made = Served(Atlas(sites=list(saes), features=4096, live=RealLive(model, tokenizer, saes)))
    try:
        for page in window(chromium, "light", WIDE):
            page.goto(f"{made.url}/text")
            page.fill("#text", "def read(path):\n    return path")
            page.click(".go")
            page.wait_for_selector("#features tbody a")
            assert page.evaluate("document.querySelector('#tokens').textContent").endswith("⏎\n    return path")
            name = page.inner_text("#features tbody a >> nth=0")
            page.goto(f"{made.url}/try?edit=scale:{':'.join(re.findall('[0-9]+', name))}:-50&prompt=def&tokens=4")
            page.click("#go")
            page.wait_for_selector("#done:not([hidden])")
            told = page.inner_text("#done")
            assert (
                page.inner_text("#state").startswith("done: 4 and 4 tokens")
                and f"scale {name}" in told
                and "KL" in told
            )
    finally:
        made.close()


def test_colours_are_chosen_and_kept_and_keys_explained(wide, served):
    page = wide
    open_list(page, served)
    ink = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ink)
    page.click("#theme")
    page.click("#theme")
    dark = page.evaluate(ink)
    assert light != dark and page.get_attribute("#theme", "aria-label") == "Colours: dark"
    page.goto(f"{served.url}/about")
    assert page.evaluate(ink) == dark
    page.keyboard.press("?")
    assert page.is_visible("#keys") and page.evaluate("document.activeElement.textContent") == "Close"
    page.keyboard.press("Escape")
    assert page.is_hidden("#keys") and page.url.endswith("/about")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("Tab")
    assert page.evaluate(outline) == "solid"


CONTRAST = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (css) => { paint.clearRect(0, 0, 1, 1); paint.fillStyle = css; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const at = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !at.checkVisibility() || at.closest("script, option, :disabled")) continue;
    let under = at;
    while (under && rgba(getComputedStyle(under).backgroundColor)[3] < 255) under = under.parentElement;
    const style = (of) => getComputedStyle(of || document.body);
    const [a, b] = [light(rgba(style(at).color)), light(rgba(style(under).backgroundColor))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const where = `${at.tagName}.${at.className} ${walk.currentNode.data.slice(0, 20)}`;
    if (ratio < 4.5) bad.push(`${where} ${ratio.toFixed(2)}`);
  }
  return [...new Set(bad)];
}"""


def test_every_text_has_contrast(page, served):
    for path in ("/", "/5/3/1258", "/about", "/try?edit=scale:5:3:8:3", "/5/9/9"):
        page.goto(served.url + path)
        assert page.evaluate(CONTRAST) == [], path
    page.wrong[:] = [x for x in page.wrong if "404" not in x]


def test_what_is_drawn_here_is_written_as_there(wide, served):
    """The script and the server write tokens and numbers alike, or a list would change as it is scrolled."""
    page = wide
    page.goto(f"{served.url}/about")
    texts = [
        "",
        " ",
        "  a b ",
        "\n\n",
        "\tx",
        "é" * 60,
        "a\u202eb\x00\x1b\u200e\ufeff",
        "🙂" * 45,
        "\U000e0041",
        "a\u2028b",
        "␣x",
    ]
    assert page.evaluate("xs => xs.map(W.token)", texts) == [show.token(x) for x in texts]
    numbers = [0.0, 1e-9, 0.004, 0.01, 0.5, 9.994, 12.3, 99.4, 123.4, 1234.5, -2.5, 1e6, -1e-7]
    assert page.evaluate("xs => xs.map(W.number)", numbers) == [show.number(x) for x in numbers]
    shares = [0.0, 1e-9, 5e-6, 0.00123, 0.0123, 0.123, 0.5, 1.0]
    assert page.evaluate("xs => xs.map(W.percent)", shares) == [show.percent(x) for x in shares]
    assert page.evaluate("xs => xs.map(x => W.level(x))", shares) == [show.level(x, 1.0) for x in shares]
    assert page.evaluate("[W.number(null), W.number(NaN), W.number(-Infinity)]") == ["–", "–", "−∞"]


def test_hostile_text_runs_nowhere(chromium):
    """In every field of a store, dictionary, text and address; by escaping alone, the pages' policy switched off."""
    made = Served(Atlas(features=300, live=Live(text=hostile), text=hostile))
    sentinel = "window.ran = []; window.attacked = (x) => window.ran.push(x); window.alert = window.attacked;"
    attack = "%22'%3E%3Cimg%20src=x%20onerror=attacked(1)%3E%3Cscript%3Eattacked(2)%3C/script%3E"
    edit = f"edit=scale:5:3:8:{attack}&edit={attack}"
    markup = "main script, main img, [onerror], [onload], [srcdoc], [style*=expression]"

    def visit(page, path):
        page.goto(made.url + path)
        yield path
        if path in ("/", "/5/3/8"):
            assert "<script>attacked(" in page.inner_text("main")  # it is there, as text
        if path in ("/", "/?q="):
            page.wait_for_selector("html[data-ready]")
            page.focus("#grid")
            page.keyboard.press("End")
        if path.startswith("/text"):
            page.fill("#text", hostile("own text"))
            page.click(".go")
            page.wait_for_selector("#result:not([hidden])")
            page.locator("#tokens .t").first.click()
            yield path
            page.fill("#text", "refuse")
            page.click(".go")
            until(page, "document.querySelector('#state.bad')")
        if path.startswith("/try"):
            page.fill("#prompt", hostile("prompt"))
            page.fill("#length", "4")
            page.click("#go")
            page.wait_for_selector("#done:not([hidden])")
        yield path

    try:
        for page in window(chromium, "light", WIDE, bypass_csp=True):
            page.add_init_script(sentinel)
            for path in ("/", "/5/3/8", "/about", f"/?q={attack}&sort={attack}&site={attack}", f"/text#{attack}",
                         f"/try?{edit}&prompt={attack}&tokens={attack}", f"/5/3/{attack}"):  # fmt: skip
                for where in visit(page, path):
                    assert page.evaluate("window.ran") == [], where
                    assert page.locator(markup).count() == 0, where
            page.wrong[:] = [x for x in page.wrong if not re.search("400|404", x)]
    finally:
        made.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_files_for_any_host(chromium, tmp_path, capsys):
    """A list, its data and a page a feature that fired, in a subfolder of a plain file server."""
    atlas = Atlas(features=40, live=None)
    out = tmp_path / "host" / "sub" / "site"
    assert write(atlas, out, 12) == 0
    rows = chosen(atlas.table, 12)
    pages = {str(x.relative_to(out)) for x in out.glob("L*/*.html")}
    where = [(*atlas.info["sites"][atlas.table.site[i]], int(atlas.table.feature[i])) for i in rows]
    assert pages == {link(*x, static=True) for x in where} and len(pages) == 36
    least = min(atlas.table.count[rows[atlas.table.site[rows] == 0]])
    assert (atlas.table.count[:40] > least).sum() == 11
    assert "36 pages of features, about" in capsys.readouterr().out
    handler = functools.partial(Quiet, directory=tmp_path / "host")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/sub/site/"
        for page in window(chromium, "dark", WIDE):
            page.goto(url)
            page.wait_for_selector("html[data-ready]")
            assert page.locator("nav >> text=Try it").count() == 0
            assert page.locator("#rows .row:not([hidden]) a[href]").count() > 9
            page.focus("#grid")
            page.keyboard.press("End")  # those that never fired have no page
            assert page.locator("#rows .row:not([hidden]) a:not([href])").count() > 9
            page.keyboard.press("Home")
            page.click("#rows .row:not([hidden]) a[href]")
            page.wait_for_url(re.compile(r"sub/site/L5H\d/\d+\.html"))
            page.hover("mark.here")
            assert page.is_visible("#tip")
            key, rel = ("j", "next") if page.locator("a[rel=next]").count() else ("k", "prev")
            beside = page.evaluate(f"document.querySelector('a[rel={rel}]').href")
            page.keyboard.press(key)
            page.wait_for_url(beside)
            page.mouse.move(1, 1)
            page.keyboard.press("Escape")
            page.wait_for_url(re.compile("sub/site/index.html"))
        server.shutdown()
    broken = {x for x in out.rglob("*.html") for y in re.findall(r'(?:href|src)="([^"#]+)"', x.read_text())
              if not (x.parent / y).resolve().is_file() or y.startswith("/")}  # fmt: skip
    assert not broken


@pytest.fixture(scope="module")
def large():
    """289 million firings' worth of rows: 288 heads of 2,048 features."""
    made = Served(Atlas(sites=[(layer, head) for layer in range(18) for head in range(16)]))
    yield made
    made.close()


def test_six_hundred_thousand_features_are_there_at_once(chromium, large):
    """Bounds that a busy machine keeps; bench/browse_pages.py measures."""
    for page in window(chromium, "light", WIDE):
        open_list(page, large)
        first = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert first < 4000 and found(page) == 589_824
        for text in ("house", "L3H7", "1258", "word12"):
            page.fill("#q", text)
            until(page, f"location.search.includes('q={text}')")
            until(page, "document.querySelector('#found').textContent.includes(' of ')")
        slowest = page.evaluate("Math.max(...performance.getEntriesByName('writesae-search').map(x => x.duration))")
        assert slowest < 1500
        page.fill("#q", "")
        until(page, "document.querySelector('#found').textContent.startsWith('589,824 features')")
        page.focus("#grid")
        page.keyboard.press("End")
        assert page.get_attribute("#rows .row.at", "aria-rowindex") == "589825"
        assert page.is_visible("#rows .row.at")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("PageUp")
        place = int(page.get_attribute("#rows .row.at", "aria-rowindex"))
        assert 589_780 < place < 589_820 and page.is_visible("#rows .row.at")
        # A turn of the wheel moves by rows, wherever the bar is.
        before = page.evaluate(FIRST)
        page.mouse.move(600, 500)
        page.mouse.wheel(0, -340)
        until(page, f"{FIRST} === {before - 10}")
