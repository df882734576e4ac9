"""`writesae collect`: text in, a folder of firings out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..files import SEAL
from ..interrupt import INTERRUPTED
from ..options import add_dictionaries, add_model
from ..text.arguments import NAMED, add_options, named, tell_empty
from .estimate import Estimate, readable
from .manifest import MODES

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def configure(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text (a corpus or --dataset)")
    text.add_argument("corpus", nargs="?", help=NAMED)
    add_options(text)
    model = parser.add_argument_group("model")
    add_model(model)
    add_dictionaries(model)
    model.add_argument("--any-model", action="store_true", help="also with dictionaries that name another model")
    model.add_argument("--device", default="cpu", help="device of the model: cpu or cuda")
    model.add_argument(
        "--accelerate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run all the model's recurrences on this package's op, not only the dictionaries' layers",
    )
    what = parser.add_argument_group("what is kept")
    what.add_argument("--out", metavar="DIR", required=True, help="folder to write to; the same command on it resumes")
    what.add_argument("--mode", choices=MODES, default="all", help="keep all firings, the largest of a feature, or a "
                      "random sample of a feature")  # fmt: skip
    what.add_argument("--n", type=int, help="firings kept of a feature in the modes top and reservoir (default: 1000), "
                      "firings of a feature in the index in mode all (default: 100)")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="seed of the random sample")
    what.add_argument("--context", type=int, default=512, help="tokens a passage")
    what.add_argument("--batch", type=int, default=4, help="passages run together; more pay off on a GPU only")
    what.add_argument("--max-tokens", type=int, help="stop after this many tokens (default: the whole corpus)")
    what.add_argument("--shard-passages", type=int, help="passages a shard (default: about 500,000 firings a shard)")
    what.add_argument("--limit", type=_size, default="1GB", metavar="SIZE",
                      help="bytes on disk above which to ask first")  # fmt: skip
    what.add_argument("--yes", action="store_true", help="do not ask, whatever the size")


def run(args: argparse.Namespace) -> int:
    """Collects, prints the summary as JSON. Returns 0 done, 1 disk full or declined, 130 interrupted (resumable)."""
    corpus = named(args)
    require_device(args.device)
    from ..models import load
    from ..models.identity import loaded_digest, model_files
    from . import files
    from .run import collect
    from .source import ModelSource

    files.one_heap()
    dictionaries = _dictionaries(args)
    before = model_files(args.model)
    model, tokenizer = load(args.model, trust_remote_code=args.trust_remote_code)
    source = ModelSource(
        model.to(args.device), dictionaries, accelerate=args.accelerate, any_model=args.any_model, name=args.model,
        digest=loaded_digest(model, args.model, before),
    )  # fmt: skip
    try:
        summary = collect(
            corpus, tokenizer, source, args.out, mode=args.mode, n=args.n, seed=args.seed, context=args.context,
            batch=args.batch, max_tokens=args.max_tokens, bos=not args.no_bos, shard_passages=args.shard_passages,
            confirm=lambda estimate: _confirm(estimate, args.limit, args.yes), progress=True,
        )  # fmt: skip
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        print(f"writesae collect: {error}", file=sys.stderr)
        return 1
    shown = {name: x for name, x in summary.items() if name not in ("integrity", SEAL)}
    print(json.dumps({**shown, "left_out": tell_empty(corpus)}, indent=2))
    if summary.get("declined"):
        return 1
    return 0 if summary["complete"] else INTERRUPTED


def _dictionaries(args: argparse.Namespace, target: str = "state") -> dict:
    """{(layer, head): SAE} of every --sae; without one, of the embedded model's own of that target."""
    from ..default import dictionaries as embedded
    from ..sae import SAE
    from ..sae.checkpoint import dictionaries
    from ..sae.published import BEST, is_batchtopk

    names = {"default": "state", "default-writes": "write"}
    given = [str(path) for text in args.sae for path in (embedded(names[text]).values() if text in names else [text])]
    if not args.sae:
        if args.model != "default":
            raise ValueError("sae: expected at least one dictionary for this model, got none")
        given = [str(path) for path in embedded(target).values()]
    found: dict = {}
    chosen = False
    for text in given:
        site, equals, name = text.rpartition("=")
        paths = [Path(name)]
        if not paths[0].exists():
            raise FileNotFoundError(f"sae: expected a dictionary or a folder of them, got {name}, which is not there")
        if not equals and paths[0].is_dir() and not any((paths[0] / x).exists() for x in ("cfg.json", BEST)):
            paths = dictionaries(paths[0]) or paths  # where there is none, loading says what there is
        for path in paths:
            asked = args.batchtopk is not None and is_batchtopk(path)
            chosen |= asked
            try:
                sae = SAE.from_pretrained(path, batchtopk=args.batchtopk if asked else None)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"sae: expected a dictionary or a folder of them: {error}") from error
            place = _site(site, text) if equals else (sae.layer, sae.head)
            if None in place:
                raise ValueError(f"sae: {path} does not say its site; write --sae LAYER:HEAD={path}")
            if place in found:
                raise ValueError(f"sae: expected one dictionary a site, got two for {place[0]}:{place[1]}")
            found[place] = sae
    if args.batchtopk is not None and not chosen:
        raise ValueError("batchtopk: expected a published BatchTopK dictionary among those of --sae, got none")
    return found


def _site(text: str, whole: str) -> tuple[int, int]:
    layer, _, head = text.partition(":")
    if not (layer.isdigit() and head.isdigit()):
        raise ValueError(f"sae: expected LAYER:HEAD=PATH, got {whole}")
    return int(layer), int(head)


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


def _size(text: str) -> int:
    number = text.strip().lower().removesuffix("b")
    unit = number[-1:] if number[-1:] in "kmgt" else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}") from None


def require_device(name: str) -> None:
    """Raises ValueError, with the reason, unless models can run on the device "cpu" or "cuda"."""
    if name == "cpu":
        return
    from .._library import backends

    reason = backends()["cuda"] if name == "cuda" else "expected cpu or cuda"
    if reason is not None:
        raise ValueError(f"device: {name} cannot be used: {reason}")
