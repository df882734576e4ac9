"""Reference for the operator `ssd`: the scan without an erase, whose q, k, v, beta are Mamba-2's C, B, x, dt."""

from __future__ import annotations

from torch import Tensor

from .scan import scan


def _increment(state: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return beta * v


def ssd(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan` of the additive rule; arguments as of that, but for the first."""
    return scan(_increment, *arguments)
