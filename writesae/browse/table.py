"""`FeatureTable`: every feature of a store in one row, as numpy columns, kept as Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..collect.files import numbers
from ..files import whole_file
from ..untrusted import first_line

UNKNOWN = 0xFFFFFFFF  # in place of a token
SHOWN = 5  # tokens a row
ROWS = 8192  # of a row group: what reading one feature costs
REGISTER = 0.05  # cosine above which the paper's simple rule calls a feature a register
BY_COSINE = ("dead", "untested", "bundle", "register")
BY_DENSITY = ("dead", "rare", "common", "dense")
RARE, DENSE = 1e-4, 1e-1  # share of tokens
_PLAIN: dict[str, Any] = {
    "site": np.uint16, "feature": np.uint32, "count": np.int64, "density": np.float32, "mean": np.float32,
    "max": np.float32, "win_rate": np.float32, "cosine": np.float32, "partition": np.uint8,
}  # fmt: skip
_TOKENS = ("promoted", "suppressed", "key_tokens")
_SCHEMA = pa.schema(
    [(name, pa.from_numpy_dtype(kind)) for name, kind in _PLAIN.items()]
    + [(f"{name}_{i}", pa.uint32()) for name in _TOKENS for i in range(SHOWN)]
)


@dataclass(frozen=True)
class FeatureTable:
    """n features, sorted by (site, feature); silent ones too.

    Attributes:
        site `[n]` uint16 (index into `sites`), feature `[n]` uint32.
        count `[n]` int64 firings, density `[n]` float32 (share of the tokens), mean, max `[n]` float32 activation.
        win_rate `[n]` float32: share of tested firings where the atom disturbs less than deletion; NaN: not tested.
        cosine `[n]` float32: of atom and native write, mean over its firings in a test, else in some of the store's
            passages; NaN: not known.
        partition `[n]` uint8: index into `partitions`, which are the paper's, by cosine, where any is known, else by
            density.
        promoted, suppressed `[n, 5]` uint32: tokens whose logits the value side raises and lowers most.
        key_tokens `[n, 5]` uint32: tokens it fires on most often. `UNKNOWN` where there is none.
        sites: (layer, head). partitions: names. tokens: text of every token id, in order.
    """

    site: np.ndarray
    feature: np.ndarray
    count: np.ndarray
    density: np.ndarray
    mean: np.ndarray
    max: np.ndarray
    win_rate: np.ndarray
    cosine: np.ndarray
    partition: np.ndarray
    promoted: np.ndarray
    suppressed: np.ndarray
    key_tokens: np.ndarray
    sites: Sequence[tuple[int, int]]
    partitions: Sequence[str]
    tokens: Sequence[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.feature)

    def row(self, at: int) -> dict:
        """One feature as plain data; NaN and `UNKNOWN` are None, tokens have their text beside."""
        return row_of({name: getattr(self, name)[at : at + 1] for name in (*_PLAIN, *_TOKENS)}, self)

    def save(self, path: Path, about: Mapping, root: Path) -> None:
        """Writes it, whole or not at all, without the tokens' texts."""
        columns = [getattr(self, name) for name in _PLAIN]
        columns += [np.ascontiguousarray(getattr(self, name)[:, i]) for name in _TOKENS for i in range(SHOWN)]
        kept = {**about, "sites": [list(site) for site in self.sites], "partitions": list(self.partitions)}
        schema = _SCHEMA.with_metadata({"writesae": json.dumps(kept)})
        with whole_file(path, root, "cache") as temporary:
            pq.write_table(
                pa.table([pa.array(x) for x in columns], schema=schema), temporary, row_group_size=ROWS,
                compression="lz4", use_dictionary=False, write_statistics=False,
            )  # fmt: skip


def read(path: Path, sites, partitions, tokens: Sequence[str]) -> FeatureTable:
    """What `save` wrote.

    Raises:
        ValueError: another file; names it.
    """
    columns = _columns(path, None)
    return FeatureTable(**columns, sites=sites, partitions=partitions, tokens=tokens)


def read_row(path: Path, at: int) -> dict[str, np.ndarray]:
    """Columns of one row."""
    return {name: x[at % ROWS : at % ROWS + 1] for name, x in _columns(path, at // ROWS).items()}


def about(path: Path) -> dict | None:
    """What a table was made of; None where there is none that can be read."""
    try:
        with pq.ParquetFile(path) as file:
            kept = json.loads((file.schema_arrow.metadata or {})[b"writesae"])
            if file.schema_arrow.remove_metadata().equals(_SCHEMA) and isinstance(kept, dict):
                return {**kept, "rows": file.metadata.num_rows}
    except (pa.ArrowException, OSError, ValueError, KeyError):
        pass
    return None


def _columns(path: Path, group: int | None) -> dict[str, np.ndarray]:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read() if group is None else file.read_row_group(group, use_threads=False)
            c = {name: numbers(table[name]) for name in _SCHEMA.names}
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"cache: {path} cannot be read: {first_line(error)}; remove it") from error
    found = {name: c[name] for name in _PLAIN}
    return found | {name: np.stack([c[f"{name}_{i}"] for i in range(SHOWN)], 1) for name in _TOKENS}


def row_of(columns: Mapping[str, np.ndarray], of) -> dict:
    """See `FeatureTable.row`. of: has sites, partitions and, by id, tokens or a function `token`."""
    site = of.sites[int(columns["site"][0])]
    out: dict[str, Any] = {"layer": site[0], "head": site[1]}
    for name in ("feature", "count"):
        out[name] = int(columns[name][0])
    for name in ("density", "mean", "max", "win_rate", "cosine"):
        value = float(columns[name][0])
        out[name] = value if np.isfinite(value) else None
    out["partition"] = of.partitions[int(columns["partition"][0])]
    text = of.token if hasattr(of, "token") else lambda i: of.tokens[i] if i < len(of.tokens) else f"<{i}>"
    for name in _TOKENS:
        out[name] = [{"id": int(i), "token": text(int(i))} for i in columns[name][0] if i != UNKNOWN]
    return out


def partitioned(count: np.ndarray, density: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(`[n]` uint8, names): dead features, and registers and bundles where any cosine is known, else by density."""
    known = np.isfinite(cosine)
    if known.any():
        code = np.where(known, 2 + (np.nan_to_num(cosine) > REGISTER), 1)
        names = BY_COSINE
    else:
        code = 1 + (density >= RARE).astype(int) + (density >= DENSE)
        names = BY_DENSITY
    return np.where(count > 0, code, 0).astype(np.uint8), names
