"""What a benchmark is made of: rows, the cases that measure them, and the reasons for a row without a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module

import torch

# Units in which less is better; in all others more is.
LESS = {"x time", "MB", "ms", "us", "s", "relative", "bytes"}
CEILINGS = ("float32", "bfloat16", "copy")


class Disagree(Exception):
    """Our result is not the peer's, so no ratio may be printed."""


class Missing(Exception):
    """What a case is compared with, or runs on, is not here."""


@dataclass
class Row:
    """One figure.

    Args:
        name: what was measured.
        peer: what `value` is relative to; "" for a figure that stands alone.
        value: None where there is no number; `note` then says why.
        unit: "x faster" (peer's time over ours), "x time" (ours over the peer's), "MB", "GFLOP/s", …
        target: the value asked for.
        met: whether `value` reaches it; computed when left None. None where there is no target or no value.
        spread: distance between the quartiles over the median; None for a single measurement.
        aim: a harder target.
        rate: work a second, "GFLOP/s" or "GB/s" as `rate_unit` says.
        ceiling_of: which ceiling of the machine bounds `rate`: "float32" or "bfloat16" (matrix products), "copy".
        ceiling, share: that ceiling as measured around this case, and rate / ceiling. Filled in by `run_case`.
        seconds, peer_seconds: medians.
        product_rate: GFLOP/s of a float32 product in the rounds of a row against its arithmetic (`timing.floor_row`).
        note: the reason for a missing value, or a remark.
    """

    name: str
    peer: str
    value: float | None
    unit: str
    target: float | None = None
    met: bool | None = None
    spread: float | None = None
    aim: float | None = None
    rate: float | None = None
    rate_unit: str | None = None
    ceiling_of: str | None = None
    ceiling: float | None = None
    share: float | None = None
    seconds: float | None = None
    peer_seconds: float | None = None
    product_rate: float | None = None
    note: str = ""
    less_is_better: bool | None = None

    def __post_init__(self):
        if self.less_is_better is None:
            self.less_is_better = self.unit in LESS
        if self.met is None and self.target is not None and self.value is not None:
            self.met = bool(self.value <= self.target if self.less_is_better else self.value >= self.target)

    def does(self, work: float, unit: str, ceiling_of: str) -> Row:
        """The same row with the rate of `work` (FLOP or bytes) in its `seconds`: "GFLOP/s" or "GB/s"."""
        if self.seconds:
            self.rate, self.rate_unit, self.ceiling_of = work / self.seconds / 1e9, unit, ceiling_of
        return self

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """repeats: rounds of interleaved runs, or None for the case's own number. quick: the smallest size that runs.

    dry: path of the CUDA kernels' host twin, on which the cases of a GPU then run without being measured.
    """

    repeats: int | None = None
    quick: bool = False
    threads: int | None = None
    dry: str = ""

    def rounds(self, usual: int = 9) -> int:
        return self.repeats or (3 if self.quick else usual)


@dataclass(frozen=True)
class Case:
    """Rows measured together.

    Args:
        name: on the command line, and of the JSON file.
        title: what the table calls it where nothing could be measured.
        measure: yields the rows; may raise `Disagree` or `Missing`.
        peer: what it is compared with.
        ceilings: measured before and after, so that shares are of what the machine gave at that moment.
    """

    name: str
    title: str
    measure: Callable[[Options], Iterable[Row]]
    peer: str = ""
    ceilings: tuple[str, ...] = ("float32", "copy")
    module: str = field(default="", compare=False)


def load_cases(modules: Iterable[str]) -> list[Case]:
    """The cases of every module's `CASES`, in order.

    Raises:
        ValueError: two cases of one name.
    """
    cases: dict[str, Case] = {}
    for module in modules:
        for case in import_module(module).CASES:
            if case.name in cases:
                raise ValueError(f"case {case.name!r}: expected one of this name, got two")
            cases[case.name] = Case(**{**vars(case), "module": module})
    return list(cases.values())


def agree(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Raises `Disagree` when the relative RMS difference of two results is beyond `tolerance` (or is not finite)."""
    from ..testing import difference

    found = difference(ours, theirs)
    if not found.rms <= tolerance:
        raise Disagree(
            f"{what}: results differ by {found.rms:.1e} relative RMS (worst element {found.worst:.1e}), allowed "
            f"{tolerance:.0e}"
        )
