"""Where a collection lies: a folder, or, for an object store, a folder here that stands for what lies there.

All code writes and reads files of a folder. Of a `Place` that is all there is to it. A `Mirror` is a folder of this
machine's cache, filled from the store as files are asked for; what is made in it is sent, every file before the marker
that names it, and a marker is here only once it is there. Nothing depends on what the folder holds: what is not there
is fetched or made again, and what is of another collection is removed.

An object store has no locks, no links and no renaming. So a unit's folder there bears its content's digest: whoever
does a unit twice, on whatever machine, writes the same bytes under the same names, or other bytes under other names, of
which the marker takes one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from ..files import SEAL, discard, make_folder, problem, write_bytes, write_first
from ..objects import Objects, RemoteFile, is_url
from . import files

MANIFESTS = ("manifest.json", "done/manifest.json")
_AT_ONCE = 16  # small objects fetched at the same time


class Place:
    """A folder of this machine, or one that several see.

    Attributes:
        path: the folder. remote: whether it stands for one elsewhere.
    """

    remote = False
    poll = 0.5  # seconds between two looks at what others do

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Around looking whether a collection was begun, and beginning one."""
        yield

    def refresh(self) -> None:
        """Has the markers that others made."""

    def need(self, name: str, expected: dict | None) -> None:
        """Has a file here of which `entry` was `expected`, if it is there."""

    def opened(self, name: str) -> Path:
        """What a file is read from in parts: its path, or what stands for it."""
        return self.path / name

    def publish(self) -> None:
        """Has the manifest and its copy be there."""

    def names(self) -> list[str]:
        """Every file, and every link."""
        found = []
        for here, folders, names in os.walk(self.path):
            for name in (*names, *(f for f in folders if os.path.islink(Path(here, f)))):
                found.append(Path(here, name).relative_to(self.path).as_posix())
        return sorted(found)

    def exists(self, name: str) -> bool:
        """Whether `names` has it."""
        return os.path.lexists(self.path / name)

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def problem(self, name: str, expected: dict, progress=None) -> str | None:
        """What is wrong with a file, see `files.problem`."""
        return problem(self.path / name, expected, progress)

    def shown(self, name: str) -> str:
        return str(self.path / name)

    def write(self, name: str, data: bytes, first: bool = False) -> bool:
        """Writes a marker, whole or not at all; first: only where none stands. Whether it did."""
        if first:
            return write_first(self.path / name, data, self.path)
        write_bytes(self.path / name, data, self.path)
        return True

    def send(self, *names: str) -> None:
        """Has files that were made here be there."""

    def placed(self, unit: str, folder: str, entries: dict) -> tuple[str, dict]:
        """(name of a unit's folder, the same files with their names there); sends them."""
        return folder, entries

    def discard(self, name: str) -> None:
        """Removes a file that may not be there."""
        discard(self.path / name)

    def keep_only(self, named: set[str]) -> None:
        """Of what lies elsewhere, removes folders of units that no marker names, and units' indexes."""


class Mirror(Place):
    """A folder that stands for one in an object store.

    Args:
        url: of the store's folder. argument: what errors name.
        purpose: "collect" or "store": folders of the cache are apart.

    Raises:
        ValueError, Unreachable: as `objects.Objects`, also from every method.
    """

    remote = True
    poll = 5.0

    def __init__(self, url: str, argument: str = "out", purpose: str = "collect"):
        self.objects = Objects(url, argument)
        if purpose == "collect" and self.objects.scheme == "hf":
            raise ValueError(
                f"{argument}: nothing is collected into hf://, where every file is a commit: collect into a folder, "
                "then Store(folder).push_to_hub(…)"
            )
        super().__init__(scratch(self.objects.url, purpose))
        make_folder(self.path)
        self._listed: dict[str, tuple[int, int]] = {}  # as of the last `names`

    def __str__(self) -> str:
        return self.objects.url

    @contextmanager
    def beginning(self) -> Iterator[None]:
        with files.claimed(self.path.with_suffix(".lock"), wait=True):
            self.pull()
            yield

    def pull(self) -> None:
        """Has what small files say of the collection, and no marker that is not there.

        Raises:
            ValueError: what is there is no collection.
        """
        top = self.objects.names(deep=False)
        control = {name: x for name, x in top.items() if name.endswith(".json")}
        control |= {name: x for name, x in self.objects.names("done").items() if name.endswith(".json")}
        if not control.keys() & set(MANIFESTS):
            others = list(self.objects.names())
            if set(MANIFESTS) & set(others):  # another worker began it between these lists
                return self.pull()
            if others:
                raise ValueError(
                    f"{self.objects.argument}: expected nothing or a collection of writesae in {self}, got "
                    f"{', '.join(others[:5])} and no manifest.json"
                )
        self._forget_another(control)
        here = (path.relative_to(self.path).as_posix() for x in ("", "done") for path in (self.path / x).glob("*.json"))
        for name in [name for name in here if name not in control and not name.startswith("done/layer-")]:
            if self.objects.size(name) is None:  # now: a worker beside this one may have sent it
                discard(self.path / name)
        self._fetch({name: x for name, x in control.items() if not self._fresh(name, x)})

    def _forget_another(self, control: dict) -> None:
        """Removes all that is here if it is of another collection."""
        name = next((name for name in MANIFESTS if name in control), None)
        here = next((self.path / x for x in MANIFESTS if (self.path / x).exists()), None)
        others = [path for path in self.path.iterdir() if not path.name.startswith(".")]
        same = here is not None and name is not None and self.objects.read(name) == here.read_bytes()
        if same or not others:
            return
        with files.locked(self.path):
            for path in others:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _fresh(self, name: str, listed: tuple[int, int]) -> bool:
        """Whether a file is here as it was listed."""
        try:
            here = (self.path / name).stat()
        except FileNotFoundError:
            return False
        return listed[1] > 0 and (here.st_size, here.st_mtime_ns) == listed

    def _fetch(self, wanted: dict[str, tuple[int, int]]) -> None:
        def one(item) -> None:
            name, (_, at) = item
            self._get(name)
            os.utime(self.path / name, ns=(at, at))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, wanted.items()))

    def _get(self, name: str) -> None:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"{self.objects.argument}: {self} holds {name!r}, which is no file's name: remove it")
        make_folder(self.path, *name.split("/")[:-1])
        self.objects.fetch(name, self.path / name)

    def publish(self) -> None:
        here = (self.path / "manifest.json").read_bytes()
        for name in MANIFESTS[::-1]:
            if self.objects.size(name) is None or self.objects.read(name) != here:
                self.objects.put(name, here)
        if self.objects.read("manifest.json") != here:
            raise ValueError(
                f"{self.objects.argument}: another worker began {self} at the same moment, with other arguments or "
                "versions of packages: the same command again goes on, or says which"
            )

    def refresh(self) -> None:
        listed = self.objects.names("done")
        new = {name: x for name, x in listed.items() if name.endswith(".json") and not (self.path / name).exists()}
        if not (self.path / "summary.json").exists() and (size := self.objects.size("summary.json")) is not None:
            new["summary.json"] = size, 0
        self._fetch(new)

    def need(self, name: str, expected: dict | None) -> None:
        if expected is not None and problem(self.path / name, expected) is not None:
            with suppress(FileNotFoundError):
                self._get(name)

    def opened(self, name: str) -> Path:
        here = self.path / name
        return here if here.exists() else cast(Path, RemoteFile(self.objects, name))

    def names(self) -> list[str]:
        self._listed = self.objects.names()
        return list(self._listed)

    def exists(self, name: str) -> bool:
        return name in self._listed

    def size(self, name: str) -> int:
        return self._listed[name][0]

    def problem(self, name: str, expected: dict, progress=None) -> str | None:
        return self.objects.problem(name, expected, progress)

    def shown(self, name: str) -> str:
        return self.objects.shown(name)

    def write(self, name: str, data: bytes, first: bool = False) -> bool:
        if first and self.objects.size(name) is not None:
            self._get(name)
            return False
        self.objects.put(name, data)
        write_bytes(self.path / name, data, self.path)
        return True

    def send(self, *names: str) -> None:
        for name in names:
            self.objects.put(name, self.path / name)

    def placed(self, unit: str, folder: str, entries: dict) -> tuple[str, dict]:
        inside = {name.removeprefix(f"{folder}/"): expected for name, expected in entries.items()}
        content = hashlib.sha256("\n".join(f"{name} {inside[name][SEAL]}" for name in sorted(inside)).encode())
        there = f"units/{unit}-{content.hexdigest()[:12]}"
        for name in inside:
            self.objects.put(f"{there}/{name}", self.path / folder / name)
        return there, {f"{there}/{name}": expected for name, expected in inside.items()}

    def discard(self, name: str) -> None:
        self.objects.delete(name)
        discard(self.path / name)

    def keep_only(self, named: set[str]) -> None:
        for name in self.objects.names("units"):
            if "/".join(name.split("/")[:2]) not in named or name.endswith("/index.parquet"):
                self.objects.delete(name)
        for folder in (*named, "index"):
            shutil.rmtree(self.path / folder, ignore_errors=True)


def scratch(url: str, purpose: str) -> Path:
    """The folder that stands for a URL: of WRITESAE_SCRATCH, by default in the user's cache."""
    base = os.environ.get("WRITESAE_SCRATCH")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "writesae", "objects")
    return Path(base, f"{purpose}-{hashlib.sha256(url.encode()).hexdigest()[:16]}")


def place_of(place: str | os.PathLike | Place, argument: str = "out", purpose: str = "collect") -> Place:
    """The folder of a path or URL."""
    if isinstance(place, Place):
        return place
    return Mirror(os.fspath(place), argument, purpose) if is_url(place) else Place(place)
