"""The browser as files: the list, its data, and a page a feature, to be opened from any host of files.

    index.html  about.html  404.html  assets/  data/  L5H3/1258.html …  browse.json

`browse.json` says of what store and by which version the files are; the same command goes on where it was, and a folder
of another store, or of anything else, is refused. Every file appears whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..files import make_folder, read_sealed, refuse_link, write_bytes, write_sealed, write_text
from ..interrupt import INTERRUPTED, finishing
from ..progress import tqdm
from .app import assets
from .links import link
from .pages import HERE, Pages

MARK = "browse.json"
_TRIED = 5  # pages made to say how large all will be


def chosen(table: Any, most: int | None) -> np.ndarray:
    """Rows of the features that get a page: all that fired, or of each site the `most` that fired most."""
    fired = np.flatnonzero(np.asarray(table.count) > 0)
    if most is None:
        return fired
    order = np.lexsort((-np.asarray(table.count, np.int64)[fired], np.asarray(table.site)[fired]))
    sites = np.asarray(table.site)[fired][order]
    first = np.searchsorted(sites, sites)  # place of each row's site, hence its rank there
    return np.sort(fired[order][np.arange(len(order)) - first < most])


def identity(pages: Pages, most: int | None) -> dict[str, Any]:
    """What the files are made of; others of another identity are not mixed with them."""
    made = hashlib.sha256()
    for path in sorted((HERE / "templates").iterdir()):
        made.update(path.read_bytes())
    for body, _ in assets().values():
        made.update(body)
    for name in pages.columns.files():
        made.update(pages.columns.file(name))
    made.update(json.dumps(pages.atlas.info, sort_keys=True, default=str).encode())
    return {"writesae": __version__, "features": most, "made_of": made.hexdigest()}


def write(atlas: Any, folder: str | Path, most: int | None = None) -> int:
    """Writes the files. Returns 0, or 130 if a stop was asked for: the same call goes on.

    Args:
        atlas: an `Atlas`.
        folder: new, empty, or an export of the same that was stopped.
        most: pages of so many features a site, those that fire most; None for all that fired.

    Raises:
        ValueError: the folder holds something else.
    """
    rows = chosen(atlas.table, most)
    pages = Pages(atlas, static=True, linked=rows)
    out, mine = Path(folder), identity(pages, most)
    _claim(out, mine)
    left = [int(i) for i in rows if not (out / _place(pages, int(i))).exists()]
    for name, body in _shared(pages):
        make_folder(out, *Path(name).parts[:-1], argument="static")
        write_bytes(out / name, body)
    for layer, head in pages.columns.sites:
        make_folder(out, f"L{layer}H{head}", argument="static")
    tried = [len(_page(pages, i)) for i in left[:: max(1, len(left) // _TRIED)][:_TRIED]]
    size = sum(len(body) for _, body in _shared(pages)) + len(rows) * (sum(tried) / len(tried) if tried else 0)
    print(f"{len(rows):,} pages of features, about {size / 1e6:,.0f} MB in all; {len(rows) - len(left):,} are there")
    with finishing("page") as stop, tqdm(left, unit="page", disable=None, file=sys.stderr) as bar:
        for i in bar:
            write_text(out / _place(pages, i), _page(pages, i))
            if stop:
                return INTERRUPTED
    print(out / "index.html")
    return 0


def _claim(out: Path, mine: dict[str, Any]) -> None:
    """Marks a new folder as ours, or knows one that is."""
    refuse_link(out, "static")
    make_folder(out, argument="static")
    mark = out / MARK
    if not mark.exists():
        if any(out.iterdir()):
            first = sorted(os.listdir(out))[0]
            raise ValueError(
                f"static: expected a new or empty folder, or an export to go on with, got {out}, which holds {first!r}"
            )
        write_sealed(mark, mine)
        return
    there = read_sealed(mark)
    other = [name for name in mine if there.get(name) != mine[name]]
    if other:
        raise ValueError(f"static: {out} holds pages of another store, version or choice of features (other: "
                         f"{', '.join(other)}); name another folder or remove it")  # fmt: skip


def _shared(pages: Pages) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of all but the features' pages."""
    yield "index.html", pages.index.encode()
    yield "about.html", pages.about().encode()
    yield "404.html", pages.error("There is no such page", "A feature’s page is L5H3/1258.html or so.").encode()
    for name, (body, _) in assets().items():
        yield f"assets/{name}", body
    for name in pages.columns.files():
        yield f"data/{name}", pages.columns.file(name)


def _where(pages: Pages, row: int) -> tuple[int, int, int]:
    layer, head = pages.columns.sites[int(pages.atlas.table.site[row])]
    return layer, head, int(pages.atlas.table.feature[row])


def _place(pages: Pages, row: int) -> str:
    return link(*_where(pages, row), static=True)


def _page(pages: Pages, row: int) -> str:
    return pages.feature(*_where(pages, row))
