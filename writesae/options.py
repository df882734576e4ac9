"""Options that several commands share, so that they mean the same in each."""

from __future__ import annotations

import argparse


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
    """Adds --sae and --batchtopk, for `collect.command._dictionaries`."""
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
