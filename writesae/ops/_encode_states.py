"""Gates of channels and of elements: what `encode`, its gradients and the losses take from states, a block at a time.

Under such a gate activations have no recurrence of their own. Where there is no kernel that does without (`encode` has
one for channel gates on a CPU), the states of a block of tokens are formed, read, and forgotten: at most `_HELD`
numbers, or one token's, beside one state a block where a gradient goes back through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import AFTER, Edits
from ..writes import Writes

_HELD = 1 << 22  # numbers of states
_TOKENS = 64  # of a block, at most


@dataclass(frozen=True)
class Part:
    """Tokens lo..hi-1 of some sequences of one length, which begin at `start`: sequences `rows` are batch rows
    `batch`."""

    rows: slice
    batch: slice
    start: int
    lo: int
    hi: int


class Walk:
    """The states of the encoded heads, part after part.

    Args:
        writes: of any gate; edits are additions, rows expanded.
        heads: Hs value heads.
        like: whose dtype is computed in.
    """

    def __init__(self, writes: Writes, heads: list[int], like: Tensor):
        self.writes, self.like = writes, like
        self.heads = torch.tensor(heads, device=writes.right.device)
        self.lefts = writes.left_head(self.heads)
        self.matrix = None if writes.decay_matrix is None else writes.decay_matrix[self.heads].to(like)
        self.size = len(heads) * writes.shape[3] * writes.shape[4]
        self.additions: dict[int, list[tuple[int, int, int, bool]]] = {}  # position: (edit, sequence, slot, late)
        edits = writes.edits
        if edits is None:
            return
        late = (edits.when == AFTER).tolist()
        places = zip(edits.row.tolist(), edits.position.tolist(), edits.head.tolist(), late, strict=True)
        for e, (n, t, head, after) in enumerate(places):
            for slot in (slot for slot, encoded in enumerate(heads) if encoded == head):
                self.additions.setdefault(t, []).append((e, n, slot, after))

    def groups(self) -> Iterator[tuple[slice, list[Part]]]:
        """Sequences that are walked together, and their parts: all rows at once, packed ones one by one."""
        B, T = self.writes.shape[:2]
        if self.writes.cu_seqlens is None:
            found = [(slice(0, B), slice(0, B), 0, T)] if B else []
        else:
            found = [(slice(n, n + 1), slice(b, b + 1), lo, hi) for n, b, lo, hi in self.writes.sequences()]
        for rows, batch, start, stop in found:
            tokens = min(_TOKENS, max(1, _HELD // (self.size * (rows.stop - rows.start))))
            yield rows, [Part(rows, batch, start, lo, min(lo + tokens, stop)) for lo in range(start, stop, tokens)]

    def sides(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """decay `[n, t, Hs, *]`, left `[n, t, Hs, R, K]`, right `[n, t, Hs, R, V]`."""
        w, at = self.writes, (part.batch, slice(part.lo, part.hi))
        found = w.decay[at][:, :, self.heads], w.left[at][:, :, self.lefts], w.right[at][:, :, self.heads]
        decay, left, right = (x.to(self.like) for x in found)
        return decay, left, right

    def states(self, part: Part, state: Tensor, sides=None, matrix=None, edits: Edits | None = None):
        """(`[n, t, Hs, K, V]` as the tokens' queries read them, `[n, Hs, K, V]` as the next token meets it).

        Args:
            state: `[n, Hs, K, V]` before the part.
            sides, matrix, edits: in place of the writes' own, to be differentiated.
        """
        decay, left, right = self.sides(part) if sides is None else sides
        matrix, edits = self.matrix if matrix is None else matrix, self.writes.edits if edits is None else edits
        gates = decay if matrix is not None else decay.exp()
        read = []
        for t in range(part.hi - part.lo):
            if matrix is not None:
                state = (gates[:, t, :, None] * matrix).exp() * state
            else:
                state = gates[:, t].reshape(*gates.shape[:1], len(self.heads), -1, 1) * state
            for r in range(left.shape[3]):
                state = torch.addcmul(state, left[:, t, :, r, :, None], right[:, t, :, r, None])
            seen = None
            found = self.additions.get(part.lo + t - part.start, [])
            for e, n, slot, late in sorted(found, key=lambda x: x[3]):
                if edits is None or not part.rows.start <= n < part.rows.stop:
                    continue
                seen = state if late and seen is None else seen
                added = torch.outer(edits.left[e].to(state), edits.right[e].to(state))
                place = tuple(torch.tensor([x], device=state.device) for x in (n - part.rows.start, slot))
                state = state.index_put(place, added[None], accumulate=True)
            read.append(state if seen is None else seen)
        return torch.stack(read, 1), state

    def first(self, states: Tensor | None) -> Tensor:
        """`[N, Hs, K, V]` before the first tokens, a copy in the dtype computed in."""
        if states is not None:
            return states.detach().to(self.like).clone()
        return self.like.new_zeros(self.writes.num_sequences, len(self.heads), *self.writes.shape[3:])

    def every(self, states: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Parts and what the tokens read of them. Overwrites `states [N, Hs, K, V]`."""
        for _, parts in self.groups():
            for part in parts:
                read, states[part.rows] = self.states(part, states[part.rows])
                yield part, read


def activations_of(states: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """`v_i^T S w_i` of states `[n, K, V]` and one head's atoms `v [F, r, K]`, `w [F, r, V]`: `[n, F]`."""
    out = states.new_empty(len(states), len(v))
    step = max(1, _HELD // (len(v) * v.shape[2]))
    for lo in range(0, len(states), step):
        part = states[lo : lo + step]
        out[lo : lo + step] = sum(
            ((part @ w[:, x].mT) * v[:, x].mT).sum(1) for x in range(v.shape[1])
        )  # [n, K, F] at a time
    return out


def blocks(writes: Writes, v: Tensor, w: Tensor, heads: list[int], states: Tensor):
    """As `reference.encode.blocks`, but overwrites `states [N, Hs, K, V]`."""
    for part, read in Walk(writes, heads, v).every(states):
        for b, of_row in zip(range(part.batch.start, part.batch.stop), read, strict=True):
            found = [activations_of(of_row[:, i], v[i], w[i]) for i in range(len(heads))]
            yield b, part.lo, part.hi, torch.stack(found, 1)


def preactivations(writes: Writes, v: Tensor, w: Tensor, heads: list[int], state: Tensor | None):
    """As `reference.encode.preactivations`: from all states, differentiable by autograd in everything."""
    walk, N = Walk(writes, heads, v), writes.num_sequences
    state = v.new_zeros(N, len(heads), *writes.shape[3:]) if state is None else state.to(v)
    read, last = [], []
    for rows, parts in walk.groups():
        now = state[rows]
        for part in parts:
            found, now = walk.states(part, now)
            read.append(found)
        last.append(now)
    states = torch.cat(read, 1)  # packed: one row
    take = "hfxk,bthkv,hfxv->bthf"
    return torch.einsum(take, v, states, w), torch.einsum("hfxk,nhkv,hfxv->nhf", v, torch.cat(last), w)


def _chosen(x: Tensor, part: Part, slot: int) -> Tensor:
    """Of `[B, T, Hs, m]` those of a part and an encoded head, `[n t, m]`."""
    return x[part.batch, part.lo : part.hi, slot].flatten(0, 1)


def _gathered(factors: Tensor, indices: Tensor) -> Tensor:
    """`[P, m r, size]` of `[F, r, size]` at `[P, m]`."""
    return factors[indices].flatten(1, 2)


def _spread(to: Tensor, indices: Tensor, of: Tensor) -> None:
    """Adds `of [P, m r, size]` to `to [F, r, size]` at `indices [P, m]`."""
    to.index_add_(0, indices.flatten(), of.reshape(indices.numel(), *to.shape[1:]))


def factor_gradient(writes, v, w, heads: list[int], indices: Tensor, grad: Tensor, states: Tensor | None):
    """(dv, dw) of activations at `indices [B, T, Hs, m]` from theirs, `grad`: `dv_i = sum da_i S_t w_i`, dw_i alike."""
    dv, dw, walk = torch.zeros_like(v), torch.zeros_like(w), Walk(writes, heads, v)
    for part, read in walk.every(walk.first(states)):
        for i in range(len(heads)):
            _add_gradient(dv[i], dw[i], v[i], w[i], read[:, :, i].flatten(0, 1), _chosen(indices, part, i),
                          _chosen(grad, part, i).to(v))  # fmt: skip
    return dv, dw


def _add_gradient(dv, dw, v, w, states: Tensor, indices: Tensor, da: Tensor) -> None:
    """One head's share of some tokens: states `[P, K, V]`, indices and da `[P, m]`."""
    on = (da != 0).any(1)  # others read nothing; where states are NaN and no gradient is, none comes
    states, indices, da = states[on], indices[on], da[on]
    da = da.repeat_interleave(v.shape[1], 1)[..., None]
    _spread(dv, indices, da * (_gathered(w, indices) @ states.mT))
    _spread(dw, indices, da * (_gathered(v, indices) @ states))


def source_gradient(writes, v, w, heads: list[int], indices: Tensor, grad: Tensor, states: Tensor | None):
    """Gradients of (decay, left, right, the edits' left and right, decay_matrix, states `[N, Hs, K, V]`) of activations
    at `indices`. Parts are walked again from the last back, each from the state before it, which is kept."""
    walk, edits = Walk(writes, heads, v), writes.edits
    sources: list[Tensor | None] = [writes.decay, writes.left, writes.right]
    sources += [None, None] if edits is None else [edits.left, edits.right]
    sources.append(writes.decay_matrix)
    out: list = [None if x is None else torch.zeros_like(x, dtype=v.dtype) for x in sources]
    first = walk.first(states)
    d_first = torch.zeros_like(first)
    lefts = [(out[0], walk.heads), (out[1], walk.lefts), (out[2], walk.heads)]
    for rows, parts in walk.groups():
        before = []
        for part in parts:
            before.append(first[part.rows].clone())
            first[part.rows] = walk.states(part, first[part.rows])[1]
        tail = None
        for part, state in zip(reversed(parts), reversed(before), strict=True):
            n, t = len(state), part.hi - part.lo
            pull = []  # the gradient of what is read, by head
            for i in range(len(heads)):
                at = _chosen(indices, part, i)
                da = _chosen(grad, part, i).to(v).repeat_interleave(v.shape[2], 1)[..., None]
                pull.append((((da * _gathered(v[i], at)).mT) @ _gathered(w[i], at)).unflatten(0, (n, t)))
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (*walk.sides(part), state)]
                matrix = None if walk.matrix is None else walk.matrix.detach().requires_grad_()
                moved = None
                if edits is not None:
                    p, q = (x.detach().to(v).requires_grad_() for x in (edits.left, edits.right))
                    moved = edits._with(left=p, right=q)
                    leaves += [p, q]
                leaves += [] if matrix is None else [matrix]
                ends = walk.states(part, leaves[3], leaves[:3], matrix, moved)
                pulls = torch.stack(pull, 2), torch.zeros_like(state) if tail is None else tail
                found = torch.autograd.grad(ends, leaves, pulls, materialize_grads=True)
            for (to, at), d in zip(lefts, found[:3], strict=True):
                to[part.batch, part.lo : part.hi].index_add_(2, at, d)
            tail = found[3]
            if edits is not None:
                out[3] += found[4]
                out[4] += found[5]
            if matrix is not None:
                out[5].index_add_(0, walk.heads, found[-1])
        if tail is not None:
            d_first[rows] = tail
    return *out, d_first


def loss_sums(writes, heads, values, indices, v, w, offset, weight, encoder=(None, None), grad: bool = True):
    """As `sae_training.loss_sums`, of any gate, in the dtype of `v [Hs, F, r, K]`."""
    walk = Walk(writes, heads, v)
    states = writes.initial_state
    errors = v.new_zeros(values.shape[:3])
    d_values, dv, dw = torch.zeros_like(values, dtype=v.dtype), torch.zeros_like(v), torch.zeros_like(w)
    d_offset = torch.zeros_like(v.new_zeros(0) if offset is None else offset)
    of_encoder = [torch.zeros_like(v.new_zeros(0) if x is None else x) for x in encoder]
    db = v.new_zeros(v.shape[:2])
    for part, read in walk.every(walk.first(None if states is None else states[:, walk.heads])):
        for i in range(len(heads)):
            at = weight[part.batch, part.lo : part.hi, i]
            on = (at != 0).flatten()
            S, j, g = read[:, :, i].flatten(0, 1)[on], _chosen(indices, part, i)[on], -2 * at.flatten()[on, None].to(v)
            a = _chosen(values, part, i)[on].to(v)
            left, right = _gathered(v[i], j), _gathered(w[i], j)
            code = a.repeat_interleave(v.shape[2], 1)[..., None]
            error = S - (code * left).mT @ right
            if offset is not None:
                error = error - offset[i]
            errors[part.batch, part.lo : part.hi, i][(at != 0)] = error.square().sum((1, 2))
            if not grad:
                continue
            on_right = right @ error.mT  # [P, m r, K]
            d_a = g * (left * on_right).sum(2).unflatten(1, (-1, v.shape[2])).sum(2)
            d_values[part.batch, part.lo : part.hi, i][(at != 0)] = d_a
            _spread(dv[i], j, g[..., None] * code * on_right)
            _spread(dw[i], j, g[..., None] * code * (left @ error))
            if offset is not None:
                d_offset[i] += (g[..., None] * error).sum(0)
            if encoder[0] is not None:
                d_a = d_a * (a > 0)
                _add_gradient(of_encoder[0][i], of_encoder[1][i], encoder[0][i], encoder[1][i], S, j, d_a)
                db[i].index_add_(0, j.flatten(), d_a.flatten())
    return errors, d_values, dv, dw, None if offset is None else d_offset, *of_encoder, db
