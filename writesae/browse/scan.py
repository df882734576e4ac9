"""What a page says of a feature's firings, counted for all features of some sites at once and kept beside the store.

A page must not read the whole store, so this does, once: it draws firings at several levels of activation with what
the feature does around them, and counts activations, tokens, and which features of a site fire together. Sites are done
in groups, each with two readings of the store's shards; what is done is kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..collect.files import FIRINGS, TOKENS, checked, parquet, read_table, row_groups
from ..collect.modes import Columns, Selection
from ..collect.store import Store
from ..files import whole_file
from . import sources
from .contexts import BINS, LEVELS, ROWS, WIDTH

TOP, EACH = 8, 4
TOKENS_KEPT = TOGETHER_KEPT = 10
_PAIRS = 2**28  # bytes of counts of pairs held at once
_FEATURES = 2**16  # features done at once
_STEPS = 1024  # firings of a token that are paired; a damaged table may say that all are of one token
_DISTINCT, _COMPACT = 256, 2**22  # tokens kept of a feature while counting, and entries at which others are dropped


@dataclass(frozen=True)
class SiteOf:
    """A site of a store: its number, and F features."""

    layer: int
    head: int
    features: int

    @property
    def name(self) -> str:
        return f"L{self.layer}H{self.head}"


def groups(sites: Sequence[SiteOf]) -> Iterator[list[SiteOf]]:
    """Sites, in order, as many at once as the memory for their pairs allows."""
    held: list[SiteOf] = []
    for site in sites:
        more = [*held, site]
        if held and (sum(_pairs(s) * 4 for s in more) > _PAIRS or sum(s.features for s in more) > _FEATURES):
            yield held
            more = [site]
        held = more
    if held:
        yield held


def _pairs(site: SiteOf) -> int:
    """Entries of a site's table of pairs; 0 where it would be too large."""
    return site.features**2 if site.features**2 * 4 <= _PAIRS else 0


@dataclass
class _Part:
    """Firings of a group's sites in one shard, sorted by (key, passage, position).

    key: number among the group's features. passage: index among the shard's. place, token: of the token, -1 unknown.
    """

    columns: Columns
    passage: np.ndarray
    place: np.ndarray
    token: np.ndarray
    passages: int


class _Tokens:
    """The tokens of one shard, to be found by place."""

    def __init__(self, table: pa.Table):
        c = {name: table[name].to_numpy() for name in table.column_names}
        key = (c["document"].astype(np.int64) << 32) | c["row"]
        self._start = np.flatnonzero(np.r_[True, key[1:] != key[:-1]]) if len(key) else np.empty(0, np.int64)
        self._keys, self._token = key[self._start], c["token"]
        self._length = np.diff(np.r_[self._start, len(key)])
        self.order = np.argsort(self._keys, kind="stable")
        self._sorted = self._keys[self.order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, document, row, position) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(passage, place, token) int64 of firings, -1 where there is no such token."""
        if not len(self._keys) or not len(document):
            return tuple(np.full(len(document), -1, np.int64) for _ in range(3))  # type: ignore[return-value]
        key = (document.astype(np.int64) << 32) | row
        at = np.searchsorted(self._sorted, key).clip(max=len(self._keys) - 1)
        passage = self.order[at]
        known = (self._sorted[at] == key) & (position >= 0) & (position < self._length[passage])
        place = np.where(known, self._start[passage] + position, -1)
        return np.where(known, passage, -1), place, np.where(known, self._token[place].astype(np.int64), -1)


class Scan:
    """One group's sites, counted.

    Args:
        store: what is read. sites: of the group.
        largest: `[features of the group]` largest activation of each.
        step: called after every shard of each of the two readings; may raise an interrupt.
    """

    def __init__(self, store: Store, sites: Sequence[SiteOf], largest: np.ndarray, step: Callable[[], None]):
        self.store, self.sites, self.step = store, list(sites), step
        self.first = np.cumsum([0, *(site.features for site in sites)])
        self.total = int(self.first[-1])
        self.largest = np.where(np.isfinite(largest) & (largest > 0), largest, np.float32(0))
        self._codes = np.array([(site.layer << 32) | site.head for site in sites], np.int64)
        if (np.diff(self._codes) <= 0).any():
            raise ValueError("sites: expected them in rising (layer, head)")

    @property
    def counts_pairs(self) -> bool:
        """In the other modes only what was kept is there, of which nothing follows about pairs."""
        return self.store.mode == "all"

    def run(self) -> Iterator[tuple[SiteOf, pa.Table]]:
        """Reads the store; a table a site, one row a feature."""
        histogram = np.zeros((self.total, BINS), np.int64)
        tally = _Tally()
        top, drawn = Selection(TOP, self.total), Selection(EACH, self.total * len(LEVELS), "reservoir")
        pairs_first = np.cumsum([0, *(_pairs(site) for site in self.sites)])
        pairs = np.zeros(int(pairs_first[-1]) if self.counts_pairs else 0, np.uint32)
        for part in self._parts():
            c = part.columns
            share = c.activation / self.largest[c.key]
            np.add.at(histogram, (c.key, np.clip(share * BINS, 0, BINS - 1).astype(np.int64)), 1)
            known = part.token >= 0
            tally.add((c.key[known] << 32) | part.token[known])
            top.add(c)
            drawn.add(self._levelled(c, share))
            if len(pairs):
                self._pair(part, pairs, pairs_first)
            self.step()
        examples = self._around(top.kept, drawn.kept)
        tokens = tally.largest(TOKENS_KEPT)
        for i, site in enumerate(self.sites):
            together = pairs[pairs_first[i] : pairs_first[i + 1]]
            counts = histogram[self.first[i] : self.first[i + 1]].sum(1)
            yield (
                site,
                self._table(i, histogram, tokens, _together(together, site.features, counts, self._seen), examples),
            )

    @property
    def _seen(self) -> int:
        return max(1, sources.count(self.store.summary().get("tokens")))

    # ---- reading ------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[_Part]:
        if self.store.mode == "all":
            for piece in self.store.pieces:
                for firings, tokens in zip(piece.names("firings"), piece.names("tokens"), strict=True):
                    yield self._part([firings], [tokens])
            return
        names = [f"index/layer-{site.layer}-head-{site.head}.parquet" for site in self.sites]
        yield self._part(names, [name for piece in self.store.pieces for name in piece.names("tokens")])

    def _part(self, names: Sequence[str], token_names: Sequence[str]) -> _Part:
        c = Columns.cat([Columns.empty(), *(self._read(name) for name in names)])
        whole = [_Tokens(read_table(self.store.file(name), TOKENS)) for name in token_names] if len(c) else []
        passage, place, token = (np.full(len(c), -1, np.int64) for _ in range(3))
        passages = places = 0
        for found in whole:
            here = found.find(c.document, c.row, c.position)
            mine = here[0] >= 0
            passage[mine], place[mine] = here[0][mine] + passages, here[1][mine] + places
            token[mine] = here[2][mine]
            passages, places = passages + len(found), places + int(found._length.sum())
        known = passage >= 0  # what is on no token of the store is on no page
        order = np.lexsort((c.position, passage, c.key))
        order = order[known[order]]
        return _Part(c.take(order), passage[order], place[order], token[order], passages)

    def _read(self, name: str) -> Columns:
        """Firings of the group's sites in a table."""
        layers = self.sites[0].layer, self.sites[-1].layer
        with parquet(self.store.file(name), FIRINGS) as file:
            found = row_groups(file, layer=layers)
            table = checked(file.read_row_groups(found, use_threads=False)) if found else FIRINGS.empty_table()
        c = {column: table[column].to_numpy() for column in table.column_names}
        code = (c["layer"].astype(np.int64) << 32) | c["head"]
        at = np.searchsorted(self._codes, code).clip(max=len(self._codes) - 1)
        size = np.diff(self.first)[at]
        fine = (self._codes[at] == code) & (c["feature"] >= 0) & (c["feature"] < size)
        key = self.first[at] + c["feature"]
        # A number that no encoder gives (NaN, below zero) has no level.
        fine &= (c["activation"] > 0) & (c["activation"] <= self.largest[np.where(fine, key, 0)])
        fine &= (c["position"] >= 0) & (c["position"] < self.store.context)
        names = ("document", "row", "position", "activation")
        return Columns(key[fine], *(c[column][fine] for column in names))

    # ---- counting -----------------------------------------------------------------------------------------------

    def _levelled(self, c: Columns, share: np.ndarray) -> Columns:
        level = np.full(len(c), len(LEVELS) - 1)
        for number in range(len(LEVELS) - 1, 0, -1):
            level[share >= LEVELS[number][1]] = number
        key = c.key * len(LEVELS) + level
        order = np.argsort(key, kind="stable")
        return Columns(key, c.document, c.row, c.position, c.activation).take(order)

    def _pair(self, part: _Part, pairs: np.ndarray, first: np.ndarray) -> None:
        site = np.searchsorted(self.first, part.columns.key, side="right") - 1
        feature = part.columns.key - self.first[site]
        place = site * (part.place.max(initial=0) + 1) + part.place
        size = np.array([s.features if _pairs(s) else 0 for s in self.sites])
        order = np.argsort(place, kind="stable")  # features of a token rise
        order = order[size[site[order]] > 0]
        place, feature, site = place[order], feature[order], site[order]
        base = first[site] + feature * size[site]
        for step in range(1, min(_STEPS, len(place))):
            same = np.flatnonzero(place[step:] == place[:-step])
            if not len(same):
                break
            np.add.at(pairs, base[same] + feature[same + step], 1)

    def _around(self, top: Columns, drawn: Columns) -> dict[str, np.ndarray]:
        """The chosen firings by (key, level, -activation), each with the feature's activations around it."""
        level = np.r_[np.zeros(len(top), np.int64), drawn.key % len(LEVELS)]
        c = Columns.cat(
            [top, Columns(drawn.key // len(LEVELS), drawn.document, drawn.row, drawn.position, drawn.activation)]
        )
        chosen = _Chosen(c)
        order, offsets, values, counts = [], [], [], []
        for part in self._parts():
            passage = chosen.passage_of(part)
            here = np.flatnonzero(passage >= 0)
            width = self.store.context + 2 * WIDTH + 1
            if len(part.columns) and self.total * part.passages * width >= 2**62:
                raise ValueError("store: too many passages in one part for its contexts to be found")
            code = (part.columns.key * part.passages + part.passage) * width + part.columns.position
            mine = (c.key[here] * part.passages + passage[here]) * width + c.position[here]
            low = np.searchsorted(code, mine - WIDTH)
            size = np.searchsorted(code, mine + WIDTH, side="right") - low
            at = np.repeat(low - np.r_[0, np.cumsum(size)[:-1]], size) + np.arange(size.sum())
            order.append(here)
            counts.append(size)
            offsets.append((code[at] - np.repeat(mine, size)).astype(np.int8))
            values.append(part.columns.activation[at])
            self.step()
        joined = np.concatenate([np.empty(0, np.int64), *order])
        size = np.concatenate([np.empty(0, np.int64), *counts])
        start = np.cumsum(size) - size
        by = np.lexsort((c.position[joined], c.row[joined], c.document[joined], -c.activation[joined], level[joined], c.key[joined]))  # fmt: skip  # noqa: E501
        at = np.repeat(start[by] - (np.cumsum(size[by]) - size[by]), size[by]) + np.arange(size.sum())
        c, level = c.take(joined[by]), level[joined[by]]
        return {
            "key": c.key, "level": level.astype(np.uint8), "document": c.document, "row": c.row, "position": c.position,
            "activation": c.activation, "around": size[by].astype(np.int32),
            "offset": np.concatenate([np.empty(0, np.int8), *offsets])[at],
            "value": np.concatenate([np.empty(0, np.float32), *values])[at],
        }  # fmt: skip

    def _table(self, i: int, histogram, tokens, together, examples) -> pa.Table:
        """One row a feature of site i: lists of what belongs to it."""
        low, high = self.first[i], self.first[i + 1]
        of = examples["key"]
        a, b = np.searchsorted(of, (low, high))
        ends = np.cumsum(np.r_[0, examples["around"]])
        columns = {
            "histogram": lists(np.repeat(np.arange(high - low), BINS), histogram[low:high].reshape(-1), high - low)
        }
        token_key, token, count = tokens
        x, y = np.searchsorted(token_key, (low, high))
        columns["token"] = lists(token_key[x:y] - low, token[x:y].astype(np.int32), high - low)
        columns["token_count"] = lists(token_key[x:y] - low, count[x:y], high - low)
        columns["together"] = lists(together[0], together[1].astype(np.int32), high - low)
        columns["together_count"] = lists(together[0], together[2].astype(np.int64), high - low)
        for name in ("level", "document", "row", "position", "activation", "around"):
            columns[name] = lists(of[a:b] - low, examples[name][a:b], high - low)
        each = np.repeat(of[a:b] - low, examples["around"][a:b])
        for name in ("offset", "value"):
            columns[name] = lists(each, examples[name][ends[a] : ends[b]], high - low)
        return pa.table(columns)


class _Chosen:
    """The passages of chosen firings, to be found in a part."""

    def __init__(self, c: Columns):
        self._key = (c.document.astype(np.int64) << 32) | c.row

    def passage_of(self, part: _Part) -> np.ndarray:
        """`[n]` index of each firing's passage among the part's, -1 where it is in another."""
        key = (part.columns.document.astype(np.int64) << 32) | part.columns.row
        known, first = np.unique(key, return_index=True)
        if not len(known):
            return np.full(len(self._key), -1)
        at = np.searchsorted(known, self._key).clip(max=len(known) - 1)
        return np.where(known[at] == self._key, part.passage[first[at]], -1)


class _Tally:
    """Counts of (feature, token), of each feature the most frequent.

    Exact while a feature fires on at most `_DISTINCT` tokens; beyond, those met rarely may be forgotten between parts.
    """

    def __init__(self):
        self._code, self._count = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._held = 0

    def add(self, code: np.ndarray) -> None:
        """Counts `key << 32 | token`."""
        found = np.unique(code, return_counts=True)
        self._waiting.append(found)
        self._held += len(found[0])
        if self._held > _COMPACT:
            self._compact()

    def _compact(self) -> None:
        parts = [(self._code, self._count), *self._waiting]
        code, inverse = np.unique(np.concatenate([x for x, _ in parts]), return_inverse=True)
        count = np.bincount(inverse, np.concatenate([x for _, x in parts]), minlength=len(code)).astype(np.int64)
        self._waiting, self._held = [], 0
        self._code, self._count = code, count
        if len(code) > _COMPACT // 2:
            kept = np.sort(_largest(code >> 32, count, _DISTINCT))
            self._code, self._count = code[kept], count[kept]

    def largest(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(key, token, count) of the n most frequent tokens of each feature, most frequent first."""
        self._compact()
        kept = _largest(self._code >> 32, self._count, n)
        return self._code[kept] >> 32, self._code[kept] & 0xFFFFFFFF, self._count[kept]


def _largest(key: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n largest values of each key (sorted), by key and falling value."""
    order = np.lexsort((-value, key))
    start = np.flatnonzero(np.r_[True, np.diff(key[order]) != 0]) if len(key) else np.empty(0, np.int64)
    rank = np.arange(len(key)) - np.repeat(start, np.diff(np.r_[start, len(key)]))
    return order[rank < n]


def _together(pairs: np.ndarray, F: int, counts: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(feature, other, together) of the others that most surely fire together with each more often than by chance."""
    if not len(pairs):
        return tuple(np.empty(0, np.int64) for _ in range(3))  # type: ignore[return-value]
    both = pairs.reshape(F, F)
    parts = []
    for low in range(0, F, 512):
        here = both[low : low + 512] + both[:, low : low + 512].T
        here[np.arange(len(here)), np.arange(low, low + len(here))] = 0
        expected = counts[low : low + 512, None] * (counts[None] / tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(here > 0, here * np.log(here / np.maximum(expected, 1e-300)), 0.0)
        n = min(TOGETHER_KEPT, F)
        best = np.argpartition(-score, n - 1, axis=1)[:, :n]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(score, best, 1), axis=1, kind="stable"), 1)
        one, slot = np.nonzero(np.take_along_axis(score, best, 1) > 0)
        other = best[one, slot]
        parts.append((one + low, other, here[one, other].astype(np.int64)))
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))  # type: ignore[return-value]


def lists(of: np.ndarray, values: np.ndarray, size: int) -> pa.ListArray:
    """Values of features `of` (rising) as a list each."""
    ends = np.searchsorted(of, np.arange(size + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


def write(path: Path, table: pa.Table, about: dict, root: Path) -> None:
    """Writes a table of the cache with what it is of, whole or not at all."""
    table = table.replace_schema_metadata({"writesae": json.dumps(about)})
    with whole_file(path, root, "cache") as temporary:
        pq.write_table(
            table, temporary, row_group_size=ROWS, compression="zstd", compression_level=1, write_statistics=False
        )
