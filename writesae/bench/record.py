"""A case's JSON file: rows, the machine's ceilings around them, machine, versions, date."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
import traceback
from pathlib import Path

import torch

from .._installed import version_of
from ..files import write_json
from .case import Case, Disagree, Missing, Options, Row
from .timing import ceilings

FORMAT, VERSION = "writesae-bench", 1
PACKAGE = Path(__file__).parents[1]
PACKAGES = ("writesae", "torch", "transformers", "transformer-lens", "flash-linear-attention", "numpy", "triton")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def machine() -> dict:
    """What the figures were measured on."""
    from .._library import cpu_isa

    return {
        "processor": _processor(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
        "kernels": cpu_isa().get("kernels"), "load_average": os.getloadavg(), "system": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def versions() -> dict:
    return {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()}


def source_digest() -> str:
    """Of every Python file and compiled library of the package: figures of other code are not of this run."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".so")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The clone's commit, "+" where its code (not its results) differs from that; None outside a clone."""
    if not (PACKAGE.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True)
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if git("status", "--porcelain", "--", "writesae", "csrc") else "") if head else None


def record(rows: list[Row], status: str = "measured", **extra) -> dict:
    """The JSON of some rows, of this machine and moment. For benchmarks outside the registry too (a GPU's)."""
    return {
        "format": FORMAT, "version": VERSION, "status": status, "rows": [row.to_json() for row in rows],
        "machine": machine(), "versions": versions(), "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), **extra,
    }  # fmt: skip


def unmeasured(case: Case, note: str) -> Row:
    return Row(case.title, case.peer, None, "", note=note)


def run_case(case: Case, options: Options) -> dict:
    """Measures a case. Whatever it raises becomes a row without a number; rows already measured stay."""
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.perf_counter()
    size, repeats = (512, 3) if options.quick else (2048, 5)
    rows: list[Row] = []
    status = "measured"
    before = ceilings(case.ceilings, size=size, repeats=repeats)
    try:
        for row in case.measure(options):
            rows.append(row)
    except Disagree as error:
        status = "disagree"
        rows.append(unmeasured(case, f"no ratio: {error}"))
    except Missing as error:
        status = "missing"
        rows.append(unmeasured(case, f"not measured: {error}"))
    except Exception as error:
        traceback.print_exc()
        status = "failed"
        rows.append(unmeasured(case, f"failed: {type(error).__name__}: {error}".splitlines()[0]))
    after = ceilings(case.ceilings, size=size, repeats=repeats)
    # The better of the two moments: a share is never flattered by a disturbed ceiling.
    best = {name: max(before[name], after[name], key=lambda x: x["value"]) for name in before}
    for row in rows:
        if options.quick:  # targets are for the full sizes
            row.target = row.aim = row.met = None
        if row.rate is not None and row.ceiling_of in best:
            row.ceiling = best[row.ceiling_of]["value"]
            row.share = row.rate / row.ceiling
    return record(
        rows, status, case=case.name, title=case.title, ceilings=best, quick=options.quick,
        options=vars(options), seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip


def write_record(path: Path, value: dict) -> None:
    """All of it or nothing, also when interrupted; through no symbolic link."""
    write_json(path, value, indent=1, allow_nan=True)


def read_records(folder: Path) -> list[dict]:
    """Every file of this format in a folder, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(value, dict) and value.get("format") == FORMAT and value.get("version") == VERSION:
            value.setdefault("case", path.stem)
            found.append(value)
    return found
