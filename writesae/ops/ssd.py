"""SSD, the scalar-gated additive write rule of Mamba-2 and its family, with writes, snapshots and edits in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._arguments import check_floats
from .._autocast import without_autocast
from ..edits import Edits
from ._dispatch import Limits
from .reference.ssd import ssd as reference
from .rule import Rule, RuleOutput, RuleStepOutput
from .scan import Scan, ask

SCAN = Scan("ssd", reference, erases=False)


@without_autocast
def ssd(
    x: Tensor,  # [B, T, H, V]
    dt: Tensor,  # [B, T, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, T, G, K]
    C: Tensor,  # [B, T, G, K]
    D: Tensor | None = None,  # [H]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    edits: Edits | None = None,
    snapshots: Tensor | Sequence[int] | None = None,  # [P, 2] or P positions
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleOutput:
    """Runs `S_t = exp(dt A) S_{t-1} + B_t (dt x_t)^T`, `o_t = S_t^T C_t + D x_t` over whole sequences.

    Args:
        x: inputs; V is Mamba-2's head dimension.
        dt: step sizes, after softplus and clamping.
        A: negative rates (-exp(A_log)).
        B, C: write and read keys; K is Mamba-2's state size, G its groups. Head h reads group h // (H / G).
        D: skip weights, or None.
        initial_state: state before the first token, default zero. Hugging Face keeps its transpose [V, K].
        output_final_state, cu_seqlens, edits, snapshots, return_writes, backend: as in `gated_delta_rule`.

    Returns:
        `out.o [B,T,H,V]` in x's dtype; `out.final_state [N,H,K,V]`, `out.writes` (left = B, right = dt x, no erase) and
        `out.snapshots` in float32 (float64 for float64 inputs, reference only). dt A and the sum with D x are made in
        float32, from what the scan returns in x's dtype.

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument; a backend that cannot run this.
        RuntimeError: a second derivative asked of a kernel; backend="reference" has one.

    Differentiable once, in x, dt, A, B, C, D, initial_state and the edits' left and right. Where there is no kernel,
    and under forward mode and `torch.func`, the reference runs and says so. Autocast changes nothing.

    Source: Dao and Gu, *Transformers are SSMs*, arXiv 2405.21060; the writes: Young, arXiv 2605.12770.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": initial_state}
    check_floats(("D", "initial_state"), **tensors)
    if x.ndim != 4:
        raise ValueError(f"x: expected [B, T, H, V], got shape {tuple(x.shape)}")
    rows, T, H, V = x.shape
    _check(x, dt, A, B, C, D, f"B={rows}, T={T}")
    sizes = (H, B.shape[-1], V)
    asked = ask("ssd", rows, T, sizes, initial_state, cu_seqlens, edits, snapshots, tokens="x")
    out = SCAN.run(
        tensors, C, B, x, _decay(dt, A), dt, 1.0, initial_state, output_final_state, False, asked, return_writes,
        backend,
    )  # fmt: skip
    return out if D is None else replace(out, o=_skipped(out.o, D, x))


@without_autocast
def ssd_step(
    x: Tensor,  # [B, H, V]
    dt: Tensor,  # [B, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, G, K]
    C: Tensor,  # [B, G, K]
    state: Tensor,  # [B, H, K, V]  float32, contiguous; updated in place
    D: Tensor | None = None,  # [H]
    edits: Edits | None = None,
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleStepOutput:
    """One token of `ssd` for every row, `state` updated in place: the step of decoding.

    Args:
        x, dt, A, B, C, D, return_writes, backend: as in `ssd`, without the time axis.
        state: the state before the token on entry, after its write and edits on return.
        edits: changes made at this token, before or after it reads; their positions are not looked at.

    Returns:
        `out.o [B,H,V]` in x's dtype; with `return_writes` `out.left [B,G,K]` and `out.right [B,H,V]`, float32.

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument.
        RuntimeError: a gradient asked for; the state is overwritten, so no backend has one.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "state": state, "D": D}
    check_floats(("D",), **tensors)
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, H, V], got shape {tuple(x.shape)}")
    _check(x, dt, A, B, C, D, f"B={x.shape[0]}")
    out = SCAN.step(tensors, C, B, x, _decay(dt, A), dt, state, 1.0, False, edits, return_writes, backend)
    return out if D is None else replace(out, o=_skipped(out.o, D, x))


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, lead: str) -> None:
    """Refuses shapes that do not fit x. lead: its axes before heads, with their sizes."""
    H = x.shape[-2]
    if dt.shape != x.shape[:-1]:
        raise ValueError(f"dt: expected [{lead}, H={H}], got shape {tuple(dt.shape)}")
    for name, value in (("A", A), ("D", D)):
        if value is not None and value.shape != (H,):
            raise ValueError(f"{name}: expected [H={H}], got shape {tuple(value.shape)}")
    if B.ndim != x.ndim or B.shape[:-2] != x.shape[:-2] or B.shape[-2] == 0 or H % B.shape[-2]:
        raise ValueError(f"B: expected [{lead}, G dividing H={H}, K], got shape {tuple(B.shape)}")
    if C.shape != B.shape:
        raise ValueError(f"C: expected the shape of B {tuple(B.shape)}, got {tuple(C.shape)}")


def _decay(dt: Tensor, A: Tensor) -> Tensor:
    """`[..., H]` log-decay, at least float32: half precision would round a slow decay away."""
    wide = torch.promote_types(torch.promote_types(dt.dtype, A.dtype), torch.float32)
    return dt.to(wide) * A.to(wide)


def _skipped(o: Tensor, D: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(o.to(wide), D.to(wide)[:, None], x.to(wide)).to(x.dtype)


LIMITS = SCAN.declare(cpu=Limits("ssd"), cuda=Limits("ssd", largest={"B": 256}))
RULE = Rule("ssd", ("scalar",), "none", ("x", "dt", "A", "B", "C", "D"), ssd, LIMITS)
