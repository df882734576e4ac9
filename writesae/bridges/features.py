"""What pages of features show, from a collection: where each fires most, samples at every level, a histogram, and (with
a model) the tokens that it promotes. Exporters put it into the words of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..browse.words import Words
from .stored import Passages, SiteFirings

BINS = 50  # of histograms, as many as sae-dashboard's


class Shown(NamedTuple):
    """A piece of text around a firing: of its tokens, which joined are the text, the feature's activation at each, and
    which is meant."""

    tokens: list[str]
    values: list[float]
    at: int


class Level(NamedTuple):
    """Firings with low <= activation <= high, which are a share of all of the feature, and some of them.

    `top` are the largest of all; the other levels part the range from 0 to the maximum evenly.
    """

    top: bool
    low: float
    high: float
    share: float
    shown: list[Shown]


class Logit(NamedTuple):
    """A token and by how much a feature raises its logit, in standard deviations over the vocabulary."""

    token: str
    value: float


@dataclass(frozen=True)
class Feature:
    """A feature that fired.

    Attributes:
        index: of the dictionary. count: firings. density: share of all tokens. levels: highest first.
        histogram: (middles, counts) of its activations, `BINS` each.
        promoted, suppressed: most first; None without a model.
        logits: (middles, counts) over the vocabulary, or None.
    """

    index: int
    count: int
    density: float
    levels: list[Level]
    histogram: tuple[list[float], list[int]]
    promoted: list[Logit] | None = None
    suppressed: list[Logit] | None = None
    logits: tuple[list[float], list[int]] | None = None


def pages(
    found: SiteFirings,
    where: Passages,
    words: Words,
    chosen: Sequence[int],
    top: int = 20,
    levels: int = 5,
    each: int = 5,
    width: int = 16,
    promotes: Callable[[list[int]], list[tuple]] | None = None,
) -> Iterator[Feature]:
    """What is shown of features that fired, in the order of `chosen`.

    Args:
        words: from token ids to text.
        chosen: features.
        top: firings with the largest activations. levels, each: even parts of the range from 0 to the maximum, and how
            many firings of each, evenly spaced by activation.
        width: tokens either side.
        promotes: from some features to (promoted, suppressed, logits) of each; None leaves them out.
    """
    tokens = int(where.lengths.sum())
    for start in range(0, len(chosen), 32):
        some = [int(x) for x in chosen[start : start + 32]]
        written = promotes(some) if promotes is not None else [(None, None, None)] * len(some)
        for feature, logits in zip(some, written, strict=True):
            at = found.of(feature)
            yield Feature(
                feature, at.stop - at.start, (at.stop - at.start) / max(tokens, 1),
                _levels(found, where, words, at, top, levels, each, width), histogram(found.activation[at]), *logits
            )  # fmt: skip


def histogram(values: np.ndarray, low: float | None = 0.0) -> tuple[list[float], list[int]]:
    """(middles, counts) of `BINS` even parts from `low` (None: the least) to the largest."""
    if not len(values):
        return [], []
    least = float(values.min()) if low is None else low
    counts, edges = np.histogram(values, BINS, (least, max(float(values.max()), least + 1e-12)))
    return [short(x) for x in (edges[:-1] + edges[1:]) / 2], counts.tolist()


def short(value) -> float:
    """Five digits of a number: pages and files show no more."""
    return float(f"{float(value):.5g}")


def _levels(
    found: SiteFirings, where: Passages, words: Words, at: slice, top: int, levels: int, each: int, width: int
) -> list[Level]:
    activation = found.activation[at]
    falling = np.argsort(-activation, kind="stable")  # the first in the text where equal
    place = found.passage[at] * where.tokens.shape[1] + found.position[at]

    def shown(one: int) -> Shown:
        passage, position = int(found.passage[at][one]), int(found.position[at][one])
        low, high = max(position - width, 0), min(position + width + 1, int(where.lengths[passage]))
        begin = passage * where.tokens.shape[1]
        values = np.zeros(high - low, np.float32)
        inside = slice(*np.searchsorted(place, (begin + low, begin + high)).tolist())
        values[place[inside] - begin - low] = activation[inside]
        return Shown(words.split(where.tokens[passage, low:high].tolist()), [short(x) for x in values], position - low)

    def level(order: np.ndarray, some: np.ndarray, low, high, is_top: bool) -> Level:
        pieces = [shown(int(x)) for x in some]
        return Level(is_top, short(low), short(high), len(order) / len(activation), pieces)

    best, made = falling[:top], []
    if len(best):
        made.append(level(best, best, activation[best[-1]], activation[best[0]], True))
    edges = np.linspace(0, float(activation.max()), levels + 1) if len(activation) else np.zeros(1)
    rising = activation[falling][::-1]
    for i in range(len(edges) - 1, 0, -1):
        last = len(rising) if i == len(edges) - 1 else np.searchsorted(rising, edges[i], side="left")
        order = falling[::-1][np.searchsorted(rising, edges[i - 1], side="left") : last][::-1]
        if len(order):
            some = order[np.unique(np.linspace(0, len(order) - 1, min(each, len(order))).round().astype(int))]
            made.append(level(order, some, edges[i - 1], edges[i], False))
    return made


def most_frequent(found: SiteFirings, most: int | None = None) -> list[int]:
    """Features that fired, rising; of more than `most` the most frequent ones."""
    counts = np.diff(found.bounds)
    fired = np.flatnonzero(counts)
    if most is not None and len(fired) > most:
        fired = np.sort(fired[np.argsort(-counts[fired], kind="stable")[:most]])
    return fired.tolist()


def promoter(model, words: Words, sae, layer: int, head: int, k: int = 10) -> Callable[[list[int]], list[tuple]]:
    """`promotes` of `pages`: by the direct path, as `writesae.atoms.promoted_tokens` says.

    Raises:
        ValueError: a dictionary with dense atoms, or a layer without an output projection.
    """
    from ..atoms import output_map, sides, to_logits

    through = output_map(model, layer, head)
    sae.atoms()  # refuses kinds that have none

    def promotes(features: list[int]) -> list[tuple]:
        values = np.stack([sides(sae, feature)[1].cpu().numpy() for feature in features])
        logits = to_logits(model, through.new_tensor(values) @ through)[:, : len(words)].double().cpu()
        scores = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(1e-300)
        made = []
        for score in scores:
            ends = score.topk(min(k, len(score))), (-score).topk(min(k, len(score)))
            named = [
                [Logit(words.token(int(i)), short(score[i])) for i in end.indices] for end in ends
            ]  # fmt: skip
            made.append((*named, histogram(score.numpy(), None)))
        return made

    return promotes
