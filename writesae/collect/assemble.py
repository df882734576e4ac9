"""A collection made of units: put together, tidied up, and summed up."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable

import numpy as np

from ..files import discard, discard_left_over, entry, problem, sealed
from ..interrupt import Stop
from ..progress import tqdm
from . import files
from .finish import Assembled, Piece, Selecting, assemble
from .mirror import Place
from .modes import Features
from .plan import PLAN
from .shared_digests import FOLDER as DIGESTS
from .source import Site
from .unit_marks import TABLES, chain, unit_marker, unit_numbers, without_blocks
from .units import piece, remove_spent, shards_of


def features_of(content: dict) -> Features:
    """Of a manifest's sites."""
    return Features([Site(*site) for site in content["sites"]])


def ready(where: Place, made: dict, content: dict) -> Piece:
    """A unit's tables, checked; in mode all its firings, where it has no sound index.

    Raises:
        ValueError: one is damaged or missing; names it.
    """
    out, index = where.path, f"{made['folder']}/index.parquet"
    tables = [f"{made['folder']}/{table}" for table in TABLES]
    for name in (*tables, index):
        where.need(name, made["files"].get(name))
    kept = [index]
    if content["mode"] == "all" and (index not in made["files"] or problem(out / index, made["files"][index])):
        kept = shards_of(made)
        for name in kept:
            where.need(name, made["files"].get(name))
    for name in (*tables, *kept):
        found = problem(out / name, made["files"][name]) if name in made["files"] else "missing"
        if found is not None:
            raise ValueError(
                f"{where.shown(name)}: {found}: run the same `writesae collect` again to have it made again"
            )
    return piece(out, made, [out / name for name in kept])


def conclude(
    where: Place,
    content: dict,
    digest: str,
    markers: list[dict],
    pieces: list[Piece],
    own: dict,
    step: Callable[[], None],
) -> None:
    """Makes the tables of the whole from its pieces, then the summary, and removes what they took the place of.

    Args:
        content, digest: the manifest and its digest. markers: of the units, in order.
        own: what the summary says of the run that did it. step: shows progress, or raises an interrupt.
    """
    out = where.path
    state = Assembled(out, features_of(content), digest, chain(markers))
    totals = assemble(state, pieces, Selecting.of(content), step)
    sums = {name: sum(made[name] for made in markers) for name in ("shards", "documents", "tokens", "firings")}
    kept = sums["firings"] if content["mode"] == "all" else int(np.minimum(totals.count, content["n"]).sum())
    left = [path for name in ("documents.parquet", "features.parquet", PLAN) if (path := out / name).exists()]
    entries = {path.name: entry(path) for path in left}
    size = sum(path.stat().st_size for path in (*(out / "index").iterdir(), out / "manifest.json"))
    size += sum(x["bytes"] for x in entries.values())
    size += sum(x["bytes"] for made in markers for name, x in made["files"].items() if not _spent(name))
    layout = [[made[name] for name in ("folder", "shards", "passages", "shard_passages")] for made in markers]
    summary = {
        "complete": True, "units": len(markers), **sums, "kept": kept, "bytes": size,
        "bytes_per_firing": size / max(kept, 1), **own, "layout": layout,
        "integrity": {"manifest": digest, "shards": state.digest, "files": entries},
    }  # fmt: skip
    sites = [f"layer-{layer}-head-{head}" for layer, head, *_ in content["sites"]]
    where.send(*entries, *(f"index/{site}.parquet" for site in sites), *(f"done/{site}.json" for site in sites))
    where.write("summary.json", sealed(summary).encode())
    sweep(where, content, digest)


def put_together(
    where: Place,
    content: dict,
    digest: str,
    numbers: Iterable[int],
    own: Callable[[], dict],
    progress: bool,
    stop: Stop,
) -> None:
    """`conclude` of units that are all done, under a bar. own: says it when the pieces are ready."""
    markers = [without_blocks(unit_marker(where.path, number, digest)) for number in numbers]
    pieces = [ready(where, made, content) for made in markers]
    with tqdm(unit="step", disable=not progress, desc="indexing") as bar:

        def step() -> None:
            bar.update()
            stop.check()

        conclude(where, content, digest, markers, pieces, own(), step)


def _spent(name: str) -> bool:
    """Whether a unit's file goes when the whole is there: its index, whose place the whole's takes."""
    return name.endswith("/index.parquet")


def sweep(where: Place, content: dict, digest: str) -> None:
    """Removes what is no part of a finished collection: indexes of units, and what workers that died left."""
    out, named = where.path, {}
    for number in unit_numbers(out):
        folder = unit_marker(out, number, digest)["folder"]
        named[folder] = number
    for path in sorted((out / "units").iterdir()):
        if path.is_dir():
            inside = path.relative_to(out).as_posix()
            if inside in named:
                remove_spent(path, content["mode"])
                discard(path / "index.parquet")
                for folder in (path, path / "firings", path / "tokens"):
                    discard_left_over(folder)
                continue
            lock = path.with_name("-".join(path.name.split("-")[:2]) + ".lock")
            with files.claimed(lock) as nobodys:  # else one is at it, and will see that it came second
                if nobodys:
                    shutil.rmtree(path, ignore_errors=True)
    for path in (out / "units").glob("*.lock"):
        discard(path)
    shutil.rmtree(out / DIGESTS, ignore_errors=True)
    discard(out / ".plan")
    for folder in (out, out / "done", out / "index", out / "tokenizer"):
        discard_left_over(folder)
    where.keep_only(set(named))
