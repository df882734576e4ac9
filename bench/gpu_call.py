"""What a call of bench/gpu.sh keeps: a file of lines, each written the moment it is known, so that a kill loses none.

    python bench/gpu_call.py begin FILE --call N [--dry TWIN]     machine, versions, commit; the card's ceilings
    python bench/gpu_call.py case FILE [--dry TWIN] NAME ...      measures cases of `writesae bench --gpu`
    python bench/gpu_call.py launch NAME ... [--dry TWIN]         one call of an operator, for a profiler
    python bench/gpu_call.py metrics FILE                         the counters to ask `ncu` for
    python bench/gpu_call.py counters FILE CSV                    what `ncu --csv --page raw` found
    python bench/gpu_call.py show FILE ...                        the table
    python bench/gpu_call.py keep FILE ... --out FOLDER           a JSON file a case, as `writesae bench` keeps them

A line is a JSON object whose "what" is "machine", "ceilings", "step" (bench/gpu.sh writes it), "row", "case" (all rows
of a case are there) or "counters".
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from writesae.bench import GPU_MODULES
from writesae.bench.case import CEILINGS, Options, load_cases
from writesae.bench.gpu import Gpu
from writesae.bench.record import (
    FORMAT,
    PACKAGE,
    VERSION,
    commit,
    machine,
    run_case,
    source_digest,
    versions,
    write_record,
)
from writesae.bench.run import BAD
from writesae.bench.show import line, number, ordered, report

# What ncu is asked for: the name it has in the table, and the counter. One that this ncu does not know is left out.
METRICS = {
    "ms": "gpu__time_duration.sum",
    "tensor pipe %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "mma.sync %": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "issue slots %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared memory pipe %": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "bank conflicts, loads": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "bank conflicts, stores": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM read": "dram__bytes_read.sum",
    "DRAM written": "dram__bytes_write.sum",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "shared bytes": "launch__shared_mem_per_block",
    "waves": "launch__waves_per_multiprocessor",
} | {
    f"stalled, {reason.replace('_', ' ')}": f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in ("long_scoreboard", "short_scoreboard", "mio_throttle", "math_pipe_throttle", "wait", "barrier",
                   "not_selected", "dispatch_stall", "no_instruction")
}  # fmt: skip
MODULES = (*GPU_MODULES, "gpu_prototypes")
LAUNCHES = {"scan": "writesae.bench.bench_gpu_scan", "encode": "writesae.bench.bench_gpu_encode"}
_ASKED = "name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit,temperature.gpu"


def append(path: Path, what: str, **found) -> None:
    """One more line of the file. It is whole or, where the process is killed within it, the last and not read."""
    text = json.dumps({"what": what, "at": _now(), **found})
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def read_lines(path: Path) -> list[dict]:
    """The lines of a file; one that was cut off is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict) and "what" in value:
            found.append(value)
    return found


def begin(path: Path, call: int, dry: str) -> None:
    """Says what is measured, on what. The wheels' folder says the commit where there is no clone."""
    carried = PACKAGE.parent / ".whl" / "commit"
    known = commit() or (carried.read_text().strip() if carried.is_file() else None)
    append(
        path, "machine", call=call, dry=bool(dry), machine=machine() | _card(), versions=versions(), commit=known,
        source=source_digest(), date=_now(),
    )  # fmt: skip
    if dry:
        return
    gpu = Gpu(Options())
    rates = {name: gpu.ceiling(name) for name in CEILINGS}
    unit = {name: "GB/s" if name == "copy" else "GFLOP/s" for name in rates}
    append(path, "ceilings", ceilings={name: {"value": rates[name], "unit": unit[name]} for name in rates})
    print(", ".join(f"{name} {rates[name]:,.0f} {unit[name]}" for name in rates))


def _card() -> dict:
    """What nvidia-smi says of the card; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = out.splitlines()[0].split(", ") if out.strip() else []
    return dict(zip(_ASKED.split(","), values, strict=False)) if values else {}


def measure(path: Path, names: Sequence[str], dry: str, bad: int = 0) -> int:
    """Measures cases one after another, each row written when it is there. Returns how many failed or disagreed.

    After one that failed the rest runs in a new process: an error of a CUDA kernel stays with the process it was in.
    """
    cases = {case.name: case for case in load_cases(MODULES)}
    unknown = [name for name in names if name not in cases]
    if unknown:
        raise ValueError(f"NAME: expected cases of {', '.join(cases)}, got {', '.join(unknown)}")
    for done, name in enumerate(names, 1):
        case, written = cases[name], 0

        def keep(row: dict, name=name) -> None:
            append(path, "row", case=name, row=row)
            print(f"{name}: {line(row)}", flush=True)

        def rows(options: Options, case=case, keep=keep):
            nonlocal written
            for row in case.measure(options):
                written += 1
                keep(row.to_json())
                yield row

        try:
            found = run_case(replace(case, measure=rows), Options(dry=dry))
        except KeyboardInterrupt:
            append(path, "case", case=name, title=case.title, status="cut short")
            raise
        for row in found["rows"][written:]:  # why there are no more
            keep(row)
        append(path, "case", case=name, title=case.title, status=found["status"], seconds=found["seconds"])
        bad += found["status"] in BAD
        rest = list(names[done:])
        if found["status"] == "failed" and rest:
            sys.stdout.flush()
            options = ["--bad", str(bad), *(["--dry", dry] if dry else [])]
            os.execv(sys.executable, [sys.executable, __file__, "case", str(path), *options, *rest])
    return bad


def launch(name: str, dry: str) -> None:
    """Calls an operator once, at the size of its first row, between the start and the stop of a profiler."""
    run = import_module(LAUNCHES[name]).profiled(Gpu(Options(dry=dry)))
    run()
    if dry:
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def metrics() -> str:
    """The counters of METRICS that ncu knows, with commas; what it does not know is named on standard error."""
    out = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True)
    known = {text.split()[0] for text in out.stdout.splitlines() if text.split()}
    wanted = list(METRICS.values())
    if not {"gpu__time_duration", "sm__warps_active"} <= known:
        print("ncu --query-metrics named no counters: all are asked for", file=sys.stderr)
        return ",".join(wanted)
    missing = [x for x in wanted if not x.startswith("launch__") and x.partition(".")[0] not in known]
    if missing:
        print(f"this ncu has no {', '.join(missing)}", file=sys.stderr)
    return ",".join(x for x in wanted if x not in missing)


def read_counters(text: str) -> list[dict]:
    """[{"kernel", "grid", "block", "values": {name in METRICS: number}, "units"}] of `ncu --csv --page raw`."""
    names = {counter: name for name, counter in METRICS.items()}
    header: list[str] = []
    units: dict[str, str] = {}
    found = []
    for cells in csv.reader(x for x in text.splitlines() if x.startswith('"')):
        if cells[0] == "ID":
            header, units = cells, {}
            continue
        row = dict(zip(header, cells, strict=False))
        if not row.get("ID"):  # the line under the header
            units = {names[key]: value for key, value in row.items() if key in names}
            continue
        values = {}
        for key, value in row.items():
            if key in names:
                try:
                    values[names[key]] = float(value.replace(",", ""))
                except ValueError:  # "n/a"
                    continue
        kernel = row.get("Kernel Name", "").removeprefix("void ")
        found.append({"kernel": kernel, "grid": row.get("Grid Size"), "block": row.get("Block Size"), "values": values,
                      "units": {key: unit for key, unit in units.items() if key in values}})  # fmt: skip
    return found


def counters(path: Path, csv_path: Path) -> None:
    """Raises ValueError where the file holds no kernel: ncu's own words are in it then."""
    text = csv_path.read_text(encoding="utf-8", errors="replace")
    found = read_counters(text)
    if not found:
        said = next((x for x in reversed(text.splitlines()) if x.strip()), "nothing")
        raise ValueError(f"CSV: expected kernels that ncu profiled, got {csv_path.name} without any; ncu said: {said}")
    for kernel in found:
        append(path, "counters", **kernel)
        values = ", ".join(f"{name} {value:,.4g}" for name, value in kernel["values"].items())
        print(f"{kernel['kernel'][:60]} {kernel['grid']} x {kernel['block']}: {values}")


def records(paths: Iterable[Path]) -> list[dict]:
    """The cases of some files as records of `writesae bench` (see record.py); a case cut short with the rows it had."""
    found = []
    for path in paths:
        lines = read_lines(path)
        at = next((x for x in lines if x["what"] == "machine"), None)
        if at is None:
            raise ValueError(f"FILE: expected a line of what was measured on, got {path} without one")
        ceilings = next((x["ceilings"] for x in lines if x["what"] == "ceilings"), {})
        ends = {x["case"]: x for x in lines if x["what"] == "case"}
        rows: dict[str, list[dict]] = {}
        for x in lines:
            if x["what"] == "row":
                rows.setdefault(x["case"], []).append(x["row"])
        for name, of in rows.items():
            end = ends.get(name, {})
            found.append({
                "format": FORMAT, "version": VERSION, "status": end.get("status", "cut short"), "rows": of,
                "machine": at["machine"], "versions": at["versions"], "commit": at["commit"], "date": at["date"],
                "case": name, "title": end.get("title", name), "ceilings": ceilings, "dry": at["dry"],
                "seconds": end.get("seconds"), "call": at["call"],
            })  # fmt: skip
    return found


def show(paths: Iterable[Path]) -> str:
    paths = list(paths)
    names = [case.name for case in load_cases(MODULES)]
    found = ordered(records(paths), names)
    parts = [report(found)] if found else ["no case was measured"]
    kernels = [x for path in paths for x in read_lines(path) if x["what"] == "counters"]
    parts += [f"{x['kernel'][:100]}, {x['grid']} x {x['block']}:\n    " + ", ".join(
        f"{name} {number(value)}{' ' + x['units'][name] if x['units'].get(name, '%') != '%' else ''}"
        for name, value in x["values"].items()) for x in kernels]  # fmt: skip
    return "\n\n".join(parts)


def keep(paths: Iterable[Path], out: Path) -> int:
    """Writes `out/<case>.json` for every case that was measured; returns how many.

    Raises:
        ValueError: a file is of a dry run, which measures nothing.
    """
    found = records(paths)
    dry = sorted({x["case"] for x in found if x["dry"]})
    if dry:
        raise ValueError(f"FILE: expected measurements, got a dry run's of {', '.join(dry)}")
    out.mkdir(parents=True, exist_ok=True)
    for record in found:
        write_record(out / f"{record['case']}.json", record)
    return len(found)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/gpu_call.py")
    commands = parser.add_subparsers(dest="command", required=True)
    given = {name: commands.add_parser(name) for name in
             ("begin", "case", "launch", "metrics", "counters", "show", "keep")}  # fmt: skip
    for name in ("begin", "case", "metrics", "counters"):
        given[name].add_argument("file", type=Path)
    for name in ("begin", "case", "launch"):
        given[name].add_argument("--dry", default="", metavar="TWIN")
    for name in ("show", "keep"):
        given[name].add_argument("files", type=Path, nargs="+", metavar="FILE")
    given["begin"].add_argument("--call", type=int, required=True)
    given["case"].add_argument("--bad", type=int, default=0, help="cases that failed before, in another process")
    given["case"].add_argument("names", nargs="+", metavar="NAME")
    given["launch"].add_argument("names", nargs="+", choices=sorted(LAUNCHES))
    given["counters"].add_argument("csv", type=Path)
    given["keep"].add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.command == "begin":
        begin(args.file, args.call, args.dry)
    elif args.command == "case":
        return int(measure(args.file, args.names, args.dry, args.bad) > 0)
    elif args.command == "launch":
        for name in args.names:
            launch(name, args.dry)
    elif args.command == "metrics":
        args.file.write_text(metrics())
    elif args.command == "counters":
        counters(args.file, args.csv)
    elif args.command == "show":
        print(show(args.files))
    else:
        print(f"{keep(args.files, args.out)} cases kept in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
