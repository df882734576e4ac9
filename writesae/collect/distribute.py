"""Several workers fill one folder: who does which unit, what they tell, and who ends it.

A worker does the units whose number is its rank modulo the number of workers, then whatever is neither done nor being
done; when all are done, whoever comes first puts documents, totals and index together. Workers know of one another by
the folder alone: they may be of different runs, start when they like, and die.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from ..files import discard, read_sealed, sync_folder
from ..interrupt import Stop, finishing
from ..progress import tqdm
from ..text.passages import passages
from . import files, plan
from .assemble import put_together, sweep
from .plan import Unit
from .run import Job, keep_tokenizer
from .unit_marks import marker_path, unit_marker
from .units import Worker
from .verify import verify

_POLL = 0.5  # seconds between two looks at what other workers do


def collect_units(job: Job, rank: int = 0, world_size: int = 1) -> dict:
    """Does this worker's share of an open collection, then what others left; see `run.collect`."""
    began = time.perf_counter()
    if (found := finished(job)) is not None:
        return found
    with working(job) as (worker, stop):
        share = [unit for unit in worker.units if unit.number % world_size == rank]
        for unit in share:
            worker.forget_damaged(unit, digests=True)
        at = share[0].number if share else 0
        others = [unit for unit in (*worker.units[at:], *worker.units[:at]) if unit.number % world_size != rank]
        if not work(worker, [*share, *others], stop):
            return so_far(worker, began)
    # The line has ended, and the model has let go of what it took to run.
    return end(worker, began)


@contextmanager
def working(job: Job) -> Iterator[tuple[Worker, Stop]]:
    """A worker, its interrupts, and the progress line over all workers."""
    with ExitStack() as stack:
        worker = open_worker(job, stack)
        stop = stack.enter_context(finishing("shard"))
        stack.enter_context(line(job, worker.units))
        yield worker, stop


def open_worker(job: Job, stack: ExitStack) -> Worker:
    """A worker of an open collection, whose plan is made by whoever comes first. `stack` lets go of its source."""
    keep_tokenizer(job)
    job.session.progress = False
    job.session.source = held = Held(job.source)
    stack.callback(held.close)
    return Worker(job, planned(job))


def planned(job: Job) -> list[Unit]:
    """The plan, made if there is none; a damaged one is made again, for it follows from the manifest."""
    path, session, content = job.out / plan.PLAN, job.session, job.content
    try:
        return plan.read(job.out, job.digest)
    except ValueError:
        discard(path)
    limit = content["max_tokens"]
    events = None
    if limit is not None:
        events = passages(job.corpus, session.tokenize, content["context"], session.bos, limit)
    plan.write(job.out, plan.cut(job.corpus, content["unit"], job.digest, events), job.digest)
    return plan.read(job.out, job.digest)


class Held:
    """A source that is entered when a unit first needs it, and left with `close`: not once a unit."""

    def __init__(self, source):
        self._source, self._stack = source, ExitStack()
        self._entered = False

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def __enter__(self) -> Held:
        if not self._entered:
            self._stack.enter_context(self._source)
            self._entered = True
        return self

    def __exit__(self, *error) -> None:
        pass

    def close(self) -> None:
        self._entered = False
        self._stack.close()


def work(worker: Worker, units: list[Unit], stop: Stop) -> bool:
    """Does units, in this order, until all are done, by whomever. Whether they are: not, if interrupted.

    While others are at the last ones it waits, to take up what is left of them should they die.
    """
    while True:
        left = [unit for unit in units if not worker.done(unit)]
        if not left:
            return True
        did = False
        for unit in left:
            did |= worker.do(unit, stop)
            if stop:
                return False
        if not did:
            time.sleep(_POLL)


def finished(job: Job) -> dict | None:
    """The summary of a collection that is finished and sound; of a damaged one, what is damaged is taken away."""
    out = job.out
    if not (out / "summary.json").exists():
        return None
    with files.claimed(out / ".finish", wait=True):
        found = verify(out)
        for problem in found.lines() if job.progress else ():
            tqdm.write(f"{out}: {problem}", file=sys.stderr)
        if not (found.damaged or found.missing):
            sweep(out, job.content, job.digest)
            return read_sealed(out / "summary.json")
        discard(out / "summary.json")
        sync_folder(out)
        worker = Worker(job, planned(job))
        for unit in worker.units:
            worker.forget_damaged(unit, digests=True)
    return None


def end(worker: Worker, began: float) -> dict:
    """Puts the units together, or waits for who does."""
    job = worker.job
    with finishing("part of the index") as stop, files.claimed(job.out / ".finish", wait=True):
        if not (job.out / "summary.json").exists():
            numbers = range(len(worker.units))
            own_part = partial(own, worker, began)
            put_together(job.out, job.content, job.digest, numbers, own_part, job.progress, stop)
        else:  # another worker did; this one may have touched locks since
            sweep(job.out, job.content, job.digest)
        return read_sealed(job.out / "summary.json")


def own(worker: Worker, began: float) -> dict:
    """What a summary says of this worker's run alone."""
    session = worker.job.session
    return {
        "seconds": time.perf_counter() - began,
        "tokens_per_second": session.tokens / max(session.forward + session.wait, 1e-9),
        "forward_seconds": session.forward, "write_seconds": session.write, "wait_seconds": session.wait,
        "repaired": worker.repaired,
    }  # fmt: skip


def so_far(worker: Worker, began: float) -> dict:
    """The summary of an unfinished collection: sums of its finished units."""
    job = worker.job
    made = [unit_marker(job.out, unit.number, job.digest) for unit in worker.units if worker.done(unit)]
    sums = {name: sum(m[name] for m in made) for name in ("shards", "documents", "tokens", "firings", "kept")}
    return {"complete": False, "units": len(worker.units), "units_done": len(made), **sums, **own(worker, began)}


# ---- the progress line -----------------------------------------------------------------------------------------------


class Overview:
    """What all workers have done so far, by the folder; files are read once."""

    def __init__(self, out: Path, units: list[Unit], digest: str):
        self.out, self.units, self.digest = out, units, digest
        self._done: dict[int, int] = {}  # tokens of finished units
        self._shards: dict[Path, int] = {}  # and of shards of the others

    def look(self) -> tuple[int, int, int]:
        """(tokens, units done, units begun and not done)."""
        under_way: set[int] = set()
        tokens = 0
        for unit in self.units:
            if unit.number not in self._done and marker_path(self.out, unit.number).exists():
                try:
                    self._done[unit.number] = unit_marker(self.out, unit.number, self.digest)["tokens"]
                except ValueError:
                    continue  # damaged: to be done again
        for path in (self.out / "units").glob("*/done/part-*.json"):
            number = path.parts[-3].split("-")[0]
            if not number.isdecimal() or int(number) in self._done:
                continue
            under_way.add(int(number))
            try:
                if path not in self._shards:
                    self._shards[path] = int(read_sealed(path)["tokens"])
                tokens += self._shards[path]
            except (ValueError, KeyError):
                continue
        return tokens + sum(self._done.values()), len(self._done), len(under_way)


@contextmanager
def line(job: Job, units: list[Unit]) -> Iterator[None]:
    """A progress line over all workers, while the body runs."""
    if not job.progress:
        yield
        return
    expected = job.content["max_tokens"] or (job.content["estimate"] or {}).get("tokens")
    overview, ended = Overview(job.out, units, job.digest), threading.Event()
    with tqdm(total=expected, unit="tok", unit_scale=True, desc="collecting") as bar:
        bar.n = bar.initial = overview.look()[0]

        def follow() -> None:
            while not ended.wait(1.0):
                tokens, done, begun = overview.look()
                bar.set_postfix_str(f"{done} of {len(units)} units, {begun} under way", refresh=False)
                bar.update(tokens - bar.n)

        thread = threading.Thread(target=follow, name="writesae-line", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
