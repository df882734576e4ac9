"""encode's CUDA kernels under the host twin (`backend="twin"`), in both orders of threads, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_encode import CASES, build, dictionary, make_writes, random, same_up_to_ties

from writesae.ops.encode import activations, encode
from writesae.ops.reference.encode import preactivations, topk
from writesae.writes import Writes

# Worst element over the largest value, against float64, over the cases below: measured fp32 2.0e-7, tf32 5.6e-4, bf16
# 3.8e-3 (tf32 and bf16 round operands to 11 and 8 bits). Sums inside a GPU's matrix units are rounded otherwise.
TOLERANCE = {"fp32": 2e-6, "tf32": 2e-3, "bf16": 2e-2}


pytestmark = pytest.mark.usefixtures("twin")


@pytest.fixture(params=["forward", "reverse"])
def schedule(request, twin):
    twin.schedule(request.param)
    yield request.param
    twin.schedule("forward")


@pytest.fixture
def segments(twin):
    yield twin.encode_segment
    twin.encode_segment(0)


@pytest.fixture(autouse=True)
def poisoned():
    """Every allocation full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", [name for name in CASES if name != "large k"])  # k = 400: see below
def test_against_the_recurrence(name, precision, schedule, record_property):
    writes, v, w, b, k, heads = build(CASES[name])
    f = [x.float() for x in (v, w, b)]
    codes = encode(writes.to(torch.float32), *f, k=k, heads=heads, precision=precision, backend="twin")
    pre, last = preactivations(writes, v, w, heads, writes.initial_state)
    same_up_to_ties(codes.values, codes.indices, pre + b, k, TOLERANCE[precision])
    scale = float((pre + b).abs().max())
    worst = float((codes.values - topk(pre + b, k)[0]).abs().max()) / scale
    record_property(precision, max(worst, float((codes.carry - last).abs().max()) / scale))
    assert float((codes.carry - last).abs().max()) <= TOLERANCE[precision] * scale
    if precision == "fp32":
        m = torch.randint(v.shape[1], (*codes.indices.shape[:3], 6))
        chosen = activations(writes.to(torch.float32), f[0], f[1], m, f[2], heads=heads, backend="twin")
        assert float((chosen - (pre + b).gather(-1, m)).abs().max()) <= TOLERANCE[precision] * scale


def test_large_k_is_exact_or_refused():
    writes, v, w, b, k, heads = build(CASES["large k"])
    f = [x.float() for x in (v, w, b)]
    codes = encode(writes.to(torch.float32), *f, k=k, backend="twin")
    pre, _ = preactivations(writes, v, w, heads)
    same_up_to_ties(codes.values, codes.indices, pre + b, k)
    v, w = torch.zeros(1, 8192, 4), torch.zeros(1, 8192, 4)
    with pytest.raises(RuntimeError, match="k = 8000 needs more shared memory"):
        encode(writes.to(torch.float32), v, w, k=8000, backend="twin")


@pytest.mark.parametrize("length", [40, 64, 130])
@pytest.mark.parametrize("name", ["packed edits", "state", "two writes", "grouped"])
def test_segments_change_nothing(name, length, segments, schedule):
    """Cut anywhere: the states that segments start from carry everything, edits and the initial carry as well."""
    writes, v, w, b, k, heads = build(CASES[name])
    segments(length)
    codes = encode(writes.to(torch.float32), *(x.float() for x in (v, w, b)), k=k, heads=heads, backend="twin")
    pre, last = preactivations(writes, v, w, heads, writes.initial_state)
    same_up_to_ties(codes.values, codes.indices, pre + b, k)
    assert float((codes.carry - last).abs().max()) <= 2e-6 * float(pre.abs().max())


@pytest.mark.parametrize("decay", [0.002, 1.0])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_top_32_of_2048(precision, decay, record_property):
    """With fp32 products the set is float64's wherever more than rounding decides rank 32; of the others the share of
    float64's features that they miss is recorded."""
    gen = torch.Generator().manual_seed(3)
    T, K, V, F = 40, 128, 128, 2048
    writes = make_writes(gen, 1, T, 1, 1, K, V, decay=decay)
    v, w, b = dictionary(gen, 1, F, K, V)
    codes = encode(writes.to(torch.float32), v.float(), w.float(), b.float(), k=32, precision=precision, backend="twin")
    pre = preactivations(writes, v, w, [0])[0] + b
    edge = pre.sort(-1, descending=True).values
    clear = (edge[..., 31] - edge[..., 32] > 4e-6 * pre.abs().max()).squeeze()
    want = topk(pre, 32)[1]
    same = (codes.indices[..., :, None] == want[..., None, :]).any(-1).float().mean(-1).squeeze()
    record_property(f"missed with {precision}", 1 - float(same.mean()))
    assert bool(clear.float().mean() > 0.95)
    if precision == "fp32":
        assert bool((same[clear] == 1).all())
    else:
        assert float(same.mean()) >= {"tf32": 0.99, "bf16": 0.95}[precision]


@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_65536_tokens_keep_their_carry(decay, record_property):
    gen = torch.Generator().manual_seed(10)
    T = 65536
    writes = make_writes(gen, 1, T, 1, 1, 3, 2, decay=decay)
    v, w, _ = dictionary(gen, 1, 16, 3, 2)
    codes = encode(writes.to(torch.float32), v.float(), w.float(), k=16, backend="twin")
    increments = (writes.left[0, :, 0, 0] @ v[0, :, 0].T) * (writes.right[0, :, 0, 0] @ w[0, :, 0].T)
    if decay == 0:
        want = increments.cumsum(0)
    else:
        want, last = torch.empty_like(increments), torch.zeros(16, dtype=torch.float64)
        for t, gate in enumerate(writes.decay[0, :, 0].exp()):
            want[t] = last = gate * last + increments[t]
    got = torch.empty(T, 16).scatter_(1, codes.indices[0, :, 0], codes.values[0, :, 0])
    error = (got - want.relu()).norm(dim=0) / want.norm(dim=0)
    off = (codes.carry[0, 0] - want[-1]).abs().max() / want[-1].abs().max()
    record_property("carry over 65,536 tokens", float(off))
    record_property("65,536 tokens", float(error.max()))
    assert float(error.max()) <= 1e-4  # measured 6.0e-7, without decay
    assert float(off) <= 1e-4


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(("T", "F"), [(1, 96), (70, 96), (40, 1024)])
def test_ties_go_to_the_lowest_index(T, F, precision, schedule):
    gen = torch.Generator().manual_seed(7)
    writes = make_writes(gen, 1, T, 1, 1, 5, 4).to(torch.float32)
    v, w = (random(gen, 1, F // 4, n).float().repeat(1, 4, 1) for n in (5, 4))  # every atom four times
    codes = encode(writes, v, w, k=8, precision=precision, backend="twin")
    order = codes.indices[0, :, 0].view(T, 2, 4)
    assert torch.equal(order, order[..., :1] % (F // 4) + torch.arange(4) * (F // 4))
    zero = encode(writes, v * 0, w, k=8, precision=precision, backend="twin")
    assert torch.equal(zero.indices[0, :, 0], torch.arange(8).expand(T, 8)) and not zero.values.any()


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("k", [1, 32, 128])
def test_the_buffer_overflows_as_often_as_it_can(T, k, schedule):
    """Activations that rise with the feature pass every bar so far: nothing may be lost, wherever the buffer fills."""
    gen = torch.Generator().manual_seed(12)
    writes = make_writes(gen, 1, T, 1, 1, 5, 4).to(torch.float32)
    F = 1000
    v, w = torch.zeros(1, F, 5), torch.zeros(1, F, 4)
    rising = torch.arange(F, dtype=torch.float32)[None]
    codes = encode(writes, v, w, rising, k=k, backend="twin")
    assert torch.equal(codes.indices, torch.arange(F - 1, F - 1 - k, -1).expand(1, T, 1, k))
    pairs = torch.arange(F, dtype=torch.float32)[None].div(2, rounding_mode="floor")
    codes = encode(writes, v, w, pairs, k=k, backend="twin")
    want = topk(pairs.double(), k)[1]
    assert torch.equal(codes.indices, want.expand(1, T, 1, k))


def test_nan_and_infinity_are_never_lost(schedule):
    gen = torch.Generator().manual_seed(8)
    for T in (1, 50):
        writes = make_writes(gen, 1, T, 1, 1, 5, 4).to(torch.float32)
        v, w, b = (x.float() for x in dictionary(gen, 1, 37, 5, 4))
        v[0, 20] = torch.nan
        b[0, 30], b[0, 31] = torch.inf, -torch.inf
        codes = encode(writes, v, w, b, k=37, backend="twin")
        assert bool((codes.indices[..., 0] == 20).all()) and bool(codes.values[..., 0].isnan().all())
        assert bool((codes.indices[..., 1] == 30).all()) and bool((codes.values[..., 1] == torch.inf).all())
        assert bool((codes.indices[..., -1] == 31).all()) and bool((codes.indices < 37).all())
        codes = encode(writes, -torch.full((1, 37, 5), torch.nan), w[:, :, 0], b, k=3, backend="twin")
        assert bool(codes.values.isnan().all()) and bool((codes.indices == torch.arange(3)).all())
        found = encode(writes, v, w, b, threshold=1e30, backend="twin")
        assert torch.equal(found.indices, torch.tensor([20, 30] * T))
        writes.right[0, T // 2] = torch.inf  # from here on everything is infinite or NaN; padding must not show
        codes = encode(writes, v, w, b, k=5, backend="twin")
        assert bool((codes.indices < 37).all()) and bool(codes.values[0, T // 2 :, 0, 0].isnan().all())


def test_closed_gate_forgets(segments, schedule):
    gen = torch.Generator().manual_seed(9)
    writes = make_writes(gen, 1, 40, 1, 1, 5, 4, state=True).to(torch.float32)
    writes.decay[0, 20] = -torch.inf
    v, w, b = (x.float() for x in dictionary(gen, 1, 20, 5, 4))
    tail = Writes(writes.decay[:, 20:], writes.left[:, 20:], writes.right[:, 20:])
    want = encode(tail, v, w, b, k=20, backend="cpu")
    for length in (0, 16):
        segments(length)
        got = encode(writes, v, w, b, k=20, backend="twin")
        torch.testing.assert_close(got.values[:, 20:], want.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", ["packed edits", "rank 2", "few tokens", "T1"])
def test_threshold(name, precision, schedule):
    writes, v, w, b, _, heads = build(CASES[name])
    f = [x.float() for x in (v, w, b)]
    pre = preactivations(writes, v, w, heads, writes.initial_state)[0] + b
    limits = (torch.rand(b.shape) * pre.std()).float()
    got = encode(writes.to(torch.float32), *f, threshold=limits, heads=heads, precision=precision, backend="twin")
    band = TOLERANCE[precision] * float(pre.abs().max())
    over = pre - limits.double()
    runs = zip(got.offsets[:-1].tolist(), got.offsets[1:].tolist(), over.flatten(0, 2), pre.flatten(0, 2), strict=True)
    for lo, hi, margin, exact in runs:
        found = got.indices[lo:hi]
        assert bool((found.diff() > 0).all())
        assert set((margin > band).nonzero().flatten().tolist()) <= set(found.tolist())
        assert bool((margin[found] > -band).all())
        assert float((got.values[lo:hi] - exact[found]).abs().max() if len(found) else 0) <= band


def test_decoding_token_by_token_is_one_call():
    gen = torch.Generator().manual_seed(6)
    writes = make_writes(gen, 9, 5, 2, 1, 9, 7, state=True).to(torch.float32)
    v, w, b = (x.float() for x in dictionary(gen, 2, 50, 9, 7))
    whole = encode(writes, v, w, b, k=6, backend="twin")
    carry = None
    for t in range(5):
        part = replace(
            writes, decay=writes.decay[:, t : t + 1], left=writes.left[:, t : t + 1],
            right=writes.right[:, t : t + 1], initial_state=writes.initial_state if t == 0 else None,
        )  # fmt: skip
        codes = encode(part, v, w, b, k=6, carry=carry, backend="twin")
        carry = codes.carry
        assert torch.equal(codes.indices, whole.indices[:, t : t + 1])
        torch.testing.assert_close(codes.values, whole.values[:, t : t + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(carry, whole.carry, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 50])
def test_half_inputs_are_converted_exactly(dtype, T):
    gen = torch.Generator().manual_seed(4)
    writes = make_writes(gen, 1, T, 2, 1, 12, 20).to(dtype)
    v, w, b = (x.to(dtype) for x in dictionary(gen, 2, 70, 12, 20))
    got = encode(writes, v, w, b, k=8, backend="twin")
    want = encode(writes.to(torch.float32), v.float(), w.float(), b.float(), k=8, backend="twin")
    assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)


def test_strided_inputs():
    gen = torch.Generator().manual_seed(5)
    writes = make_writes(gen, 2, 70, 2, 2, 6, 8).to(torch.float32)
    v, w, b = (x.float() for x in dictionary(gen, 2, 40, 6, 8))
    want = encode(writes, v, w, b, k=5, backend="twin")

    def twisted(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    right = writes.right.repeat(1, 2, 1, 1, 1)[:, :70]
    strided = replace(writes, decay=twisted(writes.decay), left=twisted(writes.left), right=right)
    got = encode(strided, twisted(v), twisted(w), twisted(b), k=5, backend="twin")
    assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)


def test_gradients_through_the_twin():
    """The forward runs on the kernel, the backward in blocks by torch, on the tensors' own device."""
    grads = []
    for backend in ("twin", "cpu"):
        writes, v, w, b, k, heads = build(CASES["edits"])
        leaves = [x.float().requires_grad_() for x in (v, w, b)]
        codes = encode(writes.to(torch.float32), *leaves, k=k, heads=heads, backend=backend)
        grads.append(torch.autograd.grad(codes.values.square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_refusals():
    writes, v, w, b, k, _ = build(CASES["T1"])
    f = [x.float() for x in (v, w, b)]
    with pytest.raises(ValueError, match='precision: expected "fp32" or "bf16" with backend="cpu", got "tf32"'):
        encode(writes.to(torch.float32), *f, k=k, precision="tf32", backend="cpu")
    big = Writes(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, 1, 260), torch.zeros(1, 2, 1, 1, 4))
    with pytest.raises(RuntimeError, match="K and V up to 256, got 260 and 4"):
        encode(big, torch.zeros(1, 8, 260), torch.zeros(1, 8, 4), k=2, backend="twin")


def test_no_bank_conflicts(twin):
    """Operands are read 16 bytes a lane, in order; there are no matrix loads that could conflict."""
    writes, v, w, b, k, heads = build(CASES["grouped"])
    twin.statistics()
    encode(writes.to(torch.float32), *(x.float() for x in (v, w, b)), k=k, heads=heads, backend="twin")
    launches, _, _, products, loads, conflicts, _, shared = twin.statistics()
    assert launches == 3 and products > 0 and loads == conflicts == 0 and shared <= 227 * 1024
