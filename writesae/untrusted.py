"""Reading files that a stranger may have made: nothing runs, nothing large is allocated before its size is checked,
and whatever is wrong is a ValueError that names the file. Needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON_LIMIT = 4 * 2**20  # bytes; a list of empty lists takes some twenty times its text in memory
HEADER_LIMIT = 8 * 2**20
_DEPTH = 64  # objects in objects; more would exhaust the stack of whoever walks or writes them
_LONE = re.compile("[\ud800-\udfff]")


def shown(value: Any) -> str:
    """A value in an error message: its repr if short, else its beginning; of containers only the kind."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_line(error: BaseException) -> str:
    """Of an error's message, at most 300 characters; its class where there is no message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def regular_size(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
        ValueError: a device, pipe, folder or broken link, which would hang or never end.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a regular file, got something else (a folder, device or pipe)")
    return status.st_size


def read_json(path: str | Path, limit: int = JSON_LIMIT, strict: bool = True, kind: type = dict) -> Any:
    """A JSON object, or with `kind` list a list, as plain data; if `strict`, with every number finite, no key given
    twice, and all of it text.

    Raises:
        ValueError: naming the file: too large, not UTF-8, not JSON, nested too deep, not of that kind.
    """
    path = Path(path)
    if (size := regular_size(path)) > limit:
        raise ValueError(f"{path}: expected at most {limit:,} bytes of JSON, got {size:,}")
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1).decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        value = json.loads(text, parse_int=_integer, **(_STRICT if strict else {}))
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON that can be read: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {first_line(error)}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, got {shown(value)}")
    if _deep(value):
        raise ValueError(f"{path}: not JSON that can be read: nested too deep")
    return value


def _deep(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        level = [x for part in level for x in (part.values() if isinstance(part, dict) else part)
                 if isinstance(x, (dict, list))]  # fmt: skip
    return bool(level)


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    for key, value in pairs:
        if _LONE.search(key) or (isinstance(value, str) and _LONE.search(value)):
            raise ValueError("half a surrogate pair, which is no text")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _integer(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"an integer of {len(text)} digits is out of range")
    return int(text)


_STRICT: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _refuse_constant, "parse_float": _finite}


def is_integer(value: Any, least: int = 0, most: int = 2**62) -> bool:
    """Whether a value is an int in range (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float (a bool is not)."""
    return is_integer(value, -(2**62)) or (isinstance(value, float) and abs(value) < float("inf"))


# ---- safetensors ----------------------------------------------------------------------------------------------------


@contextmanager
def safetensors_file(path: str | Path) -> Iterator[tuple[dict[str, tuple[str, tuple[int, ...]]], Callable]]:
    """({name: (dtype such as "F32", shape)}, `get(name)` reading one tensor) of an open file, header checked first.

    The library maps the file and checks that dtypes, shapes and offsets cover its bytes exactly; nothing is read or
    allocated for a tensor before `get`.

    Raises:
        ValueError: naming the file: not a regular file, torn, or a header that is not one of safetensors.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    size = regular_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise ValueError(
            f"{path}: not a readable safetensors file: a header of {length:,} bytes in a file of {size:,} "
            f"(at most {HEADER_LIMIT:,})"
        )
    try:
        opened = safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
    with opened:
        try:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            header = {name: (at.get_dtype(), tuple(at.get_shape())) for name, at in slices.items()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
        yield header, opened.get_tensor
