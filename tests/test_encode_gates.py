"""`encode` and `activations` under gates of channels and of elements, against states formed one by one in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets import ALL
from test_encode import CASES, from_states, run, same_up_to_ties

from writesae.edits import Edits
from writesae.ops import _encode_states
from writesae.ops._encode_arguments import as_read
from writesae.ops.encode import activations, encode
from writesae.ops.scan import pack_edits
from writesae.testing import dictionary, make_writes, poisoned_memory

# Worst element over the largest value, float32 against float64: measured below 5e-7 on the three instruction sets.
FP32 = 2e-6
SMALL = [name for name in CASES if name not in ("many features", "large k")]


def gated(writes, gate, gen, decay=0.3):
    """The same writes under a gate of channels or of elements."""
    B, T, H, K, V = writes.shape
    size = K if gate == "channel" else V
    new = -(torch.randn(B, T, H, size, generator=gen).abs() * decay).double()
    matrix = (torch.rand(H, K, V, generator=gen) + 0.5).double() if gate == "element" else None
    return replace(writes, decay=new, decay_matrix=matrix)


def build(case, gate, seed=0, decay=0.3):
    c = {"heads": None, "r": 1, **case}
    gen = torch.Generator().manual_seed(seed)
    writes = make_writes(gen, *(c[n] for n in ("B", "T", "H", "Hl", "K", "V")), **{
        n: c[n] for n in ("R", "state", "cu", "edits") if n in c
    })  # fmt: skip
    heads = list(range(c["H"])) if c["heads"] is None else c["heads"]
    factors = dictionary(gen, len(heads), c["F"], c["K"], c["V"], c["r"])
    return gated(writes, gate, gen, decay), *factors, c["k"], heads


def carried(writes, v, w, heads):
    """`[N, Hs, F]` activations after each sequence's last token, edits after its read included."""
    found = []
    for n, _, lo, hi in writes.sequences():
        if hi > lo:
            state = writes.states(torch.tensor([[n, hi - lo - 1]]))[0]
        else:
            state = torch.zeros(writes.shape[2:]) if writes.initial_state is None else writes.initial_state[n]
        found.append(torch.einsum("hfxk,hkv,hfxv->hf", v, state[heads].double(), w))
    return torch.stack(found)


def states_of(writes, v, w, b, heads):
    return from_states(writes, v, w, b, heads), carried(writes, v, w, heads)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("decay", [0.002, 0.3, 40.0])
def test_a_channel_gate_against_states(name, decay, record_property):
    writes, v, w, b, k, heads = build(CASES[name], "channel", decay=decay)
    pre, last = states_of(writes, v, w, b, heads)
    given = writes.to(torch.float32), *(x.float() for x in (v, w))
    m = torch.randint(v.shape[1], (*writes.shape[:2], len(heads), 6))
    scale = float(pre.abs().max())
    for target in ALL:
        codes = run(target, encode, *given, b.float(), k=k, heads=heads)
        same_up_to_ties(codes.values, codes.indices, pre, k)
        chosen = run(target, activations, *given, m, b.float(), heads=heads)
        assert codes.carry.shape == last.shape and codes.heads == tuple(heads) and codes.offsets is None
        worst = max(float(x.abs().max()) for x in (chosen - pre.gather(-1, m), codes.carry - last)) / scale
        assert worst <= FP32, f"{worst:.2e} with {target.name}"
        record_property(target.kind, worst)


@pytest.mark.parametrize("gate", ["channel", "element"])
@pytest.mark.parametrize("name", SMALL)
def test_the_reference_is_exact(name, gate):
    writes, v, w, b, k, heads = build(CASES[name], gate, seed=1)
    pre, last = states_of(writes, v, w, b, heads)
    codes = encode(writes, v, w, b, k=k, heads=heads, backend="reference")
    same_up_to_ties(codes.values, codes.indices, pre, k, 1e-12)
    torch.testing.assert_close(codes.carry, last, rtol=1e-10, atol=1e-10)
    m = torch.randint(v.shape[1], (*writes.shape[:2], len(heads), 3))
    chosen = activations(writes, v, w, m, b, heads=heads, backend="reference")
    torch.testing.assert_close(chosen, pre.gather(-1, m), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", ["channel", "element"])
@pytest.mark.parametrize("which", ["T1", "T65", "packed", "edits", "packed edits", "rank 2", "few tokens"])
def test_threshold_mode(which, gate):
    writes, v, w, b, _, heads = build(CASES[which], gate)
    given = writes.to(torch.float32), *(x.float() for x in (v, w, b))
    each = torch.rand(len(heads), v.shape[1]) * 3
    pre = states_of(writes, v, w, b, heads)[0].flatten(0, 2)
    for threshold in (0.0, each):
        kept = (pre.view(-1, *each.shape) > threshold).view_as(pre)
        slow = encode(writes, v, w, b, threshold=threshold, backend="reference")
        for codes in (slow, *(run(x, encode, *given, threshold=threshold) for x in ALL if gate == "channel")):
            assert torch.equal(codes.offsets.diff(), kept.sum(-1))
            assert torch.equal(codes.indices, kept.nonzero()[:, 1])
            torch.testing.assert_close(codes.values.double(), pre[kept], rtol=1e-4, atol=1e-4)


def test_an_initial_state_goes_on(each_target):
    writes, v, w, b, k, heads = build(CASES["state"], "channel")
    writes, v, w, b = writes.to(torch.float32), v.float(), w.float(), b.float()
    whole = run(each_target, encode, writes, v, w, b, k=k)
    parts = []
    for lo, hi in ((0, 1), (1, 37), (37, 70)):
        state = writes.initial_state if lo == 0 else writes.states([lo - 1])[:, 0]
        part = replace(writes, decay=writes.decay[:, lo:hi], left=writes.left[:, lo:hi], right=writes.right[:, lo:hi])
        parts.append(run(each_target, encode, part, v, w, b, k=k, initial_state=state))
    torch.testing.assert_close(torch.cat([x.values for x in parts], 1), whole.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[-1].carry, whole.carry, rtol=1e-5, atol=1e-5)


def test_top_32_of_2048(target):
    writes, v, w, b, k, heads = build(dict(B=1, T=130, H=2, Hl=2, K=64, V=48, F=2048, k=32), "channel", decay=0.02)
    pre, _ = states_of(writes, v, w, b, heads)
    codes = run(target, encode, writes.to(torch.float32), v.float(), w.float(), b.float(), k=32)
    same_up_to_ties(codes.values, codes.indices, pre, 32)


def test_one_decay_in_all_channels_is_a_gate_of_the_head(each_target):
    gen = torch.Generator().manual_seed(2)
    writes = make_writes(gen, 2, 90, 2, 1, 9, 7, state=True, edits=9).to(torch.float32)
    v, w, b = (x.float() for x in dictionary(gen, 2, 50, 9, 7))
    channels = replace(writes, decay=writes.decay[..., None].expand(-1, -1, -1, 9))
    got, want = (run(each_target, encode, x, v, w, b, k=50) for x in (channels, writes))
    scale = float(want.values.max())
    assert float((got.values - want.values).abs().max()) <= FP32 * scale


def test_closed_channels_forget_and_nan_stays_in_its_sequence(each_target):
    writes, v, w, b, k, heads = build(dict(B=2, T=40, H=1, Hl=1, K=5, V=4, F=37, k=5, state=True), "channel")
    writes, v, w, b = writes.to(torch.float32), v.float(), w.float(), b.float()
    writes.decay[:, 20] = -torch.inf
    clean = run(each_target, encode, writes, v, w, b, k=5)
    tail = replace(writes, decay=writes.decay[:, 20:], left=writes.left[:, 20:], right=writes.right[:, 20:])
    want = run(each_target, encode, tail, v, w, b, k=5, initial_state=torch.zeros(2, 1, 5, 4))
    torch.testing.assert_close(clean.values[:, 20:], want.values, rtol=1e-5, atol=1e-5)
    for name in ("right", "left", "decay"):
        broken = replace(writes, **{name: getattr(writes, name).clone()})
        getattr(broken, name)[0, 30] = torch.nan
        codes = run(each_target, encode, broken, v, w, b, k=5)
        assert bool(codes.values[0, 30:].isnan().all()) and not codes.values[0, :30].isnan().any()
        assert torch.equal(codes.values[1], clean.values[1]) and torch.equal(codes.indices[1], clean.indices[1])
    v[0, 20] = torch.nan
    b[0, 30] = torch.inf
    codes = run(each_target, encode, writes, v, w, b, k=37)
    assert bool((codes.indices[..., 0] == 20).all()) and bool(codes.values[..., 0].isnan().all())
    assert bool((codes.indices[..., 1] == 30).all()) and bool((codes.indices < 37).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_converted_exactly(dtype, each_target):
    writes, v, w, b, _, _ = build(dict(B=1, T=100, H=2, Hl=1, K=12, V=20, F=70, k=8, state=True), "channel")
    writes, v, w, b = writes.to(dtype), v.to(dtype), w.to(dtype), b.to(dtype)
    got = run(each_target, encode, writes, v, w, b, k=8)
    want = run(each_target, encode, writes.to(torch.float32), v.float(), w.float(), b.float(), k=8)
    assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)


def test_bf16_products_are_those_of_rounded_operands(each_target):
    writes, v, w, b, k, heads = build(CASES["state"], "channel")
    given = writes.to(torch.float32), v.float(), w.float(), b.float()
    got = run(each_target, encode, *given, k=k, precision="bf16")
    wide = [x.to(torch.float64) for x in given]
    want = encode(*wide, k=k, precision="bf16", backend="reference")
    torch.testing.assert_close(got.values.double(), want.values, rtol=1e-4, atol=1e-4)
    assert float((got.values - run(each_target, encode, *given, k=k).values).abs().max()) > 1e-4


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    writes, v, w, b, k, _ = build(CASES["packed edits"], "channel")
    given = writes.to(torch.float32), v.float(), w.float(), b.float()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = encode(*given, k=k)
    try:
        torch.set_num_threads(threads)
        got = encode(*given, k=k)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got.values, alone.values) and torch.equal(got.carry, alone.carry)


def test_long_sequences_in_many_blocks(target):
    writes, v, w, b, k, heads = build(
        dict(B=1, T=1000, H=3, Hl=3, K=4, V=3, F=40, k=5, edits=40), "channel", decay=0.01
    )
    pre, _ = states_of(writes, v, w, b, heads)
    codes = run(target, encode, writes.to(torch.float32), v.float(), w.float(), b.float(), k=5)
    same_up_to_ties(codes.values, codes.indices, pre, 5)


def test_many_short_sequences(target):
    lengths = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(3))
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    case = dict(B=1, T=int(cu[-1]), H=2, Hl=1, K=6, V=7, F=33, k=4, R=2, cu=cu, state=True, edits=20)
    writes, v, w, b, k, heads = build(case, "channel")
    pre, last = states_of(writes, v, w, b, heads)
    codes = run(target, encode, writes.to(torch.float32), v.float(), w.float(), b.float(), k=4)
    same_up_to_ties(codes.values, codes.indices, pre, 4)
    torch.testing.assert_close(codes.carry.double(), last, rtol=1e-4, atol=1e-4)


def test_no_carry_of_activations():
    writes, v, w, b, k, _ = build(CASES["T63"], "channel")
    with pytest.raises(ValueError, match="carry: expected none under the channel gate"):
        encode(writes, v, w, b, k=k, carry=torch.zeros(2, 2, 37))


def test_an_element_gate_says_that_it_is_slow(recwarn):
    writes, v, w, b, k, _ = build(CASES["T63"], "element")
    with pytest.raises(ValueError, match="takes no element gate"):
        encode(writes.to(torch.float32), v.float(), w.float(), k=k, backend="cpu")


@pytest.mark.parametrize("name", ["T65", "packed edits", "state"])
def test_operators(name):
    writes, v, w, b, k, heads = build(CASES[name], "channel")
    plain = as_read(writes)[0]
    packed = (None, None, None) if plain.edits is None else pack_edits(plain.edits)
    arguments = (
        plain.decay.float(), plain.left.float(), plain.right.float(), torch.tensor(heads), v.float(), w.float()
    )  # fmt: skip
    state = None if plain.initial_state is None else plain.initial_state.float()
    rest = (state, plain.cu_seqlens, *packed)
    ops = torch.ops.writesae
    torch.library.opcheck(ops.encode_topk.default, (*arguments, b.float(), k, *rest, "fp32"))
    indices = torch.zeros(*plain.shape[:2], len(heads), 2, dtype=torch.int64)
    torch.library.opcheck(ops.encode_at.default, (*arguments, indices, *rest))
    with pytest.raises(RuntimeError, match="carry"):
        wrong = torch.zeros(plain.num_sequences, len(heads), v.shape[1])
        ops.encode_topk(*arguments, None, k, wrong, *rest[1:], "fp32")
    with pytest.raises(RuntimeError, match="one gate a head"):
        ops.encode_backward(*arguments, indices, indices.float(), *rest[1:])


# ---- gradients ------------------------------------------------------------------------------------------------------


def leaves_of(writes, v, w, b):
    found = {"v": v, "w": w, "b": b, "decay": writes.decay, "left": writes.left, "right": writes.right}
    if writes.decay_matrix is not None:
        found["decay_matrix"] = writes.decay_matrix
    if writes.initial_state is not None:
        found["initial_state"] = writes.initial_state
    if writes.edits is not None:
        found |= {"p": writes.edits.left.double(), "q": writes.edits.right.double()}
    return {name: x.detach().clone().requires_grad_() for name, x in found.items()}


def with_leaves(writes, leaves):
    edits = writes.edits
    if edits is not None:
        edits = Edits(edits.row, edits.position, edits.head, leaves["p"], leaves["q"], when=edits.when)
    names = ("decay", "left", "right", "decay_matrix", "initial_state")
    return replace(writes, edits=edits, **{name: leaves[name] for name in names if name in leaves})


@pytest.mark.parametrize("gate", ["channel", "element"])
@pytest.mark.parametrize("name", ["T65", "heads", "packed", "edits", "packed edits", "rank 2"])
def test_gradients_are_those_of_states(name, gate):
    writes, v, w, b, k, heads = build(CASES[name], gate)
    leaves = leaves_of(writes, v, w, b)
    codes = encode(with_leaves(writes, leaves), *(leaves[n] for n in "vwb"), k=k, heads=heads, backend="reference")
    exact = leaves_of(writes, v, w, b)
    pre = from_states(with_leaves(writes, exact), *(exact[n] for n in "vwb"), heads)
    values = pre.gather(-1, codes.indices).relu()
    scale = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).double()
    for got in (codes.values, values):
        (got * scale).sum().backward()
    for name, x in exact.items():
        close = dict(rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(leaves[name].grad, x.grad, **close)


@pytest.mark.parametrize("gate", ["channel", "element"])
def test_however_few_states_are_held(gate, monkeypatch):
    writes, v, w, b, k, heads = build(CASES["edits"], gate)
    found = []
    for held in (_encode_states._HELD, 100):  # one token at a time
        monkeypatch.setattr(_encode_states, "_HELD", held)
        leaves = leaves_of(writes, v, w, b)
        codes = encode(with_leaves(writes, leaves), *(leaves[n] for n in "vwb"), k=k, backend="reference")
        codes.values.square().sum().backward()
        found.append([codes.values.detach(), *(x.grad for x in leaves.values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_kernel_has_the_reference_gradient():
    writes, v, w, b, k, heads = build(CASES["edits"], "channel")
    found = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaves = {n: x.to(dtype).detach().requires_grad_() for n, x in leaves_of(writes, v, w, b).items()}
        given = with_leaves(writes, leaves)
        with poisoned_memory():
            codes = encode(given, leaves["v"], leaves["w"], leaves["b"], k=k, heads=heads, backend=backend)
            codes.values.square().sum().backward()
        found.append({n: x.grad.double() for n, x in leaves.items()})
    for name, want in found[1].items():
        assert float((found[0][name] - want).abs().max()) <= 1e-5 * float(want.abs().max()), name
