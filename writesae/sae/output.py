"""The folder of `writesae train`: what may stand in it already, and one record out of several ranks' own.

out/[VARIANT/][L<layer>H<head>/]cfg.json, sae.safetensors     the dictionaries
out/checkpoint.pt, training.json, metrics.json                of a run, or with ranks:
out/rank-<n>-of-<N>/checkpoint.pt, training.json, ...         of each, and metrics.json and training.json of all
"""

from __future__ import annotations

import re
from pathlib import Path

from ..files import left_over, read_json, refuse_file, refuse_links, write_json
from .checkpoint import CONFIG

CHECKPOINT, HISTORY, RECORD, PLOT = "checkpoint.pt", "training.json", "metrics.json", "training.svg"
_RANK = re.compile(r"rank-(\d+)-of-(\d+)")


def check_out(out: Path, rank: int = 0, size: int = 1, resume: bool = False) -> Path:
    """The folder of this rank's checkpoint, `out` itself of a single process.

    Raises:
        ValueError: a file, a symbolic link, other things, a run that is not to be resumed, or one of another number of
            ranks.
    """
    refuse_file(out)
    refuse_links(out)
    inside = list(out.iterdir()) if out.is_dir() else []
    for path in inside:
        if path.is_symlink():
            raise ValueError(f"out: {path} is a symbolic link, and nothing is written through one: remove it")
    known = {CHECKPOINT, CONFIG, RECORD, HISTORY, PLOT}
    here = {p.name for p in inside if left_over(p) not in {out / name for name in known}}
    ranks = {int(found[2]) for name in here if (found := _RANK.fullmatch(name))}
    if here and not ranks and not here & known and not any(_dictionary(out / name) for name in here):
        raise ValueError(f"out: {out} holds other things ({', '.join(sorted(here)[:4])}); name a new folder")
    if here and ranks != ({size} if size > 1 else set()):
        got = f"{', '.join(map(str, sorted(ranks)))} ranks" if ranks else "one process"
        raise ValueError(f"out: {out} already holds a run of {got}, and this is one of {size}; name a new folder")
    own = out if size == 1 else out / f"rank-{rank}-of-{size}"
    if not resume and (here if size == 1 else own.is_dir() and any(own.iterdir())):
        raise ValueError(f"out: {own} already holds a run; add --resume to go on with it, or name a new folder")
    return own


def rank_folders(out: Path) -> list[Path]:
    """Of a run of several ranks, one each."""
    return sorted(path for path in out.iterdir() if path.is_dir() and _RANK.fullmatch(path.name))


def _dictionary(folder: Path) -> bool:
    """Whether one is in it, or in the folders in it."""
    return (folder / CONFIG).is_file() or next(folder.glob(f"*/{CONFIG}"), None) is not None


def join_ranks(out: Path, size: int) -> bool:
    """Writes the record and the history of all ranks once every one has written its own. Whoever ends last does."""
    folders = [out / f"rank-{rank}-of-{size}" for rank in range(size)]
    if size == 1 or not all((folder / RECORD).is_file() for folder in folders):
        return False
    records = [read_json(folder / RECORD) for folder in folders]
    metrics = {name: found for record in records for name, found in record["metrics"].items()}
    seconds = max(record["seconds"] for record in records)
    write_json(out / RECORD, {**records[0], "seconds": seconds, "metrics": metrics}, allow_nan=True)
    write_json(out / HISTORY, joined([read_json(f / HISTORY) for f in folders]), indent=None, allow_nan=True)
    return True


def joined(histories: list[list[dict]]) -> list[dict]:
    """One history, as a single process would have kept it: by step, looks of all sites in one."""
    steps: list[dict] = []
    looks: dict[int, dict] = {}
    for history in histories:
        for record in history:
            if "held_out_fvu" not in record:
                steps.append(record)
                continue
            look = looks.setdefault(record["step"], {"step": record["step"]})
            for name, values in record.items():
                if name != "step":
                    look.setdefault(name, {}).update(values)
    # A look is after so many steps, a step's own record bears its number from 0.
    keyed = [((record["step"] + 1, 0), record) for record in steps] + [((n, 1), look) for n, look in looks.items()]
    return [record for _, record in sorted(keyed, key=lambda x: x[0])]
