"""The sparse operations of a dictionary: exact top k, and gradients that touch only the atoms that fired.

Of F atoms only k act on a state, so the backward of encoder and decoder needs k / F of the dense products. Both
functions here are exact (gradcheck is a test), with every sum in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exact_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k of raw pre-activations `[..., F]`, then ReLU: `[..., k]` values and int64 indices.

    Descending, ties to the lowest index. `torch.topk` leaves ties open, so rows with a tie at the cut are sorted.
    """
    values, indices = pre.topk(k, dim=-1, sorted=False)
    tied = (pre >= values.amin(-1, keepdim=True)).sum(-1) > k
    if bool(tied.any()):
        order = pre[tied].sort(dim=-1, descending=True, stable=True)
        values[tied], indices[tied] = order.values[..., :k], order.indices[..., :k]
    indices, order = indices.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values.relu(), indices.gather(-1, order)


class BilinearAt(torch.autograd.Function):
    """Pre-activations `v_i^T X w_i` at chosen atoms only, from their already computed values.

    Forward hands `values` on; backward forms gradients of the factors from the P * j chosen pairs.
    """

    @staticmethod
    def forward(
        ctx,
        values: Tensor,  # [P, j]
        indices: Tensor,  # [P, j]
        X: Tensor,  # [P, K, V]
        v: Tensor,  # [F, r, K]
        w: Tensor,  # [F, r, V]
    ) -> Tensor:
        ctx.save_for_backward(indices, X, v, w)
        return values.clone()

    @staticmethod
    def backward(ctx, grad):  # [P, j]
        indices, X, v, w = ctx.saved_tensors
        P, j = indices.shape
        F, r, K = v.shape
        V = w.shape[-1]
        flat = indices.reshape(-1)
        # [P, K, V] @ [P, V, j r] -> [P, j, r, K], and likewise for the other side.
        side_v = (w[flat].view(P, j * r, V) @ X.transpose(1, 2)).view(P, j, r, K) * grad[:, :, None, None]
        side_w = (v[flat].view(P, j * r, K) @ X).view(P, j, r, V) * grad[:, :, None, None]
        grad_v = v.new_zeros(F, r * K).index_add_(0, flat, side_v.reshape(P * j, r * K)).view(F, r, K)
        grad_w = w.new_zeros(F, r * V).index_add_(0, flat, side_w.reshape(P * j, r * V)).view(F, r, V)
        return None, None, None, grad_v, grad_w


class Decode(torch.autograd.Function):
    """`sum_j a_j v_j w_j^T` over the atoms that fired: `[P, K, V]`."""

    @staticmethod
    def forward(
        ctx,
        values: Tensor,  # [P, j]
        indices: Tensor,  # [P, j]
        v: Tensor,  # [F, r, K]
        w: Tensor,  # [F, r, V]
    ) -> Tensor:
        P, j = indices.shape
        r = v.shape[1]
        flat = indices.reshape(-1)
        v_at, w_at = v[flat].view(P, j, r, -1), w[flat].view(P, j, r, -1)
        ctx.save_for_backward(values, indices, v_at, w_at)
        ctx.F = len(v)
        return (v_at * values[:, :, None, None]).flatten(1, 2).transpose(1, 2) @ w_at.flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):  # [P, K, V]
        values, indices, v_at, w_at = ctx.saved_tensors
        P, j, r, K = v_at.shape
        V, F = w_at.shape[-1], ctx.F
        flat = indices.reshape(-1)
        side_v = (w_at.flatten(1, 2) @ grad.transpose(1, 2)).view(P, j, r, K)  # (A w)-like: grad w
        side_w = (v_at.flatten(1, 2) @ grad).view(P, j, r, V)
        grad_values = (side_v * v_at).sum((2, 3))
        scale = values[:, :, None, None]
        grad_v = grad.new_zeros(F, r * K).index_add_(0, flat, (side_v * scale).reshape(P * j, r * K)).view(F, r, K)
        grad_w = grad.new_zeros(F, r * V).index_add_(0, flat, (side_w * scale).reshape(P * j, r * V)).view(F, r, V)
        return grad_values, None, grad_v, grad_w
