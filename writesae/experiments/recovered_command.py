"""`writesae loss-recovered`: every write coded, closed loop, on held-out text, with its table, picture and page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..options import add_device, add_dictionaries, add_model, dictionaries, require_device
from ..text import Corpus
from ..text.arguments import NAMED, add_options, named, tell_empty, told
from ..text.tokens import check_vocabulary

_CORPUS = "stdlib:test"
_BY, _READS = ("head", "layer", "all"), ("before", "after")


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is run")
    add_model(what)
    add_dictionaries(what, "default-writes")
    what.add_argument("--corpus", help=f"held-out text: {NAMED} (default: {_CORPUS})")
    add_options(what)
    what.add_argument("--passages", type=int, default=48, help="passages of it, drawn by --seed")
    what.add_argument("--context", type=int, default=256, help="tokens a passage")
    what.add_argument("--max-tokens", type=int, default=200_000, help="tokens of it from which the passages are drawn "
                      "at most, from files in an order drawn by --seed")  # fmt: skip
    what.add_argument("--codebook", action=argparse.BooleanOptionalAction, help="also as many native writes of the "
                      "--train text as the dictionary has atoms, by the same rule (default: with dictionaries of "
                      "writes)")  # fmt: skip
    what.add_argument("--train", default="stdlib:train", metavar="CORPUS", help="text whose native writes make the "
                      "codebook, named like --corpus")  # fmt: skip
    what.add_argument("--train-tokens", type=int, default=60_000, help="tokens of it that are read at most, at least "
                      "as many as a dictionary has atoms")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--k", type=_k, nargs="+", default=[1, 8], metavar="N", help="atoms a write, each tried, or own "
                     "for each dictionary's own")  # fmt: skip
    how.add_argument("--by", choices=_BY, nargs="+", default=["head", "all"], help="what is changed at once: each head "
                     "by itself, all given of a layer, all of them")  # fmt: skip
    how.add_argument("--read", choices=(*_READS, "both"), default="before", help="when a token reads the changed "
                     "state: before, its own write is coded, too; after, its own write is still as it was made; or "
                     "both, one by one")  # fmt: skip
    how.add_argument("--seed", type=int, default=0, help="seed of the passages, the codebook and the bootstrap")
    how.add_argument("--batch", type=int, default=48, help="passages in one forward pass")
    add_device(how)
    how.add_argument("--out", metavar="DIR", required=True, help="folder to write to; the same command on it resumes")


def run(args: argparse.Namespace) -> int:
    """Prints the table. Returns 0."""
    import torch

    from ..models import load
    from ..report import recovered as report
    from ..sae.stream import Passages
    from .recovered import run_recovered
    from .recovered_result import printed
    from .statistics import need

    require_device(args.device)
    need("matplotlib"), need("jinja2")  # missing extras say so before work
    if args.passages < 1:
        raise ValueError(f"passages: expected at least 1, got {args.passages}")
    if None in args.k and len(args.k) > 1:
        raise ValueError("k: expected numbers, or own by itself")
    test = named(args, _CORPUS)
    saes = {site: sae.to(args.device) for site, sae in dictionaries(args, "write").items()}
    of_writes = all(sae.target == "write" for sae in saes.values())
    train = None
    if of_writes if args.codebook is None else args.codebook:
        train = told(Corpus.from_name(args.train, args.field, "train"), "train")
    elif args.codebook is None:
        print("no codebook: it takes dictionaries of writes", file=sys.stderr)
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.trust_remote_code)
    check_vocabulary(tokenizer, model)

    def passages(corpus: Corpus, most: int) -> Passages:
        drawn, _ = corpus.shuffled(args.seed)
        return Passages.from_corpus(drawn, tokenizer, args.context, bos=not args.no_bos, max_tokens=most)

    text = passages(test, args.max_tokens)
    if len(text) < args.passages:
        print(f"the text ran out: {len(text)} of {args.passages} passages", file=sys.stderr)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(args.seed))
    result = run_recovered(
        model.to(args.device), saes, Passages(text.ids[order[: args.passages]]),
        codebook=None if train is None else passages(train, args.train_tokens),
        ks=None if args.k == [None] else args.k, by=tuple(args.by), read=args.read, batch=args.batch, seed=args.seed,
        out=args.out, any_model=args.any_model,
    )  # fmt: skip
    left_out = {"corpus": tell_empty(test), **({} if train is None else {"train": tell_empty(train, "train")})}
    corpus = args.corpus or args.dataset or _CORPUS
    summary = result.save(
        Path(args.out), model=str(args.model), corpus=corpus, train=None if train is None else args.train,
        left_out=left_out,
    )  # fmt: skip
    page = report.build(summary, args.out)
    print(printed(summary))
    print(f"report: {page}")
    return 0


def _k(text: str) -> int | None:
    if text == "own":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of atoms, or own, got {text!r}") from None
