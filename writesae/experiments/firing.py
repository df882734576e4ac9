"""Which atom fires most at every token, and which of those firings are tested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    check_size(sae, site, layer, head)


def check_size(sae: SAE, site, layer: int, head: int) -> None:
    """Raises ValueError unless the site has that head, and a state of the dictionary's size."""
    if not 0 <= head < site.num_v_heads:
        raise ValueError(f"head: expected 0 <= head < {site.num_v_heads} at layer {layer}, got {head}")
    if (sae.K, sae.V) != (site.K, site.V):
        raise ValueError(
            f"sae: expected a dictionary of K={site.K}, V={site.V} for layer {layer} head {head}, got "
            f"K={sae.K}, V={sae.V}"
        )


@torch.no_grad()
def top_codes(writes: Writes, sae: SAE, head: int) -> tuple[Tensor, Tensor]:
    """The largest code of every token: (feature `[B, T]` int64, value `[B, T]`, 0 where nothing fires).

    Of a pursuit dictionary: the atom that alone comes nearest to the write, in the dictionary's metric.
    """
    device = writes.right.device
    if sae.sparsity == "pursuit":
        one = writes.head(head).memoryless()
        left, right = (x.squeeze(2).to(sae.mean.device) for x in (one.left, one.right))  # [B, T, R, *]
        nearest = sae.encode_writes(left, right, k=1)
        return nearest.indices[..., 0].to(device), nearest.values[..., 0].to(device)
    if sae.target == "write":
        writes = writes.memoryless()
    many = 1 if sae.threshold is None else min(_CANDIDATES, sae.F)
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
    one, T = writes.head(head), writes.shape[1]
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
    model, saes: Mapping[tuple[int, int], SAE], passages: Sequence[np.ndarray], progress: bool = False
) -> tuple[dict[tuple[int, int], np.ndarray], int]:
    """Looks at the split on which features are chosen.

    Args:
        passages: tokens `[n]` of each, int64.
    Returns:
        ({site: `[F]` tokens at which each feature had the largest code}, tokens).
    """
    counts = {site: np.zeros(sae.F, np.int64) for site, sae in saes.items()}
    for found, real, _ in stream(model, saes, passages, "selecting", progress):
        for (layer, head), sae in saes.items():
            feature, value = (x.cpu() for x in top_codes(found[layer], sae, head))
            counts[layer, head] += np.bincount(feature[(value > 0) & real].numpy(), minlength=sae.F)
    return counts, sum(map(len, passages))


@torch.no_grad()
def native_writes(
    model, saes: Mapping[tuple[int, int], SAE], passages: Sequence[np.ndarray], seed: int, progress: bool = False
) -> tuple[dict[tuple[int, int], tuple[Tensor, Tensor]], dict[tuple[int, int], Tensor]]:
    """What the model itself writes on other text: an untrained codebook of as many writes as there are atoms.

    Args:
        passages: tokens `[n]` of each, int64.
        seed: of the draw of tokens, evenly over all.
    Returns:
        ({site: unit factors `([F, K], [F, V])`}, {site: `[K, V]` mean write}).
    Raises:
        ValueError: fewer tokens than atoms.
    """
    tokens = sum(map(len, passages))
    largest = max(sae.F for sae in saes.values())
    if tokens < largest:
        raise ValueError(
            f"train: expected at least {largest:,} tokens, for a codebook of as many native writes as there are atoms, "
            f"got {tokens:,}"
        )
    total, books, place = {}, {}, {}
    for site, sae in saes.items():
        total[site] = torch.zeros(sae.K, sae.V, dtype=torch.float64)
        books[site] = torch.zeros(sae.F, sae.K), torch.zeros(sae.F, sae.V)
        draw = np.random.default_rng([seed, *site]).choice(tokens, sae.F, replace=False)
        place[site] = torch.full((tokens + 1,), -1)  # where in the book a token's write goes; last: padding
        place[site][torch.from_numpy(draw)] = torch.arange(sae.F)
    for found, real, number in stream(model, saes, passages, "native writes", progress):
        for (layer, head), (p, q) in books.items():
            row, column = (torch.arange(n) for n in real.shape)
            left, right = (x.cpu() for x in found[layer].native(row[:, None], column, head))
            total[layer, head] += torch.einsum("btk,btv->kv", left.double() * real[..., None], right.double())
            to = place[layer, head][number]
            p[to[to >= 0]], q[to[to >= 0]] = left[to >= 0].float(), right[to >= 0].float()
    unit = torch.nn.functional.normalize
    return (
        {site: (unit(p, dim=1), unit(q, dim=1)) for site, (p, q) in books.items()},
        {site: x / tokens for site, x in total.items()},
    )


def stream(
    model, sites: Iterable[tuple[int, int]], passages: Sequence[np.ndarray], what: str, progress: bool = False
) -> Iterator[tuple[dict[int, Writes], Tensor, Tensor]]:
    """({layer: writes}, mask `[b, T]` of real tokens, their numbers in `passages`, which is its length for padding)."""
    from ..progress import tqdm

    tokens = sum(map(len, passages))
    with (
        ModelStream(model, Passages(torch.from_numpy(passages[0])[None]), list(sites)) as source,
        tqdm(desc=what, total=tokens, unit=" tokens", unit_scale=True, disable=not progress) as bar,
    ):
        for ids, number in _padded(passages):
            source.passages = Passages(ids)
            for found, part in zip(source.writes(range(len(ids))), number.split(source.batch), strict=True):
                real = part < tokens
                yield found, real, part
                bar.update(int(real.sum()))


def _padded(passages: Sequence[np.ndarray], step: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, their numbers `[N, length]`) of passages of like length, padded right, which no earlier token sees.

    A token's number counts all tokens of all passages in order; padding has the number past the last.
    """
    first = np.cumsum([0, *map(len, passages)])
    groups: dict[int, list[int]] = {}
    for i, tokens in enumerate(passages):
        groups.setdefault(-(-len(tokens) // step), []).append(i)
    for _, group in sorted(groups.items(), reverse=True):
        ids = torch.zeros(len(group), max(len(passages[i]) for i in group), dtype=torch.int64)
        number = torch.full_like(ids, int(first[-1]))
        for at, i in enumerate(group):
            length = len(passages[i])
            ids[at, :length] = torch.from_numpy(np.asarray(passages[i], np.int64))
            number[at, :length] = torch.arange(first[i], first[i] + length)
        yield ids, number
