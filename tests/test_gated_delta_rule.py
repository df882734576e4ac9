"""What is `gated_delta_rule`'s alone: conversions of its inputs, where a NaN goes; and how its kernels are chosen. (Its
outputs and gradients: test_rules.py.)"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from rules import GATED_DELTA_RULE, KDA, edits_for, run, targets
from test_rules import packed
from test_rules_backward import gradients

from writesae import ops
from writesae._library import CPU_ERROR
from writesae.testing import check_close, difference, gated_delta_rule_inputs

assert CPU_ERROR is None, CPU_ERROR

CHUNK = 32  # tokens that the CUDA kernels take at a time, float32 inputs


def test_half_conversions_are_exact(each_target):
    """Every float16 and bfloat16 value goes in and comes out as torch converts it, rounding and subnormals included."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[torch.isfinite(values)].reshape(1, -1, 1, 256).contiguous()
        T = values.shape[1]
        one, zero = torch.ones(1, T, 1, 1), torch.zeros(1, T, 1)
        strong = torch.full((1, T, 1), -float("inf"))
        x = {"q": one, "k": one, "v": values, "g": strong, "beta": zero + 1}
        out = run(GATED_DELTA_RULE, each_target, x, scale=1.0, use_qk_l2norm=False)
        assert torch.equal(out.writes.right.flatten(), values.float().flatten())
        assert torch.equal(out.o, values)
        third = run(GATED_DELTA_RULE, each_target, {**x, "beta": zero + 1 / 3}, scale=1.0, use_qk_l2norm=False).o
        assert torch.equal(third.flatten(), (values.float() * torch.tensor(1 / 3)).to(dtype).flatten())


def test_nan_stays_where_it_is(target):
    """A NaN spoils its own head from its own token on, nothing before: `first_nonfinite` names the place.

    The CUDA kernels take tokens in chunks, and in there it spoils tokens before it too.
    """
    for T, bad in ((40, 21), (40, 23), (5, 4), (200, 150)):
        x = gated_delta_rule_inputs(2, T, 2, 2, 16, 24)
        x["k"][1, bad, 1, 3] = float("nan")
        out = run(GATED_DELTA_RULE, target, x)
        right = out.writes.right[:, :, :, 0]
        first = bad if target.kind == "cpu" else bad // CHUNK * CHUNK
        row, position, head = ops.first_nonfinite(right)
        assert (row, head) == (1, 1) and first <= position <= bad
        finite = torch.isfinite(out.o).all(-1)
        assert finite[0].all() and finite[1, :, 0].all() and finite[1, :first, 1].all() and not finite[1, bad:, 1].any()
    assert ops.first_nonfinite(torch.zeros(1, 2, 3, 4)) is None
    assert ops.first_nonfinite(torch.full((1, 2, 3, 4), 3e38)) is None


def test_isa_by_environment():
    code = "from writesae._library import cpu_isa; print(cpu_isa()['kernels'])"

    def run(value):
        environment = {**os.environ, "WRITESAE_CPU_ISA": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("portable").stdout.strip() == "portable"
    assert 'WRITESAE_CPU_ISA: expected avx512, avx2 or portable, got "sse9"' in run("sse9").stderr


def test_difference_sees_errors():
    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])).rms == 0
    assert difference(torch.tensor([float("nan")]), torch.tensor([1.0])).rms == float("inf")
    with pytest.raises(AssertionError, match="worst element"):
        check_close("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))


def test_equal_channels_are_one_gate():
    """Kimi Delta Attention with one gate in all channels is Gated DeltaNet, to rounding: outputs and gradients."""
    lengths = [70, 0, 1, 33]
    x, offsets = packed(GATED_DELTA_RULE, lengths, 2, 4, 24, 40, correlated=True)
    x["g"][:, 5::9], x["g"][:, 6::9] = -30.0, 0.0
    channels = {**x, "g": x["g"][..., None].expand(*x["g"].shape, 24)}
    edits, start = edits_for(4, lengths, 4, 24, 40), torch.randn(4, 4, 24, 40)
    places = torch.tensor([[0, 64], [3, 7]])
    call = {"initial_state": start, "cu_seqlens": offsets, "edits": edits, "snapshots": places}
    for target in targets(KDA):
        one, each = (run(case, target, given, **call) for case, given in ((GATED_DELTA_RULE, x), (KDA, channels)))
        for name in ("o", "final_state", "snapshots"):
            check_close(f"{name} with {target.name}", getattr(each, name), getattr(one, name), 2e-6)
        check_close(f"right with {target.name}", each.writes.right, one.writes.right, 2e-6)
    for target in targets(KDA, gradient=True):
        one, each = (gradients(case, target, given, **call) for case, given in ((GATED_DELTA_RULE, x), (KDA, channels)))
        each["g"] = each["g"].sum(-1)
        for name, expected in one.items():
            check_close(f"d_{name} with {target.name}", each[name], expected, 5e-6)
