"""Gradients of codes and activations with respect to the writes they are read from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets import DEVICES, FEW, to_cpu
from test_encode import CASES, GRADIENT_CASES, build
from torch._subclasses.fake_tensor import FakeTensorMode

from writesae import ops
from writesae.ops import _dispatch, activations, encode, factored_loss
from writesae.ops._encode_arguments import as_read
from writesae.ops.reference.encode import preactivations
from writesae.ops.scan import pack_edits
from writesae.testing import check_close, dictionary, gated_delta_rule_inputs, make_writes, poisoned_memory

# Relative RMS error allowed. Measured for float32: CPU at most 1.3e-6, host twin see the tests' summary line.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


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
        out = replace(out, edits=replace(edits, left=sides[0], right=sides[1]))
    for name, x in zip(("v", "w", "b"), params, strict=False):
        made[name] = x.detach().to(dtype).requires_grad_()
    return out, made


def compare(writes, params, k, heads, target, record=None):
    """Gradients of codes and activations against float64. target: None for the reference backend."""
    dtype = torch.float64 if target is None else torch.float32
    exact, truth = leaves_of(writes, torch.float64, params)
    m = torch.randint(params[0].shape[1], (*writes.shape[:2], len(heads), 4))  # repeats included
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(*writes.shape[:2], len(heads), size, generator=generator) for size in (k, 4)]
    if target is None:
        indices, given, found = _gradients(leaves_of(writes, dtype, params), m, weights, k, heads, "reference")
    else:
        with poisoned_memory(), target.in_use():
            put = [target.put(x) for x in (m, *weights)]
            used = target.put(writes), [target.put(x) for x in params]
            leaves = leaves_of(used[0], dtype, used[1])
            indices, given, found = to_cpu_all(_gradients(leaves, put[0], put[1:], k, heads, target.kind))

    v, w = (x[:, :, None] if x.ndim == 3 else x for x in (truth["v"], truth["w"]))
    pre, _ = preactivations(exact, v, w, heads, exact.initial_state)
    pre = pre + truth["b"]
    loss = (pre.gather(-1, indices).relu() * weights[0]).sum() + (pre.gather(-1, m) * weights[1]).sum()
    expected = torch.autograd.grad(loss, list(truth.values()))
    for name, got, want in zip(given, found, expected, strict=True):
        assert got.dtype == dtype
        if name == "decay" and target is not None and target.kind != "cpu":
            # A difference of sums, as exact as they are: of the codes' and activations' own shares of the loss.
            plain = (pre - truth["b"]).detach()
            shares = (plain.gather(-1, at).mul(x).square().sum(-1) for at, x in zip((indices, m), weights, strict=True))
            error = float((got - want).abs().max() / sum(shares).max().sqrt())
            assert error <= TOLERANCE[dtype], f"decay: {error:.2e} of the largest share"
        else:
            error = check_close(name, got, want, TOLERANCE[dtype]).rms
        if record is not None and dtype == torch.float32:
            record(f"{target.kind}, {'decay' if name == 'decay' else 'others'}", error)


def _gradients(leaves, m, weights, k, heads, backend):
    used, given = leaves
    codes = encode(used, given["v"], given["w"], given["b"], k=k, heads=heads, backend=backend)
    chosen = activations(used, given["v"], given["w"], m, given["b"], heads=heads, backend=backend)
    loss = (codes.values * weights[0]).sum() + (chosen * weights[1]).sum()
    return codes.indices, list(given), torch.autograd.grad(loss, list(given.values()))


def to_cpu_all(made):
    indices, names, tensors = made
    return to_cpu(indices), names, [to_cpu(x) for x in tensors]


on_all = pytest.mark.parametrize("on", [None, *FEW], ids=lambda x: "reference" if x is None else x.name)


@on_all
@pytest.mark.parametrize("name", [*GRADIENT_CASES, "two writes", "k is F"])
def test_gradients_equal_autograd(name, on, record_property):
    writes, v, w, b, k, heads = build(CASES[name], seed=2)
    compare(writes, (v, w, b), k, heads, on, record_property)


@on_all
@pytest.mark.parametrize("decay", [0.0, -1e-3, -20.0, -float("inf"), "mixed"])
def test_decays(decay, on, record_property):
    case = dict(B=1, T=300, H=2, Hl=1, K=8, V=6, F=30, k=5, state=True)
    writes, v, w, b, k, heads = build(case, seed=3)
    if decay == "mixed":
        strong = torch.rand(writes.decay.shape) < 0.1
        writes = replace(writes, decay=torch.where(strong, -50.0, 0.1 * writes.decay))
        writes.decay[0, 100], writes.decay[0, 200] = -float("inf"), -120.0
    else:
        writes = replace(writes, decay=torch.full_like(writes.decay, decay))
    compare(writes, (v, w, b), k, heads, on, record_property)


def test_gradcheck():
    writes, v, w, b, k, heads = build(dict(B=1, T=5, H=2, Hl=1, K=3, V=4, F=9, k=3, state=True), seed=4)
    m = torch.randint(9, (1, 5, 2, 3))

    def run(decay, left, right, state, v, w):
        given = replace(writes, decay=decay, left=left, right=right, initial_state=state)
        return activations(given, v, w, m, heads=heads, backend="reference")

    inputs = (writes.decay, writes.left, writes.right, writes.initial_state, v, w)
    assert torch.autograd.gradcheck(run, [x.detach().requires_grad_() for x in inputs])


@pytest.mark.parametrize("K, V", [(32, 33), (64, 20), (65, 128), (128, 128), (129, 256), (256, 7)])
def test_sizes(K, V, device_target, record_property):
    """The padded sizes the kernels are built for, features that fill no tile, packed, with rank and two writes."""
    generator = torch.Generator().manual_seed(14)
    cu = torch.tensor([0, 0, 31, 32, 75, 75])
    writes = make_writes(generator, 1, 75, 4, 2, K, V, R=2, state=True, cu=cu)
    params = dictionary(generator, 2, 70, K, V, 2)
    compare(writes, params, 8, [3, 0], device_target, record_property)


@pytest.mark.parametrize("T", [255, 256, 257, 700])
def test_parts(T, device_target, record_property):
    """So few heads and so many tokens that several blocks share a feature: parts end inside sequences and with them."""
    generator = torch.Generator().manual_seed(15)
    cu = torch.tensor([0, 128, 129, T - 3, T - 3, T])
    for row in ({"cu": cu}, {}):
        writes = make_writes(generator, 1, T, 1, 1, 9, 12, decay=0.01, state=True, **row)
        compare(writes, dictionary(generator, 1, 20, 9, 12), 4, [0], device_target, record_property)


def test_kernels_take_edits_by_torch_and_refuse_them_themselves(device_target):
    writes, v, w, _, _, heads = build(CASES["edits"], seed=2)
    writes, v, w = writes.to(torch.float32), v.float(), w.float()
    at = torch.zeros(2, 70, 3, 1, dtype=torch.int64)
    first = (writes.decay, writes.left, writes.right, torch.tensor(heads), v, w, at, torch.ones(2, 70, 3, 1))
    packed = pack_edits(as_read(writes)[0].edits)
    with device_target.in_use(), pytest.raises(RuntimeError, match="the CUDA kernel takes no edits, got 30"):
        _dispatch.operators(device_target.kind).encode_backward(*map(device_target.put, (*first, None, *packed)))


def test_kernels_are_deterministic(device_target):
    """Bit for bit, in whatever order blocks and threads run; features of a token may repeat."""
    writes, v, w, _, _, heads = build(CASES["grouped"], seed=2)
    at = torch.randint(5, (1, 130, 4, 40))
    grad = torch.randn(1, 130, 4, 40)
    given = (writes.decay, writes.left, writes.right, v, w, grad)
    decay, left, right, v, w, grad = (x.float() for x in given)
    arguments = [device_target.put(x) for x in (decay, left, right, torch.tensor(heads), v, w, at, grad)]
    operators, found = _dispatch.operators(device_target.kind), []
    for other in (x for x in DEVICES if x.kind == device_target.kind):
        with poisoned_memory(), other.in_use():
            made = operators.encode_backward(*arguments, None, None, None, None)
            found.append([*made, *operators.encode_writes_backward(*arguments, None)])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in arguments]
        shapes = torch.ops.writesae.encode_backward(*fakes, None, None, None, None)
        shapes = [*shapes, *torch.ops.writesae.encode_writes_backward(*fakes, None)]
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in found[0]]


def test_from_codes_to_the_inputs_of_the_scan(target):
    """scan, its writes, codes, loss: every gradient against float64 through both references."""
    x = gated_delta_rule_inputs(2, 50, 1, 2, 12, 20, correlated=True)
    initial = torch.randn(2, 2, 12, 20)
    v, w = torch.randn(2, 40, 12), torch.randn(2, 40, 20)
    with poisoned_memory(), target.in_use():
        got, indices = _through_the_scan(target.put(x), *map(target.put, (initial, v, w)), None, target.kind)
    wide = {name: value.double() for name, value in x.items()}
    want, _ = _through_the_scan(wide, initial.double(), v.double(), w.double(), indices.cpu(), "reference")
    for name, expected in want.items():
        check_close(name, got[name].cpu(), expected)


def _through_the_scan(x, initial, v, w, indices, backend):
    """Gradients of inputs and initial state; at `indices`, or those that fire."""
    leaves = {name: value.detach().requires_grad_() for name, value in (*x.items(), ("state", initial))}
    out = ops.gated_delta_rule(
        **{name: leaves[name] for name in x}, initial_state=leaves["state"], use_qk_l2norm=True, return_writes=True,
        backend=backend,
    )  # fmt: skip
    if indices is None:
        codes = encode(out.writes, v, w, k=6, backend=backend)
        indices, values = codes.indices, codes.values
    else:
        values = activations(out.writes, v, w, indices, backend=backend).relu()
    (values.square().sum() + out.o.sum()).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}, indices


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
