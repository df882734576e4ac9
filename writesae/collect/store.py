"""`Store`: asks a collection's folder what fired where. Needs pyarrow and numpy, no model and no torch.

Names, as in `Firings`: `document` counts the corpus's documents from 0, `row` the passages of a document, `position`
the tokens of a passage. Token `row * context + position` of the document (its beginning-of-text token included) is
meant. The same columns stand in every Parquet file, for any other reader: `pandas.read_parquet(store / "firings")`
reads all firings of mode "all", `store / "index"` those of the other modes (and the top ones of mode "all"). A store
that several workers filled has its firings in `units/*/firings`, as `docs/store.md` says.

A file is compared with its digest when it is first needed, so that a damaged one is named rather than believed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import problem, read_json, read_sealed, sha256
from ..untrusted import is_integer
from . import manifest
from .files import DOCUMENTS, FEATURES, FIRINGS, TOKENS, checked, parquet, read_table, row_groups, shifted
from .marks import entries_sound, marked, part_name, shard_marker, shard_numbers
from .unit_marks import unit_marker, unit_numbers

_PLACE = ("document", "row", "position")


@dataclass(frozen=True)
class Context:
    """A firing with the tokens around it, all of one passage.

    Attributes:
        document, row, position: where it fired; source: the document's name.
        activation: how much.
        tokens: `[n]` int32 token ids; `tokens[at]` is the one it fired on.
        before, token, after: the text, or None without a tokenizer.
    """

    document: int
    row: int
    position: int
    source: str | None
    activation: float
    tokens: np.ndarray
    at: int
    before: str | None
    token: str | None
    after: str | None


@dataclass(frozen=True)
class Piece:
    """Shards of one folder: of the whole store (""), or of a unit ("units/000000-…/")."""

    folder: str
    shards: int
    passages: int
    shard_passages: int
    unit: int | None = None

    def names(self, table: str) -> list[str]:
        return [f"{self.folder}{table}/{part_name(number)}" for number in range(self.shards)]


class Store:
    """A folder that `writesae collect` made.

    Attributes:
        path: the folder. manifest: what was collected. mode: "all", "top" or "reservoir". context: tokens a passage.
        sites: (layer, head) in order. complete: whether the collection ended.

    Raises:
        ValueError: not such a folder, or an unfinished one of a mode that stores its firings at the end.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.manifest = manifest.read(self.path / "manifest.json")
        except ValueError as error:
            raise ValueError(
                f"path: expected a folder made by `writesae collect`, got {self.path} ({error})"
            ) from error
        self.mode = self.manifest["mode"]
        self.context = self.manifest["context"]
        self.sites = [tuple(site[:2]) for site in self.manifest["sites"]]
        self.complete = (self.path / "summary.json").exists()
        self._sealed = self.manifest["version"] > 1
        self._known: set[str] = set()
        self._units: dict[int, dict] = {}  # markers read
        if not self._sealed:
            warnings.warn(f"{self.path} was made by an older writesae: its files have no digests", stacklevel=2)
        if not self.complete and self.mode != "all":
            raise ValueError(
                f"path: the collection in {self.path} is not finished, and mode {self.mode} stores its firings at the "
                "end: run the same `writesae collect` again"
            )

    def summary(self) -> dict:
        """The run's summary; of an unfinished collection the sums of its finished shards."""
        if self.complete:
            return dict(self._summary)
        if self._in_units:
            markers = [self._unit(number) for number in unit_numbers(self.path)]
        else:
            markers = [self._marker(number) for number in range(self._shards)]
        sums = {name: sum(m[name] for m in markers) for name in ("tokens", "firings", "documents")}
        return {"complete": False, "shards": self._shards, **sums}

    def verify(self):
        """Compares every file with its digest; returns what is wrong, see `collect.verify.Verified`."""
        from .verify import verify

        return verify(self.path)

    @cached_property
    def documents(self) -> pa.Table:
        """document, source, sha256, tokens, passages, first_passage: one row for each document that ended."""
        # documents.parquet is there when the collection is finished.
        if self._in_units and not self.complete:
            tables, before = [], 0  # passages of the finished units right before one
            for at, piece in enumerate(self.pieces):
                if at and self.pieces[at - 1].unit != piece.unit - 1:
                    before = 0
                table = self._read(f"{piece.folder}documents.parquet", DOCUMENTS)
                # A document begun in units that are not all done yet is not there yet.
                table = table.slice(int((_numpy(table["first_passage"]) < -before).sum()))
                tables.append(shifted(table, first_passage=int(self._first_passages[at])))
                before += piece.passages
            return _concat(tables, DOCUMENTS)
        names = ["documents.parquet"] if self.complete else self._parts("documents")
        return _concat([self._read(name, DOCUMENTS) for name in names], DOCUMENTS)

    def counts(self, layer: int | None = None, head: int | None = None) -> pa.Table:
        """layer, head, feature, count, sum, max over all firings seen, kept or not; silent features have count 0.

        Raises:
            ValueError: the collection is not finished, or has no such site.
        """
        if not self.complete:
            raise ValueError(f"counts: the collection in {self.path} is not finished")
        self._check(layer, head)
        return _where(self._read("features.parquet", FEATURES), layer=layer, head=head)

    def top(self, layer: int, head: int, feature: int, n: int = 100) -> pa.Table:
        """The n firings of a feature with the largest activations, first in document order where equal.

        Exact for every n in mode "all" (beyond the index the log is read), up to the collection's n in mode "top".

        Raises:
            ValueError: no such site or feature, mode "reservoir", or more than mode "top" holds.
        """
        self._check(layer, head, feature)
        if self.mode == "reservoir":
            raise ValueError(
                'top: a reservoir is a random sample, its largest are not the largest: use mode "all" or "top"'
            )
        indexed = self.manifest["n"]
        if n > indexed and self.mode == "top":
            raise ValueError(f"n: expected at most {indexed}, the firings kept a feature, got {n}")
        name = self._index(layer, head)
        if self.complete or (self.path / "done" / f"{Path(name).stem}.json").exists():
            found = self._feature(name, layer, head, feature)
            if n <= indexed or len(found) < indexed:
                return found.slice(0, n)
        found = self._log(layer, head, feature)
        order = pc.sort_indices(
            found, sort_keys=[("activation", "descending"), *((name, "ascending") for name in _PLACE)]
        )
        return found.take(order[:n])

    def at(self, document: int, position: int, row: int | None = None) -> pa.Table:
        """What fired on one token, by (layer, head, descending activation, feature).

        Args:
            document: number of the document.
            position: token of passage `row`; without `row`, token of the document.
            row: passage of the document.

        In the modes "top" and "reservoir" only what was kept can be found.

        Raises:
            ValueError: no such document or token.
        """
        if row is None:
            row, position = divmod(position, self.context)
        record = self._document(document)
        held = min(self.context, record["tokens"] - row * self.context)
        if not (0 <= row < record["passages"] and 0 <= position < held):
            raise ValueError(
                f"position: expected a token of document {document} ({record['tokens']} tokens, passages of "
                f"{self.context}), got row {row} position {position}"
            )
        if self.mode == "all":
            names = [self._part("firings", record["first_passage"] + row)]
        else:
            names = [self._index(*site) for site in self.sites]
        tables = [_where(self._read(name, FIRINGS), position=position, row=row, document=document) for name in names]
        return pa.concat_tables(tables).sort_by(
            [("layer", "ascending"), ("head", "ascending"), ("activation", "descending"), ("feature", "ascending")]
        )

    def firings(
        self, layer: int | None = None, head: int | None = None, feature: int | None = None, batch: int = 65_536
    ) -> Iterator[pa.Table]:
        """Stored firings in tables of at most `batch` rows, narrowed to a layer, head or feature.

        Mode "all": shard by shard, each by (layer, head, feature, document, row, position). Otherwise site by site, by
        (feature, descending activation). Only row groups that may hold what is asked for are read.
        """
        self._check(layer, head, feature if None not in (layer, head) else None)
        names = self._parts("firings") if self.mode == "all" else [self._index(*site) for site in self.sites]
        wanted = {"layer": layer, "head": head, "feature": feature}
        for name in names:
            with parquet(self.file(name), FIRINGS) as file:
                groups = _groups(file, **wanted)
                for part in file.iter_batches(batch, row_groups=groups) if groups else ():
                    table = _where(checked(pa.Table.from_batches([part])), **wanted)
                    if len(table):
                        yield table

    def sql(self, query: str, parameters=None) -> pa.Table:
        """What DuckDB answers to one SELECT over the views firings, tokens, documents and features.

            store.sql("SELECT feature, count(*) AS n FROM firings GROUP BY feature ORDER BY n DESC LIMIT 5")

        Nothing but the store's own files can be read, and nothing written. Files of the views that the query names are
        first compared with their digests, once a `Store`.

        Args:
            query: the columns of the views are those of the files; firings holds what is stored, in the modes "top"
                and "reservoir" only what was kept.
            parameters: values for ? in it, or `{name: value}` for $name.

        Raises:
            ImportError: duckdb is not installed (`pip install 'writesae[sql]'`).
            ValueError: no single SELECT, what DuckDB says of it, a damaged file by name, or features of a collection
                that is not finished.
        """
        from .sql import run

        names = self._parts("firings") if self.mode == "all" else [self._index(*site) for site in self.sites]
        views = {
            "firings": lambda: [self.file(name) for name in names],
            "tokens": lambda: [self.file(name) for name in self._parts("tokens")],
            "documents": lambda: self.documents,
            "features": self.counts if self.complete else None,
        }
        return run(views, query, parameters)

    def tokens(self, document: int) -> np.ndarray:
        """`[n]` int32 token ids of a document, its beginning-of-text token included.

        Raises:
            ValueError: no such document.
        """
        record = self._document(document)
        if not record["passages"]:
            return np.empty(0, np.int32)
        first = record["first_passage"]
        names = dict.fromkeys(self._part("tokens", first + row) for row in range(record["passages"]))
        tables = [_tokens(self.file(name), [{"document": document}]) for name in names]
        found = _numpy(_where(pa.concat_tables(tables), document=document)["token"])
        if len(found) != record["tokens"]:
            raise ValueError(
                f"{self.path}: document {document} has {record['tokens']} tokens by documents.parquet, and "
                f"{len(found)} in {', '.join(names)}"
            )
        return found

    def contexts(
        self, layer: int, head: int, feature: int, n: int = 100, width: int = 16, tokenizer=None
    ) -> list[Context]:
        """The top n firings of a feature, each with up to `width` tokens either side inside its passage.

        Args:
            tokenizer: decodes the tokens; a Hugging Face tokenizer or a function from a list of ids to text. Default:
                the one kept in the store; False: none, which leaves the texts None.
        """
        found = self.top(layer, head, feature, n).to_pylist()
        text = _decoder(self._own_tokenizer if tokenizer is None else tokenizer or None)
        passages = self._passages({(f["document"], f["row"]) for f in found})
        contexts = []
        for f in found:
            ids, source = passages[f["document"], f["row"]]
            if f["position"] >= len(ids):
                raise ValueError(
                    f"{self.path}: a firing of {layer}:{head} feature {feature} is on token {f['position']} of "
                    f"document {f['document']} row {f['row']}, which has {len(ids)}"
                )
            low = max(f["position"] - width, 0)
            window, at = ids[low : f["position"] + width + 1], f["position"] - low
            contexts.append(
                Context(
                    f["document"], f["row"], f["position"], source, f["activation"], window, at,
                    text(window[:at]), text(window[at : at + 1]), text(window[at + 1 :]),
                )
            )  # fmt: skip
        return contexts

    def _passages(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[np.ndarray, str | None]]:
        """{(document, row): (token ids, source)}, reading each row group of tokens once."""
        found, shards, sources = {}, {}, {}
        for document, row in sorted(wanted):
            try:
                record = self._document(document)
            except ValueError as error:
                raise ValueError(f"{self.path}: a firing is in a document that is not there: {error}") from error
            sources[document] = record["source"]
            shards.setdefault(self._part("tokens", record["first_passage"] + row), []).append((document, row))
        for name, places in shards.items():
            table = _tokens(self.file(name), [{"document": document, "row": row} for document, row in places])
            key = (_numpy(table["document"]).astype(np.int64) << 32) | _numpy(table["row"])
            token = _numpy(table["token"])
            for document, row in places:
                low, high = np.searchsorted(key, ((document << 32) | row, ((document << 32) | row) + 1))
                found[document, row] = (token[low:high], sources[document])
        return found

    def _document(self, document: int) -> dict:
        numbers = self._document_numbers
        at = int(np.searchsorted(numbers, document))
        if at == len(numbers) or numbers[at] != document:
            raise ValueError(f"document: expected one of the {len(numbers)} collected, got {document}")
        record = self.documents.slice(at, 1).to_pylist()[0]
        first, passages = record["first_passage"], record["passages"]
        most = int(self._first_passages[-1])
        if min(first, passages, record["tokens"]) < 0 or first + passages > most:
            raise ValueError(
                f"{self.path}: by its table document {document} has {passages} passages from number {first} on, which "
                f"{self._shards} shards cannot hold"
            )
        return record

    @cached_property
    def _document_numbers(self) -> np.ndarray:
        return _numpy(self.documents["document"])

    def tokenizer(self):
        """What decodes the store's token ids: a function from a list of ids to text.

        Of a fast Hugging Face tokenizer; needs the `tokenizers` package. The folder `tokenizer` of the store is what
        `transformers.AutoTokenizer.from_pretrained` reads.

        Raises:
            ValueError: the store has none of this kind, its file is damaged, or the package is missing.
        """
        if "tokenizer/tokenizer.json" not in self._tokenizer_files:
            kept = "one that transformers must load" if self._tokenizer_files else "none"
            raise ValueError(f"tokenizer: expected a fast one in {self.path / 'tokenizer'}, got {kept}")
        path = self.file("tokenizer/tokenizer.json")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError("tokenizer: needs the tokenizers package: pip install tokenizers") from error
        try:
            made = Tokenizer.from_file(str(path))
        except Exception as error:  # whatever a foreign file makes of the package
            raise ValueError(f"{path}: not a tokenizer: {error}") from error
        return lambda ids: made.decode(ids, skip_special_tokens=False)

    @cached_property
    def _own_tokenizer(self):
        usable = "tokenizer/tokenizer.json" in self._tokenizer_files and find_spec("tokenizers") is not None
        return self.tokenizer() if usable else None

    @cached_property
    def _tokenizer_files(self) -> dict:
        return marked(self.path, "tokenizer", self._manifest_digest)["files"] if self._sealed else {}

    @cached_property
    def _summary(self) -> dict:
        path = self.path / "summary.json"
        found = read_sealed(path) if self._sealed else read_json(path)
        integrity = found.get("integrity") if isinstance(found, dict) else None
        if self._sealed and not (isinstance(integrity, dict) and entries_sound(integrity.get("files"))):
            raise ValueError(f"{path}: expected the summary of a collection")
        if self._sealed and integrity.get("manifest") != self._manifest_digest:
            raise ValueError(f"{path} is damaged: it is of another collection")
        if not isinstance(found, dict) or type(found.get("shards")) is not int or found["shards"] < 0:
            raise ValueError(f"{path}: expected the summary of a collection, with its shards")
        if self._in_units:
            self._check_layout(path, found)
            return found
        markers = 1 + max(shard_numbers(self.path), default=-1)
        if found["shards"] != markers:
            raise ValueError(f"{path}: expected the {markers} shards that have a marker in done, got {found['shards']}")
        return found

    def _check_layout(self, path: Path, found: dict) -> None:
        layout, units = found.get("layout"), unit_numbers(self.path)
        sound = isinstance(layout, list) and len(layout) == len(units) and all(
            isinstance(x, list) and len(x) == 4 and all(map(is_integer, x[1:])) and x[3]
            and isinstance(x[0], str) and x[0].startswith("units/") and x[0].count("/") == 1 for x in layout
        )  # fmt: skip
        if not sound or units != list(range(len(units))):
            raise ValueError(f"{path}: expected a line for each of the {len(units)} units that have a marker in done")

    @property
    def _in_units(self) -> bool:
        return "unit" in self.manifest

    @cached_property
    def pieces(self) -> list[Piece]:
        """What holds the shards, in the order of their passages; of an unfinished store what is done."""
        if not self._in_units:
            size = self.manifest["shard_passages"]
            return [Piece("", self._shards, self._shards * size, size)]
        if self.complete:
            return [Piece(f"{x[0]}/", *x[1:], unit) for unit, x in enumerate(self._summary["layout"])]
        made = [self._unit(number) for number in unit_numbers(self.path)]
        return [Piece(f"{m['folder']}/", m["shards"], m["passages"], m["shard_passages"], m["unit"]) for m in made]

    def counted(self, at: int) -> dict:
        """What a unit's marker would count of piece `at`."""
        piece = self.pieces[at]
        shape = {"shards": piece.shards, "shard_passages": piece.shard_passages}
        if piece.unit is None:
            counts = {**self.summary(), "passages": self._marker(self._shards - 1)["next"]["passages"]}
        else:
            counts = self._unit(piece.unit)
        return {**shape, **{name: counts[name] for name in ("passages", "documents", "tokens", "firings", "kept")}}

    def tokenizer_files(self) -> list[str]:
        """Names of the files in the store's folder `tokenizer`."""
        return list(self._tokenizer_files)

    @cached_property
    def _first_passages(self) -> np.ndarray:
        """`[pieces + 1]` numbers of their first passages, and of one behind the last."""
        return np.cumsum([0, *(piece.passages for piece in self.pieces)])

    def _unit(self, number: int) -> dict:
        if number not in self._units:
            self._units[number] = unit_marker(self.path, number, self._manifest_digest)
        return self._units[number]

    @cached_property
    def _manifest_digest(self) -> str:
        return sha256(self.path / "manifest.json")

    @cached_property
    def _shards(self) -> int:
        if self.complete:
            return self._summary["shards"]
        if self._in_units:
            return sum(piece.shards for piece in self.pieces)
        return 1 + max(shard_numbers(self.path), default=-1)

    def _marker(self, number: int) -> dict:
        if self._sealed:
            return shard_marker(self.path, number, self._manifest_digest)
        return read_json(self.path / "done" / f"part-{number:06d}.json")

    def file(self, name: str) -> Path:
        """A file of the store, compared with its digest when it is first needed.

        Raises:
            ValueError: it is damaged or missing; names it.
        """
        path = self.path / name
        if self._sealed and name not in self._known:
            stem = Path(name).stem
            if name.startswith("units/"):
                listed = self._unit(int(name.split("/")[1].split("-")[0]))["files"]
            elif "/" not in name:
                listed = self._summary["integrity"]["files"]
            elif stem.startswith("part-"):
                listed = self._marker(int(stem[5:]))["files"]
            elif name.startswith("tokenizer/"):
                listed = self._tokenizer_files
            else:
                listed = marked(self.path, stem, self._manifest_digest)["files"]
            if name not in listed:
                raise ValueError(f"{path} is no file of this collection")
            found = problem(path, listed[name])
            if found is not None:
                raise ValueError(f"{path} is {found}" if found == "missing" else f"{path} is damaged: {found}")
            self._known.add(name)
        return path

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        return read_table(self.file(name), schema)

    def _parts(self, table: str) -> list[str]:
        return [name for piece in self.pieces for name in piece.names(table)]

    def _part(self, table: str, passage: int) -> str:
        if not 0 <= passage < self._first_passages[-1]:
            raise ValueError(f"{self.path}: passage {passage} is asked for, of {int(self._first_passages[-1])} it has")
        at = int(np.searchsorted(self._first_passages, passage, side="right")) - 1
        piece = self.pieces[at]
        number = (passage - int(self._first_passages[at])) // piece.shard_passages
        return f"{piece.folder}{table}/{part_name(number)}"

    def _index(self, layer: int, head: int) -> str:
        return f"index/layer-{layer}-head-{head}.parquet"

    def _log(self, layer: int, head: int, feature: int) -> pa.Table:
        return _concat([self._feature(name, layer, head, feature) for name in self._parts("firings")], FIRINGS)

    def _feature(self, name: str, layer: int, head: int, feature: int) -> pa.Table:
        wanted = {"layer": layer, "head": head, "feature": feature}
        with parquet(self.file(name), FIRINGS) as file:
            return _where(checked(file.read_row_groups(_groups(file, **wanted))), **wanted)

    def _check(self, layer: int | None, head: int | None, feature: int | None = None) -> None:
        if not any(layer in (None, a) and head in (None, b) for a, b in self.sites):
            names = ", ".join(f"{a}:{b}" for a, b in self.sites)
            raise ValueError(f"layer, head: expected a site of this collection ({names}), got {layer}:{head}")
        if feature is not None:
            size = next(site[2] for site in self.manifest["sites"] if tuple(site[:2]) == (layer, head))
            if not 0 <= feature < size:
                raise ValueError(f"feature: expected 0 <= feature < {size}, got {feature}")


def _concat(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    # Not to_numpy, which loads pandas where there is one: 0.3 to 0.6 s, most of what a first question takes.
    return np.from_dlpack(column.combine_chunks())


def _where(table: pa.Table, **wanted: int | None) -> pa.Table:
    for name, value in wanted.items():
        if value is not None:
            # Not pc.equal nor pa.array, which load pandas where there is one.
            rows = np.flatnonzero(_numpy(table[name]) == value)
            table = table.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)]))
    return table


def _tokens(path: Path, places: list[dict[str, int]]) -> pa.Table:
    """document, row, token of the row groups that may hold one of the places."""
    with parquet(path, TOKENS) as file:
        groups = sorted({group for place in places for group in _groups(file, **place)})
        return checked(file.read_row_groups(groups, ["document", "row", "token"], use_threads=False))


def _groups(file: pq.ParquetFile, **wanted: int | None) -> list[int]:
    return row_groups(file, **{name: None if value is None else (value, value) for name, value in wanted.items()})


def _decoder(tokenizer):
    if tokenizer is None:
        return lambda ids: None
    decode = getattr(tokenizer, "decode", tokenizer)
    return lambda ids: decode(ids.tolist())
