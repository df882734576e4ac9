"""What the scripts of this folder that run `writesae collect` share: its options, and where what they found goes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq

from writesae.files import make_folder, write_json

LONG = Path(__file__).parent / "results" / "long"
COLLECT = [sys.executable, "-m", "writesae.cli", "collect"]


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="default")
    parser.add_argument("--sae", action="append", default=[])


def model_options(args: argparse.Namespace) -> list[str]:
    """What `add_model` took, for `writesae collect`."""
    return ["--model", args.model, *(x for sae in args.sae for x in ("--sae", sae))]


def tables(folder: Path) -> dict:
    """Every table by name; a unit's folder by its number, whichever machine it was made on."""
    found = {}
    for path in sorted(folder.rglob("*.parquet")):
        parts = list(path.relative_to(folder).parts)
        if parts[0] == "units":
            parts[1] = parts[1].split("-")[0]
        found["/".join(parts)] = pq.read_table(path)
    return found


def row(name: str, value: float, unit: str, target=None, met: bool | None = None, peer=None, spread=None) -> dict:
    """A figure as `writesae bench` keeps one; these have no peer to be a ratio to, or a target that is no number."""
    return {"name": name, "peer": peer, "value": value, "unit": unit, "target": target, "met": met, "spread": spread}


def end(name: str, rows: list[dict], **more) -> None:
    """Writes results/long/<name>.json, prints the rows, and exits: 1 where a target was missed."""
    write_json(make_folder(LONG) / f"{name}.json", {"rows": rows, **more}, indent=1)
    for found in rows:
        target = f" (target {found['target']})" if found["target"] is not None else ""
        print(f"{found['name']}: {found['value']:.4g} {found['unit']}{target}")
    sys.exit(any(found["met"] is False for found in rows))
