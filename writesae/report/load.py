"""A finished run's folder as plain data. Needs pyarrow and numpy only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def load_run(folder: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(summary, columns of the firings) of a folder with `summary.json` and `firings.parquet`.

    Raises:
        ValueError: not the folder of a finished replacement run.
    """
    folder = Path(folder)
    for name in ("summary.json", "firings.parquet"):
        if not (folder / name).is_file():
            note = " (the run has parts but is not finished: run it again)" if (folder / "parts").is_dir() else ""
            raise ValueError(f"run: expected a finished replacement run's folder, got {folder} without {name}{note}")
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except ValueError as error:
        raise ValueError(f"run: {folder / 'summary.json'} is not JSON: {error}") from error
    table = pq.read_table(folder / "firings.parquet")
    if "tests" not in summary or "activation" not in table.column_names:
        raise ValueError(f"run: expected the folder of a replacement run, got {folder} of another kind")
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_fixed_size_list(column.type):
            columns[name] = np.array(column.to_pylist(), np.float64).reshape(len(table), column.type.list_size)
        elif pa.types.is_string(column.type) or pa.types.is_list(column.type):
            values = column.to_pylist()
            columns[name] = np.empty(len(values), object)
            columns[name][:] = values
        else:
            columns[name] = column.to_numpy()
    return summary, columns
