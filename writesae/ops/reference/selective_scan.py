"""Reference for `selective_scan`, Mamba-1's element-gated rule."""

from __future__ import annotations

from torch import Tensor

from ...edits import Edits
from .scan import compute_dtype, walk


def selective_scan(
    x: Tensor,  # [B, T, V]
    dt: Tensor,  # [B, T, V]
    A: Tensor,  # [V, K]
    B: Tensor,  # [B, T, K]
    C: Tensor,  # [B, T, K]
    D: Tensor | None,  # [V]
    initial_state: Tensor | None,  # [N, 1, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    edits: Edits | None,  # rows expanded
    snapshots: Tensor | None,  # [P, 2]  (row, position)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (o [B,T,V] in x's dtype, final_state [N,1,K,V], left [B,T,1,1,K], right [B,T,1,1,V], snapshots)."""
    compute, out_dtype = compute_dtype(x), x.dtype
    x, dt, A, B, C = (y.to(compute) for y in (x, dt, A, B, C))
    rates, right = A.T, dt * x

    def token(row: int, t: int, state: Tensor):
        return (dt[row, t] * rates).exp() * state, ((B[row, t][None], right[row, t][None]),)

    o, final, (right,), shots = walk(
        token, C[:, :, None], right[:, :, None], initial_state, cu_seqlens, edits, snapshots
    )
    o = o[:, :, 0]
    if D is not None:
        o = o + D.to(compute) * x
    return o.to(out_dtype), final, B[:, :, None, None], right[:, :, :, None], shots
