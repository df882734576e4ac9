"""Train the embedded model's dictionary and write `writesae/default/sae/`.

    python scripts/train_default_dictionary.py [--work runs/default_dictionary] [--out writesae/default/sae]

Three steps, each on text of its own: a small dictionary at every site (training split); the replacement test of each on
the validation split, which chooses the site; then the dictionary that ships (training split), evaluated on the
validation split. The test split is not read here: it belongs to the demo and to `writesae replace`. Each step's result
is kept in --work, so a run that stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from writesae.experiments import passages_of, run_replacement
from writesae.files import whole_folder, write_json
from writesae.interrupt import script
from writesae.models import hf_gated_delta, load
from writesae.sae import SAE, ModelStream, Passages, TrainConfig, Trainer, evaluate
from writesae.sae.block import Block
from writesae.text import Corpus


def train(model, tokenizer, sites, config: TrainConfig, folder: Path, name: str) -> dict[tuple[int, int], SAE]:
    """Dictionaries of all `sites`, trained together; from `folder` where they are already there."""
    found = {site: folder / f"L{site[0]}H{site[1]}" for site in sites}
    if all((path / "cfg.json").exists() for path in found.values()):
        return {site: SAE.from_pretrained(path) for site, path in found.items()}
    passages = Passages.from_corpus(Corpus.from_name("stdlib:train"), tokenizer, 256)
    checkpoint = folder / "checkpoint"
    with ModelStream(model, passages, sites) as stream:
        resume = checkpoint.exists() and any(checkpoint.iterdir())
        saes = Trainer(stream, sites, config, checkpoint, resume, name).run(checkpoint_every=500)
    for site, sae in saes.items():
        sae.save_pretrained(found[site])
    return saes


def quality(model, tokenizer, saes: dict[tuple[int, int], SAE], states: int) -> dict[tuple[int, int], dict]:
    """`evaluate` of each dictionary on the validation split."""
    passages = Passages.from_corpus(Corpus.from_name("stdlib:validation"), tokenizer, 256)
    with ModelStream(model, passages, list(saes)) as stream:
        parts = list(stream.writes(torch.randperm(len(passages), generator=torch.Generator().manual_seed(0))[:256]))
    return {
        (layer, head): evaluate(sae, Block([part[layer] for part in parts], head), states)
        for (layer, head), sae in saes.items()
    }


def site(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(":")
    return int(layer), int(head)


def survey(model, tokenizer, args) -> list[dict]:
    """One record a site: quality and win rate of a small dictionary on the validation split, best win rate first."""
    path = args.work / "survey.json"
    if path.exists():
        return json.loads(path.read_text())
    sites = [(s.layer_index, head) for s in hf_gated_delta.layers(model) for head in range(s.num_v_heads)]
    if args.candidates:
        sites = [site(text) for text in args.candidates]
    config = TrainConfig(F=1024, k=8, steps=args.survey_steps, block=256, lr=1e-3, seed=args.seed)
    saes = train(model, tokenizer, sites, config, args.work / "survey", args.model)
    passages = passages_of(Corpus.from_name("stdlib:validation"), tokenizer)
    scores = quality(model, tokenizer, saes, 4096)
    records = []
    for place, sae in saes.items():
        result = run_replacement(
            model, tokenizer, {place: sae}, passages, firings=args.survey_firings, natives=("increment",),
            progress=False,
        )  # fmt: skip
        summary = result.summary(resamples=200)
        norm = float(torch.tensor(result.table["native_norm"]).median())
        records.append({
            "layer": place[0], "head": place[1], "win_rate": summary["win_rate"],
            "strict_chain": summary["strict_chain"], "kl_median": summary["kl_median"],
            "native_norm_median": norm, **scores[place],
        })  # fmt: skip
        print(
            f"L{place[0]}H{place[1]}: win rate {summary['win_rate']:.3f}, KL {summary['kl_median']}, "
            f"FVU {scores[place]['fvu']:.3f}, cosine {scores[place]['winner_cosine_median']:.3f}",
            flush=True,
        )
    records.sort(key=lambda r: -r["win_rate"])
    write_json(path, records, allow_nan=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--work", type=Path, default=Path("runs/default_dictionary"))
    parser.add_argument("--out", type=Path, default=Path("writesae/default/sae"))
    parser.add_argument("--site", metavar="LAYER:HEAD", help="skip the survey and train this one")
    parser.add_argument("--candidates", nargs="+", metavar="LAYER:HEAD", help="survey these only; default every site")
    parser.add_argument("--survey-steps", type=int, default=400)
    parser.add_argument("--survey-firings", type=int, default=200)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("-F", "--features", type=int, default=2048)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    model, tokenizer = load(args.model)
    chosen_by = None  # the survey, best first
    if args.site:
        chosen = site(args.site)
    else:
        records = survey(model, tokenizer, args)
        chosen, chosen_by = (records[0]["layer"], records[0]["head"]), records
        print(f"chosen: layer {chosen[0]}, head {chosen[1]}")
    config = TrainConfig(F=args.features, k=args.k, steps=args.steps, lr=args.lr, lr_end=args.lr / 10, seed=args.seed)
    sae = train(model, tokenizer, [chosen], config, args.work / "final", "default")[chosen]
    sae.metrics = quality(model, tokenizer, {chosen: sae}, 20_000)[chosen]
    sae.training_record |= {"script": "scripts/train_default_dictionary.py", "survey": chosen_by}
    name = f"L{chosen[0]}H{chosen[1]}"
    with whole_folder(args.out) as fresh:
        sae.save_pretrained(fresh / name)
    print(json.dumps(sae.metrics, indent=2))
    print(f"saved in {args.out / name} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    script(main)
