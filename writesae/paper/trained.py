"""Dictionaries that a study trains for itself, kept in its folder, from writes that are read once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..interrupt import finishing
from ..sae import SAE
from ..sae.block import Block
from ..sae.evaluate import codes_of
from ..sae.stream import ModelStream, Passages
from ..sae.train import TrainConfig, Trainer
from ..writes import Writes, joined
from .lab import Lab, Site

_PART = 512  # states formed at a time


@torch.no_grad()
def held(lab: Lab, split: str, passages: int, sites: Iterable[Site], context: int = 256) -> dict[Site, Writes]:
    """{site: writes of that one head over whole passages of a split, `[passages, context, 1, ...]`}."""
    wanted = sorted(set(sites))
    ids, parts = lab.whole(split, passages, context), {site: [] for site in wanted}  # type: ignore[var-annotated]
    with ModelStream(lab.model, Passages(ids), wanted) as source:
        for found in source.writes(range(len(ids))):
            for layer, head in wanted:
                parts[layer, head].append(found[layer].head(head))
    return {site: _joined(some) for site, some in parts.items()}


def _joined(parts: list[Writes]) -> Writes:
    """Several batches as one."""
    erase = [part.erase for part in parts if part.erase is not None]
    return Writes(
        torch.cat([part.decay for part in parts]), torch.cat([part.left for part in parts]),
        torch.cat([part.right for part in parts]), joined([part.beta for part in parts], 0),
        (torch.cat([x[0] for x in erase]), torch.cat([x[1] for x in erase])) if erase else None,
        parts[0].decay_matrix, joined([part.initial_state for part in parts], 0),
    )  # fmt: skip


class _Stream:
    """Writes of one head as `Trainer` reads them, a batch of passages at a time."""

    def __init__(self, writes: Writes, layer: int):
        self._writes, self._layer = writes, layer

    def __len__(self) -> int:
        return self._writes.shape[0]

    @property
    def length(self) -> int:
        return self._writes.shape[1]

    def writes(self, rows: Tensor) -> Iterator[dict[int, Writes]]:
        for part in torch.as_tensor(rows).split(64):
            x = self._writes
            start = None if x.initial_state is None else x.initial_state[part]
            some = Writes(x.decay[part], x.left[part], x.right[part], decay_matrix=x.decay_matrix, initial_state=start)
            yield {self._layer: some}


def trained(lab: Lab, site: Site, config: TrainConfig, writes: Writes) -> SAE:
    """A dictionary of a site, trained on `held` writes of it, or read back where the study's folder has it.

    Training takes the study's own settings and no others, so that two dictionaries differ by their config alone.
    """
    layer, head = site
    words = json.dumps([config.record(), list(writes.shape)], sort_keys=True)
    name = f"L{layer}H{head}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"
    folder = lab.place("dictionaries")
    if folder is not None and (folder / name / "cfg.json").exists():
        return _ready(SAE.from_pretrained(folder / name), writes)
    with finishing(f"dictionary {name}", folder is not None) as stop:
        sae = Trainer(_Stream(writes, layer), [(layer, 0)], config, progress=False).run()[layer, 0]
        sae.head = head
        if folder is not None:
            sae.save_pretrained(folder / name)
    stop.check()
    return _ready(sae, writes)


def _ready(sae: SAE, writes: Writes) -> SAE:
    return sae.to(writes.right.device).eval().requires_grad_(False)


def config(lab: Lab, **other) -> TrainConfig:
    """Of a study's settings F, k and steps, with what differs."""
    given: dict = {name: lab[name] for name in ("F", "k", "steps") if name not in other}
    return TrainConfig(**{"prepare": 64, "block": 64, "seed": lab.seed, **given, **other})


def drawn(lab: Lab, writes: Writes, count: int, what: str) -> tuple[Tensor, Tensor]:
    """(rows, positions) `[count]` of that many tokens, or all, drawn by the seed, in order."""
    N, T = writes.shape[:2]
    pick = np.sort(lab.rng("drawn", what).permutation(N * T)[:count])
    at = torch.from_numpy(pick).to(writes.right.device)
    return at // T, at % T


@torch.no_grad()
def examples(block: Block, rows: Tensor, positions: Tensor) -> Tensor:
    """`[P, K, V]` of what the block is of, a part at a time."""
    parts = zip(rows.split(_PART), positions.split(_PART), strict=True)
    return torch.cat([block.examples(r, p) for r, p in parts])


@torch.no_grad()
def reconstructions(sae: SAE, block: Block, rows: Tensor, positions: Tensor) -> Tensor:
    """`[P, K, V]` of a dictionary, of a block of its target."""
    parts = zip(rows.split(_PART), positions.split(_PART), strict=True)
    return torch.cat([sae.decode(codes_of(sae, block, r, p)) for r, p in parts])
