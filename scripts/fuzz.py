"""Looks for inputs that break something: random ones, for so many minutes, from a seed.

    python scripts/fuzz.py [--minutes 1] [--seed 0] [--only operators corpora stores dictionaries published models runs]

Operators against their references in float64; corpora, sound and damaged; damaged collections; hostile folders of
dictionaries, published checkpoints, models and runs. Time is shared among them. Exits 1 where anything was found, and
says how to see it again: every case follows from its seed and number. What is found becomes a test.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]

# Cases of strangers' files are run so many at a time in a process of their own, whose memory is watched.
BATCH = {"dictionaries": 100, "published": 40, "models": 20, "runs": 200}
GENERATOR = {
    "dictionaries": ("hostile_dictionaries", "folders"), "published": ("hostile_dictionaries", "published"),
    "models": ("hostile_models", "folders"), "runs": ("hostile_runs", "injected"),
}  # fmt: skip
KINDS = ("operators", "corpora", "stores", *GENERATOR)


def each(cases: Iterator[tuple[str, Callable[[], None]]]) -> Iterator[tuple[int, list[str]]]:
    """Runs cases one by one: (how many, what was found) of each."""
    for name, call in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            yield 1, []
        except AssertionError as defect:
            yield 1, [f"{name}: {defect}"]
        except Exception as error:
            yield 1, [f"{name}: {type(error).__name__}: {error}"]


def stores(seed: int, scratch: Path) -> Iterator[tuple[int, list[str]]]:
    import damage

    made = damage.prepare(scratch)
    for n in itertools.count():
        try:
            damage.check(seed * 1_000_003 + n, 10, scratch, made=made)
            yield 10, []
        except damage.Defect as defect:
            yield 10, [str(defect)]


def batches(kind: str, seed: int) -> Iterator[tuple[int, list[str]]]:
    import watch

    for n in itertools.count():
        start = seed * 1_000_003 + n
        found = watch.in_child(*GENERATOR[kind], start, BATCH[kind])
        yield found["cases"], [f"seed {start}, {name}: {why}" for name, why in found["bad"]]


def runner(kind: str, seed: int, scratch: Path) -> Iterator[tuple[int, list[str]]]:
    if kind == "operators":
        import operators

        return each(operators.cases(seed))
    if kind == "corpora":
        import corpora

        return each(corpora.cases(seed, scratch))
    return stores(seed, scratch) if kind == "stores" else batches(kind, seed)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long in all, shared among the kinds")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of every kind")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="the kinds to try")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    everything = []
    for kind in args.only:
        share = args.minutes * 60 / len(args.only)
        cases, findings, start = 0, [], time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            for count, found in runner(kind, args.seed, Path(scratch)):
                cases, findings = cases + count, findings + found
                if time.monotonic() - start >= share:
                    break
        print(f"{kind:13}{cases:7} cases in {time.monotonic() - start:5.1f} s, {len(findings)} found", flush=True)
        for finding in findings[:20]:
            print(f"  {finding}", flush=True)
        everything += findings
    return int(bool(everything))


if __name__ == "__main__":
    sys.exit(main())
