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
    assert counts.total("launches") >= 3 and counts.total("products") > 0
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


# ---- bars that begin with a guess, features that blocks share, plans ------------------------------------------------


@pytest.fixture
def whole(device_target):
    """Segments and parts as a test wants them: one of each until it asks for more."""
    if device_target.kind != "twin":
        pytest.skip("the host twin cuts where a test wants it")
    ops = torch.ops.writesae_twin
    ops.encode_segment(1 << 20), ops.encode_parts(1)
    yield ops
    ops.encode_segment(0), ops.encode_parts(0)


def steered(scale, F=70, K=6, V=5, seed=4, heads=1):
    """Writes whose activations at token t are scale[t] times random ones of that token alone: every gate is closed."""
    gen = torch.Generator().manual_seed(seed)
    writes = make_writes(gen, 1, len(scale), heads, heads, K, V, decay=0.0).to(torch.float32)
    writes.decay.fill_(-torch.inf)
    writes.right.mul_(torch.as_tensor(scale, dtype=torch.float32)[None, :, None, None, None])
    return writes, *dictionary(gen, heads, F, K, V)


T = 300  # three chunks of 128 rows: two that begin with a guess
SCALES = {
    "a hundredth from one token to the next": [100.0 if t < 140 else 1.0 for t in range(T)],
    "falls with every token": [0.97**t for t in range(T)],
    "large and small in turns": [1000.0 if t % 2 else 1.0 for t in range(T)],
    "small once": [1e-4 if t == 200 else 1.0 for t in range(T)],
    "nothing": [0.0] * T,
    "nothing at the end": [1.0 if t < 150 else 0.0 for t in range(T)],
    "grows": [1.03**t for t in range(T)],
}


@pytest.mark.parametrize("F, k", [(70, 8), (45, 45), (300, 33)])
@pytest.mark.parametrize("name", SCALES)
def test_whatever_the_guess_the_largest_are_found(name, F, k, whole, device_target):
    writes, v, w, b = steered(SCALES[name], F=F)
    b = b * 0.0
    codes = run(device_target, encode, *float32(writes, v, w, b), k=k)
    pre, last = preactivations(writes, v, w, [0])
    want, features = topk(pre, k)
    scale = pre.abs().amax(-1, keepdim=True)  # of each token: they differ by orders of magnitude
    assert bool(((codes.values - want).abs() <= 2e-6 * scale).all())
    assert bool(((pre.gather(-1, codes.indices).relu() - want).abs() <= 2e-6 * scale).all())
    assert float((codes.carry - last).abs().max()) <= 2e-6 * float(last.abs().max())
    if name == "nothing":
        assert torch.equal(codes.indices, features)


@pytest.mark.parametrize("what", ["constant", "negative", "NaN", "infinite", "minus infinity", "gate of one"])
def test_guesses_of_no_use(what, whole, device_target):
    """Ties go to the lowest index, NaNs come first, and nothing is left out, in chunks that begin with a guess."""
    writes, v, w, b = steered([1.0] * T)
    F, k = b.shape[1], 8
    if what == "gate of one":
        writes.decay.zero_()
    else:
        v = torch.zeros_like(v)
        b = torch.full_like(b, {"constant": 3.0, "infinite": torch.inf, "minus infinity": -torch.inf}.get(what, -2.0))
    if what == "NaN":
        b[0, 5], b[0, 60:] = torch.nan, torch.nan
    codes = run(device_target, encode, *float32(writes, v, w, b), k=k)
    if what == "gate of one":
        pre = preactivations(writes, v, w, [0])[0] + b
        return same_up_to_ties(codes.values, codes.indices, pre, k)
    first = [5, *range(60, F)][:k] if what == "NaN" else list(range(k))
    assert torch.equal(codes.indices, torch.tensor(first).expand(1, T, 1, k))
    value = {"constant": 3.0, "infinite": torch.inf, "NaN": torch.nan}.get(what, 0.0)
    assert torch.equal(codes.values.isnan(), torch.full_like(codes.values, value).isnan())
    assert what == "NaN" or bool((codes.values == value).all())


def test_a_guess_in_edits_packs_and_segments(whole, device_target):
    """Chunks that begin inside a token of two writes, edits between, sequences of one token, rows of a state first."""
    gen = torch.Generator().manual_seed(6)
    cu = torch.tensor([0, 1, 2, 200, 200, 201, 460])
    writes = make_writes(gen, 1, 460, 2, 1, 6, 5, R=2, cu=cu, edits=90, state=True)
    writes.right[:, 150:170] *= 1e-3
    v, w, b = dictionary(gen, 2, 70, 6, 5)
    pre, last = preactivations(writes, v, w, [0, 1], writes.initial_state)
    for segment, parts in ((1 << 20, 1), (130, 1), (1 << 20, 3), (64, 2)):
        whole.encode_segment(segment), whole.encode_parts(parts)
        codes = run(device_target, encode, *float32(writes, v, w, b), k=9)
        same_up_to_ties(codes.values, codes.indices, pre + b, 9)
        assert float((codes.carry - last).abs().max()) <= 2e-6 * float(pre.abs().max())


def test_what_is_done_again(whole, device_target):
    """Of ordinary tokens next to none; of tokens that fall below every bar all of them, and they are exact as well."""
    gen = torch.Generator().manual_seed(3)
    writes = make_writes(gen, 1, 512, 1, 1, 32, 32, decay=0.1)
    v, w, b = dictionary(gen, 1, 512, 32, 32)
    with host_twin.counted() as ordinary:
        run(device_target, encode, *float32(writes, v, w, b), k=16, precision="bf16")
    assert ordinary.total("tokens") == 512 and ordinary.total("tokens_redone") <= 0.01 * 512
    fallen, v, w, b = steered([100.0 if t < 128 else 1.0 for t in range(256)])
    b *= 0.0
    with host_twin.counted() as again:
        codes = run(device_target, encode, *float32(fallen, v, w, b), k=8)
    assert again.total("tokens") == 256 and again.total("tokens_redone") == 128
    assert torch.allclose(codes.values.double(), topk(preactivations(fallen, v, w, [0])[0], 8)[0], rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 5, 32])
@pytest.mark.parametrize("name", ["grouped", "packed edits", "k is F", "large k", "many features"])
def test_parts_change_nothing(name, parts, whole, device_target):
    """Features shared by blocks: fewer than k in some of them, ties across them to the lowest."""
    writes, v, w, b, k, heads = build(CASES[name])
    given = float32(writes, v, w, b)
    alone = run(device_target, encode, *given, k=k, heads=heads)
    whole.encode_parts(parts)
    shared = run(device_target, encode, *given, k=k, heads=heads)
    assert torch.equal(shared.values, alone.values) and torch.equal(shared.indices, alone.indices)
    assert torch.equal(shared.carry, alone.carry)
    tied = run(device_target, encode, given[0], 0 * given[1], given[2], 0 * given[3], k=k, heads=heads)
    assert torch.equal(tied.indices, torch.arange(k).expand_as(tied.indices))


def test_features_that_16_bits_do_not_name(whole, device_target):
    gen = torch.Generator().manual_seed(8)
    writes = make_writes(gen, 1, 3, 1, 1, 2, 2).to(torch.float32)
    F, k = 65536 + 200, 40
    v, w, b = torch.zeros(1, F, 2), torch.zeros(1, F, 2), torch.randn(1, F, generator=gen)
    b[0, 65530:65550] = 9.0
    codes = run(device_target, encode, writes, v, w, b, k=k)
    values, features = topk(b.double(), k)
    assert torch.equal(codes.indices, features.expand(1, 3, 1, k)) and torch.equal(codes.values[0, 0], values.float())


@pytest.mark.parametrize("tokens", [1024, 8192, 32768])
@pytest.mark.parametrize("heads", [1, 16, 288])
def test_plans_keep_the_device_busy(heads, tokens, device_target, record_property):
    """The share of an H100's block slots that work, by the plan's own arithmetic."""
    if device_target.kind != "twin":
        pytest.skip("of the twin's H100")
    torch.ops.writesae_twin.encode_parts(0), torch.ops.writesae_twin.encode_segment(0)
    segment, parts, _, slots, _, busy = torch.ops.writesae_twin.encode_plan(
        1, tokens, heads, 128, 128, 2048, 32, "bf16"
    )
    print(f"{heads} heads, {tokens} tokens: segments of {segment}, {parts} parts, {busy / 1e4:.1f} % busy")
    record_property("idle", 1 - busy / 1e6)
    assert slots == 264 and busy >= 0.9e6
