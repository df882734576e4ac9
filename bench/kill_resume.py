"""`kill -9` at random moments of real collections, each resumed by the same command: are the rows identical?

    python bench/kill_resume.py [--kills 20] [--tokens 60000] [--model default] [--sae FOLDER]

Every round collects the same text into a new folder, killing the process at a random time after its start and starting
it again, until the collection completes; rounds go on, through all three modes, until there were enough kills. Each
folder's files are then compared, table by table, to those of an uninterrupted run.
"""

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

RESULTS = Path(__file__).parent / "results" / "kill_resume.json"
MODES = ("all", "top", "reservoir")


def tables(folder: Path) -> dict:
    return {p.relative_to(folder).as_posix(): pq.read_table(p) for p in sorted(folder.rglob("*.parquet"))}


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
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--corpus", default="stdlib:validation")
    parser.add_argument("--model", default="default")
    parser.add_argument("--sae", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    def command(mode: str, out: Path) -> list[str]:
        dictionaries = [x for sae in args.sae for x in ("--sae", sae)]
        return [
            sys.executable, "-m", "writesae.cli", "collect", args.corpus, "--model", args.model, *dictionaries,
            "--out", str(out), "--mode", mode, "--n", "100", "--context", "256", "--shard-passages", "24",
            "--max-tokens", str(args.tokens), "--yes",
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
        kills, rounds, moments, differing = 0, 0, [], []
        while kills < args.kills:
            mode, out = MODES[rounds % 3], scratch / f"round-{rounds}"
            rounds += 1
            while kills < args.kills:
                process = subprocess.Popen(
                    command(mode, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )  # fmt: skip
                after = rng.uniform(0, longest)
                if rng.random() < 0.9:
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
                moments.append({"mode": mode, "seconds": round(after, 2), "finished_shards": shards, "torn": torn})
                print(f"kill {kills}: {mode}, {after:.1f} s, {shards} shards done, unfinished files {torn}", flush=True)
            finish(mode, out)
            here = tables(out)
            same = here.keys() == whole[mode].keys() and all(here[n].equals(t) for n, t in whole[mode].items())
            print(f"round {rounds} ({mode}): {'identical' if same else 'DIFFERS'}", flush=True)
            if not same:
                differing.append(rounds)
    rows = sum(len(t) for name, t in whole["all"].items() if name.startswith("firings/"))
    row = {
        "name": f"collections that differ after {kills} kills in {rounds} collections of {rows} firings",
        "peer": "uninterrupted run", "value": len(differing), "unit": "collections", "target": 0,
        "met": not differing, "spread": None,
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": [row], "kills": moments}, indent=1) + "\n")
    print(json.dumps(row))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
