"""`Atlas`: a store with its dictionaries, model and results, asked for what pages show.

    atlas = Atlas.open("runs/firings", sae="default")
    atlas.table.promoted
    atlas.feature(5, 3, 1258).as_dict()

What needs a pass over the store, the dictionaries or the model is made once and kept in a folder beside the store
(`STORE.browse`, or `cache`), a file a site, named by digests of all it was made of. After that a page reads a few row
groups: neither torch nor a model is loaded for one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..collect.files import numbers
from ..collect.store import Store
from ..files import cached_digests, sha256, whole_file
from ..untrusted import is_integer
from . import contexts, native, promoted, sources
from . import table as tables
from .links import link
from .results import Results
from .table import FeatureTable
from .words import Words

_VERSION = 1  # of what is kept


@dataclass(frozen=True)
class FeaturePage:
    """What a page says of one feature.

    Attributes:
        row: of the table, as plain data. link: its permanent name.
        levels: [{name, low, high, contexts}], each context {document, row, position, source, tokens (text, joined it
            is the text), activations (of this feature, a token), at (index of the firing token), activation}.
        histogram: {edges, counts} of all firings that the store holds.
        writes: {promoted, suppressed: [{token, id, value}], why: what is unknown, or None}.
        answers: {tokens: [{token, id, count}] it fires on most, keys: [{token, id, cosine, n (keys)}] nearest by key,
            neighbours: [{layer, head, feature, cosine}] atoms of the nearest key side}.
        neighbours: [{layer, head, feature, cosine}] nearest atoms of the site.
        cofiring: [{layer, head, feature, together, expected, lift, npmi}] of the site.
        replacement: what replacement tests found of it, an entry a run; None if none tested it.
    """

    row: dict
    link: str
    levels: list[dict]
    histogram: dict
    writes: dict
    answers: dict
    neighbours: list[dict]
    cofiring: list[dict]
    replacement: list[dict] | None

    def as_dict(self) -> dict:
        """Ready for JSON: no NaN, no infinity, no half surrogate pairs."""
        return _plain(asdict(self))


def _plain(x):
    if isinstance(x, dict):
        return {_plain(name): _plain(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x.encode("utf-8", "replace").decode() if isinstance(x, str) else x


class Atlas:
    """See the module. Made by `Atlas.open`.

    Attributes:
        store: the collection. sites: (layer, head) in order. sizes: features of each.
        folder: where what was made is kept. notes: what is unknown, and why.
    """

    def __init__(self, store: Store, sae, model, results: Iterable, cache):
        self.store = store
        self.sites: list[tuple[int, int]] = list(store.sites)
        self.sizes = [int(site[2]) for site in store.manifest["sites"]]
        if self.sites != sorted(set(self.sites)):
            raise ValueError(f"store: expected sites in rising order, each once, got {self.sites[:8]}")
        if len(self.sites) > 2**16:
            raise ValueError(f"store: expected at most {2**16:,} sites, got {len(self.sites):,}")
        self.first = np.cumsum([0, *self.sizes])
        self.results = Results(results)
        self.notes: list[str] = []
        self.model = sources.model(store, model)
        self.has_model = model is not None
        self.dictionaries = sources.dictionaries(store, sae, self.notes)
        self.folder = Path(f"{store.path}.browse") if cache is None else Path(cache)
        self._token_rows: dict[int, str] = {}

    @classmethod
    def open(
        cls,
        store: str | Path,
        sae: str | Path | None = None,
        model: str | Path | None = None,
        results: Iterable[str | Path] = (),
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> Atlas:
        """Opens a finished collection, making first what is not there yet; the same call goes on after an interrupt.

        Args:
            store: the folder that `writesae collect` filled.
            sae: a folder of dictionaries, one a site, or "default", the embedded ones. None: those, if the store is of
                them; otherwise nothing is said of what atoms write.
            model: folder or name of the model, for `live` and for promoted tokens. None: no `live`, and promoted tokens
                by the store's model if it is on this machine.
            results: folders of `writesae replace` and `writesae paper partition`.
            cache: the folder for what is made; None: `STORE.browse`.
            progress: show a bar.

        Raises:
            ValueError: no such store, an unfinished or damaged one, dictionaries of others, results of another kind.
        """
        opened = Store(store)
        if not opened.complete:
            raise ValueError(f"store: {opened.path} is not finished: run the same `writesae collect` again")
        atlas = cls(opened, sae, model, results, cache)
        from .build import build

        build(atlas, progress)
        return atlas

    # ---- what is known ---------------------------------------------------------------------------------------------

    @cached_property
    def info(self) -> dict:
        """title, model, tokenizer, sites, F (largest), features, firings, tokens, documents, mode, has_model, corpus
        (its digest), has_dictionaries, has_promoted, notes (what is unknown, and why)."""
        manifest, summary = self.store.manifest, self.store.summary()
        named = sources.mapping(manifest.get("named"))
        corpus = sources.mapping(manifest.get("corpus"))
        return _plain({
            "title": self.store.path.name, "model": sources.text(named.get("model")),
            "tokenizer": sources.text(named.get("tokenizer")),
            "sites": [list(site) for site in self.sites], "F": max(self.sizes), "features": int(self.first[-1]),
            **{name: sources.count(summary.get(name)) for name in ("firings", "tokens", "documents")},
            "mode": self.store.mode, "context": self.store.context, "has_model": self.has_model,
            "corpus": sources.text(corpus.get("sha256")), "has_dictionaries": bool(self.dictionaries),
            "has_promoted": self.model is not None and bool(self.dictionaries), "partitions": list(self._partitions),
            "cofiring": self.store.mode == "all", "notes": self._told,
        })  # fmt: skip

    @property
    def _told(self) -> list[str]:
        told = [*self.notes, *self._about.get("why", [])]
        if self.store.mode == "top":
            told.append("the store keeps the largest firings of a feature alone: levels and histogram are of those")
        if self.store.mode == "reservoir":
            told.append("the store keeps a sample of a feature's firings: levels and histogram are of that")
        return told

    @cached_property
    def table(self) -> FeatureTable:
        """All features."""
        return tables.read(self.table_path, self.sites, self._partitions, self.words.tokens())

    @property
    def partitions(self) -> tuple[str, ...]:
        return self._partitions

    def token(self, token: int) -> str:
        """Text of a token by itself."""
        return self.words.token(token)

    def feature(self, layer: int, head: int, feature: int) -> FeaturePage:
        """A feature's page.

        Raises:
            ValueError: no such site or feature; a damaged file, by name.
        """
        site = self.site(layer, head)
        F = self.sizes[site]
        if not is_integer(feature, 0, F - 1):
            raise ValueError(f"feature: expected 0 <= feature < {F}, got {feature!r}")
        columns = tables.read_row(self.table_path, int(self.first[site]) + feature)
        row = tables.row_of(columns, self)
        if (row["layer"], row["head"], row["feature"]) != (layer, head, feature):
            raise ValueError(f"cache: {self.table_path} is of another store; remove it")
        largest = row["max"] or 0.0
        found = contexts.read_scan(self.scan_path(site), feature)
        writes, atoms = self._writes(site, feature)
        pairs = []
        if len(found["together"]):
            pairs = contexts.cofiring(found, row["count"], self._counts(site), self.tokens_seen, (layer, head))
        counted = zip(found["token"].tolist(), found["token_count"].tolist(), strict=True)
        return FeaturePage(
            row=row, link=link(layer, head, feature),
            levels=contexts.levels(self.store, self.words, found, largest),
            histogram=contexts.histogram(found, largest), writes=writes,
            answers={
                "tokens": [{"token": self.token(t), "id": t, "count": n} for t, n in counted],
                "keys": self._keys(site, feature), "neighbours": atoms["key_neighbour"],
            },
            neighbours=atoms["neighbour"], cofiring=pairs, replacement=self.results.of(layer, head, feature),
        )  # fmt: skip

    @cached_property
    def live(self):
        """`Live`, the model itself with the dictionaries attached; None if no model was given.

        Raises:
            ValueError: no dictionaries, or a model that cannot be loaded.
        """
        if not self.has_model:
            return None
        from .live import Live

        return Live.load(self.model, self.load_dictionaries())

    def load_dictionaries(self) -> dict[tuple[int, int], Any]:
        """{(layer, head): SAE} of the sites."""
        return {site: self.dictionary(site) for site in self.dictionaries}

    def dictionary(self, site: tuple[int, int]):
        return sources.load(self.dictionaries[site], site, self._F(site))

    def _F(self, site: tuple[int, int]) -> int:
        return self.sizes[self.sites.index(site)]

    def site(self, layer: int, head: int) -> int:
        try:
            return self.sites.index((layer, head))
        except ValueError:
            some = ", ".join(f"{a}:{b}" for a, b in self.sites[:8]) + (", ..." if len(self.sites) > 8 else "")
            raise ValueError(f"layer, head: expected a site of this store ({some}), got {layer}:{head}") from None

    def _writes(self, site: int, feature: int) -> tuple[dict, dict]:
        layer, head = self.sites[site]
        if self.sites[site] not in self.dictionaries:
            why = f"no dictionary of layer {layer} head {head}"
            return {"promoted": [], "suppressed": [], "why": why}, {"neighbour": [], "key_neighbour": []}
        path = self.atoms_path(site)
        found = contexts.read_lists(path, feature, promoted.LISTS)
        writes: dict[str, Any] = {}
        for name in ("promoted", "suppressed"):
            pairs = zip(found[name].tolist(), found[f"{name}_value"].tolist(), strict=False)
            writes[name] = [{"token": self.token(i), "id": i, "value": x} for i, x in pairs]
        writes["why"] = None if writes["promoted"] else contexts.about(path).get("why", {}).get("promoted", "not known")
        atoms = {}
        for name in ("neighbour", "key_neighbour"):
            pairs = zip(found[name].tolist(), found[f"{name}_value"].tolist(), strict=False)
            atoms[name] = [{"layer": layer, "head": head, "feature": i, "cosine": x} for i, x in pairs]
        return writes, atoms

    def _keys(self, site: int, feature: int) -> list[dict]:
        """Tokens whose keys lie nearest to the key side: measured here, else by a run."""
        layer, head = self.sites[site]
        path = self.native_path(site)
        if path is None or not path.is_file():
            return self.results.keys(layer, head, feature)
        found = contexts.read_lists(path, feature, native.LISTS)
        triples = zip(*(found[name].tolist() for name in native.LISTS), strict=False)
        return [{"token": self.token(i), "id": i, "cosine": x, "n": n} for i, x, n in triples]

    def _counts(self, site: int) -> np.ndarray:
        """`[F]` firings of a site's features."""
        if not hasattr(self, "_all_counts"):
            found = self.store.counts()
            if len(found) != self.first[-1]:
                raise ValueError(f"store: {self.store.path}: expected {self.first[-1]} rows in features.parquet")
            self._all_counts = numbers(found["count"])
        return self._all_counts[self.first[site] : self.first[site + 1]]

    @cached_property
    def tokens_seen(self) -> int:
        return sources.count(self.store.summary().get("tokens"))

    # ---- what is kept ----------------------------------------------------------------------------------------------

    @cached_property
    def store_digest(self) -> str:
        names = ("manifest.json", "summary.json")
        return _digest([_VERSION, *(sha256(self.store.path / name) for name in names)])

    def scan_path(self, site: int) -> Path:
        layer, head = self.sites[site]
        return self.folder / f"firings-{self.store_digest}" / f"L{layer}H{head}.parquet"

    def atoms_path(self, site: int) -> Path:
        layer, head = self.sites[site]
        return self.folder / f"atoms-{self._atoms_digests[site]}" / f"L{layer}H{head}.parquet"

    def native_path(self, site: int) -> Path | None:
        """None without a dictionary or a model."""
        if self.model is None or self.sites[site] not in self.dictionaries:
            return None
        layer, head = self.sites[site]
        digest = _digest([self.store_digest, self._atoms_digests[site]])
        return self.folder / f"native-{digest}" / f"L{layer}H{head}.parquet"

    @cached_property
    def _atoms_digests(self) -> list[str | None]:
        """Of each site's dictionary, the model and the tokenizer; None without a dictionary."""
        files = [(path, str(path)) for folder in self.dictionaries.values() for path in sources.files(folder)]
        model = sources.model_files(self.model)
        known = cached_digests([*files, *((path, str(path)) for path in model)])
        of_model = [self.model if not model else None, *(known[str(path)] for path in model)]
        found: list[str | None] = []
        for site in self.sites:
            folder = self.dictionaries.get(site)
            dictionary = [known[str(path)] for path in sources.files(folder)] if folder else []
            found.append(_digest([_VERSION, dictionary, of_model, len(self.words)]) if folder else None)
        return found

    @cached_property
    def table_path(self) -> Path:
        results = [sha256(path) for path in self.results.files()]
        natives = [path.name for i in range(len(self.sites)) if (path := self.native_path(i)) and path.is_file()]
        return self.folder / f"table-{_digest([self.store_digest, self._atoms_digests, natives, results])}.parquet"

    @cached_property
    def _about(self) -> dict:
        return tables.about(self.table_path) or {}

    @cached_property
    def _partitions(self) -> tuple[str, ...]:
        found = self._about.get("partitions")
        return tables.BY_COSINE if found == list(tables.BY_COSINE) else tables.BY_DENSITY

    @cached_property
    def words(self) -> Words:
        """The vocabulary, as bytes."""
        path = self.folder / f"words-{self.store_digest}.parquet"
        try:
            column = pq.ParquetFile(path).read(use_threads=False)["bytes"].combine_chunks()
            if pa.types.is_binary(column.type):
                return Words(column)
        except (pa.ArrowException, OSError, KeyError):
            pass
        made = sources.vocabulary(self.store)
        with whole_file(path, self.folder, "cache") as temporary:
            pq.write_table(pa.table({"bytes": made.array()}), temporary, compression="lz4", use_dictionary=False)
        return made


def _digest(of) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
