"""Which firings are kept: all, the top N of each feature, or a uniform sample of N of each feature.

Top N and the reservoir are one thing: keep the N firings of lowest priority. The top's priority is the activation
turned round; the reservoir's is a hash of the seed, the corpus and the firing's place, which is what drawing a random
number for each firing and keeping the N smallest comes to (Efraimidis and Spirakis, *Weighted random sampling with a
reservoir*, 2006, at equal weights). So a sample has no state but itself, does not depend on where a run was
interrupted, and what parts of a text kept is all that is needed to keep the same of the whole: who is among the N
smallest of all is among the N smallest of its part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .source import Site

_NONE = np.uint64(0xFFFFFFFF)


@dataclass
class Columns:
    """Firings of one shard, or kept ones. `key` `[n]` int64: number of the feature among those of all sites.

    document, row, position: `[n]` int32. activation: `[n]` float32, > 0.
    """

    key: np.ndarray
    document: np.ndarray
    row: np.ndarray
    position: np.ndarray
    activation: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def take(self, index) -> Columns:
        return Columns(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def by_activation(self) -> Columns:
        """Sorted by (feature, -activation, place), as an index holds them."""
        return self.take(np.lexsort((self.position, self.row, self.document, -self.activation, self.key)))

    def by_place(self) -> Columns:
        """Sorted by (feature, place), as a shard holds them."""
        return self.take(np.lexsort((self.position, self.row, self.document, self.key)))

    @classmethod
    def cat(cls, parts: list[Columns]) -> Columns:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))

    @classmethod
    def empty(cls) -> Columns:
        return cls(np.empty(0, np.int64), *(np.empty(0, np.int32) for _ in range(3)), np.empty(0, np.float32))


class Features:
    """Numbers the features of all sites 0, 1, 2, ... in (layer, head, feature) order."""

    def __init__(self, sites: list[Site]):
        self.sites = sites
        self.first = np.cumsum([0] + [site.features for site in sites])
        self.total = int(self.first[-1])
        self.layers = np.array([site.layer for site in sites], np.int32)
        self.heads = np.array([site.head for site in sites], np.int32)
        self._width = max(site.head for site in sites) + 1
        self._site = np.full((max(site.layer for site in sites) + 1) * self._width, -1)
        self._site[self.layers * self._width + self.heads] = np.arange(len(sites))

    def key(self, layer, head, feature) -> np.ndarray:
        """`[n]` int64 numbers of features given as columns."""
        return self.first[self._site[np.asarray(layer, np.int64) * self._width + head]] + feature

    def known(self, layer, head, feature) -> np.ndarray:
        """`key` of columns that come from a file.

        Raises:
            ValueError: a site or feature that this collection does not have.
        """
        if not len(layer):
            return np.empty(0, np.int64)
        inside = (layer >= 0) & (layer <= self.layers.max()) & (head >= 0) & (head < self._width)
        site = np.where(inside, self._site[np.where(inside, layer.astype(np.int64) * self._width + head, 0)], -1)
        last = np.diff(self.first)[site]
        if ((site < 0) | (feature < 0) | (feature >= last)).any():
            raise ValueError("expected firings of this collection's sites and features, got others")
        return self.first[site] + feature

    def split(self, key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(layer, head, feature) int32 of numbers."""
        site = np.searchsorted(self.first, key, side="right") - 1
        return self.layers[site], self.heads[site], (key - self.first[site]).astype(np.int32)


class Totals:
    """count, sum and max of the activation of every feature."""

    def __init__(self, total: int):
        self.count = np.zeros(total, np.int64)
        self.sum = np.zeros(total)
        self.max = np.zeros(total, np.float32)

    def add(self, key: np.ndarray, count: np.ndarray, sum: np.ndarray, max: np.ndarray) -> None:
        """Adds what one shard counted, one entry a feature."""
        self.count[key] += count
        self.sum[key] += sum
        self.max[key] = np.maximum(self.max[key], max)


def count(columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(key, count, sum, max) of the features among firings sorted by key."""
    key, start, number = np.unique(columns.key, return_index=True, return_counts=True)
    if not len(key):
        return key, number, np.zeros(0), np.zeros(0, np.float32)
    total = np.add.reduceat(columns.activation.astype(np.float64), start)
    return key, number, total, np.maximum.reduceat(columns.activation, start)


def top_priority(columns: Columns) -> np.ndarray:
    """`[n]` uint64 below 2^32, lowest for the largest activation (floats above zero order as their bits do)."""
    return _NONE - columns.activation.view(np.uint32).astype(np.uint64)


# Of one collection: (its first document's number, a number drawn from its corpus, 0 in stores without one).
ONE_CORPUS = ((0, 0),)


def random_priority(columns: Columns, seed: int, corpora=ONE_CORPUS) -> np.ndarray:
    """`[n]` uint64 below 2^32, from the seed, the corpus and the firing's place in it alone (splitmix64).

    Args:
        corpora: (number of the first document, salt) of each corpus, in the order of their documents. Where stores are
            merged, a firing so keeps the priority it had, and those of two corpora have nothing to do with each other.
    """
    first, salt = (np.array(x) for x in zip(*((a, b & 0xFFFFFFFFFFFFFFFF) for a, b in corpora), strict=True))
    at = np.searchsorted(first, columns.document, side="right") - 1
    x = np.uint64(seed) ^ salt.astype(np.uint64)[at]
    for part in (columns.key, columns.document - first[at], columns.row, columns.position):
        x = (x ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return x >> np.uint64(32)


class Selection:
    """The N firings of lowest priority of each feature so far. Ties go to the firing met first.

    Memory: 28 bytes for each of at most N x features firings.
    """

    def __init__(self, n: int, total: int, mode: str = "top", seed: int = 0, corpora=ONE_CORPUS):
        self.n, self.mode, self.seed, self.corpora = n, mode, seed, corpora
        self.kept = Columns.empty()
        self.priority = np.empty(0, np.uint64)
        self.bound = np.full(total, _NONE + np.uint64(1))  # a firing must be below to get in

    def add(self, columns: Columns) -> np.ndarray:
        """Offers firings, sorted by key and within one in document order, all after those offered before.

        Returns: `[n]` bool, which of them are now kept.
        """
        if self.mode == "top":
            priority = top_priority(columns)
        else:
            priority = random_priority(columns, self.seed, self.corpora)
        asked = np.flatnonzero(priority < self.bound[columns.key])
        new = np.zeros(len(columns), bool)
        if not len(asked):
            return new
        old = len(self.kept)
        merged = Columns.cat([self.kept, columns.take(asked)])
        merged_priority = np.concatenate([self.priority, priority[asked]])
        # One stable sort on one integer: feature first, then priority, then order met.
        order = np.argsort((merged.key.astype(np.uint64) << np.uint64(32)) | merged_priority, kind="stable")
        key = merged.key[order]
        start = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
        size = np.diff(np.r_[start, len(key)])
        rank = np.arange(len(key)) - np.repeat(start, size)
        order = order[rank < self.n]
        self.kept, self.priority = merged.take(order), merged_priority[order]
        full = start[size >= self.n]
        last = np.searchsorted(self.kept.key, key[full], side="right") - 1
        self.bound[key[full]] = self.priority[last]
        new[asked[order[order >= old] - old]] = True
        return new
