"""One worker's way through text: passages to the model, what fired to the shards, with a clock on each."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from ..interrupt import Stop
from ..progress import tqdm
from ..text.corpus import Corpus
from ..text.passages import Cursor, Passage, passages
from . import files, manifest
from .estimate import batches
from .finish import finish
from .shard import Progress, Shard, Writer
from .source import begin

_RELEASE_SECONDS = 1.0


class Session:
    """One run's way through the corpus, with its clock."""

    def __init__(self, tokenize, bos, source, context, batch, max_tokens, progress):
        self.tokenize, self.bos, self.source = tokenize, bos, source
        self.context, self.batch, self.max_tokens, self.progress = context, batch, max_tokens, progress
        self.goes_on = False  # whether the document that max_tokens fall in is another session's to end
        self.began = time.perf_counter()
        self.forward = self.write = self.wait = 0.0
        self.tokens = 0

    def run(self, corpus: Corpus, state: Progress, shard_passages: int, expected: int | None, stop: Stop) -> None:
        if state.last:
            return
        bar = tqdm(
            total=expected or self.max_tokens, initial=state.tokens, unit="tok", unit_scale=True,
            disable=not self.progress, desc="collecting",
        )  # fmt: skip
        writer = Writer(state)
        entered, released = False, 0.0
        ahead = int(getattr(self.source, "asynchronous", False))
        try:
            with ExitStack() as stack:
                stack.enter_context(bar)
                for shard in shards(self._events(corpus, state.cursor), state.shards, shard_passages):
                    under_way: list = []  # on a device, the batch before: fetched once the next one runs
                    for rows, tokens, mask in batches(shard.passages, self.batch, self.context):
                        if not entered:  # what is left may be ends of documents only, and a source wants to run
                            stack.enter_context(self.source)
                            entered = True
                        writer.check()
                        began = time.perf_counter()
                        under_way.append((rows, begin(self.source, tokens, mask)))
                        if len(under_way) > ahead:
                            _fetch(shard, under_way.pop(0))
                        released = _release(released)
                        self.forward += time.perf_counter() - began
                        real = int(mask.sum())
                        self.tokens += real
                        bar.update(real)
                    began = time.perf_counter()
                    for batch in under_way:
                        _fetch(shard, batch)
                    released = _release()  # the writer is about to take some
                    self.forward += time.perf_counter() - began
                    writer.submit(shard)
                    if stop:
                        break
                writer.close()
        except BaseException:
            writer.abandon()
            raise
        finally:
            self.write += writer.seconds
            self.wait += writer.waited

    def load(self, corpus: Corpus, state: Progress, shard_passages: int) -> list[str]:
        """Takes up the shards that stand, making damaged ones again. Returns what was wrong with those."""
        with ExitStack() as stack:
            entered = False

            def remake(wrong: str) -> Shard:
                nonlocal entered
                if self.progress:
                    tqdm.write(f"made again: {wrong}", file=sys.stderr)
                stored = state.stored()
                shard = next(shards(self._events(corpus, state.cursor), state.shards, shard_passages))
                shard.stored = stored
                if stored is None:
                    if not entered:
                        stack.enter_context(self.source)
                        entered = True
                    for rows, tokens, mask in batches(shard.passages, self.batch, self.context):
                        _fetch(shard, (rows, begin(self.source, tokens, mask)))
                return shard

            return state.load(remake)

    def _events(self, corpus: Corpus, cursor: Cursor | None):
        events = passages(corpus, self.tokenize, self.context, self.bos, self.max_tokens, cursor)
        if not self.goes_on:
            return events
        return (event for event in events if isinstance(event, Passage) or event.sha256 is not None)

    def finish(self, state: Progress, n: int, stop: Stop) -> None:
        bar = tqdm(unit="shard", disable=not self.progress, desc="indexing")

        def step() -> None:
            bar.update()
            stop.check()

        with bar:
            finish(state, n, step)

    def summary(self, state: Progress, complete: bool, repaired: list[str]) -> dict:
        # What is removed once the summary stands does not count, nor does the copy of the tokenizer.
        spent = (*manifest.spent("all" if state.selection is None else state.selection.mode), "tokenizer")
        size = sum(
            file.stat().st_size
            for file in state.out.rglob("*")
            if file.is_file() and file.relative_to(state.out).parts[0] not in spent
        )
        kept = state.firings if state.selection is None else len(state.selection.kept)
        seconds = time.perf_counter() - self.began
        return {
            "complete": complete, "shards": state.shards, "documents": state.documents, "tokens": state.tokens,
            "firings": state.firings, "kept": kept, "bytes": size, "bytes_per_firing": size / max(kept, 1),
            "seconds": seconds, "tokens_per_second": self.tokens / max(self.forward + self.wait, 1e-9),
            "forward_seconds": self.forward, "write_seconds": self.write, "wait_seconds": self.wait,
            "repaired": repaired,
        }  # fmt: skip


def _release(last: float = 0.0) -> float:
    """Gives freed memory back if the last time is a while ago; the last time, as of now.

    Batches differ in shape, and what one frees the next can't always use. Between two little is in use, so most can go.
    """
    now = time.perf_counter()
    if now - last < _RELEASE_SECONDS:
        return last
    files.release_memory()
    return now


def _fetch(shard: Shard, batch) -> None:
    rows, firings = batch
    shard.found.add(rows, firings())


def shards(events, number: int, size: int):
    """Groups passages into shards of `size`; a document's end goes to the shard of what came right before, or the next.

    A shard closes with its last passage, so that where it ends depends on nothing behind it.
    """
    shard = Shard(number)
    for event in events:
        if isinstance(event, Passage):
            shard.passages.append(event)
        else:
            shard.ends.append(event)
        if len(shard.passages) == size:
            yield shard
            shard = Shard(shard.number + 1)
    shard.last = True
    yield shard
