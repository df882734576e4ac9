"""`writesae report`: draws the pictures and the page of a finished run again, from its folder alone."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run of replace, loss-recovered, audit or paper")
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: the run's own)")


def run(args: argparse.Namespace) -> int:
    """Prints the page's path. Returns 0."""
    from . import audit, paper, recovered
    from .html import build

    kinds = (recovered, audit, paper)
    make = next((kind.build for kind in kinds if kind.is_run(args.run)), build)
    print(make(args.run, args.out or args.run))
    return 0
