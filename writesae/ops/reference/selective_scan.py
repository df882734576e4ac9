"""Reference for `selective_scan` (Mamba-1's element-gated rule): token by token, any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ...writes import Writes


def selective_scan(
    x: Tensor,  # [B, T, V]  inputs (V channels)
    dt: Tensor,  # [B, T, V]  step sizes, after softplus
    A: Tensor,  # [V, K]  negative (K is the state size)
    B: Tensor,  # [B, T, K]
    C: Tensor,  # [B, T, K]
    D: Tensor | None = None,  # [V]  skip
    initial_state: Tensor | None = None,  # [N, 1, K, V]
) -> tuple[Tensor, Tensor, Writes]:
    """`S_t[n, c] = exp(dt_{t,c} A_{c,n}) S_{t-1}[n, c] + B_t[n] dt_{t,c} x_t[c]`, `y_t = S_t^T C_t + D x_t`.

    One head holds all channels: `writes` has H = 1, decay `[B, T, 1, V]` and decay_matrix `[1, K, V]` = A transposed.

    Returns (y [B,T,V], final_state [B,1,K,V], writes).
    """
    rows, T, V = x.shape
    matrix, right = A.T, dt * x
    state = x.new_zeros(rows, 1, A.shape[1], V) if initial_state is None else initial_state
    y = []
    for t in range(T):
        gate = (dt[:, t, None, None, :] * matrix).exp()
        state = gate * state + B[:, t, None, :, None] * right[:, t, None, None, :]
        y.append(torch.einsum("bkv,bk->bv", state[:, 0], C[:, t]))
    out = torch.stack(y, 1)
    if D is not None:
        out = out + D * x
    writes = Writes(
        dt[:, :, None], B[:, :, None, None], right[:, :, None, None], decay_matrix=matrix[None],
        initial_state=initial_state,
    )  # fmt: skip
    return out, state, writes
