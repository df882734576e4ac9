"""Reference for `gated_delta_rule`, for a gate of each head and of each key channel. Kernels answer to it."""

from __future__ import annotations

import torch
from torch import Tensor

from .scan import scan


def _increment(state: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """What the key finds in the decayed state is erased by its own write: `u = beta (v - S^T k)`."""
    return beta * (v - torch.einsum("hkv,hk->hv", state, k))


def gated_delta_rule(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan` of the delta rule; arguments as of that, but for the first."""
    return scan(_increment, *arguments)
