"""`encode`: which atoms fire at every token, from writes alone, without states and without keeping pre-activations.

The activation of atom i is `a_i(t) = v_i^T S_t w_i = e^g a_i(t-1) + sum_r (v_i . left_r)(right_r . w_i)`: two matrix
products and a decayed running sum, 64 times fewer operations than from states at K = V = 128. Young, arXiv 2605.12770.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..firings import Firings
from ..writes import Writes
from . import _dispatch
from .reference import encode as reference


@dataclass(frozen=True)
class Codes:
    """Sparse codes of every token and encoded head.

    Top-k mode: `values` (>= 0) and int64 `indices`, `[B, T, Hs, k]`, descending, ties to the lowest index; `offsets` is
    None. Threshold mode: `values`, `indices` `[n]` and `offsets` `[B*T*Hs + 1]` int64: token-major runs, rising index.

    carry: `[N, Hs, F]` float32 raw pre-activations after each sequence's last token, without bias, to go on from.
    heads: the value heads encoded, in order.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    carry: Tensor
    heads: tuple[int, ...]


def encode(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, K] or [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, V] or [Hs, F, r, V]
    b_enc: Tensor | None = None,  # [Hs, F]
    k: int = 32,
    threshold: float | Tensor | None = None,  # scalar or [Hs, F]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    backend: str | None = None,
    heads: Sequence[int] | None = None,
    carry: Tensor | None = None,  # [N, Hs, F]
) -> Codes:
    """Exact top k of the raw pre-activations `v_i^T S_t w_i + b_i`, then ReLU; or every one above a threshold.

    Args:
        writes: the trace of one layer (scalar gate; edits in it are honoured).
        v_enc, w_enc: encoder factors of the heads encoded; a rank axis r is summed over.
        b_enc: encoder bias, default 0.
        k: features kept a token and head, 1 <= k <= F.
        threshold: keep all pre-activations (bias included) strictly above it, instead of the top k. Must be >= 0.
        initial_state: state before the first token; default `writes.initial_state`.
        backend: "reference", "cpu", "cuda" or None.
        heads: value heads that row i of the factors belongs to; default all H heads in order.
        carry: pre-activations before the first token (an earlier call's `codes.carry`), in place of a state.

    Returns:
        `Codes`. Differentiable in v_enc, w_enc and b_enc (top-k mode: the gradient of `values`).

    Raises:
        ValueError: a wrong shape, dtype or size, naming the argument.
        RuntimeError: a gradient asked for the writes, or in threshold mode.
    """
    v_enc, w_enc, heads, carry = _prepare(writes, v_enc, w_enc, heads, initial_state, carry)
    Hs, F = v_enc.shape[:2]
    if b_enc is not None and tuple(b_enc.shape) != (Hs, F):
        raise ValueError(f"b_enc: expected [Hs={Hs}, F={F}], got shape {tuple(b_enc.shape)}")
    if threshold is not None:
        threshold = torch.as_tensor(threshold, dtype=torch.float32).expand(Hs, F)
        if bool((threshold < 0).any()):
            raise ValueError(f"threshold: expected >= 0, got {float(threshold.min())}")
    elif not 1 <= k <= F:
        raise ValueError(f"k: expected 1 <= k <= F={F}, got {k}")
    raise NotImplementedError
