"""A run's folder: a plan, and finished parts, each a Parquet file renamed into place whole, so that a run can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary path)`, then renames it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Parts:
    """Finished parts of one plan in a folder, or nothing at all when `folder` is None."""

    def __init__(self, folder: Path | None, plan: dict):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.folder}")
        known = self.folder / PLAN
        plan = json.loads(json.dumps(plan))
        if known.is_file():
            before = json.loads(known.read_text())
            changed = sorted(k for k in {*before, *plan} if before.get(k) != plan.get(k))
            if changed:
                first = changed[0]
                raise ValueError(
                    f"out: {self.folder} holds a run with other settings ({', '.join(changed)}; {first} was "
                    f"{before.get(first)!r}, now {plan.get(first)!r}); choose another folder"
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"out: expected a new or empty folder, or one of an earlier run, got {self.folder}")
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        for left_over in (self.folder / "parts").glob(".*"):
            left_over.unlink()
        write_atomically(known, lambda path: path.write_text(json.dumps(plan, indent=2) + "\n"))

    def _path(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.parquet"

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """A finished part, or None."""
        if self.folder is None or not self._path(name).is_file():
            return None
        return from_arrow(pq.read_table(self._path(name)))

    def write(self, name: str, table: dict[str, np.ndarray]) -> None:
        """Puts a part in place."""
        if self.folder is not None:
            rows = to_arrow(table)
            write_atomically(self._path(name), lambda path: pq.write_table(rows, path, compression="zstd"))
