"""What atoms of a site write and what they are like: promoted and suppressed tokens, and nearest atoms.

An atom `v w^T` in a state is read by a query q as `(v . q) w`. Its value side w then passes the layer's norm, its own
gate and its output projection, all layers above, the final norm and the unembedding. Told here is the direct path by
weights alone (`atoms.output_map`, `atoms.to_logits`): the norm's weights and the head's part of the output projection,
the final norm's weights and the unembedding. Left out is what depends on the context: by how much the norm divides, the
gate, and every layer in between; and the pair has no sign of its own, so what is promoted is so for readers with
`v . q > 0`. Where a family's output projection is not known tokens are unknown, and it is said why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

TOKENS = 10  # promoted, and suppressed
NEIGHBOURS = 10
_ROWS = 256  # atoms whose logits are made at once
_NAMES = ("promoted", "suppressed", "neighbour", "key_neighbour")
LISTS: dict[str, Any] = {
    name: kind for stem in _NAMES for name, kind in ((stem, np.int32), (f"{stem}_value", np.float32))
}  # fmt: skip


def facts(sae, model, layer: int, head: int, vocabulary: int) -> tuple[pa.Table, dict[str, str]]:
    """(a table with a row an atom, {what is unknown: why}).

    Args:
        sae: the site's dictionary. model: whose logits they are, or None.
        vocabulary: token ids from here on (rows of the embedding without a token) are left out.

    Columns, lists: promoted and suppressed token ids, most first, with the change of their logits in standard
    deviations over the vocabulary; neighbours by cosine of atoms, key_neighbours by that of key sides, of either sign.
    """
    import torch

    from ..atoms import sides

    why: dict[str, str] = {}
    found: dict[str, tuple[np.ndarray, np.ndarray] | None] = dict.fromkeys(_NAMES)
    try:
        v, w = (x.detach().float() for x in sae.atoms())
    except ValueError as error:
        why |= dict.fromkeys(("neighbours", "promoted"), str(error))
        return _table(found, sae.F), why
    finite = v.isfinite().flatten(1).all(1) & w.isfinite().flatten(1).all(1)
    v, w = (torch.where(finite[:, None, None], x, 0) for x in (v, w))
    found["neighbour"] = _nearest(v, w)
    found["key_neighbour"] = _nearest(v, None) if v.shape[1] == 1 else None
    if model is None:
        why["promoted"] = "no model"
        return _table(found, sae.F), why
    values = torch.nn.functional.normalize(w[:, 0], dim=1)
    if w.shape[1] > 1:
        values = torch.stack([sides(sae, i)[1] if finite[i] else w[i, 0] for i in range(len(w))])
    try:
        found["promoted"], found["suppressed"] = _tokens(model, layer, head, values, vocabulary)
    except ValueError as error:
        why["promoted"] = str(error)
    return _table(found, sae.F), why


def _tokens(model, layer: int, head: int, values, vocabulary: int):
    """((ids, scores) promoted, suppressed), each `[F, TOKENS]`."""
    import torch

    from ..atoms import output_map, to_logits

    out = output_map(model, layer, head)
    raised: list = []
    lowered: list = []
    for part in values.to(out).split(_ROWS):
        logits = to_logits(model, part @ out)[:, :vocabulary]
        mean, std = logits.mean(1, keepdim=True), logits.std(1, keepdim=True)
        silent = ~(mean.isfinite() & std.isfinite() & (std > 0))
        for found, largest in ((raised, True), (lowered, False)):
            best = logits.topk(min(TOKENS, logits.shape[1]), dim=1, largest=largest)
            ids = torch.where(silent, -1, best.indices)
            score = (best.values - mean) / std.clamp_min(1e-30)
            found.append((ids.int().cpu().numpy(), score.float().cpu().numpy()))
    return tuple(tuple(np.concatenate(x) for x in zip(*found, strict=True)) for found in (raised, lowered))


def _nearest(v, w) -> tuple[np.ndarray, np.ndarray]:
    """(others, cosines) `[F, NEIGHBOURS]` of atoms `sum_r v w^T`, or of key sides v alone; of either sign."""
    import torch

    F = len(v)
    ids, cosines = [], []
    own = torch.einsum("frk,fsk->frs", v, v)
    norm = (own if w is None else own * torch.einsum("frv,fsv->frs", w, w)).sum((1, 2)).clamp_min(0).sqrt()
    for low in range(0, F, 512):
        inner = torch.zeros(len(v[low : low + 512]), F)
        for r in range(v.shape[1]):
            for s in range(v.shape[1]):
                product = v[low : low + 512, r] @ v[:, s].mT
                inner += product if w is None else product * (w[low : low + 512, r] @ w[:, s].mT)
        cosine = (inner / (norm[low : low + 512, None] * norm).clamp_min(1e-30)).clamp(-1, 1)
        size = cosine.abs()
        size[torch.arange(len(size)), torch.arange(low, low + len(size))] = -1
        best = size.topk(min(NEIGHBOURS, F - 1), dim=1).indices
        value = cosine.gather(1, best)
        ids.append(torch.where(value == 0, -1, best).int().numpy())
        cosines.append(value.numpy())
    return np.concatenate(ids), np.concatenate(cosines)


def _table(found: Mapping[str, tuple[np.ndarray, np.ndarray] | None], F: int) -> pa.Table:
    from .scan import lists

    columns = {}
    for name, pair in found.items():
        ids, values = (np.empty((F, 0), np.int32), np.empty((F, 0), np.float32)) if pair is None else pair
        of, kept = np.repeat(np.arange(F), ids.shape[1]), ids.reshape(-1) >= 0
        columns[name] = lists(of[kept], ids.reshape(-1)[kept], F)
        columns[f"{name}_value"] = lists(of[kept], values.reshape(-1)[kept], F)
    return pa.table(columns)
