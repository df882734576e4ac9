"""What kind of token it is: labels for probes, from the text alone."""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Sequence

import numpy as np

from ..experiments.replace import Passage

LABELS = ("inside", "class", "shape")
_PROSE = {"COMMENT": "comment", "STRING": "string", "FSTRING_START": "string", "FSTRING_MIDDLE": "string",
          "FSTRING_END": "string"}  # fmt: skip


def labelled(passages: Sequence[Passage], tokenizer, label: str) -> list[np.ndarray]:
    """Of every passage the class of each token, "" where it has none.

    Args:
        passages: of whole documents, as `Lab.text` gives them; a document's are read together.
        label: "inside" (a Python string or comment: "prose", or "code"), "class" (of the Python lexer: comment, string,
            keyword, name, number, operator), or "shape" (of the token's letters, in any text).
    Raises:
        ValueError: another label, or text that Python's lexer cannot read.
    """
    if label not in LABELS:
        raise ValueError(f"label: expected one of {', '.join(LABELS)}, got {label!r}")
    pieces = [_pieces(passage.tokens, tokenizer) for passage in passages]
    if label == "shape":
        return [_objects([shape(piece) for piece in some]) for some in pieces]
    documents: dict[str, list[int]] = {}
    for i, passage in enumerate(passages):
        documents.setdefault(passage.document, []).append(i)
    found = [_objects([""] * len(some)) for some in pieces]
    for some in documents.values():
        some = sorted(some, key=lambda i: passages[i].row)
        rows = [passages[i].row for i in some]
        some = some[
            : next((n for n, row in enumerate(rows) if row != n), len(rows))
        ]  # those that follow on from its start
        every = [piece for i in some for piece in pieces[i]]
        classes = iter(classes_of(every))
        for i in some:
            found[i] = _objects([_merged(next(classes), label) for _ in pieces[i]])
    if not any((x != "").any() for x in found):
        raise ValueError(f'label: expected Python source text for label "{label}", got none; "shape" is of any text')
    return found


def _pieces(tokens: np.ndarray, tokenizer) -> list[str]:
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return ["" if token in special else tokenizer.decode([token]) for token in np.asarray(tokens).tolist()]


def _objects(values: list[str]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _merged(name: str, label: str) -> str:
    if label == "class" or not name:
        return name
    return "prose" if name in ("comment", "string") else "code"


def shape(piece: str) -> str:
    """Of a token's own letters: "space", "word", "capitalised", "number" or "sign"; "" of nothing."""
    bare = piece.strip()
    if not bare:
        return "space" if piece else ""
    if bare[0].isdigit():
        return "number"
    if bare[0].isalpha():
        return "capitalised" if bare[0].isupper() else "word"
    return "sign"


def classes_of(pieces: Sequence[str]) -> list[str]:
    """The lexer's class of each piece of Python source by its first visible letter; "" where there is none, and from
    the place on at which the text cannot be read."""
    text = "".join(pieces)
    starts = np.cumsum([0, *map(len, text.splitlines(keepends=True))])
    classes = np.zeros(len(text) + 1, object)
    classes[:] = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            name = tokenize.tok_name[token.type]
            if name == "NAME":
                name = "keyword" if keyword.iskeyword(token.string) else "name"
            name = _PROSE.get(name, {"NUMBER": "number", "OP": "operator"}.get(name, name))
            if name in ("keyword", "name", "number", "operator", "string", "comment"):
                lo, hi = (starts[min(line - 1, len(starts) - 1)] + column for line, column in (token.start, token.end))
                classes[lo:hi] = name
    except (tokenize.TokenError, SyntaxError):
        pass  # a document that was cut, or is no Python: what came before is labelled
    out, at = [], 0
    for piece in pieces:
        bare = len(piece) - len(piece.lstrip())
        out.append(classes[at + bare] if bare < len(piece) else "")
        at += len(piece)
    return out
