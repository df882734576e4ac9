"""A corpus of any size, as passages: a pool of them is held at a time, and drawn from in random order.

A pool is as many passages as fit `size`, in the order of the text; the next one is read where it ended. So memory does
not grow with the corpus, and where a pool starts is a few numbers, from which a resumed run reads on. Text is mixed
within a pool only: a corpus sorted by kind wants a pool that spans several kinds. One pool holds a small corpus whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..progress import tqdm
from ..text import Corpus
from ..text.passages import Cursor, Passage, passages
from ..text.tokens import tokenizing
from .resume import tokens_digest

POOL = 1 << 24  # tokens held at a time, 4 bytes each
_PIECE = 1 << 14  # tokens of a document handed over at once; they are joined again
SINGLE = "validation: the corpus is a single document, so none can be held out; name --validation"


@dataclass(frozen=True)
class Piece:
    """Tokens `[n]` int32 of a document that is held out or not; `documents`: met so far; `after`: where to go on."""

    tokens: np.ndarray
    held_out: bool
    documents: int
    after: Cursor


def pieces(
    corpus: Corpus,
    tokenizer,
    one_in: int = 0,
    bos: bool = True,
    max_tokens: int | None = None,
    most: int = _PIECE,
    start: Cursor | None = None,
    documents: int = 0,
    held_out: bool = False,
) -> Iterator[Piece]:
    """The documents with text, in pieces of at most `most` tokens; the first of every `one_in` is held out (0: none).

    `start`, `documents` and `held_out` are those of the piece to go on behind.
    """
    tokenize, first = tokenizing(tokenizer, bos)
    for event in passages(corpus, tokenize, min(most, _PIECE), first, max_tokens, start):
        if isinstance(event, Passage):
            if event.row == 0:
                held_out = one_in > 0 and documents % one_in == 0
                documents += 1
            yield Piece(event.tokens, held_out, documents, event.after)


def check_reading(length: int, max_tokens: int | None) -> None:
    """Raises ValueError, naming the argument, unless both are >= 1."""
    if length < 1:
        raise ValueError(f"length: expected >= 1, got {length}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens: expected >= 1, got {max_tokens}")


def refuse_short(tokens: int, documents: int, length: int) -> None:
    """Raises ValueError where a part of the corpus holds no passage."""
    if tokens < length:
        raise ValueError(f"corpus: {documents} documents with {tokens} tokens in all, but one passage takes {length}")


@dataclass(frozen=True)
class _Start:
    """Where a pool starts: behind a piece, with the tokens `carry` that did not fit the pool before."""

    cursor: Cursor | None = None
    carry: tuple[int, ...] = ()
    documents: int = 0
    held_out: bool = False


class Pools:
    """Passages of a corpus, documents joined end to end, a pool in memory at a time. Numbered from 0 through all pools.

    Args:
        corpus, tokenizer: what is read, and how.
        length: tokens of a passage.
        size: tokens held; at least a passage.
        one_in: one in so many documents with text is held out; 0: none.
        bos: put `text.tokens.first_token` before every document.
        max_tokens: read no more than these.
        progress: show a bar.

    Attributes:
        ids: `[n, length]` int32 tokens of the pool at hand; its memory is used again for the next.
        held_out: `[N, length]` int32 tokens held out of the first pool's text, at most a pool of them, or None.

    Raises:
        ValueError: fewer tokens than a passage in the first pool or held out, a single document to hold out of, and
            what reading and `first_token` raise; later, a corpus that is not what it was in an earlier epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer,
        length: int = 256,
        *,
        size: int = POOL,
        one_in: int = 0,
        bos: bool = True,
        max_tokens: int | None = None,
        progress: bool = False,
    ):
        check_reading(length, max_tokens)
        if size < length:
            raise ValueError(f"size: expected at least the {length} tokens of a passage, got {size}")
        self.corpus, self.length, self.size, self.progress = corpus, length, size // length, progress
        self._how = corpus, tokenizer, one_in, bos, max_tokens, self.size * length
        self._room = np.empty(self.size * length, np.int32)  # the system gives it as it is filled
        self._digests: list[str] = []  # of the pools of the first epoch
        self._pieces: Iterator[Piece] | None = None
        self._total: int | None = None
        self._after, self._more, self._filled = _Start(), True, 0
        self.ids = torch.empty(0, length, dtype=torch.int32)
        held: list[Tensor] = []
        self._read(0, _Start(), held)
        documents, out = self._after.documents, -(-self._after.documents // one_in) if one_in else 0
        if one_in and documents < 2 and not self._more:
            raise ValueError(SINGLE)
        refuse_short(self._filled, documents - out, length)
        self.held_out: Tensor | None = None
        if one_in:
            tokens = torch.cat(held) if held else torch.empty(0, dtype=torch.int32)
            refuse_short(len(tokens), out, length)
            self.held_out = tokens[: len(tokens) // length * length].view(-1, length)
        self._first = len(self.ids)

    def __len__(self) -> int:
        """Passages of the first pool, from which a run prepares."""
        return self._first

    @property
    def total(self) -> int | None:
        """Passages of the whole corpus, once it has been read to its end."""
        return self._total

    def digests(self) -> dict[str, str]:
        """What a resumed run must find again: the tokens of the first pool and, of a larger corpus, its files."""
        found = {"tokens": self._digests[0]}
        if self._total != self._first:
            found["corpus"] = str(self.corpus.fingerprint()["sha256"])
        return found

    # ---- pools ------------------------------------------------------------------------------------------------

    def pool(self, number: int) -> range:
        """The passages of a pool, which is then the one at hand; empty: the corpus ends before."""
        if number < self._pool:
            self._read(0, _Start())
        while self._pool < number and self._more:
            self._read(self._pool + 1, self._after)
        if number > self._pool:
            return range(0)
        return range(number * self.size, number * self.size + len(self.ids))

    def take(self, rows: Tensor) -> Tensor:
        """`[n, length]` tokens of passages `[n]`, all of one pool."""
        if not len(rows):
            return self.ids[:0]
        here = self.pool(int(rows[0]) // self.size)
        return self.ids[rows - here.start]

    def _read(self, number: int, start: _Start, held: list[Tensor] | None = None) -> None:
        """Takes pool `number`, which starts there, in hand; and its held-out tokens, a pool's at most, into `held`.

        Reads on until the next pool has a passage, so that it is known whether there is one.
        """
        if self._pieces is None or start is not self._after:
            self._pieces = pieces(*self._how, start.cursor, start.documents, start.held_out)
        found = self._pieces
        room, cursor, documents, is_out = self._room, start.cursor, start.documents, start.held_out
        carry = np.array(start.carry, np.int32)
        filled = min(len(carry), len(room))
        room[:filled], carry = carry[:filled], carry[filled:]
        kept = 0
        with tqdm(desc="tokens", unit=" tokens", unit_scale=True, disable=not self.progress, leave=False) as bar:
            while len(carry) < self.length and (piece := next(found, None)) is not None:
                cursor, documents, is_out = piece.after, piece.documents, piece.held_out
                bar.update(len(piece.tokens))
                if is_out:
                    if held is not None and kept < len(room):
                        held.append(torch.from_numpy(piece.tokens[: len(room) - kept]))
                        kept += len(held[-1])
                    continue
                n = min(len(piece.tokens), len(room) - filled)
                room[filled : filled + n] = piece.tokens[:n]
                filled += n
                carry = np.concatenate([carry, piece.tokens[n:]])
        self._pool, self._start, self._filled = number, start, filled
        self._after = _Start(cursor, tuple(carry.tolist()), documents, is_out)
        self._more = len(carry) >= self.length
        n = filled // self.length
        self.ids = torch.from_numpy(room[: n * self.length]).view(n, self.length)
        if not self._more:
            self._total = number * self.size + n
        digest = tokens_digest(self.ids)
        if number == len(self._digests):
            self._digests.append(digest)
        elif number > len(self._digests) or digest != self._digests[number]:
            raise ValueError(f"corpus: expected the text that was read before, got another in pool {number}")

    # ---- resuming ---------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Where the pool at hand starts, and what has been read, in plain numbers, lists and strings."""
        start = {**vars(self._start), "carry": list(self._start.carry)}
        start["cursor"] = None if self._start.cursor is None else self._start.cursor.to_json()
        return {"pool": self._pool, "start": start, "digests": list(self._digests), "total": self._total}

    def restore(self, state: dict) -> None:
        """Goes on from `state()`: reads the pool that was at hand then.

        Raises:
            ValueError: another text.
            KeyError, TypeError: no such state.
        """
        start = dict(state["start"])
        cursor = None if start["cursor"] is None else Cursor.from_json(start["cursor"])
        self._digests, self._total = [str(x) for x in state["digests"]], state["total"]
        if state["pool"]:
            self._read(state["pool"], _Start(**{**start, "cursor": cursor, "carry": tuple(start["carry"])}))
