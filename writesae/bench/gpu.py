"""Timing on a GPU, for the cases of `writesae bench --gpu`; and their dry run, which measures nothing.

A dry run (`--dry TWIN`) goes through the same code on the host twin of the CUDA kernels with tiny sizes: results are
compared as on a GPU, and every row says "dry run" in place of a number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from .case import Missing, Options, Row
from .timing import ratio_row

Run = Callable[[], object]
DRY = "dry run: no number"


class Gpu:
    """Where a case runs: a CUDA device, or the host twin in a dry run."""

    def __init__(self, options: Options):
        from .._library import backends, load_twin

        self.dry = bool(options.dry)
        self.device = "cpu" if self.dry else "cuda"
        self.backend = "twin" if self.dry else "cuda"
        self.rounds = options.rounds(15)
        if self.dry:
            load_twin(options.dry)
        elif backends()["cuda"] is not None:
            raise Missing(f"the CUDA kernels: {backends()['cuda']}")
        # Larger than any L2, and read by nothing else: zeroing it leaves nothing of the last round there.
        self._flush = None if self.dry else torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

    def put(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: x.to(self.device) for name, x in inputs.items()}

    def time(self, runs: Sequence[Run], rounds: int | None = None) -> list[list[float]]:
        """Seconds of each run by the device's clock, taken in turn, its cache emptied before each.

        The device sleeps before the first event while the host gets ahead, so that launching is not what is measured.
        """
        for _ in range(1 if self.dry else 3):
            for run in runs:
                run()
        if self.dry:
            return [[1.0] for _ in runs]
        ahead = [self._sleep(run) for run in runs]
        events = [[] for _ in runs]
        for _ in range(rounds or self.rounds):
            for run, cycles, taken in zip(runs, ahead, events, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                torch.cuda._sleep(cycles)
                start.record()
                run()
                end.record()
                taken.append((start, end))
                torch.cuda.synchronize()
        return [[start.elapsed_time(end) / 1e3 for start, end in taken] for taken in events]

    def _sleep(self, run: Run) -> int:
        """Cycles for which the device is kept busy while the host issues `run`: twice what it took the host."""
        import time

        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return int(2 * (time.perf_counter() - start) * 2e9)

    def ratio(self, name: str, peer: str, unit: str, ours: Run, theirs: Run, target=None, aim=None) -> Row:
        """A row from both, run in turn; without a number in a dry run."""
        row = ratio_row(name, peer, unit, *self.time([ours, theirs]), target=target, aim=aim)
        return self.honest(row)

    def seconds(self, run: Run) -> float:
        return statistics.median(self.time([run])[0])

    def honest(self, row: Row) -> Row:
        if self.dry:
            row.value = row.met = row.spread = row.rate = row.seconds = row.peer_seconds = row.share = None
            row.note = f"{DRY}; {row.note}" if row.note else DRY
        return row

    def bound(self, row: Row, work: float, unit: str, of: str) -> Row:
        """The row with its rate of work (FLOP or bytes) and its share of the device's measured ceiling."""
        row.does(work, unit, of)
        row.ceiling = None if self.dry else self.ceiling(of)
        row.share = None if self.dry or not row.rate else row.rate / row.ceiling
        return self.honest(row)

    def ceiling(self, of: str) -> float:
        """GB/s of a copy (read plus written), or GFLOP/s of a square matrix product in "bfloat16" or "float32"."""
        if of == "copy":
            a = torch.empty(2**30, dtype=torch.float32, device=self.device).normal_()
            b = torch.empty_like(a)
            return 2 * a.nbytes / self.seconds(lambda: b.copy_(a)) / 1e9
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=getattr(torch, of)) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * 8192**3 / self.seconds(lambda: torch.mm(a, b, out=out)) / 1e9


def peer(module: str, name: str, package: str):
    """A function of a package that may not be installed."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Missing(f"{package} is not importable here ({type(error).__name__}: {error})".splitlines()[0]) from error
