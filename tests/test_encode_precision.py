"""`encode(precision="bf16")`: every means of multiplying bfloat16 against the float64 reference on rounded operands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from writesae import ops
from writesae._library import CPU_ERROR, cpu_isa
from writesae.edits import Edits
from writesae.testing import check_close, gated_delta_rule_inputs, poisoned_memory
from writesae.testing import cpu_bf16 as forced_bf16
from writesae.testing import cpu_isa as forced_isa

assert CPU_ERROR is None, CPU_ERROR
# The AMX code on plain tiles too; AMX itself only where the processor has it.
UNITS = [*cpu_isa()["bf16_supported"].split(","), "tiles"]
TOLERANCE = 1e-5  # order of the float32 sums; measured at most 2e-6


def problem(T=150, H=2, K=32, V=64, F=100, rank=1, decay="usual", edits=False, seed=0):
    x = gated_delta_rule_inputs(1, T, 1, H, K, V, decay=decay, correlated=True, seed=seed)
    planned = None
    if edits:
        place = (torch.tensor([x]) for x in (0, T // 2, H - 1))
        planned = Edits(*place, torch.randn(1, K), torch.randn(1, V), ["add"])
    writes = ops.gated_delta_rule(**x, use_qk_l2norm=True, return_writes=True, edits=planned).writes
    generator = torch.Generator().manual_seed(seed + 1)
    v, w = (torch.randn(H, F, rank, size, generator=generator) for size in (K, V))
    return writes, v, w, torch.randn(H, F, generator=generator)


def exact(writes, v, w, b, **options):
    options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return ops.encode(
        writes.to(torch.float64), v.double(), w.double(), b.double(), backend="reference", precision="bf16", **options
    )


CASES = (
    {}, {"K": 128, "V": 128, "F": 300, "T": 500}, {"K": 20, "V": 12, "F": 17}, {"K": 33, "V": 1, "F": 5, "T": 13},
    {"rank": 3, "K": 40}, {"edits": True, "T": 97}, {"decay": "none", "T": 257}, {"decay": "strong"},
    {"T": 1}, {"T": 8},
)  # fmt: skip


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_against_rounded_reference(sizes):
    writes, v, w, b = problem(**sizes)
    F = v.shape[1]
    expected = exact(writes, v, w, b, k=F)
    pre = torch.zeros(*expected.values.shape, dtype=torch.float64).scatter(-1, expected.indices, expected.values)
    for unit in UNITS:
        with poisoned_memory(), forced_bf16(unit):
            got = ops.encode(writes, v, w, b, k=F, backend="cpu", precision="bf16")
        dense = torch.zeros(*got.values.shape).scatter(-1, got.indices, got.values)
        check_close(f"{unit} values", dense, pre, TOLERANCE)
        check_close(f"{unit} carry", got.carry, expected.carry, TOLERANCE)
        assert (got.values[..., 1:] <= got.values[..., :-1]).all()


def test_rounding_is_what_differs_from_fp32():
    """Exact where operands are bfloat16 already; off by about 2^-9 of the largest where they are not."""
    writes, v, w, b = problem(K=128, V=128, F=500)
    full = ops.encode(writes, v, w, b, k=500)
    for unit in UNITS:
        with forced_bf16(unit):
            off = (ops.encode(writes, v, w, b, k=500, precision="bf16").carry - full.carry).abs().max()
            assert 1e-5 < float(off / full.carry.abs().max()) < 1e-2
            cut = [x.bfloat16() for x in (v, w)]
            rounded = writes.to(torch.bfloat16)
            a, c = (ops.encode(rounded, *cut, b, k=32, precision=p, carry=full.carry) for p in ("fp32", "bf16"))
        check_close(unit, c.values, a.values, TOLERANCE)


def test_instruction_sets_round_alike():
    writes, v, w, b = problem(K=48, F=64)
    expected = exact(writes, v, w, b, k=64)
    for isa in cpu_isa()["supported"].split(","):
        with forced_isa(isa), forced_bf16("rounded"):
            check_close(isa, ops.encode(writes, v, w, b, k=64, precision="bf16").carry, expected.carry, TOLERANCE)
        with forced_isa(isa):  # the processor's own goes with the instruction set
            assert (torch.ops.writesae.cpu_bf16("") == "rounded") == (isa != "avx512" or UNITS[0] == "rounded")


def test_threshold_and_threads():
    writes, v, w, b = problem(T=400, H=4, F=130)
    expected = exact(writes, v, w, b, threshold=0.5)
    for unit in UNITS:
        with forced_bf16(unit):
            one, two = [], []
            for found, threads in ((one, 1), (two, 2)):
                before = torch.get_num_threads()
                torch.set_num_threads(threads)
                try:
                    found.append(ops.encode(writes, v, w, b, threshold=0.5, precision="bf16"))
                finally:
                    torch.set_num_threads(before)
        assert torch.equal(one[0].values, two[0].values) and torch.equal(one[0].indices, two[0].indices)
        assert abs(len(one[0].values) - len(expected.values)) <= 2 + len(expected.values) // 1000
        check_close(f"{unit} sum", one[0].values.sum()[None], expected.values.sum()[None], 1e-4)


def test_opcheck():
    writes, v, w, b = problem(T=20, F=20)
    arguments = (writes.decay, writes.left, writes.right, torch.arange(2), v, w, b)
    rest = (None, None, None, None, None, "bf16")
    torch.library.opcheck(torch.ops.writesae.encode_topk.default, (*arguments, 3, *rest))
    torch.library.opcheck(torch.ops.writesae.encode_threshold.default, (*arguments, torch.zeros_like(b), *rest))


def test_gradient_is_that_of_the_factors():
    writes, v, w, b = problem(T=30, F=20)
    b = b + 1000  # so that rounding turns none positive or negative
    factors = [x.clone().requires_grad_() for x in (v, w, b)]
    ops.encode(writes, *factors, k=20, precision="bf16").values.sum().backward()
    same = [x.clone().requires_grad_() for x in (v, w, b)]
    ops.encode(writes, *same, k=20).values.sum().backward()
    for name, a, c in zip("vwb", factors, same, strict=True):
        check_close(name, a.grad, c.grad, 1e-6)


def test_refusals():
    writes, v, w, b = problem(T=5, F=4)
    with pytest.raises(ValueError, match="precision: expected one of 'fp32', 'tf32', 'bf16', got 'fp16'"):
        ops.encode(writes, v, w, b, k=2, precision="fp16")
    with pytest.raises(RuntimeError, match="bf16: expected amx, avx512_bf16, tiles or rounded"):
        torch.ops.writesae.cpu_bf16("mmx")
    if "amx" not in UNITS:
        with pytest.raises(RuntimeError, match="bf16=amx: this processor supports only"):
            torch.ops.writesae.cpu_bf16("amx")


def test_environment_variable():
    code = "import torch, writesae.ops; print(torch.ops.writesae.cpu_bf16(''))"
    for name in UNITS:
        env = {**os.environ, "WRITESAE_CPU_BF16": name}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
        assert out.stdout.strip() == name
