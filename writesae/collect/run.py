"""`collect`: a corpus through a source of firings into a folder, shard by shard, from wherever the last run ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from .._installed import version_of
from ..files import entry, make_folder, read_sealed, refuse_links, sync_folder, write_bytes, write_sealed
from ..interrupt import Stop, finishing
from ..models.identity import shown_name, tokenizer_digest
from ..text.corpus import Corpus
from ..text.passages import Cursor, Passage, passages
from ..text.tokens import tokenizing
from . import files, manifest
from .estimate import Estimate, batches, estimate
from .finish import finish
from .manifest import MODES, Watched, tokenizer_files
from .marks import PARTS, damaged, mark, marked
from .modes import Features, Selection
from .shard import Progress, Shard, Writer
from .source import Source, begin
from .verify import verify

INDEX_TOP = 100
_SHARD_FIRINGS = 500_000
_RELEASE_SECONDS = 1.0


def collect(
    corpus: Corpus,
    tokenizer,
    source: Source,
    out: str | os.PathLike,
    *,
    mode: str = "all",
    n: int | None = None,
    seed: int = 0,
    context: int = 512,
    batch: int = 4,
    max_tokens: int | None = None,
    bos: bool = True,
    shard_passages: int | None = None,
    confirm: Callable[[Estimate], bool] | None = None,
    progress: bool = False,
) -> dict:
    """Collects the firings of a corpus. The same call again goes on where the last one ended, however it ended.

    Every file is compared with its digest first; a damaged or missing one is made again, in a finished collection too.

    Args:
        corpus: what to read.
        tokenizer: a Hugging Face tokenizer, or a function from text to token ids.
        source: where firings come from, usually a `ModelSource`.
        out: the folder; new, empty, or holding an unfinished (or finished) collection of the same arguments.
        mode: "all"; "top": the n largest of each feature; "reservoir": a uniform sample of n firings of each feature.
        n: firings kept a feature: for "top" and "reservoir" what is stored (default 1,000), for "all" the firings in
            the index by (feature, -activation) beside the complete log (default 100).
        seed: of the reservoir.
        context: tokens a passage. Every passage starts from an empty state.
        batch: passages run together. More of them take more memory, and pay off on a GPU only.
        max_tokens: stop after this many.
        bos: put `text.tokens.first_token` before each document, where there is one.
        shard_passages: passages a shard, the unit of work that is redone after a kill; default about 500,000 firings.
        confirm: asked with the size estimate before anything is written; returning False ends the run.
        progress: show a bar.

    Returns:
        the summary, also in summary.json: complete, tokens, firings, bytes, bytes_per_firing, tokens_per_second,
        forward_seconds, write_seconds, wait_seconds (the last four of this run alone), repaired (what was wrong with
        shards that this run made again); in summary.json also integrity, the digests of everything.

    Raises:
        ValueError: a bad argument; a folder that is foreign, in use, holds links or a damaged manifest, or is of other
            arguments, another model, dictionary, tokenizer or corpus; a corpus that changes meanwhile; text not UTF-8.
        OSError: the disk is full. What is finished stays, and the same call resumes.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    n = (INDEX_TOP if mode == "all" else 1000) if n is None else n
    for name, value in (("n", n), ("context", context), ("batch", batch), ("max_tokens", max_tokens),
                        ("shard_passages", shard_passages)):  # fmt: skip
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    tokenize, first = tokenizing(tokenizer, bos, getattr(source, "model", None))
    features = Features(source.sites)
    out = Path(out)
    manifest.refuse_foreign(out)
    refuse_links(out)
    measured = None
    if not manifest.begun(out):
        if next((x for x in passages(corpus, tokenize, context, first) if isinstance(x, Passage)), None) is None:
            raise ValueError("corpus: expected text, got documents without any")
        if confirm is not None:
            with source:
                measured = estimate(corpus, tokenize, source, context, batch, max_tokens, mode, n)
            if not confirm(measured):
                return {"complete": False, "declined": True, **measured.to_json()}
    watched = Watched(corpus, progress)
    pinned = {
        "mode": mode, "n": n, "seed": seed, "context": context, "batch": batch, "max_tokens": max_tokens, "bos": first,
        "corpus": watched.pinned, "source": source.fingerprint,
        "tokenizer": {"sha256": tokenizer_digest(tokenizer, tokenize)},
        "sites": [list(vars(site).values()) for site in source.sites],
    }  # fmt: skip
    make_folder(out)
    with files.locked(out):
        manifest.refuse_foreign(out)
        refuse_links(out)
        if not manifest.begun(out):
            _create(out, pinned, shard_passages, source, context, measured, _named(source, tokenizer))
        for folder in (*PARTS, "done", "index"):
            make_folder(out, folder)
        manifest.restore(out)
        asked = pinned if shard_passages is None else {**pinned, "shard_passages": shard_passages}
        content, digest = manifest.check(out, asked)
        if (out / "summary.json").exists():
            found = verify(out)
            for line in found.lines() if progress else ():
                tqdm.write(f"{out}: {line}", file=sys.stderr)
            if not (found.damaged or found.missing):
                _remove_spent(out, mode)
                return read_sealed(out / "summary.json")
            # What the collection ended with is made again, from the shards that are sound.
            (out / "summary.json").unlink()
            sync_folder(out)
        _keep_tokenizer(out, tokenizer, digest)
        selection = None if mode == "all" else Selection(n, features.total, mode, seed)
        session = _Session(tokenize, first, source, context, batch, max_tokens, progress)
        state = Progress(out, features, selection, digest, lambda shard: _check_text(watched, shard))
        repaired = session.load(corpus, state, content["shard_passages"])
        with finishing("shard") as stop:
            session.run(corpus, state, content["shard_passages"], (content["estimate"] or {}).get("tokens"), stop)
            if stop or not state.last:
                return session.summary(state, False, repaired)
            session.finish(state, n, stop)
        summary = session.summary(state, True, repaired)
        left = [out / "documents.parquet", out / "features.parquet"]
        entries = {path.name: entry(path) for path in left}
        integrity = {"manifest": digest, "shards": state.digest, "files": entries}
        write_sealed(out / "summary.json", {**summary, "integrity": integrity})
        _remove_spent(out, mode)
        return read_sealed(out / "summary.json")


def _check_text(watched: Watched, shard: Shard) -> None:
    """A shard is kept only if the files it was read from are still what the manifest says."""
    touched = [p.after.place[0] for p in shard.passages]
    if touched:
        watched.check(min(touched), max(touched))
    if shard.last:
        watched.check_all()


class _Session:
    """One run's way through the corpus, with its clock."""

    def __init__(self, tokenize, bos, source, context, batch, max_tokens, progress):
        self.tokenize, self.bos, self.source = tokenize, bos, source
        self.context, self.batch, self.max_tokens, self.progress = context, batch, max_tokens, progress
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
                for shard in _shards(self._events(corpus, state.cursor), state.shards, shard_passages):
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
            self.write, self.wait = writer.seconds, writer.waited

    def load(self, corpus: Corpus, state: Progress, shard_passages: int) -> list[str]:
        """Takes up the shards that stand, making damaged ones again. Returns what was wrong with those."""
        with ExitStack() as stack:
            entered = False

            def remake(wrong: str) -> Shard:
                nonlocal entered
                if self.progress:
                    tqdm.write(f"made again: {wrong}", file=sys.stderr)
                stored = state.stored()
                shard = next(_shards(self._events(corpus, state.cursor), state.shards, shard_passages))
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
        return passages(corpus, self.tokenize, self.context, self.bos, self.max_tokens, cursor)

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


def _shards(events, number: int, size: int):
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


def _create(out: Path, pinned: dict, shard_passages: int | None, source: Source, context: int, measured, more) -> None:
    rate = measured.firings_per_token if measured else sum(s.k or s.features / 16 for s in source.sites)
    # A shard counts every feature once, so it should hold several firings a feature.
    wanted = max(_SHARD_FIRINGS, 8 * sum(s.features for s in source.sites))
    size = shard_passages or max(1, round(wanted / max(rate * context, 1)))
    estimated = None if measured is None else measured.to_json()
    manifest.make(out, {"shard_passages": size, "estimate": estimated, "named": more, **pinned})


def _named(source, tokenizer) -> dict:
    """What a reader would look for by name; not compared on resuming, because a folder may have moved."""
    found = dict(getattr(source, "names", {}))
    found["tokenizer"] = shown_name(getattr(tokenizer, "name_or_path", None))
    return found | {name: version_of(name) for name in ("writesae", "torch", "transformers", "pyarrow")}


def _keep_tokenizer(out: Path, tokenizer, digest: str) -> None:
    """Writes the tokenizer's files and their marker, unless they stand."""
    try:
        made = marked(out, "tokenizer", digest)
        if not damaged(out, made):
            return
    except ValueError:
        pass
    folder = make_folder(out, "tokenizer")
    content = tokenizer_files(tokenizer)
    for path in folder.iterdir():
        if path.name not in content:
            path.unlink()
    for name, data in content.items():
        write_bytes(folder / name, data, out)
    mark(out, "tokenizer", [folder / name for name in content], digest)


def _remove_spent(out: Path, mode: str) -> None:
    for folder in manifest.spent(mode):
        for path in (out / folder).glob("part-*.parquet"):
            path.unlink()
