"""Reference for `dplr` (diagonal plus low rank: RWKV-7, KDA, GLA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...edits import Edits
from .scan import compute_dtype, walk


def dplr(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H, K]  log-decay
    a: Tensor | None,  # [B, T, H, K]
    b: Tensor | None,  # [B, T, H, K]
    initial_state: Tensor | None,  # [N, H, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    edits: Edits | None,  # rows expanded
    snapshots: Tensor | None,  # [P, 2]  (row, position)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (o [B,T,H,V] in v's dtype, final_state [N,H,K,V], left [B,T,H,R,K], right [B,T,H,R,V], snapshots).

    R = 2 where there is an erase: `b (S^T a)^T`, which reads the state before its gate, and `k v^T`, the native write.
    """
    compute, out_dtype = compute_dtype(v), v.dtype
    q, k, v, g = (x.to(compute) for x in (q, k, v, g))
    erase = None if a is None or b is None else (a.to(compute), b.to(compute))

    def token(row: int, t: int, state: Tensor):
        new = (k[row, t], v[row, t])
        decayed = g[row, t].exp()[..., None] * state
        if erase is None:
            return decayed, (new,)
        reads, writes = erase
        return decayed, ((writes[row, t], torch.einsum("hkv,hk->hv", state, reads[row, t])), new)

    o, final, rights, shots = walk(token, q, v, initial_state, cu_seqlens, edits, snapshots)
    left = k[:, :, :, None] if erase is None else torch.stack((erase[1], k), 3)
    return o.to(out_dtype), final, left, torch.stack(rights, 3), shots
