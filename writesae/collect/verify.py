"""`writesae verify`: is every file of a collection what was written? Reads digests, nothing else; changes nothing."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import left_over, read_sealed, sha256
from ..objects import is_url
from . import manifest as manifest_file
from . import unit_marks
from .files import digest_bar
from .marks import PARTS, chain, entries_sound, marked, part_name, shard_marker, shard_numbers
from .mirror import Place, place_of
from .shared_digests import FOLDER as DIGESTS

TABLES = ("documents.parquet", "features.parquet")
PLAN = "plan.json"
FOLDERS = ("index", "tokenizer", "done", "units")
CARD = ("README.md", ".gitattributes")  # what a repository of the Hugging Face hub has beside


@dataclass
class Verified:
    """What was found in a store's folder.

    Attributes:
        complete: whether it has its summary, sound or not.
        activations: "exact" or "packed" (rounded), as the manifest says; None where that is damaged.
        shards: shards that are there. files, bytes: checked.
        damaged: {file: what is wrong}; missing, unexpected: files, by name.
        left_over: files of an interrupted run, which the next `collect` removes.
    """

    store: str
    complete: bool
    activations: str | None = None
    shards: int = 0
    files: int = 0
    bytes: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing damaged, missing or unexpected."""
        return not (self.damaged or self.missing or self.unexpected)

    def lines(self) -> list[str]:
        """One line a problem."""
        return [
            *(f"damaged {name}: {text}" for name, text in self.damaged.items()),
            *(f"missing {name}" for name in self.missing),
            *(f"unexpected {name}" for name in self.unexpected),
        ]


def verify(folder: str | os.PathLike | Place, progress: Callable[[int], object] | None = None) -> Verified:
    """Compares every file of a collection, finished or not, with its digest.

    Args:
        folder: the store, or its URL. progress: told the bytes of each block read.

    Raises:
        ValueError: no such folder, one that holds no collection, or one made without digests.
    """
    where = place_of(folder, "store", "store")
    out = where.path
    if not isinstance(folder, Place):
        with where.beginning():
            pass
    if not out.is_dir():
        raise ValueError(f"store: expected a folder made by `writesae collect`, got {where}")
    if not (out / "manifest.json").is_file() and not (out / "done").is_dir():
        raise ValueError(f"store: expected a folder made by `writesae collect`, got {where} without manifest.json")
    _refuse_old(where)
    check = _Check(where, progress)
    check.manifest()
    if check.in_units:
        check.units()
    else:
        check.shards()
    check.rest()
    check.others()
    return check.found


def _refuse_old(where: Place) -> None:
    try:
        version = manifest_file.read(where.path / "manifest.json")["version"]
    except ValueError:
        return
    if version == 1:
        raise ValueError(f"store: {where} was made by an older writesae, without digests: nothing to verify by")


class _Check:
    def __init__(self, where: Place, progress):
        self.where, self.out, self.progress = where, where.path, progress
        self.all = where.names()
        self.complete = where.exists("summary.json")
        self.found = Verified(str(where), self.complete)
        self.known = {".lock", ".finish", ".plan", *CARD}
        self.in_units = False
        self.markers: list[dict] = []
        self.sites: list[str] | None = None
        self.mode, self.digest = "top", None  # of what the manifest says; "top" lets most be spent
        self.summary: dict | None = None

    def manifest(self) -> None:
        content = None
        for name in ("manifest.json", manifest_file.COPY):  # either will do for what follows
            try:
                here = manifest_file.read(self.out / name)
                digest = sha256(self.out / name)
                if content is not None and digest != self.digest:
                    raise ValueError("is not the manifest's copy")
            except ValueError as error:
                self._bad(name, error)
                continue
            self._good(name)
            content, self.digest = here, digest
        self.known.add("summary.json")
        if content is None:
            return
        self.mode, self.in_units = content["mode"], "unit" in content
        self.found.activations = manifest_file.activations(content)
        self.sites = [f"layer-{site[0]}-head-{site[1]}" for site in content["sites"]]
        if not self.complete:
            return
        try:
            self.summary = read_sealed(self.out / "summary.json")
            integrity = self.summary.get("integrity")
            if not isinstance(integrity, dict) or not entries_sound(integrity.get("files")):
                raise ValueError("no digests")
            if integrity.get("manifest") != self.digest:
                raise ValueError("of another collection")
        except ValueError as error:
            self.summary = None
            self._bad("summary.json", error)
        else:
            self._good("summary.json")

    def shards(self) -> None:
        numbers = shard_numbers(self.out)
        count = 1 + max(numbers, default=-1)
        if self.summary is not None and isinstance(self.summary.get("shards"), int):
            count = min(self.summary["shards"], 10**9)
        self.found.shards = count
        spent = self._spent()
        for number in range(count):
            name = f"done/{part_name(number, 'json')}"
            try:
                made = shard_marker(self.out, number, self.digest)
            except ValueError as error:
                self._bad(name, error)
                self.known |= {f"{folder}/{part_name(number)}" for folder in PARTS}
                if len(self.found.missing) > 1000:  # a summary that claims what is not there
                    break
                continue
            self._good(name)
            self.markers.append(made)
            for file, expected in made["files"].items():
                if file.split("/")[0] in spent and not self.where.exists(file):
                    continue  # the files written at the end took its place
                self._compare(file, expected)

    def units(self) -> None:
        numbers = set(unit_marks.unit_numbers(self.out))
        if self.summary is not None and isinstance(self.summary.get("layout"), list):
            numbers |= set(range(len(self.summary["layout"])))
        elif self.where.exists(PLAN):
            try:
                if read_sealed(self.out / PLAN).get("manifest") != self.digest:
                    raise ValueError("of another collection")
            except ValueError as error:
                self._bad(PLAN, error)
            else:
                self._good(PLAN)
        for number in sorted(numbers):
            name = f"done/{unit_marks.marker_name(number)}.json"
            try:
                made = unit_marks.unit_marker(self.out, number, self.digest)
            except ValueError as error:
                self._bad(name, error)
                continue
            self._good(name)
            self.markers.append(made)
            self.found.shards += made["shards"]
            for file, expected in made["files"].items():
                if self.complete and file.endswith("/index.parquet") and not self.where.exists(file):
                    continue  # the whole's took its place
                self._compare(file, expected)

    def _spent(self) -> tuple[str, ...]:
        if not self.complete:
            return ()
        return manifest_file.spent(self.mode)

    def rest(self) -> None:
        """The tokenizer, the index, and what only the summary vouches for."""
        for name in ("tokenizer", *(self.sites or ())):
            if name != "tokenizer" and not self.complete and not (self.out / "done" / f"{name}.json").exists():
                continue  # not made yet
            try:
                made = marked(self.out, name, self.digest)
            except ValueError as error:
                self._bad(f"done/{name}.json", error)
                self.known |= {f"index/{name}.parquet"}
                continue
            self._good(f"done/{name}.json")
            for file, expected in made["files"].items():
                self._compare(file, expected)
        if self.summary is None:
            return
        integrity = self.summary["integrity"]
        for file, expected in integrity["files"].items():
            self._compare(file, expected)
        digest = (unit_marks.chain if self.in_units else chain)(self.markers)
        if not self.found.damaged and not self.found.missing and digest != integrity.get("shards"):
            self.found.damaged["summary.json"] = "its digest of the shards' markers is of others"

    def others(self) -> None:
        for file in self.all:
            if file in self.known or file.startswith(f"{DIGESTS}/"):  # which a worker that came late may have left
                continue
            ours = left_over(Path(file)) is not None or file in TABLES or file.split("/")[0] in (*PARTS, *FOLDERS)
            (self.found.left_over if ours and not self.complete else self.found.unexpected).append(file)

    def _compare(self, file: str, expected: dict) -> None:
        if file in self.known:
            return
        found = self.where.problem(file, expected, self.progress)
        self.known.add(file)
        if found == "missing":
            self.found.missing.append(file)
        elif found is not None:
            self.found.damaged[file] = found
        else:
            self._good(file)

    def _good(self, file: str) -> None:
        self.known.add(file)
        self.found.files += 1
        self.found.bytes += self.where.size(file)

    def _bad(self, file: str, error: ValueError) -> None:
        self.known.add(file)
        if self.where.exists(file):
            text = str(error).removeprefix(str(self.out / file)).removeprefix(" is damaged").lstrip(": ")
            self.found.damaged[file] = text
        else:
            self.found.missing.append(file)


# ---- the command -----------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder made by `writesae collect`, finished or not, or its URL in an object "
                        "store")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Prints every damaged, missing or unexpected file. Returns 0 if there is none, else 1."""
    out = args.store if is_url(args.store) else Path(args.store)
    size = 0
    if isinstance(out, Path):
        _refuse_busy(out)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.is_dir() else 0
    with digest_bar("verifying", size, not args.quiet and sys.stderr.isatty()) as tell:
        found = verify(out, tell)
    if args.json:
        print(json.dumps({"sound": found.sound, **asdict(found)}, indent=1))
        return int(not found.sound)
    for line in found.lines():
        print(line)
    state = "finished" if found.complete else "unfinished (the same `writesae collect` goes on)"
    if found.sound:
        print(
            f"{out}: {state}, {found.shards} shards, activations {found.activations}; {found.files} files, "
            f"{found.bytes:,} bytes, all as written"
        )
        return 0
    print(
        f"{out}: {state}; {len(found.damaged)} damaged, {len(found.missing)} missing, {len(found.unexpected)} "
        "unexpected files: run the same `writesae collect` again to have damaged and missing ones made again",
        file=sys.stderr,
    )
    return 1


def _refuse_busy(out: Path) -> None:
    """Raises ValueError while a collection runs into the folder: half of it would look damaged."""
    try:
        descriptor = os.open(out / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"store: {out} is being collected into at this moment") from None
    finally:
        os.close(descriptor)
