"""`walk`: the files of a folder, links followed, each real file and folder once; and what was left out, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Skipped:
    """A file or folder left out: its name in the corpus, the reason, by which they are counted, and what more is known.

    A folder that is left out (hidden, a loop) is one of these, however much is in it.
    """

    name: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def shown(path: Path | str) -> str:
    """A path as text that can be printed and stored, whatever bytes its name has."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def walk(root: Path) -> tuple[list[tuple[Path, str]], list[Skipped]]:
    """(path, name below root) of every file, sorted by name, and what was left out.

    Names that begin with a dot are left out. What is in the folder itself goes before what a link leads to, so a link
    to a place that is read anyway adds nothing, and a link to a folder it lies in ends there. Only where a link has an
    ending and the file has none, as in a cache of the Hub, the link's name is the one that says how to read it.
    """
    found: dict[tuple[int, int, str], tuple[Path, str]] = {}
    skipped: list[Skipped] = []
    seen: set[tuple[int, int]] = set()
    links: list[Path] = []
    folders = [root]
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            _follow(links.pop(), root, folders, found, skipped, seen)
            continue
        folder = folders.pop()
        name = shown(folder.relative_to(root).as_posix())
        try:
            here = _identity(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skipped.append(Skipped(name, "unreadable", error.strerror or type(error).__name__))
            continue
        if here in seen:
            skipped.append(Skipped(name, "read already", "through another path"))
            continue
        seen.add(here)
        for entry in entries:
            path = folder / entry.name
            below = shown(path.relative_to(root).as_posix())
            if entry.name.startswith("."):
                skipped.append(Skipped(below, "hidden"))
            elif entry.is_symlink():
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_file(follow_symlinks=False):
                seen.add(_identity(path))
                found[_identity(path) + (below,)] = (path, below)
            else:
                skipped.append(Skipped(below, "no file", "a pipe, socket or device"))
    return sorted(found.values(), key=lambda file: file[1]), sorted(skipped, key=lambda one: one.name)


def _follow(path: Path, root: Path, folders: list[Path], found: dict, skipped: list[Skipped], seen: set) -> None:
    name = shown(path.relative_to(root).as_posix())
    try:
        real, target = path.resolve(strict=True), _identity(path)
    except FileNotFoundError:
        return skipped.append(Skipped(name, "dangling link", f"to {shown(os.readlink(path))}"))
    except (OSError, RuntimeError) as error:  # a link to itself: RuntimeError before Python 3.13
        return skipped.append(Skipped(name, "loop", getattr(error, "strerror", None) or "a link to itself"))
    if path.is_dir() and (real in [path.parent.resolve(), *path.parent.resolve().parents] or _above(path, root, real)):
        skipped.append(Skipped(name, "loop", "a link to a folder it lies in"))
    elif target in seen and path.suffix and not real.suffix and (plain := _entry(found, target)):
        skipped.append(Skipped(found.pop(plain)[1], "read already", f"as {name}"))
        found[target + (name,)] = (path, name)
    elif target in seen:
        skipped.append(Skipped(name, "read already", f"a link to {shown(real)}"))
    elif path.is_dir():
        folders.append(path)
    elif path.is_file():
        seen.add(target)
        found[target + (name,)] = (path, name)
    else:
        skipped.append(Skipped(name, "no file", "a pipe, socket or device"))


def _entry(found: dict, target: tuple[int, int]) -> tuple | None:
    """The key of a file found under a name without an ending."""
    return next((key for key, (path, _) in found.items() if key[:2] == target and not path.suffix), None)


def _above(path: Path, root: Path, real: Path) -> bool:
    """Whether one of the folders by which `path` was reached from `root` is `real`."""
    parts = path.relative_to(root).parts
    return any(real == root.joinpath(*parts[:n]).resolve() for n in range(len(parts)))


def _identity(path: Path) -> tuple[int, int]:
    at = path.stat()
    return at.st_dev, at.st_ino
