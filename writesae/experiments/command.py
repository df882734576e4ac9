"""`writesae replace`: the replacement test on held-out text, with its statistics and report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..options import add_device, add_dictionaries, add_model, dictionaries, require_device, size
from ..text import Corpus
from ..text.arguments import NAMED, add_options, named, tell_empty, told
from ..text.tokens import check_vocabulary
from .conditions import CONDITIONS, DEFAULT_CONDITIONS, NATIVES, OF_WRITES, READS, SCALES, TRAINING_CONDITIONS

_CORPUS = "stdlib:test"
_TRAIN_TOKENS = 60_000
_SHOWN_PASSAGES = 32  # of whose keys a page tells which an atom answers to


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is tested")
    add_model(what)
    add_dictionaries(what)
    what.add_argument("--corpus", help=f"held-out text: {NAMED} (default: {_CORPUS})")
    add_options(what)
    what.add_argument("--max-tokens", type=int, default=2_000_000, help="tokens of it that are read at most, from "
                      "files in an order drawn by --seed")  # fmt: skip
    what.add_argument("--select", default="stdlib:validation", metavar="CORPUS", help="text on which features are "
                      "chosen, named like --corpus, or none to test whatever fires")  # fmt: skip
    what.add_argument("--select-tokens", type=int, help="tokens of it that are read at most, from files in an order "
                      "drawn by --seed (default: 200 for each of --firings, at least 20,000)")  # fmt: skip
    what.add_argument("--train", default="stdlib:train", metavar="CORPUS", help="text whose native writes the trained "
                      "atoms are held against, named like --corpus, or none to take that of --select")  # fmt: skip
    what.add_argument("--train-tokens", type=int, default=_TRAIN_TOKENS, help="tokens of it that are read at most, at "
                      "least as many as a dictionary has atoms")  # fmt: skip
    what.add_argument("--longest", type=int, metavar="N", help="test only the dictionaries of the model's N heads with "
                      "the longest memory, in tokens (default: every dictionary given)")  # fmt: skip
    what.add_argument("--min-selected", type=int, default=5, help="tokens of the --select text at which a feature must "
                      "have the largest code")  # fmt: skip
    what.add_argument("--firings", type=int, default=1000, help="firings tested at each site")
    what.add_argument("--each", type=int, default=8, help="firings tested a passage and site, at most")
    what.add_argument("--context", type=int, default=256, help="tokens a passage")
    how = parser.add_argument_group("how")
    how.add_argument("--horizon", type=int, default=8, help="tokens followed after the edit")
    how.add_argument("--read", choices=(*READS, "both"), default="after", help="when the state is changed: after the "
                     "token has read it, as in the paper, before, or both in one run")  # fmt: skip
    how.add_argument("--native", choices=NATIVES, nargs="+", default=list(NATIVES), help="what counts as the "
                     "write; the "
                     "first is the headline")  # fmt: skip
    how.add_argument("--scale", choices=SCALES, nargs="+", default=list(SCALES), help="size of what is put in "
                     "its place; "
                     "the first is the headline")  # fmt: skip
    how.add_argument("--conditions", choices=(*CONDITIONS, "all"), nargs="+", help="what is put in its place, or all "
                     f"(default: {' '.join(DEFAULT_CONDITIONS)})")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="seed of the choice, the random control and the bootstraps")
    add_device(how)
    how.add_argument("--memory", type=size, default="1G", metavar="SIZE", help="bytes of a batch of forks, about")
    how.add_argument("--out", metavar="DIR", required=True, help="folder to write to; the same command on it resumes")


def run(args: argparse.Namespace) -> int:
    """Prints the headline as JSON. Returns 0."""
    import torch

    from ..models import load
    from .replace import passages_of, run_replacement, select_tokens
    from .statistics import need

    require_device(args.device)
    need("scipy.stats"), need("statsmodels.stats.proportion"), need("matplotlib")  # missing extras say so before work
    test = named(args, _CORPUS)
    select = None if args.select == "none" else told(Corpus.from_name(args.select, args.field, "select"), "select")
    train = None if args.train == "none" else told(Corpus.from_name(args.train, args.field, "train"), "train")
    saes = dictionaries(args)
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.trust_remote_code)
    check_vocabulary(tokenizer, model)

    def passages(corpus, most):
        return passages_of(
            corpus, tokenizer, args.context, bos=not args.no_bos, max_tokens=most, seed=args.seed
        )  # fmt: skip

    chosen = None
    if select is not None:
        most = select_tokens(args.firings) if args.select_tokens is None else args.select_tokens
        chosen = passages(select, most)
    conditions = args.conditions
    if conditions is not None and "all" in conditions:
        texts = train is not None or select is not None
        states = any(sae.target == "state" for sae in saes.values())
        without = (() if texts else TRAINING_CONDITIONS) + (OF_WRITES if states else ())
        conditions = [c for c in CONDITIONS if c not in without]
    tested = passages(test, args.max_tokens)
    result = run_replacement(
        model.to(args.device), tokenizer, saes, tested, select=chosen,
        train=None if train is None else passages(train, args.train_tokens), read=args.read, longest=args.longest,
        min_selected=args.min_selected, firings=args.firings, each=args.each, horizon=args.horizon, natives=args.native,
        scales=args.scale, conditions=conditions, seed=args.seed, memory=args.memory, out=args.out,
        any_model=args.any_model,
    )  # fmt: skip
    out = Path(args.out)
    left_out = {"corpus": tell_empty(test)}
    if select is not None:
        left_out["select"] = tell_empty(select, "select")
    corpus = args.corpus or args.dataset or _CORPUS
    if train is not None:
        left_out["train"] = tell_empty(train, "train")
    summary = result.save(
        out, model=str(args.model), corpus=corpus, select=args.select, train=args.train, left_out=left_out,
        atoms=about(model, tokenizer, saes, result, tested),
    )  # fmt: skip
    if summary["n"] < args.firings * len(result.sites):
        print(f"the text ran out: {summary['n']} of {args.firings * len(result.sites)} firings", file=sys.stderr)
    from ..report import build

    page = build(out, out)
    shown = (
        "n", "headline", "atom_vs_codebook", "atom_vs_codebook_ci95", "win_rate", "win_rate_ci95", "strict_chain",
        "kl_median", "native_kl_max", "seconds",
    )  # fmt: skip
    write = {site: record["write"] for site, record in summary["settings"]["sites"].items()}
    print(json.dumps({**{name: summary[name] for name in shown}, "write": write, "report": str(page)}, indent=2))
    return 0


def about(model, tokenizer, saes, result, passages) -> dict:
    """What is known of the atoms that the page shows, by the model's weights and its keys on some of the text."""
    import numpy as np
    import torch

    from ..atoms import describe
    from ..report.html import top_atoms

    most = max(len(passage.tokens) for passage in passages)
    whole = [passage.tokens for passage in passages if len(passage.tokens) == most][:_SHOWN_PASSAGES]
    features: dict[tuple[int, int], list[int]] = {}
    for (layer, head, feature), _ in top_atoms(result.table):
        features.setdefault((layer, head), []).append(feature)
    return describe(model, tokenizer, saes, features, ids=torch.from_numpy(np.stack(whole)))
