"""What the model itself writes where features fire, on some of the store's passages: how close atoms are to it, and
which tokens' keys lie nearest to their key sides. One pass of the model for all sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..collect.files import numbers
from ..collect.store import Store

TOKENS = 16_384  # that the model reads
LEAST, DISTINCT = 3, 4096  # occurrences that a token's key is averaged over, and tokens that are
KEYS = 5
KINDS = ("bilinear", "bilinear_tied", "matrix")  # of dictionaries whose atoms have two sides
LISTS: dict[str, Any] = {"key": np.int32, "key_cosine": np.float32, "key_count": np.int64}


def passages(store: Store) -> list[np.ndarray]:
    """Token ids of whole documents' first passages, spread over the store, of `TOKENS` tokens at most."""
    documents = store.documents
    number, held = (numbers(documents[name]) for name in ("document", "passages"))
    every = number[held > 0]
    few = max(1, TOKENS // store.context)
    chosen = every[np.unique(np.linspace(0, len(every) - 1, min(few, len(every))).astype(int))] if len(every) else every
    rows = -(-few // max(1, len(chosen)))  # of each, where documents are few
    wanted = {(int(d), row) for d in chosen for row in range(min(rows, int(held[number == d][0])))}
    found = store._passages(set(sorted(wanted)[:few]))
    return [ids for _, (ids, _) in sorted(found.items()) if len(ids)]


def measure(
    model, dictionaries: Mapping[tuple[int, int], Any], ids: Sequence[np.ndarray], step: Callable[[], object]
) -> dict[tuple[int, int], pa.Table]:
    """{site: a table, one row an atom}: cosine (mean over its firings of the cosine of atom and native write), fired
    (of how many), and lists: key (token ids whose mean key is nearest to the key side, of either sign), key_cosine and
    key_count (of how many keys).

    Raises:
        ValueError: tokens that the model does not embed, or a model that cannot be attached to.
    """
    import torch

    from ..models import attach
    from ..text.tokens import check_ids

    known, counts = np.unique(np.concatenate(ids), return_counts=True)
    often = np.sort(np.argsort(-counts, kind="stable")[:DISTINCT])
    often = often[counts[often] >= LEAST]
    tokens, counts = known[often], counts[often]
    slot = np.full(int(known.max()) + 1, len(tokens))
    slot[tokens] = np.arange(len(tokens))
    device = next(model.parameters()).device
    atoms = {site: tuple(x.detach().float() for x in sae.atoms()) for site, sae in dictionaries.items()}
    keys = {site: torch.zeros(len(tokens) + 1, v.shape[2]) for site, (v, _) in atoms.items()}
    total = {site: (torch.zeros(len(v)), torch.zeros(len(v))) for site, (v, _) in atoms.items()}
    trunk = getattr(model, "base_model", model)  # no logits
    with torch.no_grad(), attach(model, dictionaries, any_model=True) as tap:
        for passage in ids:
            given = torch.tensor(passage.astype(np.int64))[None]
            check_ids(given, model)
            trunk(input_ids=given.to(device), use_cache=False)
            fired, at = tap.firings, torch.arange(given.shape[1])
            here = torch.from_numpy(slot[passage])
            for site, (v, w) in atoms.items():
                writes = tap.writes[site[0]]
                left, right = (x.float().cpu() for x in writes.native(torch.zeros_like(at), at, site[1]))
                keys[site].index_add_(0, here, torch.nn.functional.normalize(left, dim=1))
                mine = (fired.layer == site[0]) & (fired.head == site[1])
                feature, position = fired.feature[mine].long().cpu(), fired.position[mine].long().cpu()
                cosine = _cosine(v[feature], w[feature], left[position], right[position])
                fine = cosine.isfinite()
                total[site][0].index_add_(0, feature[fine], cosine[fine])
                total[site][1].index_add_(0, feature[fine], torch.ones(int(fine.sum())))
            tap.clear()
            step()
    return {site: _table(v, keys[site][:-1], total[site], tokens, counts) for site, (v, _) in atoms.items()}


def _cosine(v, w, left, right):
    """`[n]` cosine of atoms `sum_r v w^T` (`[n, r, K]`, `[n, r, V]`) and writes `left right^T`."""
    inner = ((v * left[:, None]).sum(-1) * (w * right[:, None]).sum(-1)).sum(-1)
    size = ((v @ v.mT) * (w @ w.mT)).sum((-1, -2)).clamp_min(0).sqrt()
    return inner / (size * left.norm(dim=-1) * right.norm(dim=-1)).clamp_min(1e-30)


def _table(v, keys, total, tokens: np.ndarray, counts: np.ndarray) -> pa.Table:
    import torch

    from .scan import lists

    F = len(v)
    mean = keys / torch.from_numpy(counts).float()[:, None]
    side = torch.nn.functional.normalize(v[:, 0].nan_to_num(), dim=1)
    n = min(KEYS, len(tokens)) if v.shape[1] == 1 else 0  # of an atom of higher rank there is no one key side
    cosine = side @ mean.mT
    best = cosine.abs().topk(n, dim=1).indices
    of = np.repeat(np.arange(F), n)
    found = best.reshape(-1).numpy()
    sums, fired = (x.numpy() for x in total)
    with np.errstate(invalid="ignore"):
        average = (sums / fired).astype(np.float32)
    return pa.table({
        "cosine": average, "fired": fired.astype(np.int64), "key": lists(of, tokens[found].astype(np.int32), F),
        "key_cosine": lists(of, cosine.gather(1, best).reshape(-1).numpy(), F),
        "key_count": lists(of, counts[found].astype(np.int64), F),
    })  # fmt: skip
