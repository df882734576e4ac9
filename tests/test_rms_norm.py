"""`rms_norm`: the kernel on every instruction set against the float64 reference, and standing in for models' norms."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tiny_models import families, tiny_model, tokens

import writesae
from writesae import ops
from writesae._library import CPU_ERROR, cpu_isa
from writesae.models import hf_norms, patch, self_test
from writesae.models.hf_gated_delta import layers
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
    for isa, g, *how in itertools.product(ISAS, (None, gate, gate.float()), (False, True), (False, True)):
        options = dict(zip(("zero_centred", "round_once"), how, strict=True))
        with poisoned_memory(), forced_isa(isa):
            got = ops.rms_norm(x, weight, g, 1e-5, **options, backend="cpu")
        assert got.dtype == dtype and got.shape == x.shape
        wide = (None if y is None else y.double() for y in (x, weight, g))
        exact = ops.rms_norm(*wide, 1e-5, **options, backend="reference")
        # In half precision up to three roundings add up.
        limit = {torch.float32: 1e-6, torch.bfloat16: 6e-3}.get(dtype, 8e-4)
        check_close(f"{isa} {options}", got, exact, limit)
        same = ops.rms_norm(x, weight, g, 1e-5, **options, backend="reference")
        close = torch.finfo(dtype).eps * same.float().abs() * (4 if dtype == torch.float32 else 2) + 1e-6
        assert ((got.float() - same.float()).abs() <= close).all()
        # The roundings are the reference's, number by number, but for sums in another order.
        assert dtype == torch.float32 or (got != same).sum() <= 2 + got.numel() // 1000


def test_rounding_once_is_closer_to_the_truth():
    x, weight, _ = inputs(64, 128, dtype=torch.bfloat16)
    exact = ops.rms_norm(x.double(), weight.double(), backend="reference")
    once, twice = ((ops.rms_norm(x, weight, round_once=o) - exact).square().mean() for o in (True, False))
    assert once < 0.7 * twice


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
    for arguments in ((x, weight, None, 1e-6, True, True), (x, weight, gate, 1e-6, False, False)):
        torch.library.opcheck(torch.ops.writesae.rms_norm.default, arguments)
    with pytest.raises(RuntimeError, match="rms_norm: no backward for weight"):
        ops.rms_norm(x, weight.requires_grad_(), backend="cpu")
    with pytest.raises(RuntimeError, match="rms_norm"):
        torch.ops.writesae.rms_norm(x, weight, None, 1e-6, False, False)
    wide = [y.detach().double().requires_grad_() for y in (x[:3], weight, gate[:3])]
    assert torch.autograd.gradcheck(lambda *y: ops.rms_norm(*y, backend="reference"), wide)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x: expected a floating dtype", {"x": torch.zeros(3, 4, dtype=torch.int64)}),
        ("weight: expected floating .D=4.", {"weight": torch.zeros(5)}),
        ("gate: expected floating of x's shape", {"gate": torch.zeros(4)}),
        ("eps: expected a number >= 0", {"eps": -1.0}),
        ("backend", {"backend": "gpu"}),
        ("cannot run this: x is torch.float64", {"x": torch.zeros(3, 4, dtype=torch.float64), "backend": "cpu"}),
    ],
)
def test_refusals(message, change):
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**{"x": torch.zeros(3, 4), "weight": torch.zeros(4), **change})


# ---- standing in for a model's modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", families())
def test_norms_of_a_model_are_found_and_equal(family, dtype):
    model = tiny_model(family).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += (0.3 * torch.randn(parameter.shape)).to(dtype)
    with fused(model) as norms:
        pass
    named = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    grouped = [m for m in named if getattr(m, "group_size", None) is not None]  # a formula that is not ours
    assert {*norms} == {*named} - {*grouped}
    gated = [site.norm for site in layers(model)]
    assert all(norms[m].gated for m in gated) and len(gated) == sum(norm.gated for norm in norms.values())
    for module, norm in norms.items():
        x, _, gate = inputs(700, len(module.weight), dtype=dtype)
        given = (x, gate) if norm.gated else (x,)
        with torch.no_grad():
            theirs, ours = module(*given), norm(module.weight, given, {})
        check_close(type(module).__name__, ours, theirs, 1e-6 if dtype == torch.float32 else 1e-4)


def near(eps=1e-6, centred=False, factor=1.0, rounds=False):
    """A module that looks like a norm with eps = 1e-6; as it is by default, it is one."""

    class Near(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            y = x.float() - centred * x.float().mean(-1, keepdim=True)
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
            return (factor * self.weight * (y.to(x.dtype) if rounds else y)).to(x.dtype)

    return Near()


def test_modules_that_are_something_else_are_left_alone():
    assert norm_of(near()) is not None
    for differences in ({"eps": 2e-6}, {"centred": True}, {"factor": 1.001}):
        assert norm_of(near(**differences)) is None, differences
    for other in (torch.nn.LayerNorm(8), torch.nn.Linear(4, 4), torch.nn.RMSNorm(8, elementwise_affine=False)):
        assert norm_of(other) is None
    hooked = near()
    hooked.forward = lambda x: x  # somebody's hook
    assert norm_of(hooked) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_told_apart(dtype):
    assert norm_of(near().to(dtype)).round_once
    assert not norm_of(near(rounds=True).to(dtype)).round_once


def test_settings_are_told_apart():
    """Two modules of one class: what the first was found to be says nothing of the second with another setting."""
    plain = near()
    other = copy.deepcopy(plain)
    other.eps = 1e-3  # its forward has 1e-6
    assert norm_of(plain) is not None and norm_of(other) is None and norm_of(plain) is not None


def test_attach_puts_norms_in_and_back():
    model = tiny_model().eval()
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    ids = tokens(2, 9)
    calls = []
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    hooks = [m.register_forward_hook(lambda module, *_: calls.append(module)) for m in norms]
    with torch.no_grad():
        plain = model(ids).logits
        calls.clear()
        with writesae.attach(model, {}, accelerate=True), writesae.attach(model, {}, accelerate=True):
            assert all(patch.entry_of(m) is not None for m in norms)
            calls.clear()
            check_close("logits", model(ids).logits, plain, 1e-4)
        assert set(calls) == set(norms)  # hooks of others still run
        with writesae.attach(model, {(0, 0): None}), writesae.attach(model, {}, accelerate=True, backend="reference"):
            assert not any(patch.entry_of(m) for m in norms)
            model(ids)
    for hook in hooks:
        hook.remove()
    for n, m in model.named_modules():
        assert "forward" not in m.__dict__ and set(m.__dict__) == set(before[n])


def test_the_kernel_runs_and_the_self_test_covers_it(monkeypatch):
    model, ids = tiny_model().eval(), tokens(2, 9)
    kernel, ran = hf_norms.Norm.__call__, []

    def wrong(self, weight, args, kwargs):
        y = kernel(self, weight, args, kwargs)
        ran.append(y is not None)
        return y if y is None or not spoilt else y * 1.1

    monkeypatch.setattr(hf_norms.Norm, "__call__", wrong)
    spoilt = False
    with torch.no_grad(), writesae.attach(model, {}, accelerate=True):
        ran.clear()
        model(ids)
    assert ran and all(ran)
    spoilt = True
    self_test._passed.clear()  # it would not try a kind of model twice
    with pytest.raises(RuntimeError, match="self-test failed"), writesae.attach(model, {}, accelerate=True):
        pass
    # The plain half of an inner self-test runs the model's own norms, whatever is installed around it.
    with writesae.attach(model, {}, accelerate=True, self_test=False):
        with pytest.raises(RuntimeError, match="self-test failed"), writesae.attach(model, {}, accelerate=True):
            pass
        with writesae.attach(model, {(0, 0): None}):
            model(ids)


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
