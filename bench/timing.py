"""Timing and reporting that every benchmark shares: interleaved runs, medians, a table and a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure. `spread`: distance between the quartiles over the median. `met`: None where there is no target."""

    name: str
    peer: str
    value: float
    unit: str
    target: float | None
    met: bool | None
    spread: float


def interleaved(runs: Sequence[Callable[[], object]], repeats: int = 9, warmup: int = 1) -> list[list[float]]:
    """Seconds of each run, `repeats` times, taken in turn so that a slow moment of the machine falls on all of them."""
    for _ in range(warmup):
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return seconds


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """(median, distance between the quartiles over the median)."""
    middle = statistics.median(values)
    if len(values) < 4:
        return middle, (max(values) - min(values)) / middle
    low, _, high = statistics.quantiles(values, n=4)
    return middle, (high - low) / middle


def paired_ratio(run: Callable[[], object], other: Callable[[], object], repeats: int = 9) -> tuple[float, float]:
    """(median of time of `run` over time of `other` in the same round, its spread)."""
    ours, theirs = interleaved([run, other], repeats)
    return median_and_spread([a / b for a, b in zip(ours, theirs, strict=True)])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write_rows(stem: str, rows: Sequence[Row], **extra) -> Path:
    """Prints the rows as a table and writes them to `bench/results/<stem>.json` with machine, versions and date."""
    width = max((len(row.name) for row in rows), default=4)
    for row in rows:
        verdict = "" if row.met is None else f"   target {row.target:g}: {'met' if row.met else 'MISSED'}"
        peer = f" against {row.peer}" if row.peer else ""
        print(f"{row.name:{width}}  {row.value:10.4g} {row.unit:8} (spread {row.spread:.0%}){verdict}{peer}")
    record = {
        "rows": [asdict(row) for row in rows],
        "machine": {
            "processor": _processor(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
            "load_average": os.getloadavg(), "system": platform.platform(),
        },
        "versions": {name: _version(name) for name in ("writesae", "torch", "transformers", "numpy")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **extra,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stem}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}")
    return path
