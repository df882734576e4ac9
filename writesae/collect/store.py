"""`Store`: asks a collection's folder what fired where. Needs pyarrow and numpy, no model and no torch.

Names, as in `Firings`: `document` counts the corpus's documents from 0, `row` the passages of a document, `position`
the tokens of a passage. Token `row * context + position` of the document (its beginning-of-text token included) is
meant. The same columns stand in every Parquet file, for any other reader: `pandas.read_parquet(store / "firings")`
reads all firings of mode "all", `store / "index"` those of the other modes (and the top ones of mode "all"). A store
that several workers filled has its firings in `units/*/firings`, as `docs/store.md` says.

What is read of a file is compared with its digest, so that a damaged one is named rather than believed, see `folder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..objects import is_url
from .files import DOCUMENTS, FEATURES, FIRINGS, TOKENS, checked, numbers, row_groups, shifted
from .folder import Documents, Folder
from .unit_marks import unit_numbers

_PLACE = ("document", "row", "position")
_READERS = 8  # threads


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


class Store(Folder):
    """A folder that `writesae collect` made, or one in an object store, given by its URL.

    Attributes:
        path: the folder; of a URL, one of this machine's cache, into which files are fetched as they are needed.
        where: the folder, or what it stands for. manifest: what was collected. mode: "all", "top" or "reservoir".
        context: tokens a passage. sites: (layer, head) in order. complete: whether the collection ended.
        activations: "exact", or "packed": rounded, F features by at most 2^-(25 - ceil(log2 F)) of the activation.

    Raises:
        ValueError: not such a folder, or an unfinished one of a mode that stores its firings at the end.
    """

    @classmethod
    def from_pretrained(cls, path_or_repo, revision: str | None = None, firings: bool = True, progress: bool = True):
        """The store in a folder, or in a dataset repository of the Hugging Face hub, which is downloaded to its cache.

        Args:
            path_or_repo: a folder, a URL of an object store, or a repository such as "owner/name".
            revision: branch, tag or commit of a repository.
            firings: download the log of all firings, most of a store of mode "all". Without it `top` (up to the index's
                n), `contexts`, `counts` and `tokens` answer, and what needs the log says that a file of it is missing.
            progress: show bars.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: no such repository, no access, no network.
            ValueError: no store there.
        """
        if is_url(path_or_repo) or Path(path_or_repo).is_dir():
            return cls(path_or_repo)
        from .hub import fetch

        return cls(fetch(path_or_repo, revision, firings, progress))

    def push_to_hub(
        self,
        repo: str,
        *,
        license: str,
        base_model: str | None = None,
        private: bool = True,
        revision: str | None = None,
        message: str | None = None,
        replace: bool = False,
    ) -> str:
        """Uploads the store to a dataset repository, in one commit with a generated card; returns its address.

            store.push_to_hub("owner/firings", license="cc-by-4.0")

        What goes there is the store's files, so also its tokens, which are the text, and the names of its documents.

        Args:
            repo: owner/name; made if it is not there.
            license: an identifier of the hub such as "cc-by-4.0"; the text's has a say in it.
            base_model: the model's repository, for the card, where the store knows the model by a folder's name.
            private: of a repository that is made; one that is there stays as it is.
            revision: a branch, made if it is not there. None: main.
            message: of the commit.
            replace: take what the repository holds away; otherwise files there are refused.

        Raises:
            ValueError: an unfinished or damaged store, files in the repository, or a bad argument.
            FileNotFoundError, PermissionError, ConnectionError: as `from_pretrained`.
        """
        from .hub import push

        return push(
            self, repo, license=license, base_model=base_model, private=private, revision=revision, message=message,
            replace=replace,
        )  # fmt: skip

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

    def counted(self, at: int) -> dict:
        """What a unit's marker would count of piece `at`."""
        piece = self.pieces[at]
        shape = {"shards": piece.shards, "shard_passages": piece.shard_passages}
        if piece.unit is None:
            counts = {**self.summary(), "passages": self._marker(self._shards - 1)["next"]["passages"]}
        else:
            counts = self._unit(piece.unit)
        return {**shape, **{name: counts[name] for name in ("passages", "documents", "tokens", "firings", "kept")}}

    def verify(self):
        """Compares every file with its digest; returns what is wrong, see `collect.verify.Verified`."""
        from .verify import verify

        return verify(self.where)

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
                table = table.slice(int((numbers(table["first_passage"]) < -before).sum()))
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
            raise ValueError(f"counts: the collection in {self} is not finished")
        self._check(layer, head)
        return _where(self._read("features.parquet", FEATURES), layer=layer, head=head)

    def features_of(self, layer: int, head: int) -> int:
        """Features of a site's dictionary, those that never fired too.

        Raises:
            ValueError: no such site.
        """
        self._check(layer, head)
        return next(site[2] for site in self.manifest["sites"] if tuple(site[:2]) == (layer, head))

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
        if self._indexed(name):
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
        self,
        layer: int | None = None,
        head: int | None = None,
        feature: int | None = None,
        batch: int = 65_536,
        document: int | None = None,
    ) -> Iterator[pa.Table]:
        """Stored firings in tables of at most `batch` rows, narrowed to a layer, head, feature or document.

        Mode "all": shard by shard, each by (layer, head, feature, document, row, position). Otherwise site by site, by
        (feature, descending activation). Only row groups that may hold what is asked for are read, of a document only
        its shards; a feature that the index holds whole is read from there.

        Raises:
            ValueError: no such site, feature or document.
        """
        self._check(layer, head, feature if None not in (layer, head) else None)
        wanted = {"layer": layer, "head": head, "feature": feature, "document": document}
        of_one = None not in (layer, head, feature)
        sites = [site for site in self.sites if layer in (None, site[0]) and head in (None, site[1])]
        if document is not None:
            record = self._document(document)
        if self.mode != "all":
            names = [self._index(*site) for site in sites]
        elif document is not None:
            names = self._parts_of("firings", record)
        else:
            if of_one and (found := self._whole(layer, head, feature)) is not None:
                yield from _slices(found, batch)
                return
            names = self._parts("firings")
        for name in names:
            if of_one:
                yield from _slices(_where(self._feature(name, layer, head, feature), document=document), batch)
                continue
            with self._table(name, FIRINGS) as file:
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
        names = self._parts_of("tokens", record)
        tables = [self._tokens(name, [{"document": document}]) for name in names]
        found = numbers(_where(pa.concat_tables(tables), document=document)["token"])
        if len(found) != record["tokens"]:
            raise ValueError(
                f"{self}: document {document} has {record['tokens']} tokens by documents.parquet, and "
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
                    f"{self}: a firing of {layer}:{head} feature {feature} is on token {f['position']} of "
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
                raise ValueError(f"{self}: a firing is in a document that is not there: {error}") from error
            sources[document] = record["source"]
            shards.setdefault(self._part("tokens", record["first_passage"] + row), []).append((document, row))
        # Each of the strongest may be in another shard: several at once, since most of it is waiting for a disk.
        with ThreadPoolExecutor(_READERS) as pool:
            asked = [[{"document": document, "row": row} for document, row in places] for places in shards.values()]
            tables = list(pool.map(self._tokens, shards, asked))
        for table, places in zip(tables, shards.values(), strict=True):
            key = (numbers(table["document"]).astype(np.int64) << 32) | numbers(table["row"])
            token = numbers(table["token"])
            for document, row in places:
                low, high = np.searchsorted(key, ((document << 32) | row, ((document << 32) | row) + 1))
                found[document, row] = (token[low:high], sources[document])
        return found

    def _parts_of(self, table: str, record: dict) -> list[str]:
        """The files that a document's passages are in."""
        first = record["first_passage"]
        return list(dict.fromkeys(self._part(table, first + row) for row in range(record["passages"])))

    def _whole(self, layer: int | None, head: int | None, feature: int | None) -> pa.Table | None:
        """All firings of a feature by place, where the index has all of them, else None."""
        name = self._index(layer, head)
        if not self._indexed(name):
            return None
        found = self._feature(name, layer, head, feature)
        if len(found) >= self.manifest["n"]:
            return None
        return found.sort_by([(column, "ascending") for column in _PLACE])

    def _document(self, document: int) -> dict:
        found = self._documents.find(document)
        if found is None:
            raise ValueError(f"document: expected one of the {self._documents.count} collected, got {document}")
        first, passages = found["first_passage"], found["passages"]
        most = int(self._first_passages[-1])
        if min(first, passages, found["tokens"]) < 0 or first + passages > most:
            raise ValueError(
                f"{self}: by its table document {document} has {passages} passages from number {first} on, which "
                f"{self._shards} shards cannot hold"
            )
        return found

    @cached_property
    def _documents(self) -> Documents:
        if self.complete:
            return Documents(lambda: self._table("documents.parquet", DOCUMENTS))
        return Documents(None, self.documents)

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

    def _indexed(self, name: str) -> bool:
        return self.complete or (self.path / "done" / f"{Path(name).stem}.json").exists()

    def _index(self, layer: int | None, head: int | None) -> str:
        return f"index/layer-{layer}-head-{head}.parquet"

    def _log(self, layer: int, head: int, feature: int) -> pa.Table:
        return _concat([self._feature(name, layer, head, feature) for name in self._parts("firings")], FIRINGS)

    def _tokens(self, name: str, places: list[dict[str, int]]) -> pa.Table:
        """document, row, token of the row groups that may hold one of the places."""
        with self._table(name, TOKENS) as file:
            groups = sorted({group for place in places for group in _groups(file, **place)})
            return checked(file.read_row_groups(groups, ["document", "row", "token"], use_threads=False))

    def _feature(self, name: str, layer: int | None, head: int | None, feature: int | None) -> pa.Table:
        """A feature's firings in one file. What takes room, place and activation, is read where it fired alone."""
        wanted = {"layer": layer, "head": head, "feature": feature}
        with self._table(name, FIRINGS) as file:
            groups = np.array(_groups(file, **wanted), np.int64)
            which = checked(file.read_row_groups(groups.tolist(), list(wanted), use_threads=False))
            fired = np.logical_and.reduce([numbers(which[name]) == value for name, value in wanted.items()])
            ends = np.cumsum([file.metadata.row_group(g).num_rows for g in groups.tolist()])
            groups = groups[np.unique(np.searchsorted(ends, np.flatnonzero(fired), side="right"))]
            return _where(checked(file.read_row_groups(groups.tolist(), use_threads=False)), **wanted)

    def _check(self, layer: int | None, head: int | None, feature: int | None = None) -> None:
        if not any(layer in (None, a) and head in (None, b) for a, b in self.sites):
            names = ", ".join(f"{a}:{b}" for a, b in self.sites)
            raise ValueError(f"layer, head: expected a site of this collection ({names}), got {layer}:{head}")
        if feature is not None:
            size = self.features_of(layer, head)
            if not 0 <= feature < size:
                raise ValueError(f"feature: expected 0 <= feature < {size}, got {feature}")


def _concat(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _where(table: pa.Table, **wanted: int | None) -> pa.Table:
    for name, value in wanted.items():
        if value is not None:
            # Not pc.equal nor pa.array, which load pandas where there is one.
            rows = np.flatnonzero(numbers(table[name]) == value)
            table = table.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows)]))
    return table


def _slices(table: pa.Table, batch: int) -> Iterator[pa.Table]:
    return (table.slice(at, batch) for at in range(0, len(table), batch))


def _groups(file: pq.ParquetFile, **wanted: int | None) -> list[int]:
    return row_groups(file, **{name: None if value is None else (value, value) for name, value in wanted.items()})


def _decoder(tokenizer):
    if tokenizer is None:
        return lambda ids: None
    decode = getattr(tokenizer, "decode", tokenizer)
    return lambda ids: decode(ids.tolist())
