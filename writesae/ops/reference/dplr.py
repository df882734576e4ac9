"""Reference for `dplr` (diagonal plus low rank: RWKV-7, Comba, GLA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...edits import Edits
from .scan import compute_dtype, l2norm, walk


def dplr(
    q: Tensor,  # [B, T, Hk, K]
    k: Tensor,  # [B, T, Hk, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H, K]  log-decay
    beta: Tensor,  # [B, T, H]
    scale: float,
    initial_state: Tensor | None,  # [N, H, K, V]
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,  # [N + 1]
    edits: Edits | None,  # rows expanded
    snapshots: Tensor | None,  # [P, 2]  (row, position)
    a: Tensor | None,  # [B, T, H, K]
    b: Tensor | None,  # [B, T, H, K]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What the operator computes; the public function leaves beta, scale and Hk < H to other rules.

    Returns (o [B,T,H,V] in v's dtype, final_state [N,H,K,V], left [B,T,Hk,K] and right [B,T,H,V] of the native write
    `k (beta v)^T`, snapshots, right side `a^T S_{t-1}` [B,T,H,V] of the erase, whose left is b, or None).
    """
    compute, out_dtype = compute_dtype(v), v.dtype
    q, k, v, g, beta = (x.to(compute) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    left, group = k, v.shape[-2] // k.shape[-2]
    q, k, v = q.repeat_interleave(group, 2) * scale, k.repeat_interleave(group, 2), beta[..., None] * v
    erase = None if a is None or b is None else (a.to(compute), b.to(compute))

    def token(row: int, t: int, state: Tensor):
        new = (k[row, t], v[row, t])
        decayed = g[row, t].exp()[..., None] * state
        if erase is None:
            return decayed, (new,)
        reads, writes = erase
        return decayed, ((writes[row, t], torch.einsum("hkv,hk->hv", state, reads[row, t])), new)

    o, final, rights, shots = walk(token, q, v, initial_state, cu_seqlens, edits, snapshots)
    return o.to(out_dtype), final, left, rights[-1], shots, None if erase is None else rights[0]
