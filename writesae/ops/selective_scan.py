"""The selective scan, the element-gated write rule of Mamba-1 and its family, with its writes, snapshots and edits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..edits import Edits
from ..writes import Writes
from . import _dispatch
from .reference.selective_scan import selective_scan as reference
from .rule import Rule, RuleOutput
from .scan import ask


@without_autocast
def selective_scan(
    x: Tensor,  # [B, T, V]
    dt: Tensor,  # [B, T, V]
    A: Tensor,  # [V, K]
    B: Tensor,  # [B, T, K]
    C: Tensor,  # [B, T, K]
    D: Tensor | None = None,  # [V]
    initial_state: Tensor | None = None,  # [N, 1, K, V]
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    edits: Edits | None = None,
    snapshots: Tensor | Sequence[int] | None = None,  # [P, 2] or P positions
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleOutput:
    """Runs `S_t[n, c] = exp(dt_{t,c} A_{c,n}) S_{t-1}[n, c] + B_t[n] dt_{t,c} x_t[c]`, `o_t = S_t^T C_t + D x_t`.

    Args:
        x: inputs of V channels.
        dt: step sizes of every channel, after softplus.
        A: negative rates (-exp(A_log)); K is Mamba's state size.
        B, C: write and read keys, shared by all channels.
        D: skip weights, or None.
        initial_state: state before the first token, default zero. Hugging Face keeps its transpose [V, K].
        output_final_state, cu_seqlens, edits, snapshots, return_writes: as in `gated_delta_rule`. One head holds all
            channels: H = 1 of states, edits and writes.
        backend: "reference" or None: there is no kernel for this rule yet, and None says so once.

    Returns:
        `out.o [B,T,V]` in x's dtype; `out.final_state [N,1,K,V]`, `out.writes` (decay `[B,T,1,V]` = dt, decay_matrix
        `[1,K,V]` = A transposed, left = B, right = dt x) and `out.snapshots` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument; a backend that has no kernel.

    Differentiable by torch's own operations, any number of times and under every transform.

    Source: Gu and Dao, *Mamba*, arXiv 2312.00752; the writes: Young, arXiv 2605.12770.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": initial_state}
    check_floats(("D", "initial_state"), **tensors)
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, T, V], got shape {tuple(x.shape)}")
    rows, T, V = x.shape
    if dt.shape != x.shape:
        raise ValueError(f"dt: expected the shape of x {tuple(x.shape)}, got {tuple(dt.shape)}")
    if A.ndim != 2 or A.shape[0] != V:
        raise ValueError(f"A: expected [V={V}, K], got shape {tuple(A.shape)}")
    K = A.shape[1]
    for name, value in (("B", B), ("C", C)):
        if value.shape != (rows, T, K):
            raise ValueError(f"{name}: expected [B={rows}, T={T}, K={K}], got shape {tuple(value.shape)}")
    if D is not None and D.shape != (V,):
        raise ValueError(f"D: expected [V={V}], got shape {tuple(D.shape)}")
    asked = ask("selective_scan", rows, T, (1, K, V), initial_state, cu_seqlens, edits, snapshots, tokens="x")
    _dispatch.choose("selective_scan", backend, tensors)
    o, final, left, right, shots = reference(
        x, dt, A, B, C, D, initial_state, cu_seqlens, asked.edits, asked.places
    )  # fmt: skip
    writes = None
    if return_writes:
        writes = Writes(
            dt.to(right.dtype)[:, :, None], left, right, decay_matrix=A.to(right.dtype).T[None],
            initial_state=None if initial_state is None else initial_state.to(right.dtype), cu_seqlens=cu_seqlens,
            edits=asked.added(left[:, :, :, 0], right[:, :, :, 0]),
        )  # fmt: skip
    return asked.answer(o, final if output_final_state else None, writes, shots)


LIMITS = _dispatch.declare("selective_scan", {})
RULE = Rule("selective_scan", ("element",), "none", ("x", "dt", "A", "B", "C", "D"), selective_scan, LIMITS)
