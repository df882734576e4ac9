"""Reference for `dplr` (diagonal plus low rank: RWKV-7, KDA, GLA): token by token, any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ...writes import Writes


def dplr(
    q: Tensor,  # [B, T, H, K]  (RWKV's r)
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H, K]  log-decay, a channel each
    a: Tensor | None = None,  # [B, T, H, K]  what the erase reads
    b: Tensor | None = None,  # [B, T, H, K]  where the erase writes
    initial_state: Tensor | None = None,  # [N, H, K, V]
) -> tuple[Tensor, Tensor, Writes]:
    """`S_t = Diag(e^g) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, `o_t = S_t^T q_t`.

    RWKV-7 is a = kappa, b = -(a (.) kappa); KDA is a = e^g (.) k, b = -beta k with k v^T scaled by beta; GLA has no a
    and b.
    Two writes a token (R = 2) when there is an erase: `b (S^T a)^T` and `k v^T`.

    Returns (o [B,T,H,V], final_state [B,H,K,V], writes).
    """
    rows, T, H, K = k.shape
    state = v.new_zeros(rows, H, K, v.shape[-1]) if initial_state is None else initial_state
    o, erased = [], []
    for t in range(T):
        new = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        if a is not None:
            read = torch.einsum("bhkv,bhk->bhv", state, a[:, t])
            new = new + b[:, t, :, :, None] * read[:, :, None, :]
            erased.append(read)
        state = new
        o.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    if a is None:
        left, right, erase = k[:, :, :, None], v[:, :, :, None], None
    else:
        left, right = torch.stack((b, k), 3), torch.stack((torch.stack(erased, 1), v), 3)
        erase = (a, b)
    return torch.stack(o, 1), state, Writes(g, left, right, erase=erase, initial_state=initial_state)
