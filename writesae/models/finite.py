"""`Check`: whether what a layer wrote is finite, asked of a device once a call of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.nonfinite import place_of
from .transfer import ToHost


@dataclass(eq=False)
class Check:
    """Whether one call of a layer wrote only finite numbers, and where its tokens stand, for saying where not."""

    first: Tensor  # [B], as `RuleOutput.first_nonfinite`
    heads: int
    layer: int
    start: int
    cu_seqlens: Tensor | None

    def require(self, first: Tensor) -> None:
        """first: the same on the host. Raises ValueError where it says that a state broke."""
        place = place_of(first, self.heads)
        if place is None:
            return
        row, token, head = place
        position = token + self.start
        if self.cu_seqlens is not None:
            offsets = self.cu_seqlens.cpu()
            row = int(torch.searchsorted(offsets, torch.tensor(token), right=True)) - 1
            position = token - int(offsets[row])
        raise ValueError(
            f"model: NaN or infinity in the state of layer {self.layer}, first at row {row}, position {position}, head "
            f"{head}"
        )


class Checks:
    """Those of all layers in one call of the model, on their way to the host."""

    def __init__(self, checks: Sequence[Check]):
        self._checks = checks
        self._transfer = ToHost([check.first for check in checks])

    def require(self) -> None:
        for check, first in zip(self._checks, self._transfer.get(), strict=True):  # in the order of layers
            check.require(first)
