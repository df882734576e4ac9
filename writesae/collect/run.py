"""`collect`: a corpus through a source of firings into a folder, shard by shard, from wherever the last run ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from ..text.corpus import Corpus
from ..text.passages import Cursor, Passage, passages
from ..text.tokens import tokenizing
from . import files
from .estimate import Estimate, batches, estimate
from .finish import finish
from .modes import MODES, Features, Selection
from .shard import PARTS, Progress, Shard, Writer
from .source import Source, begin

FORMAT, VERSION = "writesae-firings", 1
INDEX_TOP = 100
_SHARD_FIRINGS = 500_000
_RELEASE_SECONDS = 1.0
_OURS = {".lock", "manifest.json.tmp"}


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
        forward_seconds, write_seconds, wait_seconds (the last four of this run alone).

    Raises:
        ValueError: a bad argument; a folder that is foreign, damaged, in use, or of other arguments; text not UTF-8.
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
    pinned = {
        "mode": mode, "n": n, "seed": seed, "context": context, "batch": batch, "max_tokens": max_tokens, "bos": first,
        "corpus": corpus.fingerprint(), "source": source.fingerprint,
        "sites": [list(vars(site).values()) for site in source.sites],
    }  # fmt: skip
    out = Path(out)
    _refuse_foreign(out)
    session = _Session(tokenize, first, source, context, batch, max_tokens, progress)
    measured = None
    if not (out / "manifest.json").exists():
        if next((x for x in passages(corpus, tokenize, context, first) if isinstance(x, Passage)), None) is None:
            raise ValueError("corpus: expected text, got documents without any")
        if confirm is not None:
            with source:
                measured = estimate(corpus, tokenize, source, context, batch, max_tokens, mode, n)
            if not confirm(measured):
                return {"complete": False, "declined": True, **measured.to_json()}
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out):
        _refuse_foreign(out)
        manifest = _manifest(out, pinned, shard_passages, source, context, measured)
        for folder in (*PARTS, "done", "index"):
            (out / folder).mkdir(exist_ok=True)
        selection = None if mode == "all" else Selection(n, features.total, mode, seed)
        state = Progress(out, features, selection)
        state.load()
        if not (out / "summary.json").exists():
            session.run(corpus, state, manifest["shard_passages"], (manifest["estimate"] or {}).get("tokens"))
            if not state.last:
                return session.summary(state, complete=False)
            session.finish(state, n)
            summary = session.summary(state, complete=True)
            files.write_json(out / "summary.json", summary)
        _remove_spent(out, mode)
        return files.read_json(out / "summary.json")


class _Session:
    """One run's way through the corpus, with its clock."""

    def __init__(self, tokenize, bos, source, context, batch, max_tokens, progress):
        self.tokenize, self.bos, self.source = tokenize, bos, source
        self.context, self.batch, self.max_tokens, self.progress = context, batch, max_tokens, progress
        self.began = time.perf_counter()
        self.forward = self.write = self.wait = 0.0
        self.tokens = 0

    def run(self, corpus: Corpus, state: Progress, shard_passages: int, expected: int | None) -> None:
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
                stop = stack.enter_context(_interrupt())
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
                    if stop.is_set():
                        break
                writer.close()
        except BaseException:
            writer.abandon()
            raise
        finally:
            self.write, self.wait = writer.seconds, writer.waited

    def _events(self, corpus: Corpus, cursor: Cursor | None):
        return passages(corpus, self.tokenize, self.context, self.bos, self.max_tokens, cursor)

    def finish(self, state: Progress, n: int) -> None:
        with _interrupt() as stop:
            bar = tqdm(unit="shard", disable=not self.progress, desc="indexing")

            def step() -> None:
                bar.update()
                if stop.is_set():
                    raise KeyboardInterrupt

            with bar:
                finish(state, n, step)

    def summary(self, state: Progress, complete: bool) -> dict:
        # What is removed once the summary stands does not count.
        spent = _spent("all" if state.selection is None else state.selection.mode)
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


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    if not out.is_dir() or (out / "manifest.json").exists():
        return
    others = sorted(path.name for path in out.iterdir() if path.name not in _OURS)
    if others:
        raise ValueError(
            f"out: expected a new or empty folder or a collection of writesae, got {out} with {', '.join(others[:5])} "
            "and no manifest.json"
        )


def _manifest(out: Path, pinned: dict, shard_passages: int | None, source: Source, context: int, measured) -> dict:
    path = out / "manifest.json"
    if not path.exists():
        rate = measured.firings_per_token if measured else sum(s.k or s.features / 16 for s in source.sites)
        # A shard counts every feature once, so it should hold several firings a feature.
        wanted = max(_SHARD_FIRINGS, 8 * sum(s.features for s in source.sites))
        size = shard_passages or max(1, round(wanted / max(rate * context, 1)))
        estimated = None if measured is None else measured.to_json()
        manifest = {"format": FORMAT, "version": VERSION, "shard_passages": size, "estimate": estimated, **pinned}
        files.write_json(path, manifest)
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"out: {path} is not the manifest of a collection of this version ({FORMAT} {VERSION})")
    asked = dict(pinned)
    if shard_passages is not None:
        asked["shard_passages"] = shard_passages
    differing = _differences({name: manifest.get(name) for name in asked}, asked)
    if differing:
        raise ValueError(f"out: {out} holds a collection with other arguments: {'; '.join(differing)}")
    return manifest


def _differences(stored: dict, asked: dict, prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*stored, *asked}):
        a, b = stored.get(name), asked.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} is {a!r} there, {b!r} here")
    return found


def _spent(mode: str) -> tuple[str, ...]:
    """Folders of shard files that the files written at the end take the place of."""
    return ("counts", "documents") if mode == "all" else ("counts", "documents", "firings")


def _remove_spent(out: Path, mode: str) -> None:
    for folder in _spent(mode):
        for path in (out / folder).glob("part-*.parquet"):
            path.unlink()


@contextmanager
def _interrupt():
    """The first Ctrl-C asks for a stop after the shard in hand, the second one stops at once (the shard is redone)."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        tqdm.write("stopping after this shard; once more to stop at once")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
