"""The training kernels (`training_loss`, `factored_loss`, gradients of `encode`) against dense states in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from writesae.edits import Edits
from writesae.ops import encode, factored_loss, training_loss
from writesae.ops.reference.encode import preactivations
from writesae.testing import poisoned_memory
from writesae.writes import Writes

ISAS = torch.ops.writesae.cpu_isa_list().split(",")

# Norm of the error over the norm, float32 against float64 on the same inputs and the same codes: 3.6e-7 measured over
# the cases below on the three instruction sets.
FP32 = 3e-6


@pytest.fixture(params=ISAS)
def isa(request):
    before = torch.ops.writesae.cpu_isa("")
    torch.ops.writesae.cpu_isa(request.param)
    yield request.param
    torch.ops.writesae.cpu_isa(before)


@pytest.fixture
def poisoned():
    """Outputs come filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


BASE = dict(B=2, T=70, H=2, Hl=1, K=16, V=32, F=64, k=4, r=1, R=1, decay=0.05, state=False, cu=None, heads=[0, 1],
            offset=True, edits=0)  # fmt: skip
CASES = {
    "one token": dict(B=1, T=1, k=3),
    "31": dict(T=31),
    "32": dict(T=32),
    "33": dict(T=33),
    "127": dict(B=1, T=127),
    "odd sizes": dict(K=7, V=5, F=23),
    "wide": dict(K=130, V=33, F=70, k=8),
    "narrow": dict(K=3, V=140, F=40),
    "grouped": dict(H=4, Hl=2, heads=[3, 1]),
    "state": dict(state=True),
    "packed": dict(B=1, T=130, cu=[0, 40, 40, 41, 130], state=True),
    "one sequence": dict(B=1, T=300, H=1, heads=[0], state=True),
    "many": dict(B=9, T=40, H=1, heads=[0]),
    "rank 2": dict(r=2, K=9),
    "two writes": dict(R=2, T=45, state=True),
    "strong decay": dict(decay=8.0),
    "closed gates": dict(decay=float("inf"), state=True),
    "no decay": dict(decay=0.0),
    "no offset": dict(offset=False),
    "all features": dict(F=20, k=20),
    "more atoms than a group": dict(B=1, T=50, F=500, k=100, H=1, heads=[0]),
    "half": dict(dtype=torch.bfloat16),
}


def build(name, seed=0, **more):
    """(writes, [v_enc, w_enc, b_enc, v_dec, w_dec, offset], weight, k, heads), exact in float32; keys correlated."""
    c = BASE | CASES[name] | more
    dtype = c.pop("dtype", torch.float32)
    gen = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=gen).to(dtype).double()

    B, T, H, K, V, Hs = c["B"], c["T"], c["H"], c["K"], c["V"], len(c["heads"])
    N = B if c["cu"] is None else len(c["cu"]) - 1
    decay = -random(B, T, H).abs() * (1.0 if c["decay"] == float("inf") else c["decay"])
    if c["decay"] == float("inf"):
        decay = decay.masked_fill(torch.rand(decay.shape, generator=gen) < 0.1, float("-inf"))
    edits = None
    if c["edits"]:
        row, position, head = (torch.randint(n, (c["edits"],), generator=gen) for n in (N, T, H))
        position[: c["edits"] // 2] = position[0]
        edits = Edits(row, position, head, random(c["edits"], K).float(), random(c["edits"], V).float())
    left = (random(B, T, c["Hl"], c["R"], K) + 1.5 * random(1, 1, c["Hl"], 1, K)) / 2
    writes = Writes(
        decay.to(dtype).double(), left.to(dtype).double(),
        random(B, T, H, c["R"], V), initial_state=random(N, H, K, V) if c["state"] else None,
        cu_seqlens=None if c["cu"] is None else torch.tensor(c["cu"]), edits=edits,
    )  # fmt: skip
    sides = [random(Hs, c["F"], c["r"], size) / 4 for size in (K, V, K, V)]
    params = [*sides[:2], random(Hs, c["F"]), *sides[2:], random(Hs, K, V) if c["offset"] else None]
    weight = random(B, T) * (torch.rand(B, T, generator=gen) > 0.3)  # of either sign, and some zero
    return writes, params, weight, c["k"], c["heads"]


def states_of(writes, heads):
    """`[B, T, Hs, K, V]`."""
    pairs = torch.tensor([(n, t) for n, _, lo, hi in writes.sequences() for t in range(hi - lo)])
    return writes.states(pairs)[:, heads].unflatten(0, writes.shape[:2])


def dense_errors(states, values, indices, v, w, offset):
    """Squared errors by materialised states, atoms and reconstructions."""
    total = torch.zeros_like(states)
    for i in range(states.shape[2]):
        atoms = torch.einsum("fxk,fxv->fkv", v[i], w[i])
        total[:, :, i] = torch.einsum("btm,btmkv->btkv", values[:, :, i], atoms[indices[:, :, i]])
    return (states - total - (0 if offset is None else offset)).square().sum((-2, -1))


def near(name, got, want, tolerance=FP32):
    assert got.shape == want.shape, name
    got, want = got.detach().double(), want.detach()
    error = float((got - want).norm())
    assert error <= tolerance * float(want.norm()), f"{name}: {error / float(want.norm()):.2e}"


def inputs_of(params, dtype):
    return [None if x is None else x.to(dtype).requires_grad_() for x in params]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


@pytest.mark.parametrize("name", ["33", "grouped", "state", "packed", "rank 2", "two writes", "strong decay"])
def test_training_loss_on_devices(name, device_target):
    """Made of encode's kernels and torch there: against the reference in float64."""
    writes, params, weight, k, heads = build(name)
    exact = inputs_of(params, torch.float64)
    want = training_loss(writes, *exact, k=k, weight=weight, heads=heads, backend="reference")
    with poisoned_memory(), device_target.in_use():
        mine = [None if x is None else x.requires_grad_() for x in map(device_target.put, (x.float() for x in params))]
        given = device_target.put(writes.to(torch.float32))
        options = {"k": k, "weight": device_target.put(weight.float()), "heads": heads, "backend": device_target.kind}
        step = training_loss(given, *mine, **options)
        got = gradients(step.loss, mine)
    assert torch.equal(step.codes.indices.cpu(), want.codes.indices)
    near("errors", step.errors.cpu(), want.errors, 1e-5)
    names = ("v_enc", "w_enc", "b_enc", "v_dec", "w_dec", "offset")
    for side, a, c in zip(names, got, gradients(want.loss, exact), strict=True):
        near(side, a.cpu(), c, 1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_training_loss_equals_dense(name, threads, isa, poisoned):
    writes, params, weight, k, heads = build(name)
    dtype = CASES[name].get("dtype", torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mine = inputs_of(params, torch.float32)
        step = training_loss(writes.to(dtype), *mine, k=k, weight=weight.float(), heads=heads, backend="cpu")
        got = gradients(step.loss, mine)
    finally:
        torch.set_num_threads(before)
    # The dense computation takes the same sets: which features are chosen has its own tests.
    exact = inputs_of(params, torch.float64)
    states = states_of(writes, heads)
    pre = torch.einsum("hfxk,bthkv,hfxv->bthf", exact[0], states, exact[1]) + exact[2]
    values = pre.gather(-1, step.codes.indices).relu()
    errors = dense_errors(states, values, step.codes.indices, *exact[3:])
    loss = (errors * weight[:, :, None]).sum()
    near("values", step.codes.values, values)
    kept = weight[:, :, None] != 0
    near("errors", step.errors, errors * kept)
    # Weights of either sign cancel in the sum, errors do not.
    size = float((errors * weight[:, :, None]).detach().abs().sum())
    assert abs(float(step.loss.detach() - loss.detach())) <= FP32 * size
    wanted = ("v_enc", "w_enc", "b_enc", "v_dec", "w_dec", "offset")
    for label, a, b in zip(wanted, got, gradients(loss, exact), strict=False):
        near(label, a, b)


@pytest.mark.parametrize("name", ["33", "odd sizes", "grouped", "packed", "rank 2", "two writes", "no offset"])
def test_factored_loss_equals_dense(name, isa, poisoned):
    """Codes of either sign, some zero, some features twice in a token: more than `encode` makes."""
    writes, params, weight, k, heads = build(name, seed=1)
    gen = torch.Generator().manual_seed(2)
    shape, F = (*writes.shape[:2], len(heads), k), params[0].shape[1]
    indices = torch.randint(F, shape, generator=gen)
    values = torch.randn(shape, generator=gen).double() * (torch.rand(shape, generator=gen) > 0.3)
    scale = torch.randn(shape[:3], generator=gen).double()
    mask = weight != 0
    mine, exact = (inputs_of([values, *params[3:]], d) for d in (torch.float32, torch.float64))
    got = factored_loss(writes.to(torch.float32), mine[0], indices, *mine[1:], heads=heads, mask=mask, backend="cpu")
    want = dense_errors(states_of(writes, heads), exact[0], indices, *exact[1:]) * mask[:, :, None]
    near("errors", got, want)
    for label, a, b in zip(
        ("values", "v_dec", "w_dec", "bias"), gradients((got * scale.float()).sum(), mine),
        gradients((want * scale).sum(), exact), strict=False,
    ):  # fmt: skip
        near(label, a, b)


@pytest.mark.parametrize("edits", [0, 9])
@pytest.mark.parametrize("name", ["one token", "33", "odd sizes", "grouped", "state", "rank 2", "two writes", "many"])
def test_gradient_of_encode(name, edits, isa, poisoned):
    """With edits, and through the carry an initial state amounts to."""
    writes, params, _, k, heads = build(name, seed=3, edits=edits)
    mine, exact = (inputs_of(params[:3], d) for d in (torch.float32, torch.float64))
    codes = encode(writes.to(torch.float32), *mine, k=k, heads=heads, backend="cpu")
    scale = torch.randn(codes.values.shape, generator=torch.Generator().manual_seed(4)).double()
    pre, _ = preactivations(writes, exact[0], exact[1], heads, writes.initial_state)
    want = (pre + exact[2]).gather(-1, codes.indices).relu()
    near("values", codes.values, want)
    for label, a, b in zip(
        ("v", "w", "b"), gradients((codes.values * scale.float()).sum(), mine), gradients((want * scale).sum(), exact),
        strict=True,
    ):  # fmt: skip
        near(label, a, b)


def test_reference_backend_is_the_same():
    writes, params, weight, k, heads = build("packed", R=2)
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        mine = inputs_of(params, dtype)
        step = training_loss(writes.to(dtype), *mine, k=k, weight=weight.to(dtype), heads=heads, backend=backend)
        assert not step.errors.requires_grad and not step.codes.values.requires_grad
        results.append((step.errors, *gradients(step.loss, mine)))
    for a, b in zip(*results, strict=True):
        near("result", a, b)


def test_only_what_is_asked():
    writes, params, _, k, heads = build("33")
    writes = writes.to(torch.float32)
    plain = [x.float() for x in params]
    mine = inputs_of(params, torch.float32)
    everything = gradients(training_loss(writes, *mine, k=k, heads=heads).loss, mine)
    for asked in ([0], [3], [5], [2, 4]):
        some = [x.requires_grad_() if i in asked else x.detach() for i, x in enumerate(plain)]
        loss = training_loss(writes, *some, k=k, heads=heads).loss
        for i, a in zip(asked, torch.autograd.grad(3 * loss, [some[i] for i in asked]), strict=True):
            torch.testing.assert_close(a, 3 * everything[i])
    with torch.no_grad():
        assert not training_loss(writes, *mine, k=k, heads=heads).loss.requires_grad


def test_same_result_every_time():
    writes, params, weight, k, heads = build("one sequence")
    runs = []
    for _ in range(3):
        mine = inputs_of(params, torch.float32)
        step = training_loss(writes.to(torch.float32), *mine, k=k, weight=weight.float(), heads=heads)
        runs.append((step.loss, *gradients(step.loss, mine)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_opcheck():
    writes, params, weight, k, heads = build("packed")
    w, (v_enc, w_enc, b, v_dec, w_dec, offset) = writes.to(torch.float32), [x.float() for x in params]
    first = (w.decay, w.left, w.right, torch.tensor(heads))
    codes = encode(w, v_enc, w_enc, b, k=k, heads=heads)
    backward = (*first, v_enc, w_enc, codes.indices, codes.values, w.cu_seqlens, None, None, None)
    torch.library.opcheck(torch.ops.writesae.encode_backward.default, backward)
    scale = weight.float()[:, :, None].expand(codes.values.shape[:3])
    for encoder, grad in (((v_enc, w_enc), True), ((None, None), True), ((None, None), False)):
        loss = (*first, codes.values, codes.indices, v_dec, w_dec, offset, b, scale, w.initial_state, w.cu_seqlens)
        torch.library.opcheck(torch.ops.writesae.factored_loss.default, (*loss, *encoder, grad))


def test_bad_input_by_name():
    writes, params, weight, k, heads = build("33")
    writes, params, weight = writes.to(torch.float32), [x.float() for x in params], weight.float()
    wrong = {
        "v_enc": (0, params[0][:, :, :, :-1]), "w_enc": (1, params[1][:, :-1]), "b_enc": (2, params[2][:, :-1]),
        "v_dec": (3, params[3][:, :-1]), "w_dec": (4, params[4][..., :-1]), "offset": (5, params[5].mT),
    }  # fmt: skip
    for name, (at, x) in wrong.items():
        arguments = [x if i == at else y for i, y in enumerate(params)]
        if name == "v_dec":
            arguments[4] = arguments[4][:, :-1]
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            training_loss(writes, *arguments, k=k, heads=heads)
    with pytest.raises(ValueError, match="^weight: expected"):
        training_loss(writes, *params, k=k, heads=heads, weight=weight.T)
    with pytest.raises(ValueError, match="^k: expected"):
        training_loss(writes, *params, k=0, heads=heads)
    edited = replace(writes, edits=build("33", edits=2)[0].edits)
    with pytest.raises(ValueError, match="edits"):
        training_loss(edited, *params, k=k, heads=heads)
    with pytest.raises(RuntimeError, match="no backward"):
        training_loss(replace(writes, right=writes.right.clone().requires_grad_()), *params, k=k, heads=heads)
    with pytest.raises(RuntimeError, match="out of range"):
        bad = torch.full((2, 33, 2, 4), 64)
        torch.ops.writesae.encode_backward(
            writes.decay, writes.left, writes.right, torch.tensor(heads), *params[:2], bad, bad.float(), *[None] * 4
        )
