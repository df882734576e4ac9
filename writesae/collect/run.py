"""`collect`: a corpus through a source of firings into a folder, shard by shard, from wherever the last run ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .._installed import version_of
from ..files import (
    discard,
    entry,
    left_over,
    make_folder,
    read_sealed,
    refuse_links,
    sync_folder,
    write_bytes,
    write_sealed,
)  # fmt: skip
from ..interrupt import finishing
from ..models.identity import shown_name, tokenizer_digest
from ..progress import tqdm
from ..text.corpus import Corpus
from ..text.passages import Passage, passages
from ..text.tokens import tokenizing
from . import files, manifest, mirror
from .estimate import Estimate, estimate
from .finish import Selecting
from .manifest import MODES, Watched, tokenizer_files
from .marks import PARTS, marked, marker
from .mirror import Place
from .modes import Features, Selection
from .session import Session
from .shard import Progress, Shard
from .source import Source
from .verify import verify

INDEX_TOP = 100
_SHARD_FIRINGS = 500_000
_UNIT_SHARDS = 4
_TOKEN_BYTES = 4  # of text
DEFAULTS: dict = {"mode": "all", "n": None, "seed": 0, "context": 512, "batch": 4, "max_tokens": None, "bos": True,
                  "shard_passages": None, "unit": None}  # fmt: skip


def collect(
    corpus: Corpus,
    tokenizer,
    source: Source,
    out: str | os.PathLike | mirror.Place,
    *,
    mode: str = "all",
    n: int | None = None,
    seed: int = 0,
    context: int = 512,
    batch: int = 4,
    max_tokens: int | None = None,
    bos: bool = True,
    shard_passages: int | None = None,
    unit: int | None = None,
    rank: int = 0,
    world_size: int | None = None,
    confirm: Callable[[Estimate], bool] | None = None,
    progress: bool = False,
) -> dict:
    """Collects the firings of a corpus. The same call again goes on where the last one ended, however it ended.

    With `world_size` several processes, on one machine or many that see the same folder, fill it together: the corpus
    is cut into units, see `plan`, of which any worker does any once; see `units`. One worker leaves the same tables.

    Every file is compared with its digest first; a damaged or missing one is made again, in a finished collection too.

    Args:
        corpus: what to read.
        tokenizer: a Hugging Face tokenizer, or a function from text to token ids.
        source: where firings come from, usually a `ModelSource`.
        out: the folder; new, empty, or holding an unfinished (or finished) collection of the same arguments. Or the
            URL of one in an object store, see `mirror`, which is filled by units, by one worker too.
        mode: "all"; "top": the n largest of each feature; "reservoir": a uniform sample of n firings of each feature.
        n: firings kept a feature: for "top" and "reservoir" what is stored (default 1,000), for "all" the firings in
            the index by (feature, -activation) beside the complete log (default 100).
        seed: of the reservoir.
        context: tokens a passage. Every passage starts from an empty state.
        batch: passages run together. More of them take more memory, and pay off on a GPU only.
        max_tokens: stop after this many.
        bos: put `text.tokens.first_token` before each document, where there is one.
        shard_passages: passages a shard, what is redone after a kill; default about 500,000 firings.
        unit: bytes of text a unit, at least (a document is never cut); default, where there are several workers or the
            folder was begun by some, four shards' worth; otherwise all is one.
        rank, world_size: of this worker among how many; it does the units of its rank first, then what others left.
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
    settings = {"mode": mode, "n": n, "seed": seed, "context": context, "batch": batch, "max_tokens": max_tokens,
                "bos": bos, "shard_passages": shard_passages, "unit": unit}  # fmt: skip
    if world_size is not None and not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size, got {rank} of {world_size}")
    with opened(corpus, tokenizer, source, out, settings, world_size is not None, confirm, progress) as job:
        if isinstance(job, Estimate):
            return {"complete": False, "declined": True, **job.to_json()}
        if job.content.get("unit") is None:
            return _alone(job)
        from .distribute import collect_units

        return collect_units(job, rank, world_size or 1)


@dataclass
class Job:
    """A collection's folder, open, and all that it takes to fill it.

    Attributes:
        where: the folder, or the object store that it stands for. content, digest: the manifest and its digest.
        watched: the corpus's files, which must stay as they are.
    """

    corpus: Corpus
    tokenizer: object
    source: Source
    where: Place
    content: dict
    digest: str
    watched: Watched
    features: Features
    session: Session
    progress: bool

    @property
    def out(self) -> Path:
        return self.where.path

    @property
    def n(self) -> int:
        return self.content["n"]

    @property
    def mode(self) -> str:
        return self.content["mode"]

    def selection(self) -> Selection | None:
        return None if self.mode == "all" else Selecting.of(self.content).new(self.features.total)


@contextmanager
def opened(
    corpus: Corpus,
    tokenizer,
    source: Source,
    out: str | os.PathLike | mirror.Place,
    settings: dict,
    several: bool,
    confirm: Callable[[Estimate], bool] | None = None,
    progress: bool = False,
) -> Iterator[Job | Estimate]:
    """The folder of a collection, begun or taken up, and held: by one process, or shared by those that do its units.

    Args: settings: of `collect`, by name; several: whether this is one of several workers.

    Yields: the job; the estimate, if `confirm` declined it.

    Raises: as `collect`.
    """
    asked = dict(settings)
    mode, context, batch, limit = (asked[name] for name in ("mode", "context", "batch", "max_tokens"))
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    n = (INDEX_TOP if mode == "all" else 1000) if asked["n"] is None else asked["n"]
    for name in ("n", "context", "batch", "max_tokens", "shard_passages", "unit"):
        if asked[name] is not None and asked[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {asked[name]}")
    tokenize, first = tokenizing(tokenizer, asked["bos"], getattr(source, "model", None))
    where = mirror.place_of(out)
    out = where.path
    several |= where.remote
    with where.beginning():
        manifest.refuse_foreign(out)
        refuse_links(out)
    measured = None
    if not manifest.begun(out):
        if next((x for x in passages(corpus, tokenize, context, first) if isinstance(x, Passage)), None) is None:
            raise ValueError("corpus: expected text, got documents without any")
        if confirm is not None:
            with source:
                measured = estimate(corpus, tokenize, source, context, batch, limit, mode, n)
            if not confirm(measured):
                yield measured
                return
    make_folder(out)
    shared = several or asked["unit"] is not None or manifest.in_units(out)
    with files.locked(out, shared=shared):
        watched = Watched(corpus, progress, out if shared and not (out / "summary.json").exists() else None)
        pinned = {
            "mode": mode, "n": n, "seed": asked["seed"], "context": context, "batch": batch, "max_tokens": limit,
            "bos": first, "corpus": watched.pinned, "source": source.fingerprint,
            "tokenizer": {"sha256": tokenizer_digest(tokenizer, tokenize)},
            "sites": [list(vars(site).values()) for site in source.sites],
        }  # fmt: skip
        with where.beginning():
            manifest.refuse_foreign(out)
            refuse_links(out)
            if not manifest.begun(out):
                sizes = {"shard_passages": asked["shard_passages"], "unit": asked["unit"] or (0 if shared else None)}
                _create(out, pinned, sizes, source, measured, _named(source, tokenizer))
            for folder in ("units", "done", "index") if shared else (*PARTS, "done", "index"):
                make_folder(out, folder)
            manifest.restore(out)
            where.publish()
        pinned |= {name: asked[name] for name in ("shard_passages", "unit") if asked[name] is not None}
        content, digest = manifest.check(out, pinned)
        if shared and content.get("unit") is None:
            raise ValueError(f"out: {where} holds a collection of one process; several workers need another folder")
        session = Session(tokenize, first, source, context, batch, limit, progress)
        job = Job(corpus, tokenizer, source, where, content, digest, watched, Features(source.sites), session, progress)
        yield job


def _alone(job: Job) -> dict:
    """Fills a folder that no other process fills."""
    out, session, content = job.out, job.session, job.content
    if (out / "summary.json").exists():
        found = verify(out)
        for line in found.lines() if job.progress else ():
            tqdm.write(f"{out}: {line}", file=sys.stderr)
        if not (found.damaged or found.missing):
            _remove_spent(out, job.mode)
            return read_sealed(out / "summary.json")
        # What the collection ended with is made again, from the shards that are sound.
        (out / "summary.json").unlink()
        sync_folder(out)
    keep_tokenizer(job)
    state = Progress(out, job.features, job.selection(), job.digest, lambda shard: _check_text(job.watched, shard))
    repaired = session.load(job.corpus, state, content["shard_passages"])
    with finishing("shard") as stop:
        expected = (content["estimate"] or {}).get("tokens")
        session.run(job.corpus, state, content["shard_passages"], expected, stop)
        if stop or not state.last:
            return session.summary(state, False, repaired)
        session.finish(state, job.n, stop)
    summary = session.summary(state, True, repaired)
    left = [out / "documents.parquet", out / "features.parquet"]
    entries = {path.name: entry(path) for path in left}
    integrity = {"manifest": job.digest, "shards": state.digest, "files": entries}
    write_sealed(out / "summary.json", {**summary, "integrity": integrity})
    _remove_spent(out, job.mode)
    return read_sealed(out / "summary.json")


def _check_text(watched: Watched, shard: Shard) -> None:
    """A shard is kept only if the files it was read from are still what the manifest says."""
    touched = [p.after.place[0] for p in shard.passages]
    if touched:
        watched.check(min(touched), max(touched))
    if shard.last:
        watched.check_all()


def _create(out: Path, pinned: dict, sizes: dict, source: Source, measured, more) -> None:
    """Args: sizes: shard_passages, None for the usual; unit: bytes, 0 for the usual, None: all is one."""
    rate = measured.firings_per_token if measured else sum(s.k or s.features / 16 for s in source.sites)
    # A shard counts every feature once, so it should hold several firings a feature.
    wanted = max(_SHARD_FIRINGS, 8 * sum(s.features for s in source.sites))
    size = sizes["shard_passages"] or max(1, round(wanted / max(rate * pinned["context"], 1)))
    unit = _UNIT_SHARDS * _TOKEN_BYTES * size * pinned["context"] if sizes["unit"] == 0 else sizes["unit"]
    more = {"estimate": None if measured is None else measured.to_json(), "named": more}
    if pinned["mode"] == "reservoir":
        more["salt"] = int(pinned["corpus"]["sha256"][:15], 16)
    manifest.make(out, {"shard_passages": size, **({} if unit is None else {"unit": unit}), **more, **pinned})


def _named(source, tokenizer) -> dict:
    """What a reader would look for by name; not compared on resuming, because a folder may have moved."""
    found = dict(getattr(source, "names", {}))
    found["tokenizer"] = shown_name(getattr(tokenizer, "name_or_path", None))
    return found | {name: version_of(name) for name in ("writesae", "torch", "transformers", "pyarrow")}


def keep_tokenizer(job: Job) -> None:
    """Writes the tokenizer's files and their marker, unless they stand."""
    out = job.out
    try:
        made = marked(out, "tokenizer", job.digest)
        if not any(job.where.problem(name, expected) for name, expected in made["files"].items()):
            return
    except ValueError:
        pass
    folder = make_folder(out, "tokenizer")
    content = tokenizer_files(job.tokenizer)
    for path in folder.iterdir():
        if path.name not in content and left_over(path) is None:  # which another worker may be writing
            discard(path)
    for name, data in content.items():
        write_bytes(folder / name, data, out)
    job.where.send(*(f"tokenizer/{name}" for name in content))
    job.where.write("done/tokenizer.json", marker(out, [folder / name for name in content], job.digest))


def _remove_spent(out: Path, mode: str) -> None:
    for folder in manifest.spent(mode):
        for path in (out / folder).glob("part-*.parquet"):
            path.unlink()
