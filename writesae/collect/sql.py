"""`Store.sql`: DuckDB over a store's tables, which it sees and nothing else. Needs the extra `sql`.

pyarrow reads the files, of which DuckDB asks for the columns and row groups it needs: releases of DuckDB before 2.0 do
not know the encoding of their integers, and this way the connection needs no access to any file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from ..untrusted import first_line, shown
from .files import FIRINGS, TOKENS

_SCHEMAS = {"firings": FIRINGS, "tokens": TOKENS}


def run(
    views: Mapping[str, Callable[[], pa.Table | list[Path]] | None],
    query: str,
    parameters: Sequence | Mapping | None = None,
) -> pa.Table:
    """Answers one SELECT.

    Args:
        views: {name: what makes its table or names its files, their digests compared}; only those that the query names
            are made. None: not there before the collection is finished.
        query, parameters: as of `Store.sql`.
    Raises:
        ImportError: no duckdb. ValueError: no single SELECT, or what DuckDB says of it.
    """
    try:
        import duckdb
    except ImportError as error:
        raise ImportError("duckdb is needed for Store.sql: pip install 'writesae[sql]'") from error
    from pyarrow import dataset

    if not isinstance(query, str):
        raise ValueError(f"query: expected text, got {shown(query)}")
    there = [name for name, make in views.items() if make is not None]
    words = set(re.findall(r"\w+", query.lower()))
    with duckdb.connect(":memory:") as connection:
        for setting in (
            "enable_external_access = false", "python_enable_replacements = false", "lock_configuration = true",
        ):  # fmt: skip
            connection.execute(f"SET {setting}")
        try:
            statements = connection.extract_statements(query)
        except duckdb.Error as error:
            raise ValueError(f"query: {first_line(error)}") from error
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            kinds = ", ".join(x.type.name for x in statements) or "nothing"
            raise ValueError(f"query: expected one SELECT, got {kinds}: a store is read-only")
        for name, make in views.items():
            if make is None or name not in words:
                continue
            made = make()
            if isinstance(made, list):
                paths = [str(path) for path in made]
                made = dataset.dataset(paths, _SCHEMAS[name]) if paths else _SCHEMAS[name].empty_table()
            connection.register(name, made)
        try:
            return connection.sql(query, params=parameters).to_arrow_table()
        except duckdb.Error as error:
            text = str(error).strip().split("\n\n")[0].replace("\n", " ")[:400]
            later = ", ".join(name for name in views if name not in there)
            later = f"; {later} once the collection is finished" if later else ""
            raise ValueError(f"query: {text} (views: {', '.join(there)}{later})") from error
