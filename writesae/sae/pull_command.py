"""`writesae pull`: dictionaries of a repository of the Hugging Face hub into a folder, or what there is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..console import table
from ..files import make_folder, refuse_file, refuse_links
from ..progress import tqdm
from ..untrusted import is_number


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add = parser.add_argument
    add("repo", metavar="OWNER/NAME", help="the repository, or a folder")
    add("dictionary", nargs="*", metavar="L9H4", help="folders in it that are wanted (default: all)")
    add("--out", type=Path, metavar="DIR", help="folder to write a folder a dictionary to (default: only list them)")
    add("--revision", help="branch, tag or commit (default: main)")
    add("--json", action="store_true", help="list as JSON, with all metrics")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Lists, or downloads, checks and saves. Returns the exit status."""
    from .hub import available
    from .sae import SAE

    listed = available(args.repo, args.revision)
    names = [one.folder for one in listed]
    if unknown := sorted(set(args.dictionary) - set(names)):
        raise FileNotFoundError(
            f"dictionary: expected some of {', '.join(x or '.' for x in names)}, got {', '.join(unknown)}"
        )
    listed = [one for one in listed if not args.dictionary or one.folder in args.dictionary]
    if args.json:
        print(json.dumps([asdict(one) for one in listed], indent=2))
    elif args.out is None:
        table(("dictionary", "of", "kind", "atoms", "k", "FVU", "L0", "MB"), [_row(one) for one in listed])
    if args.out is None:
        return 0
    refuse_file(args.out)
    refuse_links(args.out)
    if args.out.is_dir() and any(args.out.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, got {args.out}")
    revision = listed[0].revision  # of all, whatever is committed meanwhile
    for one in tqdm(listed, desc="dictionaries", disable=args.quiet):
        sae = SAE.from_pretrained(args.repo, one.folder or None, revision)
        name = one.folder.rpartition("/")[2] or (f"L{one.layer}H{one.head}" if one.layer is not None else "dictionary")
        sae.save_pretrained(make_folder(args.out, name))
    return 0


def _row(one) -> tuple:
    """What the table says of a dictionary."""
    fvu, l0 = (one.metrics.get(name) for name in ("fvu", "l0"))
    return (
        one.folder or ".", one.target + "s", one.kind, f"{one.F:,}", one.k, f"{fvu:.4f}" if is_number(fvu) else None,
        f"{l0:.1f}" if is_number(l0) else None, f"{one.bytes / 1e6:.1f}",
    )  # fmt: skip
