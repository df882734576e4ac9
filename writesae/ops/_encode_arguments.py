"""From a trace and a dictionary to what the operators of `encode` take."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..edits import AFTER, Edits
from ..writes import Writes
from .scan import pack_edits


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


@lru_cache(maxsize=256)
def heads_on(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept: a copy to a device cannot be captured in a graph."""
    return torch.tensor(heads).to(device, non_blocking=True)


def _arguments(writes: Writes, heads: list[int], v_enc: Tensor, w_enc: Tensor) -> tuple:
    """What every kernel takes first: decay, left, right, heads, v_enc, w_enc. Small ones in float32; the kernel
    converts left, right and the factors as it packs them."""
    where = v_enc.device
    heads = torch.tensor(heads) if where.type == "cpu" else heads_on(tuple(heads), where)
    return _float(writes.decay), writes.left, writes.right, heads, v_enc.detach(), w_enc.detach()


def as_read(writes: Writes) -> tuple[Writes, Edits | None]:
    """The writes with their edits as tokens read them, all before the read; and those that no token of theirs reads.

    A code at token t is of the state that the query of t read: it says what the model used there, and an edit after the
    read, which is often made because of that very code, must not change it. Increments are the actual ones, so an
    addition after the read of t is one before the read of t + 1 with the decay of t + 1 on its key side. One after the
    read of a sequence's last token is in no code, only in what is carried on. Rows are expanded. Under an element gate
    an addition does not stay of rank 1: edits are left as they are, and whoever walks the states knows when they are.
    """
    edits = writes.edits
    if edits is None or not edits.any_after or writes.gate == "element":
        return writes, None
    b, start, stop = torch.tensor([place[1:] for place in writes.sequences()]).unbind(1)
    late = edits.when == AFTER
    token = start[edits.row] + edits.position + late
    beyond = token >= stop[edits.row]
    seen, unseen = edits._at((~beyond).nonzero().flatten()), edits._at(beyond.nonzero().flatten())
    token, late = token[~beyond], late[~beyond]
    decay = writes.decay[b[seen.row], token, seen.head]
    decay = decay[:, None] if decay.ndim == 1 else decay  # [E, 1], or [E, K] of a channel gate
    decay = torch.where(late.to(decay.device)[:, None], decay, 0)
    gate = decay.to(torch.promote_types(decay.dtype, torch.float32)).exp()
    seen = seen._with(
        position=seen.position + late, left=seen.left.to(gate.device) * gate, when=torch.zeros_like(seen.when)
    )
    return replace(writes, edits=seen if len(seen) else None), unseen if len(unseen) else None


def carried_on(carry: Tensor, unseen: Edits | None, v: Tensor, w: Tensor, heads: list[int]) -> Tensor:
    """Activations `[N, Hs, F]` after each sequence's last token with what `as_read` left over. No gradient."""
    for i, head in enumerate(heads if unseen is not None else ()):
        which = (unseen.head == head).nonzero().flatten()
        if not len(which):
            continue
        p, q = unseen.left[which].detach().to(carry), unseen.right[which].detach().to(carry)
        on_left, on_right = (torch.einsum("fxk,ek->efx", side[i].detach().to(carry), x) for side, x in ((v, p), (w, q)))
        place = unseen.row[which], torch.full_like(which, i)
        carry = carry.index_put(place, (on_left * on_right).sum(-1), accumulate=True)
    return carry


def _rest(writes: Writes, carry: Tensor | None) -> tuple:
    """What every kernel takes last: carry (`_prepare`'s), cu_seqlens, edit_index, edit_left, edit_right."""
    edits = writes.edits
    packed = (None, None, None) if edits is None or not len(edits) else pack_edits(edits, writes.right.device)
    offsets = None if writes.cu_seqlens is None else writes.cu_seqlens.to(torch.int64).contiguous()
    return _float(carry), offsets, *packed
