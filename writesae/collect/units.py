"""A unit done by whichever worker: its own folder, and the marker that makes it part of the collection.

    plan.json                                the units, see `plan`
    units/000007-1a2b3c4d5e6f.lock           held by who does unit 7; empty, gone at the end
    units/000007-1a2b3c4d5e6f-9f8e7d6c/      what a worker of machine 9f8e7d6c made of it: firings/, tokens/,
                                             documents.parquet, features.parquet, index.parquet (where it is smaller
                                             than the firings)
    done/unit-000007.json                    its completion marker, written last: which folder counts, and its files

Nothing is ever moved into place. Files are written whole into a folder that one machine alone writes to, and the marker
that names them is created only where none stands. So a unit done twice (its lock is of use where all machines see it,
and nothing depends on it) is the first one's, wholly, and a worker that dies leaves a folder that nobody names: another
worker of the machine goes on in it, shard by shard, and the end of the collection removes the others.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from functools import cache
from pathlib import Path

import numpy as np

from ..files import entry, make_folder
from ..interrupt import Stop
from . import files
from .finish import INDEX_ROWS, Piece, Selecting, write_documents, write_features
from .marks import PARTS, part_name, shard_marker
from .modes import Features
from .plan import Range, Unit
from .shard import Progress, Shard, firings_table, read_columns
from .unit_marks import TABLES, mark_unit, marker_path, unit_marker


@cache
def machine() -> str:
    """This machine, as long as it runs: what of a folder's locks holds for sure between two processes of one."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = str(uuid.getnode())
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def piece(out: Path, made: dict, kept: list[Path]) -> Piece:
    """A unit, for `finish.assemble`. kept: the tables that hold what is kept of it."""
    folder = out / made["folder"]
    return Piece(folder / "documents.parquet", folder / "features.parquet", lambda site: kept, made["passages"])


def shards_of(made: dict) -> list[str]:
    """Names of the tables of a unit's firings, of mode all."""
    return [f"{made['folder']}/firings/{part_name(number)}" for number in range(made["shards"])]


def write_index(out: Path, folder: Path, shards: int, features: Features, how: Selecting) -> None:
    """Writes a unit's index.parquet: of its firings, by (feature, -activation), those that the whole may keep."""
    selection = how.new(features.total)
    for number in range(shards):
        selection.add(read_columns(folder / "firings" / part_name(number), features))
    table = firings_table(selection.kept.by_activation(), features)
    files.write_table(folder / "index.parquet", table, INDEX_ROWS, out)


class Worker:
    """Does units of an open collection.

    Args: job: of `run.opened`. units: its plan.
    """

    def __init__(self, job, units: list[Unit]):
        self.job, self.units = job, units
        self.how = Selecting.of(job.content)
        self.repaired: list[str] = []
        self._done: set[int] = set()

    def done(self, unit: Unit) -> bool:
        """Whether the unit's marker is there."""
        path = marker_path(self.job.out, unit.number)
        if unit.number not in self._done and path.exists():
            self._done.add(unit.number)
        return unit.number in self._done

    def look(self) -> None:
        """Sees what other workers have done since."""
        self.job.where.refresh()

    def forget_damaged(self, unit: Unit) -> None:
        """Takes a unit's marker away, so that it is done again, if it or a file it names is not what was written."""
        job = self.job
        path = marker_path(job.out, unit.number)
        if not path.exists():
            return
        with files.claimed(job.out / "units" / f"{unit.name}.lock") as mine:
            if not mine:
                return
            try:
                made = unit_marker(job.out, unit.number, job.digest)
                for name, expected in made["files"].items():
                    # In mode all the shards take its place.
                    if name.endswith("/index.parquet") and job.mode == "all":
                        continue
                    found = job.where.problem(name, expected)
                    if found is not None:
                        raise ValueError(f"{job.where.shown(name)}: {found}")
            except FileNotFoundError:
                return
            except ValueError as error:
                self.repaired.append(str(error))
                job.where.discard(f"done/{path.name}")
                self._done.discard(unit.number)

    def do(self, unit: Unit, stop: Stop) -> bool:
        """Does a unit, unless it is done or another worker is at it. Whether it did anything."""
        out = self.job.out
        if not self.done(unit):
            self.look()
        if self.done(unit):
            return False
        with files.claimed(out / "units" / f"{unit.name}.lock") as mine:
            if not mine or self.done(unit):
                return False
            try:
                self._do(unit, make_folder(out, "units", f"{unit.name}-{machine()}"), stop)
            except OSError:
                # One on another machine that does not see our locks was first, and has tidied up.
                if not self.done(unit):
                    raise
        return True

    def _do(self, unit: Unit, folder: Path, stop: Stop) -> None:
        job, size = self.job, self.job.content["shard_passages"]
        for name in (*PARTS, "done"):
            make_folder(folder, name)
        corpus = Range(job.corpus, unit.start, unit.documents)

        def unchanged(shard: Shard) -> None:
            job.watched.check(unit.start.place[0], corpus.file)

        state = Progress(folder, job.features, job.selection(), job.digest, unchanged)
        state.cursor = unit.start
        job.session.max_tokens, job.session.goes_on = unit.tokens, unit.goes_on
        self.repaired += job.session.load(corpus, state, size)
        job.session.run(corpus, state, size, None, stop)
        if state.last:
            self._complete(unit, state)

    def _complete(self, unit: Unit, state: Progress) -> None:
        job, folder = self.job, state.out
        numbers = range(state.shards)
        write_documents(folder, [(folder / "documents" / part_name(i), 0, 0) for i in numbers], job.out)
        write_features(folder, job.features, state.totals, job.out, silent=False)
        tables = list(TABLES)
        # Where the index would be most of the firings, which mode all keeps anyway, the whole's is made from those.
        if job.mode != "all" or 2 * np.minimum(state.totals.count, self.how.n).sum() <= state.firings:
            write_index(job.out, folder, state.shards, job.features, self.how)
            tables.append("index.parquet")
        kept = ("firings", "tokens") if job.mode == "all" else ("tokens",)
        inside = folder.relative_to(job.out).as_posix()
        entries: dict[str, dict] = {}
        for number in numbers:
            made = shard_marker(folder, number, job.digest)["files"]
            entries |= {f"{inside}/{x}/{part_name(number)}": made[f"{x}/{part_name(number)}"] for x in kept}
        entries |= {f"{inside}/{name}": entry(folder / name) for name in tables}
        counted = {
            "shards": state.shards, "shard_passages": job.content["shard_passages"],
            "passages": (state.cursor or unit.start).passages, "documents": state.documents, "tokens": state.tokens,
            "firings": state.firings, "kept": kept_in_all(state),
        }  # fmt: skip
        there, entries = job.where.placed(unit.name, inside, entries)
        mark_unit(job.where, unit.number, there, job.digest, counted, entries)
        self._done.add(unit.number)
        if unit_marker(job.out, unit.number, job.digest)["folder"] == inside:
            remove_spent(folder, job.mode)
        else:  # another worker's counts, or it is elsewhere now
            shutil.rmtree(folder, ignore_errors=True)


def kept_in_all(state: Progress) -> int:
    """Firings of a unit that are stored."""
    return state.firings if state.selection is None else len(state.selection.kept)


def remove_spent(folder: Path, mode: str) -> None:
    """Removes what a unit's tables took the place of: only a resumed worker would have asked for it."""
    for name in ("counts", "documents", "done", *(() if mode == "all" else ("firings",))):
        shutil.rmtree(folder / name, ignore_errors=True)
