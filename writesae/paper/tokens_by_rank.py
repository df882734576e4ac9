"""Which tokens the studies of writing ask for: strata by native rank, as a share of the vocabulary."""

from __future__ import annotations

import numpy as np
from torch import Tensor

# The paper's ranks 100 and 1,000, of a vocabulary of 248,320.
_FREQUENT, _MID, _RARE = 100 / 248_320, 1_000 / 248_320, 10_000 / 248_320
STRATA = ("frequent", "mid", "rare", "semantic")


def bounds(vocabulary: int) -> dict[str, tuple[int, int]]:
    """{stratum: ranks from, below}; rank 0 is the token that the model would say itself."""
    ends = [1, *(max(i + 2, round(share * vocabulary)) for i, share in enumerate((_FREQUENT, _MID, _RARE)))]
    return {name: (ends[i], ends[i + 1]) for i, name in enumerate(STRATA[:3])}


def by_rank(logits: Tensor, low: int, high: int, barred: set[int], rng: np.random.Generator) -> int:
    """A token of native rank low..high - 1 under logits `[vocabulary]`, none of those barred; -1: there is none."""
    order = logits.argsort(descending=True)[low:high].tolist()
    free = [token for token in order if token not in barred]
    return int(rng.choice(free)) if free else -1


def semantic(later: np.ndarray, logits: Tensor, barred: set[int], rng: np.random.Generator) -> int:
    """A token that the text itself uses later on, not in the prompt and not among frequent ranks; -1: there is none."""
    frequent = logits.argsort(descending=True)[: bounds(len(logits))["frequent"][1]].tolist()
    free = sorted(set(later.tolist()) - barred - set(frequent))
    return int(rng.choice(free)) if free else -1
