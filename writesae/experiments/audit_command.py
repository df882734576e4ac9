"""`writesae audit`: edits beside matched random ones: what else changes, with a verdict a line and a page."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from pathlib import Path

from ..options import add_device, add_dictionaries, add_model, dictionaries, require_device
from ..text.arguments import NAMED, add_options, named
from ..text.tokens import check_vocabulary

_CORPUS = "stdlib:test"
_SITE = r"(?P<layer>\d{1,6}):(?P<head>\d{1,6})"
_SAMPLE = {
    "delete": "LAYER:HEAD", "erase": "FEATURE@LAYER:HEAD", "scale": "FEATURE@LAYER:HEAD=FACTOR",
    "install": "TOKEN@LAYER:HEAD[=MAGNITUDE]",
}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("edits, each audited by itself; at least one")
    what.add_argument("--edit", action="append", default=[], metavar="FILE", help="edits made together, of a JSON "
                      'file: {"edits": [{"position": 40, "layer": 5, "head": 3, "feature": 17, "scale": 2.0}, ...]}; '
                      "row (a passage's number), kind, when, left and right as in docs/audit.md; repeatable "
                      "(default: none)")  # fmt: skip
    what.add_argument("--delete", action="append", default=[], metavar=_SAMPLE["delete"], help="delete a head's write; "
                      "repeatable (default: none)")  # fmt: skip
    what.add_argument("--erase", action="append", default=[], metavar=_SAMPLE["erase"], help="delete the write where a "
                      "feature fires; repeatable (default: none)")  # fmt: skip
    what.add_argument("--scale", action="append", default=[], metavar=_SAMPLE["scale"], help="multiply a feature's "
                      "part of the state where it fires; repeatable (default: none)")  # fmt: skip
    what.add_argument("--install", action="append", default=[], metavar=_SAMPLE["install"], help="write a token's "
                      "direction, in units of the write's norm (3); TOKEN is text or a number; repeatable (default: "
                      "none)")  # fmt: skip
    what.add_argument("--every", action="store_true", help="make the last four at every such token, and not at one of "
                      "every passage")  # fmt: skip
    what.add_argument("--when", choices=("after", "before"), default="after", help="whether a token reads its state "
                      "before the change or after it: change it after, or before, the read")  # fmt: skip
    where = parser.add_argument_group("what they are made in")
    add_model(where)
    add_dictionaries(where)
    where.add_argument("--corpus", help=f"text: {NAMED} (default: {_CORPUS})")
    add_options(where)
    where.add_argument("--passages", type=int, default=64, help="passages of it, drawn by --seed")
    where.add_argument("--context", type=int, default=256, help="tokens a passage")
    how = parser.add_argument_group("how")
    how.add_argument("--horizon", type=int, default=64, help="tokens after the first edit that are followed one by one")
    how.add_argument("--seed", type=int, default=0, help="seed of passages, places, controls and bootstrap")
    how.add_argument("--batch", type=int, default=8, help="passages in one forward pass")
    add_device(how)
    how.add_argument("--out", metavar="DIR", required=True, help="folder to write to")


def run(args: argparse.Namespace) -> int:
    """Prints a verdict a line. Returns 0."""
    import torch

    from ..models import load
    from ..models.sites import layers
    from ..report import audit as report
    from .audit import audit
    from .audit_edits import read_edits
    from .statistics import need

    start = time.perf_counter()
    parsed = [(option, text, _parsed(option, text)) for option in _SAMPLE for text in getattr(args, option)]
    if not parsed and not args.edit:
        raise ValueError("edit: expected at least one of --edit, --delete, --erase, --scale and --install, got none")
    require_device(args.device)
    need("matplotlib"), need("jinja2")  # missing extras say so before work
    corpus = named(args, _CORPUS)
    saes = {site: sae.to(args.device) for site, sae in dictionaries(args).items()} if _takes(args) else {}
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.trust_remote_code)
    check_vocabulary(tokenizer, model)
    sizes = {site.layer_index: (site.K, site.V) for site in layers(model)}
    edits: dict = {Path(path).name: read_edits(path, sizes, saes) for path in args.edit}
    for option, text, found in parsed:
        edits[f"{option} {text}"] = _made(option, found, args, tokenizer)
    result = audit(
        model.to(args.device), tokenizer, edits, corpus, saes=saes, passages=args.passages, context=args.context,
        horizon=args.horizon, batch=args.batch, seed=args.seed, any_model=args.any_model, bos=not args.no_bos,
    )  # fmt: skip
    summary = result.save(
        args.out, model=str(args.model), corpus=args.corpus or args.dataset or _CORPUS, command=_shown(args),
        seconds=round(time.perf_counter() - start, 1),
    )  # fmt: skip
    page = report.build(summary, args.out)
    print(result.lines(summary))
    print(f"report: {page}")
    return 0


def _takes(args: argparse.Namespace) -> bool:
    """Whether dictionaries are wanted at all: other models need none for edits that are of no feature."""
    return bool(args.sae or args.erase or args.scale or args.model == "default")


def _parsed(option: str, text: str) -> dict[str, str]:
    """Parts of an edit of the command line."""
    pattern = {
        "delete": _SITE, "erase": rf"(?P<feature>\d{{1,9}})@{_SITE}",
        "scale": rf"(?P<feature>\d{{1,9}})@{_SITE}=(?P<number>[-+.\de]+)",
        "install": rf"(?P<token>.+)@{_SITE}(?:=(?P<number>[-+.\de]+))?",
    }[option]  # fmt: skip
    found = re.fullmatch(pattern, text, re.DOTALL | re.ASCII)
    if found is None:
        raise ValueError(f"{option}: expected {_SAMPLE[option]}, got {text!r}")
    return {name: value for name, value in found.groupdict().items() if value is not None}


def _made(option: str, found: dict[str, str], args: argparse.Namespace, tokenizer):
    from .audit_edits import DeleteHead, EraseFeature, InstallToken, ScaleFeature

    layer, head, how = int(found["layer"]), int(found["head"]), {"every": args.every, "when": args.when}
    if option == "delete":
        return DeleteHead(layer, head, **how)
    if option == "install":
        number = _number(option, found.get("number", "3"))
        return InstallToken(_token(found["token"], tokenizer), layer, head, number, **how)
    feature = int(found["feature"])
    if option == "erase":
        return EraseFeature(feature, layer, head, **how)
    return ScaleFeature(feature, layer, head, factor=_number(option, found["number"]), **how)


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ValueError(f"{option}: expected a finite number behind =, got {text!r}")
    return value


def _token(text: str, tokenizer) -> int:
    """A token's number, from that or from its text."""
    if text.isascii() and text.isdigit():
        return int(text)
    from ..text.tokens import tokenizing

    ids = tokenizing(tokenizer, False)[0](text)
    if len(ids) != 1:
        raise ValueError(f"install: expected the text of one token, got {text!r}, which is {len(ids)}")
    return int(ids[0])


def _shown(args: argparse.Namespace) -> str:
    words = ["writesae", "audit"]
    for option in ("edit", *_SAMPLE):
        words += [word for text in getattr(args, option) for word in (f"--{option}", text)]
    words += ["--every"] * args.every + (["--when", args.when] if args.when != "after" else [])
    defaults = {
        "model": "default", "corpus": None, "dataset": None, "passages": 64, "context": 256, "horizon": 64, "seed": 0,
        "batch": 8,
    }  # fmt: skip
    for name, default in defaults.items():
        value = getattr(args, name)
        words += [] if value == default else [f"--{name}", str(value)]
    return shlex.join(words + [word for path in args.sae for word in ("--sae", path)])
