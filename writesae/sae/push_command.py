"""`writesae push`: a folder of dictionaries to a repository of the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add = parser.add_argument
    add("folder", type=Path, help="what writesae train left: a dictionary, or a folder of them")
    add("repo", metavar="OWNER/NAME", help="the repository, made if it is not there")
    add("--license", required=True, help="of the dictionaries, as the hub calls it, such as apache-2.0 or cc-by-4.0")
    add("--base-model", metavar="OWNER/NAME", help="the model's repository (default: as the dictionaries call it)")
    add("--base-model-revision", metavar="REVISION", help="its commit, for the card (default: not said)")
    add("--dataset", action="append", default=[], metavar="OWNER/NAME", help="repository of the text trained on, for "
        "the card; repeatable (default: none)")  # fmt: skip
    add("--public", action="store_true", help="make the repository, if it is made, readable for everyone")
    add("--revision", metavar="BRANCH", help="branch to commit to, made if it is not there (default: main)")
    add("--message", help="of the commit (default: how many dictionaries)")
    add(
        "--replace", action="store_true", help="take dictionaries away that are in the repository and not in the folder"
    )
    add("--dry-run", action="store_true", help="send nothing: print the files that would be sent, and the card")


def run(args: argparse.Namespace) -> int:
    """Checks, uploads, prints the commit's address. Returns the exit status."""
    from .card import CARD
    from .hub import prepare, push_to_hub

    said = {
        "license": args.license, "base_model": args.base_model, "base_model_revision": args.base_model_revision,
        "datasets": args.dataset,
    }  # fmt: skip
    if args.dry_run:
        found, card = prepare(args.folder, args.repo, **said)
        for name, config, weights in found:
            print(f"{name or '.'}: {weights.stat().st_size + len(config):,} bytes")
        print(f"{CARD}:\n\n{card}", end="")
        return 0
    print(
        push_to_hub(
            args.folder, args.repo, **said, private=not args.public, revision=args.revision, message=args.message,
            replace=args.replace,
        )
    )  # fmt: skip
    return 0
