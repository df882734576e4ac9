"""Gradients of codes and activations with respect to the writes they are read from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_encode import CASES, GRADIENT_CASES, build

from writesae import Edits, ops
from writesae.ops import activations, encode, factored_loss
from writesae.ops.reference.encode import preactivations
from writesae.testing import check_close, gated_delta_rule_inputs

# Relative RMS error allowed for float32. Measured: at most 2.7e-7.
TOLERANCE = {"reference": 1e-11, "cpu": 2e-5}


def leaves_of(writes, dtype, params=()):
    """(writes, {name: leaf}) with every tensor of the writes a leaf that asks for its gradient."""
    made = {name: getattr(writes, name).detach().to(dtype).requires_grad_() for name in ("decay", "left", "right")}
    edits = writes.edits
    if writes.initial_state is not None:
        made["initial_state"] = writes.initial_state.detach().to(dtype).requires_grad_()
    out = replace(writes, **made)
    if edits is not None:
        made["edit_left"], made["edit_right"] = (
            x.detach().to(dtype).requires_grad_() for x in (edits.left, edits.right)
        )
        sides = made["edit_left"], made["edit_right"]
        out = replace(out, edits=Edits(edits.row, edits.position, edits.head, *sides))
    for name, x in zip(("v", "w", "b"), params, strict=False):
        made[name] = x.detach().to(dtype).requires_grad_()
    return out, made


def compare(writes, params, k, heads, backend, record=None):
    dtype = torch.float64 if backend == "reference" else torch.float32
    used, given = leaves_of(writes, dtype, params)
    exact, truth = leaves_of(writes, torch.float64, params)
    codes = encode(used, given["v"], given["w"], given["b"], k=k, heads=heads, backend=backend)
    m = torch.randint(params[0].shape[1], (*codes.values.shape[:3], 4))  # repeats included
    chosen = activations(used, given["v"], given["w"], m, given["b"], heads=heads, backend=backend)
    weights = torch.randn_like(codes.values), torch.randn_like(chosen)
    loss = (codes.values * weights[0]).sum() + (chosen * weights[1]).sum()
    found = torch.autograd.grad(loss, list(given.values()))

    v, w = (x[:, :, None] if x.ndim == 3 else x for x in (truth["v"], truth["w"]))
    pre, _ = preactivations(exact, v, w, heads, exact.initial_state)
    pre = pre + truth["b"]
    loss = (pre.gather(-1, codes.indices).relu() * weights[0]).sum() + (pre.gather(-1, m) * weights[1]).sum()
    expected = torch.autograd.grad(loss, list(truth.values()))
    for name, got, want in zip(given, found, expected, strict=True):
        assert got.dtype == dtype
        error = check_close(name, got, want, TOLERANCE[backend])
        if record is not None and dtype == torch.float32:
            record("relative_rms", error.rms)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", [*GRADIENT_CASES, "two writes", "k is F"])
def test_gradients_equal_autograd(name, backend, record_property):
    writes, v, w, b, k, heads = build(CASES[name], seed=2)
    compare(writes, (v, w, b), k, heads, backend, record_property)


@pytest.mark.parametrize("decay", [0.0, -1e-3, -20.0, -float("inf"), "mixed"])
def test_decays(decay, record_property):
    case = dict(B=1, T=300, H=2, Hl=1, K=8, V=6, F=30, k=5, state=True)
    writes, v, w, b, k, heads = build(case, seed=3)
    if decay == "mixed":
        strong = torch.rand(writes.decay.shape) < 0.1
        writes = replace(writes, decay=torch.where(strong, -50.0, 0.1 * writes.decay))
    else:
        writes = replace(writes, decay=torch.full_like(writes.decay, decay))
    for backend in ("reference", "cpu"):
        compare(writes, (v, w, b), k, heads, backend, record_property)


def test_gradcheck():
    writes, v, w, b, k, heads = build(dict(B=1, T=5, H=2, Hl=1, K=3, V=4, F=9, k=3, state=True), seed=4)
    m = torch.randint(9, (1, 5, 2, 3))

    def run(decay, left, right, state, v, w):
        given = replace(writes, decay=decay, left=left, right=right, initial_state=state)
        return activations(given, v, w, m, heads=heads, backend="reference")

    inputs = (writes.decay, writes.left, writes.right, writes.initial_state, v, w)
    assert torch.autograd.gradcheck(run, [x.detach().requires_grad_() for x in inputs])


def test_from_codes_to_the_inputs_of_the_scan():
    """scan, its writes, codes, loss: every gradient against float64 through both references."""
    x = gated_delta_rule_inputs(2, 50, 1, 2, 12, 20, correlated=True)
    initial = torch.randn(2, 2, 12, 20)
    v, w = torch.randn(2, 40, 12), torch.randn(2, 40, 20)
    indices, found = None, []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in (*x.items(), ("state", initial))}
        arguments = {name: leaves[name] for name in x}
        out = ops.gated_delta_rule(
            **arguments, initial_state=leaves["state"], use_qk_l2norm=True, return_writes=True, backend=backend
        )
        if indices is None:
            codes = encode(out.writes, v, w, k=6, backend=backend)
            indices, values = codes.indices, codes.values
        else:
            values = activations(out.writes, v.to(dtype), w.to(dtype), indices, backend=backend).relu()
        (values.square().sum() + out.o.sum()).backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, got in found[0].items():
        check_close(name, got, found[1][name])


def test_half_precision_writes():
    writes, v, w, b, k, heads = build(CASES["grouped"], seed=2)
    half = replace(writes.to(torch.float32), left=writes.left.bfloat16(), right=writes.right.bfloat16())
    used, given = leaves_of(half, torch.float32)
    used = replace(used, left=half.left.requires_grad_(), right=half.right.requires_grad_())
    activations(used, v.float(), w.float(), torch.zeros(1, 130, 4, 1, dtype=torch.int64)).sum().backward()
    assert half.left.grad.dtype == half.right.grad.dtype == torch.bfloat16 and given["decay"].grad is not None


def test_only_what_is_asked():
    writes, v, w, b, k, heads = build(CASES["edits"], seed=2)
    writes = writes.to(torch.float32)
    plain = encode(writes, v.float(), w.float(), k=k)
    assert not plain.values.requires_grad
    right = writes.right.clone().requires_grad_()
    codes = encode(replace(writes, right=right), v.float(), w.float(), k=k)
    assert torch.equal(codes.values, plain.values) and torch.equal(codes.indices, plain.indices)
    codes.values.sum().backward()
    assert right.grad.abs().sum() > 0
    with torch.no_grad():
        assert not encode(replace(writes, right=right), v.float(), w.float(), k=k).values.requires_grad


def test_refusals():
    writes, v, w, b, k, _ = build(CASES["T1"])
    writes, v, w = writes.to(torch.float32), v.float(), w.float()
    asked = replace(writes, right=writes.right.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="encode: no backward for right"):
        encode(asked, v, w, threshold=0.5)
    codes = encode(writes, v, w, k=k)
    with pytest.raises(RuntimeError, match="factored_loss: no backward for right.*detach the writes"):
        factored_loss(asked, codes.values, codes.indices, v, w)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        values = encode(asked, v, w, k=k).values
        (first,) = torch.autograd.grad(values.square().sum(), asked.right, create_graph=True)
        first.sum().backward()
