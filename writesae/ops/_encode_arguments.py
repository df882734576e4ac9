"""From a trace and a dictionary to what the operators of `encode` take."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..writes import Writes
from .gated_delta_rule import pack_edits


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


@lru_cache(maxsize=256)
def _heads_on(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept: a copy to a device cannot be captured in a graph."""
    return torch.tensor(heads).to(device, non_blocking=True)


def _arguments(writes: Writes, heads: list[int], v_enc: Tensor, w_enc: Tensor) -> tuple:
    """What every kernel takes first: decay, left, right, heads, v_enc, w_enc. Small ones in float32; the kernel
    converts left, right and the factors as it packs them."""
    where = v_enc.device
    heads = torch.tensor(heads) if where.type == "cpu" else _heads_on(tuple(heads), where)
    return _float(writes.decay), writes.left, writes.right, heads, v_enc.detach(), w_enc.detach()


def _rest(writes: Writes, carry: Tensor | None) -> tuple:
    """What every kernel takes last: carry, cu_seqlens, edit_index, edit_left, edit_right."""
    edits = writes.edits
    packed = (None, None, None) if edits is None or not len(edits) else pack_edits(edits, writes.right.device)
    offsets = None if writes.cu_seqlens is None else writes.cu_seqlens.to(torch.int64).contiguous()
    return _float(carry), offsets, *packed
