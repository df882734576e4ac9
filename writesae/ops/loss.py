"""The reconstruction loss of a rank-1 dictionary from writes, without ever forming a state or a reconstruction.

    ||S_t - M - sum_i a_i A_i||^2 = ||S_t - M||^2 - 2 sum_i a_i <A_i, S_t - M> + sum_ij a_i a_j <A_i, A_j>

with A_i = sum_x v_ix w_ix^T, <A_i, S_t> from the recurrence of `activations`, and Gram matrices of the active set only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._arguments import check_floats, check_integers, check_type, integers, said
from .._autocast import without_autocast
from ..writes import Writes
from . import _dispatch, _transforms
from ._dispatch import Limits
from .encode import GATES, _compute_dtype, _prepare, check_indices, chosen_activations
from .reference.encode import decay_matrix
from .sae_training import _ADVICE, loss_sums

# On CUDA made of the operator of `activations`.
_LARGEST = {"v_dec": 256, "right": 256}
_cpu = Limits("factored_loss", gates=GATES, gradient=GATES)
_cuda = Limits("encode_at", largest=_LARGEST, gates=GATES, gradient=GATES)
_dispatch.declare("factored_loss", {"cpu": _cpu, "cuda": _cuda})

_BLOCK = 64  # tokens of one triangular product
_GATHERED = 1 << 22  # numbers gathered at a time for the Gram matrix of the active set


@without_autocast
def factored_loss(
    writes: Writes,
    values: Tensor,  # [B, T, Hs, k]
    indices: Tensor,  # [B, T, Hs, k]
    v_dec: Tensor,  # [Hs, F, K] or [Hs, F, r, K]
    w_dec: Tensor,  # [Hs, F, V] or [Hs, F, r, V]
    bias: Tensor | None = None,  # [Hs, K, V]
    heads: Sequence[int] | None = None,
    mask: Tensor | None = None,  # [B, T] bool
    initial_state: Tensor | None = None,  # [N, H, K, V]
    backend: str | None = None,
) -> Tensor:
    """Squared reconstruction error `||S_t - bias - sum_j values_j A_{indices_j}||_F^2` of every token and encoded head.

    Args:
        writes: the trace of one layer (scalar gate, no edits).
        values, indices: codes, as `encode` returns them; an unused slot has value 0.
        v_dec, w_dec: decoder factors (a rank axis r is summed over).
        bias: decoder bias, the mean state M by default of the dictionaries; None means 0.
        heads: value heads that row i of the factors belongs to; default all.
        mask: tokens wanted; the others get error 0 and no gradient. Default all.
        initial_state: state before the first token; default `writes.initial_state`.
        backend: of the activations: "reference", "cpu", "cuda" or None.

    Returns:
        `[B, T, Hs]` squared errors, float32 (float64 for float64 inputs, reference only). Differentiable in values,
        v_dec, w_dec and bias. Divide by K * V for the mean squared error.

    Raises:
        ValueError: a wrong shape, dtype or index, naming the argument; or writes with edits.
        RuntimeError: a gradient asked for the writes; a second derivative.

    Forward mode and `torch.func` are right by plain torch, in the writes too, and hold all states. Autocast changes
    nothing.
    """
    check_type("writes", writes, Writes)
    check_floats(
        ("bias", "initial_state"), **{"writes.right": writes.right}, values=values, v_dec=v_dec, w_dec=w_dec, bias=bias,
        initial_state=initial_state,
    )  # fmt: skip
    check_integers("indices", indices, "[B, T, Hs, k]")
    B, T, H, K, V = writes.shape
    heads = list(range(H)) if heads is None else integers("heads", heads)
    Hs = len(heads)
    if values.shape != indices.shape:
        raise ValueError(f"values: expected the shape of indices {tuple(indices.shape)}, got {tuple(values.shape)}")
    if bias is not None and tuple(bias.shape) != (Hs, K, V):
        raise ValueError(f"bias: expected [Hs={Hs}, K={K}, V={V}], got shape {tuple(bias.shape)}")
    if mask is not None and (
        not isinstance(mask, Tensor) or tuple(mask.shape) != (B, T) or mask.dtype != torch.bool
    ):  # fmt: skip
        raise ValueError(f"mask: expected a bool tensor [B={B}, T={T}], got {said(mask)}")
    if writes.edits is not None and len(writes.edits):
        raise ValueError("writes: the factored loss is not defined for writes with edits")
    if initial_state is not None:
        writes = replace(writes, initial_state=initial_state)
    of_writes = {name: getattr(writes, name) for name in ("decay", "left", "right", "initial_state")}
    _dispatch.refuse_gradient("factored_loss", of_writes, "only codes and dictionary have one; detach the writes")
    if _transforms.transformed(*of_writes.values(), values, indices, v_dec, w_dec, bias, mask):
        return _plain_loss(writes, values, indices, v_dec, w_dec, bias, heads, mask)
    if mask is not None:
        values = values * mask[:, :, None, None]
    names = ("v_dec", "w_dec", "b_dec")
    tensors = {
        "right": writes.right, "values": values, "v_dec": v_dec, "w_dec": w_dec, "bias": bias, "decay": writes.decay,
        "decay_matrix": writes.decay_matrix,
    }  # fmt: skip
    if _dispatch.choose("factored_loss", backend, tensors) == "cpu" or writes.gate != "scalar":
        return _kernel_loss(writes, values, indices, v_dec, w_dec, bias, heads, mask)
    projected = chosen_activations(writes, v_dec, w_dec, indices, None, heads, None, None, backend, names)  # <A_i, S_t>
    v, w = (x[:, :, None] if x.ndim == 3 else x for x in (v_dec, w_dec))
    own = writes.heads(heads).to(projected.dtype)
    compute = projected.dtype
    v, w, values = v.to(compute), w.to(compute), values.to(compute)
    error = own.norms().square()
    if bias is not None:
        bias = bias.to(compute)
        on_bias = ((v.flatten(1, 2) @ bias).view_as(w) * w).sum((2, 3))  # [Hs, F]: <A_i, M>
        projected = projected - on_bias[torch.arange(Hs, device=v.device)[:, None], indices]
        error = error - 2 * state_product(own, bias) + bias.square().sum((1, 2))
    error = error - 2 * (values * projected).sum(-1) + _reconstruction_norm(values, indices, v, w)
    return error if mask is None else error * mask[:, :, None]


def _plain_loss(writes, values, indices, v_dec, w_dec, bias, heads, mask) -> Tensor:
    """The same of torch's own operations, from all states."""
    plain = replace(writes, initial_state=None)
    _, v, w, _, _, _ = _prepare(plain, v_dec, w_dec, None, heads, None, None, ("v_dec", "w_dec", ""))
    check_indices(writes, v, indices)
    _transforms.say_plain("factored_loss")
    compute = _compute_dtype(writes.right, values, v, w, bias)
    tokens = [(n, t) for n, _, start, stop in writes.sequences() for t in range(stop - start)]
    states = writes.to(compute)._states_at(tokens)
    target = states.unflatten(0, writes.shape[:2])[:, :, heads]
    if bias is not None:
        target = target - bias.to(compute)
    head = torch.arange(len(heads), device=v.device)[:, None]
    active = (values, v[head, indices], w[head, indices])
    made = torch.einsum("bthj,bthjxk,bthjxv->bthkv", *(x.to(compute) for x in active))
    error = (target - made).square().sum((3, 4))
    return error if mask is None else error * mask[:, :, None]


def _kernel_loss(writes, values, indices, v_dec, w_dec, bias, heads, mask) -> Tensor:
    """The same by `loss_sums`, which neither sums over all atoms nor keeps anything for the backward pass."""
    plain = replace(writes, initial_state=None)
    _, v, w, _, _, _ = _prepare(plain, v_dec, w_dec, None, heads, None, None, ("v_dec", "w_dec", ""))
    check_indices(writes, v, indices)
    return _Loss.apply(values, v, w, bias, indices, writes, heads, mask)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, v, w, bias, indices, writes, heads, mask):
        ctx.save_for_backward(values, v, w, bias, indices)
        ctx.rest = writes, heads, mask
        return _sums(values, v, w, bias, indices, *ctx.rest, None)[0]

    @staticmethod
    @_transforms.once_differentiable("factored_loss", _ADVICE)
    def backward(ctx, grad):  # [B, T, Hs]
        values, v, w, bias, indices = ctx.saved_tensors
        found = _sums(values, v, w, bias, indices, *ctx.rest, grad)[1:5]
        kept = (None if x is None else d.to(x.dtype) for d, x in zip(found, (values, v, w, bias), strict=True))
        return *kept, None, None, None, None


def _sums(values, v, w, bias, indices, writes, heads, mask, grad):
    """`loss_sums` with the gradient `grad [B, T, Hs]` of the errors, or None: then of the errors alone."""
    compute = _compute_dtype(writes.right, values, v, w, bias)
    weight = v.new_ones(values.shape[:3], dtype=compute) if grad is None else grad.to(compute)
    weight = weight if mask is None else weight * mask[:, :, None]
    v, w, bias = (None if x is None else x.detach().to(compute) for x in (v, w, bias))
    return loss_sums(writes, heads, values, indices, v, w, bias, weight, grad=grad is not None)


def state_product(writes: Writes, matrix: Tensor) -> Tensor:
    """`<matrix_h, S_t>_F` for every token and head, `[B, T, H]`, from the increments `left^T matrix right`.

    Args:
        writes: scalar gate, no edits.
        matrix: `[H, K, V]`; differentiable.
    """
    pieces: list[list[Tensor]] = [[] for _ in range(writes.shape[0])]
    for n, b, start, stop in writes.sequences():
        last = None
        if writes.initial_state is not None:
            last = (matrix * writes.initial_state[n].to(matrix)).sum((1, 2))
        for lo in range(start, stop, _BLOCK):
            hi = min(lo + _BLOCK, stop)
            left = writes.left_of_heads(b, lo, hi).to(matrix)
            increment = torch.einsum("thrk,hkv,thrv->ht", left, matrix, writes.right[b, lo:hi].to(matrix))
            decay = writes.decay[b, lo:hi].to(matrix).T  # [H, t]
            reach = decay_matrix(decay)
            product = (reach @ increment[..., None])[..., 0]
            if last is not None:
                product = product + reach[:, :, 0] * (decay[:, :1].exp() * last[:, None])
            last = product[:, -1]
            pieces[b].append(product.T)
    return torch.stack([torch.cat(row) for row in pieces])


class _ReconstructionNorm(torch.autograd.Function):
    """||sum_j a_j A_j||^2 of one head's tokens through the Gram matrix of the active set, a few tokens at a time."""

    @staticmethod
    def forward(ctx, values, indices, v, w):  # [n, k], [n, k], [F, r, K], [F, r, V] -> [n]
        out = values.new_empty(len(values))
        product = torch.empty_like(values)  # Gram @ a, half the gradient of a
        for part in _parts(values, v, w):
            left, right, a, r = _gather(part, values, indices, v, w)
            gram = (left @ left.mT) * (right @ right.mT)
            product[part] = (gram @ a[..., None])[..., 0].unflatten(1, (-1, r)).sum(2)
            out[part] = (product[part] * values[part]).sum(1)
        ctx.save_for_backward(values, indices, v, w, product)
        return out

    @staticmethod
    @_transforms.once_differentiable("factored_loss", _ADVICE)
    def backward(ctx, grad):
        values, indices, v, w, product = ctx.saved_tensors
        d_values = 2 * grad[:, None] * product
        if not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            return d_values, None, None, None
        dv, dw = torch.zeros_like(v), torch.zeros_like(w)
        for part in _parts(values, v, w):
            left, right, a, r = _gather(part, values, indices, v, w)
            scale = (2 * grad[part][:, None] * a)[..., None]
            flat = indices[part].flatten()
            d_left = scale * (((right @ right.mT) * a[:, None]) @ left)
            d_right = scale * (((left @ left.mT) * a[:, None]) @ right)
            dv.index_add_(0, flat, d_left.view(len(flat), r, -1))
            dw.index_add_(0, flat, d_right.view(len(flat), r, -1))
        return d_values, None, dv, dw


def _parts(values, v, w):
    size = max(1, _GATHERED // max(1, values.shape[1] * (v[0].numel() + w[0].numel())))
    return [slice(lo, lo + size) for lo in range(0, len(values), size)]


def _gather(part, values, indices, v, w):
    """Factors of the active set `[n, k * r, size]` and each one's code `[n, k * r]`."""
    chosen, r = indices[part], v.shape[1]
    return v[chosen].flatten(1, 2), w[chosen].flatten(1, 2), values[part].repeat_interleave(r, dim=1), r


def _reconstruction_norm(values, indices, v, w) -> Tensor:
    """`[B, T, Hs]` from values, indices `[B, T, Hs, k]` and factors `[Hs, F, r, *]`."""
    B, T, Hs, k = values.shape
    heads = [
        _ReconstructionNorm.apply(
            values[:, :, i].reshape(B * T, k), indices[:, :, i].reshape(B * T, k), v[i], w[i]
        ).view(B, T)
        for i in range(Hs)
    ]
    return torch.stack(heads, -1)
