"""Completion markers of units, see `units`. Reading them needs neither torch nor a model."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..files import SEAL, sealed
from ..untrusted import is_integer
from .marks import marked

TABLES = ("documents.parquet", "features.parquet")  # and it may have index.parquet, until the whole has its own
_NUMBERS = ("unit", "shards", "passages", "documents", "tokens", "firings", "kept", "shard_passages")


def marker_name(number: int) -> str:
    return f"unit-{number:06d}"


def marker_path(out: Path, number: int) -> Path:
    return out / "done" / f"{marker_name(number)}.json"


def unit_marker(out: Path, number: int, manifest: str | None = None) -> dict:
    """The completion marker of a unit.

    Raises:
        ValueError: missing, damaged, or of another unit or collection; names the file.
    """
    made = marked(out, marker_name(number), manifest)
    folder = made.get("folder")
    sound = all(is_integer(made.get(name)) for name in _NUMBERS) and made["unit"] == number
    sound = sound and isinstance(folder, str) and folder.startswith("units/") and folder.count("/") == 1
    sound = sound and made["shard_passages"] > 0 and all(name.startswith(f"{folder}/") for name in made["files"])
    sound = sound and {f"{folder}/{x}" for x in TABLES} <= set(made["files"])
    if not sound:
        raise ValueError(f"{marker_path(out, number)} is not the marker of unit {number}")
    return made


def unit_numbers(out: Path) -> list[int]:
    """Numbers that have a marker, sound or not."""
    stems = (path.stem.removeprefix("unit-") for path in (out / "done").glob("unit-*.json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal() and len(stem) < 10)


def mark_unit(where, number: int, folder: str, manifest: str, counted: dict, entries: dict) -> bool:
    """Makes a folder the unit's, unless another one is already. Whether it did. where: a `mirror.Place`."""
    value = {"unit": number, "folder": folder, **counted, "manifest": manifest, "files": entries}
    return where.write(f"done/{marker_name(number)}.json", sealed(value).encode(), first=True)


def without_blocks(made: dict) -> dict:
    """A marker without the digests of its files' blocks, most of it: what is held of many."""
    files = {name: {part: x[part] for part in ("bytes", SEAL)} for name, x in made["files"].items()}
    return {**made, "files": files}


def chain(markers: list[dict]) -> str:
    """One digest of the units, by what they hold, whoever made them where."""
    digest = hashlib.sha256()
    for made in markers:
        for name, expected in sorted(made["files"].items()):
            digest.update(f"{made['unit']} {name.removeprefix(made['folder'])} {expected[SEAL]}\n".encode())
    return digest.hexdigest()
