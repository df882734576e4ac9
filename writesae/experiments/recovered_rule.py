"""The gated delta rule with other writes in the native ones' place, closed loop, token by token.

Of a chosen head every write k_t u_t^T is coded, and the state that is carried on holds the code. Closed loop: u_t is
what the head writes in answer to the state that is there, so an error is met, and may be mended, by later writes.

    S~ = e^g S_{t-1},   u_t = beta_t (v_t - S~^T k_t),   S_t = S~ + code(k_t u_t^T)

Read "after", token t reads S~ + k_t u_t^T, its own write as it was made, and the code is what later tokens meet; read
"before", it reads S_t. The other heads run by `ops.gated_delta_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..models.hf_gated_delta import RuleHandler
from ..models.run_with_sae import read_states
from ..models.run_with_sae import read_through as read_factored
from ..ops import gated_delta_rule, pursuit
from ..ops.reference.scan import l2norm
from ..sae import SAE
from ..sae.sae import SparseCodes
from ..sae.sparse import exact_topk
from ..writes import Writes

# (left [n, K], right [n, V]) of n native writes -> (p [n, m, K], q [n, m, V]): sum_m p q^T is written instead.
Coder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def deleted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing is written."""
    return left[:, None][:, :0], right[:, None][:, :0]


def coded(sae: SAE, k: int | None = None) -> Coder:
    """What a dictionary of writes makes of them, at k atoms a write (None: its own k)."""
    v, w = (x.detach().to(sae.compute_dtype) for x in sae.atoms())
    encoder = None
    if sae.sparsity == "pursuit":
        v_enc, w_enc, _ = sae.encoder()
        encoder = v_enc.detach().to(v.dtype), w_enc.detach().to(v.dtype)

    @torch.no_grad()
    def code(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left, right = left[:, None].to(v.device), right[:, None].to(v.device)
        if encoder is None:
            values, indices = sae.encode_writes(left, right, k=k)
        else:  # as encode_writes does, but the encoder is made once and not at every token
            values, indices = pursuit(left, right, encoder[0], encoder[1], v, w, sae.k if k is None else k)
        return (v[indices] * values[..., None, None]).flatten(1, 2), w[indices].flatten(1, 2)

    return code


def closed_loop(
    q: Tensor,  # [B, T, Hk, K]
    k: Tensor,  # [B, T, Hk, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H]
    beta: Tensor,  # [B, T, H]
    coders: Mapping[int, Coder],
    read: str = "after",
    initial_state: Tensor | None = None,  # [B, H, K, V]
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs and final states of the coded heads alone: o `[B, T, n, V]`, state `[B, n, K, V]`, in order of `coders`.

    Computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a read time that is none, or codes of another shape than writes have, naming the head.
    """
    if read not in ("after", "before"):
        raise ValueError(f"read: expected after or before, got {read!r}")
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    B, T, H, V = v.shape
    K = k.shape[-1]
    heads = list(coders)
    keys = [head // (H // k.shape[2]) for head in heads]
    # Time and head first, so that what a step reads of a head lies together.
    q, k = (x[:, :, keys].to(wide).permute(1, 2, 0, 3) for x in (q, k))  # [T, n, B, K]
    v = v[:, :, heads].to(wide).permute(1, 2, 0, 3)
    alpha, beta = (x[:, :, heads].to(wide).permute(1, 2, 0)[..., None] for x in (g, beta))  # [T, n, B, 1]
    alpha = alpha.exp()
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * K**-0.5
    both = torch.stack([k, q], 3)  # [T, n, B, 2, K]
    own = (k * q).sum(-1, keepdim=True)  # how a token reads its own write
    state = v.new_zeros(len(heads), B, K, V)
    if initial_state is not None:
        state = initial_state[:, heads].to(wide).transpose(0, 1).clone()
    o = v.new_empty(T, len(heads), B, V)
    for t in range(T):
        state *= alpha[t, ..., None]
        of_key, of_query = (both[t] @ state).unbind(2)
        u = beta[t] * (v[t] - of_key)
        for i, (head, coder) in enumerate(coders.items()):
            p, r = coder(k[t, i], u[i])
            if p.shape[:2] != r.shape[:2] or (len(p), p.shape[2:], r.shape[2:]) != (B, (K,), (V,)):
                raise ValueError(
                    f"codes of head {head}: expected [{B}, m, K={K}] and [{B}, m, V={V}], got {tuple(p.shape)} and "
                    f"{tuple(r.shape)}"
                )
            if p.shape[1]:
                state[i].baddbmm_(p.to(state).transpose(1, 2), r.to(state))
        o[t] = of_query + own[t] * u if read == "after" else (both[t, :, :, 1:] @ state).squeeze(2)
    return o.permute(2, 0, 1, 3), state.transpose(0, 1)


def plain_rule(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm, cu_seqlens):
    """A layer as it is, by our kernel; for `models.hf_gated_delta.intercept`."""
    out = gated_delta_rule(
        q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state,
        use_qk_l2norm=use_qk_l2norm, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return out.o, out.final_state


def loop_rule(coders: Mapping[int, Coder], read: str) -> RuleHandler:
    """A layer with the writes of some heads coded; for `intercept`, and rows of tokens that are not packed."""
    heads = list(coders)

    def handler(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm, cu_seqlens):
        if cu_seqlens is not None:
            raise ValueError("passages: expected a passage a row, got several packed into one")
        out = gated_delta_rule(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state,
            use_qk_l2norm=use_qk_l2norm,
        )  # fmt: skip
        o, state = closed_loop(q, k, v, g, beta, coders, read, initial_state, use_qk_l2norm)
        out.o[:, :, heads] = o.to(out.o)
        if output_final_state:
            out.final_state[:, heads] = state.to(out.final_state)
        return out.o, out.final_state

    return handler


# ---- dictionaries of states ---------------------------------------------------------------------------------------


def read_rule(readers: Mapping[int, tuple[SAE, int | None]]) -> RuleHandler:
    """A layer whose states evolve natively and are read, in some heads, through their reconstruction.

    Args:
        readers: {head: (dictionary of states, atoms a state or None for its own k)}.
    """

    def handler(q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm, cu_seqlens):
        if cu_seqlens is not None:
            raise ValueError("passages: expected a passage a row, got several packed into one")
        out = gated_delta_rule(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state,
            use_qk_l2norm=use_qk_l2norm, return_writes=True,
        )  # fmt: skip
        query = q.to(out.writes.right.dtype)
        query = (l2norm(query) if use_qk_l2norm else query) * q.shape[-1] ** -0.5
        for head, (sae, many) in readers.items():
            mine = query[:, :, out.writes.left_head(head)]  # the queries' heads are the keys'
            out.o[:, :, head] = read_through(out.writes, mine, sae, head, many).to(out.o)
        return out.o, out.final_state

    return handler


def read_through(writes: Writes, q: Tensor, sae: SAE, head: int, k: int | None = None) -> Tensor:
    """`read_through` of `run_with_sae`, with k atoms a state (None: its own) of a dictionary of any kind."""
    if k is None or (sae.bilinear_encoder and sae.rank_one_atoms):
        return read_factored(writes, q, sae, head, k)
    pre = sae.preactivations
    return read_states(
        writes, q, head, lambda states: sae.decode(SparseCodes(*exact_topk(pre(states.to(sae.mean)), k)))
    )
