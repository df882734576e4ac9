"""Reads the machine code of the CPU kernels for 64-bit ARM: their hot loops have to multiply and add vectors.

    python scripts/check_neon.py FOLDER [--show]

FOLDER holds the objects (*.o, at any depth) that an aarch64 compiler made of csrc/cpu. An innermost loop with at least
eight multiplications, additions or multiply-adds of floats is hot. In each at least nine tenths of the numbers that it
works on have to pass through vector instructions, four at a time, but for as many loops of a function as SCALAR says,
with the reason; and the products' loops (PRODUCTS) have to be made of multiply-adds. --show prints every hot loop.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

OBJDUMP = "aarch64-linux-gnu-objdump"
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
LINE = re.compile(r"^ *([0-9a-f]+):\t(\S+)(?:\t([^/]*))?")
FLOAT = re.compile(r"^f(?:n?m(?:add|sub|ul)|ml[as]|add|sub)p?$")
PRODUCTS = ("gemm_tile",)
# {file and function: how many of its loops are not of vectors, and why}; as Debian's g++ 12 compiles them.
SCALAR = {
    "scan_backward::portable::reverse": (4, "running sums over pairs of tokens, term after term"),
    "scan::portable::run_block": (4, "one coefficient of each row that is added, beside the row's vectors"),
    "scan::portable::step_head": (6, "the bits of halves converted, and the ends of sums"),
    "portable::distances": (2, "a running sum in float64, and the ends of sums"),
    "portable::load_chunk": (1, "the bits of halves converted"),
    "portable::backward_block": (1, "sums over the numbers of a vector"),
    "::run_panel": (2, "keys of activations compared, as integers"),
}


class Loop(NamedTuple):
    function: str
    start: int
    vector: int  # instructions on four floats, multiply-adds among them
    scalar: int  # on one
    fused: int  # multiply-adds of vectors


def functions(text: str) -> dict[str, list[tuple[int, str, str]]]:
    """{name: its instructions (address, name, operands)} of what objdump -d prints."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    code: list[tuple[int, str, str]] = []
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            code = found.setdefault(match[1], [])
        elif match := LINE.match(line):
            code.append((int(match[1], 16), match[2], (match[3] or "").strip()))
    return found


def hot_loops(name: str, code: list[tuple[int, str, str]], least: int = 8) -> list[Loop]:
    """Innermost loops: from where a branch goes back to, to that branch, with none inside."""
    backward = []
    for at, (address, instruction, operands) in enumerate(code):
        if instruction == "b" or instruction.startswith(("b.", "cb", "tb")):
            target = re.search(r"\b([0-9a-f]+) <", operands)
            if target and code[0][0] <= int(target[1], 16) <= address:
                backward.append((next(i for i, one in enumerate(code) if one[0] == int(target[1], 16)), at))
    loops = []
    for first, last in backward:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in backward):
            continue
        counts: Counter[str] = Counter()
        for _, instruction, operands in code[first : last + 1]:
            if FLOAT.match(instruction):
                vector = operands.startswith("v")
                counts["vector" if vector else "scalar"] += 1
                counts["fused"] += vector and instruction in ("fmla", "fmls")
        if counts["vector"] + counts["scalar"] >= least:
            loops.append(Loop(name, code[first][0], counts["vector"], counts["scalar"], counts["fused"]))
    return loops


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    objects = sorted(path for path in args.folder.rglob("*.o") if "csrc/cpu/" in str(path))
    if not objects:
        sys.exit(f"check_neon.py: FOLDER: expected objects of csrc/cpu below it, got none in {args.folder}")
    wrong, lines, total, seen = [], [], 0, Counter()
    for path in objects:
        out = subprocess.run([OBJDUMP, "-dC", "--no-show-raw-insn", str(path)], capture_output=True, text=True)
        if out.returncode:
            sys.exit(f"check_neon.py: {OBJDUMP} on {path}: {out.stderr.strip()}")
        for loop in (loop for name, code in functions(out.stdout).items() if code for loop in hot_loops(name, code)):
            known = next((name for name in SCALAR if name in loop.function), None)
            scalar = 4 * loop.vector < 9 * loop.scalar
            total += 1
            seen[known] += scalar
            line = (
                f"{path.name}: {loop.function[:90]}+{loop.start:#x}: {loop.vector} on vectors, {loop.fused} of them "
                f"multiply-adds, {loop.scalar} on single numbers"
            )
            if args.show:
                print(line)
            if scalar and known is None:
                wrong.append(line)
            elif scalar:
                lines.append(line)
            if any(name in loop.function for name in PRODUCTS) and 10 * loop.fused < 9 * loop.vector:
                wrong.append(line)
    for name, (number, reason) in SCALAR.items():
        if seen[name] != number:
            wrong += [f"{name}: expected {number} loops on single numbers ({reason}), got {seen[name]}:"]
            wrong += [f"  {line}" for line in lines if name in line]
    print(f"{total} hot loops in {len(objects)} files, {total - sum(seen.values())} of them on vectors")
    if not total or wrong:
        sys.exit("check_neon.py: expected vector instructions in every hot loop, got\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
