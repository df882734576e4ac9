"""Token ids as text: the bytes behind every token of a vocabulary, so that windows are decoded as they were written."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from ..untrusted import read_json

_LIMIT = 2**28  # bytes of a tokenizer.json
_MOST = 2**24  # tokens
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARK = "\u2581"  # what SentencePiece writes for a space


def _byte_letters() -> dict[str, int]:
    """{letter: byte} by which byte-level vocabularies write their bytes: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = dict(zip(map(chr, plain), plain, strict=True))
    rest = (byte for byte in range(256) if byte not in set(plain))
    return letters | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_OF = _byte_letters()


class Words:
    """The tokens of a vocabulary as bytes.

    Args:
        pieces: bytes of every id, in order; None where no id has that number.

    Ids without bytes are shown as their number in angle brackets.
    """

    def __init__(self, pieces: Sequence[bytes | None] | pa.Array):
        self._pieces = pieces if isinstance(pieces, pa.Array) else pa.array(pieces, pa.binary())

    def __len__(self) -> int:
        return len(self._pieces)

    def _bytes(self, token: int) -> bytes:
        found = self._pieces[token].as_py() if 0 <= token < len(self._pieces) else None
        return f"<{token}>".encode() if found is None else found

    def token(self, token: int) -> str:
        """One token by itself; bytes that are no text are written `\\xNN`."""
        return self._bytes(token).decode("utf-8", "backslashreplace")

    def tokens(self) -> list[str]:
        """All of them, by id."""
        pieces = self._pieces.to_pylist()  # one by one they take a second of a large vocabulary
        return [f"<{i}>" if x is None else x.decode("utf-8", "backslashreplace") for i, x in enumerate(pieces)]

    def split(self, tokens: Iterable[int]) -> list[str]:
        """The text of tokens, a piece each; joined, they are the text.

        A character whose bytes lie in several tokens is in the last of them, so that those before it may be empty.
        What is no UTF-8 (a character cut by the window's edge) is U+FFFD.
        """
        decode = self.stream()
        found = [decode(int(token)) for token in tokens]
        rest = decode(None)
        if found and rest:
            found[-1] += rest
        return found

    def stream(self) -> Callable[[int | None], str]:
        """`split`, a token at a time; None asks for what is left at the end."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(b"" if token is None else self._bytes(token), final=token is None)

    def array(self) -> pa.Array:
        return self._pieces


def from_file(path: str | Path) -> Words | None:
    """Of a `tokenizer.json`; None where its way to write bytes is not known.

    Raises:
        ValueError: a file that is no tokenizer's; names it.
    """
    return from_config(read_json(path, _LIMIT, strict=False), str(path))


def from_config(config: dict, where: str = "tokenizer") -> Words | None:
    """Of the content of a `tokenizer.json`, see `from_file`."""
    model, added = config.get("model"), config.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of text and score
        vocabulary = {x[0]: i for i, x in enumerate(vocabulary) if isinstance(x, list) and x and isinstance(x[0], str)}
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise ValueError(f"{where}: expected a tokenizer with a vocabulary, got another file")
    write = _writer(json.dumps(config.get("decoder")))
    if write is None:
        return None
    found: dict[int, bytes] = {}
    for text, token in vocabulary.items():
        if isinstance(token, int) and 0 <= token < _MOST:
            found[token] = write(text)
    for entry in added:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and isinstance(entry.get("id"), int):
            if 0 <= entry["id"] < _MOST:
                found[entry["id"]] = _utf8(entry["content"])
    return Words([found.get(token) for token in range(max(found, default=-1) + 1)])


def _writer(decoder: str) -> Callable[[str], bytes] | None:
    """How a decoder turns a vocabulary's text into bytes."""
    if '"ByteLevel"' in decoder:
        return lambda text: b"".join(bytes([BYTE_OF[x]]) if x in BYTE_OF else _utf8(x) for x in text)
    if '"Metaspace"' in decoder or "\\u2581" in decoder:  # or a Replace of its mark
        return _sentencepiece
    return None


def _sentencepiece(text: str) -> bytes:
    match = _BYTE.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else _utf8(text.replace(_MARK, " "))


def by_decoding(decode: Callable[[list[int]], str], size: int) -> Words:
    """Of a tokenizer that is only known by what it does: every token decoded alone, spaces as it shows them."""
    return Words([_utf8(decode([token])) for token in range(size)])


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # half a surrogate pair is no text
