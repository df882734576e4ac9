"""Opens hostile reports in a headless Chromium and says whether any of their script ran.

    python tests/fuzz/chromium.py            # needs `chromium` (Debian: apt-get install chromium)

Every payload stands in every text of a run at once, a page each. Two controls: the same script in a page without
a policy must run, or the browser proves nothing; and raw script put into a report must not: its policy alone stops it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).parents[:3]]

MARK = "data-owned"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def document(browser: str, page: Path) -> str:
    """The page's document once it has loaded and run what it runs."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
                   "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]  # fmt: skip
        out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "<html" not in out.stdout:
        raise RuntimeError(f"{browser} gave no document: {out.stderr[-500:]}")
    return out.stdout


def ran(browser: str, page: Path) -> bool:
    start = document(browser, page)
    return MARK in start[start.index("<html") : start.index(">", start.index("<html"))]


def wherever(summary: dict, table: dict, payload: str) -> dict:
    """The payload in every place of a summary, string, number or key, that is not refused."""
    from hostile_runs import inject, places

    from writesae.report.schema import check_run

    for place in list(places(summary)):
        try:
            changed = inject(summary, place, payload)
            check_run(changed, table)
        except (ValueError, KeyError):
            continue
        summary = changed
    return summary


def main() -> int:
    browser = next((path for path in map(shutil.which, NAMES) if path), None)
    if browser is None:
        print(f"none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)", file=sys.stderr)
        return 2
    from hostile_runs import PAYLOADS, everything, write
    from test_report import made_up

    from writesae.report import build

    result = made_up(60)
    summary = json.loads(json.dumps({"model": "a model", **result.summary(50)}))
    found = {}

    def look(name: str, page: Path) -> None:
        found[name] = ran(browser, page)
        print(f"{'RAN  ' if found[name] else 'quiet'} {name}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "open.html").write_text(f"<!doctype html><html><body>{PAYLOADS[0]}{PAYLOADS[1]}</body></html>")
        if not ran(browser, root / "open.html"):
            print("the control did not run: this browser proves nothing", file=sys.stderr)
            return 2
        for payload in (PAYLOADS[1], PAYLOADS[3]):
            write(root / "leaves", wherever(summary, result.table, payload), result.table)
            look(f"wherever it is taken: {payload}", build(root / "leaves", root / "leaves"))
        for i, payload in enumerate(PAYLOADS):
            write(root / str(i), *everything(summary, result.table, payload))
            look(payload, build(root / str(i), root / str(i)))
        raw = f"<main>{PAYLOADS[0]}{PAYLOADS[3]}{PAYLOADS[1]}"
        text = (root / "0" / "report.html").read_text().replace("<main>", raw)
        (root / "raw.html").write_text(text)
        look("raw script in a report, stopped by its policy", root / "raw.html")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
