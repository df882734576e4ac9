"""`Store`: asks a collection's folder what fired where. Needs pyarrow and numpy, no model and no torch.

Names, as in `Firings`: `document` counts the corpus's documents from 0, `row` the passages of a document, `position`
the tokens of a passage. Token `row * context + position` of the document (its beginning-of-text token included) is
meant. The same columns stand in every Parquet file, for any other reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import read_table, row_groups

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
            self.manifest = json.loads((self.path / "manifest.json").read_text())
            if self.manifest.get("format") != "writesae-firings":
                raise ValueError("another format")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"path: expected a folder made by `writesae collect`, got {self.path} ({error})"
            ) from error
        self.mode = self.manifest["mode"]
        self.context = self.manifest["context"]
        self.sites = [tuple(site[:2]) for site in self.manifest["sites"]]
        self.complete = (self.path / "summary.json").exists()
        if not self.complete and self.mode != "all":
            raise ValueError(
                f"path: the collection in {self.path} is not finished, and mode {self.mode} stores its firings at the "
                "end: run the same `writesae collect` again"
            )

    def summary(self) -> dict:
        """The run's summary; of an unfinished collection the sums of its finished shards."""
        if self.complete:
            return json.loads((self.path / "summary.json").read_text())
        markers = [json.loads(path.read_text()) for path in sorted((self.path / "done").glob("part-*.json"))]
        sums = {name: sum(m[name] for m in markers) for name in ("tokens", "firings", "documents")}
        return {"complete": False, "shards": len(markers), **sums}

    @cached_property
    def documents(self) -> pa.Table:
        """document, source, sha256, tokens, passages, first_passage: one row for each document that ended."""
        whole = self.path / "documents.parquet"  # there when the collection is finished
        return pa.concat_tables(read_table(path) for path in ([whole] if self.complete else self._parts("documents")))

    def counts(self, layer: int | None = None, head: int | None = None) -> pa.Table:
        """layer, head, feature, count, sum, max over all firings seen, kept or not; silent features have count 0.

        Raises:
            ValueError: the collection is not finished, or has no such site.
        """
        if not self.complete:
            raise ValueError(f"counts: the collection in {self.path} is not finished")
        self._check(layer, head)
        return _where(read_table(self.path / "features.parquet"), layer=layer, head=head)

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
        path = self._index(layer, head)
        if path.exists():
            found = self._feature(path, layer, head, feature)
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
            paths = [self._part("firings", record["first_passage"] + row)]
        else:
            paths = [self._index(*site) for site in self.sites]
        tables = [_where(read_table(path), position=position, row=row, document=document) for path in paths]
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
        paths = self._parts("firings") if self.mode == "all" else [self._index(*site) for site in self.sites]
        wanted = {"layer": layer, "head": head, "feature": feature}
        for path in paths:
            with pq.ParquetFile(path) as file:
                groups = _groups(file, **wanted)
                for part in file.iter_batches(batch, row_groups=groups) if groups else ():
                    table = _where(pa.Table.from_batches([part]), **wanted)
                    if len(table):
                        yield table

    def tokens(self, document: int) -> np.ndarray:
        """`[n]` int32 token ids of a document, its beginning-of-text token included.

        Raises:
            ValueError: no such document.
        """
        record = self._document(document)
        if not record["passages"]:
            return np.empty(0, np.int32)
        first = record["first_passage"]
        paths = dict.fromkeys(self._part("tokens", first + row) for row in range(record["passages"]))
        tables = [_tokens(path, [{"document": document}]) for path in paths]
        return _numpy(_where(pa.concat_tables(tables), document=document)["token"])

    def contexts(
        self, layer: int, head: int, feature: int, n: int = 100, width: int = 16, tokenizer=None
    ) -> list[Context]:
        """The top n firings of a feature, each with up to `width` tokens either side inside its passage.

        Args:
            tokenizer: decodes the tokens; a Hugging Face tokenizer or a function from a list of ids to text.
        """
        found = self.top(layer, head, feature, n).to_pylist()
        text = _decoder(tokenizer)
        passages = self._passages({(f["document"], f["row"]) for f in found})
        contexts = []
        for f in found:
            ids, source = passages[f["document"], f["row"]]
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
            record = self._document(document)
            sources[document] = record["source"]
            shards.setdefault(self._part("tokens", record["first_passage"] + row), []).append((document, row))
        for path, places in shards.items():
            table = _tokens(path, [{"document": document, "row": row} for document, row in places])
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
        return self.documents.slice(at, 1).to_pylist()[0]

    @cached_property
    def _document_numbers(self) -> np.ndarray:
        return _numpy(self.documents["document"])

    @cached_property
    def _shards(self) -> int:
        return len(list((self.path / "done").glob("part-*.json")))

    def _parts(self, folder: str) -> list[Path]:
        return [self.path / folder / f"part-{i:06d}.parquet" for i in range(self._shards)]

    def _part(self, folder: str, passage: int) -> Path:
        return self.path / folder / f"part-{passage // self.manifest['shard_passages']:06d}.parquet"

    def _index(self, layer: int, head: int) -> Path:
        return self.path / "index" / f"layer-{layer}-head-{head}.parquet"

    def _log(self, layer: int, head: int, feature: int) -> pa.Table:
        return pa.concat_tables(self._feature(path, layer, head, feature) for path in self._parts("firings"))

    def _feature(self, path: Path, layer: int, head: int, feature: int) -> pa.Table:
        wanted = {"layer": layer, "head": head, "feature": feature}
        with pq.ParquetFile(path) as file:
            return _where(file.read_row_groups(_groups(file, **wanted)), **wanted)

    def _check(self, layer: int | None, head: int | None, feature: int | None = None) -> None:
        if not any(layer in (None, a) and head in (None, b) for a, b in self.sites):
            names = ", ".join(f"{a}:{b}" for a, b in self.sites)
            raise ValueError(f"layer, head: expected a site of this collection ({names}), got {layer}:{head}")
        if feature is not None:
            size = next(site[2] for site in self.manifest["sites"] if tuple(site[:2]) == (layer, head))
            if not 0 <= feature < size:
                raise ValueError(f"feature: expected 0 <= feature < {size}, got {feature}")


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
    with pq.ParquetFile(path) as file:
        groups = sorted({group for place in places for group in _groups(file, **place)})
        return file.read_row_groups(groups, ["document", "row", "token"], use_threads=False)


def _groups(file: pq.ParquetFile, **wanted: int | None) -> list[int]:
    return row_groups(file, **{name: None if value is None else (value, value) for name, value in wanted.items()})


def _decoder(tokenizer):
    if tokenizer is None:
        return lambda ids: None
    decode = getattr(tokenizer, "decode", tokenizer)
    return lambda ids: decode(ids.tolist())
