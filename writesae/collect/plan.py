"""`plan.json`: the corpus of a shared collection cut into units, ranges of documents that any worker can do alone.

A unit begins where a document begins, so a worker needs nothing of what comes before it: not its tokens, and not how
many there are. Only a limit of tokens asks for them; with one, the text up to it is tokenized once to see where it
falls, which takes about a hundredth of what the model does with it.

A unit's name holds a digest of everything that decides what it will hold: the manifest (model, dictionaries, tokenizer,
corpus and options, each by digest) and its range. Work done under a name is the work of that unit, whoever did it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from ..files import read_sealed, sealed
from ..text.corpus import Corpus, Document
from ..text.passages import Cursor, DocumentEnd
from ..untrusted import is_integer

PLAN = "plan.json"


@dataclass(frozen=True)
class Unit:
    """Documents `document` to `document + documents - 1`.

    Attributes:
        number: its place among the units. name: begins with it, and is its own by content.
        place: where the corpus is read from.
        tokens: stop after this many (the last unit, where the collection has a limit), or None.
    """

    number: int
    name: str
    place: tuple[int, int, int]
    document: int
    documents: int
    tokens: int | None

    @property
    def start(self) -> Cursor:
        return Cursor(self.place, self.document)


class Range:
    """A unit's part of a corpus, for `text.passages`. `files`: the last file read of it so far."""

    def __init__(self, corpus: Corpus, unit: Unit):
        self.corpus, self.end = corpus, unit.document + unit.documents
        self.file = unit.place[0]

    def documents(self, place: tuple[int, int, int], number: int) -> Iterator[Document]:
        """As `Corpus.documents`, up to the unit's end."""
        if number < self.end:
            for document in self.corpus.documents(place, number):
                self.file = max(self.file, document.place[0])
                yield document
                if document.number + 1 >= self.end:
                    return


def cut(corpus: Corpus, size: int, manifest: str, events: Iterable | None = None) -> list[Unit]:
    """The units of a corpus: documents together until they have `size` bytes.

    Args:
        manifest: digest of the collection's.
        events: with a limit of tokens, `text.passages` of the corpus up to it, whose end the last unit ends at.
    """
    lengths = None if events is None else (event for event in events if isinstance(event, DocumentEnd))
    units: list[Unit] = []
    held: list = []  # first place, first number, documents, bytes, tokens

    def close(limit: bool) -> None:
        place, number, documents, _, tokens = held
        what = json.dumps([manifest, len(units), place, number, documents, tokens if limit else None])
        name = f"{len(units):06d}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
        units.append(Unit(len(units), name, place, number, documents, tokens if limit else None))
        held.clear()

    cut_short = False
    for document in corpus.documents():
        end = None
        if lengths is not None:
            end = next(lengths, None)
            if end is None:
                break
            cut_short = end.sha256 is None
        held = held or [document.place, document.number, 0, 0, 0]
        held[2] += 1
        held[3] += _bytes(corpus, document)
        held[4] += 0 if end is None else end.tokens
        if held[3] >= size and not cut_short:
            close(False)
        if cut_short:
            break
    if held:
        close(cut_short)
    return units


def _bytes(corpus: Corpus, document: Document) -> int:
    """Of text; of a file that is one document, of the file, unread."""
    if corpus.files and corpus.files[document.place[0]][2] == "text":
        return corpus.files[document.place[0]][0].stat().st_size
    with document.open() as stream:
        return stream.seek(0, 2)


def write(where, units: list[Unit], manifest: str) -> None:
    """Puts the plan down, unless another worker was first: of one manifest they are equal. where: a `mirror.Folder`."""
    value = {"manifest": manifest, "units": [astuple(unit) for unit in units]}
    where.write(PLAN, sealed(value).encode(), first=True)


def read(out: Path, manifest: str) -> list[Unit]:
    """The plan of a collection.

    Raises:
        ValueError: missing, damaged, or of another collection; names the file.
    """
    path = out / PLAN
    made = read_sealed(path)
    units = made.get("units")
    if made.get("manifest") != manifest or not isinstance(units, list) or not all(map(_sound, units)):
        raise ValueError(f"{path} is not the plan of this collection")
    return [Unit(number, name, tuple(place), *rest) for number, name, place, *rest in units]


def _sound(unit) -> bool:
    if not isinstance(unit, list) or len(unit) != 6:
        return False
    number, name, place, document, documents, tokens = unit
    numbers = [
        number,
        document,
        documents,
        0 if tokens is None else tokens,
        *(place if isinstance(place, list) else []),
    ]
    return all(map(is_integer, numbers)) and len(numbers) == 7 and isinstance(name, str) and "/" not in name
