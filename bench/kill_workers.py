"""`kill -9` of workers that fill one folder together, at random moments: are the tables those of one worker?

    python bench/kill_workers.py [--kills 50] [--workers 2] [--tokens 40000] [--unit 12000] [--sae FOLDER]
    python bench/kill_workers.py --engine ray [--kills 50] [--nodes 3]

Every round collects the same text into a new folder by several workers, killing one of them at a random time and
starting it again, until the collection completes; rounds go on, through all three modes, until there were enough kills.
Each folder is then compared, table by table, to what one worker left, and verified. Workers are forked from a process
that has loaded the embedded model, so that kills fall into their work and not into its loading; each has one thread.

With `--engine ray` the units are tasks on a Ray cluster of several nodes on this machine (needs `writesae[ray]`), and
what is killed is, at random, a worker, a node (another joins) or the driver (which is run again).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from common import end, row, tables

from writesae import cli
from writesae.collect import collect
from writesae.collect.command import prepare
from writesae.collect.verify import verify
from writesae.default.corpus import stdlib_files

MODES = ("all", "top", "reservoir")


def documents(folder: Path, size: int, length: int = 3000) -> None:
    """A folder of documents of `length` characters, out of the standard library's sources."""
    folder.mkdir()
    number = 0
    for path in stdlib_files("validation"):
        source = path.read_text(errors="ignore")
        for at in range(0, len(source), length):
            (folder / f"{number:05d}.txt").write_text(source[at : at + length])
            number, size = number + 1, size - length
            if size < 0:
                return


def count(out: Path) -> int:
    """Units that are done."""
    return len(list((out / "done").glob("unit-*.json")))


def one_thread() -> None:
    """To be called before anything is computed: a process forked from one with a pool of threads waits for it."""
    torch.set_num_threads(1)


def forked(run) -> int:
    """The number of a process that does `run` and ends with status 0 if that ended well."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = 0 if run()["complete"] else 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Workers:
    """Processes that are killed and started again.

    Args: runs: what each does.
    """

    def __init__(self, runs: list):
        self.runs = runs
        self.pids: list[int | None] = [forked(run) for run in runs]
        self.statuses: list[int | None] = [None] * len(runs)
        self.cpu = 0.0  # seconds of those that ended by themselves

    def running(self) -> bool:
        for i, pid in enumerate(self.pids):
            if pid is not None:
                ended, status, used = os.wait4(pid, os.WNOHANG)
                if ended:
                    self.cpu += used.ru_utime + used.ru_stime
                    self.pids[i], self.statuses[i] = None, os.waitstatus_to_exitcode(status)
        return any(pid is not None for pid in self.pids)

    def kill(self, rng: random.Random) -> str | None:
        alive = [i for i, pid in enumerate(self.pids) if pid is not None]
        if not alive:
            return None
        i = rng.choice(alive)
        os.kill(self.pids[i], signal.SIGKILL)
        os.waitpid(self.pids[i], 0)
        self.pids[i] = forked(self.runs[i])
        return f"rank {i}"

    def end(self) -> list[int]:
        while self.running():
            time.sleep(0.01)
        return self.statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", choices=("ranks", "ray"), default="ranks")
    parser.add_argument("--nodes", type=int, default=3, help="of the Ray cluster, of one worker each")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--unit", type=int, default=12_000)
    parser.add_argument("--sae", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    one_thread()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        text = scratch / "text"
        documents(text, 4 * args.tokens)
        saes = [x for sae in args.sae for x in ("--sae", sae)]
        command = cli.parser("collect").parse_args(["collect", str(text), *saes, "--out", str(scratch / "none")])
        loaded = prepare(command, "cpu")

        def run(mode: str, out: Path, **more) -> dict:
            return collect(*loaded, out, **settings(mode), **more)

        def settings(mode: str) -> dict:
            return {"mode": mode, "n": 100, "context": 256, "shard_passages": 6, "max_tokens": args.tokens,
                    "unit": args.unit}  # fmt: skip

        whole, seconds = {}, 0.0
        for mode in MODES:
            began = time.perf_counter()
            one = Workers([partial(run, mode, scratch / mode)])
            if one.end() != [0]:
                sys.exit(f"one worker alone failed: {one.statuses}")
            seconds = time.perf_counter() - began
            whole[mode] = tables(scratch / mode)
        units = len(list((scratch / "all" / "done").glob("unit-*.json")))
        print(f"one worker: {seconds:.1f} s, {units} units", flush=True)
        cluster = None
        if args.engine == "ray":
            from ray_cluster import Cluster

            cluster = Cluster(args.nodes)
        moments, differing, rounds = [], [], 0
        while len(moments) < args.kills:
            mode, out = MODES[rounds % 3], scratch / f"round-{rounds}"
            rounds += 1
            if cluster is None:
                size = args.workers
                runs = [partial(run, mode, out, rank=rank, world_size=size) for rank in range(size)]
                workers = Workers(runs)
            else:
                workers = cluster.begin(command, out, settings(mode))
            done = 0
            while workers.running() and len(moments) < args.kills:
                while cluster is not None and workers.running() and count(out) == done:
                    time.sleep(0.05)  # Ray's workers load the model anew: not before one has done a unit since
                # So that several fall into one collection.
                after = rng.uniform(0, seconds / 3 if cluster is None else 2 * seconds / units)
                deadline = time.monotonic() + after
                while workers.running() and time.monotonic() < deadline:
                    time.sleep(0.01)
                done = count(out)
                killed = workers.kill(rng)
                if killed is not None:
                    moments.append({"mode": mode, "killed": killed, "seconds": round(after, 2), "units_done": done})
                    line = ", ".join(f"{name} {x}" for name, x in moments[-1].items())
                    print(f"kill {len(moments)}: {line}", flush=True)
            statuses, here = workers.end(), tables(out)
            same = here.keys() == whole[mode].keys() and all(here[n].equals(t) for n, t in whole[mode].items())
            found = verify(out)
            good = same and found.sound and found.complete and not found.left_over and not any(statuses)
            what = "identical" if good else f"DIFFERS: same {same}, {found}, statuses {statuses}"
            print(f"round {rounds} ({mode}): {what}", flush=True)
            if not good:
                differing.append(rounds)
        if cluster is not None:
            cluster.end()
    rows = sum(len(t) for name, t in whole["all"].items() if "/firings/" in name)
    who = f"{args.workers} workers" if args.engine == "ranks" else f"Ray on {args.nodes} nodes"
    what = (
        f"collections of {who} that differ after {len(moments)} kills in {rounds}, each of {rows} firings in {units} "
    )
    found = row(f"{what}units", len(differing), "collections", 0, not differing, "one worker")
    end("kill_workers" if args.engine == "ranks" else "kill_ray", [found], kills=moments)


if __name__ == "__main__":
    main()
