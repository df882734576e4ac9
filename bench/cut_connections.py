"""Collections into an object store while connections are cut at random moments: are the tables those of one worker?

    python bench/cut_connections.py [--cuts 200] [--share 0.05] [--workers 2] [--tokens 12000] [--unit 6000]

A small S3 server of this machine (`tests/fake_s3.py`) cuts a share of all requests: before one is read, midway through
what is sent, after it was done but before the answer, or midway through the answer. Every round reads the same text
from there and collects it to there by several workers, which see nothing of one another but the bucket, as on machines
of their own; one of them is killed at a random time and starts again on a machine that has nothing yet. Rounds go on,
through all three modes, until there were enough cuts. What lies there is then compared, table by table, to what one
worker left in a folder, and verified. Workers are forked from a process that has loaded the embedded model.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from common import end, row, tables
from kill_workers import MODES, Workers, documents

from writesae import cli
from writesae.collect import Corpus, collect
from writesae.collect.command import prepare
from writesae.collect.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fake_s3 import FakeS3, serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.05, help="of requests that are cut")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--unit", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch, serving(FakeS3(seed=args.seed)) as server:
        scratch = Path(scratch)
        text = scratch / "text"
        documents(text, 4 * args.tokens)
        server.put_folder(text, "text")
        os.environ |= server.environment()
        command = cli.parser("collect").parse_args(["collect", str(text), "--out", str(scratch / "none")])
        corpus, tokenizer, source = prepare(command, "cpu")

        def run(mode: str, out: str, remote: bool = False, **more) -> dict:
            if remote:  # also where a killed one starts again
                os.environ["WRITESAE_SCRATCH"] = tempfile.mkdtemp(dir=scratch)
            read = Corpus.from_path("s3://bucket/text") if remote else corpus
            return collect(read, tokenizer, source, out, mode=mode, n=100, context=256, shard_passages=6,
                           max_tokens=args.tokens, unit=args.unit, **more)  # fmt: skip

        whole, seconds = {}, 0.0
        for mode in MODES:
            began = time.perf_counter()
            if Workers([partial(run, mode, scratch / mode)]).end() != [0]:
                sys.exit("one worker alone failed")
            seconds = time.perf_counter() - began
            whole[mode] = tables(scratch / mode)
        print(f"one worker: {seconds:.1f} s", flush=True)
        differing, rounds, kills = [], 0, 0
        while len(server.cuts) < args.cuts:
            mode, name = MODES[rounds % 3], f"round-{rounds}"
            rounds += 1
            server.cutting = args.share
            workers = Workers([
                partial(run, mode, f"s3://bucket/{name}", True, rank=rank, world_size=args.workers)
                for rank in range(args.workers)
            ])  # fmt: skip
            deadline = time.monotonic() + rng.uniform(0.5, 1.5) * seconds
            while workers.running() and time.monotonic() < deadline:
                time.sleep(0.01)
            kills += workers.kill(rng) is not None
            statuses = workers.end()
            server.cutting = 0.0
            out = server.save(name, scratch / name)
            here, found = tables(out), verify(out)
            same = here.keys() == whole[mode].keys() and all(here[n].equals(t) for n, t in whole[mode].items())
            good = same and found.sound and found.complete and not found.left_over and not any(statuses)
            what = "identical" if good else f"DIFFERS: same {same}, {found}, statuses {statuses}"
            print(f"round {rounds} ({mode}), {len(server.cuts)} cuts: {what}", flush=True)
            if not good:
                differing.append(rounds)
        moments = Counter(f"{moment} {method}" for moment, method, _ in server.cuts)
    rows = sum(len(t) for name, t in whole["all"].items() if "/firings/" in name)
    what = (
        f"collections in an object store, by {args.workers} workers, that differ after {len(server.cuts)} cut "
        f"connections and {kills} kills in {rounds}, each of {rows} firings"
    )
    found = row(what, len(differing), "collections", 0, not differing, "one worker and a folder")
    end("cut_connections", [found], cuts=dict(sorted(moments.items())))


if __name__ == "__main__":
    main()
