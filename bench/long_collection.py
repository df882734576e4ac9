"""A long real collection: memory at 10 % and 100 % of it, bytes a firing, tokens a second, the cost of writing.

    python bench/long_collection.py [--tokens 2000000] [--model default] [--sae FOLDER] [--keep FOLDER]

Resident memory is read from /proc every 50 ms; the two figures are the highest seen until 10 % of the tokens and until
the end (the index included). The cost of writing compares the collection's rate to the same hooked forward passes
without any storing, run before and after it on the first tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import COLLECT, add_model, end, model_options, row

FORWARD = """
import argparse, json, sys, time
from writesae import options
from writesae.collect import ModelSource, command, estimate
from writesae.models import load
from writesae.text import arguments, passages, tokens
parser = argparse.ArgumentParser()
command.configure(parser)
args = parser.parse_args(sys.argv[1:])
model, tokenizer = load(args.model)
source = ModelSource(model, options.dictionaries(args), accelerate=args.accelerate)
tokenize, first = tokens.tokenizing(tokenizer)
found = (p for p in passages.passages(arguments.named(args), tokenize, args.context, first)
         if isinstance(p, passages.Passage))
held = [next(found) for _ in range(48)]
n = seconds = 0
with source:
    for rows, tokens, mask in estimate.batches(held, args.batch):
        began = time.perf_counter()
        source.firings(tokens, mask)
        if n or tokens.shape[1] == args.context:
            seconds += time.perf_counter() - began
            n += int(mask.sum())
print(json.dumps(n / seconds))
"""


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    with open(f"/proc/{pid}/status") as file:
        line = next((x for x in file if x.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--corpus", default="stdlib:train")
    add_model(parser)
    parser.add_argument("--keep", help="collect into this folder and leave it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(args.keep or f"{scratch}/out")
        options = [args.corpus, *model_options(args), "--out", str(out), "--yes", "--max-tokens", str(args.tokens)]

        def forward_only() -> float:
            done = subprocess.run([sys.executable, "-c", FORWARD, *options], capture_output=True, text=True, check=True)
            return float(done.stdout.splitlines()[-1])

        before = forward_only()
        process = subprocess.Popen([*COLLECT, *options], stdout=subprocess.PIPE)
        early = peak = done_tokens = shards = 0
        samples = []  # (share of the corpus done, resident bytes)
        while process.poll() is None:
            here = resident(process.pid)
            while (marker := out / "done" / f"part-{shards:06d}.json").exists():
                done_tokens += json.loads(marker.read_text())["tokens"]
                shards += 1
            peak = max(peak, here)
            samples.append((done_tokens / args.tokens, here))
            if done_tokens <= 0.1 * args.tokens:
                early = max(early, here)
            time.sleep(0.05)
        if process.returncode:
            sys.exit(process.returncode)
        summary = json.loads(process.stdout.read())
        after = forward_only()
    if shards < 20:
        sys.exit(f"expected at least 20 shards, to look at a tenth of them, got {shards}: take more --tokens")
    growth = (peak - early) / early
    at_10 = statistics.median(rss for share, rss in samples if 0.05 <= share <= 0.15)
    at_100 = statistics.median(rss for share, rss in samples if 0.9 <= share)
    hooked = (before + after) / 2
    overhead = hooked / summary["tokens_per_second"] - 1
    what = f"{summary['tokens']} tokens, {summary['firings']} firings, {summary['shards']} shards"

    rows = [
        row(f"resident memory, largest seen to 100 % over to 10 % of {what}", 100 * growth, "% growth", "<= 5",
            growth <= 0.05),
        row("resident memory at most, until 10 %", early / 1e6, "MB"),
        row("resident memory at most", peak / 1e6, "MB"),
        row("resident memory, median at 90 to 100 % over median at 5 to 15 %", 100 * (at_100 / at_10 - 1), "% growth",
            "<= 5", at_100 <= 1.05 * at_10),
        row("disk, everything in the folder", summary["bytes_per_firing"], "bytes a firing", "<= 5",
            summary["bytes_per_firing"] <= 5),
        row("collection", summary["tokens_per_second"], "tokens a second"),
        row("collection, time beyond the hooked forward pass", 100 * overhead, "%", peer="hooked forward pass alone",
            spread=[before, after]),
        row("collection, time the model waited for writing", 100 * summary["wait_seconds"] / summary["seconds"], "%"),
    ]  # fmt: skip
    end("long_collection", rows, summary=summary)


if __name__ == "__main__":
    main()
