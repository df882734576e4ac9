"""`writesae train`: dictionaries for some sites of a model, from text to a saved folder with its held-out metrics."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path

import torch

from ..text import Corpus
from ..text.arguments import NAMED, add_options, named, tell_empty, told
from ..text.tokens import check_vocabulary
from .sae import KINDS
from .site import INITS, PATHS, TrainConfig, generator

METRICS = "metrics.json"
_DEFAULTS = {f.name: f.default for f in fields(TrainConfig)}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add = parser.add_argument
    add("--model", default="default", help="the embedded default, a folder, or a Hugging Face repository")
    add("--layer", type=int, help="layer of the site (with --head)")
    add("--head", type=int, help="value head of the site (with --layer)")
    add("--site", action="append", metavar="LAYER:HEAD", help="a site; repeat to train several from the same passes")
    add("--out", type=Path, required=True, help="folder to save in (several sites: a folder L<layer>H<head> each)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--corpus", nargs="+", help=f"each {NAMED}; default: stdlib:train")
    add_options(parser)
    add("--validation", nargs="+", help="held-out text, named like --corpus; default: stdlib:validation, or one in 20 "
        "of the documents of a --corpus or --dataset, which are then not trained on")  # fmt: skip
    add("--max-tokens", type=int, help="read no more of the text, nor of the held-out text, than this")
    add("--length", type=int, default=256, help="tokens of a passage")
    add("--batch", type=int, default=16, help="passages in one forward pass")
    add("--eval-passages", type=int, default=128, help="held-out passages the dictionary is evaluated on")
    add("--checkpoint-every", type=int, default=1000, help="steps between checkpoints")
    add("--quiet", action="store_true", help="no progress bars")
    add("--kind", choices=KINDS, default=_DEFAULTS["kind"], help="kind of dictionary")
    add("-F", "--features", type=int, default=_DEFAULTS["F"], help="number of atoms")
    add("-k", type=int, default=_DEFAULTS["k"], help="atoms active at once")
    add("--rank", type=int, default=_DEFAULTS["r"], help="rank of an atom")
    add("--init", choices=INITS, default=_DEFAULTS["init"], help="what atoms start from")
    add("--path", choices=PATHS, default=_DEFAULTS["path"], help="form the sampled states, or none at all")
    for name, text in (
        ("steps", "optimiser steps"), ("states", "states in a step"),
        ("passages", "passages a step's states come from; 0: all of a block, on the factored path as few as hold them"),
        ("block", "passages held as writes"),
        ("uses", "times a block is drawn through"), ("lr", "learning rate"), ("lr_end", "learning rate at the end"),
        ("aux", "weight of the auxiliary loss"), ("k_aux", "dead atoms it uses"),
        ("prepare", "passages of the initial pass"), ("seed", "seed of everything"),
    ):  # fmt: skip
        add("--" + name.replace("_", "-"), type=type(_DEFAULTS[name]), default=_DEFAULTS[name], help=text)
    add("--not-centred", action="store_true", help="do not subtract the mean state")


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates, saves. Returns the exit status."""
    sites = _sites(args)
    given = {n: x for n, x in vars(args).items() if n in _DEFAULTS}
    config = TrainConfig(**given, F=args.features, r=args.rank, centred=not args.not_centred)
    for name in ("length", "batch", "eval_passages", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected >= 1, got {getattr(args, name)}")
    _check_out(args.out, args.resume)
    corpus, held_out = _corpora(args)

    from ..models import load
    from .block import Block
    from .evaluate import evaluate
    from .resume import tokenizer_digest, tokens_digest, whole_file
    from .stream import ModelStream, Passages
    from .train import Trainer

    show = not args.quiet
    model, tokenizer = load(args.model)
    check_vocabulary(tokenizer, model)
    how = {"bos": not args.no_bos, "max_tokens": args.max_tokens, "progress": show}
    if held_out is None:
        passages, validation = Passages.split(corpus, tokenizer, args.length, **how)
    else:
        passages = Passages.from_corpus(corpus, tokenizer, args.length, **how)
        validation = Passages.from_corpus(held_out, tokenizer, args.length, **how)
    left_out = {"corpus": tell_empty(corpus)}
    if held_out is not None:
        left_out["validation"] = tell_empty(held_out, "validation")
    if show:
        print(f"{len(passages)} training passages of {args.length} tokens, {len(validation)} held out; sites {sites}")
    with ModelStream(model, passages, sites, args.batch) as stream:
        pinned = {"validation": tokens_digest(validation.ids), "tokenizer": tokenizer_digest(tokenizer)}
        trainer = Trainer(stream, sites, config, args.out, args.resume, args.model, show, pinned)
        began = time.monotonic()
        saes = trainer.run(checkpoint_every=args.checkpoint_every)
        seconds = time.monotonic() - began
    with ModelStream(model, validation, sites, args.batch) as stream:
        rows = torch.randperm(len(validation), generator=generator(0, "evaluation"))[: args.eval_passages]
        parts = list(stream.writes(rows))
        everything = {}
        for (layer, head), sae in saes.items():
            sae.metrics = evaluate(sae, Block([part[layer] for part in parts], head))
            sae.training_record["seconds"] = round(seconds, 1)
            folder = args.out if len(sites) == 1 else args.out / f"L{layer}H{head}"
            sae.save_pretrained(folder)
            everything[f"L{layer}H{head}"] = sae.metrics
            m = sae.metrics
            print(
                f"L{layer}H{head}: FVU {m['fvu']:.4f}, L0 {m['l0']:.1f}, {m['alive']} of {sae.F} atoms alive, median "
                f"cosine to native writes {m['cosine_median']:.3f} (of the winner {m['winner_cosine_median']:.3f}) on "
                f"{m['states']} held-out states; saved in {folder}"
            )
    record = {"model": args.model, "seconds": seconds, "config": config.record(), "metrics": everything,
              "left_out": left_out}  # fmt: skip
    with whole_file(args.out / METRICS) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _sites(args) -> list[tuple[int, int]]:
    found = []
    if (args.layer is None) != (args.head is None):
        raise ValueError("site: expected --layer and --head together")
    if args.layer is not None:
        found.append((args.layer, args.head))
    for text in args.site or ():
        layer, _, head = text.partition(":")
        if not layer.isdigit() or not head.isdigit():
            raise ValueError(f"site: expected LAYER:HEAD, such as 2:3, got {text!r}")
        found.append((int(layer), int(head)))
    if not found:
        raise ValueError("site: expected --layer and --head, or --site LAYER:HEAD")
    return found


def _check_out(out: Path, resume: bool) -> None:
    from .checkpoint import CONFIG
    from .resume import TEMPORARY
    from .train import CHECKPOINT

    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {out}")
    known = {CHECKPOINT, CONFIG, METRICS}
    inside = list(out.iterdir()) if out.is_dir() else []
    for path in inside:
        if path.is_symlink():
            raise ValueError(f"out: {path} is a symbolic link, and nothing is written through one: remove it")
    here = {p.name for p in inside} - {name + TEMPORARY for name in known}  # left by a run that was killed
    if here and not here & known and not any((out / name / CONFIG).is_file() for name in here):
        raise ValueError(f"out: {out} holds other things ({', '.join(sorted(here)[:4])}); name a new folder")
    if here and not resume:
        raise ValueError(f"out: {out} already holds a run; add --resume to go on with it, or name a new folder")


def _corpora(args) -> tuple[Corpus, Corpus | None]:
    """(training, held-out) text; None: a part of the former is held out."""
    corpus = named(args, "stdlib:train")
    own = not args.corpus and args.dataset is None
    names = args.validation or (["stdlib:validation"] if own else None)
    return corpus, None if names is None else told(Corpus.from_names(names, args.field, "validation"), "validation")
