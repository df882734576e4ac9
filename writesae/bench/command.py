"""`writesae bench`: measures, keeps JSON, prints the table, draws the picture."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

from ..console import table
from . import GPU_MODULES, MODULES

ROOT = Path(__file__).parents[2]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases, or patterns such as encode* (default: all)")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--show", action="store_true", help="measure nothing: table and picture of what --out holds")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that all runs")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of each case (default: the case's own number)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's choice)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: "
                        "bench/results in a clone, else ./bench-results; with --quick runs/bench-quick)")  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="measure the cases of a CUDA device instead")
    parser.add_argument("--dry", default="", metavar="TWIN", help="with --gpu: no GPU, no figures; every case runs "
                        "on the kernels' host twin, which scripts/build_twin.py prints (default: a GPU)")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start anew instead of going on with an interrupted run")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put table and picture between the markers of "
                        "FILE too, such as docs/measured.md (default: of none)")  # fmt: skip


def default_out(quick: bool) -> Path:
    if quick:
        return Path("runs/bench-quick")
    clone = ROOT / "bench" / "results"
    return clone if clone.is_dir() and (ROOT / "pyproject.toml").is_file() else Path("bench-results")


def run(args: argparse.Namespace, modules=None) -> int:
    """Returns 0, or 1 where a case failed or its results disagree (a missed target is a result, not a failure)."""
    from .case import Options, load_cases
    from .record import read_records
    from .run import run_cases
    from .show import by_machine, ordered, picture, readme, report

    for name in ("repeats", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if args.dry and not args.gpu:
        raise ValueError("dry: expected together with --gpu; on a CPU use --quick")
    cases = load_cases(modules or (GPU_MODULES if args.gpu else MODULES))
    out = args.out or default_out(args.quick)
    if args.list:
        took = {r["case"]: r.get("seconds") for r in read_records(out)} if out.is_dir() else {}
        seconds = [f"{took[case.name]:.0f}" if took.get(case.name) else None for case in cases]
        table(("case", "what it measures", "s"), [(x.name, x.title, s) for x, s in zip(cases, seconds, strict=True)])
        return 0
    bad = 0
    if not args.show:
        options = Options(args.repeats, args.quick, args.threads, args.dry)
        bad = run_cases(_chosen(cases, args.names), options, out, args.fresh)
    elif not out.is_dir():
        raise FileNotFoundError(f"out: expected a folder of results, got {out}, which is not there")
    records = ordered(read_records(out), [case.name for case in cases])
    if not records:
        raise ValueError(f"out: expected results of `writesae bench`, got {out} without any")
    print(f"\n{report(records)}\n")
    drawn = None
    try:
        drawn = picture(by_machine(records)[0], out / "bench.png")
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print(f"results in {out}" + (f", picture in {drawn}" if drawn else ""))
    if args.readme:
        readme(args.readme, records, drawn)
        print(f"table put into {args.readme}")
    if bad:
        print(f"writesae bench: {bad} case{'s' * (bad > 1)} failed or disagreed", file=sys.stderr)
    return int(bad > 0)


def _chosen(cases, patterns):
    if not patterns:
        return cases
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            known = ", ".join(case.name for case in cases)
            raise ValueError(f"NAME: expected cases of {known}, got {pattern!r}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
