"""Timing on a GPU, for the cases of `writesae bench --gpu`; and their dry run, which measures nothing.

A dry run (`--dry TWIN`) goes through the same code on the host twin of the CUDA kernels with tiny sizes: results are
compared as on a GPU, and every row says "dry run" in place of a number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import torch

from .case import Missing, Options, Row
from .timing import median_and_spread, ratio_row

Run = Callable[[], object]
DRY = "dry run: no number"
FEWEST, PATIENCE = 3, 8.0  # rounds at least, and seconds after which no other begins
LONGEST = 0.2  # seconds the device sleeps at most, where the host takes longer to issue a run than the device to do it


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
        self._ceilings: dict[str, float] = {}

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def put(self, inputs: dict[str, torch.Tensor], tokens: int | None = None) -> dict[str, torch.Tensor]:
        """On the device; with `tokens`, repeated along the second axis up to so many, since the host draws slowly."""
        moved = {name: x.to(self.device) for name, x in inputs.items()}
        if tokens is None:
            return moved
        return {
            name: x.repeat(1, -(-tokens // x.shape[1]), *[1] * (x.ndim - 2))[:, :tokens] for name, x in moved.items()
        }

    def graphs(self, runs: Sequence[Run]) -> tuple[list[Run], str]:
        """(each run as the replay of a CUDA graph of it, "") so that no host's launching is measured; or, where one of
        them cannot be captured, (all as they are, why): both sides of a ratio are launched in the same way."""
        if self.dry:
            return list(runs), ""
        found: list[Run] = []
        for run in runs:
            graph = torch.cuda.CUDAGraph()
            try:
                for _ in range(3):  # what is compiled or tuned at the first call
                    run()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    run()
            except Exception as error:
                torch.cuda.synchronize()
                return list(runs), f"launched one by one, no graph: {error}".splitlines()[0][:200]
            found.append(graph.replay)
        return found, ""

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
        began = time.perf_counter()
        for done in range(rounds or self.rounds):
            if done >= FEWEST and time.perf_counter() - began > PATIENCE:
                break
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
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        return int(min(2 * (time.perf_counter() - start), LONGEST) * 2e9)

    def ratio(
        self, name: str, peer: str, unit: str, ours: Run, theirs: Run, target=None, aim=None, graph: bool = False
    ) -> Row:
        """A row from both, run in turn; without a number in a dry run. graph: of both as CUDA graphs, or of neither."""
        (ours, theirs), why = self.graphs([ours, theirs]) if graph else ([ours, theirs], "")
        row = ratio_row(name, peer, unit, *self.time([ours, theirs]), target=target, aim=aim)
        row.note = why
        return self.honest(row)

    def alone(self, name: str, run: Run, target: float | None = None, graph: bool = True) -> Row:
        """A row of milliseconds, with no peer. graph: of the run's CUDA graph, where it has one (a backward has none:
        autograd runs it on the stream of its forward)."""
        (run,), why = self.graphs([run]) if graph else ([run], "")
        seconds, spread = median_and_spread(self.time([run])[0])
        return self.honest(Row(name, "", 1e3 * seconds, "ms", target, spread=spread, seconds=seconds, note=why))

    def seconds(self, run: Run) -> float:
        return statistics.median(self.time([run])[0])

    def honest(self, row: Row) -> Row:
        if self.dry:
            row.value = row.met = row.spread = row.rate = row.seconds = row.peer_seconds = row.share = None
            row.note = DRY
        return row

    def bound(self, row: Row, work: float, unit: str, of: str) -> Row:
        """The row with its rate of work (FLOP or bytes) and its share of the device's measured ceiling."""
        row.does(work, unit, of)
        row.ceiling = None if self.dry else self.ceiling(of)
        row.share = None if self.dry or not row.rate else row.rate / row.ceiling
        return self.honest(row)

    def ceiling(self, of: str) -> float:
        """GB/s of a copy (read plus written), or GFLOP/s of a square matrix product in "bfloat16" or "float32".

        Measured once a process.
        """
        if of not in self._ceilings:
            if of == "copy":
                a = torch.empty(2**30, dtype=torch.float32, device=self.device).normal_()
                b = torch.empty_like(a)
                rate = 2 * a.nbytes / self.seconds(lambda: b.copy_(a)) / 1e9
            else:
                a, b = (torch.randn(8192, 8192, device=self.device, dtype=getattr(torch, of)) for _ in range(2))
                out = torch.empty_like(a)
                rate = 2 * 8192**3 / self.seconds(lambda: torch.mm(a, b, out=out)) / 1e9
            self._ceilings[of] = rate
        return self._ceilings[of]


def peer(module: str, name: str, package: str):
    """A function of a package that may not be installed, or may not want this card."""
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        raise Missing(f"{package} is not importable here ({type(error).__name__}: {error})".splitlines()[0]) from error
