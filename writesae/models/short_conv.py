"""The short causal convolution that layers make before their rule: `causal_conv`, and standing in for theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .frame import Frame, running


def causal_conv(
    x: Tensor,  # [B, D, T]
    weight: Tensor,  # [D, W]
    bias: Tensor | None = None,  # [D]
    activation: str | None = None,
    left: Tensor | None = None,  # [B, D, L]
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> Tensor:
    """Depthwise causal convolution and activation, `[B, D, T]`, as the layers make it before the rule.

    Args:
        left: inputs before the first column (L of any size; W - 1 are enough); zeros when None.
        cu_seqlens: offsets of packed sequences (B = 1), which then do not see each other.
    """
    D, W = weight.shape
    T = x.shape[-1]
    if cu_seqlens is None:
        wide = x if left is None else torch.cat([left.to(x), x], -1)
        y = nn.functional.conv1d(wide.to(weight.dtype), weight[:, None], bias, padding=W - 1, groups=D)
        y = y[:, :, : wide.shape[-1]][:, :, -T:]
    else:
        at = torch.arange(T, device=x.device)
        cu = cu_seqlens.to(x.device)
        place = at - cu[torch.searchsorted(cu, at, right=True) - 1]  # position inside its own sequence
        wide = nn.functional.pad(x.to(weight.dtype), (W - 1, 0))
        y = torch.zeros((), dtype=weight.dtype, device=x.device)
        for s in range(W):
            y = y + wide[:, :, W - 1 - s : W - 1 - s + T] * (weight[:, W - 1 - s, None] * (place >= s))
        y = y if bias is None else y + bias[:, None]
    if activation is not None:
        y = ACT2FN[activation](y)
    return y.to(x.dtype)


def function_shim(original: Callable | None) -> Callable:
    """Stands in for a layer's `causal_conv1d_fn`, which some releases have as None."""

    def causal_conv1d_fn(*args, **kwargs):
        frame = running()
        names = ("hidden_states", "weight", "bias", "activation")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x = given["x"] if "x" in given else given["hidden_states"]
        weight, bias, activation = given["weight"], given.get("bias"), given.get("activation")
        plain = functools.partial(causal_conv, x, weight, bias, activation)
        own = plain if original is None else functools.partial(original, *args, **kwargs)
        if frame is None:
            return own()
        frame.own_conv = own
        y = _stand_in(frame, x, weight, bias, activation, slice(None))
        return own() if y is None else y

    return causal_conv1d_fn if original is None else functools.wraps(original)(causal_conv1d_fn)


def module_body(entry, call, args, kwargs):
    """Stands in for a convolution that is a module with a forward of its own."""
    frame, serving = running(), entry.serving()
    given = entry.reader.named(args, kwargs)
    x, cache, cached = given["hidden_states"], given.get("cache"), bool(given.get("use_precomputed"))
    if frame is None or not serving or (cached and x.shape[1] == 1):
        return call(*args, **kwargs)
    columns, conv = x.transpose(1, 2), entry.module
    wide = torch.cat([cache, columns], -1) if cached else columns
    weight = conv.weight[:, 0]
    frame.own_conv = functools.partial(causal_conv, wide, weight, conv.bias, "silu")
    y = _stand_in(frame, wide, weight, conv.bias, "silu", serving[0])
    if y is None:
        return call(*args, **kwargs)
    kept = nn.functional.pad(wide, (conv.weight.shape[-1] - 1 - wide.shape[-1], 0))
    return y[:, :, -x.shape[1] :].transpose(1, 2), kept


def _stand_in(frame: Frame, x, weight, bias, activation, channels: slice) -> Tensor | None:
    """What the frame's convolution handlers, or the packed convolution, make of x; None: leave it to the model."""
    cu_seqlens = frame.cu_seqlens
    for handler in frame.convs:
        y = handler(x, weight, bias, activation, cu_seqlens=cu_seqlens, channels=channels)
        if y is not NotImplemented:
            return y
    return None if cu_seqlens is None else causal_conv(x, weight, bias, activation, cu_seqlens=cu_seqlens)
