"""Features chosen by how often they fire on validation text: often, but not everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..sae import SAE
from .lab import Lab, Site


def frequent(
    lab: Lab, saes: Mapping[Site, SAE], passages: int, context: int, count: int, most: float
) -> dict[Site, np.ndarray]:
    """{site: numbers of the `count` features that fire most often on validation, of those that fire at no more than a
    share `most` of its tokens}, most frequent first; fewer where fewer fire. Of dictionaries of one target."""
    if not 0 < most <= 1:
        raise ValueError(f"most: expected a share of tokens, 0 < most <= 1, got {most}")

    def find() -> dict[str, np.ndarray]:
        ids = lab.whole("validation", passages, context)
        fires = {site: np.zeros(sae.F, np.int64) for site, sae in saes.items()}
        for reading in lab.read(ids, saes):
            every = reading.firings
            for (layer, head), counts in fires.items():
                mine = every.feature[(every.layer == layer) & (every.head == head)]
                counts += np.bincount(mine.cpu().numpy(), minlength=len(counts))
        rows = []
        for (layer, head), counts in fires.items():
            allowed = np.where(counts <= most * ids.numel(), counts, 0)
            best = np.argsort(-allowed, kind="stable")[:count]
            rows += [(layer, head, f, counts[f]) for f in best if allowed[f]]
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        return dict(zip(("layer", "head", "feature", "firings"), columns, strict=True))

    target = "-".join(sorted({sae.target for sae in saes.values()}))
    found = lab.unit(f"frequent-{target}", find)
    return {
        (layer, head): found["feature"][(found["layer"] == layer) & (found["head"] == head)] for layer, head in saes
    }
