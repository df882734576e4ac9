"""The feature browser's data: a list of 589,824 features, and a feature's page from a store of 50 M firings, cold.

    python bench/browse_speed.py [--keep FOLDER] [--only list|page]

Two made-up stores, since the model behind one would take days here: one of 288 heads x 2,048 features, and one of two
heads, whose features fire so often that no page could read their firings. Cold: files are written back and dropped from
the page cache (posix_fadvise), and a new Python process opens the atlas; timed from before the first import.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import end, row
from store_query import drop_cache

STORES = {"list": (288, 32, 10_000_000), "page": (2, 8, 50_000_000)}  # heads, k, firings
FEATURES, PAGES = 2048, 9
BUILD = """
import resource, sys, time
from writesae.browse import Atlas
began, whole = time.process_time(), time.perf_counter()
Atlas.open(sys.argv[1], sys.argv[2] or None, progress=False)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(time.process_time() - began, time.perf_counter() - whole, memory)
"""
PAGE = """
import json, sys, time
began, used = time.perf_counter(), time.process_time()
from writesae.browse import Atlas
loaded = time.perf_counter()
atlas = Atlas.open(sys.argv[1], sys.argv[2] or None, progress=False)
opened = time.perf_counter()
site = atlas.sites[int(sys.argv[3]) % len(atlas.sites)]
page = atlas.feature(*site, int(sys.argv[4])).as_dict()
done, used = time.perf_counter(), time.process_time() - used
contexts = sum(len(level["contexts"]) for level in page["levels"])
assert contexts and sum(page["histogram"]["counts"]) == page["row"]["count"]
before, table_used = time.perf_counter(), time.process_time()
n = len(atlas.table)
table_used = time.process_time() - table_used
print(json.dumps({"all": done - began, "imports": loaded - began, "open": opened - loaded, "page": done - opened,
                  "cpu": used, "contexts": contexts, "firings": page["row"]["count"], "rows": n,
                  "table": time.perf_counter() - before, "table_cpu": table_used}))
"""


def child(code: str, *arguments) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measured(name: str, folder: Path) -> list[dict]:
    from writesae.browse import sample_store

    heads, k, firings = STORES[name]
    began = time.process_time()
    store, sae = folder / "firings", folder / "sae"
    if not (store / "summary.json").exists():
        sites = [divmod(i, 16) for i in range(heads)]
        sample_store(folder, sites, FEATURES, firings, k=k, n=100, dictionaries=name == "page")
    sae = sae if sae.is_dir() else ""
    print(f"{name}: store made in {time.process_time() - began:.0f} processor seconds", flush=True)
    cpu, wall, rss = map(float, child(BUILD, store, sae).split())
    made = f"{heads * FEATURES:,} features, {json.loads((store / 'summary.json').read_text())['firings']:,} firings"
    kept = sum(path.stat().st_size for path in Path(f"{store}.browse").rglob("*") if path.is_file())
    print(f"{name}: built in {cpu:.0f} processor seconds ({wall:.0f} s), {rss:.0f} MB, {kept / 1e6:.0f} MB", flush=True)
    answers = []
    for i in range(PAGES):
        drop_cache(folder)
        drop_cache(Path(f"{store}.browse"))
        answers.append(json.loads(child(PAGE, store, sae, i * 31, i * i * 25)))
        print(answers[-1], flush=True)
    pages, tables = [a["all"] for a in answers], [a["table"] for a in answers]

    def spread(x):
        return [min(x), statistics.median(x), max(x)]

    return [
        row(f"table built ({made}), processor", cpu, "s"), row(f"memory of building ({made})", rss, "MB"),
        row(f"kept beside the store ({made})", kept / 1e6, "MB"),
        row(f"table loaded, cold ({made})", statistics.median(tables), "s", "<= 0.5",
            statistics.median(tables) <= 0.5, spread=spread(tables)),
        row(f"a feature's page, cold, new process ({made})", statistics.median(pages), "s", "<= 0.5",
            statistics.median(pages) <= 0.5, spread=spread(pages)),
        row("processor time of loading the table", statistics.median(a["table_cpu"] for a in answers), "s"),
        row("of it imports", statistics.median(a["imports"] for a in answers), "s"),
        row("processor time of a page", statistics.median(a["cpu"] for a in answers), "s"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="folder for the stores, used again if they are there")
    parser.add_argument("--only", choices=sorted(STORES))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in [args.only] if args.only else STORES:
            rows += measured(name, (args.keep or Path(scratch)) / name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"this process: {peak:.0f} MB")
    end("browse_speed" if args.only is None else f"browse_speed_{args.only}", rows)


if __name__ == "__main__":
    main()
