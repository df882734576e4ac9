"""The CUDA kernels of the backward of `gated_delta_rule` where the common tests do not look: the sizes they are built
for, all types, many chunks, chunks cut at edits. On the host twin and the GPU (see targets.py)."""

from __future__ import annotations

import pytest
import torch
from rules import GATED_DELTA_RULE, edits_for
from test_cuda_gated_delta_rule import DTYPES
from test_rules_backward import compare_gradients
from test_rules_backward import gradients as gradients_of_case

from writesae import ops
from writesae.edits import Edits
from writesae.testing import gated_delta_rule_inputs


def compare(x, record=None, targets=None, initial_state=None, edits=None, **options):
    call = {"initial_state": initial_state, "edits": edits, **options}
    return compare_gradients(GATED_DELTA_RULE, x, record, on=targets, **call)


def gradients(x, target=None, **options):
    return gradients_of_case(GATED_DELTA_RULE, target, x, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, V", [(32, 32), (64, 136), (128, 128), (256, 64), (40, 72)])
def test_sizes(K, V, dtype, device_targets, record_property):
    x = gated_delta_rule_inputs(1, 67, 1, 2, K, V, dtype=dtype, correlated=True)
    compare(x, record_property, device_targets, torch.randn(1, 2, K, V))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
@pytest.mark.parametrize("correlated", [False, True])
def test_decay(decay, correlated, dtype, device_targets, record_property):
    x = gated_delta_rule_inputs(1, 150, 1, 2, 64, 48, dtype=dtype, decay=decay, correlated=correlated)
    x["g"] = x["g"].float()  # f16 has no room for the gradient of a strong gate
    compare(x, record_property, device_targets, torch.randn(1, 2, 64, 48))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edits_and_snapshots(dtype, device_targets, record_property):
    """Chunks cut at edits and snapshots, several of both at one place, in packed sequences."""
    lengths = [70, 0, 1, 131, 65]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    x = gated_delta_rule_inputs(1, sum(lengths), 1, 2, 32, 40, dtype=dtype)
    edits = edits_for(5, lengths, 2, 32, 40, count=30)
    places = torch.tensor([[3, 130], [0, 0], [3, 64], [0, 63], [3, 64], [2, 0], [3, 64], [4, 32]])
    compare(x, record_property, device_targets, torch.randn(5, 2, 32, 40), edits, cu_seqlens=offsets, snapshots=places)


@pytest.mark.parametrize("when", ["before", "after", ["after", "after", "before", "after"]], ids=str)
@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 128])
def test_edits_at_borders(position, when, device_targets, record_property):
    x = gated_delta_rule_inputs(1, 129, 1, 1, 32, 32, decay="weak", correlated=True, dtype=torch.bfloat16)
    kinds = ["add", "delete", "replace", "add"]
    edits = Edits([0] * 4, [position] * 4, [0] * 4, torch.randn(4, 32), torch.randn(4, 32), kinds, when)
    for got in compare(x, record_property, device_targets, edits=edits, snapshots=[position, 128]).values():
        removed = got["beta"][0, position, 0] == 0 and not got["v"][0, position, 0].any()
        assert removed == (when != "after")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_of_every_strength(dtype, device_targets, record_property):
    """Gates near one right after gates near nothing: dg of a closed gate is small, without its neighbours' error."""
    x = gated_delta_rule_inputs(1, 128, 1, 1, 32, 32, decay="weak", correlated=True, dtype=dtype)
    x["g"] = x["g"].float()
    x["g"][:, ::2] = -20 * torch.rand(1, 64, 1)
    x["g"][:, 5::16] = -20.0
    x["g"][:, 6::16] = -120.0
    compare(x, record_property, device_targets, torch.randn(1, 1, 32, 32))
    if dtype == torch.float32:
        wide = {name: value.double() for name, value in x.items()}
        closed = slice(5, None, 16)
        truth = gradients(wide)["g"][0, closed, 0]
        for target in device_targets:
            got = gradients(x, target=target)["g"][0, closed, 0].double()
            torch.testing.assert_close(got, truth, rtol=1e-3, atol=float(truth.abs().max()) * 1e-5)


def test_one_head_of_many_tokens(device_targets, record_property):
    x = gated_delta_rule_inputs(1, 2048, 1, 1, 32, 24, dtype=torch.bfloat16, correlated=True, decay="weak")
    compare(x, record_property, device_targets)


def test_repeats_to_the_bit(device_targets):
    x = gated_delta_rule_inputs(2, 100, 2, 6, 40, 24, dtype=torch.bfloat16)
    places = torch.tensor([[0, 50]] * 4 + [[1, 99]] * 3)
    found = [gradients(x, target=target, snapshots=places) for target in device_targets for _ in range(2)]
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_large_keys_are_refused(device_targets):
    target = device_targets[0]
    x = {name: target.put(value) for name, value in gated_delta_rule_inputs(1, 3, 1, 1, 264, 8).items()}
    right = torch.zeros_like(x["v"])
    with target.in_use(), pytest.raises(ValueError, match="gated_delta_rule_backward: .* K up to 256, got K = 264"):
        ops._dispatch.operators(target.kind).gated_delta_rule_backward(
            *x.values(), 1.0, None, False, None, None, None, None, None, right, torch.ones_like(x["v"]), *[None] * 4
        )


def test_no_second_derivative(device_targets):
    target = device_targets[0]
    x = {name: target.put(value) for name, value in gated_delta_rule_inputs(1, 5, 1, 2, 8, 8).items()}
    v = x["v"].requires_grad_()
    with target.in_use(), pytest.raises(RuntimeError, match='gated_delta_rule_backward: no backward.*"reference"'):
        out = ops.gated_delta_rule(**x, backend=target.kind)
        torch.autograd.grad(out.o.square().sum(), v, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bank_conflicts(dtype, device_targets):
    if device_targets[0].kind != "twin":
        pytest.skip("the host twin counts them")
    x = gated_delta_rule_inputs(1, 130, 1, 2, 128, 128, dtype=dtype)
    torch.ops.writesae_twin.statistics()
    gradients(x, target=device_targets[0])
    _, _, _, products, _, conflicts, _, shared = torch.ops.writesae_twin.statistics()
    assert products > 1000 and conflicts == 0 and shared < 163 * 1024
