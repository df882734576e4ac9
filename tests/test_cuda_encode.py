"""The CUDA kernels of `encode` where the common tests do not look: products in tf32 and bf16, buffers that overflow,
sequences cut into segments, shared memory. On the host twin and the GPU (see targets.py)."""

from __future__ import annotations

import host_twin
import pytest
import torch
from targets import DEVICES
from test_encode import CASES, build, from_states, run, same_up_to_ties
from test_encode_gates import build as build_gated

from writesae.ops.encode import activations, encode
from writesae.ops.reference.encode import preactivations, topk
from writesae.testing import dictionary, make_writes
from writesae.writes import Writes

# Worst element over the largest value, against float64, over the cases below: measured on the host twin tf32 5.6e-4,
# bf16 3.8e-3 (operands are rounded to 11 and 8 bits). Sums inside a GPU's matrix units are rounded otherwise.
TOLERANCE = {"tf32": 2e-3, "bf16": 2e-2}


@pytest.fixture
def segments(device_target):
    if device_target.kind != "twin":
        pytest.skip("the host twin cuts where a test wants it")
    yield torch.ops.writesae_twin.encode_segment
    torch.ops.writesae_twin.encode_segment(0)


def float32(writes, *tensors):
    return writes.to(torch.float32), *(x.float() for x in tensors)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", [name for name in CASES if name != "large k"])
def test_precisions(name, precision, device_target, record_property):
    writes, v, w, b, k, heads = build(CASES[name])
    codes = run(device_target, encode, *float32(writes, v, w, b), k=k, heads=heads, precision=precision)
    pre, last = preactivations(writes, v, w, heads, writes.initial_state)
    same_up_to_ties(codes.values, codes.indices, pre + b, k, TOLERANCE[precision])
    scale = float((pre + b).abs().max())
    worst = max(float(x.abs().max()) for x in (codes.values - topk(pre + b, k)[0], codes.carry - last)) / scale
    record_property(precision, worst)
    assert worst <= TOLERANCE[precision]


@pytest.mark.parametrize("decay", [0.002, 1.0])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_top_32_of_2048(precision, decay, device_target, record_property):
    """The share of float64's features that rounded products miss is recorded."""
    gen = torch.Generator().manual_seed(3)
    writes = make_writes(gen, 1, 40, 1, 1, 128, 128, decay=decay)
    v, w, b = dictionary(gen, 1, 2048, 128, 128)
    codes = run(device_target, encode, *float32(writes, v, w, b), k=32, precision=precision)
    want = topk(preactivations(writes, v, w, [0])[0] + b, 32)[1]
    same = float((codes.indices[..., :, None] == want[..., None, :]).any(-1).float().mean())
    record_property(f"missed with {precision}", 1 - same)
    assert same >= {"tf32": 0.99, "bf16": 0.95}[precision]


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", ["packed edits", "rank 2", "T1"])
def test_threshold(name, precision, device_target):
    writes, v, w, b, _, heads = build(CASES[name])
    pre = preactivations(writes, v, w, heads, writes.initial_state)[0] + b
    limits = (torch.rand(b.shape) * pre.std()).float()
    given = float32(writes, v, w, b)
    got = run(device_target, encode, *given, threshold=limits, heads=heads, precision=precision)
    band = TOLERANCE[precision] * float(pre.abs().max())
    over = pre - limits.double()
    runs = zip(got.offsets[:-1].tolist(), got.offsets[1:].tolist(), over.flatten(0, 2), pre.flatten(0, 2), strict=True)
    for lo, hi, margin, exact in runs:
        found = got.indices[lo:hi]
        assert bool((found.diff() > 0).all())
        assert set((margin > band).nonzero().flatten().tolist()) <= set(found.tolist())
        assert bool((margin[found] > -band).all())
        assert float((got.values[lo:hi] - exact[found]).abs().max() if len(found) else 0) <= band


@pytest.mark.parametrize("length", [40, 64, 130])
@pytest.mark.parametrize("name", ["packed edits", "state", "two writes", "grouped"])
def test_segments_change_nothing(name, length, segments, device_target):
    """Cut anywhere: the states that segments start from carry everything, edits and the initial carry as well."""
    writes, v, w, b, k, heads = build(CASES[name])
    segments(length)
    codes = run(device_target, encode, *float32(writes, v, w, b), k=k, heads=heads)
    pre, last = preactivations(writes, v, w, heads, writes.initial_state)
    same_up_to_ties(codes.values, codes.indices, pre + b, k)
    assert float((codes.carry - last).abs().max()) <= 2e-6 * float(pre.abs().max())


def test_closed_gate_forgets_across_segments(segments, device_target):
    gen = torch.Generator().manual_seed(9)
    writes = make_writes(gen, 1, 40, 1, 1, 5, 4, state=True).to(torch.float32)
    writes.decay[0, 20] = -torch.inf
    v, w, b = (x.float() for x in dictionary(gen, 1, 20, 5, 4))
    tail = Writes(writes.decay[:, 20:], writes.left[:, 20:], writes.right[:, 20:])
    want = encode(tail, v, w, b, k=20, backend="cpu")
    segments(16)
    got = run(device_target, encode, writes, v, w, b, k=20)
    torch.testing.assert_close(got.values[:, 20:], want.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("k", [1, 32, 128])
def test_the_buffer_overflows_as_often_as_it_can(T, k, device_target):
    """Activations that rise with the feature pass every bar so far: nothing may be lost, wherever the buffer fills."""
    gen = torch.Generator().manual_seed(12)
    writes = make_writes(gen, 1, T, 1, 1, 5, 4).to(torch.float32)
    F = 1000
    v, w = torch.zeros(1, F, 5), torch.zeros(1, F, 4)
    rising = torch.arange(F, dtype=torch.float32)[None]
    codes = run(device_target, encode, writes, v, w, rising, k=k)
    assert torch.equal(codes.indices, torch.arange(F - 1, F - 1 - k, -1).expand(1, T, 1, k))
    pairs = torch.arange(F, dtype=torch.float32)[None].div(2, rounding_mode="floor")
    codes = run(device_target, encode, writes, v, w, pairs, k=k)
    want = topk(pairs.double(), k)[1]
    assert torch.equal(codes.indices, want.expand(1, T, 1, k))


def test_more_than_fits_is_refused(device_target):
    writes = make_writes(torch.Generator(), 1, 12, 1, 1, 4, 4).to(torch.float32)
    with pytest.raises(RuntimeError, match="k = 8000 needs more shared memory"):
        run(device_target, encode, writes, torch.zeros(1, 8192, 4), torch.zeros(1, 8192, 4), k=8000)
    big = Writes(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, 1, 260), torch.zeros(1, 2, 1, 1, 4))
    with pytest.raises(ValueError, match="the last axis of left has 260 entries, expected at most 256"):
        run(device_target, encode, big, torch.zeros(1, 8, 260), torch.zeros(1, 8, 4), k=2)


def test_tf32_is_refused_elsewhere():
    writes, v, w, b, k, _ = build(CASES["T1"])
    with pytest.raises(ValueError, match='precision: expected "fp32" or "bf16" with backend="cpu", got "tf32"'):
        encode(*float32(writes, v, w, b), k=k, precision="tf32", backend="cpu")


def test_no_bank_conflicts(device_target):
    """Operands are read 16 bytes a lane, in order; there are no matrix loads that could conflict."""
    if device_target.kind != "twin":
        pytest.skip("the host twin counts them")
    writes, v, w, b, k, heads = build(CASES["grouped"])
    with host_twin.counted() as counts:
        run(device_target, encode, *float32(writes, v, w, b), k=k, heads=heads)
    assert counts.total("launches") == 3 and counts.total("products") > 0
    assert counts.total("matrix_loads") == counts.total("conflicts") == 0
    assert counts.total("shared_bytes_taken") <= 227 * 1024


def test_sizes(device_target, record_property):
    """The padded sizes the kernels are built for, and what lies just under and over them."""
    gen = torch.Generator().manual_seed(13)
    for K, V in ((32, 33), (64, 20), (65, 128), (128, 128), (129, 256), (256, 7)):
        writes = make_writes(gen, 1, 37, 2, 1, K, V)
        v, w, b = dictionary(gen, 2, 100, K, V)
        at = torch.randint(100, (1, 37, 2, 5))
        got = run(device_target, activations, *float32(writes, v, w), at, b.float())
        pre = preactivations(writes, v, w, [0, 1])[0] + b
        worst = float((got - pre.gather(-1, at)).abs().max() / pre.abs().max())
        record_property("sizes", worst)
        assert worst <= 2e-6


# ---- channel gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 16, 50])
@pytest.mark.parametrize("name", ["packed edits", "rank 2", "state", "T65"])
def test_channel_gates_in_chunks(name, tokens, segments):
    """What a chunk leaves to the next: S w of sequences that go on, whatever ends or begins inside."""
    writes, v, w, b, k, heads = build_gated(CASES[name], "channel")
    given = float32(writes, v, w, b)
    target = next(x for x in DEVICES if x.kind == "twin")
    segments(tokens)
    cut = run(target, encode, *given, k=k, heads=heads)
    above = run(target, encode, *given, threshold=0.5, heads=heads)
    indices = torch.randint(v.shape[1], (*writes.shape[:2], len(heads), 3))
    chosen = run(target, activations, *given[:3], indices, given[3], heads=heads)
    segments(0)
    whole = run(target, encode, *given, k=k, heads=heads)
    assert torch.equal(cut.values, whole.values) and torch.equal(cut.indices, whole.indices)
    assert torch.equal(cut.carry, whole.carry)
    pre = from_states(writes, v, w, b, heads)
    torch.testing.assert_close(chosen.double(), pre.gather(-1, indices), rtol=1e-4, atol=1e-4)
    assert torch.equal(above.offsets.diff(), (pre > 0.5).sum(-1).flatten())


def test_channel_gates_round_to_bf16(device_target):
    writes, v, w, b, k, heads = build_gated(CASES["edits"], "channel")
    codes = run(device_target, encode, *float32(writes, v, w, b), k=k, precision="bf16")
    want = encode(writes, v, w, b, k=k, precision="bf16", backend="reference")
    torch.testing.assert_close(codes.values.double(), want.values, rtol=1e-4, atol=1e-4)
    tf32 = run(device_target, encode, *float32(writes, v, w, b), k=k, precision="tf32")  # as in float32
    assert torch.equal(tf32.values, run(device_target, encode, *float32(writes, v, w, b), k=k).values)
