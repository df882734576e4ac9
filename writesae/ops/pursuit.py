"""`pursuit`: which few atoms a write is made of, by orthogonal matching pursuit on its factors.

A write is k_t u_t^T, so an atom's response to it is a product of two numbers, and so is its response to another atom:
nothing of size K V is formed. Each round takes the atom that answers most to what is still unexplained, then codes all
atoms taken so far anew. Y. C. Pati, R. Rezaiifar, P. S. Krishnaprasad, *Orthogonal Matching Pursuit*, Asilomar 1993; as
the encoder of a sparse autoencoder: V. Costa et al., arXiv 2506.03093.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_floats, refuse_unreadable
from .._autocast import without_autocast
from . import _dispatch, _transforms

_FLOATS = 2**23  # held at a time: what fits a cache
_STOP = 1e-5  # share of the first response below which nothing more is taken
_REFITS = 3
_FACTORS = ("v_enc", "w_enc", "v_dec", "w_dec")
_dispatch.declare("pursuit", {})  # plain torch, on any device


@without_autocast
def pursuit(
    left: Tensor,  # [..., R, K]
    right: Tensor,  # [..., R, V]
    v_enc: Tensor,  # [F, r, K]
    w_enc: Tensor,  # [F, r, V]
    v_dec: Tensor,  # [F, r, K]
    w_dec: Tensor,  # [F, r, V]
    k: int,
) -> tuple[Tensor, Tensor]:
    """Codes of writes `X = sum_r left_r right_r^T` by at most k atoms `A_i = sum_r v_dec w_dec^T`.

    The response of atom i to X is `<E_i, X>`, `E_i = sum_r v_enc w_enc^T`. Where `E_i` is `A_i` (or `M A_i` for a
    metric M of the key side) and `<E_i, A_i> = 1`, every round takes the atom that leaves the smallest error (in that
    metric), and the codes are the least-squares ones among those >= 0; with k = 1 it is the nearest atom.

    Args:
        left, right: floating, of one or several writes; computed in float32, or float64 where they are.
        v_enc, w_enc, v_dec, w_dec: encoder and decoder factors, of one rank.
        k: atoms a write, 1 <= k <= F.

    Returns:
        values `[..., k]` >= 0, descending, and int64 indices `[..., k]`, each atom once. 0 where fewer were taken: no
        atom answers to the rest, or its code came out negative. NaN or infinity in a write gives it NaN codes.

    Raises:
        ValueError: a wrong shape, dtype or size, naming the argument.
        RuntimeError: a gradient or transform asked for, or tensors without numbers (meta, torch.compile).

    Plain torch on the tensors' device; no kernel.
    """
    tensors: dict[str, Tensor | None] = {
        "left": left, "right": right, "v_enc": v_enc, "w_enc": w_enc, "v_dec": v_dec, "w_dec": w_dec
    }  # fmt: skip
    check_floats((), **tensors)
    _check(left, right, dict(zip(_FACTORS, (v_enc, w_enc, v_dec, w_dec), strict=True)), k)
    _dispatch.refuse_gradient("pursuit", tensors, "which atoms are taken has none; use torch.no_grad()")
    _transforms.refuse_transformed("pursuit", "use encode", *tensors.values())
    for name, x in tensors.items():
        if x is not None:
            refuse_unreadable("pursuit", name, x)
    dtype = torch.float64 if right.dtype == torch.float64 else torch.float32
    lead, F = left.shape[:-2], len(v_enc)
    with torch.no_grad():
        factors = [x.to(right.device, dtype) for x in (v_enc, w_enc, v_dec, w_dec)]
        left, right = (x.to(dtype).reshape(-1, *x.shape[-2:]) for x in (left, right))
        values = left.new_empty(len(left), k)
        indices = torch.empty(len(left), k, dtype=torch.int64, device=left.device)
        step = max(1, _FLOATS // (F * (k + 2)))
        for lo in range(0, len(left), step):
            at = slice(lo, lo + step)
            response = responses(factors[0], factors[1], left[at], right[at])
            values[at], indices[at] = _pursue(response, factors, k)
    return values.view(*lead, k), indices.view(*lead, k)


def responses(v: Tensor, w: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`[P, F]`: `sum v_i^T left right^T w_i` over the ranks of atoms `[F, r, *]` and of writes `[P, R, *]`."""
    (F, r, _), (P, R, _) = v.shape, left.shape
    total = left.new_zeros(())
    for s in range(R):
        on = (left[:, s] @ v.flatten(0, 1).T).mul_(right[:, s] @ w.flatten(0, 1).T).view(P, F, r)
        on = on[:, :, 0] if r == 1 else on.sum(2)
        total = on if s == 0 else total.add_(on)
    return total


def _pursue(first: Tensor, factors: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Rounds of one part. first `[P, F]`: responses to the writes themselves."""
    v_enc, w_enc, v_dec, w_dec = factors
    P = len(first)
    left, taken, grams = first.clone() if k > 1 else first, [], []
    codes = first.new_zeros(P, 0)
    on = first.new_zeros(P, 0, dtype=torch.bool)
    for j in range(k):
        best, pick = left.max(1)
        if j == 0:
            least = _STOP * best
        taken.append(pick)
        indices = torch.stack(taken, 1)
        # ~(best <= least) is true for NaN too, which then stays in the codes.
        on = torch.cat([on, ~((best <= least) | (best <= 0))[:, None]], 1)
        if k == 1:
            return torch.where(on, best[:, None], 0.0), indices
        grams.append(responses(v_enc, w_enc, v_dec[pick], w_dec[pick]))  # of every encoder to the atom just taken
        gram = torch.stack([g.gather(1, indices) for g in grams], 2)
        codes = _nonnegative(gram, first.gather(1, indices), on)
        if j + 1 < k:
            left.copy_(first)
            for i, g in enumerate(grams):
                left.addcmul_(g, codes[:, i : i + 1], value=-1)
            left.scatter_(1, indices, float("-inf"))
    values, order = codes.sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def _nonnegative(gram: Tensor, response: Tensor, on: Tensor) -> Tensor:
    """`[P, j]` codes a >= 0 with `gram a = response` on the atoms that stay; those that come out negative go, a few
    times over, and are then cut off."""
    j = gram.shape[1]
    eye = torch.eye(j, dtype=gram.dtype, device=gram.device)
    for _ in range(_REFITS):
        both = on[:, :, None] & on[:, None]
        system = torch.where(both, gram, 0.0) + eye * torch.where(on, 1e-6, 1.0)[:, :, None]
        codes = torch.linalg.solve_ex(system, torch.where(on, response, 0.0))[0]
        bad = codes < 0
        if not bool(bad.any()):
            break
        on = on & ~bad
    return torch.where(bad, 0.0, codes)


def _check(left: Tensor, right: Tensor, factors: dict[str, Tensor], k: int) -> None:
    v_enc = factors["v_enc"]
    if left.ndim < 2:
        raise ValueError(f"left: expected [..., R, K], got shape {tuple(left.shape)}")
    if right.ndim != left.ndim or right.shape[:-1] != left.shape[:-1]:
        raise ValueError(f"right: expected [..., R, V] beside left {tuple(left.shape)}, got shape {tuple(right.shape)}")
    if v_enc.ndim != 3 or not v_enc.shape[0]:
        raise ValueError(f"v_enc: expected [F, r, K], got shape {tuple(v_enc.shape)}")
    F, r, _ = v_enc.shape
    for name, size in zip(_FACTORS, (left, right, left, right), strict=True):
        expected = (F, r, size.shape[-1])
        if tuple(factors[name].shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(factors[name].shape)}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= F:
        raise ValueError(f"k: expected an integer, 1 <= k <= F={F}, got {k!r}")
