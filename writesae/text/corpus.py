"""`Corpus`: the documents of files, folders and `datasets` names, in one fixed order. Every command reads text here.

Every document has a place, (file, offset, index), from which reading can start again, so that a resumed collection
reads no document twice. Nothing here holds more than one record, or one block of a text file. What is left out, and
the documents that hold nothing, are counted by reason (`left_out`).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from .. import objects
from ..default.corpus import SPLITS, stdlib_files, stdlib_folder
from . import hub
from .folder import Skipped, shown, walk
from .identity import FileIdentity
from .records import READERS, check_parquet, json_kind
from .unpack import SNIFF, NotText, head_of, open_text, packing

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
FORMATS = "text of any kind, .jsonl, .json (an array, or lines) or .parquet, each also .gz or .zst"


@dataclass(frozen=True)
class Document:
    """One text. `place` is (file, offset, index): where to start reading to meet this document first.

    `open` gives its bytes, UTF-8 without a byte order mark.
    """

    number: int
    source: str
    place: tuple[int, int, int]
    open: Callable[[], BinaryIO]


@dataclass
class Corpus:
    """Documents in a fixed order: files by path, records by their place in the file.

    Attributes:
        files: (path, name shown, kind) with kind "text" (one document a file) or, one document a record, "jsonl",
            "array" and "object" (of a .json file) or "parquet".
        text_field: JSON field, or Parquet or dataset column, that holds the text.
        skipped: what of a folder was left out.
        dataset: (name, configuration, split) of a `datasets` name, in place of files.
        texts: (name, text) pairs, in place of files.
    """

    files: list[tuple[Path, str, str]]
    text_field: str = "text"
    skipped: list[Skipped] = field(default_factory=list)
    dataset: tuple[str, str | None, str] | None = None
    texts: list[tuple[str, str]] | None = None
    _nothing: Counter = field(default_factory=Counter)  # documents without text met, by reason
    _met: dict = field(default_factory=dict)  # a file: the last document counted, so that none is counted twice

    @classmethod
    def from_name(cls, name: str | os.PathLike, text_field: str = "text", argument: str = "corpus") -> Corpus:
        """What a command's `argument` names.

        Args:
            name: a path or a URL, see `from_path`; `stdlib:SPLIT`, the Python standard library's sources;
                `dataset:NAME[:CONFIG][@SPLIT]`.

        Raises:
            ValueError: no such split, and what `from_path` and `from_dataset` raise.
        """
        text = os.fspath(name)
        if text.startswith("dataset:"):
            where, _, split = text.removeprefix("dataset:").partition("@")
            dataset, _, config = where.partition(":")
            return cls.from_dataset(dataset, text_field, split or "train", config or None)
        if not text.startswith("stdlib:"):
            return cls.from_path(name, text_field)
        split = text.removeprefix("stdlib:")
        if split not in SPLITS:
            raise ValueError(f"{argument}: expected stdlib:{', stdlib:'.join(SPLITS)}, got {name}")
        return cls.from_files(stdlib_files(split), root=stdlib_folder())

    @classmethod
    def from_names(cls, names: Iterable[str], text_field: str = "text", argument: str = "corpus") -> Corpus:
        """Several of what `from_name` takes, one after another; a dataset stands alone."""
        given = list(names)
        parts = [cls.from_name(name, text_field, argument) for name in given]
        if len(parts) == 1:
            return parts[0]
        if any(part.dataset for part in parts):
            got = ", ".join(map(str, given))
            raise ValueError(f"{argument}: expected a dataset alone, or files and folders, got {got}")
        files = [file for part in parts for file in part.files]
        if len({name for _, name, _ in files}) < len(files):
            files = [(path, shown(path), kind) for path, _, kind in files]
        return cls(files, text_field, [one for part in parts for one in part.skipped])

    @classmethod
    def from_path(cls, path: str | os.PathLike, text_field: str = "text") -> Corpus:
        """A file, or a folder of files in sorted order, links followed; see `FORMATS` and `folder.walk`. Of a URL
        (`s3://…`, see `objects`) the object, or all below it, read over the connection, nothing kept.

        Left out of a folder, and counted in `skipped`: names that begin with a dot, files that are not text, .json
        files without records, links that lead nowhere, in a circle, or to what is read anyway.

        Raises:
            FileNotFoundError: no such path.
            ValueError: nothing readable in it, a file that is not text, a damaged one, or a missing column.
        """
        if objects.is_url(path):
            objects_found, hidden = objects.walk(os.fspath(path))
            found = cast(list[tuple[Path, str]], objects_found)  # they stand for paths where text is read
            skipped = [Skipped(shown(name), "hidden") for name in hidden]
        else:
            path = Path(path)
            if path.is_file():
                return cls.from_files([path], text_field)
            if not path.is_dir():
                raise FileNotFoundError(f"corpus: no file or folder {shown(path)} (a datasets name goes to --dataset)")
            found, skipped = walk(path)
        files = []
        for file, name in found:
            try:
                files.append((file, name, _kind(file, name, text_field)))
            except NotText as error:
                reason, _, detail = str(error).partition(" (")
                skipped.append(Skipped(name, reason, detail.removesuffix(")")))
            except PermissionError as error:
                skipped.append(Skipped(name, "unreadable", error.strerror or ""))
        if not files:
            others = f", such as {'; '.join(map(str, skipped[-3:]))}" if skipped else ""
            got = "no files" if skipped else "an empty folder"
            got = f"{len(found)} files and no text among them" if found else got
            raise ValueError(f"corpus: expected text in {shown(os.fspath(path))}, got {got}{others}")
        return cls(files, text_field, skipped)._checked()

    @classmethod
    def from_files(
        cls, paths: Sequence[str | os.PathLike], text_field: str = "text", root: str | os.PathLike | None = None
    ) -> Corpus:
        """Exactly these files, in the order given, named by their path below `root` (default: by their file name).

        Raises:
            FileNotFoundError, ValueError: as `from_path`.
        """
        files = []
        for path in map(Path, paths):
            if not path.is_file():
                raise FileNotFoundError(f"corpus: no file {shown(path)}")
            name = shown(path.name if root is None else path.relative_to(root).as_posix())
            try:
                files.append((path, name, _kind(path, name, text_field)))
            except NotText as error:
                raise ValueError(f"corpus: expected text, got {shown(path)}: {error}") from error
            except PermissionError as error:
                raise ValueError(f"corpus: cannot read {shown(path)}: {error.strerror}") from error
        if len({name for _, name, _ in files}) < len(files):
            files = [(path, shown(path), kind) for path, _, kind in files]
        if not files:
            raise ValueError("corpus: expected at least one file, got none")
        return cls(files, text_field)._checked()

    @classmethod
    def from_dataset(
        cls, name: str, text_field: str = "text", split: str = "train", config: str | None = None
    ) -> Corpus:
        """A dataset that the `datasets` package can load: streamed, or its local copy where the Hub is out of reach.

        Raises:
            ValueError: the package is missing, the dataset cannot be had, or has no such column.
        """
        dataset = (name, config, split)
        first = next(hub.records(dataset), None)
        if first is None:
            raise ValueError(f"corpus: expected records, got none in dataset {name} ({split})")
        if not isinstance(first.get(text_field), str | None) or text_field not in first:
            raise ValueError(
                f"field: expected a column of text in dataset {name}, got {text_field!r} "
                f"(its columns: {', '.join(first)})"
            )
        return cls([], text_field, dataset=dataset)

    @classmethod
    def from_texts(cls, texts: Iterable[tuple[str, str]]) -> Corpus:
        """(name, text) pairs held in memory."""
        return cls([], texts=list(texts))

    def _checked(self) -> Corpus:
        if all(path.stat().st_size == 0 for path, _, _ in self.files):
            raise ValueError(f"corpus: expected text, got {len(self.files)} empty files, such as {self.files[0][1]}")
        return self

    def __len__(self) -> int:
        """Files."""
        return len(self.files)

    def left_out(self) -> dict[str, int]:
        """{reason: files and folders left out, or documents without text read so far}."""
        return dict(sorted((Counter(one.reason for one in self.skipped) + self._nothing).items()))

    def fingerprint(self) -> dict:
        """What a resumed run compares: names, sizes and both ends (64 KiB each) of every file."""
        digest = hashlib.sha256()
        for path, name, kind in self.files:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(SNIFF)
                file.seek(max(size - SNIFF, 0))
                digest.update(repr((name, kind, size)).encode() + head + file.read(SNIFF))
        for name, text in self.texts or ():
            digest.update(repr((name, text)).encode())
        return {**self.totals(), "sha256": digest.hexdigest()}

    def totals(self) -> dict:
        """Of `fingerprint` what takes no reading."""
        total = sum(path.stat().st_size for path, *_ in self.files)
        total += sum(len(text.encode(errors="replace")) for _, text in self.texts or ())
        return {
            "files": len(self.files), "bytes": total, "field": self.text_field,
            "dataset": None if self.dataset is None else list(self.dataset),
        }  # fmt: skip

    def identities(self) -> list[FileIdentity]:
        """The files as they stand now, in order; none for a dataset."""
        return [FileIdentity.of(path, name) for path, name, _ in self.files]

    def digest(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        """{file: SHA-256 of all its bytes}, streamed, see `FileIdentity.sha256`; of a dataset its `hub.version`."""
        if self.dataset is not None:
            return {":".join(filter(None, self.dataset)): hub.version(self.dataset)}
        if self.texts is not None:
            return {name: hashlib.sha256(text.encode(errors="replace")).hexdigest() for name, text in self.texts}
        return {identity.name: identity.sha256(progress) for identity in self.identities()}

    def shuffled(self, seed: int) -> tuple[Corpus, np.ndarray]:
        """The same files in an order drawn by `seed`, and where each was before; a dataset or texts as they are."""
        order = np.random.default_rng(seed).permutation(len(self.files))
        return replace(self, files=[self.files[i] for i in order]), order

    def documents(self, place: tuple[int, int, int] = (0, 0, 0), number: int = 0) -> Iterator[Document]:
        """Documents from `place` on, numbered from `number`. Those without text are among them, and counted."""
        for document, missing in self._documents(place, number):
            f, _, index = document.place
            name = self.files[f][1] if self.files else ""
            if missing and index > self._met.get(name, -1):
                self._nothing[missing] += 1
                self._met[name] = index
            yield document

    def _documents(self, place: tuple[int, int, int], number: int) -> Iterator[tuple[Document, str | None]]:
        """(document, why it holds no text, or None)."""
        start, offset, index = place
        if self.dataset is not None:
            for i, record in enumerate(hub.records(self.dataset, index), index):
                yield _record(number, f"{self.dataset[0]}:{i}", (0, 0, i), record.get(self.text_field))
                number += 1
            return
        for i, (name, text) in enumerate((self.texts or [])[index:], index):
            yield _record(number, name, (0, 0, i), text)
            number += 1
        for f in range(start, len(self.files)):
            path, name, kind = self.files[f]
            if f > start:
                offset = index = 0
            if kind != "text":
                for at, i, found in READERS[kind](path, name, self.text_field, offset, index):
                    yield _record(number, f"{name}:{i + (kind in ('jsonl', 'array'))}", (f, at, i), found)
                    number += 1
            elif index == 0:
                empty = path.stat().st_size <= 512 and not head_of(path, name)  # packed, or a byte order mark alone
                opener = lambda path=path, name=name: open_text(path, name)  # noqa: E731
                yield Document(number, name, (f, 0, 0), opener), "empty" if empty else None
                number += 1

    def sample(self, files: int = 8, records: int = 16, block: int = SNIFF) -> tuple[list[bytes], int | None]:
        """(some texts from all over the corpus, an estimate of the whole's text bytes, or None for a dataset)."""
        texts: list[bytes] = []
        if self.dataset is not None or self.texts is not None:
            for document, _ in self._documents((0, 0, 0), 0):
                texts.append(document.open().read(block))
                if len(texts) == records:
                    break
            held = sum(len(text.encode(errors="ignore")) for _, text in self.texts or ())
            return texts, held if self.dataset is None else None
        sizes = [path.stat().st_size for path, _, _ in self.files]
        groups = [_group(path, kind) for path, _, kind in self.files]
        total = float(sum(size for size, group in zip(sizes, groups, strict=True) if group is None))
        seen: defaultdict[tuple, float] = defaultdict(float)  # text bytes read, a group
        stood: defaultdict[tuple, float] = defaultdict(float)  # bytes of file they stood for
        for f in sorted({round(i * (len(self.files) - 1) / max(files - 1, 1)) for i in range(files)}):
            path, name, kind = self.files[f]
            if kind == "text":
                middle = sizes[f] > 4 * block and groups[f] is None
                with open_text(path, name) as stream:
                    if middle:
                        stream.seek(sizes[f] // 2)  # files often start with what they do not go on with
                        stream.readline(block)
                    texts.append(stream.read(block))
                share = len(texts[-1]) / block  # of a packed file, whose length nothing tells, the whole below a block
                length: float = len(texts[-1]) if share < 1 else _length(path, name)
            else:
                read = i = last = 0
                for at, i, text in READERS[kind](path, name, self.text_field, 0, 0):
                    if len(texts) and i >= records:
                        last = at
                        break
                    data = (text or "").encode(errors="ignore")
                    texts.append(data[:block])
                    read += len(data)
                length = read
                if kind == "parquet" and i >= records:
                    length = read * check_parquet(path, name, self.text_field) / records
                elif last:
                    length = read * (_length(path, name) if packing(path)[0] else sizes[f]) / last
            if (group := groups[f]) is not None:
                seen[group] += length
                stood[group] += sizes[f]
        for kept, bytes_of_file in stood.items():
            whole = sum(size for size, other in zip(sizes, groups, strict=True) if other == kept)
            total += whole * seen[kept] / max(bytes_of_file, 1)
        return texts, int(total)


def _group(path: Path, kind: str) -> tuple | None:
    """Files whose bytes stand for alike much text are one group; None: the file is its text."""
    packed = packing(path)[0]
    return None if kind == "text" and packed is None else (kind, packed)


def _length(path: Path, name: str, most: int = 1 << 24) -> float:
    """Bytes of a packed file's text, from its first 16 MiB."""
    with open_text(path, name) as stream:
        read = len(stream.read(most))
        raw = getattr(stream, "raw")  # noqa: B009, of a BufferedReader
        return read if read < most else read * path.stat().st_size / max(raw.consumed(), 1)


def _record(number: int, source: str, place: tuple, text: str | None) -> tuple[Document, str | None]:
    try:
        data = (text or "").encode()  # a null is a document without text
    except UnicodeEncodeError as error:
        raise ValueError(f"corpus: {source} is not valid text: {error}") from error
    missing = "null text" if text is None else None if data else "empty"
    return Document(number, source, place, lambda: io.BytesIO(data)), missing


def _kind(path: Path, name: str, field: str) -> str:
    """How a file is read.

    Raises:
        NotText: it holds no text.
        ValueError: it is damaged, or a Parquet file without the column.
    """
    packed, ending = packing(path)
    kind = _KINDS.get(ending, "text")
    if kind == "parquet":
        check_parquet(path, name, field)
        return kind
    head_of(path, name)
    return json_kind(path, name, field) if kind == "json" else kind
