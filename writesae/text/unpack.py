"""`open_text`: any file as UTF-8 bytes, out of gzip or Zstandard and of the encoding its byte order mark names."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import tempfile
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from ..files import PositionedReader

PACKED = {".gz": "gzip", ".zst": "zstd"}
SNIFF = 65_536
_PIECE = 1 << 18
# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip


class NotText(ValueError):
    """A file that holds something else than text; the message is the reason alone."""


class Damaged(ValueError):
    """A file that is not what its ending says, or breaks off."""


def packing(path: Path) -> tuple[str | None, str]:
    """("gzip", "zstd" or None, the ending below it, lower case): ("gzip", ".jsonl") of a.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        return PACKED[suffixes[-1]], suffixes[0] if len(suffixes) == 2 else ""
    return None, suffixes[-1] if suffixes else ""


def open_text(path: Path, name: str) -> BinaryIO:
    """The file's text as UTF-8 bytes without a byte order mark. Seeking back in a packed file reads it anew.

    Raises:
        Damaged: here or while reading, for a file that cannot be unpacked or is not of the encoding it names.
    """
    packed, _ = packing(path)
    if packed is None:
        file = path.open("rb")
        mark, _ = _mark(file.read(4))
        if not mark:
            file.seek(0)
            return file
        file.close()
    return io.BufferedReader(_Unpacked(path, name, packed), _PIECE)


def open_bytes(path: Path, name: str) -> BinaryIO:
    """The file unpacked, for formats that are read from any place: a packed one goes through a temporary file."""
    packed, _ = packing(path)
    if packed is None:
        return path.open("rb")
    unpacked = tempfile.TemporaryFile()
    try:
        with _unpacking(path, name, packed) as stream:
            while piece := stream.read(_PIECE):
                unpacked.write(piece)
    except BaseException:
        unpacked.close()
        raise
    unpacked.seek(0)
    return unpacked


def head_of(path: Path, name: str) -> bytes:
    """The first 64 KiB of a file's text, cut at a whole character.

    Raises:
        NotText: it is not text.
        Damaged: it cannot be unpacked.
    """
    try:
        with open_text(path, name) as stream:
            head = stream.read(SNIFF)
    except Damaged as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise NotText(f"not {error.__cause__.encoding.upper()} (as its first bytes say)") from error
        raise
    if b"\0" in head:
        raise NotText("binary (holds a zero byte)")
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # A character cut by the end of the sniffed part is no mistake.
        if len(head) < SNIFF or error.start < len(head) - 3:
            raise NotText(f"not UTF-8 (byte 0x{head[error.start]:02x} at {error.start})") from error
        head = head[: error.start]
    return head


def _mark(head: bytes) -> tuple[bytes, str]:
    return next(((mark, encoding) for mark, encoding in _MARKS if head.startswith(mark)), (b"", "utf-8"))


@contextlib.contextmanager
def _unpacking(path: Path, name: str, packed: str | None, raw: io.BufferedReader | None = None) -> Iterator:
    """Something with `read(n)`; what goes wrong in it, or in the block within, is told with the file's name."""
    try:
        with raw or path.open("rb") as raw:
            if packed == "gzip":
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream
            elif packed == "zstd" and raw.peek(1):
                with pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as stream:
                    yield stream
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowException) as error:
        raise Damaged(f"corpus: {name} is damaged: {_line(error)}") from error
    except OSError as error:
        if packed == "zstd" and error.errno is None:  # pyarrow's own
            raise Damaged(f"corpus: {name} is damaged: {_line(error)}") from error
        raise


class _Unpacked(PositionedReader):
    """Bytes of UTF-8 from a file that is packed or has a byte order mark; read forwards, seeks back from the start."""

    def __init__(self, path: Path, name: str, packed: str | None):
        self._arguments = (path, name, packed)
        self._pieces, self._rest, self._at = self._read(), memoryview(b""), 0
        self._file: io.BufferedReader | None = None

    def consumed(self) -> int:
        """Bytes of the packed file that were taken for what was read so far, about."""
        if self._file is None or self._file.closed:
            return self._arguments[0].stat().st_size
        return self._file.tell()

    def _read(self) -> Generator[bytes]:
        path, name, packed = self._arguments
        self._file = path.open("rb")
        with _unpacking(path, name, packed, self._file) as stream:
            piece = b""
            while len(piece) < 4 and (more := stream.read(_PIECE)):
                piece += more
            mark, encoding = _mark(piece)
            piece = piece[len(mark) :]
            if encoding == "utf-8":  # checked where it is used, with the document's name and place
                while piece:
                    yield piece
                    piece = stream.read(_PIECE)
                return
            decoder = codecs.getincrementaldecoder(encoding)()
            try:
                while piece:
                    yield decoder.decode(piece).encode()
                    piece = stream.read(_PIECE)
                yield decoder.decode(b"", final=True).encode()
            except UnicodeError as error:
                known = error if isinstance(error, UnicodeDecodeError) else None
                raise Damaged(f"corpus: {name} is not {encoding.upper()} as its first bytes say: {error}") from known

    def readinto(self, buffer) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest, self._at = self._rest[n:], self._at + n
        return n

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            position += self._at
        elif whence == io.SEEK_END:
            raise io.UnsupportedOperation("a packed file's length is not known")
        if position < self._at:
            self._pieces.close()
            self._pieces, self._rest, self._at = self._read(), memoryview(b""), 0
        skipped = bytearray(min(position - self._at, _PIECE))
        while self._at < position and self.readinto(memoryview(skipped)[: position - self._at]):
            pass
        return self._at

    def close(self) -> None:
        self._pieces.close()
        super().close()


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
