"""`rms_norm`: the norm over the last axis that a model's layers take, with or without the gate that gated-delta layers
put on what the recurrence returns. One pass over memory in place of a dozen."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from .._library import CPU_ERROR
from . import _dispatch, _transforms
from .reference.rms_norm import rms_norm as reference

_ADVICE = 'use backend="reference", or torch.no_grad()'
_dispatch.declare("rms_norm", {"cpu": _dispatch.Limits("rms_norm", gradient=())})


@without_autocast
def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    gate: Tensor | None = None,  # [..., D]
    eps: float = 1e-6,
    *,
    zero_centred: bool = False,
    round_once: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`y = x / sqrt(mean(x^2) + eps) * weight`, times `silu(gate)` where a gate is given.

    Args:
        x: any strides; the last axis is made dense.
        weight: with `zero_centred`, 1 + weight is what multiplies.
        gate: of x's shape, its own dtype.
        eps: >= 0, added to the mean square.
        zero_centred: the weight is stored as its difference from 1 (Qwen3-Next's blocks).
        round_once: in half precision, round at the end only (Qwen3-Next's and OLMo-Hybrid's blocks); otherwise before
            the weight and, where there is a gate, before the gate too (Llama's, and the gated norm after the rule).
        backend: "reference", "cpu", "cuda" or None.

    Returns:
        `[..., D]` in x's dtype. Sums in float32 (float64 for float64 inputs, reference only).

    Raises:
        ValueError: a wrong shape, dtype or eps, naming the argument.
        RuntimeError: a gradient asked of a kernel, which has no backward; backend="reference" has one.

    Forward mode and `torch.func` are right (by the reference, but for a lone vmap). Autocast changes nothing.
    """
    check_floats(("gate",), x=x, weight=weight, gate=gate)
    if x.ndim < 1 or not x.shape[-1]:
        raise ValueError(f"x: expected floating [..., D], got shape {tuple(x.shape)}")
    D = x.shape[-1]
    if tuple(weight.shape) != (D,):
        raise ValueError(f"weight: expected floating [D={D}], got shape {tuple(weight.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate: expected floating of x's shape {tuple(x.shape)}, got shape {tuple(gate.shape)}")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    tensors = {"x": x, "weight": weight, "gate": gate}
    if _dispatch.choose("rms_norm", backend, tensors) == "reference":
        return reference(x, weight, gate, eps, zero_centred, round_once)
    _dispatch.refuse_gradient("rms_norm", tensors, _ADVICE)
    rows = None if gate is None else gate.reshape(-1, D)
    return torch.ops.writesae.rms_norm(x.reshape(-1, D), weight, rows, eps, zero_centred, round_once).view(x.shape)


if CPU_ERROR is None:

    @torch.library.register_fake("writesae::rms_norm")
    def _(x, weight, gate, eps, zero_centred, round_once):
        return x.new_empty(x.shape)

    _transforms.register("rms_norm", _ADVICE, reference, fold=("x", "gate"))
