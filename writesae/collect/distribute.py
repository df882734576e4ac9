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
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from ..files import read_sealed, sync_folder
from ..interrupt import Stop, finishing
from ..progress import tqdm
from ..text.passages import BLOCK, Cursor, passages
from . import files, plan
from .assemble import put_together, sweep
from .plan import Unit
from .run import Job, keep_tokenizer
from .unit_marks import marker_name, unit_marker, unit_numbers
from .units import Worker
from .verify import verify


def collect_units(job: Job, rank: int = 0, world_size: int = 1) -> dict:
    """Does this worker's share of an open collection, then what others left; see `run.collect`."""
    began = time.perf_counter()
    if (found := finished(job)) is not None:
        return found
    with working(job) as (worker, stop):
        if job.progress and rank == 0:
            tell_idle(len(worker.units), world_size)
        share = [unit for unit in worker.units if unit.number % world_size == rank]
        for unit in share:
            worker.forget_damaged(unit)
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
    """The plan, made by one worker while others wait; a damaged one is made again, for it follows from the manifest."""
    try:
        return plan.read(job.out, job.digest)
    except ValueError:
        with files.claimed(job.out / ".plan", wait=True):
            return _plan(job)


def _plan(job: Job) -> list[Unit]:
    try:
        return plan.read(job.out, job.digest)  # another worker was first
    except ValueError:
        job.where.discard(plan.PLAN)
    session, content = job.session, job.content

    def read(corpus, limit: int | None, start: Cursor):
        return passages(corpus, session.tokenize, content["context"], session.bos, limit, start)

    units = plan.cut(job.corpus, content["unit"], job.digest, read, content["max_tokens"])
    names = {unit.number: unit.name for unit in units}
    for number in unit_numbers(job.out):
        with suppress(ValueError):  # damaged: it will be found out
            if not unit_marker(job.out, number)["folder"].startswith(f"units/{names.get(number)}-"):
                # Done by the plan of another release, which cut elsewhere.
                job.where.discard(f"done/{marker_name(number)}.json")
    plan.write(job.where, units, job.digest)
    return plan.read(job.out, job.digest)


def tell_idle(units: int, workers: int) -> None:
    """Says so where there are more workers than units."""
    if workers > units:
        tqdm.write(
            f"writesae collect: {workers - units} of {workers} workers will find nothing to do: the corpus is {units} "
            f"{'unit' if units == 1 else 'units'} (a smaller --unit gives more; a document that is packed, or shorter "
            f"than {BLOCK // 1024} KiB, is never cut)",
            file=sys.stderr,
        )


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
            time.sleep(worker.job.where.poll)
            worker.look()


def finished(job: Job) -> dict | None:
    """The summary of a collection that is finished and sound; of a damaged one, what is damaged is taken away."""
    out = job.out
    if not (out / "summary.json").exists():
        return None
    with files.claimed(out / ".finish", wait=True):
        found = verify(job.where)
        for problem in found.lines() if job.progress else ():
            tqdm.write(f"{job.where}: {problem}", file=sys.stderr)
        if not (found.damaged or found.missing):
            sweep(job.where, job.content, job.digest)
            return read_sealed(out / "summary.json")
        job.where.discard("summary.json")
        sync_folder(out)
        worker = Worker(job, planned(job))
        for unit in worker.units:
            worker.forget_damaged(unit)
    return None


def end(worker: Worker, began: float) -> dict:
    """Puts the units together, or waits for who does."""
    job = worker.job
    with finishing("part of the index") as stop, files.claimed(job.out / ".finish", wait=True):
        worker.look()
        if not (job.out / "summary.json").exists():
            numbers = range(len(worker.units))
            own_part = partial(own, worker, began)
            try:
                put_together(job.where, job.content, job.digest, numbers, own_part, job.progress, stop)
            except ValueError:
                # In an object store, where nothing holds others back, one may have ended it, and removed what is spent.
                worker.look()
                if not job.where.remote or not (job.out / "summary.json").exists():
                    raise
        else:  # another worker did; this one may have touched locks since
            sweep(job.where, job.content, job.digest)
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

    def __init__(self, out: Path, digest: str):
        self.out, self.digest = out, digest
        self._done: dict[int, int] = {}  # tokens of finished units
        self._shards: dict[Path, int] = {}  # and of shards of the others

    def look(self) -> tuple[int, int, int]:
        """(tokens, units done, units begun and not done)."""
        under_way: set[int] = set()
        tokens = 0
        for number in unit_numbers(self.out):
            if number not in self._done:
                with suppress(ValueError):  # damaged: to be done again
                    self._done[number] = unit_marker(self.out, number, self.digest)["tokens"]
        for folder in (self.out / "units").iterdir():
            begins = folder.name.split("-")[0]
            if not begins.isdecimal() or int(begins) in self._done or folder.name.endswith(".lock"):
                continue
            under_way.add(int(begins))
            for path in folder.glob("done/part-*.json"):
                with suppress(ValueError, KeyError):
                    if path not in self._shards:
                        self._shards[path] = int(read_sealed(path)["tokens"])
                    tokens += self._shards[path]
        return tokens + sum(self._done.values()), len(self._done), len(under_way)


@contextmanager
def line(job: Job, units: list[Unit]) -> Iterator[None]:
    """A progress line over all workers, while the body runs."""
    if not job.progress:
        yield
        return
    expected = job.content["max_tokens"] or (job.content["estimate"] or {}).get("tokens")
    overview, ended = Overview(job.out, job.digest), threading.Event()
    # What is left takes as long as what all did since this worker came, not as their last few seconds: shards come in
    # bursts.
    with tqdm(total=expected, unit="tok", unit_scale=True, desc="collecting", smoothing=0) as bar:
        bar.n = bar.initial = overview.look()[0]

        def follow() -> None:
            pause = 1.0
            while not ended.wait(pause):
                began = time.perf_counter()
                tokens, done, begun = overview.look()
                pause = max(1.0, 50 * (time.perf_counter() - began))  # a slow disk is asked less often
                bar.set_postfix_str(f"{done} of {len(units)} units, {begun} under way", refresh=False)
                bar.update(tokens - bar.n)

        thread = threading.Thread(target=follow, name="writesae-line", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
