"""The options with which every command names its text, and what it tells about the text it read."""

from __future__ import annotations

import argparse
import sys

from .corpus import FORMATS, Corpus

NAMED = (
    f"a file or a folder (links followed), or s3://BUCKET/PREFIX, gs:// or hf://, of {FORMATS}; "
    "stdlib:SPLIT (train, validation or test), the Python standard "
    "library's sources; or dataset:NAME[:CONFIG][@SPLIT]"
)
_EXAMPLES = 3


def add_options(parser) -> None:
    """Adds what the commands have in common beside their corpus argument."""
    parser.add_argument("--dataset", metavar="NAME[:CONFIG]", help="instead of a corpus: a data set of the Hugging "
                        "Face hub, streamed, or offline its local copy (needs writesae[datasets])")  # fmt: skip
    parser.add_argument("--split", default="train", help="split of --dataset")
    parser.add_argument("--field", default="text", help="field of JSON, or column of Parquet or of --dataset, "
                        "with the text")  # fmt: skip
    parser.add_argument("--no-bos", action="store_true", help="put no token before a document; else it is the one that "
                        "the tokenizer puts there, or its beginning-of-text token")  # fmt: skip


def named(args: argparse.Namespace, default: str | None = None) -> Corpus:
    """The corpus of --dataset or of the argument `corpus` (one name or a list), or the one of `default`; told of.

    Raises:
        ValueError: both or neither, and what `Corpus.from_names` raises.
    """
    given = [args.corpus] if isinstance(args.corpus, str) else args.corpus or []
    if given and args.dataset is not None:
        raise ValueError("corpus: expected a path or --dataset, got both")
    if args.dataset is not None:
        dataset, _, config = args.dataset.partition(":")
        return told(Corpus.from_dataset(dataset, args.field, args.split, config or None))
    if not given and default is None:
        raise ValueError("corpus: expected a path or --dataset, got neither")
    return told(Corpus.from_names(given or [default], args.field))


def told(corpus: Corpus, label: str = "corpus") -> Corpus:
    """The corpus, after its files and what was left out of a folder are told on standard error, by reason."""
    by_reason: dict[str, list] = {}
    for one in corpus.skipped:
        by_reason.setdefault(one.reason, []).append(one)
    for ones in by_reason.values():
        for one in ones[:_EXAMPLES]:
            print(f"skipped {one}", file=sys.stderr)
        if len(ones) > _EXAMPLES:
            print(f"skipped {len(ones) - _EXAMPLES} more that are {ones[0].reason}", file=sys.stderr)
    if corpus.skipped:
        counts = ", ".join(f"{len(ones)} {reason}" for reason, ones in sorted(by_reason.items()))
        print(f"{label}: {len(corpus.files)} files; left out: {counts}", file=sys.stderr)
    return corpus


def tell_empty(corpus: Corpus, label: str = "corpus") -> dict[str, int]:
    """What was left out and what held nothing, by reason; the latter is told, now that the corpus has been read."""
    scanned = {one.reason for one in corpus.skipped}
    empty = {reason: n for reason, n in corpus.left_out().items() if reason not in scanned}
    if empty:
        counts = ", ".join(f"{n} {reason}" for reason, n in empty.items())
        print(f"{label}: documents without text: {counts}", file=sys.stderr)
    return corpus.left_out()
