"""The CUDA kernels of `gated_delta_rule` where the common tests do not look: the sizes they are built for, all types,
many chunks. On the host twin and the GPU (see targets.py)."""

from __future__ import annotations

import pytest
import torch
from rules import GATED_DELTA_RULE, edits_for
from rules import compare as compare_case

from writesae.edits import Edits
from writesae.testing import gated_delta_rule_inputs


def compare(x, record=None, targets=None, **options):
    return compare_case(GATED_DELTA_RULE, x, record, on=targets, **options)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, V", [(32, 32), (64, 128), (128, 128), (256, 64), (40, 72)])
def test_sizes(K, V, dtype, device_targets, record_property):
    x = gated_delta_rule_inputs(1, 131, 1, 2, K, V, dtype=dtype, correlated=True)
    edits = edits_for(1, [131], 2, K, V)
    compare(x, record_property, device_targets, use_qk_l2norm=True, edits=edits, snapshots=[0, 63, 64, 130])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
@pytest.mark.parametrize("correlated", [False, True])
def test_decay(decay, correlated, dtype, device_targets, record_property):
    x = gated_delta_rule_inputs(2, 200, 1, 2, 64, 48, dtype=dtype, decay=decay, correlated=correlated)
    initial = torch.randn(2, 2, 64, 48)
    compare(x, record_property, device_targets, use_qk_l2norm=True, initial_state=initial, snapshots=[127, 199])


def test_mixed_decay_is_exact(device_targets, record_property):
    """Gates near one right after gates near nothing: differences of log-decays keep their last bits."""
    x = gated_delta_rule_inputs(1, 128, 1, 1, 32, 32, decay="weak", correlated=True)
    x["g"][:, ::2] = -20 * torch.rand(1, 64, 1)
    x["g"][:, 5::16] = -120.0
    compare(x, record_property, device_targets, use_qk_l2norm=True, initial_state=torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long(dtype, device_targets, record_property):
    """Enough chunks for one head that the sequence is split over blocks."""
    x = gated_delta_rule_inputs(1, 4096, 1, 1, 32, 24, dtype=dtype, correlated=True, decay="weak")
    edits = edits_for(1, [4096], 1, 32, 24)
    compare(x, record_property, device_targets, use_qk_l2norm=True, edits=edits, snapshots=[1000, 1023, 1024, 4095])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_and_split(dtype, device_targets, record_property):
    lengths = [700, 0, 1, 1600, 65]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    x = gated_delta_rule_inputs(1, sum(lengths), 1, 2, 32, 40, dtype=dtype)
    edits = edits_for(5, lengths, 2, 32, 40, count=30)
    compare(x, record_property, device_targets, use_qk_l2norm=True, cu_seqlens=offsets, edits=edits,
            initial_state=torch.randn(5, 2, 32, 40))  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after", ["after", "after", "before", "after"]], ids=str)
@pytest.mark.parametrize("position", [0, 31, 32, 63, 64, 127, 128])
def test_edits_at_borders(position, when, device_targets, record_property):
    x = gated_delta_rule_inputs(1, 129, 1, 1, 32, 32, decay="weak", correlated=True)
    kinds = ["add", "delete", "replace", "add"]
    edits = Edits([0] * 4, [position] * 4, [0] * 4, torch.randn(4, 32), torch.randn(4, 32), kinds, when)
    compare(x, record_property, device_targets, use_qk_l2norm=True, edits=edits, snapshots=[position, 128])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype, device_targets):
    if device_targets[0].kind != "twin":
        pytest.skip("the host twin counts them")
    torch.ops.writesae_twin.statistics()
    x = gated_delta_rule_inputs(1, 130, 1, 2, 128, 128, dtype=dtype)
    compare(x, targets=device_targets[:1], use_qk_l2norm=True)
    _, _, _, products, _, conflicts, _, shared = torch.ops.writesae_twin.statistics()
    assert products > 1000 and conflicts == 0 and shared < 227 * 1024
