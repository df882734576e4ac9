"""Records of a file, one at a time: lines of JSON, a JSON array, a JSON object, Parquet rows.

Every reader yields (offset, index, text) from a place on: the record's first byte in the unpacked text, its number in
the file, and its text or None for a null. At most one record, of at most 64 MiB, is held.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..untrusted import first_line
from .unpack import SNIFF, Damaged, NotText, open_bytes, open_text

LIMIT = 64 * 2**20
_BLANK = " \t\r\n"


class NoField(ValueError):
    """A record without text under the name asked for."""


class NotJson(Damaged):
    """Not what JSON should be."""


def json_kind(path: Path, name: str, field: str) -> str:
    """What a .json file is: "array", "jsonl" (lines of JSON, as many are named so) or "object", a single record.

    Raises:
        NotText: its first record holds no text in `field`, or it is not JSON.
    """
    with open_text(path, name) as stream:
        head = stream.read(SNIFF).lstrip()
        if not head:
            return "jsonl"
        stream.seek(0)
        kind = "array" if head.startswith(b"[") else "object"
        if kind == "object":
            with contextlib.suppress(ValueError):
                line = stream.readline(LIMIT)
                while line and not line.strip():
                    line = stream.readline(LIMIT)
                _loads(line, name)
                kind = "jsonl"
    try:
        for _ in READERS[kind](path, name, field, 0, 0):
            break
    except NoField as error:
        raise NotText(f"JSON without text in {field!r}") from error
    except NotJson as error:
        raise NotText(f"not JSON ({str(error).removeprefix('corpus: ')})") from error
    return kind


def lines(path: Path, name: str, field: str, offset: int, index: int) -> Iterator[tuple[int, int, str | None]]:
    """Lines of JSON; empty lines count but hold nothing."""
    with open_text(path, name) as stream:
        stream.seek(offset)
        while line := stream.readline(LIMIT + 1):
            if len(line) > LIMIT:
                raise Damaged(f"corpus: {name}:{index + 1} is larger than {LIMIT >> 20} MiB, too long for a record")
            if line.strip():
                where = f"{name}:{index + 1}"
                yield offset, index, text_of(_loads(line, where), field, where)
            offset, index = offset + len(line), index + 1


def array(path: Path, name: str, field: str, offset: int, index: int) -> Iterator[tuple[int, int, str | None]]:
    """Elements of a JSON array, without reading it whole."""
    with open_text(path, name) as stream:
        reader = _ArrayReader(stream, name, offset)
        if offset == 0:
            reader.expect("[")
            if reader.next() == "]":
                return reader.end()
        while True:
            reader.next()
            at = reader.offset
            where = f"{name}:{index + 1}"
            yield at, index, text_of(reader.value(where), field, where)
            index += 1
            if reader.next() == "]":
                return reader.end()
            reader.expect(",")


def single(path: Path, name: str, field: str, offset: int, index: int) -> Iterator[tuple[int, int, str | None]]:
    """The one object of a JSON file."""
    with open_text(path, name) as stream:
        data = stream.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise Damaged(f"corpus: {name} is one JSON object of more than {LIMIT >> 20} MiB; write its records as .jsonl")
    if index == 0:
        yield 0, 0, text_of(_loads(data, name), field, name)


def parquet(path: Path, name: str, field: str, offset: int, index: int) -> Iterator[tuple[int, int, str | None]]:
    """Rows of a Parquet file."""
    with _parquet(path, name) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > index:
                at = first
                for batch in file.iter_batches(256, row_groups=[group], columns=[field]):
                    for text in _listed(batch.column(0), name, at):
                        if at >= index:
                            yield 0, at, _decoded(text, f"{name}:{at}")
                        at += 1
            first += rows


READERS = {"jsonl": lines, "array": array, "object": single, "parquet": parquet}


def check_parquet(path: Path, name: str, field: str) -> int:
    """The number of rows of a Parquet file.

    Raises:
        ValueError: damaged, or without a column of text `field`.
    """
    with _parquet(path, name) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    at = schema.get_field_index(field)
    if at < 0:
        raise ValueError(f"field: expected a column of {name}, got {field!r} (its columns: {', '.join(schema.names)})")
    kind = schema.field(at).type
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    if not any(
        check(held)
        for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
                      types.is_large_binary, types.is_binary_view)
    ):  # fmt: skip
        raise ValueError(f"field: expected a column of text, got {field!r} of {kind} in {name}")
    return rows


@contextlib.contextmanager
def _parquet(path: Path, name: str) -> Iterator[pq.ParquetFile]:
    with open_bytes(path, name) as stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=1 << 20)
            yield file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            why = "not a Parquet file" if _magic(stream) != b"PAR1" else f"damaged: {first_line(error)}"
            raise Damaged(f"corpus: expected Parquet, got {name}: {why}") from error


def _listed(column: pa.Array, name: str, at: int) -> list:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise Damaged(f"corpus: {name} holds text that is not UTF-8 in rows {at} to {at + len(column) - 1}") from error


def _magic(stream: BinaryIO) -> bytes:
    stream.seek(0)
    return stream.read(4)


def text_of(record, field: str, where: str) -> str | None:
    """The text of a record: its `field`, or the record itself where it is a string; None for a null.

    Raises:
        NoField: neither.
    """
    text = record.get(field, record) if isinstance(record, dict) else record
    if text is not None and not isinstance(text, str):
        got = ", ".join(record) or "nothing" if text is record and isinstance(record, dict) else type(text).__name__
        raise NoField(f"field: expected text in {field!r} at {where}, got {got}")
    return text


def _decoded(text: str | bytes | None, where: str) -> str | None:
    if not isinstance(text, bytes):
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus: expected UTF-8, got byte 0x{text[error.start]:02x} at {error.start} of {where}"
        ) from error


def _loads(data: bytes, where: str):
    try:
        return json.loads(data.decode())
    except ValueError as error:
        raise NotJson(f"corpus: {where} is not JSON: {error}") from error
    except RecursionError as error:
        raise NotJson(f"corpus: {where} is JSON nested too deeply to read") from error


class _ArrayReader:
    """Values of a JSON text one after another, from a buffer that holds little more than the value at hand."""

    def __init__(self, stream: BinaryIO, name: str, offset: int):
        stream.seek(offset)
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0
        self.offset = offset  # byte of the character at hand

    def _more(self) -> bool:
        data = self._stream.read(max(SNIFF, len(self._text) - self._at))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise NotJson(f"corpus: expected UTF-8 in {self._name}: {error}") from error
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(data)

    def _pass(self, end: int) -> None:
        self.offset += len(self._text[self._at : end].encode())
        self._at = end

    def next(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in _BLANK:
                end += 1
            self._pass(end)
            if end < len(self._text):
                return self._text[end]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        got = self.next()
        if got != character:
            raise NotJson(
                f"corpus: {self._name} is not a JSON array: expected {character!r} at byte {self.offset}, got "
                + (repr(got) if got else "the end of the file")
            )
        self._pass(self._at + 1)

    def end(self) -> None:
        self.expect("]")
        if self.next():
            raise NotJson(f"corpus: {self._name} is not a JSON array: it goes on behind its end, byte {self.offset}")

    def value(self, where: str):
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except RecursionError as error:
                raise NotJson(f"corpus: {where} is JSON nested too deeply to read") from error
            except ValueError as error:
                if len(self._text) - self._at > LIMIT:
                    raise NotJson(f"corpus: {where} is not JSON, or larger than {LIMIT >> 20} MiB") from error
                if not self._more():
                    raise NotJson(f"corpus: {where} is not JSON: {error}") from error
                continue
            self._pass(end)
            return value
