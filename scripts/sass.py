"""Reads disassembled CUDA kernels: instructions with their control codes, the graph of blocks, loops.

Since Volta an instruction has 128 bits, of which the compiler fills 21 with what it knows of the time: for how many
cycles the warp waits before its next instruction (`stall`), which of six scoreboards the instruction sets until it has
written (`writes`) or read (`reads`) its registers, and which have to be clear before it starts (`waits`). So the sum of
stalls along a path is the least number of cycles in which one warp can issue it: latency of memory, conflicts and
other warps only add to it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/ +(?:\{ *)?(?:@(?P<guard>!?U?P\w+) +)?(?P<name>[A-Z0-9_.x]+) *(?P<operands>[^;]*);"
    r"[ }]*/\* 0x(?P<low>[0-9a-f]{16}) \*/\s*/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)
TARGET = re.compile(r"0x([0-9a-f]+)$")

# Kinds of instructions by the first part of their names; what is not here, counts as integer.
KINDS = {
    "matrix": "HMMA HGMMA IMMA IGMMA DMMA QGMMA BMMA",
    "matrix_load": "LDSM STSM",
    "shared": "LDS STS ATOMS",
    "global": "LDG STG ATOMG RED REDG CCTL",
    "copy": "LDGSTS UBLKCP UTMALDG UTMASTG UTMAPF",
    "local": "LDL STL",
    "generic": "LD ST ATOM",
    "special": "MUFU I2F F2I F2F FRND POPC FLO BREV UFLO UPOPC",
    "exchange": "SHFL VOTE VOTEU REDUX MATCH",
    "control": "BRA BRX JMP JMX BSSY BSYNC BREAK EXIT CALL RET WARPSYNC ENDCOLLECTIVE YIELD NOP BMOV NANOSLEEP KILL",
    "wait": "BAR DEPBAR LDGDEPBAR WARPGROUP WARPGROUPDEPBAR SYNCS MEMBAR ERRBAR ARRIVES UCGABAR_ARV UCGABAR_WAIT",
    "float": "FADD FMUL FFMA FSETP FSEL FMNMX FSET FCHK F2FP HADD2 HMUL2 HFMA2 HSETP2 HMNMX2 HSET2 DADD DMUL DFMA",
}
KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate it runs under, "" if none
    name: str  # with its modifiers: "HMMA.16816.F32.BF16"
    operands: str
    stall: int  # cycles before the warp's next instruction
    writes: int  # the scoreboard (0 to 5) set until its results are there; 7: none
    reads: int  # the one set until its operands are read; 7: none
    waits: int  # a bit for each scoreboard that has to be clear before

    @property
    def kind(self) -> str:
        return KIND.get(self.name.partition(".")[0], "integer")

    @property
    def flop(self) -> int:
        """Of a matrix product, for one warp: a multiply-add is two."""
        if self.kind != "matrix":
            return 0
        shape = self.name.split(".")[1]
        if "x" in shape:  # HGMMA.64x128x16: of four warps
            m, n, k = map(int, shape.split("x"))
            return 2 * m * n * k // 4
        known = {"16816": 4096, "1688": 2048, "1684": 1024, "16832": 8192}
        if shape not in known:
            raise ValueError(
                f"{self.name}: expected a matrix product of one of the shapes {', '.join(known)}, got {shape}"
            )
        return known[shape]


def control(high: int) -> tuple[int, int, int, int]:
    """(stall, writes, reads, waits) from the upper 64 of an instruction's 128 bits; bit 45 is a hint to yield."""
    return high >> 41 & 15, high >> 46 & 7, high >> 49 & 7, high >> 52 & 63


def functions(text: str) -> dict[str, list[Instruction]]:
    """`{mangled name: its instructions}` of what `cuobjdump -sass` prints of one architecture."""
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        code = [
            Instruction(int(address, 16), guard, name, operands.strip(), *control(int(high, 16)))
            for address, guard, name, operands, _, high in LINE.findall(part)
        ]
        # A line that was not understood would leave a hole.
        for i, one in enumerate(code):
            if one.address != 16 * i:
                raise ValueError(
                    f"{part.split()[0]}: expected an instruction at {16 * i:#x}, got one at {one.address:#x}"
                )
        found[part.split()[0]] = code
    return found


def tool() -> str:
    """cuobjdump, on PATH or of this Python's packages."""
    packaged = Path(sysconfig.get_path("purelib"), "nvidia")
    for folder in (*map(str, sorted(packaged.glob("cu*/bin"))), os.environ["PATH"]):
        found = shutil.which("cuobjdump", path=folder)
        if found is not None:
            return found
    raise FileNotFoundError("cuobjdump is neither on PATH nor in this Python: pip install -r requirements-dev.txt")


def disassemble(path: Path, architectures: tuple[str, ...]) -> dict[str, list[Instruction]]:
    """The kernels of an object, of the first of the architectures that it holds."""
    command = tool()
    held = subprocess.run([command, "--list-elf", str(path)], capture_output=True, text=True, check=True).stdout
    for arch in architectures:
        if f".{arch}." in held:
            out = subprocess.run(
                [command, "-sass", "-arch", arch, str(path)], capture_output=True, text=True, check=True
            )
            return functions(out.stdout)
    raise ValueError(f"{path.name}: expected code for {' or '.join(architectures)}, got:\n{held}")


@dataclass
class Block:
    start: int  # of its first instruction among the function's
    end: int  # past its last
    next: list[int] = field(default_factory=list)  # blocks that may follow; the one it falls through to is first
    stall: int = 0  # sum over its instructions; each takes at least the cycle in which it is issued


def blocks(code: list[Instruction]) -> list[Block]:
    """The graph of a function, in the order of addresses.

    Left out: calls (as if they returned at once) and where a warp goes that has diverged at an exchange (BRA.DIV).
    """
    leaders, jumps = {0}, {}
    for i, one in enumerate(code):
        name = one.name.partition(".")[0]
        if name in ("BRX", "JMX", "JMP", "BRXU"):
            raise ValueError(f"{one.name} at {one.address:#x}: indirect jumps are not followed")
        if name == "BRA":
            target = int(TARGET.search(one.operands).group(1), 16) // 16
            always = not one.guard and one.operands.startswith("0x") and one.name in ("BRA", "BRA.U")
            jumps[i] = [i + 1] * (not always) + [target] * (one.name != "BRA.DIV")
        elif name in ("EXIT", "RET", "KILL"):
            jumps[i] = [i + 1] * bool(one.guard or one.operands.startswith(("P", "!P")))
        if i in jumps:
            leaders |= {i + 1, *jumps[i]}
    starts = sorted(x for x in leaders if x < len(code))
    number = {start: b for b, start in enumerate(starts)}
    made = []
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        after = [number[x] for x in jumps.get(end - 1, [end]) if x < len(code)]
        made.append(Block(start, end, list(dict.fromkeys(after)), sum(max(1, x.stall) for x in code[start:end])))
    return made


def dominators(graph: list[Block]) -> tuple[list[int], list[int]]:
    """(the order of each block in a walk from the entry, each one's immediate dominator); -1 where none leads there."""
    order, state, stack = [], [0] * len(graph), [(0, iter(graph[0].next))]
    state[0] = 1
    while stack:  # depth first, without recursion
        block, after = stack[-1]
        for x in after:
            if not state[x]:
                state[x] = 1
                stack.append((x, iter(graph[x].next)))
                break
        else:
            order.append(block)
            stack.pop()
    order.reverse()
    place = [-1] * len(graph)
    for i, block in enumerate(order):
        place[block] = i
    before: list[list[int]] = [[] for _ in graph]
    for block in order:
        for x in graph[block].next:
            before[x].append(block)
    parent = [-1] * len(graph)
    parent[0], changed = 0, True
    while changed:
        changed = False
        for block in order[1:]:
            new = -1
            for x in before[block]:
                if parent[x] < 0:
                    continue
                y = new if new >= 0 else x
                while x != y:
                    while place[x] > place[y]:
                        x = parent[x]
                    while place[y] > place[x]:
                        y = parent[y]
                new = x
            if parent[block] != new:
                parent[block], changed = new, True
    return place, parent


@dataclass
class Loop:
    head: int  # the block that every iteration passes first
    body: set[int]
    ends: set[int]  # blocks that jump back to the head
    inner: list[Loop] = field(default_factory=list)  # loops directly inside


def loops(graph: list[Block]) -> tuple[list[int], list[Loop]]:
    """(the order of blocks in a walk from the entry, natural loops in the order of addresses); one loop a head."""
    place, parent = dominators(graph)
    before: list[list[int]] = [[] for _ in graph]
    found: dict[int, Loop] = {}
    for i, block in enumerate(graph):
        for x in block.next if place[i] >= 0 else ():
            before[x].append(i)
            above = i
            while place[above] > place[x]:
                above = parent[above]
            if above == x:
                found.setdefault(x, Loop(x, {x}, set())).ends.add(i)
    for loop in found.values():
        waiting = list(loop.ends)
        while waiting:
            end = waiting.pop()
            if end not in loop.body:
                loop.body.add(end)
                waiting += before[end]
    ordered = sorted(found.values(), key=lambda loop: loop.head)
    for loop in ordered:
        around = [x for x in ordered if x is not loop and loop.head in x.body and loop.body < x.body]
        if around:
            min(around, key=lambda x: len(x.body)).inner.append(loop)
    return place, ordered


def numbered(found: list[Loop]) -> dict[str, Loop]:
    """Of all loops of a function: "3" is the third that is in no other, "3.1" the first inside it."""
    inside = {id(x) for loop in found for x in loop.inner}
    waiting = [("", i, loop) for i, loop in enumerate((x for x in found if id(x) not in inside), 1)]
    numbers = {}
    while waiting:
        prefix, i, loop = waiting.pop(0)
        numbers[f"{prefix}{i}"] = loop
        waiting = [(f"{prefix}{i}.", j, x) for j, x in enumerate(loop.inner, 1)] + waiting
    return numbers


def own(loop: Loop) -> set[int]:
    """Blocks of a loop that are in no loop inside it."""
    return loop.body.difference(*(x.body for x in loop.inner))


def paths(code: list[Instruction], graph: list[Block], loop: Loop, place: list[int]) -> tuple[list[int], list[int]]:
    """Blocks of the (shortest, longest) iteration, by stalls, of those that make most products of the loop's own.

    Of loops inside, the longest passes as few as it can, each once: so what it has beside the shortest are branches
    that an iteration may take (the next copies, results that are asked for), and not what is rare, which is in loops
    (edits, snapshots).
    """
    mine, inner = own(loop), {x.head for x in loop.inner}

    def best(sign: int) -> list[int]:
        # From each block to an end of the iteration: what is to be largest, and the next block.
        known: dict[int, tuple[tuple[int, int, int], int]] = {}
        for block in sorted(loop.body, key=place.__getitem__, reverse=True):
            after = [(known[x][0], x) for x in graph[block].next if place[x] > place[block] and x in known]
            after += [((0, 0, 0), -1)] * (block in loop.ends)
            if not after:
                continue  # it leaves the loop
            (products, loops, stall), to = max(after, key=lambda x: x[0])
            if block in mine:
                products += sum(x.kind == "matrix" for x in code[graph[block].start : graph[block].end])
            loops -= sign > 0 and block in inner
            known[block] = (products, loops, stall + sign * graph[block].stall), to
        path, block = [], loop.head
        while block >= 0:
            path.append(block)
            block = known[block][1]
        return path

    return best(-1), best(1)
