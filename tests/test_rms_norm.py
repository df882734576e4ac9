"""`rms_norm`: the kernel on every instruction set against the float64 reference, and against transformers' own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import families, tiny_model, tokens

import writesae
from writesae import ops
from writesae._library import CPU_ERROR, cpu_isa
from writesae.models.hf_norms import fused, norm_of
from writesae.testing import check_close, poisoned_memory
from writesae.testing import cpu_isa as forced_isa

assert CPU_ERROR is None, CPU_ERROR
ISAS = cpu_isa()["supported"].split(",")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = ((1, 1), (3, 5), (2, 7, 16), (130, 128), (1, 9, 1023), (5, 3, 40), (300, 257))


def inputs(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, gate = (torch.randn(*size, generator=generator) for size in (shape, shape[-1:], shape))
    return (3 * x).to(dtype), weight.to(dtype), (2 * gate).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_against_reference(size, dtype):
    x, weight, gate = inputs(*size, dtype=dtype)
    for isa in ISAS:
        for g in (None, gate, gate.float()):
            for zero_centred in (False, True):
                with poisoned_memory(), forced_isa(isa):
                    got = ops.rms_norm(x, weight, g, 1e-5, zero_centred, backend="cpu")
                assert got.dtype == dtype
                wide = (None if y is None else y.double() for y in (x, weight, g))
                exact = ops.rms_norm(*wide, 1e-5, zero_centred, backend="reference")
                # In half precision up to three roundings add up.
                limit = {torch.float32: 1e-6, torch.bfloat16: 6e-3}.get(dtype, 8e-4)
                check_close(f"{isa} {zero_centred}", got, exact, limit)
                same = ops.rms_norm(x, weight, g, 1e-5, zero_centred, backend="reference")
                close = torch.finfo(dtype).eps * same.float().abs() * (4 if dtype == torch.float32 else 2) + 1e-6
                assert ((got.float() - same.float()).abs() <= close).all()


def test_small_and_strange_rows():
    x = torch.zeros(4, 20)
    x[1], x[2, 3], x[3, 5] = 1e-6, float("nan"), float("inf")
    for isa in ISAS:
        with forced_isa(isa):
            got = ops.rms_norm(x, torch.ones(20), backend="cpu")
        assert (got[0] == 0).all()
        check_close("small", got[1], x[1].double() / (1e-12 + 1e-6) ** 0.5, 1e-6)
        assert got[2].isnan().all() and got[3, 5].isnan()


def test_strided_and_empty_inputs():
    x, weight, gate = inputs(2, 6, 24)
    expected = ops.rms_norm(x, weight, gate, backend="cpu")
    apart = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, gate)]
    assert torch.equal(ops.rms_norm(apart[0], weight, apart[1], backend="cpu"), expected)
    big = torch.full((2, 6, 60), float("nan"))
    big[:, :, 7:31] = x
    assert torch.equal(ops.rms_norm(big[:, :, 7:31], weight, gate), expected)
    assert ops.rms_norm(x[:0], weight).shape == (0, 6, 24)


def test_opcheck_and_gradients():
    x, weight, gate = inputs(9, 6)
    for arguments in ((x, weight, None, 1e-6, True), (x, weight, gate, 1e-6, False)):
        torch.library.opcheck(torch.ops.writesae.rms_norm.default, arguments)
    with pytest.raises(RuntimeError, match="rms_norm: no backward for weight"):
        ops.rms_norm(x, weight.requires_grad_(), backend="cpu")
    with pytest.raises(RuntimeError, match="rms_norm"):
        torch.ops.writesae.rms_norm(x, weight, None, 1e-6, False)
    wide = [y.detach().double().requires_grad_() for y in (x[:3], weight, gate[:3])]
    assert torch.autograd.gradcheck(lambda *y: ops.rms_norm(*y, backend="reference"), wide)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x: expected floating", {"x": torch.zeros(3, 4, dtype=torch.int64)}),
        ("weight: expected floating .D=4.", {"weight": torch.zeros(5)}),
        ("gate: expected floating of x's shape", {"gate": torch.zeros(4)}),
        ("eps: expected a number >= 0", {"eps": -1.0}),
        ("backend", {"backend": "gpu"}),
    ],
)
def test_refusals(message, change):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**{"x": torch.zeros(3, 4), "weight": torch.zeros(4), **change})


# ---- standing in for a model's modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", families())
def test_every_norm_of_a_model_is_found_and_equal(family, dtype):
    model = tiny_model(family).to(dtype)
    named = {n: m for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    for module in named.values():
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            with torch.no_grad():
                module.weight.add_(0.3 * torch.randn(module.weight.shape, dtype=torch.float32).to(dtype))
    with fused(model) as norms:
        found = {norm.module for norm in norms}
    assert all(m in found for m in named.values() if "RMSNorm" in type(m).__name__), family
    assert any(norm.gated for norm in norms)
    for norm in norms:
        D = len(norm.module.weight)
        given = inputs(7, D, dtype=dtype)[:: 2] if norm.gated else inputs(7, D, dtype=dtype)[:1]
        with torch.no_grad():
            theirs, ours = norm.module(*given), norm.stand_in(given, {})
        limit = 1e-6 if dtype == torch.float32 else 2e-3 if dtype == torch.bfloat16 else 3e-4
        check_close(type(norm.module).__name__, ours, theirs, limit)


def test_modules_that_are_something_else_are_left_alone():
    class Near(torch.nn.Module):  # looks like a norm and is not quite one
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2e-6)

    norm = torch.nn.LayerNorm(8)
    assert norm_of(Near()) is None and norm_of(norm) is None and norm_of(torch.nn.Linear(4, 4)) is None
    theirs = torch.nn.RMSNorm(8, eps=1e-6)
    assert norm_of(theirs) is not None
    theirs.forward = lambda x: x  # somebody's hook
    assert norm_of(theirs) is None


def test_attach_puts_norms_in_and_back():
    model = tiny_model().eval()
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    ids = tokens(2, 9)
    calls = []
    with torch.no_grad():
        plain = model(ids).logits
        with writesae.attach(model, {}, accelerate=True) as _, writesae.attach(model, {}, accelerate=True):
            norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
            assert norms and all("forward" in m.__dict__ for m in norms)
            for m in norms:
                m.register_forward_hook(lambda module, *_: calls.append(module))
            check_close("logits", model(ids).logits, plain, 1e-4)
    assert set(calls) == set(norms)  # hooks of others still run
    for n, m in model.named_modules():
        assert "forward" not in m.__dict__ and set(m.__dict__) == set(before[n])


def test_gradients_go_through_the_model_itself():
    model = tiny_model().train()
    other = copy.deepcopy(model)
    ids = tokens(1, 9)
    model(ids).logits.square().sum().backward()
    with writesae.attach(other, {}, accelerate=True):
        other(ids).logits.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            check_close(name, q.grad, p.grad, 1e-3)
