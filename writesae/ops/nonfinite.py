"""Where increments are not finite: in what rules return, and in increments from anywhere.

A state is finite as long as its increments are, so the first that is not is where one broke. Rules say where it stands,
`RuleOutput.first_nonfinite`, as numbers t H + h that stay on the device until somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import check_floats, refuse_unreadable


def first_nonfinite(right: Tensor) -> tuple[int, int, int] | None:
    """(row, position, head) of the first NaN or infinity in increments `[B, T, H, V]`, or None.

    One pass over `right` when nothing is wrong, which a rule's own `first_nonfinite` does without.

    Raises:
        ValueError: right is no floating tensor of four axes.
        RuntimeError: right has no numbers to look at (meta, torch.compile, vmap).
    """
    check_floats(right=right)
    if right.ndim != 4:
        raise ValueError(f"right: expected [B, T, H, V], got shape {tuple(right.shape)}")
    refuse_unreadable("first_nonfinite", "right", right)
    # The sum of finite numbers can overflow, so it only clears; what it does not clear is looked at in full.
    if bool(torch.isfinite(right.sum(dtype=torch.float32))):
        return None
    return place_of(nonfinite(right), right.shape[2])


def nonfinite(right: Tensor) -> Tensor:
    """`[B]` int64: as t H + h, where the first NaN or infinity stands in increments `[B, T, H, ...]`, -1 for none."""
    bad = (~torch.isfinite(right)).flatten(3).any(-1).flatten(1)  # [B, T H]
    return torch.where(bad.any(1), bad.int().argmax(1), -1)


def fake_nonfinite(v: Tensor, return_writes: bool) -> Tensor:
    """What an operator returns of it, for tracing. v: `[B, ...]`."""
    return v.new_empty(v.shape[0] if return_writes else 0, dtype=torch.int64)


def place_of(first: Tensor, H: int) -> tuple[int, int, int] | None:
    """(row of the batch, token, head) of the first place in `[B]` numbers of H heads, or None. Reads them."""
    return next(((b, *divmod(at, H)) for b, at in enumerate(first.tolist()) if at >= 0), None)


def of_heads(parts: Sequence[Tensor]) -> Tensor:
    """`[B]` numbers of one head each as those of all heads together, in order."""
    first = torch.stack(list(parts), 1)  # [B, H]
    H = first.shape[1]
    none = torch.iinfo(torch.int64).max
    at = torch.where(first < 0, none, first * H + torch.arange(H, device=first.device)).amin(1)
    return torch.where(at == none, -1, at)
