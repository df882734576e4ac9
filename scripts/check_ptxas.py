"""Checks what ptxas said of the CUDA kernels when they were compiled, against the committed table.

    python scripts/check_ptxas.py [FOLDER] [--update]

FOLDER holds the reports (*.ptxas.txt) that setup.py leaves beside the objects; by default build/temp/_C_cuda/cuda.
Every kernel must be free of spills on every architecture, unless csrc/cuda/ptxas.json names it under "may_spill" with
the reason, and keep within the shared memory of a block. Registers, stack and static shared memory must be those of the
table; under another nvcc than the table's, differences are only printed. --update rewrites the table.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "csrc" / "cuda" / "ptxas.json"
REPORTS = ROOT / "build" / "temp" / "_C_cuda" / "cuda"

sys.path.insert(0, str(ROOT / "csrc"))
import sources  # noqa: E402

# Bytes of shared memory a block may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}
# Every kernel must be compiled for these, but for those of files that have architectures of their own.
REQUIRED = tuple(f"sm_{name}" for name in sources.ARCHITECTURES.split() if not name.endswith("-ptx"))
SPECIAL = {f"sm_{name}" for names in sources.ONLY.values() for name in names.split()}


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture. Bytes, but for `registers` (a thread)."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int  # static; dynamic shared memory is asked for at launch


COLUMNS = ", ".join(field.name for field in fields(Usage))


def parse(report: str) -> dict[tuple[str, str], Usage]:
    """`{(mangled kernel, architecture): Usage}` of ptxas' verbose report."""
    found = {}
    for part in re.split(r"ptxas info\s*: Compiling entry function ", report)[1:]:
        name, arch = re.match(r"'(\S+)' for '(\w+)'", part).groups()
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        shared = re.search(r"(\d+) bytes smem", used.group(2))
        stack, stores, loads = map(int, frame.groups())
        found[name, arch] = Usage(int(used.group(1)), stack, stores, loads, int(shared.group(1)) if shared else 0)
    return found


def readable(names: list[str]) -> list[str]:
    """Kernel names without argument lists, casts of template arguments and namespaces, but a write rule's own."""
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    if filt is None:
        raise FileNotFoundError("neither c++filt nor cu++filt on PATH")
    text = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    out = []
    for line in text.splitlines():
        line = line.replace("(anonymous namespace)::", "").replace("void ", "", 1)
        line = re.sub(r"writesae::(?:cuda::|tile::)?", "", line)
        line = re.sub(r"\((?:int|bool|[A-Z]\w*)\)", "", line)  # (int)32 in template arguments
        depth, end = 0, len(line)
        for i, c in enumerate(line):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        out.append(line[:end])
    return out


def gather(folder: Path) -> dict[str, dict[str, Usage]]:
    """`{kernel: {architecture: Usage}}` of every report in a folder."""
    usage: dict[tuple[str, str], Usage] = {}
    for path in sorted(folder.glob("*.ptxas.txt")):
        usage |= parse(path.read_text())
    names = sorted({name for name, _ in usage})
    shown = dict(zip(names, readable(names), strict=True)) if names else {}
    found: dict[str, dict[str, Usage]] = {}
    for (name, arch), used in sorted(usage.items()):
        found.setdefault(shown[name], {})[arch] = used
    return dict(sorted(found.items()))


def check(found: dict[str, dict[str, Usage]], table: dict, nvcc: str) -> tuple[list[str], list[str]]:
    """(errors, remarks)."""
    errors, remarks = [], []
    for kernel, archs in found.items():
        allowed = next((r for pattern, r in table["may_spill"].items() if fnmatch.fnmatchcase(kernel, pattern)), None)
        for arch, used in archs.items():
            if used.spill_stores + used.spill_loads and allowed is None:
                errors.append(f"{kernel} on {arch} spills: {used.spill_stores} bytes out, {used.spill_loads} in")
            if used.shared > SHARED.get(arch, min(SHARED.values())):
                errors.append(f"{kernel} on {arch} has {used.shared} bytes of shared memory")
        for arch in [] if archs.keys() <= SPECIAL else [x for x in REQUIRED if x not in archs]:
            errors.append(f"{kernel} was not compiled for {arch}")
    differences = errors if nvcc == table["nvcc"] else remarks
    if nvcc != table["nvcc"]:
        remarks.append(f"the table is of nvcc {table['nvcc']}, this is {nvcc}: differences are not errors")
    known = table["kernels"]
    for kernel in sorted(found.keys() | known.keys()):
        if kernel not in found or kernel not in known:
            where = "the build" if kernel in found else "the table"
            differences.append(f"{kernel} is in {where} only")
            continue
        for arch, used in found[kernel].items():
            before = known[kernel].get(arch)
            if before is None or Usage(*before) != used:
                differences.append(f"{kernel} on {arch}: table {before}, build {list(astuple(used))} ({COLUMNS})")
    return errors, remarks


def rows(found: dict[str, dict[str, Usage]]) -> dict[str, dict[str, list[int]]]:
    return {kernel: {arch: list(astuple(used)) for arch, used in archs.items()} for kernel, archs in found.items()}


def written(table: dict) -> str:
    """JSON with one line a kernel."""
    lines = [f"  {json.dumps(kernel)}: {json.dumps(archs)}" for kernel, archs in table["kernels"].items()]
    head = json.dumps({name: value for name, value in table.items() if name != "kernels"}, indent=1)
    return head.removesuffix("\n}") + ',\n "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n"


def nvcc_version(nvcc: str = "nvcc") -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text).group(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=REPORTS)
    parser.add_argument("--update", action="store_true", help="rewrite csrc/cuda/ptxas.json from this build")
    args = parser.parse_args()
    found, nvcc = gather(args.folder), nvcc_version()
    if not found:
        print(f"no ptxas reports in {args.folder}: build with WRITESAE_CUDA=1 first", file=sys.stderr)
        return 1
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"may_spill": {}}
    if args.update:
        table = {"nvcc": nvcc, "may_spill": table["may_spill"], "columns": COLUMNS, "kernels": rows(found)}
        TABLE.write_text(written(table))
    errors, remarks = check(found, table, nvcc)
    for remark in remarks:
        print(f"remark: {remark}")
    for error in errors:
        print(f"error: {error}")
    count = sum(len(archs) for archs in found.values())
    print(f"ptxas: {len(found)} kernels, {count} builds of them, {len(errors)} errors")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
