"""`training_loss`: one training step's loss and every gradient of a dictionary from writes, without a state a token.

Encoding looks at all atoms, everything after it at those that fired, chunk by chunk: `csrc/cpu/sae_training_kernel.h`
has the arithmetic. Loss and gradients come out of one pass, because what a token weighs in the loss is known before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._arguments import check_floats, check_type, sizes_repr
from .._autocast import without_autocast
from .._library import CPU_ERROR
from ..writes import Writes
from . import _dispatch, _encode_states, _transforms
from ._dispatch import Limits
from ._encode_arguments import _arguments, _float, _rest
from .encode import GATES, LARGEST, Codes, _compute_dtype, _prepare, _tensors
from .reference import sae_training as reference

_ADVICE = "torch.func (a grad of a grad, hessian) has one"
# On CUDA made of the operators of encode and of its backward.
_cpu = Limits("factored_loss", gates=GATES, gradient=GATES)
_cuda = Limits("encode_topk", largest=LARGEST, gates=GATES, gradient=GATES)
_dispatch.declare("training_loss", {"cpu": _cpu, "cuda": _cuda})


@dataclass(frozen=True, repr=False)
class Step:
    """loss: scalar with gradients. errors: `[B, T, Hs]` squared error of every token of weight other than 0, else 0.
    codes: of every token, without gradients."""

    loss: Tensor
    errors: Tensor
    codes: Codes

    __repr__ = sizes_repr


@without_autocast
def training_loss(
    writes: Writes,
    v_enc: Tensor,  # [Hs, F, K] or [Hs, F, r, K]
    w_enc: Tensor,  # [Hs, F, V] or [Hs, F, r, V]
    b_enc: Tensor | None,  # [Hs, F]
    v_dec: Tensor,  # as v_enc
    w_dec: Tensor,  # as w_enc
    offset: Tensor | None = None,  # [Hs, K, V]
    k: int = 32,
    weight: Tensor | None = None,  # [B, T]
    heads: Sequence[int] | None = None,
    backend: str | None = None,
) -> Step:
    """`sum_t weight_t ||S_t - offset - sum_j a_j(t) v_j w_j^T||_F^2`, over encoded heads; a as `encode` has them.

    Args:
        writes: the trace of one layer, without edits. Under other gates than a scalar one `||S_t||` has no recurrence:
            the states of a block of tokens at a time are formed for the loss, of an element gate for the codes too.
        v_enc, w_enc, b_enc, k, heads: as in `encode`.
        v_dec, w_dec: decoder factors, of the encoder's F and r; a rank axis r is summed over.
        offset: decoder bias (with the mean state), default 0.
        weight: of each token in the loss, any sign; default 1 / (B T), the mean.
        backend: "reference", "cpu", "cuda" or None.

    Returns:
        `Step`. The loss is differentiable, once, in v_enc, w_enc, b_enc, v_dec, w_dec and offset.

    Raises:
        ValueError: a wrong shape, dtype or size, naming the argument; or writes with edits.
        RuntimeError: a gradient asked for the writes; a second derivative.

    Forward mode and `torch.func` are right by plain torch, in the writes too, and hold all states. Autocast changes
    nothing.
    """
    check_type("writes", writes, Writes)
    if writes.edits is not None and len(writes.edits):
        raise ValueError("writes: training_loss is not defined for writes with edits")
    of_writes = {name: getattr(writes, name) for name in ("decay", "left", "right", "initial_state")}
    _dispatch.refuse_gradient("training_loss", of_writes, "only the dictionary has one; detach the writes")
    plain = replace(writes, initial_state=None)  # the kernel takes the state itself, not what the encoder makes of it
    _, v_enc, w_enc, b_enc, heads, _ = _prepare(plain, v_enc, w_enc, b_enc, heads, None, None)
    _, v_dec, w_dec, _, _, _ = _prepare(plain, v_dec, w_dec, None, heads, None, None, ("v_dec", "w_dec", ""))
    (Hs, F, r), (B, T, _, K, V) = v_enc.shape[:3], writes.shape
    if v_dec.shape != v_enc.shape:
        raise ValueError(
            f"v_dec: expected the features and rank of v_enc, F={F} and r={r}, got shape {tuple(v_dec.shape)}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= F:
        raise ValueError(f"k: expected an integer, 1 <= k <= F={F}, got {k!r}")
    check_floats(
        ("offset", "weight"), **{"writes.right": writes.right}, v_dec=v_dec, offset=offset, weight=weight
    )  # fmt: skip
    if offset is not None and tuple(offset.shape) != (Hs, K, V):
        raise ValueError(f"offset: expected [Hs={Hs}, K={K}, V={V}], got shape {tuple(offset.shape)}")
    if weight is None:
        weight = torch.full((B, T), 1 / (B * T), device=writes.right.device)
    elif tuple(weight.shape) != (B, T):
        raise ValueError(f"weight: expected [B={B}, T={T}], got shape {tuple(weight.shape)}")
    tensors = _tensors(writes, v_enc, w_enc, b_enc, None) | {"v_dec": v_dec, "w_dec": w_dec, "offset": offset}
    chosen = _dispatch.choose("training_loss", backend, tensors)
    # From two operators: on a device by the kernels of encode and of its backward, under transforms by plain torch.
    if chosen != "cpu" or _transforms.transformed(*tensors.values(), writes.initial_state, weight):
        loss, errors, codes = reference.step(
            writes, v_enc, w_enc, b_enc, v_dec, w_dec, offset, k, weight, heads, chosen
        )
        return Step(loss, errors.detach(), replace(codes, values=codes.values.detach()))
    with torch.no_grad():
        carried = _prepare(writes, v_enc, w_enc, None, heads, None, None)[-1]
        values, indices, last = _dispatch.operators(chosen).encode_topk(
            *_arguments(writes, heads, v_enc, w_enc), _float(b_enc), k, *_rest(writes, carried), "fp32"
        )
    loss, errors = _Loss.apply(v_enc, w_enc, b_enc, v_dec, w_dec, offset, writes, values, indices, weight, heads)
    return Step(loss, errors, Codes(values, indices, None, last, tuple(heads)))


def loss_sums(writes, heads, values, indices, v, w, offset, weight, encoder=(None, None), grad=True):
    """Of a loss `sum weight_t error_t`, weight `[B, T, Hs]` (0 leaves a token out), in the dtype of v and w.

    Returns (errors `[B, T, Hs]`, and its gradients: values, v, w, offset or None, of the encoder given through the
    codes above 0: v, w, b). Without `grad` the errors alone are good for anything, without an encoder the last three
    are not. Under a scalar gate no state is formed, under others those of a block of tokens.
    """
    if writes.gate != "scalar":
        return _encode_states.loss_sums(writes, heads, values, indices, v, w, offset, weight, encoder, grad)
    matrix = Offset(offset, v, w)
    errors, d_values, dv, dw, usage, states, *of_encoder = _loss_kernel(
        writes, heads, values, indices, v, w, matrix.matrix, matrix.on_atoms, weight, encoder, grad
    )
    d_offset = matrix.finish(dv, dw, v, w, usage, states, weight) if grad else None
    return errors, d_values, dv, dw, d_offset, *of_encoder


def _loss_kernel(
    writes: Writes, heads, values, indices, v, w, offset, on_offset, weight, encoder=(None, None), grad=True
):
    """`torch.ops.writesae.factored_loss` on a trace: weight `[B, T, Hs]`, factors with a rank axis."""
    arguments = _arguments(writes, heads, v, w)
    cu, state = writes.cu_seqlens, writes.initial_state
    return torch.ops.writesae.factored_loss(
        *arguments[:4], _float(values), indices.contiguous(), *arguments[4:], _float(offset), _float(on_offset),
        _float(weight), _float(state), None if cu is None else cu.to(torch.int64).contiguous(), *encoder, grad,
    )  # fmt: skip


def atoms_on(
    matrix: Tensor,  # [Hs, K, V]
    v: Tensor,  # [Hs, F, r, K]
    w: Tensor,  # [Hs, F, r, V]
) -> Tensor:
    """`<A_i, matrix>` of every atom, `[Hs, F]`, with gradients for v and w. An encoder of S_t - M is one of S_t with
    this much less bias."""
    return _AtomsOn.apply(v, w, matrix.detach())


class _AtomsOn(torch.autograd.Function):
    """Keeps both products, which are the gradients: an einsum would make them again."""

    @staticmethod
    def forward(ctx, v, w, matrix):
        found = Offset(matrix, v, w)
        ctx.save_for_backward(found.left, found.right)
        return found.on_atoms

    @staticmethod
    @_transforms.once_differentiable("training_loss", _ADVICE)
    def backward(ctx, grad):
        left, right = ctx.saved_tensors
        return grad[:, :, None, None] * right, grad[:, :, None, None] * left, None


class Offset:
    """The decoder bias M among atoms: what <A_i, M> adds to loss and gradients, once a step instead of once a token."""

    def __init__(self, offset: Tensor | None, v: Tensor, w: Tensor):
        self.matrix, self.on_atoms = offset, None
        if offset is not None:
            size = v.shape[1:3]
            self.left = (v.flatten(1, 2) @ offset).unflatten(1, size)  # v_i^T M  [Hs, F, r, V]
            self.right = (w.flatten(1, 2) @ offset.mT).unflatten(1, size)  # M w_i  [Hs, F, r, K]
            self.on_atoms = (self.left * w).sum((2, 3))  # [Hs, F]

    def finish(self, dv: Tensor, dw: Tensor, v: Tensor, w: Tensor, usage: Tensor, states: Tensor, weight: Tensor):
        """Adds its share to dv and dw in place; returns its own gradient from sum_t weight_t S_t and the `weight`s."""
        if self.matrix is None:
            return None
        share = 2 * usage[:, :, None, None]
        dv.addcmul_(share, self.right)
        dw.addcmul_(share, self.left)
        made = (share / 2 * v).flatten(1, 2).mT @ w.flatten(1, 2)
        return 2 * (weight.sum((0, 1))[:, None, None] * self.matrix - states + made)


class _Loss(torch.autograd.Function):
    """Loss and errors; the gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(ctx, v_enc, w_enc, b_enc, v_dec, w_dec, offset, writes, values, indices, weight, heads):
        compute = _compute_dtype(writes.right, v_enc, w_enc, v_dec, w_dec)
        factors = [x.to(compute) for x in (v_enc, w_enc, v_dec, w_dec)]
        weight = weight.to(compute)[:, :, None].expand(*values.shape[:3])
        wanted = any(ctx.needs_input_grad)
        encoder = factors[:2] if any(ctx.needs_input_grad[:3]) else (None, None)
        offset_ = None if offset is None else offset.detach().to(compute)
        errors, _, dv_dec, dw_dec, d_offset, dv_enc, dw_enc, db_enc = loss_sums(
            writes, heads, values, indices, *factors[2:], offset_, weight, encoder, wanted
        )
        if wanted:
            grads = (dv_enc, dw_enc, db_enc, dv_dec, dw_dec, d_offset)
            inputs = (v_enc, w_enc, b_enc, v_dec, w_dec, offset)
            ctx.save_for_backward(*inputs)  # what a second derivative would go to
            ctx.grads = tuple(
                g.to(x.dtype) if need else None
                for g, x, need in zip(grads, inputs, ctx.needs_input_grad[:6], strict=True)
            )
        ctx.mark_non_differentiable(errors)
        return (errors * weight).sum(), errors

    @staticmethod
    @_transforms.once_differentiable("training_loss", _ADVICE)
    def backward(ctx, grad, _):
        return *(None if g is None else g * grad for g in ctx.grads), *[None] * 5


# ---- fake implementations -------------------------------------------------------------------------------------------

if CPU_ERROR is None:

    @torch.library.register_fake("writesae::encode_backward")
    def _(decay, left, right, heads, v_enc, w_enc, indices, grad, cu_seqlens, edit_index, edit_left, edit_right):
        N = decay.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        made = [decay.new_empty(x, dtype=torch.float32) for x in (v_enc.shape, w_enc.shape, (N, *v_enc.shape[:2]))]
        return tuple(made)

    @torch.library.register_fake("writesae::factored_loss")
    def _(decay, left, right, heads, values, indices, v_dec, w_dec, offset, on_offset, weight, initial_state,
          cu_seqlens, v_enc, w_enc, gradients):  # fmt: skip
        (Hs, F), K, V = v_dec.shape[:2], v_dec.shape[-1], w_dec.shape[-1]
        encoder = v_enc is not None
        shapes = (
            (True, values.shape[:3]), (gradients and not encoder, values.shape), (gradients, v_dec.shape),
            (gradients, w_dec.shape), (gradients, (Hs, F)), (gradients, (Hs, K, V)), (encoder, v_dec.shape),
            (encoder, w_dec.shape), (encoder, (Hs, F)),
        )  # fmt: skip
        return tuple(decay.new_empty(shape if on else (0,), dtype=torch.float32) for on, shape in shapes)

    _transforms.register("encode_backward", "use ops.encode, which has a gradient and a plain path", fold=())
    _transforms.register("factored_loss", "use ops.factored_loss or ops.training_loss", fold=())
