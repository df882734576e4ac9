"""The CUDA kernels of the write rules' backward where the common tests (test_rules_backward.py) do not look: the sizes
they are built for, all types, many chunks, chunks cut at edits. On the host twin and the GPU (see targets.py)."""

from __future__ import annotations

import host_twin
import pytest
import rules
import torch
from rules import edits_for, targets
from test_cuda_rules import DTYPES
from test_rules import packed, state_for
from test_rules_backward import compare_gradients, gradients

from writesae.edits import Edits

KIND, GRADIENT = "devices", True  # cases that have a backward there


@pytest.fixture
def compare(case, record_property):
    def compare(x, **options):
        return compare_gradients(case, x, record_property, which="devices", **options)

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, V", [(32, 32), (64, 136), (128, 128), (256, 64), (40, 72)])
def test_sizes(K, V, dtype, case, compare):
    x = case.make(1, 67, 1, 2, K, V, dtype, correlated=True)
    compare(x, initial_state=state_for(case, x))


@pytest.mark.parametrize(
    "decay, dtype",
    [*((decay, torch.bfloat16) for decay in ("none", "weak", "usual", "strong")), ("strong", torch.float16)],
    ids=str,
)
def test_decay(decay, dtype, case, compare):
    """f16 is multiplied as float32, of which test_rules_backward.py has every decay: its narrow range is new."""
    x = case.make(1, 150, 1, 2, 64, 48, dtype, decay=decay, correlated=True)
    for name in ("g", "dt", "A"):  # f16 has no room for the gradient of a strong gate
        if name in x:
            x[name] = x[name].float()
    compare(x, initial_state=state_for(case, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edits_and_snapshots(dtype, case, compare):
    """Chunks cut at edits and snapshots, several of both at one place, in packed sequences."""
    lengths = [70, 0, 1, 131, 65]
    x, offsets = packed(case, lengths, 1, 2, 32, 40, dtype=dtype)
    edits = edits_for(5, lengths, case.sizes(x)[3], 32, 40, count=30)
    places = torch.tensor([[3, 130], [0, 0], [3, 64], [0, 63], [3, 64], [2, 0], [3, 64], [4, 32]])
    compare(x, initial_state=state_for(case, x, 5), edits=edits, cu_seqlens=offsets, snapshots=places)


@pytest.mark.parametrize("when", ["before", "after", ["after", "after", "before", "after"]], ids=str)
@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 128])
def test_edits_at_borders(position, when, case, compare):
    x = case.make(1, 129, 1, 1, 32, 24, torch.bfloat16, decay="weak", correlated=True)
    if "D" in x:  # else values reach o by it too
        x["D"] *= 0
    kinds = ["add", "delete", "replace", "add"]
    edits = Edits([0] * 4, [position] * 4, [0] * 4, torch.randn(4, 32), torch.randn(4, 24), kinds, when)
    for got in compare(x, edits=edits, snapshots=[position, 128]).values():
        assert (not got[case.operands[2]][0, position, 0].any()) == (when != "after")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_of_every_strength(dtype, case, compare):
    """Gates near one right after gates near nothing: dg of a closed gate is small, without its neighbours' error."""
    x = case.make(1, 128, 1, 1, 32, 32, dtype, decay="weak", correlated=True)
    for name in ("g", "dt", "A"):
        if name in x:
            x[name] = x[name].float()
    case.mix(x)
    found = compare(x, initial_state=state_for(case, x))
    if dtype == torch.float32 and "g" in x:
        closed = slice(5, None, 16)
        truth = gradients(case, None, rules.doubled(x))["g"][0, closed, 0]
        for target in targets(case, "devices", gradient=True):
            got = gradients(case, target, x)["g"][0, closed, 0].double()
            torch.testing.assert_close(got, truth, rtol=1e-3, atol=float(truth.abs().max()) * 1e-5)
    assert found


def test_one_head_of_many_tokens(case, compare):
    compare(case.make(1, 2048, 1, 1, 32, 24, torch.bfloat16, correlated=True, decay="weak"))


def test_repeats_to_the_bit(case):
    x = case.make(2, 100, 2, 6, 40, 24, torch.bfloat16)
    places = torch.tensor([[0, 50]] * 4 + [[1, 99]] * 3)
    on = targets(case, "devices", gradient=True)
    found = [gradients(case, target, x, snapshots=places) for target in on for _ in range(2)]
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_no_second_derivative(case):
    x = case.make(1, 5, 1, 2, 8, 8)
    for target in targets(case, "devices", gradient=True)[:1]:
        given = target.put(x)
        value = given[case.operands[2]].requires_grad_()
        with target.in_use(), pytest.raises(RuntimeError, match=f'{case.rule.name}_backward: no backward.*"reference"'):
            out = case.rule.run(**given, backend=target.kind)
            torch.autograd.grad(out.o.square().sum(), value, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bank_conflicts(dtype, case):
    if case.gate == "element":
        pytest.skip("no products of matrices")
    twin = next((target for target in targets(case, "devices", gradient=True) if target.kind == "twin"), None)
    if twin is None:
        pytest.skip("the host twin counts them")
    x = case.make(1, 130, 1, 2, 128, 128, dtype)
    with host_twin.counted() as counts:
        gradients(case, twin, x)
    most = 227 if "a" in x else 163  # the forward of an erase takes two stages where it may
    assert counts.total("products") > 1000 and counts.total("conflicts") == 0
    assert counts.total("shared_bytes_taken") < most * 1024
