"""Reference for `sae_training`: encode, then the factored loss, each by a backend of its own; any float dtype."""

from __future__ import annotations

from torch import Tensor

from ...writes import Writes


def step(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, r, V]
    b_enc: Tensor | None,  # [Hs, F]
    v_dec: Tensor,  # [Hs, F, r, K]
    w_dec: Tensor,  # [Hs, F, r, V]
    offset: Tensor | None,  # [Hs, K, V]
    k: int,
    weight: Tensor,  # [B, T]
    heads: list[int],
    backend: str = "reference",
):
    """(loss, errors `[B, T, Hs]`, codes), differentiable in the six dictionary tensors by autograd."""
    from ..encode import encode
    from ..loss import factored_loss

    codes = encode(writes, v_enc, w_enc, b_enc, k=k, heads=heads, backend=backend)
    errors = factored_loss(
        writes, codes.values, codes.indices, v_dec, w_dec, offset, heads, mask=weight != 0, backend=backend
    )
    return (errors * weight[:, :, None].to(errors)).sum(), errors, codes
