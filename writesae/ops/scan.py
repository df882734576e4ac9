"""What every scan shares: checks of its arguments, edits, places of snapshots, its `Writes`; and of the rules whose
kernels stand in csrc/scan.h, dispatch, shapes for tracing, gradients and transforms.

A rule that is a scan names itself once, `SCAN = Scan(name, reference, erases)`, and calls `SCAN.run` and `SCAN.step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from .._arguments import check_integers, check_type, integers, refuse_unreadable, said, sequence_offsets
from .._library import CPU_ERROR
from ..edits import ADD, AFTER, DELETE, Edits
from ..writes import Writes
from . import _dispatch, _transforms
from .nonfinite import fake_nonfinite, nonfinite
from .rule import RuleOutput, RuleStepOutput

# ---- what a call of any rule asks for -------------------------------------------------------------------------------


@dataclass(slots=True)
class Asked:
    """What a call asks for, checked.

    Attributes:
        sizes: (H, K, V) of a state.
        lengths: of the N sequences.
        cu_seqlens: `[N + 1]`, or None.
        edits: rows expanded, or None.
        places: `[P, 2]` (row, position) of snapshots on the host, or None.
        as_list: snapshots were asked at positions of every row.
    """

    sizes: tuple[int, int, int]
    lengths: list[int]
    cu_seqlens: Tensor | None
    edits: Edits | None
    places: Tensor | None
    as_list: bool

    def answer(
        self, o: Tensor, final_state: Tensor | None, writes: Writes | None, snapshots: Tensor,
        first_nonfinite: Tensor | None = None,
    ) -> RuleOutput:  # fmt: skip
        """first_nonfinite: `[B]` as a kernel has found it; None: it is looked for here."""
        if writes is None:
            first_nonfinite = None
        elif first_nonfinite is None:
            first_nonfinite = nonfinite(writes.right)
        shots = None
        if self.places is not None:
            shots = snapshots.reshape(len(self.lengths), -1, *self.sizes) if self.as_list else snapshots
        return RuleOutput(o, final_state, writes, shots, first_nonfinite)

    def added(self, left: Tensor, right: Tensor) -> Edits | None:
        """What the edits add beyond the native writes as they were made, `left [B, T, Hl, K]`, `right [B, T, H, V]`."""
        return _additions(self.edits, left, right, self.cu_seqlens)


def ask(
    op: str,
    B: int,
    T: int,
    sizes: tuple[int, int, int],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    edits: Edits | None,
    snapshots: Tensor | Sequence[int] | None,
    tokens: str = "v",
) -> Asked:
    """Refuses what does not fit. sizes: (H, K, V) of a state. tokens: the argument that T is taken from."""
    if T == 0:
        raise ValueError(f"{tokens}: expected at least one token, got T = 0")
    H, K, V = sizes
    lengths = [T] * B
    if cu_seqlens is not None:
        offsets = sequence_offsets(op, cu_seqlens, B, T)
        lengths = [hi - lo for lo, hi in zip(offsets[:-1], offsets[1:], strict=True)]
    N = len(lengths)
    if initial_state is not None and initial_state.shape != (N, H, K, V):
        raise ValueError(
            f"initial_state: expected [N={N}, H={H}, K={K}, V={V}], got shape {tuple(initial_state.shape)}"
        )
    check_type("edits", edits, Edits, optional=True)
    if edits is not None:
        refuse_unreadable(op, "edits", edits.row)
        edits.check(N, lengths, H, K, V)
        edits = edits.expand_rows(N)
    places, as_list = (None, False) if snapshots is None else _places(op, snapshots, lengths)
    return Asked(sizes, lengths, cu_seqlens, edits, places, as_list)


def _places(op: str, snapshots: Tensor | Sequence[int], lengths: list[int]) -> tuple[Tensor, bool]:
    as_list = not (isinstance(snapshots, Tensor) and snapshots.ndim == 2)
    if as_list:
        positions = integers("snapshots", snapshots)
        places = [(n, t) for n in range(len(lengths)) for t in positions]
    else:
        assert isinstance(snapshots, Tensor)
        check_integers("snapshots", snapshots, "[P, 2]")
        if snapshots.shape[1] != 2:
            raise ValueError(f"snapshots: expected [P, 2] of (row, position), got shape {tuple(snapshots.shape)}")
        refuse_unreadable(op, "snapshots", snapshots)
        places = snapshots.tolist()
    for n, t in places:
        if not 0 <= n < len(lengths) or not 0 <= t < lengths[n]:
            raise ValueError(
                f"snapshots: expected rows below {len(lengths)} and positions inside their row, got row {n}, "
                f"position {t}"
            )
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 2), as_list


def pack_edits(edits: Edits, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(`[E, 4]` int64 of row, position, head, kind, 4 more where after the read; left; right, float32), sorted by (row,
    head, position), stable."""
    order = torch.arange(len(edits))
    for key in (edits.position, edits.head, edits.row):
        order = order[torch.argsort(key[order], stable=True)]
    columns = edits.row, edits.position, edits.head, edits.kind + 4 * edits.when
    index = torch.stack([x[order].long() for x in columns], 1).contiguous()
    left, right = (x[order].float().contiguous() for x in (edits.left, edits.right))
    return tuple(x.to(device, non_blocking=True) for x in (index, left, right))  # type: ignore[return-value]


def _additions(edits: Edits | None, left: Tensor, right: Tensor, cu_seqlens: Tensor | None) -> Edits | None:
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


# ---- rules that are scans -------------------------------------------------------------------------------------------


def check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lead: str = "BT") -> None:
    """Refuses shapes that do not fit. lead: the axes before heads. The caller has seen to the tensors' kind."""
    n = len(lead)
    if v.ndim != n + 2:
        raise ValueError(f"v: expected [{', '.join(lead)}, H, V], got shape {tuple(v.shape)}")
    first, H = v.shape[:n], v.shape[n]
    if k.ndim != n + 2 or k.shape[:n] != first or k.shape[n] == 0 or H % k.shape[n]:
        raise ValueError(f"k: expected [{_said(lead, first)}, Hk dividing H={H}, K], got shape {tuple(k.shape)}")
    if q.shape != k.shape:
        raise ValueError(f"q: expected the shape of k {tuple(k.shape)}, got {tuple(q.shape)}")
    heads = v.shape[:-1]
    if g.shape != heads and g.shape != (*heads, k.shape[-1]):
        either = f"[{_said(lead, first)}, H={H}] or [{_said(lead, first)}, H={H}, K={k.shape[-1]}]"
        raise ValueError(f"g: expected {either}, got shape {tuple(g.shape)}")
    if beta.shape != heads:
        raise ValueError(f"beta: expected [{_said(lead, first)}, H={H}], got shape {tuple(beta.shape)}")


def _said(lead: str, sizes: Sequence[int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in zip(lead, sizes, strict=True))


def check_scale(scale: float | None, K: int) -> float:
    if scale is None:
        return K**-0.5
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {said(scale)}")
    return float(scale)


Tensors = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Scan:
    """A rule of csrc/scan.h: `S_t = G_t S_{t-1} + k u^T`, `o_t = scale S_t^T q_t`, with one write a token; two with a
    low-rank erase, `b (a^T S_{t-1})`.

    Attributes:
        name: of its operators `<name>`, `<name>_backward` and `<name>_step`, and of the public function.
        reference: what they answer to; takes the operator's arguments, with edits as `Edits` and without
            `return_writes`. Of a low-rank rule it returns `a^T S_{t-1}` last, or None.
        erases: u depends on what k finds in the state (a delta rule, whose writes carry beta).
        low_rank: it may have a and b, which its operators take and return last.
    """

    name: str
    reference: Callable[..., tuple]
    erases: bool
    low_rank: bool = False

    def run(
        self,
        tensors: Tensors,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        use_qk_l2norm: bool,
        asked: Asked,
        return_writes: bool,
        backend: str | None,
        erase: tuple[Tensor, Tensor] | None = None,
    ) -> RuleOutput:
        """tensors: the arguments by their public names, for the choice of a backend and its words; the rest checked.
        erase: a and b."""
        edits, places, cu_seqlens = asked.edits, asked.places, asked.cu_seqlens
        chosen = _dispatch.choose(self.name, backend, tensors)
        ab = self._ab(erase)
        found = None
        if chosen == "reference":
            o, final, left, right, shots, *erased = self.reference(
                q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edits, places, *ab
            )
        else:
            index = edit_left = edit_right = None
            if edits is not None and len(edits):
                index, edit_left, edit_right = pack_edits(edits, v.device)
            places = None if places is None else places.to(v.device, non_blocking=True)
            if chosen == "twin":
                _register_gradients(self, "writesae_twin")
            # The backward needs the increments; writing them out is cheaper than running the scan once more for them.
            differentiable = (q, k, v, g, beta, initial_state, edit_left, edit_right, *ab)
            keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
            o, final, left, right, shots, found, *erased = getattr(_dispatch.operators(chosen), self.name)(
                q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, index, edit_left, edit_right, places,
                return_writes or keep, *ab,
            )  # fmt: skip
        writes = None
        if return_writes:
            writes = Writes(
                g.to(right.dtype), *_stacked(left, right, erase, erased),
                beta=beta.to(right.dtype) if self.erases else None,
                erase=None if erase is None else (ab[0].to(right.dtype), ab[1].to(right.dtype)),
                initial_state=None if initial_state is None else initial_state.to(right.dtype),
                cu_seqlens=cu_seqlens, edits=asked.added(left, right),
            )  # fmt: skip
        return asked.answer(o, final if output_final_state else None, writes, shots, found)

    def _ab(self, erase: tuple[Tensor, Tensor] | None) -> tuple:
        """What operators and reference take last."""
        return () if not self.low_rank else (None, None) if erase is None else erase

    def step(
        self,
        tensors: Tensors,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        scale: float,
        use_qk_l2norm: bool,
        edits: Edits | None,
        return_writes: bool,
        backend: str | None,
        erase: tuple[Tensor, Tensor] | None = None,
    ) -> RuleStepOutput:
        """One token of every row. The caller has checked the tensors, but for the state."""
        B, H, V = v.shape
        K = k.shape[-1]
        if state.shape != (B, H, K, V):
            raise ValueError(f"state: expected [B={B}, H={H}, K={K}, V={V}], got shape {tuple(state.shape)}")
        wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
        if state.dtype != wanted or not state.is_contiguous():
            layout = "contiguous" if state.is_contiguous() else "non-contiguous"
            raise ValueError(f"state: expected contiguous {wanted}, got {layout} {state.dtype}")
        check_type("edits", edits, Edits, optional=True)
        if edits is not None:
            edits = edits._with(position=torch.zeros_like(edits.position))
            edits.check(B, [1] * B, H, K, V)
            edits = edits.expand_rows(B)
        op = self.name + "_step"
        _transforms.refuse_transformed(op, f"use {self.name}", *tensors.values())
        chosen = _dispatch.choose(op, backend, tensors)
        _dispatch.refuse_gradient(op, tensors, "use torch.no_grad()")
        ab = self._ab(erase)
        found = None
        if chosen == "reference":
            o, final, left, right, _, *erased = self.reference(
                *(x[:, None] for x in (q, k, v, g, beta)), scale, state, use_qk_l2norm, None, edits, None,
                *(None if x is None else x[:, None] for x in ab),
            )  # fmt: skip
            state.copy_(final)
            o, left, right, *erased = (None if x is None else x[:, 0] for x in (o, left, right, *erased))
        else:
            packed = pack_edits(edits, v.device) if edits is not None and len(edits) else (None, None, None)
            o, left, right, found, *erased = getattr(_dispatch.operators(chosen), op)(
                q, k, v, g, beta, state, scale, use_qk_l2norm, *packed, return_writes, *ab
            )
        if not return_writes:
            return RuleStepOutput(o, None, None)
        if erase is not None:
            left, right = _stacked(left, right, erase, erased)
        return RuleStepOutput(o, left, right, nonfinite(right[:, None]) if found is None else found)

    def declare(self, **limits: _dispatch.Limits) -> Mapping[str, _dispatch.Limits]:
        """Tells dispatch what the kernels of the scan and of the step take, and torch what its operators are to tracing
        and differentiation. limits: by backend; a step takes what the scan takes. Returns those of the scan."""
        if CPU_ERROR is None:
            for suffix, fake in (_LOW_RANK_FAKES if self.low_rank else _FAKES).items():
                torch.library.register_fake(f"writesae::{self.name}{suffix}", fake)
            _register_gradients(self, "writesae")
            _transforms.register(f"{self.name}_step", f"use {self.name}, or torch.no_grad()")
        step = f"{self.name}_step"  # refuses every gradient itself
        _dispatch.declare(step, {b: replace(x, operator=step, gradient=x.gates) for b, x in limits.items()})
        return _dispatch.declare(self.name, limits)


def _stacked(left: Tensor, right: Tensor, erase: tuple[Tensor, Tensor] | None, erased: list) -> tuple[Tensor, Tensor]:
    """The sides of a token's writes on an axis of their own before the last, the native write last."""
    if erase is None:
        return left.unsqueeze(-2), right.unsqueeze(-2)
    return torch.stack((erase[1].to(left.dtype), left), -2), torch.stack((erased[0], right), -2)


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
    o, final, shots = v.new_empty(v.shape), v.new_empty((N, H, K, V), **full), v.new_empty((P, H, K, V), **full)
    return o, final, left, right, shots, fake_nonfinite(v, return_writes)


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
    sides = (v.new_empty(x.shape if return_writes else (0,), dtype=torch.float32) for x in (k, v))
    return v.new_empty(v.shape), *sides, fake_nonfinite(v, return_writes)


def _low_rank(fake: Callable[..., tuple]) -> Callable[..., tuple]:
    """Of the scan and the step that take a and b too, and return what the erase reads."""

    def call(*inputs):
        *others, a, _ = inputs
        v, return_writes = others[2], others[-1]
        shape = v.shape if return_writes and a is not None else (0,)
        return *fake(*others), v.new_empty(shape, dtype=torch.float32)

    return call


def _fake_low_rank_backward(*inputs):
    *others, a, b, _erased, _d_erased = inputs
    of_erase = (others[2].new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in (a, b))
    return *_fake_backward(*others), *of_erase


_FAKES: dict[str, Callable] = {"": _fake, "_step": _fake_step, "_backward": _fake_backward}
_LOW_RANK_FAKES = {"": _low_rank(_fake), "_step": _low_rank(_fake_step), "_backward": _fake_low_rank_backward}


# ---- their gradients ------------------------------------------------------------------------------------------------


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    tensors = [x for i, x in enumerate(inputs) if i not in (5, 7, 13)]
    ctx.save_for_backward(*tensors, *(output[i] if inputs[13] else None for i in range(3, len(output), 3)))
    ctx.scale, ctx.use_qk_l2norm = inputs[5], inputs[7]


def _backward_of(scan: Scan, namespace: str) -> Callable[..., tuple]:
    operators = getattr(torch.ops, namespace)
    forward, of_forward = getattr(operators, scan.name), getattr(operators, f"{scan.name}_backward")

    def backward(ctx, d_o, d_final_state, d_left, d_right, d_snapshots, _, d_erased=None):
        q, k, v, g, beta, initial_state, cu_seqlens, *others = ctx.saved_tensors
        edits_and_places, ab, made = others[:4], others[4 : 4 + 2 * scan.low_rank], others[4 + 2 * scan.low_rank :]
        inputs = (q, k, v, g, beta, ctx.scale, initial_state, ctx.use_qk_l2norm, cu_seqlens, *edits_and_places)
        if made[0] is None:  # called with return_writes=False: left, right and erased came out empty
            d_left = d_right = d_erased = None
            with torch.no_grad():
                made = forward(*inputs, True, *ab)[3::3]
        right, *erased = made
        given = [d_o, d_final_state, d_left, d_right, d_snapshots]
        if scan.low_rank:
            given += [*ab, *((None, None) if ab[0] is None else (*erased, d_erased))]
        d_q, d_k, d_v, d_g, d_beta, d_initial, d_edit_left, d_edit_right, *d_ab = of_forward(*inputs, right, *given)
        states = None if initial_state is None else d_initial.to(initial_state.dtype)
        _, edit_left, edit_right, _ = edits_and_places
        pairs = (edit_left, d_edit_left), (edit_right, d_edit_right)
        sides = (None if x is None else d.to(x.dtype) for x, d in pairs)
        d_ab = (None if x is None else d for x, d in zip(ab, d_ab, strict=True))
        grads = (d_q, d_k, d_v, d_g, d_beta)
        return *grads, None, states, None, None, None, *sides, None, None, *d_ab

    return backward


def _plain_of(scan: Scan) -> Callable[..., tuple]:
    """The operator by the reference, for transforms."""

    def plain(
        q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edit_index, edit_left, edit_right, snapshots,
        return_writes, *ab,
    ):  # fmt: skip
        edits = None
        if edit_index is not None:  # not Edits, whose check looks at numbers that a transform may hide
            row, position, head, kind = edit_index.unbind(1)
            edits = SimpleNamespace(
                row=row, position=position, head=head, left=edit_left, right=edit_right, kind=kind % 4, when=kind // 4
            )
        o, final, left, right, shots, *erased = scan.reference(
            q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens, edits, snapshots, *ab
        )
        made = [x for x in (right, *erased) if x is not None]
        found = nonfinite(torch.stack(made, 3)) if return_writes else v.new_empty(0, dtype=torch.int64)
        erased = [v.new_empty(0) if x is None or not return_writes else x for x in erased]
        if not return_writes:
            left, right = v.new_empty(0), v.new_empty(0)
        return o, final, left, right, shots, found, *erased

    return plain


@cache
def _register_gradients(scan: Scan, namespace: str) -> None:
    """Of a library's operators, once it is loaded. On CUDA they are the namespace `writesae`, as on the CPU."""
    alone = ("cu_seqlens", "edit_index", "snapshots")
    inputs = ("q", "k", "v", "g", "beta", "initial_state", "a", "b")
    _transforms.register(
        scan.name, 'use backend="reference"', _plain_of(scan), (_save, _backward_of(scan, namespace)), inputs, alone,
        namespace,
    )  # fmt: skip
    _transforms.register(
        f"{scan.name}_backward", 'for a second derivative use backend="reference"',
        fold=(*inputs, "right", "erased", "d_o", "d_final_state", "d_left", "d_right", "d_erased"), alone=alone,
        namespace=namespace,
    )  # fmt: skip
