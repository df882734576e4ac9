"""Random corpora, sound and damaged, for the one reader of text.

A sound corpus must give exactly its texts, whatever kind of file holds them and wherever reading starts. A damaged one
must give texts or a `ValueError` that names the file; whatever it gives, it must give the same from every place in it.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from writesae.text import Corpus

_WORDS = ("eins", "zwei", "drei", "ä", "日本", "\n", "  ", "\t", '"', "\\", "{", "]", ",", "\u2028", "x" * 300,
          "\U0001f600")  # fmt: skip
_KINDS = ("txt", "md", "py", "jsonl", "ndjson", "json", "lines.json", "strings.json", "parquet")


class Defect(AssertionError):
    """A text lost or changed, or an unclear error."""


def cases(seed: int, root: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Cases without end, each in a folder of its own below `root`; the n-th is the same for the same seed."""
    n = 0
    while True:
        draw = random.Random(f"{seed} {n}")
        sound = draw.random() < 0.4
        name = f"{'sound' if sound else 'damaged'} corpus (seed {seed}, case {n})"
        yield name, lambda draw=draw, n=n, sound=sound: _clean(_case, draw, root / f"corpus-{n}", sound)
        n += 1


def _text(draw: random.Random) -> str:
    return "".join(draw.choices(_WORDS, k=draw.randrange(1, 30))) + "."


def _file(draw: random.Random, folder: Path) -> tuple[Path, list[str]]:
    """One file and the texts in it."""
    kind, packed = draw.choice(_KINDS), draw.choice(("", "", ".gz", ".zst"))
    texts = [_text(draw) for _ in range(draw.randrange(1, 12))]
    if kind in ("txt", "md", "py"):
        texts = texts[:1]
        data = texts[0].encode()
    elif kind == "parquet":
        sort = draw.choice((pa.string(), pa.large_string(), pa.string_view(), pa.binary()))
        column = pa.array([t.encode() for t in texts] if sort == pa.binary() else texts, sort)
        if draw.random() < 0.3 and sort == pa.string():
            column = column.dictionary_encode()
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": column}), sink, row_group_size=draw.choice((1, 3, 100)))
        data = sink.getvalue().to_pybytes()
    else:
        records = [{"text": t, "n": {"deep": [1, {}]}} for t in texts]
        ascii_only = draw.random() < 0.5
        if kind == "json":
            body = json.dumps(records, ensure_ascii=ascii_only, indent=draw.choice((None, 2)))
        elif kind == "strings.json":
            body = json.dumps(texts, ensure_ascii=ascii_only)
        else:
            body = "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in records)
        data = body.encode(draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")))
    if packed == ".gz":
        data = gzip.compress(data)
    elif packed == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        data = sink.getvalue().to_pybytes()
    path = folder / f"f{draw.randrange(10**6)}.{kind}{packed}"
    path.write_bytes(data)
    return path, texts


def _damage(draw: random.Random, data: bytes) -> bytes:
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(data)) if data else 0
        how = draw.randrange(6)
        if how == 0 and data:
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif how == 1:
            data = data[:at]
        elif how == 2:
            data = data[:at] + draw.randbytes(draw.randrange(1, 40)) + data[at:]
        elif how == 3:
            data = data[:at] + data[at + draw.randrange(1, 40) :]
        elif how == 4:
            data = data[:at] + b"[" * draw.choice((10, 100_000)) + data[at:]
        else:
            data = data + data
    return data


def _read(corpus: Corpus, place: tuple = (0, 0, 0), number: int = 0) -> list[tuple[tuple, str]]:
    # (Bytes that are no text are met when they are tokenized: tests/test_text.py.)
    return [(d.place, d.open().read().decode(errors="replace")) for d in corpus.documents(place, number)]


def _clean(case: Callable, draw: random.Random, folder: Path, sound: bool) -> None:
    try:
        case(draw, folder, sound)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _case(draw: random.Random, folder: Path, sound: bool) -> None:
    folder.mkdir(parents=True)
    expected = []
    for path, texts in sorted(_file(draw, folder) for _ in range(draw.randrange(1, 4))):
        expected += texts
        if not sound:
            path.write_bytes(_damage(draw, path.read_bytes()))
    names = [p.name for p in folder.iterdir()]
    try:
        corpus = Corpus.from_path(folder if draw.random() < 0.7 else folder / names[0])
        found = _read(corpus)
        corpus.digest()
    except (ValueError, FileNotFoundError) as error:
        if sound:
            raise Defect(f"sound files refused: {error}") from error
        if not any(name in str(error) for name in names) and str(folder) not in str(error):
            raise Defect(f"the refusal names no file: {error}") from error
        return
    except BaseException as error:
        raise Defect(f"{type(error).__name__}: {error}") from error
    if sound and len(corpus) == len(names) and [text for _, text in found] != expected:
        raise Defect(f"texts changed: {[t for _, t in found]!r:.300} for {expected!r:.300}")
    if found:
        n = draw.randrange(len(found))
        if _read(corpus, found[n][0], n) != found[n:]:
            raise Defect(f"reading on from {found[n][0]} gives other texts")
