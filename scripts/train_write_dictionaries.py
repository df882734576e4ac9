"""Train the embedded model's dictionaries of writes, at every head, and ship those of the longest memory.

    python scripts/train_write_dictionaries.py [--work runs/write_dictionaries] [--out writesae/default/writes]

All sites at once, on the training split; settings chosen on the validation split (`bench/write_dictionaries.py` shows
them against others), and the test split is not read. Which sites are shipped is decided by how long what they write
lasts, measured on the training split, and by nothing that a dictionary did. They are kept in half precision. A run that
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from writesae.cli import main as writesae
from writesae.experiments import passages_of
from writesae.experiments.sites import longest_memory
from writesae.files import whole_folder
from writesae.interrupt import script
from writesae.models import load
from writesae.sae import SAE
from writesae.text import Corpus

SETTINGS = [
    "--target", "write", "--sparsity", "pursuit", "--metric", "readers", "--balance", "1", "-k", "8", "--also-k", "1",
    "-F", "4096", "--states", "512", "--steps", "400", "--lr", "0.01", "--lr-end", "0.0001", "--dead-after", "30",
    "--resample-every", "50", "--evaluate-every", "50", "--checkpoint-every", "50", "--eval-passages", "64",
    "--watch-passages", "2",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/write_dictionaries"))
    parser.add_argument("--out", type=Path, default=Path("writesae/default/writes"))
    parser.add_argument("--site", nargs="+", default=["*:*"], metavar="LAYER:HEAD")
    parser.add_argument("--ship", type=int, default=5, help="how many sites are written to --out, in half precision")
    args = parser.parse_args()
    if not list(args.work.glob("L*H*/cfg.json")):
        sites = [word for site in args.site for word in ("--site", site)]
        resume = ["--resume"] if (args.work / "checkpoint.pt").exists() else []
        if status := writesae(["train", *sites, *SETTINGS, "--out", str(args.work), *resume]):
            raise SystemExit(status)
    model, tokenizer = load("default")
    text = passages_of(Corpus.from_name("stdlib:train"), tokenizer, max_tokens=60_000)
    wanted = longest_memory(model, [passage.tokens for passage in text], args.ship)
    with whole_folder(args.out) as fresh:
        for layer, head in sorted(wanted):
            sae = SAE.from_pretrained(args.work / f"L{layer}H{head}")
            sae.training_record |= {"script": "scripts/train_write_dictionaries.py", "sites_by": "longest memory"}
            sae.half().save_pretrained(fresh / f"L{layer}H{head}")
            print(f"L{layer}H{head}: {json.dumps(sae.metrics['readers'])}")


if __name__ == "__main__":
    script(main)
