"""`writesae merge`: stores collected apart become one; or the units of one folder, all done, are put together.

Stores are merged where the same model, dictionaries and tokenizer read other text with the same options. Documents are
numbered on, store after store, in the order given. What a store kept of a feature (the top, or a sample) is all that is
needed to keep the same of the whole, see `modes`, so the index is merged exactly, a range of features at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..files import (
    SEAL,
    entry,
    make_folder,
    refuse_links,
    sealed,
    sha256,
    sync_folder,
    whole_file,
    write_first,
)
from ..interrupt import finishing
from ..progress import tqdm
from . import assemble, files, manifest, plan
from .finish import Piece
from .manifest import FORMAT, VERSION
from .marks import marker, part_name
from .mirror import Place, place_of
from .shard import ROWS
from .store import Store
from .unit_marks import mark_unit, marker_name, marker_path, unit_marker, without_blocks
from .units import machine
from .verify import verify

SAME = ("mode", "n", "seed", "context", "bos", "sites", "source", "tokenizer")  # entries of manifests that must agree


def merge(stores: list, out, progress: bool = False) -> dict:
    """Merges finished stores into a new one, which the same call goes on with if it was interrupted. Returns its
    summary.

    Args:
        stores: folders of collections, or their URLs, at least two, whose documents are numbered in this order.
        out: a new or empty folder, or one that this very merge was begun in; or the URL of one.
        progress: show a bar.

    Raises:
        ValueError: a store is unfinished, damaged, or differs in what must agree, by name; two are of the same text.
    """
    began = time.perf_counter()
    where = place_of(out)
    out = where.path
    if len(stores) < 2:
        raise ValueError(f"stores: expected at least two, got {len(stores)}")
    found = [_finished(path) for path in stores]
    content, firsts = _content(found)
    with where.beginning():
        manifest.refuse_foreign(out)
        refuse_links(out)
        make_folder(out)
    with files.locked(out), finishing("shard") as stop:
        write_first(out / "manifest.json", sealed(content).encode(), out)
        for name in ("units", "done", "index"):
            make_folder(out, name)
        manifest.restore(out)
        where.publish()
        _, digest = manifest.check(out, content)
        if (out / "summary.json").exists():
            problems = verify(where)
            if not (problems.damaged or problems.missing):
                return Store(where).summary()
            where.discard("summary.json")
            sync_folder(out)
        with tqdm(unit="step", disable=not progress, desc="merging") as bar:

            def step() -> None:
                bar.update()
                stop.check()

            _copy_tokenizer(found[0], where, digest)
            markers: list[dict] = []
            pieces = []
            for store, first in zip(found, firsts, strict=True):
                markers += _copy(store, where, first, len(markers), digest, step)
                pieces.append(_piece(store, first))
            assemble.conclude(where, content, digest, markers, pieces, {"seconds": time.perf_counter() - began}, step)
        return Store(where).summary()


def _finished(path) -> Store:
    store = Store(path)
    if not store.complete:
        raise ValueError(f"stores: expected finished collections, got {path}: run its `writesae collect` again")
    if store.manifest["version"] != VERSION:
        raise ValueError(f"stores: {path} was made by an older writesae, without digests; it can be read, not merged")
    return store


def _content(stores: list[Store]) -> tuple[dict, list[int]]:
    """(the merged manifest, a function of the stores' alone; the number of each store's first document).

    Raises:
        ValueError: they differ where they must agree.
    """
    first = stores[0].manifest
    for store in stores[1:]:
        kinds = stores[0].activations, store.activations
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"stores: expected the same activations in all, got {kinds[0]} in {stores[0].path} and {kinds[1]} in "
                f"{store.path}: collect one of them again with --activations {kinds[0]}"
            )
        for name in SAME:
            if store.manifest.get(name) != first.get(name):
                raise ValueError(
                    f"stores: expected the same {name} in all, got {_short(first.get(name))} in {stores[0]} and "
                    f"{_short(store.manifest.get(name))} in {store}"
                )
    corpora: list[list] = []  # first document, salt, digest
    firsts: list[int] = []
    documents = 0
    for store in stores:
        firsts.append(documents)
        own = [[0, store.manifest.get("salt", 0), store.manifest["corpus"].get("sha256")]]
        corpora += [[documents + at, *rest] for at, *rest in store.manifest.get("corpora", own)]
        documents += len(store.documents)
    digests = [digest for *_, digest in corpora]
    salts = [salt for _, salt, _ in corpora]
    if len(set(digests)) < len(digests) or (first["mode"] == "reservoir" and len(set(salts)) < len(salts)):
        raise ValueError("stores: expected each of other text, got two of the same: its firings would be there twice")
    content = {
        "format": FORMAT, "version": VERSION, **{name: first.get(name) for name in SAME},
        "batch": first.get("batch"), "max_tokens": None, "estimate": None, "named": first.get("named"),
        "shard_passages": max(store.manifest["shard_passages"] for store in stores),
        "unit": max(store.manifest.get("unit", 1) for store in stores),
        "corpus": {"merged": len(corpora), "sha256": hashlib.sha256(json.dumps(digests).encode()).hexdigest()},
        "corpora": corpora,
    }  # fmt: skip
    return content, firsts


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"one with SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _copy_tokenizer(store: Store, where: Place, digest: str) -> None:
    names, out = store.tokenizer_files(), where.path
    folder = make_folder(out, "tokenizer")
    for name in names:
        with whole_file(out / name, out) as temporary:
            shutil.copyfile(store.file(name), temporary)
    where.send(*names)
    where.write("done/tokenizer.json", marker(out, [folder / Path(name).name for name in names], digest))


def _copy(store: Store, where: Place, first: int, number: int, digest: str, step: Callable[[], None]) -> list[dict]:
    """Copies a store's units (one that has none is one), documents numbered from `first` on; returns their markers."""
    out, made = where.path, []
    for at, piece in enumerate(store.pieces):
        what = json.dumps([digest, sha256(store.path / "manifest.json"), at])
        unit = f"{number + at:06d}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
        try:
            done = unit_marker(out, number + at, digest)
            if not any(where.problem(name, expected) for name, expected in done["files"].items()):
                made.append(without_blocks(done))
                continue
        except ValueError:
            pass
        where.discard(f"done/{marker_name(number + at)}.json")
        folder = make_folder(out, "units", f"{unit}-{machine()}")
        written = []
        for kind in ("firings", "tokens") if store.mode == "all" else ("tokens",):
            make_folder(folder, kind)
            for shard in range(piece.shards):
                source = store.file(f"{piece.folder}{kind}/{part_name(shard)}")
                written.append(folder / kind / part_name(shard))
                _renumbered(source, written[-1], first, files.FIRINGS if kind == "firings" else files.TOKENS, out)
                step()
        for table, schema in (("documents.parquet", files.DOCUMENTS), ("features.parquet", files.FEATURES)):
            written.append(folder / table)
            by = first if table == "documents.parquet" else 0
            _renumbered(store.file(f"{piece.folder}{table}"), written[-1], by, schema, out)
        inside = folder.relative_to(out).as_posix()
        entries = {path.relative_to(out).as_posix(): entry(path) for path in written}
        there, entries = where.placed(unit, inside, entries)
        mark_unit(where, number + at, there, digest, store.counted(at), entries)
        made.append(without_blocks(unit_marker(out, number + at, digest)))
        if there != inside:
            shutil.rmtree(folder, ignore_errors=True)
    return made


def _renumbered(source: Path, path: Path, by: int, schema, root: Path) -> None:
    if not by:
        with whole_file(path, root) as temporary:
            shutil.copyfile(source, temporary)
        return
    table = files.shifted(files.read_table(source, schema), document=by)
    files.write_table(path, table, ROWS.get(path.parent.name, files.ROW_GROUP), root)


def _piece(store: Store, first: int) -> Piece:
    return Piece(
        store.file("documents.parquet"), store.file("features.parquet"),
        lambda site: [store.file(f"index/layer-{site.layer}-head-{site.head}.parquet")],
        sum(store.counted(at)["passages"] for at in range(len(store.pieces))), first,
    )  # fmt: skip


def put_together(out, progress: bool = False) -> dict:
    """Ends a folder of units all of which are done, without the model; returns its summary.

    Raises:
        ValueError: some are not done, or damaged; says how many, or which file.
    """
    began = time.perf_counter()
    where = place_of(out)
    out = where.path
    with where.beginning():
        content = manifest.read(out / "manifest.json")
    if "unit" not in content:
        raise ValueError(f"stores: expected two stores or more, or one filled by several workers, got {where} alone")
    digest = sha256(out / "manifest.json")
    with files.locked(out, shared=True), files.claimed(out / ".finish", wait=True):
        if (out / "summary.json").exists():
            return Store(where).summary()
        made = [unit.number for unit in plan.read(out, digest)]
        left = [number for number in made if not marker_path(out, number).exists()]
        if left:
            raise ValueError(
                f"stores: {len(left)} of the {len(made)} units of {where} are not done (first: {left[0]}): run its "
                "`writesae collect` again"
            )
        for name in ("index", "done"):
            make_folder(out, name)
        with finishing("part of the index") as stop:

            def own() -> dict:
                return {"seconds": time.perf_counter() - began}

            assemble.put_together(where, content, digest, made, own, progress, stop)
        return Store(where).summary()


# ---- the command -----------------------------------------------------------------------------------------------------


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", nargs="*", help="finished collections of other text, in the order their documents "
                        "are to be numbered")  # fmt: skip
    parser.add_argument("out", help="new folder for all of them; or, alone, a folder that several workers filled, "
                        "whose units are all done")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Prints the summary as JSON."""
    progress = not args.quiet and sys.stderr.isatty()
    summary = merge(args.stores, args.out, progress) if args.stores else put_together(args.out, progress)
    shown = {name: x for name, x in summary.items() if name not in ("integrity", "layout", SEAL)}
    print(json.dumps(shown, indent=2))
    return 0
