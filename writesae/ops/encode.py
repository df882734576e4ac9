"""`encode`: which atoms fire at every token, from writes alone, without states and without keeping pre-activations.

The activation of atom i is `a_i(t) = v_i^T S_t w_i`. Under a gate a head it is `e^g a_i(t-1) + sum_r (v_i . left_r)
(right_r . w_i)`: two matrix products and a decayed running sum, 64 times fewer operations than from states at K = V =
128. Under a gate a key channel `y_i = S w_i` runs along instead, (3 K + V) F multiply-adds a token where states take
K V F: 16 times fewer at K = V = 64. Under a gate an entry nothing smaller than the state does. Young, arXiv 2605.12770.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._arguments import (
    check_floats,
    check_integers,
    check_type,
    integers,
    refuse_unreadable,
    said,
    sizes_repr,
    unreadable,
)
from .._autocast import without_autocast
from .._library import CPU_ERROR
from ..writes import Writes
from . import _dispatch, _encode_states, _transforms
from ._dispatch import Limits
from ._encode_arguments import _arguments, _float, _rest, as_read, carried_on, heads_on
from ._encode_gradient import attach_writes_gradient
from .reference import encode as reference

PRECISIONS = ("fp32", "tf32", "bf16")
LARGEST = {"left": 256, "right": 256}  # K and V of the CUDA kernels
_ROWS = 2**26  # float32 numbers held while activations are read off states on a device: 256 MiB
GATES = ("scalar", "channel")  # of the kernels; other gates are read off states, a block of tokens at a time
for _op, _operator in (("encode", "encode_topk"), ("activations", "encode_at")):
    _cpu = Limits(_operator, gates=GATES, gradient=GATES)
    _cuda = Limits(_operator, largest=LARGEST, gates=GATES, gradient=GATES)
    _dispatch.declare(_op, {"cpu": _cpu, "cuda": _cuda})


@dataclass(frozen=True, repr=False)
class Codes:
    """Sparse codes of every token and encoded head.

    Top-k mode: `values` (>= 0) and int64 `indices`, `[B, T, Hs, k]`, descending, ties to the lowest index; `offsets` is
    None. Threshold mode: `values`, `indices` `[n]` and `offsets` `[B*T*Hs + 1]` int64: token-major runs, rising index.

    carry: `[N, Hs, F]` float32 raw pre-activations after each sequence's last token, without bias; to go on from under
    a scalar gate.
    heads: the value heads encoded, in order.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    carry: Tensor
    heads: tuple[int, ...]

    __repr__ = sizes_repr


@without_autocast
def encode(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, K] or [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, V] or [Hs, F, r, V]
    b_enc: Tensor | None = None,  # [Hs, F]
    k: int = 32,
    threshold: float | Tensor | None = None,  # scalar or [Hs, F]
    initial_state: Tensor | None = None,  # [N, H, K, V]
    backend: str | None = None,
    heads: Sequence[int] | None = None,
    carry: Tensor | None = None,  # [N, Hs, F]
    precision: str = "fp32",
) -> Codes:
    """Exact top k of the raw pre-activations `v_i^T S_t w_i + b_i`, then ReLU; or every one above a threshold.

    Args:
        writes: the trace of one layer (edits in it are honoured). A code at token t is of the state that the query of t
            read: edits after the read come with token t + 1, and into `codes.carry`. Of an element gate the states of a
            block of tokens are formed, and each token costs K V F multiply-adds a head, as from states: the slow path,
            of which a warning tells once.
        v_enc, w_enc: encoder factors of the heads encoded; a rank axis r is summed over.
        b_enc: encoder bias, default 0.
        k: features kept a token and head, 1 <= k <= F.
        threshold: keep all pre-activations (bias included) strictly above it, instead of the top k. Must be >= 0.
        initial_state: state before the first token; default `writes.initial_state`.
        backend: "reference", "cpu", "cuda" or None.
        heads: value heads that row i of the factors belongs to; default all H heads in order.
        carry: pre-activations before the first token (an earlier call's `codes.carry`), in place of a state. Scalar
            gates only: the next activations of others do not follow from these.
        precision: of the products, "fp32", "bf16" or, on CUDA only, "tf32": operands rounded to bfloat16 or to
            TensorFloat-32, sums in float32. On a CPU faster only under a scalar gate and where it multiplies bfloat16
            (`writesae info`: AMX, AVX-512 BF16). Activations are then off by some 1e-3 (tf32: 1e-4) of the largest, so
            that features nearly tied at rank k may be exchanged.

    Returns:
        `Codes`. In top-k mode `values` are differentiable, with the features taken held fixed: in v_enc, w_enc, b_enc,
        carry, the initial state, and the decay, left, right and edits of the writes, so that a loss on codes reaches
        the model that made the writes; with bf16 it is that of the products without rounding. `codes.carry` has no
        gradient.

    Raises:
        ValueError: a wrong shape, dtype or size, naming the argument.
        RuntimeError: a gradient, forward mode or `torch.func` asked for in threshold mode; a second derivative.

    In top-k mode forward mode and `torch.func` are right by plain torch, which is slow and holds `[B, T, Hs, F]`.
    Autocast changes nothing: sums stay float32.
    """
    writes, v_enc, w_enc, b_enc, heads, carry = _prepare(writes, v_enc, w_enc, b_enc, heads, initial_state, carry)
    writes, unseen = as_read(writes)
    Hs, F = v_enc.shape[:2]
    tensors = _tensors(writes, v_enc, w_enc, b_enc, carry)
    check_precision(precision)
    bf16 = precision == "bf16"
    if threshold is not None:
        threshold = _threshold(threshold, Hs, F).to(v_enc.device, non_blocking=True)
        of_writes = {"decay": writes.decay, "left": writes.left, "right": writes.right, "matrix": writes.decay_matrix}
        _dispatch.refuse_gradient(
            "encode", {"v_enc": v_enc, "w_enc": w_enc, "b_enc": b_enc, "carry": carry, **of_writes},
            "threshold mode has none; use top-k mode, activations(), or torch.no_grad()",
        )  # fmt: skip
        _transforms.refuse_transformed("encode in threshold mode", "use top-k mode", *tensors.values())
    elif isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= F:
        raise ValueError(f"k: expected an integer, 1 <= k <= F={F}, got {k!r}")
    chosen = _dispatch.choose("encode", backend, tensors)
    if precision == "tf32" and chosen in ("cpu", "reference"):
        raise ValueError(f'precision: expected "fp32" or "bf16" with backend="{chosen}", got "tf32"')
    if _transforms.transformed(*tensors.values(), *_sides(writes)):
        values, indices, last = _plain_topk(writes, v_enc, w_enc, b_enc, heads, carry, k, bf16)
        return Codes(values, indices, None, carried_on(last.detach(), unseen, v_enc, w_enc, heads), tuple(heads))
    operators = _dispatch.operators(chosen)
    with torch.no_grad(), _transforms.below_autograd():
        if chosen == "reference":
            rounded = _rounded(writes, v_enc, w_enc) if bf16 else (writes, v_enc, w_enc)
            if threshold is None:
                values, indices, last = _reference_topk(*rounded, b_enc, heads, carry, k)
            else:
                values, indices, counts, last = _reference_threshold(*rounded, b_enc, heads, carry, threshold)
        elif threshold is None:
            values, indices, last = operators.encode_topk(
                *_arguments(writes, heads, v_enc, w_enc), _float(b_enc), k, *_rest(writes, carry), precision
            )
        else:
            values, indices, counts, last = operators.encode_threshold(
                *_arguments(writes, heads, v_enc, w_enc), _float(b_enc), threshold, *_rest(writes, carry), precision
            )
        last = carried_on(last, unseen, v_enc, w_enc, heads)
    if threshold is None:
        values = _attach_gradient(values, indices, writes, v_enc, w_enc, b_enc, carry, heads, True, chosen)
        values = attach_writes_gradient(values, indices, writes, v_enc, w_enc, carry, heads, True, chosen)
        return Codes(values, indices, None, last, tuple(heads))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(values, indices, offsets, last, tuple(heads))


@without_autocast
def activations(
    writes: Writes,
    v: Tensor,  # [Hs, F, K] or [Hs, F, r, K]
    w: Tensor,  # [Hs, F, V] or [Hs, F, r, V]
    indices: Tensor,  # [B, T, Hs, m]
    b: Tensor | None = None,  # [Hs, F]
    heads: Sequence[int] | None = None,
    initial_state: Tensor | None = None,  # [N, H, K, V]
    carry: Tensor | None = None,  # [N, Hs, F]
    backend: str | None = None,
) -> Tensor:
    """Raw pre-activations `v_i^T S_t w_i + b_i` (no ReLU) of m chosen features at every token, without states.

    With decoder factors and the active set this is `<A_i, S_t>`, the inner product the factored loss needs.

    Args:
        indices: int64 features, 0 <= index < F, for each token and encoded head; a feature may repeat.
        writes, v, w, b, heads, initial_state, carry, backend: as in `encode`.

    Returns:
        `[B, T, Hs, m]` float32 (float64 for float64 inputs, reference only). Differentiable in v, w, b, carry,
        the initial state and the writes.

    Raises:
        ValueError: a wrong shape, dtype or index, naming the argument.
        RuntimeError: a second derivative.

    Transforms as in `encode`.
    """
    return chosen_activations(writes, v, w, indices, b, heads, initial_state, carry, backend, ("v", "w", "b"))


def chosen_activations(writes, v, w, indices, b, heads, initial_state, carry, backend, names) -> Tensor:
    """`activations`, for callers whose own arguments have other names, which messages should use."""
    writes, v, w, b, heads, carry = _prepare(writes, v, w, b, heads, initial_state, carry, names)
    writes, _ = as_read(writes)
    Hs = len(v)
    check_indices(writes, v, indices)
    tensors = _tensors(writes, v, w, b, carry)
    chosen = _dispatch.choose("activations", backend, tensors)
    if _transforms.transformed(*tensors.values(), *_sides(writes), indices):
        return _plain_activations(writes, v, w, indices, b, heads, carry)
    with torch.no_grad(), _transforms.below_autograd():
        if chosen == "reference":
            v_, w_, a = _reference_inputs(writes, v, w, heads, carry)
            values = v_.new_empty(indices.shape)
            for row, lo, hi, pre in reference.blocks(writes, v_, w_, heads, a):
                values[row, lo:hi] = pre.gather(-1, indices[row, lo:hi])
        else:
            values, _ = _dispatch.operators(chosen).encode_at(
                *_arguments(writes, heads, v, w), indices.contiguous(), *_rest(writes, carry)
            )
        if b is not None:
            values = values + b.to(values)[torch.arange(Hs, device=b.device)[:, None], indices]
    values = _attach_gradient(values, indices, writes, v, w, b, carry, heads, False, chosen)
    return attach_writes_gradient(values, indices, writes, v, w, carry, heads, False, chosen)


def check_indices(writes: Writes, v: Tensor, indices: Tensor) -> None:
    """Features `[B, T, Hs, m]` chosen at every token, of a dictionary `v [Hs, F, r, K]`."""
    (Hs, F), (B, T) = v.shape[:2], writes.shape[:2]
    check_integers("indices", indices, "[B, T, Hs, m]")
    if indices.ndim != 4 or indices.shape[:3] != (B, T, Hs) or indices.dtype != torch.int64:
        raise ValueError(
            f"indices: expected int64 [B={B}, T={T}, Hs={Hs}, m], got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    # On a device nobody waits to look: an index out of range gives NaN there.
    if unreadable(indices) is not None or indices.device.type != "cpu":
        return
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < F:
        raise ValueError(f"indices: expected 0 <= index < F={F}, got {int(indices.min())} to {int(indices.max())}")


# ---- inputs ---------------------------------------------------------------------------------------------------------


def _prepare(writes, v_enc, w_enc, b_enc, heads, initial_state, carry, names=("v_enc", "w_enc", "b_enc")):
    """Validates by name; returns (writes, factors with a rank axis, bias, heads as a list, carry or None).

    What is carried is activations `[N, Hs, F]` of a scalar gate, of others the encoded heads' states `[N, Hs, K, V]`.
    """
    check_type("writes", writes, Writes)
    tensors = {
        "writes.right": writes.right, "writes.decay": writes.decay, "writes.left": writes.left, names[0]: v_enc,
        names[1]: w_enc, names[2]: b_enc, "writes.initial_state": writes.initial_state, "carry": carry,
        "initial_state": initial_state,
    }  # fmt: skip
    check_floats(("writes.initial_state", names[2], "initial_state", "carry"), **tensors)
    B, T, H, K, V = writes.shape
    if T == 0:
        raise ValueError("writes: expected at least one token, got T = 0")
    heads = list(range(H)) if heads is None else integers("heads", heads)
    if not heads or not all(0 <= h < H for h in heads):
        raise ValueError(f"heads: expected at least one head, each 0 <= head < H={H}, got {heads}")
    Hs, N = len(heads), writes.num_sequences
    sides = []
    for name, side, letter, size in ((names[0], v_enc, "K", K), (names[1], w_enc, "V", V)):
        fits = side.ndim in (3, 4) and side.shape[0] == Hs and side.shape[-1] == size and side.shape[1] > 0
        if not fits or (side.ndim == 4 and side.shape[2] == 0):
            raise ValueError(
                f"{name}: expected [Hs={Hs}, F, {letter}={size}] or [Hs={Hs}, F, r, {letter}={size}], "
                f"got shape {tuple(side.shape)}"
            )
        sides.append(side[:, :, None] if side.ndim == 3 else side)
    v_enc, w_enc = sides
    F, rank = v_enc.shape[1:3]
    if w_enc.shape[1:3] != (F, rank):
        raise ValueError(
            f"{names[1]}: expected the features and rank of {names[0]}, F={F} and r={rank}, got F={w_enc.shape[1]} and "
            f"r={w_enc.shape[2]}"
        )
    if b_enc is not None and tuple(b_enc.shape) != (Hs, F):
        raise ValueError(f"{names[2]}: expected floating [Hs={Hs}, F={F}], got shape {tuple(b_enc.shape)}")
    if carry is not None:
        if writes.gate != "scalar":
            raise ValueError(
                f"carry: expected none under the {writes.gate} gate of these writes, whose activations do not say the "
                "next ones; give an initial_state"
            )
        if initial_state is not None:
            raise ValueError("carry: expected carry or initial_state, got both")
        if tuple(carry.shape) != (N, Hs, F):
            raise ValueError(f"carry: expected floating [N={N}, Hs={Hs}, F={F}], got shape {tuple(carry.shape)}")
    else:
        state = writes.initial_state if initial_state is None else initial_state
        if state is not None:
            if tuple(state.shape) != (N, H, K, V):
                raise ValueError(
                    f"initial_state: expected [N={N}, H={H}, K={K}, V={V}], got shape {tuple(state.shape)}"
                )
            compute = _compute_dtype(state, writes.right, v_enc, w_enc)
            of_states = v_enc.to(compute), w_enc.to(compute), state.to(compute)
            if writes.gate != "scalar":
                carry = of_states[2][:, heads]
            elif _transforms.transformed(*of_states):
                carry = torch.einsum("hfxk,hfxv,nhkv->nhf", *of_states[:2], of_states[2][:, heads])
            else:
                carry = _StateActivations.apply(*of_states, heads)
    if writes.edits is not None:
        refuse_unreadable("encode", "writes.edits", writes.edits.row)
        if writes.edits.needs_clean_pass:
            raise ValueError('writes: expected edits of kind "add" only; the recurrence resolves delete and replace')
        lengths = [stop - start for _, _, start, stop in writes.sequences()]
        writes.edits.check(N, lengths, H, K, V)
        writes = replace(writes, edits=writes.edits.expand_rows(N))
    return writes, v_enc, w_enc, b_enc, heads, carry


def _threshold(threshold, Hs: int, F: int) -> Tensor:
    if isinstance(threshold, Tensor):
        check_floats(threshold=threshold)
    elif isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise ValueError(f"threshold: expected a number or [Hs={Hs}, F={F}], got {said(threshold)}")
    threshold = torch.as_tensor(threshold, dtype=torch.float32)
    if tuple(threshold.shape) not in ((), (Hs, F)):
        raise ValueError(f"threshold: expected a number or [Hs={Hs}, F={F}], got shape {tuple(threshold.shape)}")
    if not bool((threshold >= 0).all()):
        raise ValueError(f"threshold: expected >= 0 everywhere, got {float(threshold.min())}")
    return threshold.detach().expand(Hs, F).contiguous()


def check_precision(precision) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")


def _rounded(writes: Writes, v_enc: Tensor, w_enc: Tensor) -> tuple[Writes, Tensor, Tensor]:
    """The operands of the products, rounded to bfloat16."""

    def cut(x: Tensor) -> Tensor:
        return x.detach().to(torch.bfloat16).to(x.dtype)

    edits = writes.edits
    if edits is not None:
        edits = replace(edits, left=cut(edits.left), right=cut(edits.right))
    return replace(writes, left=cut(writes.left), right=cut(writes.right), edits=edits), cut(v_enc), cut(w_enc)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _tensors(writes, v_enc, w_enc, b_enc, carry) -> dict[str, Tensor | None]:
    return {
        "decay": writes.decay, "left": writes.left, "right": writes.right, "v_enc": v_enc, "w_enc": w_enc,
        "b_enc": b_enc, "carry": carry, "decay_matrix": writes.decay_matrix,
    }  # fmt: skip


# ---- the reference backend ------------------------------------------------------------------------------------------


def _reference_inputs(writes, v_enc, w_enc, heads, carry) -> tuple[Tensor, Tensor, Tensor]:
    compute = _compute_dtype(*_tensors(writes, v_enc, w_enc, None, carry).values())
    v, w = v_enc.detach().to(compute), w_enc.detach().to(compute)
    if carry is None:
        each = v.shape[1:2] if writes.gate == "scalar" else writes.shape[3:]
        return v, w, v.new_zeros(writes.num_sequences, len(heads), *each)
    return v, w, carry.detach().to(compute).clone()


def _reference_topk(writes, v_enc, w_enc, b_enc, heads, carry, k: int) -> tuple[Tensor, Tensor, Tensor]:
    v, w, a = _reference_inputs(writes, v_enc, w_enc, heads, carry)
    B, T = writes.shape[:2]
    values = v.new_empty(B, T, len(heads), k)
    indices = torch.empty(B, T, len(heads), k, dtype=torch.int64, device=v.device)
    for b, lo, hi, pre in reference.blocks(writes, v, w, heads, a):
        biased = pre if b_enc is None else pre + b_enc.to(v)
        values[b, lo:hi], indices[b, lo:hi] = reference.topk(biased, k)
    return values, indices, reference.carried(writes, v, w, a)


def _reference_threshold(writes, v_enc, w_enc, b_enc, heads, carry, threshold: Tensor):
    v, w, a = _reference_inputs(writes, v_enc, w_enc, heads, carry)
    B, T = writes.shape[:2]
    counts = torch.zeros(B, T, len(heads), dtype=torch.int64, device=v.device)
    found = []
    for b, lo, hi, pre in reference.blocks(writes, v, w, heads, a):
        biased = pre if b_enc is None else pre + b_enc.to(v)
        kept = ~(biased <= threshold.to(v))  # keeps a NaN
        counts[b, lo:hi] = kept.sum(-1)
        found.append(((b, lo), biased[kept], kept.nonzero()[:, -1]))
    found.sort(key=lambda x: x[0])  # blocks come as states are walked, of all rows together
    values, indices = (torch.cat([x[side] for x in found]) for side in (1, 2))
    return values, indices, counts.flatten(), reference.carried(writes, v, w, a)


# ---- under transforms -----------------------------------------------------------------------------------------------


def _sides(writes: Writes) -> tuple[Tensor, ...]:
    return () if writes.edits is None else (writes.edits.left, writes.edits.right)


def _plain_topk(writes, v_enc, w_enc, b_enc, heads, carry, k: int, bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of torch's own operations throughout, dense."""
    _transforms.say_plain("encode")
    compute = _compute_dtype(*_tensors(writes, v_enc, w_enc, None, carry).values())
    pre, last = reference.preactivations(writes, v_enc.to(compute), w_enc.to(compute), heads, carry=carry)
    if bf16:  # the numbers of the rounded operands, the derivative of the others
        cut, v_cut, w_cut = _rounded(writes, v_enc, w_enc)
        there, last = reference.preactivations(cut, v_cut.to(compute), w_cut.to(compute), heads, carry=carry)
        pre = pre + (there - pre).detach()
    return *reference.topk(pre if b_enc is None else pre + b_enc.to(pre), k), last


def _plain_activations(writes, v, w, indices, b, heads, carry) -> Tensor:
    _transforms.say_plain("activations")
    compute = _compute_dtype(*_tensors(writes, v, w, None, carry).values())
    pre, _ = reference.preactivations(writes, v.to(compute), w.to(compute), heads, carry=carry)
    return (pre if b is None else pre + b.to(pre)).gather(-1, indices)


# ---- gradients ------------------------------------------------------------------------------------------------------


class _StateActivations(torch.autograd.Function):
    """a_i = v_i^T S w_i of whole states: the carry that an initial state amounts to. On a CPU one head at a time, which
    stays in cache; on a device all of them together."""

    @staticmethod
    def forward(ctx, v, w, state, heads):  # [Hs, F, r, K], [Hs, F, r, V], [N, H, K, V] -> [N, Hs, F]
        ctx.save_for_backward(v, w, state)
        ctx.heads = heads
        if v.device.type != "cpu":
            return _of_states(v, w, state, heads)
        out = v.new_empty(len(state), len(heads), v.shape[1])
        for n in range(len(state)):
            for i, head in enumerate(heads):
                out[n, i] = ((v[i] @ state[n, head]) * w[i]).sum((1, 2))
        return out

    @staticmethod
    @_transforms.once_differentiable("encode", "torch.func (a grad of a grad, hessian) has one")
    def backward(ctx, grad):
        v, w, state = ctx.saved_tensors
        dv, dw, d_state = torch.zeros_like(v), torch.zeros_like(w), torch.zeros_like(state)
        for n in range(len(state)):
            for i, head in enumerate(ctx.heads):
                scaled = grad[n, i][:, None, None]
                dv[i] += (scaled * w[i]) @ state[n, head].T
                dw[i] += (scaled * v[i]) @ state[n, head]
                if ctx.needs_input_grad[2]:
                    d_state[n, head] += (scaled * v[i]).flatten(0, 1).T @ w[i].flatten(0, 1)
        return dv, dw, d_state, None


def _of_states(v: Tensor, w: Tensor, state: Tensor, heads: list[int]) -> Tensor:
    """`[N, Hs, F]`. 5 launches for as many rows as fit `_ROWS` numbers, 4 where the heads are all heads, in order."""
    (H, K, V), (Hs, F, r) = state.shape[1:], v.shape[:3]
    if heads != list(range(H)):
        state = state.index_select(1, heads_on(tuple(heads), state.device))
    found = []
    for rows in state.split(max(1, _ROWS // (Hs * F * r * V))):
        n = len(rows)
        side = rows.permute(1, 2, 0, 3).reshape(Hs, K, n * V)
        on_left = torch.bmm(v.flatten(1, 2), side).view(Hs, F, r, n, V)
        found.append(on_left.mul_(w[:, :, :, None]).sum((2, 4)).permute(2, 0, 1))  # [n, Hs, F]
    return found[0] if len(found) == 1 else torch.cat(found)


class _Gradient(torch.autograd.Function):
    """Passes `values` through and knows their gradient: which features were taken is constant, as in torch.topk."""

    @staticmethod
    def forward(ctx, v, w, b, carry, values, indices, writes, heads, relu, backend):
        ctx.save_for_backward(v, w, indices, values if relu else None, carry)
        ctx.writes, ctx.heads, ctx.backend = writes, heads, backend
        ctx.bias = None if b is None else b.dtype
        return values.view_as(values)

    @staticmethod
    @_transforms.once_differentiable("encode", "torch.func (a grad of a grad, hessian) has one")
    def backward(ctx, grad):
        v, w, indices, values, carry = ctx.saved_tensors
        if values is not None:
            grad = grad * (values > 0)
        db = dv = dw = d_carry = None
        if ctx.needs_input_grad[2]:
            db = v.new_zeros(v.shape[:2])
            for i in range(len(db)):
                db[i].index_add_(0, indices[:, :, i].flatten(), grad[:, :, i].flatten().to(v))
            db = db.to(ctx.bias)
        if ctx.writes.gate != "scalar":
            arguments = ctx.writes, v, w, ctx.heads, indices, grad, carry
            if any(ctx.needs_input_grad[:2]):
                dv, dw = _encode_states.factor_gradient(*arguments)
            if ctx.needs_input_grad[3]:
                d_carry = _encode_states.source_gradient(*arguments)[-1]
        elif any(ctx.needs_input_grad[i] for i in (0, 1, 3)):
            if ctx.backend == "reference" or (ctx.backend != "cpu" and ctx.writes.edits is not None):
                dv, dw, d_carry = reference.backward(ctx.writes, v, w, ctx.heads, indices, grad)
            else:
                dv, dw, d_carry = _dispatch.operators(ctx.backend).encode_backward(
                    *_arguments(ctx.writes, ctx.heads, v, w), indices.contiguous(), _float(grad),
                    *_rest(ctx.writes, None)[1:],
                )  # fmt: skip
        return dv, dw, db, d_carry if ctx.needs_input_grad[3] else None, None, None, None, None, None, None


def _attach_gradient(values, indices, writes, v_enc, w_enc, b_enc, carry, heads, relu: bool, backend: str) -> Tensor:
    asked = (x is not None and x.requires_grad for x in (v_enc, w_enc, b_enc, carry))
    if not torch.is_grad_enabled() or not any(asked):
        return values
    compute = values.dtype
    cast = None if carry is None else carry.to(compute)
    return _Gradient.apply(
        v_enc.to(compute), w_enc.to(compute), b_enc, cast, values, indices, writes, heads, relu, backend
    )


# ---- fake implementations -------------------------------------------------------------------------------------------

if CPU_ERROR is None:

    @torch.library.register_fake("writesae::encode_topk")
    def _(decay, left, right, heads, v_enc, w_enc, b_enc, k, carry, cu_seqlens, *edits_and_precision):
        (B, T), (Hs, F) = decay.shape[:2], v_enc.shape[:2]
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        values = decay.new_empty(B, T, Hs, k, dtype=torch.float32)
        return values, values.new_empty(B, T, Hs, k, dtype=torch.int64), values.new_empty(N, Hs, F)

    @torch.library.register_fake("writesae::encode_threshold")
    def _(decay, left, right, heads, v_enc, w_enc, b_enc, threshold, carry, cu_seqlens, *edits_and_precision):
        (B, T), (Hs, F) = decay.shape[:2], v_enc.shape[:2]
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        n = torch.library.get_ctx().new_dynamic_size()
        values = decay.new_empty(n, dtype=torch.float32)
        counts = values.new_empty(B * T * Hs, dtype=torch.int64)
        return values, values.new_empty(n, dtype=torch.int64), counts, values.new_empty(N, Hs, F)

    @torch.library.register_fake("writesae::encode_at")
    def _(decay, left, right, heads, v_enc, w_enc, indices, carry, cu_seqlens, edit_index, edit_left, edit_right):
        Hs, F = v_enc.shape[:2]
        N = decay.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return decay.new_empty(indices.shape, dtype=torch.float32), decay.new_empty(N, Hs, F, dtype=torch.float32)

    @torch.library.register_fake("writesae::encode_writes_backward")
    def _(decay, left, right, heads, v_enc, w_enc, indices, grad, cu_seqlens):
        (B, T), Hs, R = decay.shape[:2], len(v_enc), right.shape[3]
        sizes = v_enc.shape[-1], w_enc.shape[-1]
        return tuple(decay.new_empty(B, T, Hs, R, size, dtype=torch.float32) for size in sizes)

    _advice = "use ops.encode, which has a gradient and a plain path"
    for _op, _more in (
        ("encode_topk", ("carry",)),
        ("encode_at", ("indices", "carry")),
        ("encode_writes_backward", ("indices", "grad")),
    ):
        _fold = ("decay", "left", "right", *_more)
        _transforms.register(_op, _advice, fold=_fold, alone=("cu_seqlens", "edit_index"))
    _transforms.register("encode_threshold", _advice)
