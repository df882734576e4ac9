"""What of a partition is the training's doing: dictionaries of other k and other seeds, and atoms found again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..experiments.statistics import need, proportion
from ..sae import SAE
from .lab import Lab, Site
from .measures import mean
from .trained import config, held, trained

Medians = Callable[[SAE], "tuple[np.ndarray, np.ndarray]"]  # (features alive, their median cosines)


def sweep(lab: Lab, site: Site, medians: Medians) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains a dictionary for every k and seed of the settings; statistics by k, and one row a dictionary."""
    writes = held(lab, "train", lab["passages"], [site])[site]
    by_k, rows = {}, []
    for k in lab["ks"]:
        found = []
        for seed in range(lab["seeds"]):
            sae = trained(lab, site, config(lab, k=k, seed=seed), writes)
            alive, median = medians(sae)
            found.append((sae, alive, median))
            rows.append((k, seed, len(alive), int((median > lab["threshold"]).sum())))
        by_k[str(k)] = _of_one_k(found, lab["threshold"], lab.seed)
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    table = dict(zip(("k", "seed", "alive", "registers"), columns, strict=True))
    return {"site": f"{site[0]}:{site[1]}", "F": lab["F"], "steps": lab["steps"], "k": by_k}, table


def _of_one_k(found: list[tuple[SAE, np.ndarray, np.ndarray]], threshold: float, seed: int) -> dict[str, Any]:
    alive = np.array([len(x) for _, x, _ in found])
    registers = np.array([int((median > threshold).sum()) for _, _, median in found])
    pooled = np.concatenate([median for _, _, median in found])
    out: dict[str, Any] = {
        "alive": _spread(alive), "registers": _spread(registers),
        "register": proportion(pooled > threshold, "alive features above the threshold") if len(pooled) else None,
    }  # fmt: skip
    if len(found) > 1 and alive.min() > 0:
        some = [_rows(sae.atoms(), at) for sae, at, _ in found]
        out["matched"] = matched(some, seed=seed)
        out["matched_shuffled"] = matched([_shuffled(*atoms, seed) for atoms in some], seed=seed)
    return out


def _spread(counts: np.ndarray) -> dict:
    """Counts of dictionaries that differ by their seed, and their coefficient of variation."""
    varies = need("scipy.stats").variation
    many = len(counts) > 1 and counts.any()
    return {
        "statistic": "coefficient of variation over seeds (sample standard deviation over mean)", "n": len(counts),
        "counts": counts.tolist(), "cv": float(varies(counts, ddof=1)) if many else None,
    }  # fmt: skip


def matched(atoms: list[tuple[Tensor, Tensor]], least: float = 0.9, seed: int = 0) -> dict:
    """Share of atoms with one of cosine above `least` in another seed's dictionary, over all ordered pairs of them.

    Args:
        atoms: factors `([n, r, K], [n, r, V])` of each seed's.
    """
    hits, of = [], []
    for a, b in permutations(range(len(atoms)), 2):
        hits.append((cosines(atoms[a], atoms[b]).amax(1) > least).cpu().numpy())
        of.append(100_000_000 * a + np.arange(len(hits[-1])))
    found = mean(np.concatenate(hits), np.concatenate(of), "atom", seed)
    return {**found, "least": least, "pairs": len(hits)}


def cosines(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """`[n, m]` cosines of matrices `sum_r v_r w_r^T`, signs and all."""

    def inner(x, y):
        return (torch.einsum("nrk,msk->nmrs", x[0], y[0]) * torch.einsum("nrv,msv->nmrs", x[1], y[1])).sum((2, 3))

    norms = [((x @ x.mT) * (y @ y.mT)).sum((1, 2)).clamp_min(1e-30).sqrt() for x, y in (a, b)]
    return inner(a, b) / norms[0][:, None] / norms[1]


def _rows(atoms: tuple[Tensor, Tensor], at: np.ndarray) -> tuple[Tensor, Tensor]:
    index = torch.from_numpy(at).to(atoms[0].device).long()
    return atoms[0][index], atoms[1][index]


def _shuffled(v: Tensor, w: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Each key side with another atom's value side."""
    order = np.random.default_rng([seed, len(v)]).permutation(len(v))
    return v, w[torch.from_numpy(order)]
