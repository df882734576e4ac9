"""Checks the machine code of the CUDA kernels, above all their hot loops, against the committed table.

    python scripts/check_sass.py [FOLDER] [--update] [--show PATTERN ...]
    python scripts/check_sass.py FOLDER --blocks KERNEL LOOP

FOLDER holds the objects that setup.py leaves; by default build/temp/_C_cuda/cuda. They are disassembled for sm_90
(cuobjdump and nvdisasm, requirements-dev.txt). No kernel may access memory by generic addresses, which the hardware has
to look up, unless csrc/cuda/sass.json names it under "may_generic" with the reason; none may access local memory, but
those that csrc/cuda/ptxas.json lets spill. Everything else has to be that of the table: what an iteration of each hot
loop issues, and the least cycles it takes one warp to. Under another nvcc than the table's, differences are only
printed. --update rewrites the table; --show prints loops of other kernels than the usual; --blocks prints the blocks of
one loop, to sum the stalls of another path than those taken here.

A hot loop is one that makes matrix products, or the largest of its kernel. Loops are numbered in the order of
addresses, "3.1" being the first inside the third. Loops inside that cannot be skipped are counted as passed once.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import sass
from check_ptxas import REPORTS, ROOT, nvcc_version, readable
from check_ptxas import TABLE as PTXAS

TABLE = ROOT / "csrc" / "cuda" / "sass.json"
ARCHITECTURES = ("sm_90a", "sm_90")  # the first that an object holds
SMALL = 64  # instructions; a smaller loop without products is no hot one

# For the printed ceilings: an H100's multiprocessors, the schedulers of one, and a clock it keeps, in Hz.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.7e9
SHOWN = (
    "walk<gated_delta_rule::Rule, *, 128, 4, *>", "walk<ssd::Rule, bf16, 128, 4, *>",
    "walk<dplr::LowRankRule, bf16, 64, 4, *>", "prepare<*, bf16, 128>", "prepare_*bf16*",
    "reverse<gated_delta_rule::Rule, *, 128>", "gradients<*, bf16, 64>",
    "encode_kernel<*, 128, true>", "encode_backward_kernel<128, 64, true>",
)  # fmt: skip


@dataclass(frozen=True)
class Iteration:
    """Of a hot loop. Counts are of instructions of its longest iteration (`sass.paths`), but for the last columns."""

    instructions: int
    products: int
    matrix_load: int
    shared: int
    globals: int
    copy: int
    special: int
    float: int
    integer: int
    exchange: int
    control: int
    wait: int
    longest: int  # sum of stall counts: cycles that one warp needs at least
    floor: int  # the same, of the shortest iteration
    least: int  # instructions of the shortest
    inner: int  # loops inside that the longest passes
    body: int  # instructions of the whole body, without loops inside; of them:
    local: int  # accesses to local memory
    generic: int  # accesses by generic addresses


@dataclass
class Kernel:
    instructions: int
    products: int
    barriers: int
    local: int
    generic: int
    loops: dict[str, Iteration] = field(default_factory=dict)
    flop: dict[str, int] = field(default_factory=dict)  # of a warp, an iteration of each loop

    def rows(self) -> dict[str, list[int]]:
        """As in the table."""
        return {"kernel": [self.instructions, self.products, self.barriers]} | {
            number: list(astuple(loop)) for number, loop in self.loops.items()
        }


COLUMNS = {"kernel": "instructions, products, barriers", "loop": ", ".join(x.name for x in fields(Iteration))}


def iteration(code: list[sass.Instruction], graph: list[sass.Block], loop: sass.Loop, place: list[int]):
    """(what an iteration issues, its FLOP)."""

    def instructions(numbers) -> list[sass.Instruction]:
        return [one for block in numbers for one in code[graph[block].start : graph[block].end]]

    ways = sass.paths(code, graph, loop, place)
    least, most, body = map(instructions, (*ways, sass.own(loop)))
    floor, longest = (sum(graph[block].stall for block in way) for way in ways)
    kinds, whole = Counter(one.kind for one in most), Counter(one.kind for one in body)
    counts = {x.name: kinds[x.name] for x in fields(Iteration)}
    counts |= {"instructions": len(most), "products": kinds["matrix"], "globals": kinds["global"]}
    counts |= {"longest": longest, "floor": floor, "least": len(least), "body": len(body)}
    counts |= {
        "inner": sum(x.head in ways[1] for x in loop.inner),
        "local": whole["local"],
        "generic": whole["generic"],
    }
    return Iteration(**counts), sum(one.flop for one in most)


def kernel(code: list[sass.Instruction]) -> Kernel:
    kinds = [one.kind for one in code]
    barriers = sum(one.name.startswith("BAR.") for one in code)
    made = Kernel(len(code), kinds.count("matrix"), barriers, kinds.count("local"), kinds.count("generic"))
    graph = sass.blocks(code)
    place, found = sass.loops(graph)
    looked = {number: iteration(code, graph, loop, place) for number, loop in sass.numbered(found).items()}
    largest = max((one.body for one, _ in looked.values()), default=0)
    for number, (one, flop) in looked.items():
        if one.products or one.body == largest >= SMALL:
            made.loops[number], made.flop[number] = one, flop
    return made


def look(path: Path) -> dict[str, Kernel]:
    """`{mangled name: kernel}` of an object."""
    return {name: kernel(code) for name, code in sass.disassemble(path, ARCHITECTURES).items()}


def blocks_of(path: Path, name: str, number: str) -> list[str]:
    """A line for each block of a loop of an object's kernel of this readable name.

    "*": in the shortest iteration; ".": in the longest only; "+": in a loop inside.
    """
    kernels = sass.disassemble(path, ARCHITECTURES)
    lines = []
    for code in (code for code, shown in zip(kernels.values(), readable(list(kernels)), strict=True) if shown == name):
        graph = sass.blocks(code)
        place, found = sass.loops(graph)
        numbers = sass.numbered(found)
        if number not in numbers:
            sys.exit(f"check_sass: --blocks: expected a loop of {name} ({', '.join(numbers)}), got {number!r}")
        loop = numbers[number]
        least, most = map(set, sass.paths(code, graph, loop, place))
        mine = sass.own(loop)
        for block in sorted(loop.body):
            one = graph[block]
            kinds = Counter(x.kind for x in code[one.start : one.end])
            lines.append(
                f"{'*' if block in least else '.' if block in most else ' '}{' ' if block in mine else '+'} "
                f"{16 * one.start:#x}: "
                f"stall {one.stall}, then {' '.join(hex(16 * graph[x].start) for x in one.next)}; "
                + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            )
    return lines


def gather(folder: Path) -> dict[str, Kernel]:
    """`{kernel: what is known of it}` of every object in a folder."""
    found: dict[str, Kernel] = {}
    largest_first = sorted(folder.glob("*.o"), key=lambda path: -path.stat().st_size)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for one in pool.map(look, largest_first):
            found |= one
    names = sorted(found)
    shown = readable(names) if names else []
    return dict(sorted((name, found[mangled]) for mangled, name in zip(names, shown, strict=True)))


def matches(name: str, patterns) -> list[str]:
    return [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]


def check(found: dict[str, Kernel], table: dict, nvcc: str, may_spill) -> tuple[list[str], list[str]]:
    """(errors, remarks). `may_spill`: patterns of kernels, from ptxas' table."""
    errors: list[str] = []
    remarks: list[str] = []
    used: set[str] = set()
    differences = errors if nvcc == table["nvcc"] else remarks
    if nvcc != table["nvcc"]:
        remarks.append(f"the table is of nvcc {table['nvcc']}, this is {nvcc}: differences are not errors")
    for name, one in found.items():
        if one.local and not matches(name, may_spill):
            errors.append(f"{name} accesses local memory in {one.local} places, and ptxas.json does not let it spill")
        allowed = matches(name, table["may_generic"])
        if one.generic:
            used |= set(allowed)
            if not allowed:
                errors.append(f"{name} accesses memory by generic addresses in {one.generic} places")
        elif allowed:
            differences.append(f"{name} has no generic access, and may_generic has {allowed[0]!r}: make that narrower")
    for pattern in sorted(table["may_generic"].keys() - used):
        differences.append(f"may_generic has {pattern!r}, and no kernel needs it")
    known = table["kernels"]
    for name in sorted(found.keys() | known.keys()):
        if name not in found or name not in known:
            differences.append(f"{name} is in {'the build' if name in found else 'the table'} only")
            continue
        now = found[name].rows()
        for number in sorted(now.keys() | known[name].keys()):
            where = f"{name}{'' if number == 'kernel' else f', loop {number}'}"
            if number not in now or number not in known[name]:
                differences.append(f"{where} is in {'the build' if number in now else 'the table'} only")
            elif now[number] != known[name][number]:
                columns = COLUMNS["kernel" if number == "kernel" else "loop"].split(", ")
                pairs = zip(columns, known[name][number], now[number], strict=True)
                differences.append(f"{where}: " + ", ".join(f"{c} {a} -> {b}" for c, a, b in pairs if a != b))
    return errors, remarks


def written(table: dict) -> str:
    """JSON with one line a loop."""
    kernels = []
    for name, rows in table["kernels"].items():
        lines = ",\n".join(f"   {json.dumps(number)}: {json.dumps(row)}" for number, row in rows.items())
        kernels.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    head = json.dumps({name: value for name, value in table.items() if name != "kernels"}, indent=1)
    return head.removesuffix("\n}") + ',\n "kernels": {\n' + ",\n".join(kernels) + "\n }\n}\n"


def ceiling(flop: int, cycles: int, instructions: int, warps: float) -> float:
    """TFLOP/s of matrix products that a whole H100 could reach in a loop, of this many warps a scheduler.

    multiprocessors x schedulers x clock x FLOP of an iteration x min(warps / cycles, 1 / instructions): a warp takes at
    least `cycles` for its iteration, and a scheduler issues one instruction a cycle. What else bounds it (latency of
    memory, the matrix unit's own rate, bandwidth) is not in it.
    """
    return MULTIPROCESSORS * SCHEDULERS * CLOCK * flop * min(warps / cycles, 1 / instructions) / 1e12


def shown(found: dict[str, Kernel], patterns) -> str:
    """The loops with matrix products of some kernels, and their ceilings: of the longest iteration and the shortest."""
    head = ("kernel", "loop", "products", "kFLOP", "instructions", "cycles", "1 warp", "2 warps", "4 warps", "issue")
    lines: list[tuple[str, ...]] = [head]
    for name, one in found.items():
        for number, loop in one.loops.items() if matches(name, patterns) else ():
            flop = one.flop[number]
            if flop:
                ends = (loop.longest, loop.instructions), (loop.floor, loop.least)
                rates = ((ceiling(flop, *end, warps) for end in ends) for warps in (1, 2, 4, float("inf")))
                counts = f"{loop.least}-{loop.instructions}", f"{loop.floor}-{loop.longest}"
                ranges = (f"{low:.0f}-{high:.0f}" for low, high in rates)
                lines.append((name, number, str(loop.products), f"{flop / 1000:.0f}", *counts, *ranges))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first = widths[0]
    return "\n".join(
        line[0].ljust(first) + "".join(f"  {x:>{n}}" for x, n in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=REPORTS)
    parser.add_argument("--update", action="store_true", help="rewrite csrc/cuda/sass.json from this build")
    parser.add_argument("--show", nargs="+", metavar="PATTERN", default=SHOWN, help="kernels to print the loops of")
    parser.add_argument("--blocks", nargs=2, metavar=("KERNEL", "LOOP"), help="print the blocks of a loop")
    args = parser.parse_args()
    try:
        sass.tool()
    except FileNotFoundError as missing:
        print(f"check_sass: {missing}", file=sys.stderr)
        return 1
    if args.blocks:
        lines = next(filter(None, (blocks_of(path, *args.blocks) for path in sorted(args.folder.glob("*.o")))), [])
        print("\n".join(lines) or f"no kernel {args.blocks[0]!r} in {args.folder}")
        return int(not lines)
    found, nvcc = gather(args.folder), nvcc_version()
    if not found:
        print(f"no objects in {args.folder}: build with WRITESAE_CUDA=1 first", file=sys.stderr)
        return 1
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"may_generic": {}}
    if args.update:
        generic = [name for name, one in found.items() if one.generic]
        reasons = {p: reason for p, reason in table["may_generic"].items() if fnmatch.filter(generic, p)}
        rows = {name: one.rows() for name, one in found.items()}
        table = {"nvcc": nvcc, "may_generic": reasons, "columns": COLUMNS, "kernels": rows}
        TABLE.write_text(written(table))
    errors, remarks = check(found, table, nvcc, json.loads(PTXAS.read_text())["may_spill"])
    print(shown(found, args.show))
    print("TFLOP/s that an iteration's cycles allow 1, 2 and 4 warps a scheduler, and that issuing it does")
    for remark in remarks:
        print(f"remark: {remark}")
    for error in errors:
        print(f"error: {error}")
    count = sum(len(one.loops) for one in found.values())
    print(f"sass: {len(found)} kernels, {count} hot loops, {len(errors)} errors")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
