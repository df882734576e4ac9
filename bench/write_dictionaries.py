"""What makes a dictionary of writes good: one setting changed at a time, on validation text, with seeds.

    python bench/write_dictionaries.py [--sites 5:3 6:0 2:1] [--seeds 0 1] [--only base ...] [--out FILE.json]

Every dictionary sees the same training writes of the embedded model. Judged on other text (the validation split) as
later queries read the writes: share of their energy that is left (FVU) and median cosine, with one atom a write and
with eight. The first row is nobody's work: as many native writes, coded by the same rule. Written after each row, so
that a run may be stopped, and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from common import LONG

from writesae.experiments.codebook import codebook
from writesae.files import write_json
from writesae.interrupt import script
from writesae.models import load
from writesae.sae import SAE, ModelStream, Passages, TrainConfig, Trainer
from writesae.sae.block import Block
from writesae.sae.readers import reader_moments, roots, seen_through
from writesae.sae.site import generator
from writesae.text import Corpus
from writesae.writes import Writes

BASE = dict(
    target="write", kind="bilinear_tied", sparsity="pursuit", metric="readers", balance=1.0, also_k=1, k=8, F=1024,
    states=512, steps=200, lr=1e-2, lr_end=1e-4, dead_after=30, resample_every=50,
)  # fmt: skip
TOPK = dict(kind="bilinear", sparsity="topk", also_k=0, lr=3e-3)
VARIANTS = {
    "base": {}, "entries instead of readers": dict(metric="frobenius"), "plain squared error": dict(balance=0.0),
    "all writes alike": dict(balance=2.0), "eight atoms only": dict(also_k=0), "one atom only": dict(k=1, also_k=0),
    "2,048 atoms": dict(F=2048), "4,096 atoms": dict(F=4096), "half as long": dict(steps=100),
    "twice as long": dict(steps=400), "a third of the rate": dict(lr=3e-3), "random start": dict(init="random"),
    "no dead atoms replaced": dict(resample_every=10**6), "linear encoder, top k": TOPK,
    "linear encoder, top k, no auxiliary loss": TOPK | dict(aux=0.0),
    "linear encoder, BatchTopK": TOPK | dict(sparsity="batchtopk"),
    "tied linear encoder, top k": TOPK | dict(kind="bilinear_tied", metric="frobenius"),
}  # fmt: skip


class Kept:
    """A stream whose writes are already there."""

    def __init__(self, model, passages: Passages, sites, rows):
        self.length, self._writes = passages.length, {}
        parts: dict[int, list[Writes]] = {}
        with ModelStream(model, passages, sites) as stream:
            for found in stream.writes(rows):
                for layer, writes in found.items():
                    parts.setdefault(layer, []).append(writes)
        for layer, found in parts.items():
            columns = (torch.cat([getattr(w, name) for w in found]) for name in ("decay", "left", "right"))
            self._writes[layer] = Writes(*columns)
        self._size = len(rows)

    def __len__(self) -> int:
        return self._size

    def writes(self, rows):
        for part in rows.split(64):
            yield {
                layer: Writes(w.decay[part], w.left[part], w.right[part]) for layer, w in self._writes.items()
            }  # fmt: skip


@torch.no_grad()
def judged(sae: SAE, block: Block, k: int | None) -> tuple[float, float]:
    """(share of the energy left, median cosine) of a block's writes coded with k atoms."""
    N, T = block.shape[:2]
    at = torch.randperm(N * T, generator=torch.Generator().manual_seed(0))[:8192]
    left = total = 0.0
    cosines = []
    for part in at.split(512):
        rows, positions = part // T, part % T
        X, made = block.examples(rows, positions), sae.decode(sae.encode_writes(*block.natives(rows, positions), k=k))
        left, total = left + float((X - made).square().sum()), total + float(X.square().sum())
        cosines.append(torch.cosine_similarity(X.flatten(1), made.flatten(1)))
    return left / total, float(torch.cat(cosines).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sites", nargs="+", default=["5:3", "6:0", "2:1"], metavar="LAYER:HEAD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--passages", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=LONG / "write_dictionaries.json")
    args = parser.parse_args()
    sites = [tuple(map(int, text.split(":"))) for text in args.sites]
    model, tokenizer = load("default")
    texts = {
        name: Passages.from_corpus(Corpus.from_name(f"stdlib:{name}"), tokenizer) for name in ("train", "validation")
    }  # fmt: skip
    pick = {n: torch.randperm(len(p), generator=generator(0, "bench", n)) for n, p in texts.items()}
    stream = Kept(model, texts["train"], sites, pick["train"][: args.passages])
    held = Kept(model, texts["validation"], sites, pick["validation"][:64])
    ids = texts["train"].ids[pick["train"][:128]]
    root = roots(reader_moments(model, ids, {layer for layer, _ in sites}), sites)
    inside = {s: Block([w[s[0]] for w in held.writes(torch.arange(len(held)))], s[1], "write", root[s]) for s in sites}
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(row["variant"], row["seed"]) for row in rows}

    def note(variant: str, seed: int, saes: dict, seconds: float) -> None:
        found = {}
        for site, sae in saes.items():
            fixed = sae.threshold is not None  # then as many atoms as pass it
            found[f"{site[0]}:{site[1]}"] = {
                str(k): judged(sae, inside[site], None if fixed else k) for k in ((8,) if fixed else (1, 8))
            }
        rows.append({"variant": variant, "seed": seed, "seconds": round(seconds, 1), "sites": found})
        write_json(args.out, rows, indent=1)
        means = {k: [statistics.mean(x[k][i] for x in found.values() if k in x) for i in (0, 1)]
                 for k in ("1", "8") if any(k in x for x in found.values())}  # fmt: skip
        shown = "   ".join(f"k = {k}: FVU {fvu:.3f}, cosine {cosine:.3f}" for k, (fvu, cosine) in means.items())
        print(f"{variant:42} seed {seed}   {shown}   ({seconds:.0f} s)", flush=True)

    for seed in args.seeds:
        if ("untrained codebook", seed) not in done:
            books = {}
            for site in sites:
                like = SAE(*inside[site].shape[2:], 1024, 8, "bilinear_tied", sparsity="pursuit", target="write")
                block = Block([w[site[0]] for w in stream.writes(torch.arange(len(stream)))], site[1], "write")
                every = torch.randperm(len(stream) * stream.length, generator=generator(seed, "codebook", *site))
                draw = every[:1024]
                left, right = block.natives(draw // stream.length, draw % stream.length)
                books[site] = codebook(like, left[:, 0] @ root[site], right[:, 0])
            note("untrained codebook", seed, books, 0.0)
    for name in args.only:
        for seed in args.seeds:
            if (name, seed) in done:
                continue
            began = time.monotonic()
            config = TrainConfig(**BASE | VARIANTS[name], seed=seed)
            weighed = root if config.metric == "readers" else None
            saes = Trainer(stream, sites, config, progress=False, roots=weighed).run()
            note(name, seed, {site: _as_read(sae, root[site]) for site, sae in saes.items()}, time.monotonic() - began)


def _as_read(sae: SAE, root: torch.Tensor) -> SAE:
    """The dictionary on keys times the root; a tied one becomes an untied one that does the same."""
    if sae.kind == "bilinear_tied" and sae.metric is None:
        untied = SAE(sae.K, sae.V, sae.F, sae.k, "bilinear", sae.r, sae.sparsity, target="write").requires_grad_(False)
        untied.load_state_dict(sae.state_dict() | {"v_enc": sae.v_dec, "w_enc": sae.w_dec})
        sae = untied
    return seen_through(sae, root)


if __name__ == "__main__":
    script(main)
