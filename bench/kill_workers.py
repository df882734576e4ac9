"""`kill -9` of workers that fill one folder together, at random moments: are the tables those of one worker?

    python bench/kill_workers.py [--kills 50] [--workers 2] [--tokens 40000] [--unit 12kB] [--model default]
    python bench/kill_workers.py --engine ray [--kills 50] [--nodes 3]

Every round collects the same text into a new folder by several workers (`--rank`, `--world-size`), killing one of them
at a random time and starting it again, until the collection completes; rounds go on, through all three modes, until
there were enough kills. Each folder is then compared, table by table, to what one worker left, and verified.

With `--engine ray` the workers are those of a Ray cluster of several nodes on this machine, and what is killed is, by
turns, a worker, a node (another joins), and the driver (which is run again).
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from common import COLLECT, add_model, end, model_options, row

from writesae.collect.verify import verify
from writesae.default.corpus import stdlib_files

MODES = ("all", "top", "reservoir")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def tables(folder: Path) -> dict:
    """Every table by name; a unit's folder by its number, whichever machine it was made on."""
    found = {}
    for path in sorted(folder.rglob("*.parquet")):
        parts = list(path.relative_to(folder).parts)
        if parts[0] == "units":
            parts[1] = parts[1].split("-")[0]
        found["/".join(parts)] = pq.read_table(path)
    return found


def documents(folder: Path, size: int, length: int = 3000) -> None:
    """A folder of documents of `length` characters, out of the standard library's sources."""
    folder.mkdir()
    for path in stdlib_files("validation"):
        source = path.read_text(errors="ignore")
        for at in range(0, len(source), length):
            (folder / f"{len(list(folder.iterdir())):05d}.txt").write_text(source[at : at + length])
            size -= length
        if size < 0:
            return


class Ranks:
    """Workers with `--rank` and `--world-size`."""

    def __init__(self, command: list[str], workers: int):
        self.commands = [[*command, "--rank", str(i), "--world-size", str(workers)] for i in range(workers)]
        self.processes = [subprocess.Popen(one, **QUIET) for one in self.commands]

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def kill(self, rng: random.Random) -> str | None:
        alive = [i for i, process in enumerate(self.processes) if process.poll() is None]
        if not alive:
            return None
        i = rng.choice(alive)
        self.processes[i].send_signal(signal.SIGKILL)
        self.processes[i].wait()
        self.processes[i] = subprocess.Popen(self.commands[i], **QUIET)
        return f"rank {i}"

    def end(self) -> list[int]:
        return [process.wait() for process in self.processes]


class Kills:
    """What happened, a line each."""

    def __init__(self, out: Path, mode: str, moments: list):
        self.out, self.mode, self.moments = out, mode, moments

    def note(self, what: str, seconds: float) -> None:
        done = len(list((self.out / "done").glob("unit-*.json")))
        begun = len({path.name.split("-")[0] for path in (self.out / "units").glob("*/")}) - done
        moment = {"mode": self.mode, "killed": what, "seconds": round(seconds, 2), "units_done": done, "begun": begun}
        self.moments.append(moment)
        print(f"kill {len(self.moments)}: {', '.join(f'{name} {x}' for name, x in moment.items())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", choices=("ranks", "ray"), default="ranks")
    parser.add_argument("--nodes", type=int, default=3, help="of the Ray cluster, of one worker each")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--unit", default="12kB")
    add_model(parser)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    def command(mode: str, out: Path) -> list[str]:
        return [
            *COLLECT, str(text), *model_options(args), "--out", str(out), "--mode", mode, "--n", "100",
            "--context", "256", "--shard-passages", "6", "--max-tokens", str(args.tokens), "--unit", args.unit, "--yes",
        ]  # fmt: skip

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        text = scratch / "text"
        documents(text, 6 * args.tokens)
        whole, seconds, units = {}, 0.0, 0
        for mode in MODES:
            began = time.perf_counter()
            done = subprocess.run(command(mode, scratch / mode), check=True, capture_output=True, text=True)
            seconds, units = time.perf_counter() - began, json.loads(done.stdout)["units"]
            whole[mode] = tables(scratch / mode)
        print(f"one worker: {seconds:.1f} s, {units} units", flush=True)
        moments, differing, rounds = [], [], 0
        while len(moments) < args.kills:
            mode, out = MODES[rounds % 3], scratch / f"round-{rounds}"
            rounds += 1
            kills = Kills(out, mode, moments)
            if args.engine == "ray":
                from ray_cluster import Cluster

                workers = Cluster(command(mode, out), args.nodes)
            else:
                workers = Ranks(command(mode, out), args.workers)
            while workers.running() and len(moments) < args.kills:
                after = rng.uniform(0, seconds)
                deadline = time.monotonic() + after
                while workers.running() and time.monotonic() < deadline:
                    time.sleep(0.05)
                killed = workers.kill(rng)
                if killed is not None:
                    kills.note(killed, after)
            statuses, here = workers.end(), tables(out)
            same = here.keys() == whole[mode].keys() and all(here[n].equals(t) for n, t in whole[mode].items())
            found = verify(out)
            sound = found.sound and found.complete and not found.left_over
            good = same and sound and not any(statuses)
            what = "identical" if good else f"DIFFERS: same {same}, {found.lines()}, statuses {statuses}"
            print(f"round {rounds} ({mode}): {what}", flush=True)
            if not good:
                differing.append(rounds)
    rows = sum(len(t) for name, t in whole["all"].items() if "/firings/" in name)
    who = f"{args.workers} workers" if args.engine == "ranks" else f"Ray on {args.nodes} nodes"
    what = f"collections of {who} that differ after {len(moments)} kills in {rounds} of {rows} firings in {units} units"
    found = row(what, len(differing), "collections", 0, not differing, "one worker")
    end("kill_workers" if args.engine == "ranks" else "kill_ray", [found], kills=moments)


if __name__ == "__main__":
    sys.exit(main())
