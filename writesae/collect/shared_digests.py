"""Digests of a large corpus that several workers read: each of its files is read by one of them.

    .corpus/000002.json   digests of some of the files, by name, size and times; .corpus/000002.lock is held meanwhile

Of use until the collection ends, and never trusted beyond what `files.DigestCache` says: a worker to whom a file shows
other times (a copy of its own, on its own disk) reads it itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files import DigestCache, make_folder, stamp
from .files import claimed

FOLDER = ".corpus"
_GROUP = 1 << 30  # bytes, at least, that one worker reads


def shared_digests(out: Path, files: list[tuple[Path, str]], progress: Callable[[int], object]) -> dict[str, str]:
    """{name: sha256} of files, for a worker of those that fill `out`. progress: told the bytes that are dealt with."""
    groups = dict(enumerate(_groups(files)))
    at = os.getpid() % len(groups)
    order = [*range(at, len(groups)), *range(at)]  # workers begin at different ones
    found: dict[str, str] = {}
    with DigestCache() as known:
        for wait in (False, True):  # first those that nobody is at
            for number in order:
                if number not in groups:
                    continue
                folder = make_folder(out, FOLDER)  # whoever ends the collection removes it
                with claimed(folder / f"{number:06d}.lock", wait) as mine:
                    if mine:
                        path = folder / f"{number:06d}.json"
                        found |= _digests(groups.pop(number), path, known, progress)
    return found


def _groups(files: list[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    group, size = [], 0
    for path, name in files:
        group.append((path, name))
        size += path.stat().st_size
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _digests(group: list[tuple[Path, str]], path: Path, own: DigestCache, progress) -> dict[str, str]:
    """Args: path: what workers share. own: what this machine's user has."""
    found = {}
    with DigestCache(path) as shared:
        for file, name in group:
            before = stamp(file)
            # As other machines see it: size and times, of an object elsewhere also its tag.
            seen = (name, *(before[1:] if hasattr(file, "stamp") else (0, 0, *before[3:])))
            found[name] = shared.get([seen]) or ""
            if found[name]:
                progress(before[3])
                continue
            found[name] = own.file(file, progress)
            if stamp(file) == before:
                shared.put([seen], found[name])
    return found
