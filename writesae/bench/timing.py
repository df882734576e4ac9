"""Interleaved runs and medians, and what the machine can do at that moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .case import Row

Run = Callable[[], object]
FLOOR = "its arithmetic at a product's rate"


def interleaved(runs: Sequence[Run], repeats: int = 9, warmup: int = 1) -> list[list[float]]:
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
    """(median, distance between the quartiles over the median; the whole range where there are fewer than four)."""
    middle = statistics.median(values)
    if len(values) < 4:
        return middle, (max(values) - min(values)) / middle
    low, _, high = statistics.quantiles(values, n=4)
    return middle, (high - low) / middle


def paired_ratio(run: Run, other: Run, repeats: int = 9) -> tuple[float, float]:
    """(median of time of `run` over time of `other` in the same round, its spread)."""
    ours, theirs = interleaved([run, other], repeats)
    return median_and_spread([a / b for a, b in zip(ours, theirs, strict=True)])


def ratio_row(
    name: str, peer: str, unit: str, ours: Sequence[float], theirs: Sequence[float], target=None, aim=None
) -> Row:
    """A row from the seconds of interleaved rounds: the median of the rounds' ratios, "x faster" or "x time"."""
    if unit not in ("x faster", "x time"):
        raise ValueError(f"unit: expected 'x faster' or 'x time', got {unit!r}")
    pairs = zip(ours, theirs, strict=True)
    value, spread = median_and_spread([b / a if unit == "x faster" else a / b for a, b in pairs])
    return Row(
        name, peer, value, unit, target, spread=spread, aim=aim,
        seconds=statistics.median(ours), peer_seconds=statistics.median(theirs),
    )  # fmt: skip


def compare(name: str, peer: str, unit: str, ours: Run, theirs: Run, repeats: int, warmup: int = 1, **targets) -> Row:
    """Runs both in turn and makes the row."""
    return ratio_row(name, peer, unit, *interleaved([ours, theirs], repeats, warmup), **targets)


def floor_row(name: str, run: Run, work: float, repeats: int, target: float | None = 1.25, size: int = 2048) -> Row:
    """Processor time of `run` over that of its arithmetic alone: `work` FLOP at the rate that a square float32 product
    of `size` reaches in the same rounds. Processor time, a thread, since others may use the machine."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    threads, seconds = torch.get_num_threads(), ([], [])
    for turn in range(repeats + 1):
        for side, call in zip(seconds, (run, lambda: torch.mm(a, b, out=out)), strict=True):
            start = time.process_time()
            call()
            if turn:  # the first round only warms up
                side.append((time.process_time() - start) / threads)
    rates = [2 * size**3 / s for s in seconds[1]]
    row = ratio_row(name, FLOOR, "x time", seconds[0], [work / rate for rate in rates], target)
    row.product_rate = statistics.median(rates) / 1e9
    row.note = f"at the product's {row.product_rate:.0f} GFLOP/s"
    return row


def flat_rows(name: str, lengths: Sequence[int], runs: Sequence[Run], repeats: int, target: float = 1.15) -> list[Row]:
    """Time a token at each length over that at the first: 1 when nothing grows with the length.

    Short runs are repeated within a round until they take as many tokens as the longest, so that all are measured over
    the same time.
    """
    times = [max(1, lengths[-1] // n) for n in lengths]
    repeated = [lambda run=run, n=n: [run() for _ in range(n)] for run, n in zip(runs, times, strict=True)]
    taken = interleaved(repeated, repeats)
    each = [[s / n / length for s in x] for x, n, length in zip(taken, times, lengths, strict=True)]
    peer = f"the same at T = {lengths[0]:,}"
    return [
        ratio_row(f"{name}: time a token at T = {length:,}", peer, "x time", x, each[0], target)
        for length, x in zip(lengths[1:], each[1:], strict=True)
    ]


def ceilings(names: Sequence[str], device: str = "cpu", size: int = 2048, repeats: int = 5) -> dict[str, dict]:
    """`{name: {"value", "unit", "spread"}}`: the rate of a square matrix product, and of a copy (read plus written)."""

    def done():
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    found = {}
    for name in names:
        if name == "copy":
            a = torch.ones(64 * 2**20, dtype=torch.float32, device=device)  # 256 MB: more than any cache
            b = torch.empty_like(a)
            work, unit = 2 * a.nbytes, "GB/s"

            def run(a=a, b=b):
                b.copy_(a)
                done()
        else:
            dtype = getattr(torch, name)
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty(size, size, dtype=dtype, device=device)
            work, unit = 2 * size**3, "GFLOP/s"

            def run(a=a, b=b, out=out):
                torch.mm(a, b, out=out)
                done()

        (seconds,) = interleaved([run], repeats)
        value, spread = median_and_spread([work / s / 1e9 for s in seconds])
        found[name] = {"value": value, "unit": unit, "spread": spread}
    return found
