"""`FileIdentity`: a file as it stands, and the digest of every byte of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..files import sha256
from ..objects import RemoteFile


@dataclass(frozen=True)
class FileIdentity:
    """A file as it stands: while `size`, `mtime_ns` and `inode` are what they were, so is a digest made before.

    Attributes:
        name: of the file in its corpus.
        path: where it is.
        size, mtime_ns, inode: bytes, nanoseconds, number; of the file itself, where `path` is a link.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path, name: str) -> FileIdentity:
        if isinstance(path, RemoteFile):
            path.stamp()  # asks the store anew
        at = path.stat()
        return cls(name, path, at.st_size, at.st_mtime_ns, at.st_ino)

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Digest of every byte, streamed; `progress` is called with the bytes of each piece read.

        Raises:
            ValueError: the file changed while it was read.
        """
        digest = sha256(self.path, progress)
        if FileIdentity.of(self.path, self.name) != self:
            raise ValueError(f"corpus: {self.name} changed while it was read")
        return digest
