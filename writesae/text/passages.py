"""Documents to passages of at most `context` tokens, from any passage boundary on.

Text is tokenized in blocks of at most 256 KiB that end at a line end (else a space), so that a file of any size takes
the memory of one block. A token never spans two blocks; this is the only difference from tokenizing a text at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

import numpy as np

from .corpus import Corpus

BLOCK = 256 * 1024


@dataclass(frozen=True)
class Cursor:
    """A passage boundary to go on from. Everything in it fits JSON.

    Attributes:
        place, document: the document the next passage is in (or follows), and its number.
        row: passages of it already made.
        block: byte at which the block of the next passage's tokens starts.
        carry: tokens left over from before that block.
        used: how many of `carry` and the block's tokens are already in passages.
        taken: tokens of the document before `carry`, plus `used`.
        passages, tokens: made in all so far.
    """

    place: tuple[int, int, int] = (0, 0, 0)
    document: int = 0
    row: int = 0
    block: int = 0
    carry: list[int] = field(default_factory=list)
    used: int = 0
    taken: int = 0
    passages: int = 0
    tokens: int = 0

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> Cursor:
        return cls(**{**value, "place": tuple(value["place"])})


@dataclass(frozen=True)
class Passage:
    """`tokens` `[n]` int32, passage `row` of `document`; `after`: where to go on behind it."""

    document: int
    row: int
    tokens: np.ndarray
    after: Cursor


@dataclass(frozen=True)
class DocumentEnd:
    """A document is over: its row of the documents table."""

    document: int
    source: str
    sha256: str | None
    tokens: int
    passages: int
    first_passage: int


def passages(
    corpus: Corpus,
    tokenize: Callable[[str], list[int]],
    context: int,
    bos: int | None = None,
    max_tokens: int | None = None,
    start: Cursor | None = None,
) -> Iterator[Passage | DocumentEnd]:
    """Passages in corpus order, each document's followed by its `DocumentEnd`.

    Args:
        corpus: the documents.
        tokenize: text to token ids, without special tokens.
        context: tokens a passage; a document's last one may be shorter.
        bos: token put before every document's first one.
        max_tokens: stop after this many; the last passage is cut there.
        start: go on behind a passage: `Passage.after` of it.

    Raises:
        ValueError: text that is not UTF-8, naming document and byte.
    """
    start = start or Cursor()
    made, total = start.passages, start.tokens
    resume = start if (start.row or start.passages) else None
    for document in corpus.documents(start.place, start.document):
        here = resume or Cursor(document.place, document.number, carry=[] if bos is None else [bos])
        resume = None
        row, taken, carry, used = here.row, here.taken, list(here.carry), here.used
        first = made - row
        full = max_tokens is not None and total >= max_tokens
        digest, sha256 = hashlib.sha256(), None
        with document.open() as stream:
            position = here.block
            for position, data in () if full else _blocks(stream, here.block):
                digest.update(data)
                ids = carry + tokenize(_decode(data, document.source, position))
                while len(ids) - used >= context and not full:
                    n = context if max_tokens is None else min(context, max_tokens - total)
                    used, taken, row, made, total = used + n, taken + n, row + 1, made + 1, total + n
                    after = Cursor(document.place, document.number, row, position, carry, used, taken, made, total)
                    yield Passage(document.number, row - 1, np.array(ids[used - n : used], np.int32), after)
                    full = max_tokens is not None and total >= max_tokens
                if full:
                    break
                carry, used = ids[used:], 0
                position += len(data)
            left = len(carry) - used
            # A beginning-of-text token with no text behind it is no passage.
            if not full and left and (taken or left > (bos is not None)):
                n = left if max_tokens is None else min(left, max_tokens - total)
                used, taken, row, made, total = used + n, taken + n, row + 1, made + 1, total + n
                after = Cursor(document.place, document.number, row, position, carry, used, taken, made, total)
                yield Passage(document.number, row - 1, np.array(carry[used - n : used], np.int32), after)
                full = max_tokens is not None and total >= max_tokens
            if not full:  # who began inside the document reads it all once more, at its end only
                sha256 = (_digest(stream, position) if here.block else digest).hexdigest()
        yield DocumentEnd(document.number, document.source, sha256, taken, row, first)
        if full:
            return


def _blocks(stream: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """(byte it starts at, bytes) of each block. Where blocks end depends on the text alone, not on where one starts."""
    stream.seek(start)
    rest = b""
    while data := rest + stream.read(BLOCK - len(rest)):
        rest = b""
        if len(data) == BLOCK:
            cut = data.rfind(b"\n") + 1 or max(data.rfind(b" "), 0)
            if not cut:
                cut = len(data)
                while cut > 1 and data[cut - 1] & 0xC0 == 0x80:
                    cut -= 1
                cut = cut - 1 if cut > 1 and data[cut - 1] >= 0xC0 else cut
            data, rest = data[:cut], data[cut:]
        yield start, data
        start += len(data)


def _digest(stream: BinaryIO, least: int):
    """Of a whole document, of at least so many bytes."""
    digest, read = hashlib.sha256(), 0
    stream.seek(0)
    while data := stream.read(1 << 20):
        digest.update(data)
        read += len(data)
    if read < least:
        raise ValueError("corpus: a document is shorter than when the collection began")
    return digest


def _decode(data: bytes, source: str, position: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus: expected UTF-8, got byte 0x{data[error.start]:02x} at {position + error.start} of {source}"
        ) from error
