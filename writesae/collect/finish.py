"""The last step of a collection: all documents in one table, totals of every feature, and the index of each site."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import make_folder, whole_file
from . import files
from .marks import damaged, mark, marked, part_name
from .modes import Columns, Features, Selection, Totals
from .shard import Progress, firings_table
from .source import Site

INDEX_ROWS = 16_384  # a row group of the index: what reading one feature costs
_HELD = 50_000  # firings held while indexing


def index_path(out: Path, layer: int, head: int) -> Path:
    return out / "index" / f"layer-{layer}-head-{head}.parquet"


def finish(progress: Progress, top: int, step: Callable[[], None]) -> None:
    """Writes documents.parquet, features.parquet and every site's index with its marker.

    Done again when interrupted, but for the sites whose index stands: whole, and made from these shards.
    """
    out = progress.out
    write_documents(out, [out / "documents" / part_name(i) for i in range(progress.shards)])
    files.release_memory()  # the model's own working memory is no longer needed
    write_features(out, progress.features, progress.totals)
    left = [site for site in progress.features.sites if not index_stands(progress, site)]
    parts = [out / "firings" / part_name(i) for i in range(progress.shards)]
    for site in left:
        path = index_path(out, site.layer, site.head)
        if progress.selection is not None:
            write_selection(progress, site)
            step()
        else:
            _write_index(path, parts, progress.features, site, progress.totals.count, top, step, out)
        mark(out, path.stem, [path], progress.manifest, shards=progress.digest)


def index_stands(progress: Progress, site: Site) -> bool:
    """Whether a site's index is what a finished run of these shards left."""
    path = index_path(progress.out, site.layer, site.head)
    try:
        made = marked(progress.out, path.stem, progress.manifest)
    except ValueError:
        return False
    whole = made.get("shards") == progress.digest and set(made["files"]) == {f"index/{path.name}"}
    return whole and not damaged(progress.out, made)


def write_documents(out: Path, parts: list[Path]) -> None:
    """Writes documents.parquet, the shards' tables of documents end to end, holding one row group of it at a time."""
    with whole_file(out / "documents.parquet") as temporary:
        with pq.ParquetWriter(temporary, files.DOCUMENTS, **files.parquet_options(files.DOCUMENTS)) as writer:
            held = files.DOCUMENTS.empty_table()
            for part in parts:
                held = pa.concat_tables([held, files.read_table(part, files.DOCUMENTS)])
                if len(held) >= files.ROW_GROUP:
                    writer.write_table(held)
                    held = files.DOCUMENTS.empty_table()
            writer.write_table(held.combine_chunks())


def write_features(out: Path, features: Features, totals: Totals) -> None:
    """Writes features.parquet: one row for every feature of every site, silent ones with count 0."""
    layer, head, feature = features.split(np.arange(features.total))
    table = pa.table([layer, head, feature, totals.count, totals.sum, totals.max], schema=files.FEATURES)
    files.write_table(out / "features.parquet", table)


def write_selection(progress: Progress, site: Site) -> None:
    """The index of a site in the modes top and reservoir: what was kept, and nothing else."""
    features, kept = progress.features, progress.selection.kept
    s = features.sites.index(site)
    low, high = np.searchsorted(kept.key, features.first[s : s + 2])
    part = kept.take(slice(low, high))
    order = np.lexsort((part.position, part.row, part.document, -part.activation, part.key))
    table = firings_table(part.take(order), features)
    files.write_table(index_path(progress.out, site.layer, site.head), table, INDEX_ROWS, progress.out)


def build_index(
    out: Path,
    parts: list[Path],
    sites: list[Site],
    counts: np.ndarray,
    top: int,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Writes each site's `top` firings a feature from shards of all firings, in bounded memory.

    Args:
        out: the collection's folder.
        parts: the shards, in order; each sorted by (layer, head, feature).
        sites: the sites, in (layer, head) order.
        counts: `[features of all sites]` firings of each feature.
        top: firings kept a feature; ties go to the first in document order.
        step: called after every shard of every range of features, to show progress or to raise an interrupt.
    """
    features = Features(sites)
    make_folder(out, "index")
    for site in sites:
        _write_index(index_path(out, site.layer, site.head), parts, features, site, counts, top, step, out)


def _write_index(path, parts, features: Features, site: Site, counts, top: int, step, root: Path) -> None:
    s = features.sites.index(site)
    count = counts[features.first[s] : features.first[s + 1]]
    with whole_file(path, root) as temporary:
        writer = pq.ParquetWriter(temporary, files.FIRINGS, **files.parquet_options(files.FIRINGS))
        with writer:
            for low, high in _ranges(np.minimum(count, top)):
                selection = Selection(top, features.total)
                for part in parts:
                    selection.add(read_features(part, features, site, low, high))
                    step()
                writer.write_table(firings_table(selection.kept, features), row_group_size=INDEX_ROWS)
                files.release_memory()


def _ranges(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Splits 0..len(sizes) into ranges whose sizes add up to at most `_HELD` (or that hold one entry)."""
    ranges, low, held = [], 0, 0
    for i, size in enumerate(sizes.tolist()):
        if held and held + size > _HELD:
            ranges.append((low, i))
            low, held = i, 0
        held += size
    ranges.append((low, len(sizes)))
    return ranges


def read_features(path: Path, features: Features, site: Site, low: int, high: int) -> Columns:
    """Firings of the features low..high-1 of one site out of one shard, reading only the row groups that hold them."""
    here = {"layer": (site.layer, site.layer), "head": (site.head, site.head), "feature": (low, high - 1)}
    with files.parquet(path, files.FIRINGS) as file:
        groups = files.row_groups(file, **here)
        if not groups:
            return Columns.empty()
        table = file.read_row_groups(groups)
    c = {name: table[name].to_numpy() for name in table.column_names}
    key = features.key(c["layer"], c["head"], c["feature"])
    first = features.key(np.array([site.layer]), np.array([site.head]), 0)[0]
    a, b = np.searchsorted(key, (first + low, first + high))
    names = ("document", "row", "position", "activation")
    return Columns(key[a:b], *(c[name][a:b] for name in names))
