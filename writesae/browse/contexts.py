"""A feature's firings as a page shows them: levels of activation, each with the text around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..collect.store import Store
from ..untrusted import first_line
from .words import Words

BINS = 32  # of a histogram, from 0 to the feature's largest activation
# Levels by share of the largest activation, of which firings are drawn; the first is the largest firings themselves.
LEVELS = (
    ("top", 0.0, 1.0), ("75-100 %", 0.75, 1.0), ("50-75 %", 0.5, 0.75), ("25-50 %", 0.25, 0.5), ("0-25 %", 0.0, 0.25),
)  # fmt: skip
ROWS = 128  # features of a row group: what a page reads
WIDTH = 48  # tokens either side whose activation is kept
NEAR = 24  # tokens either side, before the window is widened to whole lines or words
_LISTS = {
    "histogram": np.int64, "token": np.int32, "token_count": np.int64, "together": np.int32, "together_count": np.int64,
    "level": np.uint8, "document": np.int32, "row": np.int32, "position": np.int32, "activation": np.float32,
    "around": np.int32, "offset": np.int8, "value": np.float32,
}  # fmt: skip


def read_lists(path: Path, feature: int, kinds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A feature's lists in a table of the cache, of which one row group is read.

    Raises:
        ValueError: another file; names it.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(feature // ROWS, list(kinds), use_threads=False)
            found = {}
            for name, kind in kinds.items():
                column = table[name].combine_chunks()
                # Not to_numpy, which loads pandas where there is one: half of what a first page takes.
                offsets, values = np.from_dlpack(column.offsets), np.from_dlpack(column.values)
                low, high = offsets[feature % ROWS], offsets[feature % ROWS + 1]
                found[name] = values[low:high].astype(kind, copy=False)
            return found
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"cache: {path} cannot be read: {first_line(error)}; remove it") from error


def read_scan(path: Path, feature: int) -> dict[str, np.ndarray]:
    """What `scan` kept of a feature."""
    found = read_lists(path, feature, _LISTS)
    few = len(found["level"])
    sound = all(len(found[name]) == few for name in ("document", "row", "position", "activation", "around"))
    sound = sound and len(found["histogram"]) == BINS and bool((found["around"] >= 0).all())
    sound = sound and len(found["offset"]) == len(found["value"]) == int(found["around"].sum(dtype=np.int64))
    if not sound or (found["level"] >= len(LEVELS)).any():
        raise ValueError(f"cache: {path} is no table of contexts; remove it")
    return found


def levels(store: Store, words: Words, found: Mapping[str, np.ndarray], largest: float) -> list[dict]:
    """The levels of a feature's page, see `FeaturePage`."""
    places = {(int(d), int(r)) for d, r in zip(found["document"], found["row"], strict=True)}
    passages = store._passages(places)
    ends = np.cumsum(np.r_[0, found["around"]])
    out = []
    for number, (name, low, high) in enumerate(LEVELS):
        contexts: list[dict[str, Any]] = []
        for i in np.flatnonzero(found["level"] == number):
            tokens, source = passages[int(found["document"][i]), int(found["row"][i])]
            position = int(found["position"][i])
            if not 0 <= position < len(tokens):
                continue
            first, last = window(words, tokens, position)
            ids = tokens[first:last]
            activations = np.zeros(len(ids))
            where = position - first + found["offset"][ends[i] : ends[i + 1]].astype(int)
            inside = (where >= 0) & (where < len(ids))
            activations[where[inside]] = found["value"][ends[i] : ends[i + 1]][inside]
            contexts.append({
                "document": int(found["document"][i]), "row": int(found["row"][i]), "position": position,
                "source": source, "tokens": words.split(ids), "activations": [float(x) for x in activations],
                "at": position - first, "activation": float(found["activation"][i]),
            })  # fmt: skip
        if contexts:
            if number == 0:  # the largest themselves
                low, high = min(c["activation"] for c in contexts), max(c["activation"] for c in contexts)
            else:
                low, high = low * largest, high * largest
            out.append({"name": name, "low": low, "high": high, "contexts": contexts})
    return out


def window(words: Words, tokens: np.ndarray, position: int) -> tuple[int, int]:
    """(first, behind the last) token of what is shown around one: from the beginning of a line, so that indentation is
    kept, or of a word, to the end of a word."""
    low, high = max(position - NEAR, 0), min(position + NEAR + 1, len(tokens))
    least, most = max(position - WIDTH, 0), min(position + WIDTH + 1, len(tokens))
    before = [words.token(int(t)) for t in tokens[least:low]]
    lines = [i for i, text in enumerate(before) if "\n" in text]
    if lines and lines[-1] >= len(before) - NEAR // 2:
        low = least + lines[-1]  # its line end comes along, and with it the indentation of the same token
    else:
        while low > least and not _begins(words.token(int(tokens[low]))):
            low -= 1
    while high < most and not _begins(words.token(int(tokens[high]))):
        high += 1
    return low, high


def _begins(text: str) -> bool:
    """Whether a token begins a word, rather than goes on with one."""
    return not text[:1].isalnum() and text[:1] not in ("_", "\\")


def histogram(found: Mapping[str, np.ndarray], largest: float) -> dict:
    """{edges [33], counts [32]} of a feature's activations."""
    edges = np.linspace(0, largest if np.isfinite(largest) and largest > 0 else 1.0, BINS + 1)
    return {"edges": edges.tolist(), "counts": [int(x) for x in found["histogram"]]}


def cofiring(found: Mapping[str, np.ndarray], count: int, counts, tokens: int, site: tuple[int, int]) -> list[dict]:
    """Features of the same site that fire at the same tokens more often than by chance.

    Args:
        count: firings of the feature. counts: `[F]` of all of its site. tokens: of the store.
    Each has `together` (tokens), `expected` of independent firing, `lift`, and `npmi`, normalised pointwise mutual
    information: 1 where both always fire together, 0 by chance.
    """
    out = []
    for other, together in zip(found["together"].tolist(), found["together_count"].tolist(), strict=True):
        if not 0 <= other < len(counts) or together <= 0 or tokens <= 0:
            continue
        expected = count * (int(counts[other]) / tokens)
        lift = together / expected if expected > 0 else float("inf")
        share = together / tokens
        certain = share >= 1
        npmi = 1.0 if certain else float(np.log(max(lift, 1e-300)) / -np.log(share))
        out.append({
            "layer": site[0], "head": site[1], "feature": other, "together": together, "expected": expected,
            "lift": lift if np.isfinite(lift) else None, "npmi": npmi if np.isfinite(npmi) else None,
        })  # fmt: skip
    return out


def about(path: Path) -> dict:
    """What a table of the cache says of how it was made."""
    try:
        with pq.ParquetFile(path) as file:
            found = json.loads((file.schema_arrow.metadata or {}).get(b"writesae", b"{}"))
    except (pa.ArrowException, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
