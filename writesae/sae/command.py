"""`writesae train`: dictionaries for some sites of a model, from text to a saved folder with its held-out metrics."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import torch

from ..files import make_folder, read_json, write_json
from ..options import add_device, add_model, count, require_device
from ..progress import tqdm
from ..ranks import add_ranks, place, share
from ..text import Corpus
from ..text.arguments import NAMED, add_options, tell_empty, told
from ..text.arguments import named as text_named
from ..text.tokens import check_vocabulary, tokenizing
from ..untrusted import first_line
from .config import INITS, METRICS, PATHS, TrainConfig
from .output import CHECKPOINT, HISTORY, PLOT, RECORD, check_out, join_ranks
from .plot import draw
from .pools import POOL, Pools
from .sae import KINDS, TARGETS
from .site import generator
from .sparsity import SPARSITIES
from .trackers import Trackers
from .variants import combined, named

_DEFAULTS = {f.name: f.default for f in fields(TrainConfig)}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add = parser.add_argument
    add_model(parser)
    add("--layer", type=int, help="layer of a single site, with --head")
    add("--head", type=int, help="value head of a single site, with --layer")
    add("--site", action="append", metavar="LAYER:HEAD", help="a site, 5:* for all heads of a layer, *:3 for one head "
        "of all layers, *:* for all; repeatable. All are trained from the same passes of the model")  # fmt: skip
    add_device(parser)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--resume", action="store_true", help="go on from the checkpoint in --out; --steps or --tokens may be more "
        "than before")  # fmt: skip
    add("--corpus", nargs="+", help=f"each {NAMED} (default: stdlib:train)")
    add_options(parser)
    add("--validation", nargs="+", help="held-out text, named like --corpus (default: stdlib:validation, or one in 20 "
        "of the documents of a --corpus or --dataset, which are then not trained on)")  # fmt: skip
    add("--max-tokens", type=count, help="tokens of the text, and of the held-out text, that are read at most, such as "
        "20M (default: all)")  # fmt: skip
    add("--shuffle", type=count, default=POOL, metavar="TOKENS", help="tokens of the text held in memory, among which "
        "passages are drawn in random order; of a larger text one such pool after the other (default 16M)")  # fmt: skip
    add("--length", type=int, default=256, help="tokens a passage")
    add("--batch", type=int, default=16, help="passages in one forward pass")
    add("--eval-passages", type=int, default=128, help="held-out passages the dictionary is evaluated on")
    add("--checkpoint-every", type=int, default=1000, help="steps between checkpoints")
    add("--evaluate-every", type=int, default=500, help="steps between looks at held-out passages while training")
    add("--watch-passages", type=int, default=16, help="held-out passages of those looks; 0: none")
    add("--steps", type=int, help=f"optimiser steps (default {_DEFAULTS['steps']}, or with --resume as before)")
    add("--tokens", type=count, help="in place of --steps: a budget of tokens whose states are trained on, --states a "
        "step, such as 200k, 100M or 1.5B; text that is shorter is read again")  # fmt: skip
    add("--track", metavar="NAME,...", help="log the training to tensorboard (in logs in --out), wandb, trackio or "
        "another tracker of accelerate (needs writesae[trackers]; default: none)")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bars")
    add("--target", choices=TARGETS, default=_DEFAULTS["target"], help="what is learnt: states, as in the paper, or "
        "the writes themselves")  # fmt: skip
    add("--kind", choices=KINDS, help="kind of dictionary (default: bilinear, of pursuit bilinear_tied)")
    add("-F", "--features", type=_numbers, default=[_DEFAULTS["F"]], help="atoms of the dictionary; several, as in "
        "1024,4096: a dictionary each, in one pass, in folders such as F1024")  # fmt: skip
    add("-k", "--k", type=_numbers, default=[_DEFAULTS["k"]], help="atoms active at a token; several as --features, "
        "and with it every combination")  # fmt: skip
    add("--variant", action="append", metavar="NAME=VALUE,...", help="in place of those lists: settings of one "
        "dictionary a site, such as k=16,F=2048,lr=1e-3; repeatable (default: one of the options above)")  # fmt: skip
    add("--atom-rank", type=int, default=_DEFAULTS["r"], help="rank of an atom")
    add("--sparsity", choices=(*SPARSITIES, "pursuit"), default=_DEFAULTS["sparsity"], help="how the atoms that fire "
        "are chosen; batchtopk, jumprelu and gated fire -k on average and end with a fixed threshold; pursuit codes "
        "writes one atom after the other")  # fmt: skip
    add("--metric", choices=METRICS, default=_DEFAULTS["metric"], help="how errors are measured: entry by entry, or as "
        "the model's later queries read them")  # fmt: skip
    add("--init", choices=INITS, default=_DEFAULTS["init"], help="what atoms start from")
    add("--path", choices=PATHS, default=_DEFAULTS["path"], help="how losses are computed: from sampled states "
        "(dense), from their writes (factored), or as the kind of dictionary allows (auto)")  # fmt: skip
    for name, text in (
        ("states", "states a step"),
        ("passages", "passages a step's states come from; 0: all of a block, on the factored path as few as hold them"),
        ("block", "passages whose writes are held at once"),
        ("uses", "times each state of a block is drawn, on average"), ("lr", "learning rate at the start"),
        ("lr_end", "learning rate at the end"),
        ("aux", "weight of the auxiliary loss, which revives dead atoms; 0: none"),
        ("k_aux", "dead atoms in the auxiliary loss"),
        ("balance", "of writes: how many times a squared error is divided by the write's norm; 0: plain, 2: all alike"),
        ("also_k", "of pursuit: train the codes of so many atoms as well"),
        ("dead_after", "steps without firing after which an atom is dead"),
        ("resample_every", "steps after which dead atoms are replaced, again and again"),
        ("penalty", "weight of the sparsity penalty at the start (jumprelu, gated); it then follows L0"),
        ("prepare", "passages of the first pass, for the mean and the initial atoms"),
    ):  # fmt: skip
        add("--" + name.replace("_", "-"), type=type(_DEFAULTS[name]), default=_DEFAULTS[name], help=text)
    add("--seed", type=_numbers, default=[_DEFAULTS["seed"]], help="seed of everything; several as --features")
    add("--text-seed", type=int, help="seed of which text each step sees (default: the first --seed)")
    add_ranks(parser.add_argument_group("many processes, each with its share of the sites, in one --out"))
    add("--devices", metavar="DEVICE,...", help="where dictionaries are trained, the sites in turn, such as "
        "cuda:0,cuda:1 (default: where the model is)")  # fmt: skip
    add("--not-centred", action="store_true", help="do not subtract the mean state")


def run(args: argparse.Namespace) -> int:
    """Trains, evaluates, saves. Returns the exit status."""
    patterns = _patterns(args)
    if args.rank is not None and args.world_size is None:
        raise ValueError("rank: expected --world-size with it, got --rank alone; the rank of atoms is --atom-rank")
    rank, size = place(args)
    own = check_out(args.out, rank, size, args.resume)
    args.kind = args.kind or ("bilinear_tied" if args.sparsity == "pursuit" else _DEFAULTS["kind"])
    lists = {"k": args.k, "F": args.features, "seed": args.seed}
    given = {n: x for n, x in vars(args).items() if n in _DEFAULTS and n not in lists}
    first = {n: x[0] for n, x in lists.items()}
    base = TrainConfig(**given | first | {"steps": _steps(args, own)}, r=args.atom_rank, centred=not args.not_centred)
    if args.variant and any(len(x) > 1 for x in lists.values()):
        raise ValueError("variant: expected it, or lists of -k, --features and --seed, got both")
    configs = named(base, args.variant) if args.variant else combined(base, lists)
    config = next(iter(configs.values()))
    for name in ("length", "batch", "eval_passages", "checkpoint_every", "evaluate_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected >= 1, got {getattr(args, name)}")
    if args.watch_passages < 0:
        raise ValueError(f"watch_passages: expected >= 0, got {args.watch_passages}")
    require_device(args.device)
    devices = _devices(args.devices)
    about = {"model": args.model, **config.record(), "sites": " ".join(":".join(x) for x in patterns)}
    if len(configs) > 1:
        about["variants"] = " ".join(configs)
    trackers = Trackers(args.track.split(","), args.out.resolve().name, own, about) if args.track else None
    corpus, held_out = _corpora(args)

    from ..models import load
    from ..models.identity import tokenizer_digest
    from .block import Block
    from .evaluate import evaluate
    from .readers import reader_moments, roots, seen_through
    from .resume import tokens_digest
    from .stream import ModelStream, Passages
    from .train import Trainer

    show = not args.quiet
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.trust_remote_code)
    every = _sites(patterns, model)
    if len(every) < size:
        raise ValueError(f"world_size: expected a site a process at least, got {len(every)} sites for {size}")
    sites = share(every, rank, size)
    model.to(args.device)
    check_vocabulary(tokenizer, model)
    how = {"bos": not args.no_bos, "progress": show}
    a_block = args.length * config.block  # what is left of a pool after its last whole block is not trained on
    pool = max(args.shuffle // a_block * a_block, min(args.shuffle, a_block))
    passages = Pools(corpus, tokenizer, args.length, size=pool, one_in=20 if held_out is None else 0,
                     max_tokens=args.max_tokens, **how)  # fmt: skip
    if held_out is None:
        validation = Passages(passages.held_out)
    else:
        most = args.shuffle if args.max_tokens is None else min(args.max_tokens, args.shuffle)
        validation = Passages.from_corpus(held_out, tokenizer, args.length, max_tokens=most, **how)
    left_out = {"corpus": tell_empty(corpus)}
    if held_out is not None:
        left_out["validation"] = tell_empty(held_out, "validation")
    if show:
        more = "" if passages.total else " and more to come"
        print(f"{len(passages)} training passages of {args.length} tokens{more}, {len(validation)} held out; "
              f"sites {sites}")  # fmt: skip
    rows = torch.randperm(len(validation), generator=generator(0, "evaluation"))[: args.eval_passages]

    def held_out_writes(count: int) -> list:
        with ModelStream(model, validation, sites, args.batch) as stream:
            return list(stream.writes(rows[:count]))

    def readers(ids) -> dict:
        return roots(reader_moments(model, ids, {layer for layer, _ in sites}, args.batch), sites)

    root: dict = {}
    if config.metric == "readers":
        prepare = torch.randperm(len(passages), generator=generator(config.drawn_by, "readers"))[: config.prepare]
        root = readers(passages.ids[prepare])

    def block(parts: list, site: tuple[int, int], inside: bool = False) -> Block:
        layer, head = site
        return Block([part[layer] for part in parts], head, config.target, root.get(site) if inside else None)

    watched, reading = {}, {}
    if args.watch_passages:
        parts = held_out_writes(args.watch_passages)
        watched = {site: block(parts, site, True) for site in sites}
        try:
            reading = {} if root else readers(validation.ids[rows[: args.watch_passages]])
        except ValueError as error:
            print(f"while training, writes are compared entry by entry, not as read later: {error}", file=sys.stderr)
    tell = [_tell] if show else []

    def log(record: dict) -> None:
        for one in tell:
            one(record)

    with ModelStream(model, passages, sites, args.batch) as stream, ExitStack() as stack:
        if trackers is not None:
            tell.append(stack.enter_context(trackers).log)
        digest = tokenizer_digest(tokenizer, tokenizing(tokenizer)[0])
        pinned = {"validation": tokens_digest(validation.ids), "tokenizer": digest}
        trainer = Trainer(stream, sites, configs if len(configs) > 1 else config, own, args.resume, args.model, show,
                          pinned, watched, log, root, devices, reading)  # fmt: skip
        if trainer.done:
            print(f"going on after step {trainer.done}, to step {config.steps}", file=sys.stderr)
        began = time.monotonic()
        trainer.run(None, args.checkpoint_every, args.evaluate_every)
        seconds = time.monotonic() - began
    parts, everything = held_out_writes(args.eval_passages), {}
    for name, trainers in trainer.every.items():
        saes = trainer.export() if not name else trainer.export()[name]
        for site in trainers:
            sae = saes[site]
            sae.metrics = evaluate(sae, block(parts, site))
            if site in root:
                sae.metrics["readers"] = evaluate(seen_through(sae, root[site]), block(parts, site, True))
            sae.training_record["seconds"] = round(seconds, 1)
            one = "L{}H{}".format(*site)
            below = [x for x in (name, one if len(every) > 1 else "") if x]
            folder = make_folder(args.out, *below) if below else args.out
            sae.save_pretrained(folder)
            whose = f"{name}/{one}" if name else one
            everything[whose] = m = sae.metrics
            print(
                f"{whose}: FVU {m['fvu']:.4f}, L0 {m['l0']:.1f}, {m['alive']} of {sae.F} atoms alive, median "
                f"cosine to native writes {m['cosine_median']:.3f} (of the winner {m['winner_cosine_median']:.3f}) on "
                f"{m['states']} held-out {config.target}s{_of_writes(m)}; saved in {folder}"
            )
    left_out["corpus"] = corpus.left_out()  # of a text that is read a pool at a time, more has been met since
    records = {name: one.record() for name, one in configs.items()}
    record = {"model": args.model, "seconds": seconds, "config": records if len(configs) > 1 else config.record(),
              "metrics": everything, "left_out": left_out}  # fmt: skip
    write_json(own / RECORD, record, allow_nan=True)  # a NaN tells of a run that diverged
    draw(own / PLOT, trainer.history)
    if join_ranks(args.out, size):
        draw(args.out / PLOT, read_json(args.out / HISTORY))
    return 0


def _of_writes(metrics: dict) -> str:
    """What is said of dictionaries of writes only."""
    cosine, inside = metrics.get("write_cosine_median"), metrics.get("readers")
    text = "" if cosine is None else f", cosine of a write and all its atoms {cosine:.3f}"
    if inside is None:
        return text
    cosine = inside.get("write_cosine_median")
    text += f"; as later queries read them FVU {inside['fvu']:.4f}"
    return text if cosine is None else f"{text}, that cosine {cosine:.3f}"


def _tell(record: dict) -> None:
    """Prints what was found on held-out passages, above the progress bar."""
    if "held_out_fvu" not in record:
        return
    values = record["held_out_fvu"].values()
    span = "" if len(values) == 1 else f" (mean; {min(values):.4f} to {max(values):.4f} over {len(values)} sites)"
    l0, dead, wins = (record[name].values() for name in ("held_out_l0", "dead", "beats_deletion"))
    n = len(values)
    tqdm.write(
        f"step {record['step']}: held-out FVU {sum(values) / n:.4f}{span}, L0 {sum(l0) / n:.1f}, {sum(dead)} dead "
        f"atoms, better than deletion at {sum(wins) / n:.0%} of writes",
        file=sys.stderr,
    )


def _numbers(text: str) -> list[int]:
    """Whole numbers between commas; a type for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 32 or 16,32,64, got {text!r}") from None


def _devices(text: str | None) -> list[torch.device] | None:
    """Those of --devices, if they are there."""
    if text is None:
        return None
    found = []
    for name in text.split(","):
        try:
            device = torch.device(name.strip())
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"devices: {name.strip()!r} cannot be used: {first_line(error)}") from error
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"devices: expected cpu or cuda:N, got {name.strip()!r}")
        found.append(device)
    return found


def _steps(args, own: Path) -> int:
    """Optimiser steps in all."""
    from .resume import read_checkpoint

    if args.steps is not None and args.tokens is not None:
        raise ValueError("tokens: expected --steps or --tokens, got both")
    if args.tokens is not None:
        if args.tokens < max(args.states, 1):
            raise ValueError(f"tokens: expected at least a step's, --states {args.states}, got {args.tokens}")
        return args.tokens // max(args.states, 1)
    if args.steps is None and args.resume:
        config = read_checkpoint(own / CHECKPOINT)["identity"].get("config")
        return (config if isinstance(config, dict) else {}).get("steps", TrainConfig.steps)
    return TrainConfig.steps if args.steps is None else args.steps


def _patterns(args) -> list[tuple[str, str]]:
    """(layer, head) of every site asked for, each a number or *."""
    found = []
    if (args.layer is None) != (args.head is None):
        raise ValueError("site: expected --layer and --head together")
    if args.layer is not None:
        found.append((str(args.layer), str(args.head)))
    for text in args.site or ():
        layer, _, head = text.partition(":")
        if not all(x == "*" or x.isascii() and x.isdigit() for x in (layer, head)):
            raise ValueError(f"site: expected LAYER:HEAD, such as 2:3, 2:* or *:*, got {text!r}")
        found.append((layer, head))
    if not found:
        raise ValueError("site: expected --layer and --head, or --site LAYER:HEAD")
    return found


def _sites(patterns: list[tuple[str, str]], model) -> list[tuple[int, int]]:
    """Sites of the patterns, in the model's order where there is a *; what the model lacks is refused by attach."""
    from ..models import hf_gated_delta

    here = [(site.layer_index, head) for site in hf_gated_delta.layers(model) for head in range(site.num_v_heads)]
    found: dict[tuple[int, int], None] = {}
    for layer, head in patterns:
        if "*" not in (layer, head):
            found[int(layer), int(head)] = None
            continue
        matching = [(n, h) for n, h in here if layer in ("*", str(n)) and head in ("*", str(h))]
        if not matching:
            layers = ", ".join(str(n) for n in dict.fromkeys(n for n, _ in here))
            raise ValueError(f"site: {layer}:{head} is nowhere in this model, whose layers with a state are {layers}")
        found |= dict.fromkeys(matching)
    return list(found)


def _corpora(args) -> tuple[Corpus, Corpus | None]:
    """(training, held-out) text; None: a part of the former is held out."""
    corpus = text_named(args, "stdlib:train")
    own = not args.corpus and args.dataset is None
    names = args.validation or (["stdlib:validation"] if own else None)
    return corpus, None if names is None else told(Corpus.from_names(names, args.field, "validation"), "validation")
