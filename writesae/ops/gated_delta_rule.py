"""The gated delta rule (Gated DeltaNet; DeltaNet is g = 0), with its writes, snapshots and edits in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from .._arguments import (
    check_floats,
    check_integers,
    check_type,
    integers,
    refuse_unreadable,
    said,
    sequence_offsets,
    sizes_repr,
)
from .._autocast import without_autocast
from .._library import CPU_ERROR
from ..edits import ADD, AFTER, DELETE, Edits
from ..writes import Writes
from . import _dispatch, _transforms
from .reference.gated_delta_rule import gated_delta_rule as reference
from .rule import Rule, RuleOutput


@without_autocast
def gated_delta_rule(
    q: Tensor,  # [B, T, Hk, K]
    k: Tensor,  # [B, T, Hk, K]
    v: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H]
    beta: Tensor,  # [B, T, H]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    edits: Edits | None = None,
    snapshots: Tensor | Sequence[int] | None = None,  # [P, 2] or P positions
    return_writes: bool = False,
    backend: str | None = None,
) -> RuleOutput:
    """Runs `S_t = e^g (I - beta k k^T) S_{t-1} + beta k v^T`, `o_t = scale S_t^T q_t` over whole sequences.

    Args:
        q, k: queries and keys. Value head h reads key head h // (H / Hk).
        v: values.
        g: log-decay, <= 0 in every trained model (0 is DeltaNet).
        beta: erase and write strength.
        scale: multiplies q; default K ** -0.5.
        initial_state: state before the first token, default zero. Computed in float32.
        output_final_state: also return the state after the last token.
        use_qk_l2norm: first divide q and k by sqrt(sum x^2 + 1e-6), as Qwen3-Next and Qwen3.5 do.
        cu_seqlens: offsets of packed sequences, 0 first and T last; needs B = 1. Then N = len - 1, else N = B.
        edits: changes to the states, addressed by row (of a packed batch: the sequence) and position in that row; each
            before or after its token reads the state.
        snapshots: states to return, after all edits of their position: `[P, 2]` int tensor of (row, position), or
            positions taken in every row.
        return_writes: also return the `Writes`.
        backend: "reference", "cpu", "cuda", or None for the kernel of the tensors' device.

    Returns:
        `out.o [B,T,H,V]` in v's dtype; `out.final_state [N,H,K,V]`, `out.writes` and `out.snapshots` (`[P,H,K,V]`, or
        `[N,P,H,K,V]` for a list of positions) in float32 (float64 for float64 inputs, reference only).

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument.
        RuntimeError: a second derivative asked of a kernel; backend="reference" has one.

    Under forward mode and `torch.func` (jvp, grad and what is made of them) the reference runs, which is slow and
    right; a lone vmap joins its axis to B. Autocast changes nothing: inputs stay as they come, states float32.

    Differentiable once, in q, k, v, g, beta, initial_state and the edits' left and right; o, final_state, the writes
    and the snapshots all carry gradient. A write that an edit deletes or replaces is not made, so v and beta of that
    token have gradient 0 there, and k what reaches it by other ways. One deleted or replaced after the read is made:
    `out.writes` hold it, with its opposite among their edits after the read, and it answers to its own o alone. Kept
    for the backward: the inputs and the writes; states are computed anew, and one in 512 tokens is held while it runs.
    On CUDA, with its adjoint, one in 64 tokens in bfloat16 where q, k and v are all bfloat16 (K / 32 times what v
    takes), else one in 32 in float32.

    Source: Yang et al., *Gated Delta Networks*, arXiv 2412.06464; the writes: Young, arXiv 2605.12770.
    """
    check_floats(("initial_state",), q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    lengths = _check(q, k, v, g, beta, initial_state, cu_seqlens)
    H, V = v.shape[2:]
    K = k.shape[-1]
    scale = _scale(scale, K)
    check_type("edits", edits, Edits, optional=True)
    if edits is not None:
        refuse_unreadable("gated_delta_rule", "edits", edits.row)
        edits.check(len(lengths), lengths, H, K, V)
        edits = edits.expand_rows(len(lengths))
    places, as_list = _places(snapshots, lengths)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    chosen = _dispatch.choose("gated_delta_rule", backend, tensors)
    if chosen == "reference":
        o, final, left, right, shots = reference(
            q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edits, places
        )
    else:
        index = edit_left = edit_right = None
        if edits is not None and len(edits):
            index, edit_left, edit_right = pack_edits(edits, v.device)
        places = None if places is None else places.to(v.device, non_blocking=True)
        if chosen == "twin":
            _register_gradients("writesae_twin")
        # The backward needs the increments; writing them out is cheaper than running the scan once more for them.
        differentiable = (*tensors.values(), edit_left, edit_right)
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
        o, final, left, right, shots = _dispatch.operators(chosen).gated_delta_rule(
            q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, index, edit_left, edit_right, places,
            return_writes or keep,
        )  # fmt: skip
    writes = None
    if return_writes:
        start = None if initial_state is None else initial_state.to(right.dtype)
        decay = g.to(right.dtype)
        writes = Writes(
            decay, left[:, :, :, None], right[:, :, :, None], beta=beta.to(right.dtype), initial_state=start,
            cu_seqlens=cu_seqlens, edits=_additions(edits, left, right, cu_seqlens),
        )  # fmt: skip
    if places is not None and as_list:
        shots = shots.reshape(len(lengths), -1, H, K, V)
    return RuleOutput(o, final if output_final_state else None, writes, None if places is None else shots)


RULE = Rule("gated_delta_rule", ("scalar",), "delta", ("q", "k", "v", "g", "beta"), gated_delta_rule)


@dataclass(frozen=True, repr=False)
class GatedDeltaRuleStepOutput:
    """o `[B,H,V]` in v's dtype; left `[B,Hk,K]` and right `[B,H,V]` float32, or None without `return_writes`."""

    o: Tensor
    left: Tensor | None
    right: Tensor | None

    __repr__ = sizes_repr


@without_autocast
def gated_delta_rule_step(
    q: Tensor,  # [B, Hk, K]
    k: Tensor,  # [B, Hk, K]
    v: Tensor,  # [B, H, V]
    g: Tensor,  # [B, H]
    beta: Tensor,  # [B, H]
    state: Tensor,  # [B, H, K, V]  float32, contiguous; updated in place
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    edits: Edits | None = None,
    return_writes: bool = False,
    backend: str | None = None,
) -> GatedDeltaRuleStepOutput:
    """One token of `gated_delta_rule` for every row, `state` updated in place: the step of decoding.

    Args:
        q, k, v, g, beta, scale, use_qk_l2norm, return_writes, backend: as in `gated_delta_rule`, without the time axis.
        state: the state before the token on entry, after its write and edits on return.
        edits: changes made at this token, before or after it reads; their positions are not looked at.

    Raises:
        ValueError: a wrong shape, dtype or place, naming the argument.
        RuntimeError: a gradient asked for; the state is overwritten, so no backend has one.
    """
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    check_floats(**tensors)
    if v.ndim != 3:
        raise ValueError(f"v: expected [B, H, V], got shape {tuple(v.shape)}")
    _check(*(x[:, None] if x.ndim else x for x in (q, k, v, g, beta)), None, None)
    B, H, V = v.shape
    K = k.shape[-1]
    if tuple(state.shape) != (B, H, K, V):
        raise ValueError(f"state: expected [B={B}, H={H}, K={K}, V={V}], got shape {tuple(state.shape)}")
    wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state.dtype != wanted or not state.is_contiguous():
        layout = "contiguous" if state.is_contiguous() else "non-contiguous"
        raise ValueError(f"state: expected contiguous {wanted}, got {layout} {state.dtype}")
    scale = _scale(scale, K)
    check_type("edits", edits, Edits, optional=True)
    if edits is not None:
        edits = edits._with(position=torch.zeros_like(edits.position))
        edits.check(B, [1] * B, H, K, V)
        edits = edits.expand_rows(B)
    _transforms.refuse_transformed("gated_delta_rule_step", "use gated_delta_rule", *tensors.values())
    chosen = _dispatch.choose("gated_delta_rule_step", backend, tensors)
    _dispatch.refuse_gradient("gated_delta_rule_step", tensors, "use torch.no_grad()")
    if chosen == "reference":
        o, final, left, right, _ = reference(
            *(x[:, None] for x in (q, k, v, g, beta)), scale, state, use_qk_l2norm, None, edits, None
        )
        state.copy_(final)
        o, left, right = o[:, 0], left[:, 0], right[:, 0]
    else:
        packed = pack_edits(edits, v.device) if edits is not None and len(edits) else (None, None, None)
        o, left, right = _dispatch.operators(chosen).gated_delta_rule_step(
            q, k, v, g, beta, state, scale, use_qk_l2norm, *packed, return_writes
        )
    return GatedDeltaRuleStepOutput(o, left if return_writes else None, right if return_writes else None)


def first_nonfinite(right: Tensor) -> tuple[int, int, int] | None:
    """(row, position, head) of the first NaN or infinity in increments `[B, T, H, V]`, or None.

    A state is finite as long as its increments are, so this is where one broke. One pass over `right` when nothing is
    wrong.
    """
    check_floats(right=right)
    if right.ndim != 4:
        raise ValueError(f"right: expected [B, T, H, V], got shape {tuple(right.shape)}")
    refuse_unreadable("first_nonfinite", "right", right)
    # The sum of finite numbers can overflow, so it only clears; what it does not clear is looked at in full.
    if bool(torch.isfinite(right.sum(dtype=torch.float32))):
        return None
    bad = (~torch.isfinite(right)).any(-1).nonzero()
    return tuple(bad[0].tolist()) if len(bad) else None


def pack_edits(edits: Edits, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(`[E, 4]` int64 of row, position, head, kind, 4 more where after the read; left; right, float32), sorted by (row,
    head, position), stable."""
    order = torch.arange(len(edits))
    for key in (edits.position, edits.head, edits.row):
        order = order[torch.argsort(key[order], stable=True)]
    columns = edits.row, edits.position, edits.head, edits.kind + 4 * edits.when
    index = torch.stack([x[order].long() for x in columns], 1)
    parts = index.contiguous(), edits.left[order].float().contiguous(), edits.right[order].float().contiguous()
    return tuple(x.to(device, non_blocking=True) for x in parts)


def _additions(edits: Edits | None, left: Tensor, right: Tensor, cu_seqlens: Tensor | None) -> Edits | None:
    """What edits add beyond the native writes as they were made: `left [B, T, Hk, K]`, `right [B, T, H, V]`."""
    if edits is None or not len(edits):
        return None
    e = edits[edits.kind != DELETE]
    added = e._with(kind=torch.zeros_like(e.kind))
    gone = (edits.kind != ADD) & (edits.when == AFTER)
    if not bool(gone.any()):
        return added if len(added) else None
    # A write removed after its read is made, and its opposite is added then: once, however many edits remove it.
    places = torch.stack([edits.row[gone], edits.position[gone], edits.head[gone]], 1).unique(dim=0)
    row, position, head = places.unbind(1)
    b, token = (row, position) if cu_seqlens is None else (row * 0, cu_seqlens.cpu()[row] + position)
    p, q = left[b, token, head // (right.shape[2] // left.shape[2])], -right[b, token, head]
    return added._with(
        row=torch.cat([added.row, row]), position=torch.cat([added.position, position]),
        head=torch.cat([added.head, head]), left=torch.cat([added.left.to(p), p]),
        right=torch.cat([added.right.to(q), q]), kind=torch.zeros(len(added) + len(row), dtype=torch.int8),
        when=torch.cat([added.when, torch.full((len(row),), AFTER, dtype=torch.int8)]),
    )  # fmt: skip


def _scale(scale, K: int) -> float:
    if scale is None:
        return K**-0.5
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {said(scale)}")
    return float(scale)


def _places(snapshots, lengths: list[int]) -> tuple[Tensor | None, bool]:
    if snapshots is None:
        return None, False
    as_list = not (isinstance(snapshots, Tensor) and snapshots.ndim == 2)
    if as_list:
        positions = integers("snapshots", snapshots)
        places = [(n, t) for n in range(len(lengths)) for t in positions]
    else:
        check_integers("snapshots", snapshots, "[P, 2]")
        if snapshots.shape[1] != 2:
            raise ValueError(f"snapshots: expected [P, 2] of (row, position), got shape {tuple(snapshots.shape)}")
        refuse_unreadable("gated_delta_rule", "snapshots", snapshots)
        places = snapshots.tolist()
    for n, t in places:
        if not 0 <= n < len(lengths) or not 0 <= t < lengths[n]:
            raise ValueError(
                f"snapshots: expected rows below {len(lengths)} and positions inside their row, got row {n}, "
                f"position {t}"
            )
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 2), as_list


def _check(q, k, v, g, beta, initial_state, cu_seqlens) -> list[int]:
    """Refuses what does not fit; returns the lengths of the sequences. The caller has seen to the tensors' kind."""
    if v.ndim != 4:
        raise ValueError(f"v: expected [B, T, H, V], got shape {tuple(v.shape)}")
    B, T, H, V = v.shape
    if k.ndim != 4 or k.shape[:2] != (B, T) or k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k: expected [B={B}, T={T}, Hk dividing H={H}, K], got shape {tuple(k.shape)}")
    if q.shape != k.shape:
        raise ValueError(f"q: expected the shape of k {tuple(k.shape)}, got {tuple(q.shape)}")
    for name, x in (("g", g), ("beta", beta)):
        if tuple(x.shape) != (B, T, H):
            raise ValueError(f"{name}: expected [B={B}, T={T}, H={H}], got shape {tuple(x.shape)}")
    if T == 0:
        raise ValueError("v: expected at least one token, got T = 0")
    lengths = [T] * B
    if cu_seqlens is not None:
        offsets = sequence_offsets("gated_delta_rule", cu_seqlens, B, T)
        lengths = [hi - lo for lo, hi in zip(offsets[:-1], offsets[1:], strict=True)]
    N = len(lengths)
    if initial_state is not None and tuple(initial_state.shape) != (N, H, k.shape[-1], V):
        raise ValueError(
            f"initial_state: expected [N={N}, H={H}, K={k.shape[-1]}, V={V}], got shape {tuple(initial_state.shape)}"
        )
    return lengths


def _fake(
    q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edit_index, edit_left, edit_right, snapshots,
    return_writes,
):  # fmt: skip
    B, T, H, V = v.shape
    Hk, K = k.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    P = 0 if snapshots is None else snapshots.shape[0]
    full = {"dtype": torch.float32}
    left = v.new_empty((B, T, Hk, K) if return_writes else (0,), **full)
    right = v.new_empty((B, T, H, V) if return_writes else (0,), **full)
    return v.new_empty(v.shape), v.new_empty((N, H, K, V), **full), left, right, v.new_empty((P, H, K, V), **full)


def _fake_backward(
    q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edit_index, edit_left, edit_right, snapshots,
    right, d_o, d_final_state, d_left, d_right, d_snapshots,
):  # fmt: skip
    (_, _, H, V), K = v.shape, k.shape[3]
    N, E = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, 0 if edit_left is None else edit_left.shape[0]
    inputs = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
    return *inputs, *(v.new_empty(shape, dtype=torch.float32) for shape in ((N, H, K, V), (E, K), (E, V)))


def _fake_step(
    q, k, v, g, beta, state, scale, use_qk_l2norm, edit_index, edit_left, edit_right, return_writes
):  # fmt: skip
    left = v.new_empty(k.shape if return_writes else (0,), dtype=torch.float32)
    return v.new_empty(v.shape), left, v.new_empty(v.shape if return_writes else (0,), dtype=torch.float32)


# ---- gradients ------------------------------------------------------------------------------------------------------


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    tensors = [x for i, x in enumerate(inputs) if i not in (5, 7, 13)]
    ctx.save_for_backward(*tensors, output[3] if inputs[13] else None)
    ctx.scale, ctx.use_qk_l2norm = inputs[5], inputs[7]


def _backward_with(operators):
    def backward(ctx, d_o, d_final_state, d_left, d_right, d_snapshots):
        q, k, v, g, beta, initial_state, cu_seqlens, *edits_and_places, right = ctx.saved_tensors
        inputs = (q, k, v, g, beta, ctx.scale, initial_state, ctx.use_qk_l2norm, cu_seqlens, *edits_and_places)
        if right is None:  # called with return_writes=False: left and right came out empty
            d_left = d_right = None
            with torch.no_grad():
                right = operators.gated_delta_rule(*inputs, True)[3]
        given = (d_o, d_final_state, d_left, d_right, d_snapshots)
        *grads, d_initial, d_edit_left, d_edit_right = operators.gated_delta_rule_backward(*inputs, right, *given)
        states = None if initial_state is None else d_initial.to(initial_state.dtype)
        _, edit_left, edit_right, _ = edits_and_places
        pairs = (edit_left, d_edit_left), (edit_right, d_edit_right)
        sides = (None if x is None else d.to(x.dtype) for x, d in pairs)
        return *grads, None, states, None, None, None, *sides, None, None

    return backward


def _plain(
    q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edit_index, edit_left, edit_right, snapshots,
    return_writes,
):  # fmt: skip
    """The operator by the reference, for transforms."""
    edits = None
    if edit_index is not None:  # not Edits, whose check looks at numbers that a transform may hide
        row, position, head, kind = edit_index.unbind(1)
        edits = SimpleNamespace(
            row=row, position=position, head=head, left=edit_left, right=edit_right, kind=kind % 4, when=kind // 4
        )
    o, final, left, right, shots = reference(
        q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edits, snapshots
    )
    return (o, final, left, right, shots) if return_writes else (o, final, v.new_empty(0), v.new_empty(0), shots)


@cache
def _register_gradients(namespace: str) -> None:
    """Of a library's operators, once it is loaded. On CUDA they are the namespace `writesae`, as on the CPU."""
    alone = ("cu_seqlens", "edit_index", "snapshots")
    inputs = ("q", "k", "v", "g", "beta", "initial_state")
    _transforms.register(
        "gated_delta_rule", 'use backend="reference"', _plain,
        (_save, _backward_with(getattr(torch.ops, namespace))), inputs, alone, namespace,
    )  # fmt: skip
    _transforms.register(
        "gated_delta_rule_backward", 'for a second derivative use backend="reference"',
        fold=(*inputs, "right", "d_o", "d_final_state", "d_left", "d_right"), alone=alone, namespace=namespace,
    )  # fmt: skip


if CPU_ERROR is None:
    torch.library.register_fake("writesae::gated_delta_rule", _fake)
    torch.library.register_fake("writesae::gated_delta_rule_step", _fake_step)
    torch.library.register_fake("writesae::gated_delta_rule_backward", _fake_backward)
    _register_gradients("writesae")
    _transforms.register("gated_delta_rule_step", "use gated_delta_rule, or torch.no_grad()")
