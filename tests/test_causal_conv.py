"""`causal_conv`: the kernel on every instruction set against the float64 reference, and against transformers' own."""

from __future__ import annotations

import pytest
import torch

from writesae import ops
from writesae._library import CPU_ERROR, cpu_isa
from writesae.testing import check_close, poisoned_memory
from writesae.testing import cpu_isa as forced_isa

assert CPU_ERROR is None, CPU_ERROR
ISAS = cpu_isa()["supported"].split(",")
SIZES = (
    (1, 1, 5, 4), (2, 3, 16, 4), (1, 130, 515, 4), (2, 127, 40, 3), (1, 257, 1024, 2), (3, 65, 7, 1), (1, 9, 33, 12),
)  # fmt: skip


def inputs(B, T, D, W, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, T, D), (D, W), (D,)))
    return 3 * x, weight, bias


def wide(*tensors):
    return (None if x is None else x.double() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_against_reference(size, dtype):
    x, weight, bias = inputs(*size, dtype)
    for isa in ISAS:
        for b, activation in ((None, "silu"), (bias, None), (bias, "silu")):
            with poisoned_memory(), forced_isa(isa):
                got = ops.causal_conv(x, weight, b, activation, backend="cpu")
            assert got.dtype == dtype
            exact = ops.causal_conv(*wide(x, weight, b), activation, backend="reference")
            # In half precision two roundings add up: of the sum and of the result.
            check_close(f"{isa} {activation}", got, exact, {torch.float32: 1e-6, torch.bfloat16: 6e-3}.get(dtype, 8e-4))


def test_large_inputs_saturate_and_nan_stays():
    x = torch.tensor([-1e30, -200.0, -87.5, -20.0, -0.0, 0.0, 20.0, 87.5, 200.0, 1e30, float("nan")])[None, None]
    for isa in ISAS:
        with forced_isa(isa):
            got = ops.causal_conv(x, torch.ones(11, 1), activation="silu", backend="cpu")
        expected = torch.nn.functional.silu(x.double())
        assert torch.equal(got.isnan(), expected.isnan())
        error = (got - expected).abs()[..., 1:-1]
        assert (error <= 1e-6 * expected[..., 1:-1].abs() + 1e-35).all()
        assert got[0, 0, 0].abs() < 1e-7  # -1e30: nothing that matters


def test_packed_sequences_do_not_see_each_other():
    x, weight, bias = inputs(1, 300, 20, 4)
    cuts = torch.tensor([0, 1, 3, 3, 130, 131, 256, 300])
    for isa in ISAS:
        with poisoned_memory(), forced_isa(isa):
            got = ops.causal_conv(x, weight, bias, "silu", cuts, backend="cpu")
            alone = [
                ops.causal_conv(x[:, lo:hi], weight, bias, "silu", backend="cpu")
                for lo, hi in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True) if hi > lo
            ]  # fmt: skip
        assert torch.equal(got, torch.cat(alone, 1))
    check_close("packed", got, ops.causal_conv(*wide(x, weight, bias), "silu", cuts, backend="reference"), 1e-6)


def test_strided_inputs():
    x, weight, bias = inputs(2, 50, 24, 4)
    expected = ops.causal_conv(x, weight, bias, "silu", backend="cpu")
    assert torch.equal(ops.causal_conv(x.transpose(1, 2).contiguous().transpose(1, 2), weight, bias, "silu"), expected)
    big = torch.full((2, 50, 60), float("nan"))
    big[:, :, 7:31] = x
    columns = weight.T.contiguous().T
    assert torch.equal(ops.causal_conv(big[:, :, 7:31], columns, bias, "silu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_transformers_computes_it(dtype):
    from transformers.models.qwen3_5 import modeling_qwen3_5 as peer

    x, weight, _ = inputs(1, 200, 96, 4, dtype)
    theirs = getattr(peer, "causal_conv1d_fn", None)
    if theirs is None:  # before 5.15 the layer does it by its own module

        def theirs(x, weight, bias, activation):
            y = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=x.shape[1])
            return torch.nn.functional.silu(y[..., : x.shape[2]])

    theirs = theirs(x.transpose(1, 2), weight, None, activation="silu").transpose(1, 2)
    ours = ops.causal_conv(x, weight, activation="silu")
    assert ours.is_contiguous()
    check_close("causal_conv1d_fn", ours, theirs, 1e-6 if dtype == torch.float32 else 1e-3)


def test_opcheck_and_gradients():
    x, weight, bias = inputs(1, 9, 6, 4)
    for arguments in ((x, weight, None, True, None), (x, weight, bias, False, torch.tensor([0, 4, 9]))):
        torch.library.opcheck(torch.ops.writesae.causal_conv.default, arguments)
    with pytest.raises(RuntimeError, match="causal_conv: no backward for weight"):
        ops.causal_conv(x, weight.requires_grad_(), backend="cpu")
    with pytest.raises(RuntimeError, match="causal_conv"):
        torch.ops.writesae.causal_conv(x, weight, None, True, None)
    wide = [y.detach().double().requires_grad_() for y in (x[:, :4, :2], weight[:2], bias[:2])]
    assert torch.autograd.gradcheck(lambda *y: ops.causal_conv(*y, "silu", backend="reference"), wide)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x: expected floating", {"x": torch.zeros(3, 4)}),
        ("weight: expected floating .D=4, W.", {"weight": torch.zeros(5, 4)}),
        ("bias: expected floating .D=4.", {"bias": torch.zeros(3)}),
        ("activation: expected None", {"activation": "gelu"}),
        ("cu_seqlens: expected offsets rising from 0 to T=3", {"cu_seqlens": torch.tensor([0, 2])}),
        ("cu_seqlens", {"x": torch.zeros(2, 3, 4), "cu_seqlens": torch.tensor([0, 3])}),
        ("backend", {"backend": "gpu"}),
    ],
)
def test_refusals(message, change):
    with pytest.raises(ValueError, match=message):
        ops.causal_conv(**{"x": torch.zeros(1, 3, 4), "weight": torch.zeros(4, 2), **change})
