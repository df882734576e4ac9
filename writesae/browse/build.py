"""Making what an atlas keeps: a file a site, whole or not at all, so that an interrupted making goes on."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..collect.files import numbers
from ..files import make_folder
from ..progress import tqdm
from ..untrusted import first_line
from . import native, promoted, sources
from . import table as tables
from .contexts import about
from .table import FeatureTable

if TYPE_CHECKING:
    from .atlas import Atlas


def build(atlas: Atlas, progress: bool) -> None:
    """Makes what is not there yet, see `Atlas.open`."""
    try:
        make_folder(atlas.folder, argument="cache")
        atlas.words  # noqa: B018 - made where it is not there
        _build_scans(atlas, progress)
        model = _build_atoms(atlas, progress)
        _build_native(atlas, model, progress)
        known = tables.about(atlas.table_path)
        if known is None or known["rows"] != atlas.first[-1]:
            _build_table(atlas)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ValueError(
            f"cache: nothing can be written to {atlas.folder} ({error.strerror}): name another folder with cache"
        ) from error


def _build_scans(atlas: Atlas, progress: bool) -> None:
    left = [i for i in range(len(atlas.sites)) if not atlas.scan_path(i).is_file()]
    if not left:
        return
    from . import scan

    largest = numbers(_counts(atlas)["max"])
    asked = {atlas.sites[i]: scan.SiteOf(*atlas.sites[i], atlas.sizes[i]) for i in left}
    parts = len(list(scan.groups(list(asked.values()))))
    shards = sum(piece.shards for piece in atlas.store.pieces) if atlas.store.mode == "all" else 1
    make_folder(atlas.folder, f"firings-{atlas.store_digest}", argument="cache")
    with tqdm(total=2 * parts * shards, desc="reading the store", unit="shard", disable=not progress) as bar:
        for group in scan.groups(list(asked.values())):
            mine = np.concatenate([largest[_slice(atlas, (s.layer, s.head))] for s in group])
            for site, made in scan.Scan(atlas.store, group, mine, bar.update).run():
                scan.write(atlas.scan_path(atlas.site(site.layer, site.head)), made, {}, atlas.folder)


def _counts(atlas: Atlas) -> pa.Table:
    """The store's totals, as many as its manifest says before anything of that size is made."""
    n, found = int(atlas.first[-1]), atlas.store.counts()
    if len(found) != n:
        raise ValueError(f"store: {atlas.store.path}: expected {n} rows in features.parquet, got {len(found)}")
    return found


def _slice(atlas: Atlas, site: tuple[int, int]) -> slice:
    at = atlas.sites.index(site)
    return slice(int(atlas.first[at]), int(atlas.first[at + 1]))


def _build_atoms(atlas: Atlas, progress: bool):
    """Returns the model, where it was loaded."""
    left = [i for i, site in enumerate(atlas.sites) if site in atlas.dictionaries and not atlas.atoms_path(i).is_file()]
    if not left:
        return None
    from . import scan

    model = None
    if atlas.model is not None:
        from ..models import load

        model, _ = load(atlas.model)
    for i in tqdm(left, desc="what atoms write", unit="site", disable=not progress):
        site = atlas.sites[i]
        sae = sources.load(atlas.dictionaries[site], site, atlas.sizes[i])
        sources.require_own(atlas.store, sae, site)
        if model is not None:
            from ..models.identity import require_same_model

            require_same_model(model, {site: sae}, False, str(atlas.model))
        made, why = promoted.facts(sae, model, site[0], site[1], len(atlas.words))
        path = atlas.atoms_path(i)
        make_folder(atlas.folder, path.parent.name, argument="cache")
        scan.write(path, made, {"why": why}, atlas.folder)
    return model


def _build_native(atlas: Atlas, model, progress: bool) -> None:
    paths = {site: path for i, site in enumerate(atlas.sites) if (path := atlas.native_path(i)) is not None}
    left = [site for site, path in paths.items() if not path.is_file()]
    ids = native.passages(atlas.store) if left else []
    if not ids or atlas.model is None:
        return
    from ..models import load
    from . import scan

    model = load(atlas.model)[0] if model is None else model
    every = {site: atlas.dictionary(site) for site in left}
    saes = {site: sae for site, sae in every.items() if sae.kind in native.KINDS}
    try:
        with tqdm(total=len(ids), desc="what the model writes", unit="passage", disable=not progress) as bar:
            made = native.measure(model, saes, ids, bar.update) if saes else {}
    except ValueError as error:
        if atlas.has_model:
            raise
        atlas.notes.append(f"cosine: {first_line(error)}")  # of a model that nobody named
        return
    for site, table in made.items():
        make_folder(atlas.folder, paths[site].parent.name, argument="cache")
        scan.write(paths[site], table, {}, atlas.folder)


def _build_table(atlas: Atlas) -> None:
    n = int(atlas.first[-1])
    found = _counts(atlas)
    columns = {name: numbers(found[name]) for name in ("count", "sum", "max")}
    count: np.ndarray = columns["count"]
    win_rate, cosine = atlas.results.columns(atlas.sites, atlas.first)
    for i in range(len(atlas.sites)):
        path = atlas.native_path(i)
        if path is not None and path.is_file():
            mine = cosine[atlas.first[i] : atlas.first[i + 1]]
            mine[:] = np.where(np.isfinite(mine), mine, _column(path, "cosine", len(mine)))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        density = (count / max(1, atlas.tokens_seen)).astype(np.float32)
        mean = np.where(count > 0, columns["sum"] / count, 0).astype(np.float32)
    partition, names = tables.partitioned(count, density, cosine)
    tokens = {
        name: np.full((n, tables.SHOWN), tables.UNKNOWN, np.uint32) for name in ("promoted", "suppressed", "token")
    }
    why: dict[str, None] = {}
    for i, site in enumerate(atlas.sites):
        rows = slice(int(atlas.first[i]), int(atlas.first[i + 1]))
        _fill(tokens["token"][rows], atlas.scan_path(i), "token")
        if site in atlas.dictionaries:
            for name in ("promoted", "suppressed"):
                _fill(tokens[name][rows], atlas.atoms_path(i), name)
            for what, reason in about(atlas.atoms_path(i)).get("why", {}).items():
                why[f"{what}: {reason}"] = None
    made = FeatureTable(
        np.repeat(np.arange(len(atlas.sites), dtype=np.uint16), atlas.sizes),
        np.concatenate([np.arange(F, dtype=np.uint32) for F in atlas.sizes]), count, density, mean,
        columns["max"], win_rate, cosine, partition, tokens["promoted"], tokens["suppressed"], tokens["token"],
        atlas.sites, names, (),
    )  # fmt: skip
    made.save(atlas.table_path, {"why": list(why)[:20]}, atlas.folder)


def _column(path: Path, name: str, size: int) -> np.ndarray:
    try:
        with pq.ParquetFile(path) as file:
            found = numbers(file.read([name], use_threads=False)[name])
        if found.shape != (size,) or found.dtype != np.float32:
            raise ValueError(f"expected {size} numbers, got {found.shape} of {found.dtype}")
        return found
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cache: {path} cannot be read: {first_line(error)}; remove it") from error


def _fill(out: np.ndarray, path: Path, name: str) -> None:
    """Puts the first tokens of every feature of a site's table into `[F, SHOWN]`."""
    try:
        with pq.ParquetFile(path) as file:
            column = file.read([name], use_threads=False)[name].combine_chunks()
        offsets, values = (np.from_dlpack(x) for x in (column.offsets, column.values))
        size = np.diff(offsets)
        if len(size) != len(out):
            raise ValueError(f"expected {len(out)} rows, got {len(size)}")
        for slot in range(out.shape[1]):
            some = size > slot
            out[some, slot] = values[offsets[:-1][some] + slot]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"cache: {path} cannot be read: {first_line(error)}; remove it") from error
