"""One shard: a fixed slice of the corpus and everything that fired in it, written by a thread beside the model.

Layout of a collection's folder:

    manifest.json                 what was asked of which model, dictionaries and corpus
    firings/part-000000.parquet   sorted by (layer, head, feature, document, row, position)
    tokens/part-000000.parquet    every token fed, in order
    documents/part-000000.parquet documents that ended in the shard (removed when documents.parquet holds them)
    counts/part-000000.parquet    count, sum and max a feature (removed when features.parquet holds their totals)
    done/manifest.json            a copy of it, from which a damaged one is restored
    done/part-000000.json         completion marker, written last: sizes, digests, and where the next shard starts
    index/layer-0-head-0.parquet  kept firings of one site by (feature, -activation)
    done/layer-0-head-0.json      its completion marker, which names the shards it was made from
    tokenizer/                    the tokenizer, for who reads the store; done/tokenizer.json is its marker
    documents.parquet             every document, in order
    features.parquet              totals of every feature
    summary.json                  completion marker of the whole, with the digests that no other marker holds

Every marker carries its own digest and the manifest's, so that a damaged file of any kind is found (`verify`).
"""

from __future__ import annotations

import hashlib
import mmap
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..files import SEAL, discard_left_over, problem
from ..firings import Firings
from ..text.passages import Cursor, DocumentEnd, Passage
from . import files
from .marks import PARTS, damaged, mark, part_name, shard_marker, shard_numbers
from .modes import Columns, Features, Selection, Totals, count

ROWS = {"tokens": files.TOKEN_ROWS}  # a row group, where not the usual number


class Found:
    """Firings of a shard as they come, in blocks of memory of their own.

    On the heap, what stays for a shard's length would lie between the tensors of the model's forward passes and keep
    their space from being used again: the resident memory of a long collection crept up and wandered by a tenth.
    """

    BLOCK = 1 << 16
    NAMES = tuple(column.name for column in fields(Firings))

    def __init__(self):
        self.blocks: list[np.ndarray] = []  # each [6, BLOCK] int32, an activation as its bits
        self.length = 0

    def add(self, passages: np.ndarray, firings: Firings) -> None:
        """Copies firings, with the indices `[B]` of the passages that the batch's rows are."""
        columns = {name: column.detach().cpu().numpy() for name, column in firings.columns().items()}
        columns["row"], columns["activation"] = passages[columns["row"]], columns["activation"].view(np.int32)
        at = 0
        while at < len(firings):
            filled = self.length % self.BLOCK
            if not filled:
                memory = mmap.mmap(-1, len(self.NAMES) * self.BLOCK * 4)
                self.blocks.append(np.frombuffer(memory, np.int32).reshape(len(self.NAMES), self.BLOCK))
            n = min(len(firings) - at, self.BLOCK - filled)
            for to, name in zip(self.blocks[-1], self.NAMES, strict=True):
                to[filled : filled + n] = columns[name][at : at + n]
            at += n
            self.length += n

    def take(self) -> dict[str, np.ndarray]:
        """Columns of everything added (something was), held here no longer; `row` is the passage's index."""
        blocks, length = self.blocks, self.length
        self.blocks, self.length = [], 0
        parts = {name: np.concatenate([block[i] for block in blocks])[:length] for i, name in enumerate(self.NAMES)}
        parts["activation"] = parts["activation"].view(np.float32)
        return parts


@dataclass
class Shard:
    """Passages of one slice, and the firings found in them."""

    number: int
    passages: list[Passage] = field(default_factory=list)
    ends: list[DocumentEnd] = field(default_factory=list)
    found: Found = field(default_factory=Found)
    last: bool = False
    stored: Columns | None = None  # the firings, where they are known without the model

    def columns(self, features: Features) -> Columns:
        """The firings, sorted by (feature number, place). Takes them out of `found`, so that they are held once.

        Raises:
            ValueError: an activation that is not a positive number, naming its place.
        """
        if self.stored is not None:
            return self.stored
        if not self.found.length:
            return Columns.empty()
        parts = self.found.take()
        passage = parts.pop("row")
        bad = np.flatnonzero(~((parts["activation"] > 0) & (parts["activation"] < np.inf)))
        if len(bad):
            at = {name: values[bad[0]] for name, values in parts.items()}
            place = self.passages[passage[bad[0]]]
            raise ValueError(
                f"activation: expected positive finite numbers, got {at['activation']} at layer {at['layer']} head "
                f"{at['head']} feature {at['feature']}, document {place.document} row {place.row} position "
                f"{at['position']}"
            )
        key = features.key(parts.pop("layer"), parts.pop("head"), parts.pop("feature"))
        length = int(parts["position"].max()) + 1
        order = np.argsort((key * len(self.passages) + passage) * length + parts["position"])
        passage = passage[order]
        document = np.array([p.document for p in self.passages], np.int32)
        row = np.array([p.row for p in self.passages], np.int32)
        return Columns(
            key[order], document[passage], row[passage], parts["position"][order], parts["activation"][order]
        )  # fmt: skip

    def tokens(self) -> pa.Table:
        lengths = [len(p.tokens) for p in self.passages]
        columns = [
            np.repeat(np.array([p.document for p in self.passages], np.int32), lengths),
            np.repeat(np.array([p.row for p in self.passages], np.int32), lengths),
            np.concatenate([np.arange(n, dtype=np.int32) for n in lengths] or [np.empty(0, np.int32)]),
            np.concatenate([p.tokens for p in self.passages] or [np.empty(0, np.int32)]),
        ]
        return pa.table(columns, schema=files.TOKENS)


def firings_table(columns: Columns, features: Features) -> pa.Table:
    """Kept firings as the table that is stored."""
    layer, head, feature = features.split(columns.key)
    return pa.table(
        [columns.document, columns.row, columns.position, layer, head, feature, columns.activation],
        schema=files.FIRINGS,
    )


def read_columns(path: Path, features: Features) -> Columns:
    """Stored firings back as columns."""
    table = files.read_table(path, files.FIRINGS)
    c = {name: table[name].to_numpy() for name in table.column_names}
    key = features.known(c["layer"], c["head"], c["feature"])
    return Columns(key, c["document"], c["row"], c["position"], c["activation"])


class Progress:
    """What the finished shards add up to: the selection (modes top and reservoir), the totals, and the next cursor.

    Args:
        out: the folder.
        features, selection: of the run.
        manifest: digest of the folder's manifest, which every marker repeats.
        check: called with a shard before its marker is written; raises where its text changed meanwhile.
    """

    def __init__(
        self,
        out: Path,
        features: Features,
        selection: Selection | None,
        manifest: str,
        check: Callable[[Shard], None] = lambda shard: None,
    ):
        self.out, self.features, self.selection = out, features, selection
        self.manifest, self.check = manifest, check
        self.totals = Totals(features.total)
        self.shards = self.tokens = self.firings = self.documents = 0
        self.cursor: Cursor | None = None
        self.last = False
        self._chain = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of the markers of all shards so far."""
        return self._chain.hexdigest()

    def load(self, remake: Callable[[str], Shard]) -> list[str]:
        """Takes up every finished shard, and removes what an ended run left unfinished.

        Args:
            remake: called with what is wrong with a damaged shard, the next one; returns it made again.

        Returns: what was wrong.
        """
        begun, repaired = max(shard_numbers(self.out), default=-1), []
        while self.shards <= begun and not self.last:
            try:
                self._take()
            except ValueError as error:
                repaired.append(str(error))
                self.write(remake(repaired[-1]))
        self.sweep()
        return repaired

    def sweep(self) -> None:
        """Removes temporary files, and files of shards beyond the last."""
        kept = {Path(part_name(i)).stem for i in range(self.shards)}
        for folder in (*PARTS, "index", "done", "tokenizer", "."):
            discard_left_over(self.out / folder)
        for folder in (*PARTS, "done"):
            for path in (self.out / folder).glob("part-*"):
                if path.stem not in kept:
                    path.unlink()

    def _take(self) -> None:
        """Takes up the next shard.

        Raises:
            ValueError: it is damaged; nothing of it is taken.
        """
        done = shard_marker(self.out, self.shards, self.manifest)
        for name, found in damaged(self.out, done).items():
            raise ValueError(f"{self.out / name}: {found}")
        table = files.read_table(self.out / "counts" / part_name(self.shards), files.FEATURES)
        c = {name: table[name].to_numpy() for name in table.column_names}
        key = self.features.known(c["layer"], c["head"], c["feature"])
        columns = None
        if self.selection is not None:
            columns = read_columns(self.out / "firings" / part_name(self.shards), self.features)
        self.totals.add(key, c["count"], c["sum"], c["max"])
        if columns is not None:
            self.selection.add(columns)
        self._count(done)

    def stored(self) -> Columns | None:
        """The next shard's firings, where the whole of them is on disk and sound: what need not be made again."""
        if self.selection is not None:
            return None
        name = f"firings/{part_name(self.shards)}"
        try:
            expected = shard_marker(self.out, self.shards, self.manifest)["files"][name]
            return None if problem(self.out / name, expected) else read_columns(self.out / name, self.features)
        except ValueError:
            return None

    def _count(self, done: dict) -> None:
        self.shards += 1
        self.tokens += done["tokens"]
        self.firings += done["firings"]
        self.documents += done["documents"]
        self.cursor = Cursor.from_json(done["next"])
        self.last = done["last"]
        self._chain.update(done[SEAL].encode())

    def write(self, shard: Shard) -> None:
        """Writes a shard's files, each whole or not at all, then its completion marker."""
        columns = shard.columns(self.features)
        self.check(shard)
        key, number, total, largest = count(columns)
        fired = len(columns)
        if self.selection is not None:
            columns = columns.take(self.selection.add(columns))
        layer, head, feature = self.features.split(key)
        tables = {
            "firings": firings_table(columns, self.features),
            "tokens": shard.tokens(),
            "documents": pa.Table.from_pylist([vars(end) for end in shard.ends], schema=files.DOCUMENTS),
            "counts": pa.table([layer, head, feature, number, total, largest], schema=files.FEATURES),
        }
        name = part_name(shard.number)
        for folder, table in tables.items():
            files.write_table(self.out / folder / name, table, ROWS.get(folder, files.ROW_GROUP), self.out)
        after = shard.passages[-1].after if shard.passages else self.cursor
        done = {
            "shard": shard.number, "passages": len(shard.passages), "tokens": tables["tokens"].num_rows,
            "documents": len(shard.ends), "firings": fired, "kept": len(columns), "last": shard.last,
            "next": after.to_json(),
        }  # fmt: skip
        mark(self.out, Path(name).stem, [self.out / folder / name for folder in tables], self.manifest, **done)
        self.totals.add(key, number, total, largest)
        self._count(shard_marker(self.out, shard.number, self.manifest))


class Writer:
    """Writes shards in a thread, at most one waiting. An error there surfaces at the next call here."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.seconds = 0.0  # spent writing
        self.waited = 0.0  # the model's side stood still for it
        self._error: BaseException | None = None
        self._queue: queue.Queue[Shard | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._run, name="writesae-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (shard := self._queue.get()) is not None:
            if self._error is None:
                began = time.perf_counter()
                try:
                    self.progress.write(shard)
                except BaseException as error:
                    self._error = error
                self.seconds += time.perf_counter() - began
            del shard  # its firings must not live on while the next one is awaited

    def check(self) -> None:
        """Raises what the thread raised."""
        if self._error is not None:
            raise self._error

    def submit(self, shard: Shard) -> None:
        self.check()
        began = time.perf_counter()
        self._queue.put(shard)
        self.waited += time.perf_counter() - began

    def close(self) -> None:
        """Waits until everything submitted is written."""
        began = time.perf_counter()
        self._queue.put(None)
        self._thread.join()
        self.waited += time.perf_counter() - began
        self.check()

    def abandon(self) -> None:
        """Ends the thread after the shards already submitted, and keeps quiet about its errors."""
        self._queue.put(None)
        self._thread.join()
