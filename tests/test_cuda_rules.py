"""The CUDA kernels of the write rules where the common tests (test_rules.py) do not look: the sizes they are built for,
all types, many chunks, chunks cut at edits. On the host twin and the GPU (see targets.py)."""

from __future__ import annotations

from functools import partial

import host_twin
import pytest
import rules
import torch
from rules import edits_for, targets
from test_rules import HALVES, packed, state_for

from writesae.edits import Edits
from writesae.ops._dispatch import operators

KIND = "devices"  # cases that have a kernel there
DTYPES = [torch.float32, *HALVES]


@pytest.fixture
def compare(case, record_property):
    return partial(rules.compare, case, record=record_property, which="devices")


def skip_widened(case, dtype):
    """What is computed in float32 has the kernels that float32 itself has; `test_sizes` has its conversion."""
    if dtype in case.widened:
        pytest.skip(f"{dtype} of {case.name} is computed in float32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, V", [(32, 32), (64, 136), (128, 128), (256, 64), (40, 72), (7, 5)])
def test_sizes(K, V, dtype, case, compare):
    x = case.make(1, 131, 1, 2, K, V, dtype, correlated=True)
    compare(x, edits=edits_for(1, [131], case.sizes(x)[3], K, V), snapshots=[0, 63, 64, 130])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
def test_decay(decay, dtype, case, compare):
    skip_widened(case, dtype)  # test_rules.py has the same decays in float32
    x = case.make(2, 200, 1, 2, 64, 48, dtype, decay=decay, correlated=True)
    compare(x, initial_state=state_for(case, x), snapshots=[127, 199])


def test_mixed_decay_is_exact(case, compare):
    """Gates near one right after gates near nothing: differences of log-decays keep their last bits."""
    x = case.make(1, 128, 1, 1, 32, 32, decay="weak", correlated=True)
    case.mix(x)
    compare(x, initial_state=state_for(case, x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_long(dtype, case, compare):
    """Enough chunks for one head that the sequence is split over blocks."""
    skip_widened(case, dtype)  # test_rules.py has the same in float32
    x = case.make(1, 4096, 1, 1, 32, 24, dtype, correlated=True, decay="weak")
    compare(x, edits=edits_for(1, [4096], 1, 32, 24), snapshots=[1000, 1023, 1024, 4095])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_and_split(dtype, case, compare):
    skip_widened(case, dtype)
    lengths = [700, 0, 1, 1600, 65]
    x, offsets = packed(case, lengths, 1, 2, 32, 40, dtype=dtype)
    compare(
        x,
        cu_seqlens=offsets,
        edits=edits_for(5, lengths, case.sizes(x)[3], 32, 40, count=30),
        initial_state=state_for(case, x, 5),
    )


@pytest.mark.parametrize("when", ["before", "after", ["after", "after", "before", "after"]], ids=str)
@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 127, 128])
def test_edits_at_borders(position, when, case, compare):
    kinds = ["add", "delete", "replace", "add"]
    edits = Edits([0] * 4, [position] * 4, [0] * 4, torch.randn(4, 32), torch.randn(4, 24), kinds, when)
    for dtype in (torch.float32, torch.bfloat16):
        x = case.make(1, 129, 1, 1, 32, 24, dtype, decay="weak", correlated=True)
        compare(x, edits=edits, snapshots=[position, 128])


def test_large_keys_are_refused(case):
    if case.gate == "element":
        pytest.skip("its operators are its own")
    x = case.make(1, 3, 1, 1, 264, 8)
    key = case.operands[1]
    for target in targets(case, "devices")[:1]:
        with target.in_use(), pytest.raises(ValueError, match=f"{key} has 264 entries, expected at most 256"):
            case.rule.run(**target.put(x), backend=target.kind)
        given = [*target.put(rules.operator_inputs(case, 1, 3, 1, 1, 264, 8)).values(), 1.0, None, False, *[None] * 5]
        erase = [target.put(y) for y in rules.operator_erase(case, 1, 3, 1, 1, 264, 8)]
        op = operators(target.kind)
        with target.in_use(), pytest.raises(ValueError, match=f"{case.rule.name}: .* K up to 256, got K = 264"):
            getattr(op, case.rule.name)(*given, True, *erase)
        right = torch.zeros_like(given[2])
        if rules.runs(case, target, gradient=True):
            gradients = [right, torch.ones_like(right), *[None] * 4, *erase]
            if erase:  # what it read, and its gradient
                gradients += [None if erase[0] is None else right, None]
            with target.in_use(), pytest.raises(ValueError, match=f"{case.rule.name}_backward: .* K up to 256"):
                getattr(op, case.rule.name + "_backward")(*given, *gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype, case):
    if case.gate == "element":
        pytest.skip("no products of matrices")
    twin = next((target for target in targets(case, "devices") if target.kind == "twin"), None)
    if twin is None:
        pytest.skip("the host twin counts them")
    with host_twin.counted() as counts:
        rules.run(case, twin, case.make(1, 130, 1, 2, 128, 128, dtype))
    assert counts.total("products") > 1000 and counts.total("conflicts") == 0
    assert counts.total("shared_bytes_taken") < 227 * 1024
