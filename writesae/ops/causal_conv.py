"""`causal_conv`: the short depthwise convolution along time and its activation, from which gated-delta layers take
q, k and v. In the layout `[B, T, D]` of the projection before it and of the recurrence after it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_floats, sequence_offsets
from .._autocast import without_autocast
from .._library import CPU_ERROR
from . import _dispatch, _transforms
from .reference.causal_conv import causal_conv as reference

ACTIVATIONS = (None, "silu", "swish")
_dispatch.declare("causal_conv", {"cpu": _dispatch.Limits("causal_conv", gradient=())})


@without_autocast
def causal_conv(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D, W]
    bias: Tensor | None = None,  # [D]
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    backend: str | None = None,
) -> Tensor:
    """`y_t = act(bias + sum_s weight_s x_{t - W + 1 + s})` in every channel, with zeros before the first token.

    Args:
        x: inputs; any strides, the last axis is made dense.
        weight: W taps a channel, the last one meets the token itself.
        activation: None, "silu" or "swish" (the same).
        cu_seqlens: integer offsets of packed sequences (B = 1), which then do not see each other.
        backend: "reference", "cpu", "cuda" or None.

    Returns:
        `[B, T, D]` in x's dtype. Sums in float32 (float64 for float64 inputs, reference only); in half precision
        the sum is rounded before the activation and after it, as transformers' layers do.

    Raises:
        ValueError: a wrong shape, dtype or activation, naming the argument.
        RuntimeError: a gradient asked of a kernel, which has no backward; backend="reference" has one.

    Forward mode and `torch.func` are right (by the reference, which is slow, but for a lone vmap). Autocast changes
    nothing.
    """
    check_floats(("bias",), x=x, weight=weight, bias=bias)
    if x.ndim != 3:
        raise ValueError(f"x: expected floating [B, T, D], got shape {tuple(x.shape)}")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] != D or not weight.shape[1]:
        raise ValueError(f"weight: expected floating [D={D}, W], got shape {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (D,):
        raise ValueError(f"bias: expected floating [D={D}], got shape {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    if cu_seqlens is not None:
        sequence_offsets("causal_conv", cu_seqlens, B, T)
    tensors = {"x": x, "weight": weight, "bias": bias}
    chosen = _dispatch.choose("causal_conv", backend, tensors)
    if chosen == "reference":
        return reference(x, weight, bias, activation, cu_seqlens)
    _dispatch.refuse_gradient("causal_conv", tensors, 'use backend="reference", or torch.no_grad()')
    return torch.ops.writesae.causal_conv(x, weight, bias, activation is not None, cu_seqlens)


if CPU_ERROR is None:

    @torch.library.register_fake("writesae::causal_conv")
    def _(x, weight, bias, silu, cu_seqlens):
        return x.new_empty(x.shape)

    _transforms.register(
        "causal_conv",
        'use backend="reference", or torch.no_grad()',
        lambda x, weight, bias, silu, cu: reference(x, weight, bias, "silu" if silu else None, cu),
        fold=("x",),
        alone=("cu_seqlens",),
    )
