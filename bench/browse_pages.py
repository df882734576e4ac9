"""What a reader of `writesae browse` waits for, in Chromium: the list of 589,824 features (288 heads of 2,048), and one
feature's page as the browser sees it. Made-up features: see tests/browse_stub.py; a page's own cost from a store is
measured elsewhere.

    python bench/browse_pages.py [--runs 5]

First paint is Chromium's first-contentful-paint, from the click, of a server that runs; "ready" is when the table is
searched; a search is from the event to the rows in place, then to the next frame. Prints a line each, in milliseconds,
median and largest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from browse_stub import Atlas  # noqa: E402

from writesae.browse.command import address, make_server  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SEARCHES = ("house", "word", "L3H7", "1258", '" the"', "e")
SEARCH = """async (text) => {
  const q = document.querySelector("#q");
  const found = document.querySelector("#found");
  const before = performance.getEntriesByName("writesae-search").length;
  const start = performance.now();
  q.value = text;
  q.dispatchEvent(new Event("input", { bubbles: true }));
  while (performance.getEntriesByName("writesae-search").length === before) await new Promise(requestAnimationFrame);
  await new Promise(requestAnimationFrame);
  return [performance.getEntriesByName("writesae-search").at(-1).duration, performance.now() - start];
}"""
PAINT = """async () => {
  const get = () => performance.getEntriesByName("first-contentful-paint")[0];
  while (!get()) await new Promise(requestAnimationFrame);
  return get().startTime;
}"""
SORT = """(name) => {
  const start = performance.now();
  document.querySelector(`[data-name=${name}] button`).click();
  return performance.now() - start;
}"""


def measure(runs: int) -> dict[str, list[float]]:
    from playwright.sync_api import sync_playwright

    start = time.perf_counter()
    atlas = Atlas(sites=[(layer, head) for layer in range(18) for head in range(16)])
    listening = socket.create_server(("127.0.0.1", 0))
    made = time.perf_counter()
    server = make_server(atlas, listening)
    out: dict[str, list[float]] = {"server ready for its first page": [1000 * (time.perf_counter() - made)]}
    print(f"{len(atlas.table.count):,} features, made in {made - start:.1f} s", flush=True)
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    path = os.environ.get("WRITESAE_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        for _ in range(runs):
            page = browser.new_page()
            page.goto(address(listening))
            page.wait_for_selector("html[data-ready]")
            out.setdefault("first paint", []).append(page.evaluate(PAINT))
            read = page.evaluate("performance.getEntriesByName('writesae-search')[0].startTime")
            out.setdefault("table read", []).append(read)
            for text in SEARCHES:
                inside, seen = page.evaluate(SEARCH, text)
                out.setdefault("search, filtering and drawing", []).append(inside)
                out.setdefault("search, from the key to the next frame", []).append(seen)
            page.evaluate(SEARCH, "")
            for column in ("max", "density", "feature"):
                out.setdefault("sort by another column", []).append(page.evaluate(SORT, column))
            page.goto(f"{address(listening)}5/3/1258")
            out.setdefault("a feature, first paint", []).append(page.evaluate(PAINT))
            page.close()
        browser.close()
    server.should_exit = True
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="pages opened (default: 5)")
    for name, values in measure(parser.parse_args().runs).items():
        print(f"{name:42} median {statistics.median(values):7.1f}   largest {max(values):7.1f}   of {len(values)}")
