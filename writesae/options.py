"""Options that several commands share, so that they mean the same in each, and what they name."""

from __future__ import annotations

import argparse
from decimal import Decimal, InvalidOperation
from pathlib import Path

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_model(parser: argparse._ActionsContainer) -> None:
    """Adds --model and --trust-remote-code, for `load(args.model, trust_remote_code=args.trust_remote_code)`."""
    parser.add_argument(
        "--model", default="default", help="a model's folder, or its name on the Hugging Face hub; default is the "
        "embedded one"
    )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="allow code that comes with the model to run on this machine"
    )


def add_dictionaries(parser: argparse._ActionsContainer, default: str = "default") -> None:
    """Adds --sae and --batchtopk, for `dictionaries(args)`, and --any-model."""
    parser.add_argument(
        "--sae", action="append", default=[], metavar="[LAYER:HEAD=]PATH", help="a dictionary's folder (cfg.json, or a "
        "published best.pt), a published .pt file, or a folder of such folders; default for the embedded model's of "
        f"states, default-writes for those of writes; repeatable (default: {default}, of the embedded model alone)"
    )  # fmt: skip
    parser.add_argument(
        "--batchtopk", type=_batchtopk, metavar="topk|THRESHOLD", help="how published BatchTopK dictionaries, which "
        "have no threshold, choose atoms: topk for the k largest of a state, or those over a threshold "
        "(default: refuse them)"
    )  # fmt: skip
    parser.add_argument("--any-model", action="store_true", help="also with dictionaries that name another model")


def add_device(parser: argparse._ActionsContainer, dtype: bool = True) -> None:
    """Adds --device, for `require_device(args.device)` before anything is loaded, and --dtype."""
    parser.add_argument("--device", default="cpu", help="where the model and the dictionaries run: cpu or cuda")
    if dtype:
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the model's "
                            "weights; dictionaries are float32")  # fmt: skip


def _batchtopk(text: str) -> str | float:
    if text == "topk":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected topk or a threshold >= 0, got {text!r}")
    return value


def dictionaries(args: argparse.Namespace, target: str = "state") -> dict:
    """{(layer, head): SAE} of every --sae of `add_dictionaries`; without one, the embedded model's own of `target`.

    Raises:
        FileNotFoundError: no such path, or no dictionary there.
        ValueError: none for another model, two for a site, one that does not say its site, a misplaced --batchtopk.
    """
    from .default import dictionaries as embedded
    from .sae import SAE
    from .sae.checkpoint import dictionaries as inside
    from .sae.published import BEST, is_batchtopk

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
            paths = inside(paths[0]) or paths  # where there is none, loading says what there is
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


def require_device(name: str) -> None:
    """Raises ValueError, with the reason, unless models can run on the device "cpu" or "cuda"."""
    if name == "cpu":
        return
    from ._library import backends

    reason = backends()["cuda"] if name == "cuda" else "expected cpu or cuda"
    if reason is not None:
        raise ValueError(f"device: {name} cannot be used: {reason}")


def size(text: str) -> int:
    """Bytes, of a size such as 800M or 2GB; a type for argparse."""
    number = text.strip().lower().removesuffix("b")
    unit = number[-1:] if number[-1:] in "kmgt" else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}") from None


def count(text: str) -> int:
    """A whole number >= 0, of a number such as 200k, 100M or 1.5B; a type for argparse."""
    number = text.strip().lower()
    unit = number[-1:] if number[-1:] in "kmbt" else ""
    try:
        value = Decimal(number.removesuffix(unit)) * _COUNTS[unit]
    except (InvalidOperation, ValueError):
        value = Decimal(-1)
    if value.is_nan() or not 0 <= value < 10**18 or value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number such as 5000, 200k, 100M or 1.5B, got {text!r}")
    return int(value)
