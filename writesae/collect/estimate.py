"""What a collection will take, from a small measured sample, before anything is written."""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow.parquet as pq
import torch

from ..text.corpus import Corpus
from ..text.passages import Cursor, Passage
from . import files
from .modes import Features
from .shard import Shard, firings_table
from .source import Source

_STEP = 64  # tokens
_SAMPLE = 16  # passages, at least


@dataclass(frozen=True)
class Estimate:
    """tokens and bytes are None when the corpus does not say how much it holds (a streamed dataset without a limit)."""

    tokens: int | None
    firings_per_token: float
    bytes_per_firing: float
    tokens_per_second: float
    bytes: int | None
    sampled_tokens: int

    def to_json(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        rates = (
            f"{self.firings_per_token:.1f} firings a token, {self.bytes_per_firing:.2f} bytes a firing, "
            f"{self.tokens_per_second:,.0f} tokens a second (measured on {self.sampled_tokens:,} tokens)"
        )
        if self.tokens is None:
            per_million = 1e6 * self.firings_per_token * self.bytes_per_firing
            return f"size unknown: {rates}; {readable(per_million)} for every million tokens (--max-tokens sets an end)"
        minutes = self.tokens / max(self.tokens_per_second, 1e-9) / 60
        return f"about {readable(self.bytes)} for {self.tokens:,} tokens in {minutes:,.1f} minutes: {rates}"


def readable(size: float) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def batches(passages: list[Passage], batch: int, context: int | None = None):
    """(indices of passages, tokens `[B, T]` int64, mask `[B, T]` int64) of like length together, padded right.

    T is a multiple of `_STEP`, or `context`. With a length of its own for every batch's longest passage, a model leaves
    holes in the heap that do not fit the tensors of the next one: resident memory grew by 0.5 MB a new length, though
    what was in use did not grow, and does not grow with eight lengths.
    """
    order = sorted(range(len(passages)), key=lambda i: -len(passages[i].tokens))
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        longest = len(passages[rows[0]].tokens)
        length = max(longest, min(-(-longest // _STEP) * _STEP, context or math.inf))
        tokens = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for r, i in enumerate(rows):
            n = len(passages[i].tokens)
            tokens[r, :n] = torch.from_numpy(passages[i].tokens.astype(np.int64))
            mask[r, :n] = 1
        yield np.array(rows), tokens, mask


def estimate(
    corpus: Corpus,
    tokenize: Callable[[str], list[int]],
    source: Source,
    context: int,
    batch: int,
    max_tokens: int | None,
    mode: str,
    n: int,
) -> Estimate:
    """Runs some passages from all over the corpus through the (entered) source and stores them in memory.

    Raises:
        ValueError: no text in the sample, so nothing to collect.
    """
    texts, total_bytes = corpus.sample()
    ids = [tokenize(text.decode(errors="ignore")) for text in texts]
    sampled = sum(map(len, ids))
    if not sampled:
        raise ValueError("corpus: expected text, got documents without any")
    per_byte = sampled / max(sum(map(len, texts)), 1)
    tokens = None if total_bytes is None else int(total_bytes * per_byte)
    if max_tokens is not None:
        tokens = max_tokens if tokens is None else min(tokens, max_tokens)
    # Of each text one passage first, so that a small sample has seen as many texts as it can.
    pieces = itertools.zip_longest(*([x[a : a + context] for a in range(0, len(x), context)] for x in ids))
    pieces = [np.array(p, np.int32) for column in pieces for p in column if p]
    chosen = [Passage(i, 0, p, Cursor()) for i, p in enumerate(pieces[: max(batch, _SAMPLE)])]
    shard = Shard(0, chosen)
    began = time.perf_counter()
    for rows, t, mask in batches(chosen, batch, context):
        shard.found.add(rows, source.firings(t, mask))
    seconds = time.perf_counter() - began
    seen = sum(len(p.tokens) for p in chosen)
    features = Features(source.sites)
    columns = shard.columns(features)
    per_firing = _stored_size(columns, features)
    rate = len(columns) / seen
    size = None
    if tokens is not None:
        indexed = min(tokens * rate, n * features.total)
        # The index is in no order that helps its places, which take about two bytes more there.
        size = int(indexed * (per_firing + 2) + (tokens * rate * per_firing if mode == "all" else 0) + 1.5 * tokens)
    return Estimate(tokens, rate, per_firing, seen / max(seconds, 1e-9), size, seen)


def _stored_size(columns, features: Features) -> float:
    if not len(columns):
        return 0.0
    stored = io.BytesIO()
    table = firings_table(columns, features)
    pq.write_table(table, stored, row_group_size=files.ROW_GROUP, **files.parquet_options(files.FIRINGS))
    return stored.tell() / len(columns)
