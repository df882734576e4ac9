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
