"""delphi's cache of activations, from a collection: what its explainers and scorers read.

    OUT/layers.5.head.3/config.json, 0_818.safetensors, ..., 3276_4095.safetensors

Each file holds the firings of a range of features: `locations [n, 3]` (passage, position, feature - first), unsigned,
`activations [n]` float32 as collected, and `tokens [P, T]`. Source of the layout: eai-delphi 0.1.3, `latents/cache.py`
and `latents/loader.py`, whose `LatentDataset(OUT, ..., tokenizer=...)` reads the folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..collect import Store
from ..files import whole_file, write_json
from ..untrusted import is_integer, shown
from .stored import Passages, SiteFirings, chosen_sites, firings, model_name, open_store, passages


def hookpoint(layer: int, head: int) -> str:
    """What delphi calls the module: the name of a site's folder."""
    return f"layers.{layer}.head.{head}"


def export(
    store: Store | str | Path,
    out: str | Path,
    sites: Iterable[tuple[int, int]] | None = None,
    splits: int = 5,
    pad: int = 0,
    progress: bool = False,
) -> dict:
    """Writes a finished collection of mode "all" as delphi's cache; a folder in `out` for each site.

    Args:
        store: the collection, or its folder.
        out: a folder, made if it is not there.
        sites: (layer, head)s; all by default.
        splits: files a site, each with all tokens: delphi reads one at a time.
        pad: token id behind the end of passages shorter than the collection's context, where nothing ever fires.
    Returns:
        {firings, passages, padded}: padded are tokens that are no text.
    Raises:
        ValueError: an unfinished collection or one of another mode, a site it does not have, splits or pad out of
            range, a damaged file by name.
    """
    store, out = open_store(store), Path(out)
    wanted = chosen_sites(store, sites)
    if not is_integer(splits, 1, 4096):
        raise ValueError(f"splits: expected a number of files, 1 to 4096, got {shown(splits)}")
    where = passages(store, pad, progress)
    total = 0
    for layer, head in wanted:
        found = firings(store, layer, head, where, progress)
        total += len(found.feature)
        _write_site(store, found, where, out / hookpoint(layer, head), splits, out)
    padded = where.tokens.size - int(where.lengths.sum())
    return {"firings": total, "passages": len(where.tokens), "padded": padded}


def _write_site(
    store: Store, found: SiteFirings, where: Passages, folder: Path, splits: int, root: Path
) -> None:  # fmt: skip
    edges = np.linspace(0, found.size, min(splits, found.size) + 1).astype(np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        at = slice(int(found.bounds[start]), int(found.bounds[end]))
        columns = (found.passage[at], found.position[at], found.feature[at] - start)
        most = max((int(column.max()) for column in columns if len(column)), default=0)
        kind = np.uint16 if most < 2**16 else np.uint32
        data = {
            "locations": np.stack([column.astype(kind) for column in columns], axis=1),
            "activations": found.activation[at], "tokens": where.tokens,
        }  # fmt: skip
        with whole_file(folder / f"{start}_{end - 1}.safetensors", root) as path:
            save_file(data, path)
    write_json(folder / "config.json", _configuration(store, where, len(edges) - 1), root)


def _configuration(store: Store, where: Passages, splits: int) -> dict:
    """delphi's CacheConfig, the length under both names that its releases read, and the model."""
    return {
        "dataset_repo": store.path.name, "dataset_split": "", "dataset_name": "", "dataset_column": "text",
        "batch_size": 1, "ctx_len": store.context, "cache_ctx_len": store.context, "n_tokens": int(where.tokens.size),
        "n_splits": splits, "model_name": model_name(store),
    }  # fmt: skip
