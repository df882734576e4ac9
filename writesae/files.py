"""Files that appear whole or not at all, are never written through a link, and are known by their digest.

Whatever writes into a folder that may have come from elsewhere writes through `whole_file`: a symbolic link where a
file or an inner folder should be would have it overwrite something outside. What must be trusted later is written with
`write_sealed`, JSON that carries its own digest, and names other files with theirs (`entry`, `problem`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SEAL = "sha256"
_BLOCK = 1 << 20
COMPARED = 1 << 18  # bytes that are compared with a digest of their own
_LARGEST_JSON = 1 << 28
_TEMPORARY = re.compile(r"(.+)\.\d+\.tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RACY_SECONDS = 2.0  # a file changed so recently may change again without its times saying so


# ---- writing ----------------------------------------------------------------------------------------------------


def refuse_link(path: Path, argument: str = "out") -> None:
    """Raises ValueError if `path` itself is a symbolic link, broken or not."""
    if os.path.islink(path):
        raise ValueError(
            f"{argument}: {path} is a symbolic link to {os.readlink(path)}, and nothing is written through one: remove "
            "it or name another folder"
        )


def refuse_links(folder: Path, argument: str = "out") -> None:
    """Raises ValueError if anything below `folder` is a symbolic link. The folder itself may be one."""
    if not Path(folder).is_dir():
        return
    for here, folders, names in os.walk(folder):
        for name in sorted((*folders, *names)):
            refuse_link(Path(here, name), argument)


def refuse_file(path: Path, argument: str = "out") -> None:
    """Raises ValueError if something that is no folder stands where one should be; a link to one is one."""
    # In this order: another worker may make the folder meanwhile.
    if os.path.lexists(path) and not os.path.isdir(path):
        kind = "a link that leads nowhere" if os.path.islink(path) and not os.path.exists(path) else "the file"
        raise ValueError(f"{argument}: expected a folder, got {kind} {path}")


def make_folder(root: Path, *names: str, argument: str = "out") -> Path:
    """`root/names...`, made where it is missing; `root` may be a link to a folder, nothing below it.

    Raises:
        ValueError: a link below the root, or a file where a folder should be.
    """
    path = Path(root)
    refuse_file(path, argument)
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = path / name
        refuse_link(path, argument)
        refuse_file(path, argument)
        path.mkdir(exist_ok=True)
    return path


@contextmanager
def whole_file(path: Path, root: Path | None = None, argument: str = "out", first: bool = False) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it becomes `path` in one rename, on any error it is removed.

    Args:
        path: the file; what stands there is replaced.
        root: the folder the user named, default the file's own. Nothing from it down to the file may be a link.
        argument: what a refusal names.
        first: replace nothing: of several who write at once, on whatever machine, one succeeds.

    Raises:
        ValueError: `path`, or a folder between `root` and it, is a symbolic link.
        FileExistsError: with `first`, another file stands there.
        OSError: the disk is full; nothing half-written is left.
    """
    path = Path(path)
    for part in _below(path, path.parent if root is None else Path(root)):
        refuse_link(part, argument)
    # As `left_over` knows it; process numbers repeat on other machines, which may write to the same folder.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{secrets.randbelow(10**6):06}.tmp")
    try:
        # Made here, exclusively, so that nothing that waits under this name is ever opened.
        discard(temporary)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
        yield temporary
        _sync(temporary)
        if first:
            os.link(temporary, path)
            discard(temporary)
        else:
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        discard(temporary)
        if error.errno in _FULL:
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)} while writing {path}; nothing half-written is kept: free some space and "
                "run the same command again, it goes on from the last finished part",
            ) from error
        raise
    except BaseException:
        discard(temporary)
        raise


def _below(path: Path, root: Path) -> list[Path]:
    """`path` and its folders up to, without, `root`."""
    found = [path]
    while found[-1].parent != root and root in found[-1].parents:
        found.append(found[-1].parent)
    return found


def discard(path: Path) -> None:
    """Removes a file that may not be there (of a link, the link)."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in `folder` survive a power cut."""
    _sync(folder)


@contextmanager
def whole_folder(path: Path, argument: str = "out") -> Iterator[Path]:
    """Yields a new folder beside `path`, which takes its place on success, with all that stood there; on any error it
    is removed, and what stood there stays.

    Raises:
        ValueError: `path` is a symbolic link.
    """
    path = Path(path)
    refuse_link(path, argument)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (path.with_name(f"{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        yield fresh
        for here, _, names in os.walk(fresh):
            for name in names:
                _sync(Path(here, name))
            sync_folder(Path(here))
        if path.exists():  # two renames, the shortest time without the folder that every system allows
            os.replace(path, old)
        os.replace(fresh, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)


def left_over(path: Path) -> Path | None:
    """The file whose temporary name this is, as `whole_file` leaves one when its process is killed; else None."""
    match = _TEMPORARY.fullmatch(path.name)
    return None if match is None else path.with_name(match[1])


def discard_left_over(folder: Path) -> None:
    """Removes what killed processes left in a folder that none is writing to; nothing where there is no folder."""
    for path in folder.glob("*.tmp"):
        if left_over(path) is not None:
            path.unlink()


def write_bytes(path: Path, data: bytes, root: Path | None = None, argument: str = "out") -> None:
    """Writes a file, whole or not at all, through no link."""
    with whole_file(path, root, argument) as temporary:
        temporary.write_bytes(data)


def write_blocks(path: Path, blocks: Iterable[bytes], root: Path | None = None) -> None:
    """Writes a file from pieces as they come, whole or not at all, through no link."""
    with whole_file(path, root) as temporary, open(temporary, "wb") as file:
        for block in blocks:
            file.write(block)


def write_first(path: Path, data: bytes, root: Path | None = None) -> bool:
    """Writes a file where none stands, whole or not at all; of several who do so at once, one does. Whether it was."""
    try:
        with whole_file(path, root, first=True) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        return False
    return True


def write_text(path: Path, text: str, root: Path | None = None, argument: str = "out") -> None:
    """Writes a UTF-8 file, whole or not at all, through no link."""
    write_bytes(path, text.encode(), root, argument)


def write_json(path: Path, value, root: Path | None = None, *, indent: int | None = 2, allow_nan: bool = False) -> None:
    """Writes a value as JSON, whole or not at all, through no link.

    Raises:
        ValueError: a number is NaN or infinite, which is no JSON, unless `allow_nan`; nothing is written.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=allow_nan) + "\n", root)


def write_sealed(path: Path, value: dict, root: Path | None = None) -> None:
    """Writes a JSON object with its own digest as the last entry."""
    write_text(path, sealed(value), root)


def sealed(value: dict) -> str:
    """The text of `write_sealed`. Entries, order and spacing are all under the digest."""
    digest = hashlib.sha256(json.dumps(value, indent=1).encode()).hexdigest()
    return json.dumps({**value, SEAL: digest}, indent=1) + "\n"


# ---- reading ----------------------------------------------------------------------------------------------------


def read_json(path: Path):
    """The content of a JSON file.

    Raises:
        ValueError: it is missing, no plain file, too large, not JSON, or nested too deeply, naming the file.
    """
    return _json(path)[1]


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote, its digest included.

    Raises:
        ValueError: one byte of it is another, naming the file.
    """
    text, value = _json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    if text != sealed({name: x for name, x in value.items() if name != SEAL}):
        raise ValueError(f"{path} is damaged: its content and its digest disagree")
    return value


def _json(path: Path):
    try:
        with open_plain(path) as file:
            if os.fstat(file.fileno()).st_size > _LARGEST_JSON:
                raise ValueError(f"larger than {_LARGEST_JSON:,} bytes")
            text = file.read().decode()
        return text, json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: expected JSON written by writesae, got one nested too deeply") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON written by writesae, got {error}") from error


def open_plain(path: Path):
    """Opens a plain file for reading bytes: never a device or a pipe, which would keep the reader waiting for ever.

    Raises:
        ValueError: it is something else. OSError: as `open`.
    """
    if not isinstance(path, (str, Path)):  # an object elsewhere, see `objects.RemoteFile`
        return path.open("rb")
    file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path}: expected a plain file")
    return file


# ---- digests ----------------------------------------------------------------------------------------------------


def sha256(path: Path, progress: Callable[[int], object] | None = None, size: int | None = None) -> str:
    """Digest of a file's bytes (of the first `size`), a block at a time; `progress` is told the bytes of each."""
    digest, left = hashlib.sha256(), float("inf") if size is None else size
    with open_plain(path) as file:
        while block := file.read(int(min(left, _BLOCK))):
            digest.update(block)
            left -= len(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def entry(path: Path) -> dict:
    """{bytes, sha256} of a file, what `problem` compares; of one larger than `COMPARED` also blocks, the digest of each
    `COMPARED` bytes, what `ComparedFile` compares."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with open_plain(path) as file:
        while piece := file.read(COMPARED):
            whole.update(piece)
            blocks.append(hashlib.sha256(piece).hexdigest())
            size += len(piece)
    return {"bytes": size, SEAL: whole.hexdigest(), **({"blocks": blocks} if len(blocks) > 1 else {})}


def problem(path: Path, expected: dict, progress: Callable[[int], object] | None = None) -> str | None:
    """What is wrong with a file of which `entry` was once `expected`, or None."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"expected {expected['bytes']} bytes, got {size}"
        got = sha256(path, progress)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "not a plain file"
    return None if got == expected[SEAL] else "its content and its digest disagree"


class PositionedReader(io.RawIOBase):
    """A stream for reading that says where it is, `_at`; how it moves is its own."""

    _at: int

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at


class SizedReader(PositionedReader):
    """One whose size is known, `_size`: moves to anywhere."""

    _size: int

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        to = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        if to != self._at:
            self._at = to
            self._moved()
        return to

    def _moved(self) -> None:
        """What was read ahead is of another place."""


class ComparedFile(SizedReader):
    """A file for reading, of which what is read is compared first: in blocks of `COMPARED` bytes, each once.

    Args:
        path: the file. expected: what `entry` said of it, with blocks.
        sound: numbers of blocks already compared, to which more are added; kept by who opens the file again.

    Raises:
        ValueError: here, another size; from `read`, another content. OSError: as `open`.
    """

    _HELD = 4  # blocks in memory: a reader asks for the columns of a row group one after the other

    def __init__(self, path: Path, expected: dict, sound: set[int]):
        super().__init__()
        self._size, self._blocks, self._sound = expected["bytes"], expected["blocks"], sound
        self._at = 0
        self._held: dict[int, bytes] = {}
        size = path.stat().st_size
        if size != self._size:
            raise ValueError(f"expected {self._size} bytes, got {size}")
        self._file = open_plain(path)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if end <= self._at:
            return b""
        first, last = self._at // COMPARED, (end - 1) // COMPARED
        text = b"".join(self._block(number) for number in range(first, last + 1))
        found = text[self._at - first * COMPARED : end - first * COMPARED]
        self._at = end
        return found

    def _block(self, number: int) -> bytes:
        if number not in self._held:
            self._file.seek(number * COMPARED)
            block = self._file.read(COMPARED)
            if number not in self._sound and hashlib.sha256(block).hexdigest() != self._blocks[number]:
                raise ValueError("its content and its digest disagree")
            self._sound.add(number)
            while len(self._held) >= self._HELD:
                del self._held[next(iter(self._held))]
            self._held[number] = block
        return self._held[number]


def stamp(path: Path) -> tuple:
    """What changes when a file's content does: path, device, inode, size, and times of content and status in ns."""
    if (ask := getattr(path, "stamp", None)) is not None:  # an object elsewhere, see `objects.RemoteFile`
        return ask()
    s = os.stat(path)
    return os.path.realpath(path), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


class DigestCache:
    """Digests of files by their `stamp`, in the user's cache folder, so that a large file is read once.

    A wrong answer would need a file whose content changed while size, inode and both times stayed, which systems do not
    let happen but within a clock tick; files changed in the last seconds are therefore not kept. A damaged cache, or a
    folder that cannot be written, costs time and nothing else.
    """

    MOST = 200_000

    def __init__(self, path: Path | None = None):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.path = Path(base, "writesae", "digests.json") if path is None else Path(path)
        try:
            self._known = dict(read_sealed(self.path)["digests"])
        except (ValueError, KeyError, TypeError):
            self._known = {}
        self._new: dict[str, str] = {}

    def __enter__(self) -> DigestCache:
        return self

    def __exit__(self, *error) -> None:
        self.save()

    @staticmethod
    def _key(stamps, what: str) -> str:
        return hashlib.sha256(json.dumps([what, stamps]).encode()).hexdigest()

    def get(self, stamps, what: str = "file") -> str | None:
        """The digest kept for files of these stamps."""
        key = self._key(stamps, what)
        return self._new.get(key) or self._known.get(key)

    def put(self, stamps, digest: str, what: str = "file") -> None:
        """Keeps a digest made after the stamps were taken, unless a file is too young for its times to be trusted."""
        youngest = max((max(s[4], s[5]) for s in stamps), default=0)
        if time.time_ns() - youngest > _RACY_SECONDS * 1e9:
            self._new[self._key(stamps, what)] = digest

    def file(self, path: Path, progress: Callable[[int], object] | None = None) -> str:
        """`sha256(path)`, read only where it is not known."""
        before = stamp(path)
        known = self.get([before])
        if known is None:
            known = sha256(path, progress)
            if stamp(path) == before:
                self.put([before], known)
        elif progress is not None:
            progress(before[3])
        return known

    def save(self) -> None:
        """Writes what was learnt."""
        if not self._new:
            return
        entries = list({**self._known, **self._new}.items())[-self.MOST :]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(self.path, {"digests": dict(entries)})
        except (OSError, ValueError):
            return
        self._known, self._new = dict(entries), {}


def cached_digests(files: list[tuple[Path, str]], progress: Callable[[int], object] | None = None) -> dict[str, str]:
    """{name: sha256} of files, reading only those that changed since they were last read."""
    with DigestCache() as cache:
        return {name: cache.file(path, progress) for path, name in files}
