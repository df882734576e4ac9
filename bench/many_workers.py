"""What filling one folder by units costs, how two workers scale, and what merging costs by the number of stores.

    python bench/many_workers.py [--tokens 200000] [--unit BYTES] [--rounds 3] [--ray] [--stores 8 16 32 64]

One process without units, one with, two workers, and with `--ray` two workers of Ray collect the same text, in turns;
the best of the rounds counts, from the moment that the model is loaded to the end of the index. Ray's workers load the
model first, so both pairs of workers are also timed from the first finished unit to the end. Every result is compared
to one worker's. What units cost is taken in seconds of processors too, which mean something on a machine that does
other things as well, and given for a unit, since those of this text are a small part of what they are by default. A
worker has one thread.

Then stores of as many parts of a text are merged, 8 to 64 of them; linear means that a store takes as long in each, in
seconds of a processor.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import end, row, tables
from kill_workers import Workers, documents, one_thread

from writesae import cli
from writesae.collect import Store, collect, merge
from writesae.collect.command import prepare


def same(a: Path, b: Path) -> bool:
    left, right = tables(a), tables(b)
    return left.keys() == right.keys() and all(left[name].equals(x) for name, x in right.items())


def alike(a: Path, b: Path) -> None:
    """The same text, the same firings but for rounding: units put other passages into a batch."""
    one, other = Store(a), Store(b)
    assert one.documents.equals(other.documents), "units left other documents"
    here, there = (np.array(store.counts()["count"]) for store in (one, other))
    assert abs(here - there).sum() <= 1e-3 * here.sum(), "units left other firings"


def workers(args: argparse.Namespace, scratch: Path) -> list[dict]:
    text = scratch / "text"
    documents(text, 4 * args.tokens)
    command = cli.parser("collect").parse_args(["collect", str(text), "--out", "-"])
    loaded = prepare(command, "cpu")
    shared = {"context": 256, "max_tokens": args.tokens}
    unit = args.unit or args.tokens // 4  # bytes: some sixteen units
    ways = {
        "one": [partial(collect, *loaded, **shared)],
        "units": [partial(collect, *loaded, unit=unit, **shared)],
        "two": [partial(collect, *loaded, unit=unit, rank=rank, world_size=2, **shared) for rank in range(2)],
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    used: dict[str, list[float]] = {way: [] for way in ways}
    steady: dict[str, list[float]] = {"two": [], "ray": []}
    for number in range(args.rounds):
        for way, runs in ways.items():
            out = scratch / f"{way}-{number}"
            began = time.perf_counter()
            at_work = Workers([partial(run, out) for run in runs])
            if any(at_work.end()):
                sys.exit(f"{way}: a worker failed")
            times[way].append(time.perf_counter() - began)
            used[way].append(at_work.cpu)
            print(f"{way}: {times[way][-1]:.2f} s, of a processor {used[way][-1]:.2f} s", flush=True)
        steady["two"].append(since_first(out))
        first, units, two = (scratch / f"{way}-{number}" for way in ways)
        assert same(units, two), "two workers left other tables"
        alike(first, units)
    best = {way: min(found) for way, found in times.items()}
    spread = {way: [min(x), float(np.median(x)), max(x)] for way, x in times.items()}
    cost, scaling = best["units"] / best["one"] - 1, best["units"] / best["two"]
    least = {way: min(found) for way, found in used.items()}
    more = [100 * (least[way] / least["one"] - 1) for way in ("units", "two")]
    what = f"{args.tokens} tokens in {len(list((scratch / 'units-0' / 'done').glob('unit-*')))} units"
    found = [
        row(f"{what}, one worker, against one process without units: more time", 100 * cost, "%", "<= 5", cost <= 0.05,
            "one process", spread["units"]),
        row(f"{what}, the same in seconds of a processor", more[0], "%", "<= 5", more[0] <= 5, "one process"),
        row(f"{what}, two workers, all they use", more[1], "%", "<= 5", more[1] <= 5, "one process"),
        row(f"{what}, two workers, against one", scaling, "x", ">= 1.7", scaling >= 1.7, "one worker", spread["two"]),
    ]  # fmt: skip
    count = len(list((scratch / "units-0" / "done").glob("unit-*")))
    found.append(row(f"{what}, a unit's own cost", (least["units"] - least["one"]) / count, "s of a processor"))
    if args.ray:
        for number in range(args.rounds):
            out = scratch / f"ray-{number}"
            on_ray(command, out, {**shared, "unit": unit})
            steady["ray"].append(since_first(out))
            print(f"ray: {steady['ray'][-1]:.2f} s from the first finished unit on", flush=True)
        assert same(scratch / "ray-0", scratch / "units-0"), "Ray's workers left other tables"
        cost = min(steady["ray"]) / min(steady["two"]) - 1
        spread_of = [min(steady["ray"]), float(np.median(steady["ray"])), max(steady["ray"])]
        found.append(row(f"{what}, two workers of Ray, against two with a rank: more time", 100 * cost, "%", "<= 5",
                         cost <= 0.05, "two workers", spread_of))  # fmt: skip
    return found


def since_first(out: Path) -> float:
    """Seconds from the first finished unit of a collection to its summary."""
    return (out / "summary.json").stat().st_mtime - min(p.stat().st_mtime for p in (out / "done").glob("unit-*"))


def on_ray(command: argparse.Namespace, out: Path, settings: dict) -> None:
    """Collects on a Ray of this machine with two CPUs."""
    import ray

    from writesae.collect import collect_on_ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    collect_on_ray(partial(prepare, command), out, **settings)


def merging(args: argparse.Namespace, scratch: Path) -> list[dict]:
    most = max(args.stores)
    text = scratch / "parts"
    documents(text, most * 12_000)
    names = sorted(text.iterdir())
    from writesae.collect import Corpus

    command = cli.parser("collect").parse_args(["collect", str(text), "--out", "-"])
    _, tokenizer, source = prepare(command, "cpu")
    stores = []
    for part in range(most):
        stores.append(scratch / f"store-{part}")
        share = names[part * len(names) // most : (part + 1) * len(names) // most]
        collect(Corpus.from_files(share), tokenizer, source, stores[-1], context=256, n=100)
    firings = [Store(store).summary()["firings"] for store in stores]
    times = {}
    for count in sorted(args.stores):
        found = []
        for number in range(args.rounds):
            began = time.process_time()
            summary = merge(stores[:count], scratch / f"merged-{count}-{number}")
            found.append(time.process_time() - began)
            assert summary["firings"] == sum(firings[:count])
        times[count] = min(found)
        print(f"merge of {count} stores, {summary['firings']:,} firings: {times[count]:.2f} s", flush=True)
    low, high = min(times), max(times)
    growth = (times[high] / high) / (times[low] / low)
    return [
        *(
            row(f"merge of {count} stores, {sum(firings[:count])} firings", x, "s of a processor")
            for count, x in times.items()
        ),
        row(f"a store in a merge of {high} against one in a merge of {low}", growth, "x the time", "<= 1.2 (linear)",
            growth <= 1.2),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--unit", type=int, help="bytes of text a unit (default: some sixteen units)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--stores", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--only", choices=("workers", "merging"))
    args = parser.parse_args()
    found = []
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        if args.only != "merging":
            found += workers(args, Path(scratch))
        if args.only != "workers":
            found += merging(args, Path(scratch))
    end("many_workers", found)


if __name__ == "__main__":
    main()
