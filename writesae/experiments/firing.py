"""Which atom fires most at every token, and which of those firings are tested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..ops import encode
from ..sae import SAE
from ..sae.stream import ModelStream, Passages
from ..writes import Writes

_CANDIDATES = 32


def check_sae(sae: SAE, site, layer: int, head: int) -> None:
    """Raises ValueError unless a dictionary has outer-product atoms of the size of the site's state."""
    sae.atoms()  # says which kinds have none
    if not 0 <= head < site.num_v_heads:
        raise ValueError(f"head: expected 0 <= head < {site.num_v_heads} at layer {layer}, got {head}")
    if (sae.K, sae.V) != (site.K, site.V):
        raise ValueError(
            f"sae: expected a dictionary of K={site.K}, V={site.V} for layer {layer} head {head}, got "
            f"K={sae.K}, V={sae.V}"
        )


@torch.no_grad()
def top_codes(writes: Writes, sae: SAE, head: int) -> tuple[Tensor, Tensor]:
    """The largest code of every token: (feature `[B, T]` int64, value `[B, T]`, 0 where nothing fires)."""
    many = 1 if sae.threshold is None else min(_CANDIDATES, sae.F)
    device = writes.right.device
    if sae.bilinear_encoder:
        v, w, b = (x.detach().to(device) for x in sae.encoder())
        codes = encode(writes.to(torch.float32), v[None], w[None], b[None], k=many, heads=[head])
        values, indices = codes.values[:, :, 0], codes.indices[:, :, 0]
    else:
        values, indices = _top_of_states(writes, sae, head, many)
    if sae.threshold is not None:
        # Thresholds are an atom's own: of the largest pre-activations, the first that passes is the largest code.
        passes = values > sae.threshold.to(device)[indices]
        first = passes.to(torch.uint8).argmax(-1, keepdim=True)
        values, indices = (values * passes).gather(-1, first), indices.gather(-1, first)
    return indices[..., 0], values[..., 0]


def _top_of_states(writes: Writes, sae: SAE, head: int, many: int) -> tuple[Tensor, Tensor]:
    """Largest pre-activations of a dense encoder, from one head's states, a few tokens at a time."""
    B, T, H, _, _ = writes.shape
    key_head = head // (H // writes.left.shape[2])
    start = None if writes.initial_state is None else writes.initial_state[:, head : head + 1]
    one = replace(
        writes, decay=writes.decay[:, :, head : head + 1], left=writes.left[:, :, key_head : key_head + 1],
        right=writes.right[:, :, head : head + 1], beta=None, initial_state=start,
    )  # fmt: skip
    found = []
    for lo in range(0, T, 64):
        states = one.states(range(lo, min(lo + 64, T)))[:, :, 0]  # [B, t, K, V]
        found.append(sae.preactivations(states.float().to(sae.mean.device)).topk(many, -1))
    values, indices = (torch.cat(x, 1).to(writes.right.device) for x in zip(*found, strict=True))
    return values.relu(), indices


def sample(
    feature: Tensor,  # [P, T]
    value: Tensor,  # [P, T]
    lengths: Sequence[int],
    names: Sequence[str],
    each: int,
    horizon: int,
    allowed: np.ndarray | None,
    seed: int,
) -> list[tuple[int, int]]:
    """Up to `each` firings a passage, drawn evenly over its tokens: (passage, position), sorted.

    A passage's first token (it has no earlier state) and its last `horizon` (they cannot be followed) are left out. The
    draw depends on the seed and the passage's name only, not on the batch it is in.
    """
    found = []
    for p, (length, name) in enumerate(zip(lengths, names, strict=True)):
        fires = value[p, :length].numpy() > 0
        if allowed is not None:
            fires &= allowed[feature[p, :length].numpy()]
        fires[:1] = False
        fires[max(length - horizon, 0) :] = False
        at = np.flatnonzero(fires)
        if len(at) > each:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
            draw = np.random.Generator(np.random.Philox(int.from_bytes(digest, "big")))
            at = np.sort(draw.choice(at, each, replace=False))
        found += [(p, int(t)) for t in at]
    return found


def survey(
    model, saes: dict[tuple[int, int], SAE], passages: Sequence[np.ndarray], progress: bool = False
) -> tuple[dict[tuple[int, int], np.ndarray], dict[tuple[int, int], Tensor], int]:
    """Looks at the split on which features are chosen.

    Args:
        passages: tokens `[n]` of each, int64.
    Returns:
        ({site: `[F]` tokens at which each feature had the largest code}, {site: `[K, V]` mean native write}, tokens).
    """
    from tqdm import tqdm

    counts = {site: np.zeros(sae.F, np.int64) for site, sae in saes.items()}
    total = {site: torch.zeros(sae.K, sae.V, dtype=torch.float64) for site, sae in saes.items()}
    tokens = sum(map(len, passages))
    with (
        ModelStream(model, Passages(torch.from_numpy(passages[0])[None]), list(saes)) as stream,
        tqdm(desc="selecting", total=tokens, unit=" tokens", unit_scale=True, disable=not progress) as bar,
    ):
        for ids, real in _padded(passages):
            stream.passages = Passages(ids)
            for found, mask in zip(stream.writes(range(len(ids))), real.split(stream.batch), strict=True):
                for (layer, head), sae in saes.items():
                    writes = found[layer]
                    feature, value = (x.cpu() for x in top_codes(writes, sae, head))
                    counts[layer, head] += np.bincount(feature[(value > 0) & mask].numpy(), minlength=sae.F)
                    group = writes.right.shape[2] // writes.left.shape[2]
                    left, right = writes.left[:, :, head // group, 0].double(), writes.right[:, :, head, 0].double()
                    left = left * mask.to(left.device)[..., None]
                    total[layer, head] += torch.einsum("btk,btv->kv", left, right).cpu()
                bar.update(int(mask.sum()))
    return counts, {site: x / tokens for site, x in total.items()}, tokens


def _padded(passages: Sequence[np.ndarray], step: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, mask `[N, length]`) of the passages of like length, padded right, which no earlier token sees."""
    groups: dict[int, list[np.ndarray]] = {}
    for tokens in passages:
        groups.setdefault(-(-len(tokens) // step), []).append(tokens)
    for _, group in sorted(groups.items(), reverse=True):
        ids = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, tokens in enumerate(group):
            ids[i, : len(tokens)] = torch.from_numpy(np.asarray(tokens, np.int64))
            mask[i, : len(tokens)] = True
        yield ids, mask
