"""The walk that every write rule's reference is: token by token, any float dtype, differentiable, right under
torch.func. A rule gives one token's mathematics; edits, snapshots, packed sequences and states are the walk's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...edits import ADD, AFTER, DELETE, Edits

# (row, token, state [H, K, V]) -> the state after gate, and the token's writes (left [H, K], right [H, V]); the last of
# them is the native one, which edits delete and replace.
Token = Callable[[int, int, Tensor], tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]]


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp16 and bf16 are computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis, as the models compute it."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def walk(
    token: Token,
    q: Tensor,  # [B, T, H, K]  as used, in the dtype computed in
    v: Tensor,  # [B, T, H, V]  the same
    initial_state: Tensor | None,  # [N, H, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    edits: Edits | None,  # rows expanded
    snapshots: Tensor | None,  # [P, 2]  (row, position)
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Returns (o [B,T,H,V], final_state [N,H,K,V], R right sides [B,T,H,V], snapshots [P,H,K,V]).

    Right sides are the increments actually made: zero where an edit deleted the native one before the token read it;
    what is deleted after the read was made.
    """
    B, T, H, V = v.shape
    K = q.shape[-1]
    bounds = [(b, 0, T) for b in range(B)]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        bounds = [(0, lo, hi) for lo, hi in zip(offsets[:-1], offsets[1:], strict=True)]
    wanted: dict[tuple[int, int], list[int]] = {}
    for i, (n, t) in enumerate(snapshots.tolist() if snapshots is not None else ()):
        wanted.setdefault((n, t), []).append(i)
    planned: dict[tuple[int, int], list[int]] = {}
    if edits is not None:
        for i, (n, t) in enumerate(zip(edits.row.tolist(), edits.position.tolist(), strict=True)):
            planned.setdefault((n, t), []).append(i)
    o_rows: list[list[Tensor]] = [[] for _ in range(B)]
    right_rows: list[list[tuple[Tensor, ...]]] = [[] for _ in range(B)]
    finals, found = [], [v.new_empty(0)] * (0 if snapshots is None else len(snapshots))
    for n, (b, start, stop) in enumerate(bounds):
        state = v.new_zeros(H, K, V) if initial_state is None else initial_state[n].to(v.dtype)
        for t in range(start, stop):
            state, writes = token(b, t, state)
            *others, (left, right) = writes
            for p, q_side in others:
                state = state + torch.einsum("hk,hv->hkv", p, q_side)
            every = planned.get((n, t - start), [])
            late = [i for i in every if edits is not None and edits.when[i] == AFTER]
            here = [i for i in every if i not in late]
            right = _without(right, edits, here)
            state = _added(state + torch.einsum("hk,hv->hkv", left, right), edits, here)
            o_rows[b].append(torch.einsum("hkv,hk->hv", state, q[b, t]))
            right_rows[b].append((*(x for _, x in others), right))
            if late:
                state = state - torch.einsum("hk,hv->hkv", left, right - _without(right, edits, late))
                state = _added(state, edits, late)
            for i in wanted.get((n, t - start), ()):
                found[i] = state
        finals.append(state)
    o = torch.stack([torch.stack(x) for x in o_rows])
    rights = [torch.stack([torch.stack([x[r] for x in row]) for row in right_rows]) for r in range(len(writes))]
    return o, torch.stack(finals), rights, torch.stack(found) if found else v.new_zeros(0, H, K, V)


def scan(
    increment: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,  # [B, T, Hk, K]
    k: Tensor,  # [B, T, Hk, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H] or [B, T, H, K]  log-decay
    beta: Tensor,  # [B, T, H]
    scale: float,
    initial_state: Tensor | None,  # [N, H, K, V]
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,  # [N + 1]
    edits: Edits | None,  # rows expanded
    snapshots: Tensor | None,  # [P, 2]  (row, position)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operators of csrc/scan.h compute: one write a token, `k u^T`, u by the rule's
    `increment(state after its gate [H,K,V], k [H,K], v [H,V], beta [H,1]) -> [H,V]`.

    Returns (o [B,T,H,V] in v's dtype, final_state [N,H,K,V], left [B,T,Hk,K], right [B,T,H,V], snapshots [P,H,K,V]).
    """
    compute, out_dtype = compute_dtype(v), v.dtype
    q, k, v, g, beta = (x.to(compute) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    given, group = k, v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(group, 2) * scale, k.repeat_interleave(group, 2)

    def token(b: int, t: int, state: Tensor):
        gate = g[b, t].exp()
        state = (gate[:, None, None] if gate.ndim == 1 else gate[:, :, None]) * state
        return state, ((k[b, t], increment(state, k[b, t], v[b, t], beta[b, t][:, None])),)

    o, final, (right,), shots = walk(token, q, v, initial_state, cu_seqlens, edits, snapshots)
    return o.to(out_dtype), final, given, right, shots


def _without(right: Tensor, edits: Edits | None, which: list[int]) -> Tensor:
    """Increments `[H, V]` without those that edits delete or replace."""
    for i in which:
        if edits is not None and edits.kind[i] != ADD:
            right = right.clone()
            right[int(edits.head[i])] = 0
    return right


def _added(state: Tensor, edits: Edits | None, which: list[int]) -> Tensor:
    """`[H, K, V]` with what edits add."""
    for i in which:
        if edits is None or edits.kind[i] == DELETE:
            continue
        head = torch.tensor([int(edits.head[i])], device=state.device)
        added = torch.outer(edits.left[i].to(state), edits.right[i].to(state))
        state = state.index_add(0, head, added[None])  # a new tensor: what vmap maps may be the edit alone
    return state
