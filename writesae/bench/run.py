"""Runs cases one after another, each in its own process, into a folder that an interrupted run goes on from."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..interrupt import finishing, held
from . import record
from .case import Case, Options
from .show import line

UNFINISHED = "unfinished.json"
BAD = ("disagree", "failed")


def run_cases(cases: Sequence[Case], options: Options, out: Path, fresh: bool = False) -> int:
    """Measures every case into `out/<case>.json`. Returns how many failed or disagreed.

    A run that was cut short left `unfinished.json`; the same cases with the same options, code, versions and machine
    then keep what it had measured, unless `fresh`. A case that failed or lacked its peer is tried again. Interrupted,
    it finishes the case in hand and raises KeyboardInterrupt.
    """
    out.mkdir(parents=True, exist_ok=True)
    run, resumed = _run_of(cases, options, out, fresh)
    bad = 0
    with finishing("case") as stop:
        for number, case in enumerate(cases, 1):
            path = out / f"{case.name}.json"
            earlier = _read(path)
            label = f"[{number}/{len(cases)}] {case.name}"
            if resumed and earlier is not None and earlier.get("run") == run and earlier["status"] == "measured":
                print(f"{label}: kept, measured {earlier['date']}", flush=True)
                found = earlier
            else:
                took = f", {earlier['seconds']:.0f} s the last time" if earlier and earlier.get("seconds") else ""
                print(f"{label} …  ({case.title}{took})", flush=True)
                found = _measure(case, options, path, run)
            for row in found["rows"]:
                print(f"    {line(row)}", flush=True)
            bad += found["status"] in BAD
            stop.check()
    (out / UNFINISHED).unlink()
    return bad


def _run_of(cases: Sequence[Case], options: Options, out: Path, fresh: bool) -> tuple[str, bool]:
    """(id of the run, whether it goes on from an earlier one)."""
    machine = record.machine()
    settings = {
        "cases": [case.name for case in cases], "options": vars(options), "versions": record.versions(),
        "source": record.source_digest(), "processor": machine["processor"], "cores": machine["cores"],
    }  # fmt: skip
    path = out / UNFINISHED
    earlier = _read(path)
    if earlier is not None and not fresh:
        if earlier.get("settings") == settings:
            print(f"going on with the run begun {earlier['run']} (--fresh measures everything anew)")
            return earlier["run"], True
        known = earlier.get("settings") or {}
        differs = ", ".join(name for name in settings if known.get(name) != settings[name])
        print(f"the unfinished run begun {earlier.get('run')} had other {differs}: everything is measured anew")
    run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
    record.write_record(path, {"run": run, "settings": settings})
    return run, False


def _measure(case: Case, options: Options, path: Path, run: str) -> dict:
    """The record a child process wrote, or one that says how the process ended."""
    given = json.dumps(vars(options) | {"record": {"run": run}})
    command = [sys.executable, "-m", "writesae.bench.child", case.module, case.name, str(path), given]
    # The peers' remarks that they are fallbacks are known: the table names them so.
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    with held():
        process = subprocess.Popen(command, env=quiet | dict(os.environ))
    try:
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    found = _read(path)
    if status == 0 and found is not None and found.get("run") == run:
        return found
    how = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
    rows = [record.unmeasured(case, f"failed: its process {how}")]
    found = record.record(rows, "failed", case=case.name, title=case.title, run=run)
    record.write_record(path, found)
    return found


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
