"""The memory of `writesae train` against the size of its text: one, four and sixteen times as much, read to its end.

    python bench/train_memory.py [--tokens 2000000] [--shuffle 500000]

Each run is a process of its own, whose highest resident memory the system tells when it ends. The model is a tiny one,
and a step is taken once a block, so that reading the text is most of the work. The text is drawn; a file of it holds
lines of JSON. For comparison the last run holds the sixteenfold text as training did before, all of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import end, row

TRAIN = """
import resource, sys, torch
from writesae.models.tiny import tiny_model
from writesae.sae import ModelStream, Passages, Pools, TrainConfig, Trainer
from writesae.text import Corpus
path, whole, shuffle = sys.argv[1], sys.argv[2] == "whole", int(sys.argv[3])
torch.set_num_threads(1)
corpus, tokenize = Corpus.from_path(path), lambda text: [3 + x % 90 for x in text.encode()]
text = Passages.from_corpus(corpus, tokenize, 256) if whole else Pools(corpus, tokenize, 256, size=shuffle)
config = TrainConfig(F=64, k=4, steps=10**9, states=256, block=256, uses=1e-9)
with ModelStream(tiny_model(), text, [(0, 1)], 64) as stream:
    trainer = Trainer(stream, [(0, 1)], config, progress=False)
    while trainer.order.state()["epoch"] == 0:
        trainer.run(trainer.done + 1)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(peak, trainer.done * 256 * 256)
"""


def write(path: Path, tokens: int) -> None:
    """Lines of JSON with documents of 2,000 letters, a token each."""
    with open(path, "w") as file:
        for i in range(tokens // 2000):
            text = f"{i} the rank-one writes of a state, again and again. " * 40
            file.write(json.dumps({"text": text[:2000]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of the smallest text")
    parser.add_argument("--shuffle", type=int, default=500_000, help="tokens held at a time")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for times, how in (1, "pools"), (4, "pools"), (16, "pools"), (16, "whole"):
            path = Path(folder) / f"{times}.jsonl"
            if not path.exists():
                write(path, times * args.tokens)
            command = [sys.executable, "-c", TRAIN, str(path), how, str(args.shuffle)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peak, tokens = map(int, said.split())
            peaks[times, how] = peak
            rows.append(row(f"{how}: {tokens:,} tokens trained over", peak / 1e6, "MB"))
            print(rows[-1], file=sys.stderr)
    grown = max(peaks[times, "pools"] for times in (4, 16)) / peaks[1, "pools"]
    rows.append(row("memory at 16 times the text, of that at 1", grown, "x", 1.05, grown <= 1.05))
    end("train_memory", rows)


if __name__ == "__main__":
    main()
