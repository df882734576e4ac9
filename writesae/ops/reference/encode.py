"""Reference for `encode`: the activations a_i(t) = v_i^T S_t w_i from writes by their own recurrence, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ...writes import Writes, _additions_by_position


def preactivations(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, r, V]
    heads: list[int],  # Hs value heads
    initial_state: Tensor | None = None,  # [N, H, K, V]
    carry: Tensor | None = None,  # [N, Hs, F]  a_i before the first token
) -> tuple[Tensor, Tensor]:
    """`([B, T, Hs, F], [N, Hs, F])`: a_i(t) without bias for every token, and after each sequence's last. Scalar gates.

    Dense: for tests and small inputs only.
    """
    B, T, H, K, V = writes.shape
    group = H // writes.left.shape[2]
    index = torch.tensor(heads, device=writes.left.device)
    left = writes.left[:, :, index // group].to(v_enc)  # [B, T, Hs, R, K]
    right = writes.right[:, :, index].to(v_enc)
    increments = torch.einsum("hfxk,bthrk,bthrv,hfxv->bthf", v_enc, left, right, w_enc)
    decay = writes.decay[:, :, index].to(v_enc).exp()
    out = v_enc.new_empty(B, T, len(heads), v_enc.shape[1]) if not increments.requires_grad else None
    rows: list[list[Tensor]] = [[] for _ in range(B)]
    lasts = []
    for n, b, start, stop in writes.sequences():
        if carry is not None:
            a = carry[n].to(v_enc)
        elif initial_state is not None:
            a = torch.einsum("hfxk,hkv,hfxv->hf", v_enc, initial_state[n][index].to(v_enc), w_enc)
        else:
            a = v_enc.new_zeros(len(heads), v_enc.shape[1])
        additions = _additions_by_position(writes.edits, n)
        for t in range(start, stop):
            a = decay[b, t][:, None] * a + increments[b, t]
            for head, p, q in additions.get(t - start, ()):
                if head in heads:
                    i = heads.index(head)
                    a = a.clone()
                    a[i] += torch.einsum("fxk,k,v,fxv->f", v_enc[i], p.to(v_enc), q.to(v_enc), w_enc[i])
            if out is None:
                rows[b].append(a)
            else:
                out[b, t] = a
        lasts.append(a)
    if out is None:
        out = torch.stack([torch.stack(r) for r in rows])
    return out, torch.stack(lasts)


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of raw pre-activations `[..., F]`, then ReLU; descending, ties to the lowest index."""
    order = torch.sort(pre, dim=-1, descending=True, stable=True)
    return order.values[..., :k].relu(), order.indices[..., :k]
