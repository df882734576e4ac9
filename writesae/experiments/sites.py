"""Which heads are tested: by a rule that cannot see the outcome, or, where there is none, said so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..models.hf_gated_delta import layers
from ..sae import SAE
from .engine import ForkEngine
from .firing import stream


@torch.no_grad()
def memory(model, passages: Sequence[np.ndarray], progress: bool = False) -> dict[tuple[int, int], float]:
    """{(layer, head): tokens until a write has faded to 1/e}, by the mean log-decay over all tokens of the passages,
    and over all channels or entries of a head that has a gate for each."""
    sites = {site.layer_index: site.num_v_heads for site in layers(model)}
    total = {layer: torch.zeros(heads, dtype=torch.float64) for layer, heads in sites.items()}
    places = [(layer, 0) for layer in sites]
    for found, real, _ in stream(model, places, passages, "memory", progress):
        for layer, writes in found.items():
            decay = writes.decay.double()  # [B, T, H], of a channel gate [B, T, H, K], of an element gate [B, T, H, V]
            if writes.decay_matrix is not None:
                decay = decay * writes.decay_matrix.double().mean(1)
            if decay.ndim > 3:
                decay = decay.mean(-1)
            total[layer] += (decay.cpu() * real[..., None]).sum((0, 1))
    tokens = sum(map(len, passages))
    return {
        (layer, head): -tokens / min(float(fade), -1e-300)
        for layer, fades in total.items() for head, fade in enumerate(fades)
    }  # fmt: skip


def longest_memory(model, passages: Sequence[np.ndarray], number: int, progress: bool = False) -> list[tuple[int, int]]:
    """The `number` heads whose writes last longest, longest first.

    Raises:
        ValueError: not that many heads.
    """
    found = memory(model, passages, progress)
    if not 1 <= number <= len(found):
        raise ValueError(f"longest: expected 1 to {len(found)} heads of this model, got {number}")
    return sorted(found, key=lambda site: (-found[site], site))[:number]


def with_longest_memory(
    model, saes: Mapping[tuple[int, int], SAE], passages: Sequence[np.ndarray], number: int, progress: bool = False
) -> dict[tuple[int, int], SAE]:
    """The dictionaries of the heads with the longest memory.

    Raises:
        ValueError: one of these heads has no dictionary; then the choice would not be the rule's.
    """
    wanted = longest_memory(model, passages, number, progress)
    missing = [f"{layer}:{head}" for layer, head in wanted if (layer, head) not in saes]
    if missing:
        raise ValueError(
            f"longest: expected a dictionary for each of the {number} heads with the longest memory, got none for "
            f"{', '.join(missing)}"
        )
    return {site: saes[site] for site in sorted(wanted)}


def rule(saes: Mapping[tuple[int, int], SAE], engines: Mapping[int, ForkEngine]) -> str:
    """How sites that were given can be called: "all heads" of every layer among them, or "given" one by one."""
    whole = all(
        {head for at, head in saes if at == layer} == set(range(engine.site.num_v_heads))
        for layer, engine in engines.items()
    )
    return "all heads" if whole else "given"
