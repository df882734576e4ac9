"""The reader and judge of ptxas' reports; the reports themselves are made and checked by `make cuda-check`."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import check_ptxas

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8writesae4cuda4walkINS_4tile4bf16ELi128ELb1EEEvNS0_7ProblemE' for 'sm_80'
ptxas info    : Function properties for _ZN8writesae4cuda4walkINS_4tile4bf16ELi128ELb1EEEvNS0_7ProblemE
    672 bytes stack frame, 668 bytes spill stores, 1080 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 672 bytes cumulative stack size, 776 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN8writesae4cuda4joinILi64EEEvNS0_7ProblemEi' for 'sm_90'
ptxas info    : Function properties for _ZN8writesae4cuda4joinILi64EEEvNS0_7ProblemEi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem
"""
KERNEL, ARCHS = "walk<bf16, 128, true>", check_ptxas.REQUIRED


def usage(**change):
    fields = {"registers": 64, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0}
    return check_ptxas.Usage(**{**fields, **change})


def table(found, nvcc="13.0.88", may_spill=None):
    return {"nvcc": nvcc, "may_spill": may_spill or {}, "kernels": check_ptxas.rows(found)}


@pytest.mark.parametrize(
    "architectures, expected",
    [
        ("80 90 100 90-ptx", ["80,code=[sm_80]", "90,code=[sm_90,sm_100,compute_90]"]),
        ("89", ["89,code=[sm_89]"]),
        ("100 120", ["100,code=[sm_100,sm_120]"]),
        ("90a 90", ["90a,code=[sm_90a]", "90,code=[sm_90]"]),
        ("86 80 80-ptx", ["80,code=[sm_86,sm_80,compute_80]"]),
    ],
)
def test_architectures_share_what_can_be_shared(architectures, expected):
    found = check_ptxas.sources.architecture_flags(architectures)
    assert found == [f"-gencode=arch=compute_{x}" for x in expected]


def test_report_is_read(tmp_path):
    (tmp_path / "x.ptxas.txt").write_text(REPORT)
    assert check_ptxas.gather(tmp_path) == {
        "join<64>": {"sm_90": usage(registers=40, shared=4096)},
        KERNEL: {"sm_80": usage(registers=255, stack=672, spill_stores=668, spill_loads=1080)},
    }


def test_a_sound_build_passes():
    found = {KERNEL: {arch: usage() for arch in ARCHS}}
    assert check_ptxas.check(found, table(found), "13.0.88") == ([], [])


def test_a_write_rule_stays_in_the_name():
    """Or kernels of one name would be one row of the table."""
    names = [f"_ZN8writesae4cuda{x}7prepareIfLi64EEEvNS0_7ProblemE" for x in ("", "16gated_delta_rule", "3ssd")]
    shown = check_ptxas.readable(names)
    assert shown == [f"{x}prepare<float, 64>" for x in ("", "gated_delta_rule::", "ssd::")]


@pytest.mark.parametrize(
    "change, message",
    [({"spill_loads": 4}, "spills"), ({"shared": 164 * 1024}, "shared memory"), ({"registers": 65}, "table")],
)
def test_a_worse_build_fails(change, message):
    before = {KERNEL: {arch: usage() for arch in ARCHS}}
    after = {KERNEL: {**before[KERNEL], "sm_80": usage(**change)}}
    errors, _ = check_ptxas.check(after, table(before), "13.0.88")
    assert any(message in error and "sm_80" in error for error in errors)
    if "registers" in change:  # another compiler may take other registers
        errors, remarks = check_ptxas.check(after, table(before), "13.1.0")
        assert not errors and any("table" in remark for remark in remarks)


def test_spills_need_a_reason():
    found = {KERNEL: {arch: usage(spill_stores=8) for arch in ARCHS}}
    assert len(check_ptxas.check(found, table(found), "13.0.88")[0]) == 3
    assert not check_ptxas.check(found, table(found, may_spill={"walk<*>": "why"}), "13.0.88")[0]


def test_every_architecture_and_kernel_is_there():
    found = {KERNEL: {arch: usage() for arch in ARCHS}}
    assert check_ptxas.check({KERNEL: {"sm_80": usage()}}, table(found), "13.0.88")[0] == [
        f"{KERNEL} was not compiled for sm_90", f"{KERNEL} was not compiled for sm_100",
    ]  # fmt: skip
    assert "in the table only" in check_ptxas.check({}, table(found), "13.0.88")[0][0]


def test_a_file_may_have_an_architecture_of_its_own(monkeypatch):
    monkeypatch.setattr(check_ptxas, "SPECIAL", {"sm_90a"})
    found = {KERNEL: {arch: usage() for arch in ARCHS}, "wide<64>": {"sm_90a": usage()}}
    assert check_ptxas.check(found, table(found), "13.0.88") == ([], [])
    found["wide<64>"] = {"sm_80": usage()}
    assert any("wide<64> was not compiled for sm_90" in x for x in check_ptxas.check(found, table(found), "13.0.88")[0])


def test_the_committed_table():
    """Of every architecture, and only what needs its registers most may spill."""
    committed = json.loads(check_ptxas.TABLE.read_text())
    assert committed == json.loads(check_ptxas.written(committed))
    assert len(committed["kernels"]) > 100
    spilling = set()
    for kernel, archs in committed["kernels"].items():
        assert archs.keys() == set(ARCHS) or archs.keys() <= check_ptxas.SPECIAL
        spilling |= {kernel for used in archs.values() if check_ptxas.Usage(*used).spill_loads}
    assert spilling == committed["may_spill"].keys()
    # Two writes a token need more; `join` and the float32 gradients of a channel gate since tf32 is one instruction.
    may = (", 256", "dplr::", "join<", "gradients_channels<gated_delta_rule::ChannelRule, float, 64")
    assert all(any(part in kernel for part in may) for kernel in spilling), spilling
