"""A finished run's folder as plain data, checked. Needs pyarrow and numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..untrusted import first_line, read_json, regular_size
from .schema import check_run

_SUMMARY_LIMIT = 64 * 2**20
_TABLE_LIMIT = 2**32  # bytes once unpacked


def is_test(folder: str | Path, name: str) -> bool:
    """Whether a folder holds the summary of a run of that test."""
    path = Path(folder) / "summary.json"
    try:
        return path.is_file() and read_json(path, _SUMMARY_LIMIT).get("test") == name
    except ValueError:
        return False  # whoever reads it for what it should be says what is wrong


def summary_of(source: str | Path | Mapping, check: Callable[[Mapping], None]) -> Mapping:
    """A checked summary: one given, or that of a folder.

    Raises:
        ValueError: what `check` raises, naming the folder.
    """
    if isinstance(source, Mapping):
        check(source)
        return source
    try:
        summary = read_json(Path(source) / "summary.json", _SUMMARY_LIMIT)
        check(summary)
    except ValueError as error:
        raise ValueError(f"run: {source}: {str(error).removeprefix('run: ')}") from error
    return summary


def load_run(folder: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(summary, columns of the firings) of a folder with `summary.json` and `firings.parquet`.

    Raises:
        ValueError: not the folder of a finished replacement run, or one with values of other types than a run's.
    """
    folder = Path(folder)
    for name in ("summary.json", "firings.parquet"):
        if not (folder / name).is_file():
            note = " (the run has parts but is not finished: run it again)" if (folder / "parts").is_dir() else ""
            raise ValueError(f"run: expected a finished replacement run's folder, got {folder} without {name}{note}")
    try:
        summary = read_json(folder / "summary.json", _SUMMARY_LIMIT)
    except ValueError as error:
        raise ValueError(f"run: {error}") from error
    columns = _columns(folder / "firings.parquet")
    if "tests" not in summary or "activation" not in columns:
        raise ValueError(f"run: expected the folder of a replacement run, got {folder} of another kind")
    try:
        check_run(summary, columns)
    except ValueError as error:
        raise ValueError(f"run: {folder}: {str(error).removeprefix('run: ')}") from error
    return summary, columns


def _columns(path: Path) -> dict[str, np.ndarray]:
    regular_size(path)
    try:
        with pq.ParquetFile(path) as file:
            meta = file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            if size > _TABLE_LIMIT or meta.num_rows * max(meta.num_columns, 1) * 8 > _TABLE_LIMIT:
                raise ValueError(f"{meta.num_rows:,} rows of {size:,} bytes in all, more than a report can hold")
            table = file.read()
            return {name: _column(table.column(name)) for name in table.column_names}
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise ValueError(f"run: {path}: not the table of a run: {first_line(error)}") from error


def _column(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        return np.array(column.to_pylist(), np.float64).reshape(len(column), column.type.list_size)
    if pa.types.is_primitive(column.type) and not column.null_count:
        return column.to_numpy()
    values = column.to_pylist()
    out = np.empty(len(values), object)
    out[:] = values
    return out
