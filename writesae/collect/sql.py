"""`Store.sql`: DuckDB over a store's Parquet files, which it may read and nothing else. Needs the extra `sql`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from ..untrusted import first_line, shown
from .files import DOCUMENTS, FEATURES, FIRINGS, TOKENS

SCHEMAS = {"firings": FIRINGS, "tokens": TOKENS, "documents": DOCUMENTS, "features": FEATURES}


def run(
    files: Mapping[str, Sequence[str] | None],
    checked,
    query: str,
    parameters: Sequence | Mapping | None = None,
) -> pa.Table:
    """Answers one SELECT.

    Args:
        files: {view: names of its files}; None: not there before the collection is finished.
        checked: name to path of a file, once its digest was compared.
        query, parameters: as of `Store.sql`.
    Raises:
        ImportError: no duckdb. ValueError: no single SELECT, or what DuckDB says of it.
    """
    try:
        import duckdb
    except ImportError as error:
        raise ImportError("duckdb is needed for Store.sql: pip install 'writesae[sql]'") from error
    if not isinstance(query, str):
        raise ValueError(f"query: expected text, got {shown(query)}")
    with duckdb.connect(":memory:") as connection:
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                kinds = ", ".join(x.type.name for x in statements) or "nothing"
                raise ValueError(f"query: expected one SELECT, got {kinds}: a store is read-only")
        except duckdb.Error as error:
            raise ValueError(f"query: {first_line(error)}") from error
        # Of views that the text does not even name nothing is compared with its digest.
        named = set(re.findall(r"\w+", query.lower()))
        paths = {view: [checked(name) for name in names or ()] for view, names in files.items() if view in named}
        _only(connection, [path for found in paths.values() for path in found])
        for view, found in paths.items():
            if files[view] is None:
                continue
            if found:
                connection.execute(f"CREATE VIEW {view} AS SELECT * FROM read_parquet([{_listed(found)}])")
            else:
                connection.register(view, SCHEMAS[view].empty_table())
        connection.execute("SET lock_configuration = true")
        try:
            return connection.sql(query, params=parameters).to_arrow_table()
        except duckdb.Error as error:
            text = str(error).strip().split("\n\n")[0].replace("\n", " ")[:400]
            missing = [view for view, names in files.items() if names is None]
            later = f"; {', '.join(missing)} once the collection is finished" if missing else ""
            raise ValueError(
                f"query: {text} (views: {', '.join(x for x in files if x not in missing)}{later})"
            ) from error


def _only(connection, paths: list[Path]) -> None:
    """From here on the connection reads these files, and no other file, address or variable of Python."""
    connection.execute("SET python_enable_replacements = false")
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET autoload_known_extensions = false")
    connection.execute(f"SET allowed_paths = [{_listed(paths)}]")
    connection.execute("SET enable_external_access = false")


def _listed(paths: list[Path]) -> str:
    """SQL literals."""
    return ", ".join("'" + str(path.absolute()).replace("'", "''") + "'" for path in paths)
