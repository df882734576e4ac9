"""KL divergences of next-token distributions, accurate for tiny shifts and exactly zero for equal logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

DIRECTIONS = ("forward", "reverse")
_IN_CACHE = 2**20  # bytes of one tensor of a slice


def kl_pair(
    base: Tensor, patched: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """KL(base || patched) and KL(patched || base), in nats, of every named patch against one baseline.

    With p the baseline distribution and d the difference of the logits less its mean under p, both directions are sums
    of p over smooth functions of d that vanish at d = 0: nothing of order one cancels, so a KL of 1e-10 keeps its
    digits, and equal logits give 0.0 exactly.

    Args:
        base: `[n, vocabulary]` logits, any float dtype; computed in float64, because float32 loses a KL below 1e-6.
        patched: {name: `[n, vocabulary]` logits}, or such pairs, of which one at a time is held.
    Returns:
        {name: (forward `[n]`, reverse `[n]`)} in float64.
    """
    base = base.double()
    p = torch.softmax(base, -1)[:, None]  # [n, 1, vocabulary]
    # On a CPU a few rows at a time, so that what is made of them stays in cache between the passes over it.
    rows = len(base) if base.device.type != "cpu" else max(1, _IN_CACHE // (8 * base.shape[-1]))
    out = {}
    for name, logits in patched.items() if isinstance(patched, Mapping) else patched:
        parts = zip(base.split(rows), p.split(rows), logits.split(rows), strict=True)
        found = [_pair(*part) for part in parts]
        out[name] = tuple(torch.cat(x) for x in zip(*found, strict=True))
    return out


def _pair(base: Tensor, p: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`kl_pair` of some rows: base `[n, vocabulary]` float64, p `[n, 1, vocabulary]` its probabilities."""
    d = logits.double().sub_(base) if logits.dtype != torch.float64 else logits - base
    d -= torch.bmm(p, d[:, :, None])[:, 0]
    # The largest d is taken out only where the exponential could overflow; then nothing tiny is at stake.
    top = d.amax(-1, keepdim=True).clamp_min(500) - 500
    grown = torch.expm1(d - top) if bool(top.any()) else torch.expm1(d)
    z = torch.bmm(p, grown[:, :, None])[:, 0, 0]
    log_z = torch.log1p(z) + top[:, 0]
    # sum of q d with q = p e^d / Z; the mean of d under p is 0, so only the growth counts.
    mean_q = torch.bmm(p, grown.mul_(d)[:, :, None])[:, 0, 0] / (1 + z)
    return log_z, mean_q - log_z


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """`[B, T - 1]` float64 cross-entropy of every next token, in nats: `logits [B, T, vocabulary]`, `ids [B, T]`."""
    rows = zip(logits, ids.to(logits.device), strict=True)  # a row at a time: the wide copy is large
    return torch.stack([cross_entropy(row[:-1].double(), at[1:], reduction="none").cpu() for row, at in rows])
