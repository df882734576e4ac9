"""The direct path of a head's values to the logits, by weights alone: its part of the output map, and what in a value
raises a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .binding import LayerSite


def head_projection(site: LayerSite, head: int) -> Tensor:
    """`[V, hidden]` float32: a head's part of the layer's output projection.

    Raises:
        ValueError: a layer without an output projection that is a matrix.
    """
    weight, wide = getattr(site.out_proj, "weight", None), site.num_v_heads * site.V
    if weight is None or weight.ndim != 2 or weight.shape[1] != wide or not weight.is_floating_point():
        got = "none" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(
            f"model: expected an output projection [hidden, {wide}] of {site.path} ({type(site.module).__name__}), "
            f"got {got}"
        )
    return weight.detach()[:, head * site.V : (head + 1) * site.V].float().mT


def token_directions(model, site: LayerSite, head: int, tokens: Sequence[int]) -> Tensor:
    """`[n, V]` float32, unit: the paper's `w* = W_O[head]^T W_U[token]`, what in a value raises a token's logit.

    Raises:
        ValueError: a token out of the vocabulary, a model without an output embedding, and as `head_projection`.
    """
    weight = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    if weight is None:
        raise ValueError(f"model: expected an output embedding, got {type(model).__name__}")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < len(weight):
            raise ValueError(f"token: expected 0 <= token < {len(weight)} (the model's vocabulary), got {token!r}")
    projection = head_projection(site, head)
    rows = weight.detach()[torch.tensor(tokens, device=weight.device)].float().to(projection.device)
    return normalize(rows @ projection.mT, dim=1)
