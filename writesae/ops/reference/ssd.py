"""Reference for `ssd` (Mamba-2's scalar-gated additive rule): token by token, any float dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ...writes import Writes


def ssd(
    x: Tensor,  # [B, T, H, V]  inputs (V is Mamba-2's head dimension)
    dt: Tensor,  # [B, T, H]  step sizes, after softplus
    A: Tensor,  # [H]  negative
    B: Tensor,  # [B, T, G, K]  (K is Mamba-2's state size, G its groups)
    C: Tensor,  # [B, T, G, K]
    D: Tensor | None = None,  # [H]  skip
    initial_state: Tensor | None = None,  # [N, H, K, V]  (Hugging Face keeps its transpose)
) -> tuple[Tensor, Tensor, Writes]:
    """`S_t = exp(dt A) S_{t-1} + B_t (dt x_t)^T`, `y_t = S_t^T C_t + D x_t`.

    Returns (y [B,T,H,V], final_state [B,H,K,V], writes).
    """
    rows, T, H, V = x.shape
    group = H // B.shape[2]
    decay, right = dt * A, dt[..., None] * x
    Bh, Ch = B.repeat_interleave(group, 2), C.repeat_interleave(group, 2)
    state = x.new_zeros(rows, H, B.shape[-1], V) if initial_state is None else initial_state
    y = []
    for t in range(T):
        state = decay[:, t].exp()[..., None, None] * state + Bh[:, t, :, :, None] * right[:, t, :, None, :]
        y.append(torch.einsum("bhkv,bhk->bhv", state, Ch[:, t]))
    out = torch.stack(y, 1)
    if D is not None:
        out = out + D[:, None] * x
    return out, state, Writes(decay, B[:, :, :, None], right[:, :, :, None], initial_state=initial_state)
