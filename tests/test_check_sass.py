"""The reader of disassembled kernels, and the judge of their loops; real ones are looked at by `make cuda-check`."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import check_sass
import sass

# What `cuobjdump -sass` (sm_90, nvcc 13.0) prints of
#   chain: for (i < n) { x = (x * 2 + 1) * 3 + s[i]; if (i == rare) for (j < n) x = x * x + 1; }, s shared
#   products: for (i < n) one mma.sync of 16 x 8 x 16
#   lookup: an array indexed at run time, and a store to what is shared or not
# without blanks and the padding behind.
SASS = """
		Function : chain
/*0000*/ LDC R1, c[0x0][0x28] ; /* 0x00000a00ff017b82 */ /* 0x000fe20000000800 */
/*0010*/ S2R R7, SR_TID.X ; /* 0x0000000000077919 */ /* 0x000e2e0000002100 */
/*0020*/ S2UR UR6, SR_CgaCtaId ; /* 0x00000000000679c3 */ /* 0x000e620000008800 */
/*0030*/ UMOV UR4, 0x400 ; /* 0x0000040000047882 */ /* 0x000fe20000000000 */
/*0040*/ ULDC.64 UR8, c[0x0][0x208] ; /* 0x0000820000087ab9 */ /* 0x000fcc0000000a00 */
/*0050*/ LDC R2, c[0x0][0x21c] ; /* 0x00008700ff027b82 */ /* 0x000eb00000000800 */
/*0060*/ LDC R3, c[0x0][0x218] ; /* 0x00008600ff037b82 */ /* 0x000ee20000000800 */
/*0070*/ ULEA UR6, UR6, UR4, 0x18 ; /* 0x0000000406067291 */ /* 0x002fc6000f8ec03f */
/*0080*/ ULDC UR4, c[0x0][0x218] ; /* 0x0000860000047ab9 */ /* 0x000fe40000000800 */
/*0090*/ IMAD.U32 R5, RZ, RZ, UR4 ; /* 0x00000004ff057e24 */ /* 0x000fe2000f8e00ff */
/*00a0*/ LEA R0, R7, UR6, 0x2 ; /* 0x0000000607007c11 */ /* 0x001fe4000f8e10ff */
/*00b0*/ ISETP.GE.AND P0, PT, R2, 0x1, PT ; /* 0x000000010200780c */ /* 0x004fc60003f06270 */
/*00c0*/ STS [R0], R3 ; /* 0x0000000300007388 */ /* 0x0081e20000000800 */
/*00d0*/ BAR.SYNC.DEFER_BLOCKING 0x0 ; /* 0x0000000000007b1d */ /* 0x000ff20000010000 */
/*00e0*/ @!P0 BRA 0x210 ; /* 0x0000000000488947 */ /* 0x000fea0003800000 */
/*00f0*/ UMOV UR4, URZ ; /* 0x0000003f00047c82 */ /* 0x000fca0008000000 */
/*0100*/ ULEA UR5, UR4, UR6, 0x2 ; /* 0x0000000604057291 */ /* 0x000fe2000f8e103f */
/*0110*/ LDC R2, c[0x0][0x220] ; /* 0x00008800ff027b82 */ /* 0x000e700000000800 */
/*0120*/ LDS R0, [UR5] ; /* 0x00000005ff007984 */ /* 0x001e220008000800 */
/*0130*/ LDC R3, c[0x0][0x21c] ; /* 0x00008700ff037b82 */ /* 0x000ea20000000800 */
/*0140*/ ISETP.NE.AND P1, PT, R2, UR4, PT ; /* 0x0000000402007c0c */ /* 0x002fe2000bf25270 */
/*0150*/ HFMA2.MMA R2, -RZ, RZ, 2, 0 ; /* 0x40000000ff027435 */ /* 0x000fe200000001ff */
/*0160*/ UIADD3 UR4, UR4, 0x1, URZ ; /* 0x0000000104047890 */ /* 0x000fcc000fffe03f */
/*0170*/ ISETP.LE.AND P0, PT, R3, UR4, PT ; /* 0x0000000403007c0c */ /* 0x004fc6000bf03270 */
/*0180*/ FFMA R5, R5, R2, 1 ; /* 0x3f80000005057423 */ /* 0x000fc80000000002 */
/*0190*/ FFMA R5, R5, 3, R0 ; /* 0x4040000005057823 */ /* 0x001fe20000000000 */
/*01a0*/ @P1 BRA 0x200 ; /* 0x0000000000141947 */ /* 0x000fec0003800000 */
/*01b0*/ UMOV UR5, URZ ; /* 0x0000003f00057c82 */ /* 0x000fca0008000000 */
/*01c0*/ UIADD3 UR5, UR5, 0x1, URZ ; /* 0x0000000105057890 */ /* 0x000fe2000fffe03f */
/*01d0*/ FFMA R5, R5, R5, 1 ; /* 0x3f80000005057423 */ /* 0x000fca0000000005 */
/*01e0*/ ISETP.LE.AND P1, PT, R3, UR5, PT ; /* 0x0000000503007c0c */ /* 0x000fda000bf23270 */
/*01f0*/ @!P1 BRA 0x1c0 ; /* 0xfffffffc00f09947 */ /* 0x000fea000383ffff */
/*0200*/ @!P0 BRA 0x100 ; /* 0xfffffffc00bc8947 */ /* 0x000fea000383ffff */
/*0210*/ LDC.64 R2, c[0x0][0x210] ; /* 0x00008400ff027b82 */ /* 0x001e240000000a00 */
/*0220*/ IMAD.WIDE.U32 R2, R7, 0x4, R2 ; /* 0x0000000407027825 */ /* 0x001fca00078e0002 */
/*0230*/ STG.E desc[UR8][R2.64], R5 ; /* 0x0000000502007986 */ /* 0x000fe2000c101908 */
/*0240*/ EXIT ; /* 0x000000000000794d */ /* 0x000fea0003800000 */
		Function : products
/*0000*/ LDC R1, c[0x0][0x28] ; /* 0x00000a00ff017b82 */ /* 0x000ff00000000800 */
/*0010*/ LDC R0, c[0x0][0x220] ; /* 0x00008800ff007b82 */ /* 0x000e220000000800 */
/*0020*/ S2R R11, SR_TID.X ; /* 0x00000000000b7919 */ /* 0x000e620000002100 */
/*0030*/ ULDC.64 UR6, c[0x0][0x208] ; /* 0x0000820000067ab9 */ /* 0x000fe20000000a00 */
/*0040*/ CS2R R4, SRZ ; /* 0x0000000000047805 */ /* 0x000fc4000001ff00 */
/*0050*/ CS2R R6, SRZ ; /* 0x0000000000067805 */ /* 0x000fc6000001ff00 */
/*0060*/ LDC.64 R8, c[0x0][0x210] ; /* 0x00008400ff087b82 */ /* 0x000ea20000000a00 */
/*0070*/ ISETP.GE.AND P0, PT, R0, 0x1, PT ; /* 0x000000010000780c */ /* 0x001fda0003f06270 */
/*0080*/ @!P0 BRA 0x1c0 ; /* 0x00000000004c8947 */ /* 0x006fea0003800000 */
/*0090*/ CS2R R6, SRZ ; /* 0x0000000000067805 */ /* 0x000fe4000001ff00 */
/*00a0*/ CS2R R4, SRZ ; /* 0x0000000000047805 */ /* 0x000fe2000001ff00 */
/*00b0*/ UMOV UR4, URZ ; /* 0x0000003f00047c82 */ /* 0x000fe20008000000 */
/*00c0*/ ULDC.64 UR8, c[0x0][0x218] ; /* 0x0000860000087ab9 */ /* 0x000fca0000000a00 */
/*00d0*/ IMAD.U32 R2, RZ, RZ, UR8 ; /* 0x00000008ff027e24 */ /* 0x000fe2000f8e00ff */
/*00e0*/ MOV R3, UR9 ; /* 0x0000000900037c02 */ /* 0x000fca0008000f00 */
/*00f0*/ LDG.E R12, desc[UR6][R2.64] ; /* 0x00000006020c7981 */ /* 0x000ea2000c1e1900 */
/*0100*/ UIADD3 UR4, UR4, 0x1, URZ ; /* 0x0000000104047890 */ /* 0x000fe4000fffe03f */
/*0110*/ UIADD3 UR8, UP0, UR8, 0x4, URZ ; /* 0x0000000408087890 */ /* 0x000fc8000ff1e03f */
/*0120*/ ISETP.LE.AND P0, PT, R0, UR4, PT ; /* 0x0000000400007c0c */ /* 0x000fe2000bf03270 */
/*0130*/ UIADD3.X UR9, URZ, UR9, URZ, UP0, !UPT ; /* 0x000000093f097290 */ /* 0x000fe200087fe43f */
/*0140*/ IMAD.MOV.U32 R16, RZ, RZ, R12.reuse ; /* 0x000000ffff107224 */ /* 0x104fe200078e000c */
/*0150*/ MOV R17, R12.reuse ; /* 0x0000000c00117202 */ /* 0x080fe20000000f00 */
/*0160*/ IMAD.MOV.U32 R13, RZ, RZ, R12.reuse ; /* 0x000000ffff0d7224 */ /* 0x100fe200078e000c */
/*0170*/ MOV R14, R12 ; /* 0x0000000c000e7202 */ /* 0x000fe20000000f00 */
/*0180*/ IMAD.MOV.U32 R15, RZ, RZ, R12 ; /* 0x000000ffff0f7224 */ /* 0x000fce00078e000c */
/*0190*/ HMMA.16816.F32.BF16 R4, R12, R16, R4 ; /* 0x000000100c04723c */ /* 0x000fe20000041804 */
/*01a0*/ NOP ; /* 0x0000000000007918 */ /* 0x000fd00000000000 */
/*01b0*/ @!P0 BRA 0xd0 ; /* 0xfffffffc00c48947 */ /* 0x000fde000383ffff */
/*01c0*/ FADD R5, R4, R5 ; /* 0x0000000504057221 */ /* 0x000fe20000000000 */
/*01d0*/ IMAD.WIDE.U32 R2, R11, 0x4, R8 ; /* 0x000000040b027825 */ /* 0x000fc800078e0008 */
/*01e0*/ FADD R6, R5, R6 ; /* 0x0000000605067221 */ /* 0x000fc80000000000 */
/*01f0*/ FADD R7, R6, R7 ; /* 0x0000000706077221 */ /* 0x000fca0000000000 */
/*0200*/ STG.E desc[UR6][R2.64], R7 ; /* 0x0000000702007986 */ /* 0x000fe2000c101906 */
/*0210*/ EXIT ; /* 0x000000000000794d */ /* 0x000fea0003800000 */
		Function : lookup
/*0000*/ LDC R1, c[0x0][0x28] ; /* 0x00000a00ff017b82 */ /* 0x000e300000000800 */
/*0010*/ LDC.64 R12, c[0x0][0x210] ; /* 0x00008400ff0c7b82 */ /* 0x000e620000000a00 */
/*0020*/ ULDC.64 UR4, c[0x0][0x208] ; /* 0x0000820000047ab9 */ /* 0x000fe20000000a00 */
/*0030*/ VIADD R1, R1, 0xfffffff8 ; /* 0xfffffff801017836 */ /* 0x001fcc0000000000 */
/*0040*/ LDC R6, c[0x0][0x218] ; /* 0x00008600ff067b82 */ /* 0x000e220000000800 */
/*0050*/ S2R R5, SR_CgaCtaId ; /* 0x0000000000057919 */ /* 0x000ea20000008800 */
/*0060*/ S2R R9, SR_SWINHI ; /* 0x0000000000097919 */ /* 0x000eec0000002f00 */
/*0070*/ LDC.64 R10, c[0x0][0x210] ; /* 0x00008400ff0a7b82 */ /* 0x000f220000000a00 */
/*0080*/ LDG.E R3, desc[UR4][R12.64+0x4] ; /* 0x000004040c037981 */ /* 0x002f68000c1e1900 */
/*0090*/ LDG.E R2, desc[UR4][R12.64] ; /* 0x000000040c027981 */ /* 0x000f62000c1e1900 */
/*00a0*/ IMAD R0, R6, 0x4, R1 ; /* 0x0000000406007824 */ /* 0x001fe200078e0201 */
/*00b0*/ MOV R4, 0x400 ; /* 0x0000040000047802 */ /* 0x000fc40000000f00 */
/*00c0*/ ISETP.NE.AND P0, PT, R6, RZ, PT ; /* 0x000000ff0600720c */ /* 0x000fe20003f05270 */
/*00d0*/ STL.64 [R1], R2 ; /* 0x0000000201007387 */ /* 0x020fe80000100a00 */
/*00e0*/ LDL R0, [R0] ; /* 0x0000000000007983 */ /* 0x000f620000100800 */
/*00f0*/ LEA R4, R5, R4, 0x18 ; /* 0x0000000405047211 */ /* 0x004fc800078ec0ff */
/*0100*/ MOV R6, R4 ; /* 0x0000000400067202 */ /* 0x000fe40000000f00 */
/*0110*/ MOV R7, R9 ; /* 0x0000000900077202 */ /* 0x008fe40000000f00 */
/*0120*/ SEL R6, R6, R10, P0 ; /* 0x0000000a06067207 */ /* 0x010fe40000000000 */
/*0130*/ SEL R7, R7, R11, P0 ; /* 0x0000000b07077207 */ /* 0x000fca0000000000 */
/*0140*/ ST.E desc[UR4][R6.64], R0 ; /* 0x0000000006007985 */ /* 0x020fe8000c101904 */
/*0150*/ LDS R3, [R4] ; /* 0x0000000004037984 */ /* 0x000e280000000800 */
/*0160*/ STG.E desc[UR4][R12.64+0x8], R3 ; /* 0x000008030c007986 */ /* 0x001fe2000c101904 */
/*0170*/ EXIT ; /* 0x000000000000794d */ /* 0x000fea0003800000 */
"""
CODE = sass.functions(SASS)


def at(name, address):
    return CODE[name][address // 16]


def found(**change):
    """Kernels as of a build, "chain" with other instructions on request."""
    kernels = {name: check_sass.kernel(code) for name, code in CODE.items()}
    for name, code in change.items():
        kernels[name] = check_sass.kernel(code)
    return kernels


def table(kernels, nvcc="13.0.88", may_generic=None):
    rows = {name: one.rows() for name, one in kernels.items()}
    return {"nvcc": nvcc, "may_generic": {"lookup": "why"} if may_generic is None else may_generic, "kernels": rows}


def judge(kernels, before=None, nvcc="13.0.88", may_generic=None, may_spill=("lookup",)):
    return check_sass.check(kernels, table(before or found(), may_generic=may_generic), nvcc, may_spill)


def test_control_codes():
    """A sum is waited for four cycles; what comes from memory sets a scoreboard that its reader awaits."""
    first, second, load = at("chain", 0x180), at("chain", 0x190), at("chain", 0x120)
    assert (first.name, first.stall) == ("FFMA", 4) and second.operands.startswith("R5, R5")
    assert (load.name, load.writes, load.reads) == ("LDS", 0, 7)
    assert second.waits == 1 << load.writes and first.waits == 0
    store = at("chain", 0xC0)  # it reads its registers late, and they are written anew at 0x120
    assert store.reads == 0 and at("chain", 0x120).waits == 1 << store.reads
    assert at("products", 0x80).waits == 0b110 and at("products", 0x80).guard == "!P0"


def test_a_line_not_understood_is_an_error():
    lines = SASS.splitlines()
    with pytest.raises(ValueError, match="chain: expected an instruction at 0x10, got one at 0x20"):
        sass.functions("\n".join([*lines[:3], *lines[4:]]))


def iterations(code):
    """{number: (head, stalls of the shortest iteration, of the longest)} of each loop."""
    graph = sass.blocks(code)
    place, loops = sass.loops(graph)
    return {
        number: (
            16 * graph[x.head].start,
            *(sum(graph[b].stall for b in way) for way in sass.paths(code, graph, x, place)),
        )
        for number, x in sass.numbered(loops).items()
    }


def changed(kernel, address, **change):
    return [x._replace(**change) if x.address == address else x for x in CODE[kernel]]


def test_loops_and_paths():
    """A loop inside that can be skipped is skipped, another branch only by the shortest iteration."""
    stalls = [x.stall for x in CODE["chain"]]
    around, inside = sum(stalls[0x10:0x1B]) + stalls[0x20], sum(stalls[0x1B:0x20])
    assert (around, inside) == (38, 29)
    assert iterations(CODE["chain"]) == {"1": (0x100, around, around), "1.1": (0x1C0, 24, 24)}
    no_loop = changed("chain", 0x1F0, name="NOP", operands="")  # does not jump back
    assert iterations(no_loop) == {"1": (0x100, around, around + inside)}
    product = [x._replace(name="HMMA.16816.F32") if x.address == 0x1D0 else x for x in no_loop]  # that no path misses
    assert iterations(product) == {"1": (0x100, around + inside, around + inside)}
    always = changed("chain", 0x1A0, name="NOP", operands="")  # does not jump over
    assert iterations(always)["1"] == (0x100, around + inside, around + inside)


def test_loops_inside_loops():
    """Two at the third level, of which one has two ways back; and a block that nothing leads to."""
    after = [[1], [2], [3], [3, 4], [5, 6], [4], [4, 7], [2, 8], [1, 9], [], [2]]
    _, loops = sass.loops([sass.Block(i, i + 1, to, 1) for i, to in enumerate(after)])
    bodies = {number: x.body for number, x in sass.numbered(loops).items()}
    assert bodies == {"1": {*range(1, 9)}, "1.1": {*range(2, 8)}, "1.1.1": {3}, "1.1.2": {4, 5, 6}}
    assert sass.own(loops[0]) == {1, 8} and sass.own(loops[1]) == {2, 7}


def test_an_iteration_is_counted():
    one = check_sass.kernel(CODE["products"])
    assert (one.products, one.barriers, one.local, one.generic) == (1, 0, 0, 0)
    loop = one.loops["1"]
    assert (loop.instructions, loop.products, loop.globals, loop.control) == (15, 1, 1, 2)
    assert loop.floor == loop.longest == 50 and one.flop["1"] == 2 * 16 * 8 * 16
    assert check_sass.kernel(CODE["chain"]).barriers == 1
    assert not check_sass.kernel(CODE["chain"]).loops  # small, and no products
    wide = "/*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ; /* 0x01e000000c1879f0 */ /* 0x000fe2000bf01818 */"
    (one,) = sass.functions(f"\n Function : wide\n{wide}")["wide"]
    assert one.flop == 2 * 64 * 128 * 16 // 4 and one.operands == "R24, gdesc[UR12], R24"


def test_ceiling():
    """One warp waits for its own stalls; many are bound by what a scheduler issues: an instruction a cycle."""
    everything = 132 * 4 * 1.7e9 * 4096 / 1e12
    assert check_sass.ceiling(4096, 50, 15, 1) == pytest.approx(everything / 50)
    assert check_sass.ceiling(4096, 50, 15, 16) == pytest.approx(everything / 15)


def test_a_sound_build_passes():
    assert judge(found()) == ([], [])


def test_local_and_generic_accesses_need_a_reason():
    errors, _ = judge(found(), may_spill=())
    assert len(errors) == 1 and "lookup accesses local memory in 2 places" in errors[0]
    errors, _ = judge(found(), may_generic={})
    assert len(errors) == 1 and "lookup accesses memory by generic addresses in 1 places" in errors[0]
    for nvcc in ("13.0.88", "13.1.0"):  # whichever the compiler
        assert judge(found(), nvcc=nvcc, may_generic={}, may_spill=())[0]


@pytest.mark.parametrize("name, kind", [("LD.E", "generic"), ("ATOM.E.ADD", "generic"), ("STL", "local")])
def test_a_planted_access_is_found(name, kind):
    code = changed("products", 0xF0, name=name)
    errors, _ = judge(found(products=code))
    assert any(f"products accesses {'local memory' if kind == 'local' else 'memory by generic'}" in x for x in errors)
    assert any(f"{kind} 0 -> 1" in x and "products, loop 1" in x for x in errors)


def test_a_reason_that_nobody_needs_fails():
    errors, _ = judge(found(), may_generic={"lookup": "why", "gone": "why"})
    assert errors == ["may_generic has 'gone', and no kernel needs it"]
    errors, _ = judge(found(), may_generic={"*": "why"})
    assert len(errors) == 2 and all("make that narrower" in x for x in errors)


def test_another_loop_fails():
    code = changed("products", 0x190, stall=9)
    errors, _ = judge(found(products=code))
    assert errors == ["products, loop 1: longest 50 -> 58, floor 50 -> 58"]
    errors, remarks = judge(found(products=code), nvcc="13.1.0")  # another compiler may make other code
    assert not errors and remarks[1:] == ["products, loop 1: longest 50 -> 58, floor 50 -> 58"]


def test_every_kernel_and_loop_is_there():
    fewer = {name: one for name, one in found().items() if name != "chain"}
    assert judge(fewer)[0] == ["chain is in the table only"]
    assert judge(found(), fewer)[0] == ["chain is in the build only"]
    code = changed("products", 0x1B0, name="EXIT", guard="")
    assert "products, loop 1 is in the table only" in judge(found(products=code))[0]


def test_shown():
    lines = check_sass.shown(found(), ["*"]).splitlines()
    assert len(lines) == 2 and lines[1].split()[:6] == ["products", "1", "1", "4", "15-15", "50-50"]


def test_the_committed_table():
    committed = json.loads(check_sass.TABLE.read_text())
    assert committed["columns"] == check_sass.COLUMNS
    assert check_sass.TABLE.read_text() == check_sass.written(committed)
    spills = json.loads(check_sass.PTXAS.read_text())
    assert committed["kernels"].keys() == spills["kernels"].keys() and committed["nvcc"] == spills["nvcc"]
    for name, rows in committed["kernels"].items():
        products = dict(zip(check_sass.COLUMNS["kernel"].split(", "), rows["kernel"], strict=True))["products"]
        if products and name.startswith(("walk<", "prepare<", "reverse<", "encode_kernel<")):
            assert len(rows) > 1, f"{name} makes matrix products in no loop"
