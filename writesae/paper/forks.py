"""What the studies of interventions share: places where atoms fire, their forks, and directions that name a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..experiments.engine import Clean, ForkEngine, Places
from ..experiments.firing import top_codes
from ..sae import SAE
from .lab import Lab, Site

_FORKS = 64  # of one clean pass: what is made of them (logits of each) has to fit


def all_sites(lab: Lab) -> dict[str, tuple[Site, SAE]]:
    """{name: (site, dictionary)} of every dictionary given: "5:3 states", "4:0 writes"."""
    return {f"{layer}:{head} {sae.target}s": ((layer, head), sae)
            for found in (lab.saes, lab.writes) for (layer, head), sae in found.items()}  # fmt: skip


def top_table(lab: Lab, ids: Tensor, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    """The largest code of every token of passages `[P, T]` at one site: row, position, feature, code; where any."""
    parts: dict[str, list] = {name: [] for name in ("row", "position", "feature", "code")}
    for reading in lab.read(ids, {site: None}):  # type: ignore[dict-item]
        feature, value = (x.cpu().numpy() for x in top_codes(reading.writes[site[0]], sae, site[1]))
        row, position = np.nonzero(value > 0)
        for name, x in zip(parts, (row + reading.first, position, feature[row, position], value[row, position]),
                           strict=True):  # fmt: skip
            parts[name].append(x)
    return {name: np.concatenate(found) for name, found in parts.items()}


def some(table: Mapping[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of a table by mask or index."""
    return {name: column[index] for name, column in table.items()}


def followed(table: Mapping[str, np.ndarray], length: int, horizon: int) -> dict[str, np.ndarray]:
    """Its rows with a token before them and `horizon` after."""
    return some(table, (table["position"] > 0) & (table["position"] < length - horizon))


def drawn(table: Mapping[str, np.ndarray], number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """At most that many of its rows, at random, in order of passages."""
    return some(table, np.sort(rng.permutation(len(table["row"]))[:number]))


def forks(
    engine: ForkEngine, ids: Tensor, row: np.ndarray, position: np.ndarray, head: int | np.ndarray
) -> Iterator[tuple[np.ndarray, Clean]]:
    """(which of n places, their clean pass), some at a time, in order of passages.

    Args:
        ids: `[P, T]` full passages.
        row, position, head: of the places.
    """
    order = np.lexsort((position, row))
    heads = np.broadcast_to(np.asarray(head), row.shape)
    for lo in range(0, len(order), _FORKS):
        index = order[lo : lo + _FORKS]
        passages, which = np.unique(row[index], return_inverse=True)
        places = Places(*(torch.from_numpy(np.ascontiguousarray(x)).long()
                          for x in (which, position[index], heads[index])))  # fmt: skip
        part = ids[torch.from_numpy(passages)]
        lengths = torch.full((len(part),), part.shape[1])
        yield index, engine.clean(part, lengths, lambda writes, places=places: places)  # type: ignore[misc]


def atoms(sae: SAE, feature: np.ndarray, like: Tensor, unit: bool = False) -> tuple[Tensor, Tensor]:
    """`[n, r, K]`, `[n, r, V]` factors of n features' atoms; unit: scaled to a Frobenius norm of 1."""
    v, w = (x.detach()[torch.from_numpy(feature).long().to(x.device)].to(like) for x in sae.atoms())
    if not unit:
        return v, w
    size = ((v @ v.mT) * (w @ w.mT)).sum((1, 2)).clamp_min(1e-60).sqrt()
    return v / size[:, None, None], w


def log_probs(engine: ForkEngine, hidden: Tensor) -> Tensor:
    """`[n, L, vocabulary]` float32 log-probabilities of what `ForkEngine.run` returns."""
    return engine.logits(hidden).float().log_softmax(-1)
