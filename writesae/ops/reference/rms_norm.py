"""Row by row in plain torch: the RMS norm of a model's layers, gated or not."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x, weight, gate=None, eps=1e-6, zero_centred=False, round_once=False) -> Tensor:
    """`[..., D]`; see `writesae.ops.rms_norm`."""
    compute = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32
    between = compute if round_once else x.dtype
    y = x.to(compute)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(between)
    y = y.to(compute) * (weight.to(compute) + float(zero_centred))
    if gate is not None:
        y = y.to(between).to(compute) * torch.nn.functional.silu(gate.to(compute))
    return y.to(x.dtype)
