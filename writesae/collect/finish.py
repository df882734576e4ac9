"""The last step of a collection: all documents in one table, totals of every feature, and the index of each site.

It takes the collection in pieces: one process's shards, the units of several workers, or stores made apart. Of each
piece it reads what was kept, and of that a range of features at a time, so that memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import make_folder, whole_file
from . import files
from .marks import damaged, mark, marked, part_name
from .modes import ONE_CORPUS, Columns, Features, Selection, Totals
from .shard import Progress, firings_table
from .source import Site

INDEX_ROWS = 16_384  # a row group of the index: what reading one feature costs
_HELD = 500_000  # firings held while indexing, 14 MB, and some times that to sort them: every range opens all shards


def index_path(out: Path, layer: int, head: int) -> Path:
    return out / "index" / f"layer-{layer}-head-{head}.parquet"


def finish(progress: Progress, top: int, step: Callable[[], None]) -> None:
    """Writes documents.parquet, features.parquet and every site's index with its marker.

    Done again when interrupted, but for the sites whose index stands: whole, and made from these shards.
    """
    out = progress.out
    write_documents(out, [(out / "documents" / part_name(i), 0, 0) for i in range(progress.shards)])
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
            _write_index(path, parts, progress.features, site, progress.totals.count, Selecting(top), step, out)
        mark(out, path.stem, [path], progress.manifest, shards=progress.digest)


@dataclass(frozen=True)
class Selecting:
    """How an index is chosen, see `modes.Selection`; "all" indexes the largest."""

    n: int
    mode: str = "all"
    seed: int = 0
    corpora: tuple = ONE_CORPUS

    @classmethod
    def of(cls, content: dict) -> Selecting:
        """Of a manifest. Stores of older releases have no salt."""
        corpora = content.get("corpora", [(0, content.get("salt", 0))])
        return cls(content["n"], content["mode"], content["seed"], tuple((first, salt) for first, salt, *_ in corpora))

    def new(self, total: int) -> Selection:
        return Selection(self.n, total, "top" if self.mode == "all" else self.mode, self.seed, self.corpora)


@dataclass(frozen=True)
class Piece:
    """Part of a collection, whole in itself: a unit, or a store that is merged with others.

    Attributes:
        documents, features: its tables.
        index: the tables that hold what was kept of a site, each sorted by feature, in the order of their documents.
        passages: its passages.
        first_document: what its documents' numbers grow by.
    """

    documents: Path
    features: Path
    index: Callable[[Site], list[Path]]
    passages: int
    first_document: int = 0


@dataclass
class Assembled:
    """What `assemble` puts together, for `finish`'s marker and the summary.

    Attributes:
        out, features: the folder, and its sites' features. manifest: digest of the folder's manifest.
        digest: of all that the pieces are made of.
    """

    out: Path
    features: Features
    manifest: str
    digest: str


def assemble(state: Assembled, pieces: list[Piece], how: Selecting, step: Callable[[], None]) -> Totals:
    """`finish` from pieces, in the order of their documents: exactly what one process would have left.

    Raises:
        ValueError: a table of a piece is damaged.
    """
    out, features = state.out, state.features
    firsts = np.cumsum([0, *(piece.passages for piece in pieces)]).tolist()
    write_documents(out, [(p.documents, p.first_document, first) for p, first in zip(pieces, firsts, strict=False)])
    totals = Totals(features.total)
    for piece in pieces:
        table = files.read_table(piece.features, files.FEATURES)
        c = {name: table[name].to_numpy() for name in table.column_names}
        totals.add(features.known(c["layer"], c["head"], c["feature"]), c["count"], c["sum"], c["max"])
        step()
    write_features(out, features, totals)

    for site in features.sites:
        path = index_path(out, site.layer, site.head)
        if not index_stands(state, site):
            _write_index(path, pieces, features, site, totals.count, how, step, out)
            mark(out, path.stem, [path], state.manifest, shards=state.digest)
    return totals


def index_stands(progress: Progress | Assembled, site: Site) -> bool:
    """Whether a site's index is what a finished run of these shards left."""
    path = index_path(progress.out, site.layer, site.head)
    try:
        made = marked(progress.out, path.stem, progress.manifest)
    except ValueError:
        return False
    whole = made.get("shards") == progress.digest and set(made["files"]) == {f"index/{path.name}"}
    return whole and not damaged(progress.out, made)


def write_documents(out: Path, parts: Iterable[tuple[Path, int, int]], root: Path | None = None) -> None:
    """Writes documents.parquet, tables of documents end to end, holding one row group of it at a time.

    Args:
        out: the folder. root: the one the user named, default `out`.
        parts: (table, what its documents' numbers grow by, what the numbers of their passages grow by).
    """
    with whole_file(out / "documents.parquet", root) as temporary:
        with pq.ParquetWriter(temporary, files.DOCUMENTS, **files.parquet_options(files.DOCUMENTS)) as writer:
            held = files.DOCUMENTS.empty_table()
            for part, document, passage in parts:
                table = files.shifted(files.read_table(part, files.DOCUMENTS), document=document, first_passage=passage)
                held = pa.concat_tables([held, table])
                if len(held) >= files.ROW_GROUP:
                    writer.write_table(held, files.DOCUMENT_ROWS)
                    held = files.DOCUMENTS.empty_table()
            writer.write_table(held.combine_chunks(), files.DOCUMENT_ROWS)


def write_features(
    out: Path, features: Features, totals: Totals, root: Path | None = None, silent: bool = True
) -> None:
    """Writes features.parquet: one row for every feature of every site, silent ones (unless left out) with count 0."""
    key = np.arange(features.total) if silent else np.flatnonzero(totals.count)
    layer, head, feature = features.split(key)
    columns = [layer, head, feature, totals.count[key], totals.sum[key], totals.max[key]]
    files.write_table(out / "features.parquet", pa.table(columns, schema=files.FEATURES), root=root)


def write_selection(progress: Progress, site: Site) -> None:
    """The index of a site in the modes top and reservoir: what was kept, and nothing else."""
    features, kept = progress.features, progress.selection.kept
    s = features.sites.index(site)
    low, high = np.searchsorted(kept.key, features.first[s : s + 2])
    table = firings_table(kept.take(slice(low, high)).by_activation(), features)
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
        path = index_path(out, site.layer, site.head)
        _write_index(path, parts, features, site, counts, Selecting(top), step, out)


def _write_index(path, parts, features: Features, site: Site, counts, how: Selecting, step, root: Path) -> None:
    """Args: parts: shards, or pieces."""
    s = features.sites.index(site)
    count = counts[features.first[s] : features.first[s + 1]]
    kept = [
        (table, part.first_document if isinstance(part, Piece) else 0)
        for part in parts
        for table in (part.index(site) if isinstance(part, Piece) else [part])
    ]
    with whole_file(path, root) as temporary:
        writer = pq.ParquetWriter(temporary, files.FIRINGS, **files.parquet_options(files.FIRINGS))
        with writer:
            for low, high in _ranges(np.minimum(count, how.n)):
                selection = how.new(features.total)
                for table, first_document in kept:
                    found = read_features(table, features, site, low, high)
                    found.document = found.document + np.int32(first_document)
                    # Of two with one random number the first in the text is to be met first.
                    selection.add(found.by_place() if how.mode == "reservoir" else found)
                    step()
                writer.write_table(firings_table(selection.kept.by_activation(), features), row_group_size=INDEX_ROWS)
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
