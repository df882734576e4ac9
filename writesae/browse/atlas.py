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
from tqdm import tqdm

from ..collect.store import Store
from ..files import cached_digests, make_folder, sha256, whole_file
from ..untrusted import first_line, is_integer
from . import contexts, promoted, sources
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
        answers: {tokens: [{token, id, count}] it fires on most, keys: [{token, cosine}] nearest by key, neighbours:
            [{layer, head, feature, cosine}] atoms of the nearest key side}.
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
        atlas._build(progress)
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
            **{name: int(summary.get(name, 0)) for name in ("firings", "tokens", "documents")},
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
        return tables.read(self._table_path, self.sites, self._partitions, self.words.tokens())

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
        site = self._site(layer, head)
        F = self.sizes[site]
        if not is_integer(feature, 0, F - 1):
            raise ValueError(f"feature: expected 0 <= feature < {F}, got {feature!r}")
        columns = tables.read_row(self._table_path, int(self.first[site]) + feature)
        row = tables.row_of(columns, self)
        if (row["layer"], row["head"], row["feature"]) != (layer, head, feature):
            raise ValueError(f"cache: {self._table_path} is of another store; remove it")
        largest = row["max"] or 0.0
        found = contexts.read_scan(self._scan_path(site), feature)
        writes, atoms = self._writes(site, feature)
        pairs = []
        if len(found["together"]):
            pairs = contexts.cofiring(found, row["count"], self._counts(site), self._tokens_seen, (layer, head))
        counted = zip(found["token"].tolist(), found["token_count"].tolist(), strict=True)
        return FeaturePage(
            row=row, link=link(layer, head, feature),
            levels=contexts.levels(self.store, self.words, found, largest),
            histogram=contexts.histogram(found, largest), writes=writes,
            answers={
                "tokens": [{"token": self.token(t), "id": t, "count": n} for t, n in counted],
                "keys": self.results.keys(layer, head, feature), "neighbours": atoms["key_neighbour"],
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
        return {site: sources.load(path, site, self._F(site)) for site, path in self.dictionaries.items()}

    def _F(self, site: tuple[int, int]) -> int:
        return self.sizes[self.sites.index(site)]

    def _site(self, layer: int, head: int) -> int:
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
        path = self._atoms_path(site)
        found = contexts.read_lists(path, feature, promoted.LISTS)
        writes: dict[str, Any] = {}
        for name in ("promoted", "suppressed"):
            pairs = zip(found[name].tolist(), found[f"{name}_value"].tolist(), strict=False)
            writes[name] = [{"token": self.token(i), "id": i, "value": x} for i, x in pairs]
        writes["why"] = None if writes["promoted"] else _about(path).get("why", {}).get("promoted", "not known")
        atoms = {}
        for name in ("neighbour", "key_neighbour"):
            pairs = zip(found[name].tolist(), found[f"{name}_value"].tolist(), strict=False)
            atoms[name] = [{"layer": layer, "head": head, "feature": i, "cosine": x} for i, x in pairs]
        return writes, atoms

    def _counts(self, site: int) -> np.ndarray:
        """`[F]` firings of a site's features."""
        if not hasattr(self, "_all_counts"):
            found = self.store.counts()
            if len(found) != self.first[-1]:
                raise ValueError(f"store: {self.store.path}: expected {self.first[-1]} rows in features.parquet")
            self._all_counts = np.from_dlpack(found["count"].combine_chunks())
        return self._all_counts[self.first[site] : self.first[site + 1]]

    @cached_property
    def _tokens_seen(self) -> int:
        return int(self.store.summary().get("tokens", 0))

    # ---- what is kept ----------------------------------------------------------------------------------------------

    @cached_property
    def _store_digest(self) -> str:
        names = ("manifest.json", "summary.json")
        return _digest([_VERSION, *(sha256(self.store.path / name) for name in names)])

    def _scan_path(self, site: int) -> Path:
        layer, head = self.sites[site]
        return self.folder / f"firings-{self._store_digest}" / f"L{layer}H{head}.parquet"

    def _atoms_path(self, site: int) -> Path:
        layer, head = self.sites[site]
        return self.folder / f"atoms-{self._atoms_digests[site]}" / f"L{layer}H{head}.parquet"

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
    def _table_path(self) -> Path:
        results = [sha256(path) for path in self.results.files()]
        return self.folder / f"table-{_digest([self._store_digest, self._atoms_digests, results])}.parquet"

    @cached_property
    def _about(self) -> dict:
        return tables.about(self._table_path) or {}

    @cached_property
    def _partitions(self) -> tuple[str, ...]:
        found = self._about.get("partitions")
        return tables.BY_COSINE if found == list(tables.BY_COSINE) else tables.BY_DENSITY

    @cached_property
    def words(self) -> Words:
        """The vocabulary, as bytes."""
        path = self.folder / f"words-{self._store_digest}.parquet"
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

    # ---- making it -------------------------------------------------------------------------------------------------

    def _build(self, progress: bool) -> None:
        try:
            make_folder(self.folder, argument="cache")
            self.words  # noqa: B018 - made where it is not there
            self._build_scans(progress)
            self._build_atoms(progress)
            known = tables.about(self._table_path)
            if known is None or known["rows"] != self.first[-1]:
                self._build_table()
        except PermissionError as error:
            raise ValueError(
                f"cache: nothing can be written to {self.folder} ({error.strerror}): name another folder with cache"
            ) from error

    def _build_scans(self, progress: bool) -> None:
        left = [i for i in range(len(self.sites)) if not self._scan_path(i).is_file()]
        if not left:
            return
        from . import scan

        largest = np.from_dlpack(self.store.counts()["max"].combine_chunks())
        asked = {self.sites[i]: scan.SiteOf(*self.sites[i], self.sizes[i]) for i in left}
        parts = len(list(scan.groups(list(asked.values()))))
        shards = sum(piece.shards for piece in self.store.pieces) if self.store.mode == "all" else 1
        make_folder(self.folder, f"firings-{self._store_digest}", argument="cache")
        with tqdm(total=2 * parts * shards, desc="reading the store", unit="shard", disable=not progress) as bar:
            for group in scan.groups(list(asked.values())):
                mine = np.concatenate([largest[self._slice((s.layer, s.head))] for s in group])
                for site, made in scan.Scan(self.store, group, mine, bar.update).run():
                    scan.write(self._scan_path(self._site(site.layer, site.head)), made, {}, self.folder)

    def _slice(self, site: tuple[int, int]) -> slice:
        at = self.sites.index(site)
        return slice(int(self.first[at]), int(self.first[at + 1]))

    def _build_atoms(self, progress: bool) -> None:
        left = [
            i for i, site in enumerate(self.sites) if site in self.dictionaries and not self._atoms_path(i).is_file()
        ]
        if not left:
            return
        from . import scan

        model = None
        if self.model is not None:
            from ..models import load

            model, _ = load(self.model)
        for i in tqdm(left, desc="what atoms write", unit="site", disable=not progress):
            site = self.sites[i]
            sae = sources.load(self.dictionaries[site], site, self.sizes[i])
            sources.require_own(self.store, sae, site)
            if model is not None:
                from ..models.identity import require_same_model

                require_same_model(model, {site: sae}, False, str(self.model))
            made, why = promoted.facts(sae, model, site[0], site[1], len(self.words))
            path = self._atoms_path(i)
            make_folder(self.folder, path.parent.name, argument="cache")
            scan.write(path, made, {"why": why}, self.folder)

    def _build_table(self) -> None:
        n = int(self.first[-1])
        found = self.store.counts()
        if len(found) != n:
            raise ValueError(f"store: {self.store.path}: expected {n} rows in features.parquet, got {len(found)}")
        columns = {name: np.from_dlpack(found[name].combine_chunks()) for name in ("count", "sum", "max")}
        count: np.ndarray = columns["count"]
        win_rate, cosine = self.results.columns(self.sites, self.first)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            density = (count / max(1, self._tokens_seen)).astype(np.float32)
            mean = np.where(count > 0, columns["sum"] / count, 0).astype(np.float32)
        partition, names = tables.partitioned(count, density, cosine)
        tokens = {
            name: np.full((n, tables.SHOWN), tables.UNKNOWN, np.uint32) for name in ("promoted", "suppressed", "token")
        }
        why: dict[str, None] = {}
        for i, site in enumerate(self.sites):
            rows = slice(int(self.first[i]), int(self.first[i + 1]))
            _fill(tokens["token"][rows], self._scan_path(i), "token")
            if site in self.dictionaries:
                for name in ("promoted", "suppressed"):
                    _fill(tokens[name][rows], self._atoms_path(i), name)
                for what, reason in _about(self._atoms_path(i)).get("why", {}).items():
                    why[f"{what}: {reason}"] = None
        made = FeatureTable(
            np.repeat(np.arange(len(self.sites), dtype=np.uint16), self.sizes),
            np.concatenate([np.arange(F, dtype=np.uint32) for F in self.sizes]), count, density, mean,
            columns["max"], win_rate, cosine, partition, tokens["promoted"], tokens["suppressed"], tokens["token"],
            self.sites, names, (),
        )  # fmt: skip
        made.save(self._table_path, {"why": list(why)[:20]}, self.folder)


def _fill(out: np.ndarray, path: Path, name: str) -> None:
    """Puts the first tokens of every feature of a site's table into `[F, SHOWN]`."""
    try:
        with pq.ParquetFile(path) as file:
            column = file.read([name], use_threads=False)[name].combine_chunks()
        offsets, values = (np.from_dlpack(x) for x in (column.offsets, column.values))
        size = np.diff(offsets)
        if len(size) != len(out):
            raise ValueError(f"expected {len(out)} rows, got {len(size)}")
        for slot in range(out.shape[1]):
            some = size > slot
            out[some, slot] = values[offsets[:-1][some] + slot]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"cache: {path} cannot be read: {first_line(error)}; remove it") from error


def _about(path: Path) -> dict:
    try:
        with pq.ParquetFile(path) as file:
            found = json.loads((file.schema_arrow.metadata or {}).get(b"writesae", b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(of) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
