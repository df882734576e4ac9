"""Diagonal plus low rank: the channel-gated write rules of RWKV-7, Comba and GLA, with their writes, snapshots and
edits. KDA is one of them too, but has a single write a token: `gated_delta_rule` runs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..edits import Edits
from ..writes import Writes
from . import _dispatch
from .reference.dplr import dplr as reference
from .rule import Rule, RuleOutput
from .scan import ask


@without_autocast
def dplr(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H, K]
    a: Tensor | None = None,  # [B, T, H, K]
    b: Tensor | None = None,  # [B, T, H, K]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    edits: Edits | None = None,
    snapshots: Tensor | Sequence[int] | None = None,  # [P, 2] or P positions
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleOutput:
    """Runs `S_t = Diag(e^g) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, `o_t = S_t^T q_t` over whole sequences.

    RWKV-7 is a = kappa, b = -(a (.) kappa), q its r; GLA has neither a nor b.

    Args:
        q, k, v: queries (already scaled), keys, values.
        g: log-decay of every key channel.
        a, b: what the erase reads, of the state before its gate, and where it writes; both or neither.
        initial_state: state before the first token, default zero.
        output_final_state, cu_seqlens, snapshots, return_writes: as in `gated_delta_rule`.
        edits: as in `gated_delta_rule`. With an erase a token makes two writes, `b (S^T a)^T` and `k v^T`; the native
            write that an edit deletes or replaces is `k v^T`, which carries the value, and the erase stays.
        backend: "reference" or None: there is no kernel for this rule yet, and None says so once.

    Returns:
        `out.o [B,T,H,V]` in v's dtype; `out.final_state [N,H,K,V]`, `out.writes` (with an erase two a token, the native
        one last) and `out.snapshots` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument; a backend that has no kernel.

    Differentiable by torch's own operations, any number of times and under every transform.

    Source: Peng et al., *RWKV-7*, arXiv 2503.14456; Yang et al., *GLA*, arXiv 2312.06635; the writes: Young, arXiv
    2605.12770.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "a": a, "b": b, "initial_state": initial_state}
    check_floats(("a", "b", "initial_state"), **tensors)
    if v.ndim != 4:
        raise ValueError(f"v: expected [B, T, H, V], got shape {tuple(v.shape)}")
    B, T, H, V = v.shape
    if k.ndim != 4 or k.shape[:3] != (B, T, H):
        raise ValueError(f"k: expected [B={B}, T={T}, H={H}, K], got shape {tuple(k.shape)}")
    if (a is None) != (b is None):
        raise ValueError(f"{'a' if a is None else 'b'}: expected a and b together or neither, got None")
    for name, x in (("q", q), ("g", g), ("a", a), ("b", b)):
        if x is not None and x.shape != k.shape:
            raise ValueError(f"{name}: expected the shape of k {tuple(k.shape)}, got {tuple(x.shape)}")
    asked = ask("dplr", B, T, (H, k.shape[-1], V), initial_state, cu_seqlens, edits, snapshots)
    _dispatch.choose("dplr", backend, tensors)
    o, final, left, right, shots = reference(q, k, v, g, a, b, initial_state, cu_seqlens, asked.edits, asked.places)
    writes = None
    if return_writes:
        writes = Writes(
            g.to(right.dtype), left, right, erase=None if a is None or b is None else (a.to(right), b.to(right)),
            initial_state=None if initial_state is None else initial_state.to(right.dtype), cu_seqlens=cu_seqlens,
            edits=asked.added(left[:, :, :, -1], right[:, :, :, -1]),
        )  # fmt: skip
    return asked.answer(o, final if output_final_state else None, writes, shots)


LIMITS = _dispatch.declare("dplr", {})
RULE = Rule("dplr", ("channel",), "low rank", ("q", "k", "v", "g", "a", "b"), dplr, LIMITS)
