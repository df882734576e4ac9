"""Ray as the engine: it gives units to workers on whatever nodes there are, and again where a worker or node is lost.

All that lasts is in the folder, as it is for workers with a rank (`distribute`, `units`): Ray is asked which unit to do
where, and to try again, not to keep anything. So a driver that dies loses nothing either; run again, it finds the units
that are done, and a task whose worker was thought lost but lives does no harm.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..interrupt import Stop
from ..objects import is_url
from .distribute import end, finished, open_worker, so_far, tell_idle, working
from .estimate import Estimate
from .run import DEFAULTS, opened
from .units import Worker

RETRIES = 16  # of a unit whose worker was lost; one that takes down every worker ends the run
_POLL = 0.5  # seconds

# What `prepare(device)` returns: corpus, tokenizer and source.
Prepare = Callable[[str], tuple]


def collect_on_ray(
    prepare: Prepare,
    out: str | os.PathLike,
    *,
    engine: str = "ray",
    device: str = "cpu",
    cpus: float = 1,
    confirm: Callable[[Estimate], bool] | None = None,
    progress: bool = False,
    **settings,
) -> dict:
    """`collect` with the units done by tasks on a Ray cluster. The same call goes on where the last one ended.

    Args:
        prepare: gives (corpus, tokenizer, source) for a device; called here, for "cpu", and once in every worker. Ray
            sends it there: a function of an installed module, or a `functools.partial` of one.
        out: a folder that all nodes see under this path, or the URL of one in an object store.
        engine: "ray": the cluster that runs here (or that RAY_ADDRESS names), else one of this machine alone, or that
            of `ray.init`, where it was called; "ray://HOST:PORT": a cluster elsewhere, through its client port.
        device: what workers run on; one that is no "cpu" takes a whole GPU of Ray's.
        cpus: of Ray's, that a worker takes; also its threads.
        settings: mode, n, seed, context, batch, max_tokens, bos, shard_passages, unit of `collect`.

    Returns: the summary, as `collect`.

    Raises:
        ValueError: as `collect`, in a worker too; or Ray is missing, or the engine is none.
        RuntimeError: a unit's worker was lost too often.
    """
    ray = _ray(engine)
    out = out if is_url(out) else Path(out).resolve()
    unknown = sorted(set(settings) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"settings: expected some of {', '.join(DEFAULTS)}, got {', '.join(unknown)}")
    settings = {**DEFAULTS, **settings}
    began = time.perf_counter()
    corpus, tokenizer, source = prepare("cpu")
    with opened(corpus, tokenizer, source, out, settings, True, confirm, progress) as job:
        if isinstance(job, Estimate):
            return {"complete": False, "declined": True, **job.to_json()}
        if (found := finished(job)) is not None:
            return found
        with working(job) as (worker, stop):
            if progress:
                tell_idle(len(worker.units), _places(ray, cpus, device))
            do = ray.remote(num_cpus=cpus, num_gpus=int(device != "cpu"), max_retries=RETRIES)(do_unit)
            # What the units share is sent to a node once.
            recipe = ray.put((prepare, device, str(out), settings, job.digest))
            tasks = [do.remote(recipe, unit.number) for unit in worker.units]
            if not _wait(ray, tasks, stop):
                return so_far(worker, began)
        return end(worker, began)


def _ray(engine: str):
    """The package, connected.

    Raises:
        ValueError: it is missing, or the engine is none.
    """
    if engine != "ray" and not engine.startswith("ray://"):
        raise ValueError(f"engine: expected ray or ray://HOST:PORT, got {engine}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone unasked
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine: needs the ray package: pip install 'writesae[ray]'") from error
    if not ray.is_initialized():
        address = None if engine == "ray" else engine
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of a server's whole traceback
            raise ValueError(f"engine: cannot connect to {engine}: {reason}") from error
    return ray


def _places(ray, cpus: float, device: str) -> int:
    """Workers that the cluster has room for as it stands."""
    has = ray.cluster_resources()
    places = has.get("CPU", 0) / cpus if cpus else float("inf")
    return int(min(places, has.get("GPU", 0) if device != "cpu" else places, 1e9))


def _wait(ray, tasks: list, stop: Stop) -> bool:
    """Until all are done. Whether they are: not, if interrupted; what runs then ends at once, its shards are kept.

    Raises: what a task raised.
    """
    left = tasks
    while left:
        done, left = ray.wait(left, num_returns=min(len(left), 64), timeout=_POLL)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            _cancel(ray, left)
            raise error.cause from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            _cancel(ray, left)
            raise RuntimeError(
                f"a unit's worker was lost {RETRIES + 1} times ({type(error).__name__}); the same command goes on"
            ) from error
        if stop:
            _cancel(ray, left)
            return False
    return True


def _cancel(ray, tasks: list) -> None:
    for task in tasks:
        ray.cancel(task, force=True)


# ---- in a worker -----------------------------------------------------------------------------------------------------

_workers: dict[tuple[str, str], Worker] = {}  # of this process, by folder and manifest: a model is loaded once
_open = ExitStack()  # what they hold, until the process ends


def do_unit(recipe: tuple, number: int) -> int:
    """The task: checks or does a unit. Returns its number."""
    prepare, device, out, settings, digest = recipe
    if (out, digest) not in _workers:
        corpus, tokenizer, source = prepare(device)
        job = _open.enter_context(opened(corpus, tokenizer, source, out, settings, True))
        if isinstance(job, Estimate) or job.digest != digest:
            raise ValueError(f"out: expected the folder of the driver in {out}, got another: do all nodes see one?")
        _workers[out, digest] = open_worker(job, _open)
    worker = _workers[out, digest]
    unit = worker.units[number]
    worker.forget_damaged(unit)
    while not worker.done(unit):
        if not worker.do(unit, Stop()):
            worker.look()
            time.sleep(_POLL)  # a worker that was thought lost is at it; should it be, its lock goes with it
    return number
