"""Reference for `gated_delta_rule`: token by token, any float dtype, differentiable. Kernels answer to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...edits import ADD, AFTER, DELETE, Edits


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last axis, as the models compute it."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def gated_delta_rule(
    q: Tensor,  # [B, T, Hk, K]
    k: Tensor,  # [B, T, Hk, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H]  log-decay
    beta: Tensor,  # [B, T, H]
    scale: float,
    initial_state: Tensor | None,  # [N, H, K, V]
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,  # [N + 1]
    edits: Edits | None,  # rows expanded
    snapshots: Tensor | None,  # [P, 2]  (row, position)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (o [B,T,H,V], final_state [N,H,K,V], left [B,T,Hk,K], right [B,T,H,V], snapshots [P,H,K,V]).

    fp16 and bf16 inputs are computed in fp32. `right` is the increment actually made: zero where an edit deleted it
    before the token read it; what is deleted after the read was made.
    """
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    B, T, H, V = v.shape
    K = k.shape[-1]
    out_dtype = v.dtype
    q, k, v, g, beta = (x.to(compute) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    left = k
    group = H // k.shape[2]
    q, k = q.repeat_interleave(group, 2) * scale, k.repeat_interleave(group, 2)
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
    u_rows: list[list[Tensor]] = [[] for _ in range(B)]
    finals, found = [], [None] * (0 if snapshots is None else len(snapshots))
    for n, (b, start, stop) in enumerate(bounds):
        state = v.new_zeros(H, K, V) if initial_state is None else initial_state[n].to(compute)
        for t in range(start, stop):
            k_t, q_t = k[b, t], q[b, t]
            state = g[b, t].exp()[:, None, None] * state
            u = beta[b, t][:, None] * (v[b, t] - torch.einsum("hkv,hk->hv", state, k_t))
            here = planned.get((n, t - start), ())
            late = [i for i in here if edits.when[i] == AFTER]
            here = [i for i in here if edits.when[i] != AFTER]
            u = _without(u, edits, here)
            state = _added(state + torch.einsum("hk,hv->hkv", k_t, u), edits, here)
            o_rows[b].append(torch.einsum("hkv,hk->hv", state, q_t))
            u_rows[b].append(u)
            if late:
                state = state - torch.einsum("hk,hv->hkv", k_t, u - _without(u, edits, late))
                state = _added(state, edits, late)
            for i in wanted.get((n, t - start), ()):
                found[i] = state
        finals.append(state)
    o = torch.stack([torch.stack(x) if x else v.new_zeros(0, H, V) for x in o_rows])
    right = torch.stack([torch.stack(x) if x else v.new_zeros(0, H, V) for x in u_rows])
    shots = torch.stack(found) if found else v.new_zeros(0, H, K, V)
    return o.to(out_dtype), torch.stack(finals), left, right, shots


def _without(u: Tensor, edits: Edits | None, which: list[int]) -> Tensor:
    """Increments `[H, V]` without those that edits delete or replace."""
    for i in which:
        if edits.kind[i] != ADD:
            u = u.clone()
            u[int(edits.head[i])] = 0
    return u


def _added(state: Tensor, edits: Edits | None, which: list[int]) -> Tensor:
    """`[H, K, V]` with what edits add."""
    for i in which:
        if edits.kind[i] == DELETE:
            continue
        head = torch.tensor([int(edits.head[i])], device=state.device)
        added = torch.outer(edits.left[i].to(state), edits.right[i].to(state))
        state = state.index_add(0, head, added[None])  # a new tensor: what vmap maps may be the edit alone
    return state
