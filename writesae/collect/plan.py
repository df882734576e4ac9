"""`plan.json`: the corpus of a shared collection cut into units, ranges of documents that any worker can do alone.

A unit begins where a document begins, so a worker needs nothing of what comes before it: not its tokens, and not how
many there are. Only a limit of tokens asks for them; with one, the text up to it is tokenized once to see where it
falls, which takes about a hundredth of what the model does with it.

The same is done for a document that alone would be units: where its passages begin depends on how many tokens come
before, so it is tokenized once, and cut between passages. A unit of it begins with what a resumed run would: a
`Cursor`. A document shorter than a block of `text.passages`, or packed (it could only be read from its beginning), is
never cut.

A unit's name holds a digest of everything that decides what it will hold: the manifest (model, dictionaries, tokenizer,
corpus and options, each by digest) and its range. Work done under a name is the work of that unit, whoever did it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..files import read_sealed, sealed
from ..text import passages as text
from ..text.corpus import Corpus, Document
from ..text.passages import Cursor, DocumentEnd
from ..text.unpack import packing
from ..untrusted import is_integer

PLAN = "plan.json"
_INSIDE = ("row", "block", "used", "taken")  # of a cursor, with `carry`: where inside its document

# (corpus, limit of tokens or None, where from) to the events of `text.passages`.
Read = Callable[[object, int | None, Cursor], Iterator]


@dataclass(frozen=True)
class Unit:
    """`documents` documents, of which the first is begun at `start`.

    Attributes:
        number: its place among the units. name: begins with it, and is its own by content.
        start: where it begins; its passages and tokens are counted from 0.
        tokens: stop after this many (where the next unit goes on inside a document, or the collection has a limit), or
            None.
        goes_on: the last document is the next unit's to end.
    """

    number: int
    name: str
    start: Cursor
    documents: int
    tokens: int | None
    goes_on: bool = False

    def to_json(self) -> list:
        """A unit of whole documents is its first six entries, all that there were before others came."""
        inside = [getattr(self.start, name) for name in _INSIDE]
        more = [inside, self.start.carry, self.goes_on] if any(inside) or self.goes_on else []
        return [self.number, self.name, list(self.start.place), self.start.document, self.documents, self.tokens, *more]

    @classmethod
    def from_json(cls, value) -> Unit:
        """Raises ValueError: it is none."""
        if not isinstance(value, list) or len(value) not in (6, 9):
            raise ValueError("expected a unit")
        number, name, place, document, documents, tokens, *more = value
        inside, carry, goes_on = more or ([0] * len(_INSIDE), [], False)
        for numbers, length in ((place, 3), (inside, len(_INSIDE)), (carry, None)):
            if not isinstance(numbers, list) or len(numbers) != (len(numbers) if length is None else length):
                raise ValueError("expected numbers")
        numbers = (number, document, documents, tokens or 0, *place, *inside, *carry)
        if not all(map(is_integer, numbers)) or not isinstance(name, str) or "/" in name or type(goes_on) is not bool:
            raise ValueError("expected whole numbers and a name")
        start = Cursor(tuple(place), document, carry=carry, **dict(zip(_INSIDE, inside, strict=True)))
        return cls(number, name, start, documents, tokens, goes_on)


class Range:
    """Documents `number` to `end - 1` of a corpus, for `text.passages`. `file`: the last one read of it so far."""

    def __init__(self, corpus: Corpus, start: Cursor, documents: int):
        self.corpus, self.end = corpus, start.document + documents
        self.file = start.place[0]

    def documents(self, place: tuple[int, int, int], number: int) -> Iterator[Document]:
        """As `Corpus.documents`, up to the range's end."""
        if number < self.end:
            for document in self.corpus.documents(place, number):
                self.file = max(self.file, document.place[0])
                yield document
                if document.number + 1 >= self.end:
                    return


class _Cutting:
    """Units in the making: what the next one holds so far, nothing without documents."""

    def __init__(self, manifest: str):
        self.manifest = manifest
        self.units: list[Unit] = []
        self.start = Cursor()
        self.documents = self.bytes = self.tokens = 0

    def add(self, start: Cursor) -> None:
        """Another document; where the unit has none it begins at `start`."""
        if not self.documents:
            self.start = replace(start, passages=0, tokens=0)
            self.bytes = self.tokens = 0
        self.documents += 1

    def close(self, tokens: bool = False, goes_on: bool = False) -> None:
        """Args: tokens: the unit ends after as many as it holds."""
        if not self.documents:
            return
        number = len(self.units)
        unit = Unit(number, "", self.start, self.documents, self.tokens if tokens else None, goes_on)
        _, _, *what = unit.to_json()
        digest = hashlib.sha256(json.dumps([self.manifest, number, *what]).encode()).hexdigest()
        self.units.append(replace(unit, name=f"{number:06d}-{digest[:12]}"))
        self.documents = 0


def cut(corpus: Corpus, size: int, manifest: str, read: Read | None = None, limit: int | None = None) -> list[Unit]:
    """The units of a corpus: documents together until they have `size` bytes; one of two such sizes is cut itself.

    Args:
        manifest: digest of the collection's.
        read: tokenizes, for the limit and for what is to be cut; None: there is no limit, and no document is cut.
        limit: of tokens; the last unit ends there.
    """
    made = _Cutting(manifest)
    events = None if read is None or limit is None else read(corpus, limit, Cursor())
    for document in corpus.documents():
        length, begin = _bytes(corpus, document), Cursor(document.place, document.number)
        long = length >= 2 * size and length > text.BLOCK and not _packed(corpus, document)
        if long:
            made.close()
        made.add(begin)
        end = None
        if events is not None:
            end = _follow(made, events, size if long else None)
        elif read is not None and long:
            end = _follow(made, read(Range(corpus, begin, 1), None, begin), size)
        made.bytes += length - (made.start.block if made.start.document == document.number else 0)
        if end is not None and end.sha256 is None:
            made.close(tokens=True)
            break
        if made.bytes >= size:
            made.close()
    made.close()
    return made.units


def _follow(made: _Cutting, events: Iterator, size: int | None) -> DocumentEnd:
    """Takes a document's events, closing units of `size` bytes (None: none) between its passages; returns the last."""
    behind = None  # a passage that a unit may end with, should another one follow
    for event in events:
        if isinstance(event, DocumentEnd):
            return event
        if behind is not None:
            made.close(tokens=True, goes_on=True)
            made.add(behind)
            behind = None
        made.tokens += len(event.tokens)
        if size is not None and event.after.block - made.start.block >= size:
            behind = event.after
    raise ValueError("corpus: it changed while it was being cut into units")


def _packed(corpus: Corpus, document: Document) -> bool:
    """Whether reading the document from its midst means to unpack what comes before."""
    file = corpus.files[document.place[0]] if corpus.files else None
    return file is not None and file[2] == "text" and packing(file[0])[0] is not None


def _bytes(corpus: Corpus, document: Document) -> int:
    """Of text; of a file that is one document, of the file, unread."""
    if corpus.files and corpus.files[document.place[0]][2] == "text":
        return corpus.files[document.place[0]][0].stat().st_size
    with document.open() as stream:
        return stream.seek(0, 2)


def write(where, units: list[Unit], manifest: str) -> None:
    """Puts the plan down, unless another worker was first: of one manifest they are equal. where: a `mirror.Place`."""
    content = {"manifest": manifest, "units": [unit.to_json() for unit in units]}
    where.write(PLAN, sealed(content).encode(), first=True)


def read(out: Path, manifest: str) -> list[Unit]:
    """The plan of a collection.

    Raises:
        ValueError: missing, damaged, or of another collection; names the file.
    """
    path = out / PLAN
    made = read_sealed(path)
    units = made.get("units")
    try:
        if made.get("manifest") == manifest and isinstance(units, list):
            return [Unit.from_json(unit) for unit in units]
    except ValueError:
        pass
    raise ValueError(f"{path} is not the plan of this collection")
