"""A run's folder: a plan, and finished parts, each a Parquet file and a marker with its digest; so a run can go on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import (
    discard_left_over,
    entry,
    make_folder,
    problem,
    read_json,
    read_sealed,
    refuse_file,
    refuse_links,
    sha256,
    whole_file,
    write_json,
    write_sealed,
)  # fmt: skip

PLAN = "plan.json"


def to_arrow(table: dict[str, np.ndarray]) -> pa.Table:
    """Columns `[n]` (numbers, strings, lists of strings) and `[n, L]` (fixed-size lists) as an Arrow table."""
    columns = {}
    for name, column in table.items():
        if column.ndim == 2:
            flat = pa.array(np.ascontiguousarray(column).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
        else:
            columns[name] = pa.array(column.tolist() if column.dtype == object else column)
    return pa.table(columns)


def from_arrow(table: pa.Table) -> dict[str, np.ndarray]:
    """The other way."""
    out = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_fixed_size_list(column.type):
            flat = column.combine_chunks().flatten() if column.num_chunks != 1 else column.chunk(0).flatten()
            out[name] = flat.to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        elif pa.types.is_string(column.type) or pa.types.is_list(column.type):
            values = column.to_pylist()
            out[name] = np.empty(len(values), object)
            out[name][:] = values
        else:
            out[name] = column.to_numpy()
    return out


def concatenate(tables: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of several tables with the same columns, in order."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def write_table(path: Path, table: dict[str, np.ndarray], root: Path | None = None) -> None:
    """Writes columns as `to_arrow` takes them to a Parquet file, whole or not at all, through no link below `root`."""
    rows = to_arrow(table)
    with whole_file(path, root) as temporary:
        pq.write_table(rows, temporary, compression="zstd")


class Parts:
    """Finished parts of one plan in a folder, or nothing at all when `folder` is None."""

    def __init__(self, folder: Path | None, plan: dict):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        refuse_file(self.folder)
        refuse_links(self.folder)
        known = self.folder / PLAN
        plan = json.loads(json.dumps(plan))
        if known.exists():
            before = read_json(known)
            if not isinstance(before, dict):
                raise ValueError(f"out: {known} is not the plan of a run; choose another folder")
            changed = sorted(k for k in {*before, *plan} if before.get(k) != plan.get(k))
            if changed:
                first = changed[0]
                raise ValueError(
                    f"out: {self.folder} holds a run with other settings ({', '.join(changed)}; {first} was "
                    f"{before.get(first)!r}, now {plan.get(first)!r}); choose another folder"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"out: expected a new or empty folder, or one of an earlier run, got {self.folder}")
        make_folder(self.folder, "parts")
        discard_left_over(self.folder)
        discard_left_over(self.folder / "parts")
        write_json(known, plan)
        self._plan = sha256(known)

    @property
    def kept(self) -> bool:
        """Whether parts are kept in a folder at all."""
        return self.folder is not None

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "parts" / f"{name}.parquet"

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """A finished part, or None where there is none, or one that is no longer what was written."""
        if self.folder is None:
            return None
        path = self._path(name)
        try:
            marker = read_sealed(path.with_suffix(".json"))
            if marker.get("plan") != self._plan or problem(path, marker["file"]) is not None:
                return None
            return from_arrow(pq.read_table(path))
        except (ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, table: dict[str, np.ndarray]) -> None:
        """Puts a part in place, then the marker that holds its digest."""
        if self.folder is not None:
            path = self._path(name)
            write_table(path, table, self.folder)
            write_sealed(path.with_suffix(".json"), {"plan": self._plan, "file": entry(path)}, self.folder)
