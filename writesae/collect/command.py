"""`writesae collect`: text in, a folder of firings out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..options import add_model
from .estimate import Estimate, readable
from .modes import MODES

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def configure(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text (one of the two)")
    text.add_argument("corpus", nargs="?", help="text, .jsonl or .parquet file, or a folder of them; stdlib:SPLIT "
                      "(train, validation or test) is the Python standard library's sources")  # fmt: skip
    text.add_argument("--dataset", metavar="NAME[:CONFIG]", help="name for the `datasets` package, streamed")
    text.add_argument("--split", default="train", help="split of --dataset")
    text.add_argument("--field", default="text", help="JSONL field, or Parquet or dataset column, with the text")
    model = parser.add_argument_group("model")
    add_model(model)
    model.add_argument("--sae", action="append", default=[], metavar="[LAYER:HEAD=]FOLDER",
                       help="a dictionary, or a folder of dictionary folders; repeatable. Without it, the embedded "
                       "model's own")  # fmt: skip
    model.add_argument("--device", default="cpu", help="cpu or cuda")
    model.add_argument(
        "--accelerate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run all the model's recurrences on this package's op, not only the dictionaries' layers",
    )
    what = parser.add_argument_group("what is kept")
    what.add_argument("--out", required=True, help="folder; the same command on the same folder resumes")
    what.add_argument("--mode", choices=MODES, default="all", help="all firings, the largest or a sample a feature")
    what.add_argument("--n", type=int, help="firings kept a feature in the modes top and reservoir (1000), firings in "
                      "the index by feature in mode all (100)")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="of the reservoir")
    what.add_argument("--context", type=int, default=512, help="tokens a passage")
    what.add_argument("--batch", type=int, default=4, help="passages run together; more pay off on a GPU only")
    what.add_argument("--max-tokens", type=int, help="stop after this many tokens")
    what.add_argument("--no-bos", action="store_true", help="no beginning-of-text token before a document")
    what.add_argument(
        "--shard-passages", type=int, help="passages a shard; by default what gives about 500,000 firings"
    )
    what.add_argument("--limit", type=_size, default="1GB", help="ask before collecting more than this")
    what.add_argument("--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    """Collects, prints the summary as JSON. Returns 0 done, 1 disk full or declined, 130 interrupted (resumable)."""
    corpus = _corpus(args)
    for name in corpus.skipped[:10]:
        print(f"skipped {name}", file=sys.stderr)
    if corpus.skipped:
        print(f"skipped {len(corpus.skipped)} files that are not text, {len(corpus.files)} left", file=sys.stderr)
    require_device(args.device)
    from ..models import load
    from . import files
    from .run import collect
    from .source import ModelSource

    files.one_heap()
    dictionaries = _dictionaries(args)
    model, tokenizer = load(args.model, trust_remote_code=args.trust_remote_code)
    source = ModelSource(model.to(args.device), dictionaries, accelerate=args.accelerate)
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
    print(json.dumps(summary, indent=2))
    if summary.get("declined"):
        return 1
    return 0 if summary["complete"] else 130


def _corpus(args: argparse.Namespace):
    from .corpus import Corpus

    if (args.corpus is None) == (args.dataset is None):
        raise ValueError("corpus: expected a path or --dataset, " + ("got both" if args.corpus else "got neither"))
    if args.dataset is not None:
        name, _, config = args.dataset.partition(":")
        return Corpus.from_dataset(name, args.field, args.split, config or None)
    return Corpus.from_name(args.corpus, args.field)


def _dictionaries(args: argparse.Namespace) -> dict:
    """{(layer, head): SAE} of every --sae."""
    from ..sae import SAE

    given = args.sae
    if not given:
        own = Path(__file__).parent.parent / "default" / "sae"
        if args.model != "default" or not own.is_dir():
            raise ValueError("sae: expected at least one dictionary for this model, got none")
        given = [str(own)]
    found: dict = {}
    for text in given:
        site, equals, folder = text.rpartition("=")
        folders = [Path(folder)]
        if not equals and not (folders[0] / "cfg.json").exists():
            folders = sorted(path.parent for path in folders[0].glob("*/cfg.json"))
            if not folders:
                raise ValueError(f"sae: expected a dictionary (cfg.json) or a folder of them, got {folder}")
        for path in folders:
            sae = SAE.from_pretrained(path)
            place = _site(site, text) if equals else (sae.layer, sae.head)
            if None in place:
                raise ValueError(f"sae: {path} does not say its site; write --sae LAYER:HEAD={path}")
            if place in found:
                raise ValueError(f"sae: expected one dictionary a site, got two for {place[0]}:{place[1]}")
            found[place] = sae
    return found


def _site(text: str, whole: str) -> tuple[int, int]:
    layer, _, head = text.partition(":")
    if not (layer.isdigit() and head.isdigit()):
        raise ValueError(f"sae: expected LAYER:HEAD=FOLDER, got {whole}")
    return int(layer), int(head)


def _confirm(estimate: Estimate, limit: int, yes: bool) -> bool:
    print(f"estimate: {estimate}", file=sys.stderr)
    if yes or (estimate.bytes is not None and estimate.bytes <= limit):
        return True
    why = f"more than --limit {readable(limit)}" if estimate.bytes is not None else "an unknown size"
    if not sys.stdin.isatty():
        print(f"writesae collect: {why}; add --yes to collect it all the same", file=sys.stderr)
        return False
    return input(f"{why}; go on? [y/N] ").strip().lower() in ("y", "yes")


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
