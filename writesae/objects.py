"""Object stores: what lies under `s3://BUCKET/PREFIX`, `gs://…` (through pyarrow), `hf://…` and whatever fsspec knows.

An object appears whole or not at all, and nothing is renamed: what must be there first is written first. Every call is
tried again where a connection is cut, an object read goes on where it broke off, and what fails for good is a one-line
error that names the URL. Credentials come from the environment, as the store's own tools take them; a URL that holds
some is refused without being repeated.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TypeVar
from urllib.parse import urlsplit

from .files import SEAL, SizedReader, write_blocks
from .untrusted import first_line

TRIES = 8  # of a call; about 15 s with the pauses between them
_PAUSE, _LONGEST = 0.1, 10.0  # seconds before the second try, doubled for every other
_BLOCK = 1 << 22
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKETS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, in the environment",
            "gs": "GOOGLE_APPLICATION_CREDENTIALS in the environment"}  # fmt: skip
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|INVALID_TOKEN|INVALID_CLIENT_TOKEN"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|\b40[13]\b|[Pp]ermission|[Cc]redentials|Unauthorized|Forbidden"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|[Bb]ucket '[^']*' not found|NoSuchBucket")

T = TypeVar("T")


class Unreachable(OSError):
    """An object store did not answer, however often it was asked."""


def is_url(value) -> bool:
    """Whether this names something in an object store."""
    return isinstance(value, str) and _URL.fullmatch(value) is not None


def split_url(url: str, argument: str) -> tuple[str, str]:
    """(scheme, path below it, without slashes at its ends).

    Raises:
        ValueError: credentials or a query in it, which are not repeated, or no bucket.
    """
    scheme, path = _URL.fullmatch(url).groups()  # type: ignore[union-attr]
    host = path.split("/", 1)[0]
    if "@" in host or ":" in host or (scheme in _BUCKETS and ("?" in path or "@" in path)):
        raise ValueError(
            f"{argument}: expected {scheme}://BUCKET/PREFIX, got a URL with credentials or a query in it: put "
            f"{_BUCKETS.get(scheme, 'credentials in the environment')} (another server: AWS_ENDPOINT_URL)"
        )
    parts = path.strip("/").split("/")
    if not parts[0] or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{argument}: expected {scheme}://BUCKET/PREFIX, got {url}")
    return scheme, "/".join(parts)


@cache
def _file_system(scheme: str, bucket: str):
    """A pyarrow file system. One a bucket: it holds connections."""
    from pyarrow import fs

    if scheme == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options = {}
        if server:
            address = urlsplit(server)
            if address.scheme not in ("http", "https") or not address.netloc or "@" in server:
                raise ValueError("AWS_ENDPOINT_URL: expected http://HOST:PORT or https://HOST, got something else")
            options = {"endpoint_override": address.netloc, "scheme": address.scheme}
        region = region or ("us-east-1" if server else fs.resolve_s3_region(bucket))
        return fs.S3FileSystem(
            region=region, connect_timeout=10, request_timeout=30, allow_delayed_open=True,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3), **options,
        )  # fmt: skip
    if scheme == "gs":
        return fs.GcsFileSystem()
    import fsspec

    return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))


class Objects:
    """The objects under a URL.

    Args:
        argument: what errors name.

    Attributes:
        url: as given, without a slash at its end.

    Raises:
        ValueError: no such scheme, a package it needs is missing, or credentials in the URL; and, from every method, no
            permission, or no such bucket.
        Unreachable: from every method.
    """

    def __init__(self, url: str, argument: str = "out"):
        self.argument = argument
        self.scheme, self.root = split_url(url, argument)
        self.url = f"{self.scheme}://{self.root}"
        bucket = self.root.split("/")[0]
        try:
            self.fs = self._again(self.url, lambda: _file_system(self.scheme, bucket))
        except (ImportError, AttributeError) as error:  # an AttributeError: pyarrow was built without it
            raise ValueError(
                f"{argument}: {self.url} needs a package that is not installed: {first_line(error)}"
            ) from error
        except ValueError as error:
            if self.scheme in _BUCKETS:
                raise
            raise ValueError(
                f"{argument}: expected s3://, gs://, hf:// or another store that fsspec knows, got {self.url}: "
                f"{first_line(error)}"
            ) from error

    def at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def shown(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.scheme}://{self.at(name)}"

    def names(self, under: str = "", deep: bool = True) -> dict[str, tuple[int, int]]:
        """{name: (bytes, time of its last change in ns)} of the objects in a folder, sorted; deep: and in its own."""
        from pyarrow import fs

        selector = fs.FileSelector(self.at(under), recursive=deep, allow_not_found=True)
        found = self._again(self.shown(under), lambda: self.fs.get_file_info(selector))
        start = len(self.root) + 1
        files = {x.path.lstrip("/")[start:]: (x.size, x.mtime_ns or 0) for x in found if x.type == fs.FileType.File}
        return dict(sorted(files.items()))

    def size(self, name: str) -> int | None:
        """Bytes of an object; None: there is none."""
        from pyarrow import fs

        found = self._again(self.shown(name), lambda: self.fs.get_file_info(self.at(name)))
        return found.size if found.type == fs.FileType.File else None

    def tag(self, name: str) -> tuple[int, int, str]:
        """(bytes, time of its last change in ns, what the store says of its content, such as an ETag) of an object.

        Raises:
            FileNotFoundError: there is none.
        """

        def ask():
            if self.scheme == "s3":  # which says all of it at once
                with self.fs.open_input_file(self.at(name)) as file:
                    changed = (file.metadata() or {}).get("Last-Modified", b"1970-01-01T00:00:00Z").decode()
                    at = datetime.fromisoformat(changed.replace("Z", "+00:00"))
                    return file.size(), int(at.timestamp()) * 10**9, _content(file)
            found = self.fs.get_file_info(self.at(name))
            if found.size is None:
                raise FileNotFoundError(2, "no such object", self.shown(name))
            if self.scheme == "gs":
                with self.fs.open_input_file(self.at(name)) as file:
                    return found.size, found.mtime_ns or 0, _content(file)
            more = self.fs.handler.fs.info(self.at(name))
            kept = {key: str(more[key]) for key in _TAGS if key in more}
            return found.size, found.mtime_ns or 0, repr(kept)

        return self._again(self.shown(name), ask)

    def blocks(self, name: str, offset: int = 0, size: int = _BLOCK) -> Iterator[bytes]:
        """An object's bytes from `offset` on, going on where a connection was cut.

        Raises:
            FileNotFoundError: there is none.
            ValueError: another one took its place meanwhile.
        """
        file, first = None, None

        def read() -> bytes:
            nonlocal file, first
            try:
                if file is None:
                    file = self.fs.open_input_file(self.at(name))
                    now = file.size(), _content(file)
                    if first not in (None, now):
                        raise ValueError(f"{self.argument}: {self.shown(name)} changed while it was read")
                    first = now
                    file.seek(min(offset, now[0]))
                wanted = min(size, first[0] - offset)
                data = file.read(wanted) if wanted > 0 else b""
                if len(data) < wanted:
                    raise OSError(f"{len(data)} of {wanted} bytes came")
                return data
            except OSError:
                file = None
                raise

        while block := self._again(self.shown(name), read):
            offset += len(block)
            yield block

    def read(self, name: str) -> bytes:
        """All of a small object. Raises: as `blocks`."""
        return b"".join(self.blocks(name))

    def fetch(self, name: str, path: Path) -> None:
        """Copies an object to a file, whole or not at all. Raises: as `blocks`."""
        write_blocks(path, self.blocks(name))

    def sha256(self, name: str, progress: Callable[[int], object] | None = None) -> str:
        """Digest of an object's bytes; `progress` is told of each block. Raises: as `blocks`."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
            if progress is not None:
                progress(len(block))
        return digest.hexdigest()

    def problem(self, name: str, expected: dict, progress: Callable[[int], object] | None = None) -> str | None:
        """What is wrong with an object, see `files.problem`."""
        size = self.size(name)
        if size is None:
            return "missing"
        if size != expected["bytes"]:
            return f"expected {expected['bytes']} bytes, got {size}"
        return None if self.sha256(name, progress) == expected[SEAL] else "its content and its digest disagree"

    def put(self, name: str, source: Path | bytes) -> None:
        """Writes an object, whole or not at all, in the place of what is there."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size

        def write() -> None:
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
                data = file.read(_BLOCK)
                with self.fs.open_output_stream(self.at(name)) as stream:
                    while data:
                        stream.write(data)
                        data = file.read(_BLOCK)
            found = self.size(name)
            if found != size:
                raise OSError(f"{found} of {size} bytes are there")

        self._again(self.shown(name), write)

    def delete(self, name: str) -> None:
        """Removes an object that may not be there."""

        def remove() -> None:
            try:
                self.fs.delete_file(self.at(name))
            except FileNotFoundError:
                pass

        self._again(self.shown(name), remove)

    def _again(self, url: str, do: Callable[[], T]) -> T:
        """What `do` returns, tried again where it fails as a cut connection does."""
        pause = _PAUSE
        for left in range(TRIES - 1, -1, -1):
            try:
                return do()
            except (FileNotFoundError, ValueError, TypeError, AttributeError, NotImplementedError, ImportError):
                raise
            except Exception as error:  # stores raise what their client does: OSError, or errors of HTTP
                why = first_line(error)
                if _NO_BUCKET.search(str(error)):
                    raise ValueError(f"{self.argument}: expected a bucket that exists, got {url}: {why}") from error
                if isinstance(error, PermissionError) or _DENIED.search(str(error)):
                    how = _BUCKETS.get(self.scheme, "the store's own settings")
                    raise ValueError(
                        f"{self.argument}: no permission for {url}: expected credentials that allow it ({how}): {why}"
                    ) from error
                if not left:
                    raise Unreachable(
                        f"{url} was not reached in {TRIES} tries: {why}; the same command goes on"
                    ) from error
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, _LONGEST)
        raise AssertionError


_TAGS = ("ETag", "etag", "e_tag", "blob_id", "oid", "sha256", "checksum", "generation", "version_id", "mtime",
         "created", "last_modified", "LastModified")  # fmt: skip


def _content(file) -> str:
    """What a store says of an open object's content, by which another one is known."""
    kept = {key.lower(): value.decode(errors="replace") for key, value in (file.metadata() or {}).items()}
    return next((kept[key] for key in ("etag", "generation") if key in kept), "")


class RemoteFile(os.PathLike):
    """An object where text is read from a file: of `Path` what `Corpus` and its readers ask for.

    Raises, from `open` and what it returns:
        FileNotFoundError: there is none. ValueError: another took its place. Unreachable: the store does not answer.
    """

    def __init__(self, objects: Objects, name: str):
        self._objects, self._name = objects, name
        self._tag: tuple[int, int, str] | None = None

    def __fspath__(self) -> str:
        return self._objects.shown(self._name)

    def __str__(self) -> str:
        return os.fspath(self)

    def __repr__(self) -> str:
        return f"RemoteFile({os.fspath(self)!r})"

    @property
    def name(self) -> str:
        return PurePosixPath(os.fspath(self)).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.name).suffixes

    def is_file(self) -> bool:
        try:
            self._now()
        except FileNotFoundError:
            return False
        return True

    def stat(self) -> SimpleNamespace:
        """st_size, st_mtime_ns, and st_ino, a number that changes with the content."""
        size, at, tag = self._now()
        return SimpleNamespace(
            st_size=size, st_mtime_ns=at, st_ino=int(hashlib.sha256(tag.encode()).hexdigest()[:15], 16)
        )

    def stamp(self) -> tuple:
        """See `files.stamp`: asked of the store anew, as is what `stat` and `open` say from then on."""
        self._tag = None
        size, at, tag = self._now()
        return os.fspath(self), tag, 0, size, at, at

    def _now(self) -> tuple[int, int, str]:
        if self._tag is None:
            self._tag = self._objects.tag(self._name)
        return self._tag

    def open(self, mode: str = "rb") -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._objects, self._name, self._now()[0]), 1 << 20)


class _Reader(SizedReader):
    """An object's bytes, from any place; one request a block that is read on."""

    def __init__(self, objects: Objects, name: str, size: int):
        self._objects, self._name, self._size = objects, name, size
        self._at = 0
        self._blocks: Iterator[bytes] | None = None
        self._rest = memoryview(b"")

    def _moved(self) -> None:
        self._blocks, self._rest = None, memoryview(b"")

    def readinto(self, buffer) -> int:
        if not self._rest:
            if self._blocks is None:
                self._blocks = self._objects.blocks(self._name, self._at, max(len(buffer), 1 << 20))
            self._rest = memoryview(next(self._blocks, b""))
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest, self._at = self._rest[n:], self._at + n
        return n


def walk(url: str, argument: str = "corpus") -> tuple[list[tuple[RemoteFile, str]], list[str]]:
    """(file, name below the URL) of every object under a URL, or of the one it names; and names with a hidden part.

    Raises:
        FileNotFoundError: there is none.
    """
    objects = Objects(url, argument)
    names = list(objects.names())
    if not names:
        folder, _, name = objects.root.rpartition("/")
        if not folder or objects.size("") is None:
            raise FileNotFoundError(f"{argument}: no object {objects.url}, nor any below it")
        return [(RemoteFile(Objects(f"{objects.scheme}://{folder}", argument), name), name)], []
    hidden = [name for name in names if any(part.startswith(".") for part in name.split("/"))]
    return [(RemoteFile(objects, name), name) for name in names if name not in set(hidden)], hidden
