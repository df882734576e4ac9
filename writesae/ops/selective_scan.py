"""The selective scan, the element-gated write rule of Mamba-1 and its family, with its writes, snapshots and edits.

Its kernels stand alone: what an element gate decays differently has no form of matrix products, so it is no rule of
csrc/scan.h, and its operators take x, dt, A, B, C and D as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from .._arguments import check_floats, check_type
from .._autocast import without_autocast
from .._library import CPU_ERROR
from ..edits import Edits
from ..writes import Writes
from . import _dispatch, _transforms
from .nonfinite import fake_nonfinite, nonfinite
from .reference.selective_scan import selective_scan as reference
from .rule import Rule, RuleOutput, RuleStepOutput
from .scan import ask, pack_edits


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
        x: inputs of V channels. Of x and dt either the last axis or that of tokens is read without a copy.
        dt: step sizes of every channel, after softplus.
        A: negative rates (-exp(A_log)); K is Mamba's state size.
        B, C: write and read keys, shared by all channels.
        D: skip weights, or None.
        initial_state: state before the first token, default zero. Hugging Face keeps its transpose [V, K].
        output_final_state, cu_seqlens, edits, snapshots, return_writes: as in `gated_delta_rule`. One head holds all
            channels: H = 1 of states, edits and writes.
        backend: as in `gated_delta_rule`.

    Returns:
        `out.o [B,T,V]` in x's dtype; `out.final_state [N,1,K,V]`, `out.writes` (decay `[B,T,1,V]` = dt, decay_matrix
        `[1,K,V]` = A transposed, left = B, right = dt x) and `out.snapshots` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument; a backend that cannot run this.
        RuntimeError: a second derivative asked of a kernel; backend="reference" has one.

    Differentiable once, in x, dt, A, B, C, D, initial_state and the edits' left and right. Where there is no kernel,
    and under forward mode and `torch.func`, the reference runs and says so. Autocast changes nothing.

    Source: Gu and Dao, *Mamba*, arXiv 2312.00752; the writes: Young, arXiv 2605.12770.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": initial_state}
    check_floats(("D", "initial_state"), **tensors)
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, T, V], got shape {tuple(x.shape)}")
    rows, T, V = x.shape
    _check(x, dt, A, B, C, D, f"B={rows}, T={T}")
    sizes = (1, A.shape[1], V)
    asked = ask("selective_scan", rows, T, sizes, initial_state, cu_seqlens, edits, snapshots, tokens="x")
    chosen = _dispatch.choose("selective_scan", backend, tensors)
    found = None
    if chosen == "reference":
        o, final, left, right, shots = reference(
            x, dt, A, B, C, D, initial_state, cu_seqlens, asked.edits, asked.places
        )  # fmt: skip
    else:
        if chosen == "twin":
            _register_gradients("writesae_twin")
        places = None if asked.places is None else asked.places.to(x.device, non_blocking=True)
        o, final, right, shots, found = _dispatch.operators(chosen).selective_scan(
            x, dt, A, B, C, D, initial_state, cu_seqlens, *_packed(asked.edits, x), places, return_writes
        )
        left, right = B.float()[:, :, None, None], right[:, :, None, None] if return_writes else right
    writes = None
    if return_writes:
        writes = Writes(
            dt.to(right.dtype)[:, :, None], left, right, decay_matrix=A.to(right.dtype).T[None],
            initial_state=None if initial_state is None else initial_state.to(right.dtype), cu_seqlens=cu_seqlens,
            edits=asked.added(left[:, :, :, 0], right[:, :, :, 0]),
        )  # fmt: skip
    return asked.answer(o, final if output_final_state else None, writes, shots, found)


@without_autocast
def selective_scan_step(
    x: Tensor,  # [B, V]
    dt: Tensor,  # [B, V]
    A: Tensor,  # [V, K]
    B: Tensor,  # [B, K]
    C: Tensor,  # [B, K]
    state: Tensor,  # [B, 1, K, V]  float32, contiguous; updated in place
    D: Tensor | None = None,  # [V]
    edits: Edits | None = None,
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleStepOutput:
    """One token of `selective_scan` for every row, `state` updated in place: the step of decoding.

    Args:
        x, dt, A, B, C, D, return_writes, backend: as in `selective_scan`, without the time axis.
        state: the state before the token on entry, after its write and edits on return.
        edits: changes made at this token, before or after it reads; their positions are not looked at.

    Returns:
        `out.o [B,V]` in x's dtype; with `return_writes` `out.left [B,1,K]` and `out.right [B,1,V]`, float32.

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument.
        RuntimeError: a gradient asked for; the state is overwritten, so no backend has one.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "state": state, "D": D}
    check_floats(("D",), **tensors)
    if x.ndim != 2:
        raise ValueError(f"x: expected [B, V], got shape {tuple(x.shape)}")
    _check(x, dt, A, B, C, D, f"B={x.shape[0]}")
    (rows, V), K = x.shape, A.shape[1]
    if state.shape != (rows, 1, K, V):
        raise ValueError(f"state: expected [B={rows}, H=1, K={K}, V={V}], got shape {tuple(state.shape)}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state.dtype != wanted or not state.is_contiguous():
        layout = "contiguous" if state.is_contiguous() else "non-contiguous"
        raise ValueError(f"state: expected contiguous {wanted}, got {layout} {state.dtype}")
    check_type("edits", edits, Edits, optional=True)
    if edits is not None:
        edits = edits._with(position=torch.zeros_like(edits.position))
        edits.check(rows, [1] * rows, 1, K, V)
        edits = edits.expand_rows(rows)
    op = "selective_scan_step"
    _transforms.refuse_transformed(op, "use selective_scan", *tensors.values())
    chosen = _dispatch.choose(op, backend, tensors)
    _dispatch.refuse_gradient(op, tensors, "use torch.no_grad()")
    x, dt, B, C = (y[:, None] for y in (x, dt, B, C))
    found = None
    if chosen == "reference":
        o, final, _, right, _ = reference(x, dt, A, B, C, D, state, None, edits, None)
        state.copy_(final)
        right = right[:, :, 0]
    else:
        o, right, found = _dispatch.operators(chosen).selective_scan_step(
            x, dt, A, B, C, state, D, *_packed(edits, x), return_writes
        )
    if not return_writes:
        return RuleStepOutput(o[:, 0], None, None)
    right = right[:, 0][:, None]
    return RuleStepOutput(o[:, 0], B.to(wanted), right, nonfinite(right[:, None]) if found is None else found)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, lead: str) -> None:
    """Refuses shapes that do not fit x. lead: its axes before channels, with their sizes."""
    V = x.shape[-1]
    if dt.shape != x.shape:
        raise ValueError(f"dt: expected the shape of x {tuple(x.shape)}, got {tuple(dt.shape)}")
    if A.ndim != 2 or A.shape[0] != V:
        raise ValueError(f"A: expected [V={V}, K], got shape {tuple(A.shape)}")
    K = A.shape[1]
    for name, value in (("B", B), ("C", C)):
        if value.shape != (*x.shape[:-1], K):
            raise ValueError(f"{name}: expected [{lead}, K={K}], got shape {tuple(value.shape)}")
    if D is not None and D.shape != (V,):
        raise ValueError(f"D: expected [V={V}], got shape {tuple(D.shape)}")


def _packed(edits: Edits | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    return (None, None, None) if edits is None or not len(edits) else pack_edits(edits, x.device)


# ---- what the operators are to tracing and differentiation ---------------------------------------------------------


def _fake(
    x, dt, A, B, C, D, initial_state, cu_seqlens, edit_index, edit_left, edit_right, snapshots, return_writes
):  # fmt: skip
    (rows, _, V), K = x.shape, A.shape[1]
    N = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    P = 0 if snapshots is None else snapshots.shape[0]
    shapes = (N, 1, K, V), x.shape if return_writes else (0,), (P, 1, K, V)
    floats = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return x.new_empty(x.shape), *floats, fake_nonfinite(x, return_writes)


def _fake_step(x, dt, A, B, C, state, D, edit_index, edit_left, edit_right, return_writes):
    right = x.new_empty(x.shape if return_writes else (0,), dtype=torch.float32)
    return x.new_empty(x.shape), right, fake_nonfinite(x, return_writes)


def _fake_backward(
    x, dt, A, B, C, D, initial_state, cu_seqlens, edit_index, edit_left, edit_right, snapshots, d_o, d_final_state,
    d_right, d_snapshots,
):  # fmt: skip
    (rows, _, V), K = x.shape, A.shape[1]
    N, E = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1, 0 if edit_left is None else edit_left.shape[0]
    d_x, d_dt, d_B, d_C = (y.new_empty(y.shape) for y in (x, dt, B, C))
    shapes = A.shape, (V,), (N, 1, K, V), (E, K), (E, V)
    d_A, *others = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return d_x, d_dt, d_A, d_B, d_C, *others


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1])
    ctx.writes = inputs[-1]


def _backward_of(namespace: str) -> Callable[..., tuple]:
    of_forward = getattr(torch.ops, namespace).selective_scan_backward

    def backward(ctx, d_o, d_final_state, d_right, d_snapshots, _):
        inputs = ctx.saved_tensors
        found = of_forward(*inputs, d_o, d_final_state, d_right if ctx.writes else None, d_snapshots)
        of_inputs, of_edits = found[:7], found[7:]  # x, dt, A, B, C, D, initial_state; left, right
        pairs = [
            *zip(inputs[:7], of_inputs, strict=True),
            *[(None, None)] * 2,
            *zip(inputs[9:11], of_edits, strict=True),
        ]
        return *(None if x is None else d.to(x.dtype) for x, d in pairs), None, None

    return backward


def _plain(
    x, dt, A, B, C, D, initial_state, cu_seqlens, edit_index, edit_left, edit_right, snapshots, return_writes
):  # fmt: skip
    """The operator by the reference, for transforms."""
    edits = None
    if edit_index is not None:  # not Edits, whose check looks at numbers that a transform may hide
        row, position, head, kind = edit_index.unbind(1)
        edits = SimpleNamespace(
            row=row, position=position, head=head, left=edit_left, right=edit_right, kind=kind % 4, when=kind // 4
        )
    o, final, _, right, shots = reference(x, dt, A, B, C, D, initial_state, cu_seqlens, edits, snapshots)
    if not return_writes:
        return o, final, x.new_empty(0), shots, x.new_empty(0, dtype=torch.int64)
    return o, final, right[:, :, 0, 0], shots, nonfinite(right)


@cache
def _register_gradients(namespace: str) -> None:
    """Of a library's operators, once it is loaded. On CUDA they are the namespace `writesae`, as on the CPU."""
    _transforms.register(
        "selective_scan", 'use backend="reference"', _plain, (_save, _backward_of(namespace)),
        ("x", "dt", "B", "C", "initial_state"), ("cu_seqlens", "edit_index", "snapshots"), namespace,
    )  # fmt: skip
    _transforms.register(
        "selective_scan_backward", 'for a second derivative use backend="reference"', fold=(), namespace=namespace
    )


if CPU_ERROR is None:
    torch.library.register_fake("writesae::selective_scan", _fake)
    torch.library.register_fake("writesae::selective_scan_backward", _fake_backward)
    torch.library.register_fake("writesae::selective_scan_step", _fake_step)
    _register_gradients("writesae")
    _transforms.register("selective_scan_step", "use selective_scan, or torch.no_grad()")

_GATE = ("element",)


def _limits(operator: str) -> dict[str, _dispatch.Limits]:
    cpu = _dispatch.Limits(operator, gates=_GATE, gradient=_GATE)
    return {"cpu": cpu, "cuda": replace(cpu, largest={"B": 256})}


LIMITS = _dispatch.declare("selective_scan", _limits("selective_scan"))
_dispatch.declare("selective_scan_step", _limits("selective_scan_step"))
RULE = Rule("selective_scan", _GATE, "none", ("x", "dt", "A", "B", "C", "D"), selective_scan, LIMITS)
