"""The table of features as a page's script reads it: a little-endian array a column, and what they mean as JSON.

    data/table.json   {"n", "sites": [[layer, head]], "partitions": [name], "unknown", "columns": {name: {type, width}}}
    data/tokens.json  [token]; promoted and answers hold numbers in this list, not those of the tokenizer
    data/NAME.bin     n * width numbers: uint8, uint16, uint32, float32 or float64

Columns of which nothing is known (all NaN, no token) are left out; the page has no column for them then. `linked`
is there where not every feature has a page.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np

from . import show

UNKNOWN = 0xFFFFFFFF  # a token number in `FeatureTable`
NUMBERS = ("density", "mean", "max", "win_rate", "cosine")
TOKENS = {"promoted": "promoted", "answers": "key_tokens"}  # name here -> in the table


class Columns:
    """The columns of an atlas.

    Attributes:
        n: rows. sites: (layer, head) of each site number. sent: {name: array [n] or [n, width]}.
        linked: bool [n], whether a row has a page of its own; None where all have.
    """

    def __init__(self, atlas: Any, linked: np.ndarray | None = None):
        self.table = atlas.table
        self.sites = [(int(layer), int(head)) for layer, head in atlas.info["sites"]]
        self.n = len(self.table.site)
        self.linked: np.ndarray | None = None
        if linked is not None:
            self.linked = np.zeros(self.n, bool)
            self.linked[linked] = True

    def is_linked(self, row: int) -> bool:
        """Whether a row has a page of its own."""
        return self.linked is None or bool(self.linked[row])

    @cached_property
    def _used(self) -> np.ndarray:
        """Sorted numbers of the tokens that the table names."""
        found = [np.unique(np.asarray(getattr(self.table, name))) for name in TOKENS.values()]
        used = np.unique(np.concatenate(found))
        return used[used < len(self.table.tokens)]

    @cached_property
    def sent(self) -> dict[str, np.ndarray]:
        count = np.asarray(self.table.count)
        small = not len(count) or int(count.max()) < 2**32
        out = {
            "site": np.asarray(self.table.site).astype("<u2"),
            "feature": np.asarray(self.table.feature).astype("<u4"),
            "count": count.astype("<u4" if small else "<f8"),
        }
        for name in NUMBERS:
            column = np.asarray(getattr(self.table, name), dtype="<f4")
            if not np.isnan(column).all():
                out[name] = column
        if len(self.table.partitions):
            out["partition"] = np.asarray(self.table.partition).astype("u1")
        for name, there in TOKENS.items():
            ids = np.asarray(getattr(self.table, there))
            place = np.searchsorted(self._used, ids)
            known = place < len(self._used)
            known &= self._used[np.minimum(place, len(self._used) - 1)] == ids if len(self._used) else False
            if known.any():
                out[name] = np.where(known, place, self.unknown).astype(self._token_type)
        if self.linked is not None:
            out["linked"] = self.linked.astype("u1")
        return out

    @property
    def _token_type(self) -> str:
        return "<u2" if len(self._used) < 0xFFFF else "<u4"

    @property
    def unknown(self) -> int:
        return 0xFFFF if self._token_type == "<u2" else UNKNOWN

    def table_json(self) -> bytes:
        columns = {
            name: {"type": x.dtype.name, "width": 1 if x.ndim == 1 else x.shape[1]} for name, x in self.sent.items()
        }
        about = {
            "n": self.n, "sites": self.sites, "partitions": [show.plain(str(x)) for x in self.table.partitions],
            "unknown": self.unknown, "columns": columns,
        }  # fmt: skip
        return json.dumps(about).encode()

    @cached_property
    def tokens_json(self) -> bytes:
        return json.dumps([self.table.tokens[i] for i in self._used.tolist()]).encode()

    def files(self) -> list[str]:
        """Names of all that a page's script reads."""
        return ["table.json", "tokens.json", *(f"{name}.bin" for name in self.sent)]

    def file(self, name: str) -> bytes:
        """The contents of one of `files`.

        Raises:
            KeyError: no such file.
        """
        if name == "table.json":
            return self.table_json()
        if name == "tokens.json":
            return self.tokens_json
        stem, _, ending = name.rpartition(".")
        if ending != "bin":
            raise KeyError(name)
        return np.ascontiguousarray(self.sent[stem]).tobytes()

    # ---- rows --------------------------------------------------------------------------------------------------------

    @cached_property
    def _keys(self) -> np.ndarray:
        return np.asarray(self.table.site).astype(np.uint64) << np.uint64(32) | np.asarray(self.table.feature).astype(
            np.uint64
        )

    @cached_property
    def _site_numbers(self) -> dict[tuple[int, int], int]:
        return {site: i for i, site in enumerate(self.sites)}

    def find(self, layer: int, head: int, feature: int) -> int | None:
        """Row of a feature, or None."""
        site = self._site_numbers.get((layer, head))
        if site is None or not 0 <= feature < 2**32:
            return None
        key = np.uint64((site << 32) | feature)
        row = int(np.searchsorted(self._keys, key))
        return row if row < self.n and self._keys[row] == key else None

    def of_site(self, layer: int, head: int) -> tuple[int, int]:
        """First row of a site and one past its last; (0, 0) of a site that is not there."""
        site = self._site_numbers.get((layer, head))
        if site is None:
            return 0, 0
        bounds = np.array([site << 32, (site + 1) << 32], np.uint64)
        first, last = np.searchsorted(self._keys, bounds)
        return int(first), int(last)

    @cached_property
    def order(self) -> np.ndarray:
        """Rows, most firings first: the order that a list begins with."""
        return np.argsort(-np.asarray(self.table.count, np.int64), kind="stable")

    def tokens(self, row: int, column: str) -> list[str]:
        """Tokens of a row, as `show.token` writes them, of the column "promoted", "suppressed" or "key_tokens"."""
        names = self.table.tokens
        ids = np.asarray(getattr(self.table, column)[row]).tolist()
        return [show.token(names[i]) for i in ids if i < len(names)]

    def row(self, row: int) -> dict:
        """What a list shows of a row, as text; columns that are not sent are left out."""
        layer, head = self.sites[int(self.table.site[row])]
        feature = int(self.table.feature[row])
        out: dict[str, Any] = {
            "layer": layer, "head": head, "feature": feature, "name": f"L{layer}H{head}/{feature}",
            "linked": self.is_linked(row), "count": show.count(self.table.count[row]),
        }  # fmt: skip
        for name in NUMBERS:
            if name in self.sent:
                value = float(getattr(self.table, name)[row])
                out[name] = (show.percent if name in ("density", "win_rate") else show.number)(value)
        if "partition" in self.sent:
            code = int(self.table.partition[row])
            names = self.table.partitions
            out["partition"] = show.plain(str(names[code])) if code < len(names) else "–"
        for name, there in TOKENS.items():
            if name in self.sent:
                out[name] = self.tokens(row, there)
        return out
