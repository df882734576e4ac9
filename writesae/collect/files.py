"""The Parquet layout of every table, reading and writing them, and the folder's lock.

Encodings are chosen by measurement (the default model's dictionary, F = 4,096, k = 8, on real text): a shard sorted by
(layer, head, feature, document, row, position) with byte-stream-split columns takes 4.6 bytes a firing with the
activation kept exactly; 3.1 of them are the float32 activation, whose low mantissa bytes nothing compresses, 1.15 the
position, and 0.35 the passage.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import whole_file
from ..untrusted import first_line

FIRINGS = pa.schema(
    [
        ("document", pa.int32()),
        ("row", pa.int32()),
        ("position", pa.int32()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("feature", pa.int32()),
        ("activation", pa.float32()),
    ]
)
TOKENS = pa.schema([(name, pa.int32()) for name in ("document", "row", "position", "token")])
DOCUMENTS = pa.schema(
    [
        ("document", pa.int32()),
        ("source", pa.string()),
        ("sha256", pa.string()),  # of the text's bytes; null where collection stopped inside the document
        ("tokens", pa.int64()),
        ("passages", pa.int32()),
        ("first_passage", pa.int64()),  # number of its row 0 among all passages
    ]
)
FEATURES = pa.schema(
    [
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("feature", pa.int32()),
        ("count", pa.int64()),
        ("sum", pa.float64()),
        ("max", pa.float32()),
    ]
)
_SPLIT, _DELTA = "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED"
# Nearly constant columns go through run lengths (a dictionary), which is what columns not named here get. Varying ones
# go through byte planes, which zstd packs; counting ones through differences; token ids as they are, so that zstd sees
# repeated text as repeated bytes.
ENCODING = {
    tuple(FIRINGS.names): dict.fromkeys(("document", "row", "position", "activation"), _SPLIT),
    tuple(TOKENS.names): {"position": _DELTA, "token": "PLAIN"},
    tuple(FEATURES.names): {"feature": _DELTA, "count": _SPLIT, "sum": _SPLIT, "max": _SPLIT},
}
ROW_GROUP = 131_072  # a byte plane of a row group is one block of zstd (128 KiB), which has codes of its own then
TOKEN_ROWS = 16_384  # a row group of tokens: what reading one passage costs, about 30 kB
DOCUMENT_ROWS = 8_192  # a row group of documents: what finding one costs
# Newer releases of pyarrow end a page after 20,000 rows unless told otherwise; older ones know no such limit.
_ONE_PAGE = {"max_rows_per_page": ROW_GROUP} if "max_rows_per_page" in signature(pq.ParquetWriter).parameters else {}


def parquet_options(schema: pa.Schema) -> dict:
    """Writer options of a table of this schema."""
    encoding = ENCODING.get(tuple(schema.names), {})
    return {
        "compression": "zstd",
        "compression_level": 7,  # of 0.1 us a firing; 15 takes 0.45, beside the model, for 1 % smaller files
        "use_dictionary": [name for name in schema.names if name not in encoding],
        "column_encoding": encoding,
        "write_page_index": False,  # a column of a row group is one page, whose statistics the row group has already
        **_ONE_PAGE,
    }


def release_memory() -> None:
    """Gives freed memory back to the system, so that a long run stays as small as a short one."""
    pa.default_memory_pool().release_unused()
    _glibc("malloc_trim", 0)


def one_heap() -> None:
    """Has all threads of this process allocate from one heap, as far as they have not begun to.

    With a heap of its own a writing thread keeps what the model's forward pass could use meanwhile: resident memory of
    a long collection was 30 MB higher and its maximum grew by 5 to 9 % from the first tenth on, against 4 to 6 %.
    """
    _glibc("mallopt", -8, 1)  # M_ARENA_MAX


def _glibc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None  # other C libraries lack it
    if function is not None:
        function(*arguments)


def write_table(path: Path, table: pa.Table, row_group: int = ROW_GROUP, root: Path | None = None) -> None:
    """Writes a Parquet file, whole or not at all."""
    with whole_file(path, root) as temporary:
        pq.write_table(table, temporary, row_group_size=row_group, **parquet_options(table.schema))


@contextmanager
def parquet(
    path: Path, schema: pa.Schema, opened: Callable[[Path], object] = lambda path: path
) -> Iterator[pq.ParquetFile]:
    """A Parquet file of one of the tables above, open.

    Args:
        opened: what to read it through, a path or a file.

    Raises:
        ValueError: also from the body: missing, damaged, or with other columns; names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'no plain file' if os.path.lexists(path) else 'missing'}")
    try:
        with pq.ParquetFile(opened(path)) as file:
            if not file.schema_arrow.equals(schema):
                got = ", ".join(f"{field.name} {field.type}" for field in file.schema_arrow)
                raise ValueError(f"expected the columns {', '.join(schema.names)}, got {got or 'none'}")
            yield file
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Reads a Parquet file, see `parquet`."""
    # Not pyarrow's read_table, which loads the dataset machinery: a tenth of a second, and milliseconds for every file.
    with parquet(path, schema) as file:
        return checked(file.read(use_threads=False))


def checked(table: pa.Table) -> pa.Table:
    """The table, if only a document's source or digest is missing a value and text is text.

    Raises:
        ValueError: naming the column.
    """
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count and name not in ("source", "sha256"):
            raise ValueError(f"expected a value in every row of {name}, got {column.null_count} without")
        if pa.types.is_string(column.type):
            column.validate(full=True)
    return table


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, without a missing one."""
    # Not to_numpy, which loads pandas where there is one: 0.3 to 0.6 s, most of what a first question takes.
    return np.from_dlpack(column.combine_chunks())


def shifted(table: pa.Table, **by: int) -> pa.Table:
    """The table with numbers added to its columns."""
    for name, number in by.items():
        if number:
            at = table.schema.get_field_index(name)
            column = pa.array(table[name].to_numpy() + number, table.schema.field(at).type)
            table = table.set_column(at, table.schema.field(at), column)
    return table


def row_groups(file: pq.ParquetFile, **ranges: tuple[int, int] | None) -> list[int]:
    """Row groups whose statistics allow every column to be within its range, both ends included. None is any value."""
    asked = [(file.schema_arrow.get_field_index(name), *r) for name, r in ranges.items() if r is not None]
    found = []
    for g in range(file.num_row_groups):
        group = file.metadata.row_group(g)
        limits = ((group.column(at).statistics, low, high) for at, low, high in asked)
        if group.num_rows and all(
            s is None or not s.has_min_max or (s.min <= high and s.max >= low) for s, low, high in limits
        ):
            found.append(g)
    return found


@contextmanager
def locked(folder: Path, argument: str = "out", shared: bool = False) -> Iterator[None]:
    """Holds the folder's lock. The system lets go of it when the process ends, however it ends.

    Args:
        shared: with others that hold it shared.

    Raises:
        ValueError: another process holds it, or `.lock` is a link or no plain file of its own.
    """
    with os.fdopen(_open_lock(folder / ".lock", argument), "r+") as file:
        if not _lock(file.fileno(), shared):
            holder = file.read(64).strip() or "unknown"
            raise ValueError(f"{argument}: another process ({holder}) is collecting into {folder}")
        file.truncate(0)
        file.write("several workers\n" if shared else f"pid {os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process now holds the lock file `path`, which is made where it is missing.

    The system lets go of it when the process ends, however it ends, so that no claim outlives who made it. Between
    machines it holds where the file system has locks across them (NFS 4, Lustre with flock, CephFS, GPFS).

    Raises:
        ValueError: the file is a link, or no plain file of its own.
    """
    descriptor = _open_lock(path, "out")
    try:
        yield _lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _open_lock(path: Path, argument: str) -> int:
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ValueError(f"{argument}: {path} is not a plain file, so nothing is written to it") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise ValueError(f"{argument}: {path} is not a plain file of its own, so nothing is written to it")
    return descriptor


@contextmanager
def digest_bar(what: str, size: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """A function to tell bytes to, which moves a bar."""
    from ..progress import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, disable=not progress, desc=what, leave=False) as bar:
        yield bar.update
