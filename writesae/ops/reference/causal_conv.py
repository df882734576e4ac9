"""Token by token: a short depthwise causal convolution and its activation."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(x, weight, bias=None, activation=None, cu_seqlens=None) -> Tensor:
    """`[B, T, D]`; see `writesae.ops.causal_conv`."""
    B, T, D = x.shape
    compute = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    W = weight.shape[1]
    starts = [0] if cu_seqlens is None else cu_seqlens.tolist()[:-1]
    out = []
    for t in range(T):
        start = max(s for s in starts if s <= t)  # of the sequence that token t is in
        y = torch.zeros(B, D, dtype=compute, device=x.device) if bias is None else bias.to(compute).expand(B, D)
        for s in range(max(W - 1 - (t - start), 0), W):
            y = y + weight[:, s].to(compute) * x[:, t - W + 1 + s].to(compute)
        if activation is not None:
            y = torch.nn.functional.silu(y.to(x.dtype).to(compute))
        out.append(y.to(x.dtype))
    return torch.stack(out, 1) if out else x.new_empty(x.shape)
