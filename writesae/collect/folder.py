"""A store's folder: which of its files holds what, and whether a file is what was written.

A file is compared with its digest when it is first needed, so that a damaged one is named rather than believed: one
that is read in parts block by block, those alone that are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import ComparedFile, problem, read_json, read_sealed, sha256
from ..untrusted import is_integer
from . import manifest
from .files import DOCUMENTS, checked, numbers, parquet
from .marks import entries_sound, marked, part_name, shard_marker, shard_numbers
from .mirror import place_of
from .unit_marks import marker_path, unit_marker, unit_numbers


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


class Folder:
    """See `Store`, which asks it."""

    def __init__(self, path):
        self.where = place_of(path, "path", "store")
        self.path = self.where.path
        with self.where.beginning():
            pass  # what says where things are is fetched
        try:
            self.manifest = manifest.read(self.path / "manifest.json")
        except ValueError as error:
            raise ValueError(
                f"path: expected a folder made by `writesae collect`, got {self} ({self._shown(error)})"
            ) from error
        self.mode = self.manifest["mode"]
        self.context = self.manifest["context"]
        self.sites = [tuple(site[:2]) for site in self.manifest["sites"]]
        self.activations = manifest.activations(self.manifest)
        self.complete = (self.path / "summary.json").exists()
        self._sealed = self.manifest["version"] > 1
        self._known: set[str] = set()  # files compared
        self._sound: dict[str, set[int]] = {}  # blocks compared, of files read in parts
        self._units: dict[int, dict] = {}  # markers read
        if not self._sealed:
            warnings.warn(f"{self} was made by an older writesae: its files have no digests", stacklevel=2)
        if not self.complete and self.mode != "all":
            raise ValueError(
                f"path: the collection in {self} is not finished, and mode {self.mode} stores its firings at the "
                "end: run the same `writesae collect` again"
            )

    def __str__(self) -> str:
        return str(self.where)

    def _shown(self, error: ValueError) -> str:
        """What an error of a file says, of the file where it lies."""
        return str(error).replace(str(self.path), str(self))

    @cached_property
    def _tokenizer_files(self) -> dict:
        return marked(self.path, "tokenizer", self._manifest_digest)["files"] if self._sealed else {}

    @cached_property
    def _summary(self) -> dict:
        path = self.path / "summary.json"
        found: Any = read_sealed(path) if self._sealed else read_json(path)
        integrity: Any = found.get("integrity") if isinstance(found, dict) else None
        if self._sealed and not (isinstance(integrity, dict) and entries_sound(integrity.get("files"))):
            raise ValueError(f"{path}: expected the summary of a collection")
        if self._sealed and integrity.get("manifest") != self._manifest_digest:
            raise ValueError(f"{path} is damaged: it is of another collection")
        if not isinstance(found, dict) or type(found.get("shards")) is not int or found["shards"] < 0:
            raise ValueError(f"{path}: expected the summary of a collection, with its shards")
        if self._in_units:
            self._check_layout(path, found)
        elif not _numbered_to(found["shards"], lambda number: self.path / "done" / part_name(number, "json")):
            markers = 1 + max(shard_numbers(self.path), default=-1)
            raise ValueError(f"{path}: expected the {markers} shards that have a marker in done, got {found['shards']}")
        return found

    def _check_layout(self, path: Path, found: dict) -> None:
        layout: Any = found.get("layout")
        sound = isinstance(layout, list) and all(
            isinstance(x, list) and len(x) == 4 and all(map(is_integer, x[1:])) and x[3]
            and isinstance(x[0], str) and x[0].startswith("units/") and x[0].count("/") == 1 for x in layout
        )  # fmt: skip
        if not sound or not _numbered_to(len(layout), lambda number: marker_path(self.path, number)):
            units = len(unit_numbers(self.path))
            raise ValueError(f"{path}: expected a line for each of the {units} units that have a marker in done")

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
            layout = enumerate(self._summary["layout"])
            return [Piece(f"{name}/", shards, passages, size, unit) for unit, (name, shards, passages, size) in layout]
        made = [self._unit(number) for number in unit_numbers(self.path)]
        return [Piece(f"{m['folder']}/", m["shards"], m["passages"], m["shard_passages"], m["unit"]) for m in made]

    def tokenizer_files(self) -> list[str]:
        """Names of the files in the store's folder `tokenizer`."""
        return list(self._tokenizer_files)

    @cached_property
    def _first_passages(self) -> np.ndarray:
        """`[pieces + 1]` numbers of their first passages, and of one behind the last."""
        return np.cumsum([0, *(piece.passages for piece in self.pieces)])

    def _unit(self, number: int) -> dict:
        if number not in self._units:
            try:
                self._units[number] = unit_marker(self.path, number, self._manifest_digest)
            except ValueError as error:
                raise ValueError(self._shown(error)) from error
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
        """A file of the store, compared with its digest, all of it, when it is first needed.

        Raises:
            ValueError: it is damaged or missing; names it.
        """
        path, expected = self.path / name, self._entry(name)
        if expected is not None and name not in self._known:
            self.where.need(name, expected)
            found = problem(path, expected)
            if found is not None:
                shown = self.where.shown(name)
                raise ValueError(f"{shown} is {found}" if found == "missing" else f"{shown} is damaged: {found}")
            self._known.add(name)
        return path

    def _entry(self, name: str) -> dict | None:
        """Size and digests that a file must have; None of an old store, which has none."""
        if not self._sealed:
            return None
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
            raise ValueError(f"{self.where.shown(name)} is no file of this collection")
        return listed[name]

    @contextmanager
    def _table(self, name: str, schema: pa.Schema) -> Iterator[pq.ParquetFile]:
        """A table, open. What is read of it is compared before.

        Raises:
            ValueError: also from the body, see `parquet`.
        """
        expected = self._entry(name)
        with ExitStack() as stack:
            if name in self._known or expected is None or "blocks" not in expected:
                yield stack.enter_context(parquet(self.file(name), schema))
                return

            def compared(path: Path) -> ComparedFile:
                return stack.enter_context(ComparedFile(path, expected, self._sound.setdefault(name, set())))

            yield stack.enter_context(parquet(self.where.opened(name), schema, compared))

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        with self._table(name, schema) as file:
            return checked(file.read(use_threads=False))

    def _parts(self, table: str) -> list[str]:
        return [name for piece in self.pieces for name in piece.names(table)]

    def _part(self, table: str, passage: int) -> str:
        if not 0 <= passage < self._first_passages[-1]:
            raise ValueError(f"{self}: passage {passage} is asked for, of {int(self._first_passages[-1])} it has")
        at = int(np.searchsorted(self._first_passages, passage, side="right")) - 1
        piece = self.pieces[at]
        number = (passage - int(self._first_passages[at])) // piece.shard_passages
        return f"{piece.folder}{table}/{part_name(number)}"


class Documents:
    """Finds documents in a table sorted by their number, reading the row groups they are in.

    Args: table: opens the file, or None; then `whole` is the table.
    """

    _HELD = 8  # row groups in memory

    def __init__(self, table: Callable[[], AbstractContextManager[pq.ParquetFile]] | None, whole=None):
        self._open = table
        self._held: dict[int, pa.Table] = {} if whole is None else {0: whole}
        self._last = np.array([np.iinfo(np.int32).max])  # number of the last document of every row group
        if table is None:
            self.count = len(whole)
            return
        with table() as file:
            self.count = file.metadata.num_rows
            groups = [file.metadata.row_group(g).column(0).statistics for g in range(file.num_row_groups)]
            limits = [s.max for s in groups if s is not None and s.has_min_max]
        if len(limits) == len(groups) and limits == sorted(limits):
            self._last = np.array(limits)
        else:  # of another writer: all of it, once
            self._open = None
            with table() as file:
                self._held = {0: checked(file.read(use_threads=False))}

    def find(self, document: int) -> dict | None:
        """A document's row, without its digest; None where there is none."""
        group = int(np.searchsorted(self._last, document))
        if group == len(self._last):
            return None
        table = self._group(group)
        known = numbers(table["document"])
        at = int(np.searchsorted(known, document))
        if at == len(known) or known[at] != document:
            return None
        return table.slice(at, 1).to_pylist()[0]

    def _group(self, number: int) -> pa.Table:
        if number not in self._held:
            assert self._open is not None
            names = [name for name in DOCUMENTS.names if name != "sha256"]
            with self._open() as file:
                found = checked(file.read_row_group(number, names, use_threads=False))
            while len(self._held) >= self._HELD:
                del self._held[next(iter(self._held))]
            self._held[number] = found
        return self._held[number]


def _numbered_to(count: int, path: Callable[[int], Path]) -> bool:
    """Whether of numbered files the last of so many is there and no further one: what can be said without a list."""
    return (count == 0 or path(count - 1).exists()) and not path(count).exists()
