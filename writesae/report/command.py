"""`writesae report`: draws the pictures and the page of a finished run again, from its folder alone."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a run of collect, train, replace, loss-recovered, audit, "
                        "paper or demo")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: the run's own; of collect and train "
                        "a folder NAME-report beside it, as theirs are checked file by file)")  # fmt: skip
    parser.add_argument("--browse", metavar="URL", help="where atoms named in the report are shown: the address of a "
                        "`writesae browse`, or the folder that its --static wrote (default: atoms stay text)"
                        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints the page's path. Returns 0."""
    from .kinds import build

    page = build(args.run, args.out, args.browse)
    args.out = str(page.parent)  # for what comes next
    print(page)
    return 0
