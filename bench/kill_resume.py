"""`kill -9` at random moments of real collections, each resumed by the same command: are the rows identical?

    python bench/kill_resume.py [--kills 20] [--phase any | finish] [--tokens 60000] [--model default] [--sae FOLDER]

Every round collects the same text into a new folder, killing the process at a random time after its start and starting
it again, until the collection completes; rounds go on, through all three modes, until there were enough kills. Each
folder's files are then compared, table by table, to those of an uninterrupted run.

With `--phase finish` every kill falls after the last shard: while documents and totals are written, the index built,
the summary put down, and the shards' own tables removed.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import COLLECT, add_model, end, model_options, row, tables

MODES = ("all", "top", "reservoir")


def last_shard(out: Path) -> bool:
    """Whether every shard is done: what comes now is the finishing."""
    for path in (out / "done").glob("part-*.json"):
        try:
            if json.loads(path.read_text())["last"]:
                return True
        except (ValueError, FileNotFoundError):  # replaced at this moment
            pass
    return False


def unfinished(command: list[str], out: Path) -> None:
    """A collection of which every shard is done, and nothing after."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not last_shard(out):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (out / "summary.json").exists():
        sys.exit("the finishing was too quick to stop before it: take more --tokens")
    for pattern in ("*.parquet*", "index/*", "done/layer-*", "*.tmp"):
        for path in out.glob(pattern):
            path.unlink()


def wait_for_finishing(process: subprocess.Popen, out: Path) -> None:
    """Until documents.parquet, its first file, is begun anew."""

    def inode() -> int | None:
        try:
            return (out / "documents.parquet").stat().st_ino
        except FileNotFoundError:
            return None

    before = inode()
    while process.poll() is None and inode() == before and not list(out.glob("documents.parquet.*")):
        time.sleep(0.0005)


def left(out: Path) -> str:
    """How far a killed finishing came."""
    if (out / "summary.json").exists():
        return "summary"
    indexed = len(list((out / "done").glob("layer-*.json")))
    tables = [name for name in ("features.parquet", "documents.parquet") if (out / name).exists()]
    return f"{indexed} indexes" if indexed else (tables or ["shards"])[0]


def wait_for_lock(process: subprocess.Popen, out: Path) -> None:
    while process.poll() is None:
        try:
            if (out / ".lock").read_text() == f"pid {process.pid}\n":
                return
        except FileNotFoundError:
            pass
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--phase", choices=("any", "finish"), default="any", help="when kills fall")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--corpus", default="stdlib:validation")
    add_model(parser)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    def command(mode: str, out: Path) -> list[str]:
        return [
            *COLLECT, args.corpus, *model_options(args), "--out", str(out), "--mode", mode, "--n", "100",
            "--context", "256", "--shard-passages", "24", "--max-tokens", str(args.tokens), "--yes",
        ]  # fmt: skip

    def finish(mode: str, out: Path) -> float:
        done = subprocess.run(command(mode, out), check=True, capture_output=True, text=True)
        return json.loads(done.stdout)["seconds"]

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        whole, working = {}, 0.0
        for mode in MODES:
            working = finish(mode, scratch / mode)
            whole[mode] = tables(scratch / mode)
        # Most kills fall while the process holds the folder's lock: reading, running, writing, indexing. Some fall
        # before that, while it starts.
        longest = working
        if args.phase == "finish":
            longest = 0.0
            for mode in MODES:
                unfinished(command(mode, scratch / f"ready-{mode}"), scratch / f"ready-{mode}")
                shutil.copytree(scratch / f"ready-{mode}", scratch / f"timed-{mode}")
                process = subprocess.Popen(command(mode, scratch / f"timed-{mode}"), stdout=subprocess.DEVNULL,
                                           stderr=subprocess.DEVNULL)  # fmt: skip
                wait_for_finishing(process, scratch / f"timed-{mode}")
                began = time.perf_counter()
                while process.poll() is None and list((scratch / f"timed-{mode}" / "counts").iterdir()):
                    time.sleep(0.0005)
                longest = max(longest, time.perf_counter() - began)
                process.wait()
            print(f"finishing takes {longest:.2f} s", flush=True)
        kills, rounds, moments, differing = 0, 0, [], []
        while kills < args.kills:
            mode, out = MODES[rounds % 3], scratch / f"round-{rounds}"
            rounds += 1
            if args.phase == "finish":
                shutil.copytree(scratch / f"ready-{mode}", out)
            while kills < args.kills:
                process = subprocess.Popen(
                    command(mode, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )  # fmt: skip
                after = rng.uniform(0, longest)
                if args.phase == "finish":
                    wait_for_finishing(process, out)
                elif rng.random() < 0.9:
                    wait_for_lock(process, out)
                try:
                    process.wait(after)
                    break  # it completed first
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                kills += 1
                shards = len(list((out / "done").glob("*.json")))
                torn = [p.relative_to(out).as_posix() for p in out.rglob("*.tmp")]
                moment = {"mode": mode, "seconds": round(after, 3), "finished_shards": shards, "torn": torn}
                moments.append({**moment, "left": left(out)} if args.phase == "finish" else moment)
                print(f"kill {kills}: {', '.join(f'{name} {x}' for name, x in moments[-1].items())}", flush=True)
            finish(mode, out)
            here = tables(out)
            same = here.keys() == whole[mode].keys() and all(here[n].equals(t) for n, t in whole[mode].items())
            print(f"round {rounds} ({mode}): {'identical' if same else 'DIFFERS'}", flush=True)
            if not same:
                differing.append(rounds)
    rows = sum(len(t) for name, t in whole["all"].items() if name.startswith("firings/"))
    what = f"collections that differ after {kills} kills {'while finishing ' if args.phase == 'finish' else ''}"
    what += f"in {rounds} collections of {rows} firings"
    found = row(what, len(differing), "collections", 0, not differing, "uninterrupted run")
    end("kill_resume" if args.phase == "any" else "kill_finish", [found], kills=moments)


if __name__ == "__main__":
    main()
