"""`writesae collect`: text in, a folder of firings out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from functools import partial

from ..files import SEAL
from ..interrupt import INTERRUPTED
from ..options import add_device, add_dictionaries, add_model, dictionaries, require_device, size
from ..ranks import add_ranks, place
from ..text.arguments import NAMED, add_options, named, tell_empty
from . import manifest
from .estimate import Estimate, readable
from .manifest import MODES
from .mirror import place_of

_PATHS = ("corpus", "model", "sae", "out")  # arguments that may name a file here


def configure(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text (a corpus or --dataset)")
    text.add_argument("corpus", nargs="?", help=NAMED)
    add_options(text)
    model = parser.add_argument_group("model")
    add_model(model)
    add_dictionaries(model)
    add_device(model, dtype=False)
    model.add_argument(
        "--accelerate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run all the model's recurrences on this package's op, not only the dictionaries' layers",
    )
    what = parser.add_argument_group("what is kept")
    what.add_argument("--out", metavar="DIR", required=True, help="folder to write to, or s3://BUCKET/PREFIX; the same "
                      "command on it resumes")  # fmt: skip
    what.add_argument("--mode", choices=MODES, default="all", help="keep all firings, the largest of a feature, or a "
                      "random sample of a feature")  # fmt: skip
    what.add_argument("--n", type=int, help="firings kept of a feature in the modes top and reservoir (default: 1000), "
                      "firings of a feature in the index in mode all (default: 100)")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="seed of the random sample")
    what.add_argument("--activations", choices=("packed", "exact"), help="packed: rounded, which takes 1.4 bytes a "
                      "firing less; the relative error is at most 2^-13 with 4,096 features, 2^-9 with 65,536 "
                      "(default: packed, exact for dictionaries of more than 65,536 features)")  # fmt: skip
    what.add_argument("--context", type=int, default=512, help="tokens a passage")
    what.add_argument("--batch", type=int, default=4, help="passages run together; more pay off on a GPU only")
    what.add_argument("--max-tokens", type=int, help="stop after this many tokens (default: the whole corpus)")
    what.add_argument("--shard-passages", type=int, help="passages a shard (default: about 500,000 firings a shard)")
    what.add_argument("--limit", type=size, default="1GB", metavar="SIZE",
                      help="bytes on disk above which to ask first")  # fmt: skip
    what.add_argument("--yes", action="store_true", help="do not ask, whatever the size")
    many = parser.add_argument_group(
        "several workers", "They fill one folder that all of them see. One may die: the others, or the same command "
        "again, do what it left. Nothing is missing then, and nothing there twice.",
    )  # fmt: skip
    add_ranks(many)
    many.add_argument("--unit", type=size, metavar="SIZE", help="bytes of text, at least, given to a worker at a time; "
                      "a document is never cut (default: four shards' worth where there are several workers)"
                      )  # fmt: skip
    many.add_argument("--engine", metavar="ENGINE", help="have Ray give units to workers: ray (the cluster that runs "
                      "here, else one of this machine) or ray://HOST:PORT; needs writesae[ray] (default: none)"
                      )  # fmt: skip
    many.add_argument("--worker-cpus", type=float, default=1, help="what a worker takes of the CPUs of --engine, its "
                      "threads; with --device cuda it takes a GPU too")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Collects, prints the summary as JSON. Returns 0 done, 1 disk full or declined, 130 interrupted (resumable)."""
    rank, world_size = _place(args)
    settings = {
        "mode": args.mode, "n": args.n, "seed": args.seed, "context": args.context, "batch": args.batch,
        "max_tokens": args.max_tokens, "bos": not args.no_bos, "shard_passages": args.shard_passages,
        "unit": args.unit,
    }  # fmt: skip

    def confirm(estimate: Estimate) -> bool:
        return _confirm(estimate, args.limit, args.yes)

    corpus = None
    try:
        if args.engine is None:
            from .run import collect

            corpus, tokenizer, source = prepare(args, args.device)
            summary = collect(
                corpus, tokenizer, source, args.out, rank=rank, world_size=world_size, confirm=confirm, progress=True,
                **settings,
            )  # fmt: skip
        else:
            from .on_ray import collect_on_ray

            with redirect_stdout(sys.stderr):  # where Ray tells of nodes that die; what is printed here is JSON
                summary = collect_on_ray(
                    partial(prepare, _absolute(args)), args.out, engine=args.engine, device=args.device,
                    cpus=args.worker_cpus, confirm=confirm, progress=True, **settings,
                )  # fmt: skip
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        print(f"writesae collect: {error}", file=sys.stderr)
        return 1
    shown = {name: x for name, x in summary.items() if name not in ("integrity", "layout", SEAL)}
    if corpus is not None:
        shown["left_out"] = tell_empty(corpus)
    print(json.dumps(shown, indent=2))
    if summary.get("declined"):
        return 1
    return 0 if summary["complete"] else INTERRUPTED


def prepare(args: argparse.Namespace, device: str) -> tuple:
    """(corpus, tokenizer, source) of the command's arguments, on a device; also called by workers of an engine."""
    corpus = named(args)
    require_device(device)
    from ..models import load
    from ..models.identity import loaded_digest, model_files
    from . import files
    from .source import ModelSource

    files.one_heap()
    saes = dictionaries(args)
    before = model_files(args.model)
    model, tokenizer = load(args.model, trust_remote_code=args.trust_remote_code)
    source = ModelSource(
        model.to(device), saes, accelerate=args.accelerate, any_model=args.any_model, name=args.model,
        digest=loaded_digest(model, args.model, before), activations=_activations(args, saes),
    )  # fmt: skip
    return corpus, tokenizer, source


def _activations(args: argparse.Namespace, saes) -> str:
    """What is asked for; else what a folder that was begun has; else what the help says."""
    if args.activations is not None:
        return args.activations
    where = place_of(args.out)
    with where.beginning():
        pass  # of an object store the manifest is fetched, if it has one
    for name in ("manifest.json", manifest.COPY):
        try:
            return manifest.activations(manifest.read(where.path / name))
        except ValueError:
            continue
    from ..models.grid import check_activations

    try:
        for sae in saes.values():
            check_activations("packed", sae.F)
    except ValueError:
        return "exact"
    return "packed"


def _absolute(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, paths in them as another process in another folder finds them."""

    def whole(value):
        if isinstance(value, list):
            return [whole(one) for one in value]
        return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value

    return argparse.Namespace(**{name: whole(x) if name in _PATHS else x for name, x in vars(args).items()})


def _place(args: argparse.Namespace) -> tuple[int, int | None]:
    """(rank, world size or None)."""
    if args.engine is not None and (args.distributed or args.rank is not None or args.world_size is not None):
        raise ValueError("engine: expected it, or --rank and --world-size or --distributed, got both")
    return place(args) if args.distributed or args.rank is not None or args.world_size is not None else (0, None)


def _confirm(estimate: Estimate, limit: int, yes: bool) -> bool:
    print(f"estimate: {estimate}", file=sys.stderr)
    if yes or (estimate.bytes is not None and estimate.bytes <= limit):
        return True
    why = f"more than --limit {readable(limit)}" if estimate.bytes is not None else "an unknown size"
    if sys.stdin is not None and sys.stdin.isatty():  # None: closed
        try:
            return input(f"{why}; go on? [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            print(file=sys.stderr)
    print(f"writesae collect: {why}; add --yes to collect it all the same", file=sys.stderr)
    return False
