"""`Corpus`: the documents of text files, folders, JSONL, Parquet or a `datasets` name, in one fixed order.

Every document has a place, (file, offset, index), from which reading can start again, so that a resumed collection
reads no document twice. Nothing here holds more than one record, or one block of a text file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..default.corpus import SPLITS, stdlib_files, stdlib_folder

_SNIFF = 65_536
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Document:
    """One text. `place` is (file, offset, index): where to start reading to meet this document first."""

    number: int
    source: str
    place: tuple[int, int, int]
    open: Callable[[], BinaryIO]


@dataclass
class Corpus:
    """Documents in a fixed order: files by path, records by their place in the file.

    Attributes:
        files: (path, name shown, kind) with kind "text" (one document a file), "jsonl" or "parquet" (one a record).
        text_field: JSONL field, or Parquet or dataset column, that holds the text.
        skipped: files of a folder left out because they are not text, by name.
        dataset: (name, configuration, split) of a `datasets` name, in place of files.
    """

    files: list[tuple[Path, str, str]]
    text_field: str = "text"
    skipped: list[str] = field(default_factory=list)
    dataset: tuple[str, str | None, str] | None = None

    @classmethod
    def from_name(cls, name: str, text_field: str = "text", argument: str = "corpus") -> Corpus:
        """What a command's `argument` names: a path, or `stdlib:SPLIT`, the Python standard library's sources.

        Raises:
            ValueError: no such split, and what `from_path` raises.
        """
        if not name.startswith("stdlib:"):
            return cls.from_path(name, text_field)
        split = name.removeprefix("stdlib:")
        if split not in SPLITS:
            raise ValueError(f"{argument}: expected stdlib:{', stdlib:'.join(SPLITS)}, got {name}")
        return cls.from_files(stdlib_files(split), root=stdlib_folder())

    @classmethod
    def from_path(cls, path: str | os.PathLike, text_field: str = "text") -> Corpus:
        """A text, JSONL or Parquet file (by its ending), or a folder of them, walked in sorted order.

        Folders and files that start with a dot are left out; so are binary files of a folder (see `skipped`).

        Raises:
            FileNotFoundError: no such path.
            ValueError: nothing readable in it, a file that is not text, or a missing column.
        """
        path = Path(path)
        if path.is_file():
            return cls.from_files([path], text_field)
        if not path.is_dir():
            raise FileNotFoundError(f"corpus: no file or folder {path} (a datasets name goes to --dataset)")
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(folder) / name for name in names if not name.startswith(".")]
        found = sorted(file for file in found if file.is_file())
        readable, skipped = [], []
        for file in found:
            name = file.relative_to(path).as_posix()
            reason = _not_text(file)
            if reason is None:
                readable.append((file, name, _KINDS.get(file.suffix.lower(), "text")))
            else:
                skipped.append(f"{name}: {reason}")
        if not readable:
            if skipped:
                raise ValueError(
                    f"corpus: expected text in {path}, got {len(skipped)} files and no text among them, "
                    f"such as {'; '.join(skipped[:3])}"
                )
            raise ValueError(f"corpus: expected text in {path}, got an empty folder")
        return cls(readable, text_field, skipped)._checked()

    @classmethod
    def from_files(
        cls, paths: list[str | os.PathLike], text_field: str = "text", root: str | os.PathLike | None = None
    ) -> Corpus:
        """Exactly these files, in the order given, named by their path below `root` (default: by their file name).

        Raises:
            FileNotFoundError, ValueError: as `from_path`.
        """
        files = []
        for path in map(Path, paths):
            if not path.is_file():
                raise FileNotFoundError(f"corpus: no file {path}")
            reason = _not_text(path)
            if reason is not None:
                raise ValueError(f"corpus: expected text, got {path}: {reason}")
            name = path.name if root is None else path.relative_to(root).as_posix()
            files.append((path, name, _KINDS.get(path.suffix.lower(), "text")))
        if len({name for _, name, _ in files}) < len(files):
            files = [(path, path.as_posix(), kind) for path, _, kind in files]
        if not files:
            raise ValueError("corpus: expected at least one file, got none")
        return cls(files, text_field)._checked()

    @classmethod
    def from_dataset(
        cls, name: str, text_field: str = "text", split: str = "train", config: str | None = None
    ) -> Corpus:
        """A dataset that the `datasets` package can load, streamed.

        Raises:
            ValueError: the package is missing, or the dataset has no such column.
        """
        corpus = cls([], text_field, [], (name, config, split))
        first = next(iter(corpus._stream()), None)
        if first is None:
            raise ValueError(f"corpus: expected records, got none in dataset {name} ({split})")
        if not isinstance(first.get(text_field), str):
            raise ValueError(
                f"field: expected a column of text in dataset {name}, got {text_field!r} "
                f"(its columns: {', '.join(first)})"
            )
        return corpus

    def _checked(self) -> Corpus:
        for path, name, kind in self.files:
            if kind == "parquet":
                schema = pq.read_schema(path)
                at = schema.get_field_index(self.text_field)
                if at < 0:
                    raise ValueError(
                        f"field: expected a column of {name}, got {self.text_field!r} "
                        f"(its columns: {', '.join(schema.names)})"
                    )
                kind_of = schema.field(at).type
                if not (pa.types.is_string(kind_of) or pa.types.is_large_string(kind_of)):
                    raise ValueError(
                        f"field: expected a column of text, got {self.text_field!r} of {kind_of} in {name}"
                    )
        if all(path.stat().st_size == 0 for path, _, _ in self.files):
            raise ValueError(f"corpus: expected text, got {len(self.files)} empty files")
        return self

    def fingerprint(self) -> dict:
        """What a resumed run compares: names, sizes and both ends (64 KiB each) of every file."""
        digest = hashlib.sha256()
        total = 0
        for path, name, kind in self.files:
            size = path.stat().st_size
            total += size
            with open(path, "rb") as file:
                head = file.read(_SNIFF)
                file.seek(max(size - _SNIFF, 0))
                digest.update(repr((name, kind, size)).encode() + head + file.read(_SNIFF))
        return {
            "files": len(self.files), "bytes": total, "sha256": digest.hexdigest(), "field": self.text_field,
            "dataset": None if self.dataset is None else list(self.dataset),
        }  # fmt: skip

    def documents(self, place: tuple[int, int, int] = (0, 0, 0), number: int = 0) -> Iterator[Document]:
        """Documents from `place` on, numbered from `number`."""
        start, offset, index = place
        if self.dataset is not None:
            for i, record in enumerate(self._stream(index), index):
                yield self._record(number + i - index, f"{self.dataset[0]}:{i}", (0, 0, i), record.get(self.text_field))
            return
        for f in range(start, len(self.files)):
            path, name, kind = self.files[f]
            if f > start:
                offset = index = 0
            reader = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}[kind]
            for document in reader(f, path, name, offset, index, number):
                number = document.number + 1
                yield document

    def sample(self, files: int = 8, records: int = 16, block: int = _SNIFF) -> tuple[list[bytes], int | None]:
        """(some texts from all over the corpus, an estimate of the whole's text bytes, or None for a dataset)."""
        if self.dataset is not None:
            texts = []
            for document in self.documents():
                texts.append(document.open().read(block))
                if len(texts) == records:
                    break
            return texts, None
        texts, total = [], 0.0
        sizes = {kind: sum(p.stat().st_size for p, _, k in self.files if k == kind) for kind in set(_KINDS.values())}
        total += sum(p.stat().st_size for p, _, k in self.files if k == "text")
        seen = dict.fromkeys(sizes, (0, 0))  # text bytes read, bytes of file they stood for
        for f in sorted({round(i * (len(self.files) - 1) / max(files - 1, 1)) for i in range(files)}):
            path, _, kind = self.files[f]
            read, last = 0, 0
            for i, document in enumerate(self.documents((f, 0, 0))):
                if document.place[0] != f or i == records:
                    last = document.place[1]
                    break
                with document.open() as stream:
                    if kind == "text" and path.stat().st_size > 4 * block:
                        stream.seek(path.stat().st_size // 2)  # files often start with what they do not go on with
                        stream.readline(block)
                    texts.append(stream.read(block))
                if kind != "text":
                    read += len(document.open().getvalue())
            else:
                i, last = i + 1, 0
            if kind == "jsonl":
                stood = last or path.stat().st_size
            elif kind == "parquet":
                rows = pq.read_metadata(path).num_rows
                stood = path.stat().st_size * min(i, rows) / max(rows, 1)
            else:
                continue
            seen[kind] = (seen[kind][0] + read, seen[kind][1] + stood)
        total += sum(sizes[kind] * text / max(stood, 1) for kind, (text, stood) in seen.items())
        return texts, int(total)

    def _text(self, f, path, name, offset, index, number) -> Iterator[Document]:
        if index == 0:
            yield Document(number, name, (f, 0, 0), lambda: open(path, "rb"))

    def _jsonl(self, f, path, name, offset, index, number) -> Iterator[Document]:
        with open(path, "rb") as file:
            file.seek(offset)
            while line := file.readline():
                if line.strip():
                    where = f"{name}:{index + 1}"
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"corpus: {where} is not JSON: {error}") from error
                    if not isinstance(record, dict) or not isinstance(record.get(self.text_field), str):
                        got = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                        raise ValueError(
                            f"field: expected text in {self.text_field!r} at {where}, got {got or 'nothing'}"
                        )
                    yield self._record(number, where, (f, offset, index), record[self.text_field])
                    number += 1
                offset, index = offset + len(line), index + 1

    def _parquet(self, f, path, name, offset, index, number) -> Iterator[Document]:
        file = pq.ParquetFile(path)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > index:
                at = first
                for batch in file.iter_batches(256, row_groups=[group], columns=[self.text_field]):
                    for text in batch.column(0).to_pylist():
                        if at >= index:
                            yield self._record(number, f"{name}:{at}", (f, 0, at), text)
                            number += 1
                        at += 1
            first += rows

    def _record(self, number: int, source: str, place: tuple[int, int, int], text: str | None) -> Document:
        try:
            data = (text or "").encode()  # a null is a document without text
        except UnicodeEncodeError as error:
            raise ValueError(f"corpus: {source} is not valid text: {error}") from error
        return Document(number, source, place, lambda: io.BytesIO(data))

    def _stream(self, skip: int = 0):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "dataset: needs the datasets package, which is not installed: pip install writesae[datasets]"
            ) from error
        name, config, split = self.dataset
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        return stream.skip(skip) if skip else stream


def _not_text(path: Path) -> str | None:
    """Why a file cannot be read as text, or None. Looks at its first 64 KiB."""
    with open(path, "rb") as file:
        head = file.read(_SNIFF)
    if path.suffix.lower() == ".parquet":
        return None if head[:4] == b"PAR1" else "not a Parquet file"
    if b"\0" in head:
        return "binary (holds a zero byte)"
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # A character cut by the end of the sniffed part is no mistake.
        if len(head) < _SNIFF or error.start < len(head) - 3:
            return f"not UTF-8 (byte 0x{head[error.start]:02x} at {error.start})"
    return None
