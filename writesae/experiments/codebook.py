"""The null model of a dictionary: as many native writes, taken from text as they come, that nobody trained."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sae import SAE


@torch.no_grad()
def codebook(sae: SAE, left: Tensor, right: Tensor) -> SAE:
    """A dictionary whose atoms are native writes, coded by the same rule as `sae`.

    Of a pursuit dictionary: by pursuit in its metric, in which atoms have unit length. Of others: by the k largest
    inner products with unit atoms.

    Args:
        sae: the dictionary it stands beside: size, k, site and metric are taken from it.
        left, right: `[F, K]` and `[F, V]` factors of native writes; their norms do not count.

    Raises:
        ValueError: factors of other sizes.
    """
    for name, x, size in (("left", left, sae.K), ("right", right, sae.V)):
        if tuple(x.shape) != (sae.F, size):
            raise ValueError(f"{name}: expected [F={sae.F}, {size}], got shape {tuple(x.shape)}")
    out = SAE(
        sae.K, sae.V, sae.F, sae.k, "bilinear_tied", 1, "topk" if sae.metric is None else "pursuit", sae.layer,
        sae.head, sae.model, sae.centred, target=sae.target,
    )  # fmt: skip
    v, w = normalize(left.double(), dim=1), normalize(right.double(), dim=1)
    if sae.metric is not None:
        M = sae.metric.double().to(left.device)
        v = v / ((v @ M) * v).sum(1, keepdim=True).clamp_min(1e-30).sqrt()
        out.metric = sae.metric.clone()
    out.v_dec.copy_(v[:, None]), out.w_dec.copy_(w[:, None])
    out.mean.copy_(sae.mean)
    return out.to(left.device, sae.compute_dtype).eval().requires_grad_(False)
