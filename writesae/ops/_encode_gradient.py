"""Gradients of activations with respect to the writes they are read from, so that codes can train or explain a model.

    a_i(t) = e^g_t a_i(t-1) + sum_rx (left_r . v_ix)(right_r . w_ix)
    lambda_i(t) = da_i(t) + e^g_{t+1} lambda_i(t+1)
    d left_r = sum_ix lambda_i (right_r . w_ix) v_ix     d right_r = sum_ix lambda_i (left_r . v_ix) w_ix
    d g_t = e^g_t sum_i lambda_i(t) a_i(t-1)

That is of a gate a head; of others see `_encode_states.source_gradient`. On a device, without edits, by kernels
(`csrc/cuda/encode_backward.cuh`): see `device_gradient`. Else here, in torch, block by block from the end;
[block, F] is the largest thing held, besides [F] activations for each block's start. At
K = V = 128 that is seven products of [tokens, 128] and [128, F]: two for what the writes read, two for the sides'
gradients, two triangular ones in time (lambda, a) and one for the starts, through the block's own state. Without a
gradient of g it is five.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..edits import Edits
from ..writes import Writes
from . import _dispatch, _encode_states, _transforms
from ._encode_arguments import _arguments, _float, _rest
from .reference.encode import _Factors, decay_matrix

_BLOCK = 128  # tokens held at a time, times F; [F] activations are kept for each


class _WritesGradient(torch.autograd.Function):
    """Passes `values` (and their gradient) through and knows the gradient of the writes; indices are constant."""

    @staticmethod
    def forward(ctx, values, decay, left, right, edit_left, edit_right, matrix, v, w, indices, carry, rest):
        ctx.writes, ctx.heads, relu, ctx.backend = rest
        ctx.save_for_backward(
            decay, left, right, edit_left, edit_right, matrix, v, w, indices, carry, values if relu else None
        )
        return values.view_as(values)

    @staticmethod
    @_transforms.once_differentiable("encode", "torch.func (a grad of a grad, hessian) has one")
    def backward(ctx, grad):
        decay, left, right, edit_left, edit_right, matrix, v, w, indices, carry, values = ctx.saved_tensors
        edits = ctx.writes.edits
        if edits is not None:
            edits = edits._with(left=edit_left, right=edit_right)
        writes = Writes(decay, left, right, decay_matrix=matrix, cu_seqlens=ctx.writes.cu_seqlens, edits=edits)
        taken = grad if values is None else grad * (values > 0)
        arguments = (writes, v, w, ctx.heads, indices, taken, carry, ctx.needs_input_grad[1])
        if writes.gate != "scalar":
            found = _encode_states.source_gradient(*arguments[:-1])[:-1]
        elif ctx.backend in ("cuda", "twin") and edits is None:
            found = *device_gradient(ctx.backend, *arguments), None
        else:
            found = *writes_gradient(*arguments), None
        wanted = zip(found, (decay, left, right, edit_left, edit_right, matrix), ctx.needs_input_grad[1:7], strict=True)
        kept = (d.to(x.dtype) if needed else None for d, x, needed in wanted)
        return grad, *kept, None, None, None, None, None


def attach_writes_gradient(
    values, indices, writes: Writes, v, w, carry, heads: list[int], relu: bool, backend: str
) -> Tensor:
    """`values` with the gradient of the writes (and of their edits) behind them, where one is asked for."""
    edits = writes.edits
    sides = (None, None) if edits is None else (edits.left, edits.right)
    inputs = (writes.decay, writes.left, writes.right, *sides, writes.decay_matrix)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return values
    v, w = v.detach().to(values.dtype), w.detach().to(values.dtype)
    carry = None if carry is None else carry.detach().to(values.dtype)
    matrix = writes.decay_matrix
    plain = Writes(
        writes.decay.detach(), writes.left.detach(), writes.right.detach(), cu_seqlens=writes.cu_seqlens,
        decay_matrix=None if matrix is None else matrix.detach(),
        edits=None if edits is None else edits._with(**{s: getattr(edits, s).detach() for s in ("left", "right")}),
    )  # fmt: skip
    return _WritesGradient.apply(values, *inputs, v, w, indices, carry, (plain, heads, relu, backend))


def writes_gradient(
    writes: Writes,
    v: Tensor,  # [Hs, F, r, K]
    w: Tensor,  # [Hs, F, r, V]
    heads: list[int],
    indices: Tensor,  # [B, T, Hs, m] int64
    grad: Tensor,  # [B, T, Hs, m]  gradient of the activations at `indices`
    carry: Tensor | None,  # [N, Hs, F]  activations before the first token
    with_decay: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of decay `[B,T,H]`, left `[B,T,Hl,R,K]`, right `[B,T,H,R,V]` and of the edits' left and right."""
    factors = _Factors(writes, heads, v)
    out = [torch.zeros_like(x, dtype=v.dtype) for x in (writes.decay, writes.left, writes.right)]
    edits = writes.edits
    sides = [None, None] if edits is None else [torch.zeros_like(x, dtype=v.dtype) for x in (edits.left, edits.right)]
    for n, b, start, stop in writes.sequences():
        bounds = [(lo, min(lo + _BLOCK, stop)) for lo in range(start, stop, _BLOCK)]
        for i, head in enumerate(heads):
            first = v.new_zeros(v.shape[1]) if carry is None else carry[n, i]
            added = _edits_of(edits, n, head)
            head_of = _Head(factors, i, v[i], w[i], edits)
            starts = [first]  # activations before each block
            for lo, hi in bounds[:-1] if with_decay else ():
                starts.append(head_of.after(b, lo, hi, added, start, starts[-1]))
            tail = None  # e^g lambda of the token after the block; None while it is zero
            for j in reversed(range(len(bounds))):
                lo, hi = bounds[j]
                da = grad[b, lo:hi, i].to(v)
                if tail is None and not torch.compiler.is_compiling() and not bool(da.any()):
                    continue
                block = head_of.block(b, lo, hi, added, start)
                lam = block.adjoint(torch.zeros_like(block.increments).scatter_add_(1, indices[b, lo:hi, i], da), tail)
                tail = block.gate[0] * lam[0]
                if with_decay:
                    before = torch.cat([starts[j][None], block.activations(starts[j])[:-1]])
                    out[0][b, lo:hi, head] += block.gate * (lam * before).sum(1)
                d_left, d_right = block.sides_gradient(lam)
                out[1][b, lo:hi, writes.left_head(head)] += d_left
                out[2][b, lo:hi, head] += d_right
                for e, t in block.added:
                    on_left, on_right = head_of.on_edit(e)  # [F, r]
                    sides[0][e] += torch.einsum("f,fx,fxk->k", lam[t], on_right, v[i])
                    sides[1][e] += torch.einsum("f,fx,fxv->v", lam[t], on_left, w[i])
    out = [d.to(x.dtype) for d, x in zip(out, (writes.decay, writes.left, writes.right), strict=True)]
    if edits is not None:
        sides = [d.to(x.dtype) for d, x in zip(sides, (edits.left, edits.right), strict=True)]
    return *out, *sides


def device_gradient(
    backend: str,
    writes: Writes,
    v: Tensor,
    w: Tensor,
    heads: list[int],
    indices: Tensor,
    grad: Tensor,
    carry: Tensor | None,
    with_decay: bool = True,
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    """The same by kernels, which give d left and d right of every encoded head. Nothing waits for the device.

    Nobody holds all activations for d g. With D_t = d g_t, s_t = <left_t, d left_t> = sum_i lambda_i(t) (a_i(t) - e^g_t
    a_i(t-1)) and c_t = sum_i da_i(t) a_i(t), which looks at the chosen features only:

        D_t = D_{t+1} + c_t - s_t

    So its error is that of these sums, some 1e-7 of |c|, and a D_t far below them (a gate of e^-20) has it too. D_t is
    0 where the gate is, and at the first token where there is no carry; sums do not run across either.
    """
    operators = _dispatch.operators(backend)
    arguments, offsets = _arguments(writes, heads, v, w), _rest(writes, None)[1]
    indices = indices.contiguous()
    d_left, d_right = operators.encode_writes_backward(*arguments, indices, _float(grad), offsets)
    lefts = [writes.left_head(head) for head in heads]
    out = [torch.zeros_like(x, dtype=torch.float32) for x in (writes.decay, writes.left, writes.right)]
    d_decay = None
    if with_decay:
        chosen, _ = operators.encode_at(*arguments, indices, _float(carry), offsets, None, None, None)
        rise = (grad * chosen).sum(-1, dtype=torch.float64)
        for i, left in enumerate(lefts):
            rise[:, :, i] -= (writes.left[:, :, left] * d_left[:, :, i]).sum((2, 3), dtype=torch.float64)
        d_decay = _decay_gradient(rise, torch.stack([writes.decay[:, :, head] for head in heads], 2), offsets, carry)
    for i, head in enumerate(heads):  # in a fixed order where heads share
        if d_decay is not None:
            out[0][:, :, head] += d_decay[:, :, i]
        out[1][:, :, lefts[i]] += d_left[:, :, i]
        out[2][:, :, head] += d_right[:, :, i]
    out = [d.to(x.dtype) for d, x in zip(out, (writes.decay, writes.left, writes.right), strict=True)]
    return *out, None, None


def _decay_gradient(rise: Tensor, decay: Tensor, offsets: Tensor | None, carry: Tensor | None) -> Tensor:
    """D_t of `device_gradient` from c_t - s_t (float64) and the log-decays, `[B, T, Hs]` both: a sum from the end,
    which begins anew at closed gates and at borders of sequences."""
    T = rise.shape[1]
    closed = decay.float().exp() == 0
    first = torch.zeros(T + 1, dtype=torch.bool, device=rise.device)
    first[:1] = True
    if offsets is not None:
        first.index_fill_(0, offsets, True)
    first = first[:T, None]
    zero = closed | first if carry is None else closed
    place = torch.arange(T, device=rise.device)[:, None].expand_as(rise)
    stops = torch.where(closed | first, place, T).flip(1).cummin(1).values.flip(1)  # of such places the next, or this
    after = torch.cat([stops[:, 1:], torch.full_like(stops[:, :1], T)], 1)
    sums = torch.cat([rise.flip(1).cumsum(1).flip(1), torch.zeros_like(rise[:, :1])], 1)
    return (sums[:, :-1] - sums.gather(1, after)).masked_fill(zero, 0)


def _edits_of(edits: Edits | None, n: int, head: int) -> list[tuple[int, int]]:
    """(edit, position) of one sequence and head."""
    if edits is None:
        return []
    which = ((edits.row == n) & (edits.head == head)).nonzero().flatten().tolist()
    return [(e, int(edits.position[e])) for e in which]


class _Head:
    """One encoded head's factors: `v [F, r, K]`, `w [F, r, V]`."""

    def __init__(self, factors: _Factors, slot: int, v: Tensor, w: Tensor, edits: Edits | None):
        self.factors, self.slot, self.v, self.w, self.edits = factors, slot, v, w, edits

    def on_edit(self, e: int) -> tuple[Tensor, Tensor]:
        """(v . p, w . q) of edit e, `[F, r]` each."""
        return self.v @ self.edits.left[e].to(self.v), self.w @ self.edits.right[e].to(self.w)

    def block(self, b: int, lo: int, hi: int, added, start: int) -> _Block:
        return _Block(self, *self._writes(b, lo, hi, added, start))

    def after(self, b: int, lo: int, hi: int, added, start: int, before: Tensor) -> Tensor:
        """`[F]` activations after tokens lo..hi-1, from those before, through what these tokens add to the state."""
        decay, left, right, here = self._writes(b, lo, hi, added, start)
        later = torch.cat([decay[1:], decay.new_zeros(1)]).flip(0).cumsum(0).flip(0).exp()  # sums: -inf stays closed
        state = torch.einsum("t,rtk,rtv->kv", later, left, right)
        for e, t in here:
            state.addr_(self.edits.left[e].to(state) * later[t], self.edits.right[e].to(state))
        return decay.sum().exp() * before + ((self.v.flatten(0, 1) @ state).view_as(self.w) * self.w).sum((1, 2))

    def _writes(self, b: int, lo: int, hi: int, added, start: int) -> tuple[Tensor, Tensor, Tensor, list]:
        decay, left, right = self.factors.block(b, lo, hi)
        here = [(e, start + position - lo) for e, position in added if lo <= start + position < hi]
        return decay[self.slot], left[:, self.slot], right[:, self.slot], here


class _Block:
    """Some tokens of one head. decay `[t]`, left `[R, t, K]`, right `[R, t, V]`; added: (edit, token of the block)."""

    def __init__(self, head: _Head, decay: Tensor, left: Tensor, right: Tensor, added: list[tuple[int, int]]):
        self.head, self.left, self.right, self.added = head, left, right, added
        self.gate, self.reach = decay.exp(), decay_matrix(decay)
        v, w = head.v, head.w
        pairs = [(r, x) for r in range(left.shape[0]) for x in range(v.shape[1])]
        self.on_left = {(r, x): left[r] @ v[:, x].T for r, x in pairs}  # [t, F]
        self.on_right = {(r, x): right[r] @ w[:, x].T for r, x in pairs}
        self.increments = sum(self.on_left[p] * self.on_right[p] for p in pairs)

    def activations(self, before: Tensor) -> Tensor:
        """`[t, F]` from those before the block `[F]`."""
        increments = self.increments
        if self.added:
            increments = increments.clone()
            for e, t in self.added:
                on_left, on_right = self.head.on_edit(e)
                increments[t] += (on_left * on_right).sum(1)
        return torch.addr(self.reach @ increments, self.reach[:, 0] * self.gate[0], before)

    def adjoint(self, da: Tensor, tail: Tensor | None) -> Tensor:
        """lambda `[t, F]`."""
        lam = self.reach.T @ da
        return lam if tail is None else lam.addr_(self.reach[-1], tail)

    def sides_gradient(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """`[t, R, K]` and `[t, R, V]`."""
        d_left, d_right = (x.new_zeros(x.shape[1], x.shape[0], x.shape[2]) for x in (self.left, self.right))
        for (r, x), on_left in self.on_left.items():
            d_left[:, r] += (lam * self.on_right[r, x]) @ self.head.v[:, x]
            d_right[:, r] += (lam * on_left) @ self.head.w[:, x]
        return d_left, d_right
