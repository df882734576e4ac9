"""Completion markers in `done/`: sealed JSON that names files with their digests, and the manifest they belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..files import COMPARED, SEAL, entry, problem, read_sealed, sealed, write_bytes
from ..untrusted import is_integer

PARTS = ("firings", "tokens", "documents", "counts")
_NUMBERS = ("row", "block", "used", "taken", "document", "passages", "tokens")


def part_name(number: int, ending: str = "parquet") -> str:
    """File name of a shard's table or marker."""
    return f"part-{number:06d}.{ending}"


def mark(out: Path, name: str, paths: list[Path], manifest: str, **more) -> None:
    """Writes `done/name.json`: these files are whole."""
    write_bytes(out / "done" / f"{name}.json", marker(out, paths, manifest, **more), out)


def marker(out: Path, paths: list[Path], manifest: str, **more) -> bytes:
    """What `mark` writes."""
    entries = {path.relative_to(out).as_posix(): entry(path) for path in paths}
    return sealed({**more, "manifest": manifest, "files": entries}).encode()


def marked(out: Path, name: str, manifest: str | None = None) -> dict:
    """What `mark` wrote.

    Args:
        manifest: digest of the manifest it must name; None: any.

    Raises:
        ValueError: missing, damaged, or of another collection; names the file.
    """
    path = out / "done" / f"{name}.json"
    made = read_sealed(path)
    if manifest not in (None, made.get("manifest")) or not entries_sound(made.get("files")):
        raise ValueError(f"{path} is not a marker of this collection")
    return made


def shard_marker(out: Path, number: int, manifest: str | None = None) -> dict:
    """The completion marker of a shard.

    Raises:
        ValueError: missing, damaged, or of another shard or collection; names the file.
    """
    done = marked(out, part_name(number, "")[:-1], manifest)
    after = done.get("next")
    sound = done.get("shard") == number and type(done.get("last")) is bool
    sound = sound and set(done["files"]) == {f"{folder}/{part_name(number)}" for folder in PARTS}
    sound = sound and all(is_integer(done.get(name)) for name in ("tokens", "firings", "documents", "kept"))
    sound = sound and isinstance(after, dict) and set(after) == {"place", "carry", *_NUMBERS}
    sound = sound and all(is_integer(after[name]) for name in _NUMBERS)
    sound = sound and all(isinstance(after[n], list) and all(map(is_integer, after[n])) for n in ("place", "carry"))
    if not sound:
        raise ValueError(f"{out / 'done' / part_name(number, 'json')} is not the marker of shard {number}")
    return done


def shard_numbers(out: Path) -> list[int]:
    """Numbers that have a marker, sound or not."""
    stems = (path.stem.removeprefix("part-") for path in (out / "done").glob("part-*.json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal() and len(stem) < 10)


def damaged(out: Path, made: dict) -> dict[str, str]:
    """{file: what is wrong} of the files that a marker names."""
    found = {name: problem(out / name, expected) for name, expected in made["files"].items()}
    return {name: text for name, text in found.items() if text is not None}


def chain(markers) -> str:
    """One digest of many markers, in order."""
    digest = hashlib.sha256()
    for made in markers:
        digest.update(made[SEAL].encode())
    return digest.hexdigest()


def entries_sound(files) -> bool:
    """Whether this is what a marker's `files` should be: names inside the folder, each with bytes and digest."""
    if not isinstance(files, dict):
        return False
    sound = all(
        isinstance(x, dict) and is_integer(x.get("bytes")) and isinstance(x.get(SEAL), str) and _blocks_sound(x)
        for x in files.values()
    )
    return sound and not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)


def _blocks_sound(x: dict) -> bool:
    """Whether a file's blocks, where it has any, are one for each piece of it."""
    blocks = x.get("blocks", [])
    return "blocks" not in x or (isinstance(blocks, list) and len(blocks) == -(-x["bytes"] // COMPARED))
