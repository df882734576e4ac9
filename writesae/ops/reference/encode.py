"""Reference for `encode`: a_i(t) = v_i^T S_t w_i from writes by their own recurrence, any float dtype.

`preactivations` is dense and differentiable by autograd: the truth for tests. `blocks` walks the same recurrence token
by token and hands out one block at a time; `backward` is the exact gradient of any function of the activations, one
block of tokens at a time. None of the last two ever holds `[T, F]`. That is of scalar gates; of others, where there is
no such recurrence, both come from states, a block of tokens at a time (`_encode_states.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...writes import Writes, _additions_by_position
from .. import _encode_states

BLOCK = 64  # tokens held at a time, times Hs * F


def preactivations(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, r, V]
    heads: list[int],  # Hs value heads
    initial_state: Tensor | None = None,  # [N, H, K, V]
    carry: Tensor | None = None,  # [N, Hs, F]  a_i before the first token; of other gates states [N, Hs, K, V]
) -> tuple[Tensor, Tensor]:
    """`([B, T, Hs, F], [N, Hs, F])`: a_i(t) without bias for every token, and after each sequence's last.

    Dense: for tests and small inputs only.
    """
    if writes.gate != "scalar":
        state = carry if initial_state is None else initial_state[:, heads]
        return _encode_states.preactivations(writes, v_enc, w_enc, heads, state)
    B = writes.shape[0]
    index = torch.tensor(heads, device=writes.left.device)
    left = writes.left[:, :, writes.left_head(index)].to(v_enc)  # [B, T, Hs, R, K]
    right = writes.right[:, :, index].to(v_enc)
    increments = torch.einsum("hfxk,bthrk,bthrv,hfxv->bthf", v_enc, left, right, w_enc)
    decay = writes.decay[:, :, index].to(v_enc).exp()
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
            read = None  # as the token's query reads it, before edits after the read
            for late, head, p, q in additions.get(t - start, ()):
                read = a if late and read is None else read
                for i in (i for i, encoded in enumerate(heads) if encoded == head):
                    added = torch.einsum("fxk,k,v,fxv->f", v_enc[i], p.to(v_enc), q.to(v_enc), w_enc[i])
                    a = a.index_add(0, torch.tensor([i], device=a.device), added[None])
            rows[b].append(a if read is None else read)
        lasts.append(a)
    return torch.stack([torch.stack(r) for r in rows]), torch.stack(lasts)


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of raw pre-activations `[..., F]`, then ReLU; descending, ties to the lowest index, NaN first."""
    order = torch.sort(pre, dim=-1, descending=True, stable=True)
    return order.values[..., :k].relu(), order.indices[..., :k]


class _Factors:
    """The writes of the encoded heads, cut into blocks, with additions (before the read) by (sequence, token)."""

    def __init__(self, writes: Writes, heads: list[int], like: Tensor):
        self.writes, self.like = writes, like
        self.heads = torch.tensor(heads, device=writes.left.device)
        self.lefts = writes.left_head(self.heads)
        self.additions = {}
        for n in range(writes.num_sequences if writes.edits is not None else 0):
            for t, found in _additions_by_position(writes.edits, n).items():
                pairs = [(i, p, q) for _, head, p, q in found for i, encoded in enumerate(heads) if encoded == head]
                kept = [(i, p.to(like), q.to(like)) for i, p, q in pairs]
                if kept:
                    self.additions[n, t] = kept

    def block(self, b: int, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor]:
        """decay `[Hs, t]`, left `[R, Hs, t, K]`, right `[R, Hs, t, V]` of tokens lo..hi-1 of batch row b."""
        w = self.writes
        decay = w.decay[b, lo:hi, self.heads].to(self.like).T
        left = w.left[b, lo:hi, self.lefts].to(self.like).permute(2, 1, 0, 3)
        right = w.right[b, lo:hi, self.heads].to(self.like).permute(2, 1, 0, 3)
        return decay, left, right

    def additions_in(self, n: int, first: int, last: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(offset from `first`, head slot, p, q) of the additions at positions first..last-1 of sequence n."""
        if self.additions:
            for t in range(first, last):
                for i, p, q in self.additions.get((n, t), ()):
                    yield t - first, i, p, q


def blocks(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, r, V]
    heads: list[int],
    carry: Tensor,  # [N, Hs, F], or [N, Hs, K, V], before the first token; after the last once exhausted
    size: int = BLOCK,
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yields (batch row, first token, one past the last, a `[t, Hs, F]` without bias); overwrites `carry`."""
    if writes.gate != "scalar":
        yield from _encode_states.blocks(writes, v_enc, w_enc, heads, carry)
        return
    factors = _Factors(writes, heads, v_enc)
    for n, b, start, stop in writes.sequences():
        for lo in range(start, stop, size):
            hi = min(lo + size, stop)
            decay, left, right = factors.block(b, lo, hi)
            a = v_enc.new_zeros(len(heads), hi - lo, v_enc.shape[1])  # increments first, then activations in place
            for r in range(left.shape[0]):
                for x in range(v_enc.shape[2]):
                    a += (left[r] @ v_enc[:, :, x].mT) * (right[r] @ w_enc[:, :, x].mT)
            for t, i, p, q in factors.additions_in(n, lo - start, hi - start):
                a[i, t] += ((v_enc[i] @ p) * (w_enc[i] @ q)).sum(-1)
            gate = decay.exp()
            last = carry[n]
            for t in range(hi - lo):
                a[:, t] += gate[:, t, None] * last
                last = a[:, t]
            carry[n] = last
            yield b, lo, hi, a.transpose(0, 1)


def carried(writes: Writes, v_enc: Tensor, w_enc: Tensor, carry: Tensor) -> Tensor:
    """`[N, Hs, F]` activations after each sequence's last token, from what `blocks` leaves in `carry`."""
    if writes.gate == "scalar":
        return carry
    every = range(carry.shape[1])
    return torch.stack([_encode_states.activations_of(carry[:, i], v_enc[i], w_enc[i]) for i in every], 1)


def decay_matrix(decay: Tensor) -> Tensor:
    """`[..., t, t]` lower triangular from log-decays `[..., t]`: entry (s, u) is exp(decay_{u+1} + ... + decay_s).

    Sums, never differences of cumulative sums: a gate that is closed (log-decay -inf) gives 0, not NaN.
    """
    t = decay.shape[-1]
    keep = torch.ones(t, t, dtype=torch.bool, device=decay.device)
    terms = decay[..., :, None].expand(*decay.shape, t).masked_fill(~keep.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~keep.tril(), -torch.inf).exp()


def backward(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, r, V]
    heads: list[int],
    indices: Tensor,  # [B, T, Hs, m] int64
    grad: Tensor,  # [B, T, Hs, m]  gradient of the activations at `indices`
    size: int = 2 * BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (v_enc, w_enc, carry `[N, Hs, F]`) of the activations, by the adjoint of the recurrence.

    lambda_i(s) = da_i(s) + e^{g_{s+1}} lambda_i(s+1) and dv_i = sum_s lambda_i(s) (right_s . w_i) left_s, dw_i alike.
    Blocks are walked from the last token back; inside one, lambda is a triangular matrix product.
    """
    factors = _Factors(writes, heads, v_enc)
    Hs, F, rank = v_enc.shape[:3]
    dv, dw = torch.zeros_like(v_enc), torch.zeros_like(w_enc)
    d_carry = v_enc.new_zeros(writes.num_sequences, Hs, F)
    for n, b, start, stop in writes.sequences():
        tail = None  # e^{g} lambda of the token after the block; None while it is zero
        for lo in reversed(range(start, stop, size)):
            hi = min(lo + size, stop)
            da = grad[b, lo:hi].to(v_enc).transpose(0, 1)  # [Hs, t, m]
            if tail is None and not torch.compiler.is_compiling() and not bool(da.any()):
                continue
            decay, left, right = factors.block(b, lo, hi)
            lam = v_enc.new_zeros(Hs, hi - lo, F).scatter_add_(2, indices[b, lo:hi].transpose(0, 1), da)
            reach = decay_matrix(decay)
            lam = reach.mT @ lam
            if tail is not None:
                lam += reach[:, -1, :, None] * tail[:, None]
            for x in range(rank):
                v, w = v_enc[:, :, x], w_enc[:, :, x]
                for r in range(left.shape[0]):
                    dv[:, :, x] += (lam * (right[r] @ w.mT)).mT @ left[r]
                    dw[:, :, x] += (lam * (left[r] @ v.mT)).mT @ right[r]
            for t, i, p, q in factors.additions_in(n, lo - start, hi - start):
                dv[i] += (lam[i, t][:, None] * (w_enc[i] @ q))[..., None] * p
                dw[i] += (lam[i, t][:, None] * (v_enc[i] @ p))[..., None] * q
            tail = decay[:, 0].exp()[:, None] * lam[:, 0]
        if tail is not None:
            d_carry[n] = tail
    return dv, dw, d_carry
