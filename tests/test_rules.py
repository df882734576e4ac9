"""Every write rule on every target that has it, forward: kernels and reference against `rules.loop`."""

from __future__ import annotations

import re
from functools import partial

import pytest
import rules
import torch
from rules import edits_for, run, targets
from targets import to_cpu

from writesae.edits import KINDS, WHENS, Edits
from writesae.testing import check_close, poisoned_memory

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def compare(case, record_property):
    return partial(rules.compare, case, record=record_property)


def state_for(case, x, N=None):
    """`[N, H, K, V]`, random."""
    B, _, _, H, K, V = case.sizes(x)
    return torch.randn(B if N is None else N, H, K, V)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127])
def test_lengths(T, case, compare):
    x = case.make(2, T, 2, 4, 32, 64)
    compare(x, initial_state=state_for(case, x), snapshots=[0, T // 2, T - 1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("initial", [False, True])
def test_one_token(dtype, initial, case, compare):
    """What a cached decoding step asks for: sizes that no block divides, strided inputs, edits, a place named twice."""
    x = case.tokens(case.make(3, 3, 2, 6, 40, 33, dtype), lambda y: y[:, 1:2])
    assert not x[case.operands[2]].is_contiguous()
    _, _, _, H, K, V = case.sizes(x)
    places = torch.tensor([[2, 0], [0, 0], [2, 0]])
    start = state_for(case, x) if initial else None
    compare(x, initial_state=start, edits=edits_for(3, [1, 1, 1], H, K, V), snapshots=places)


@pytest.mark.parametrize("K, V", [(32, 64), (128, 256), (64, 40), (256, 128), (20, 12), (7, 5), (1, 1), (128, 33)])
def test_sizes(K, V, case, compare):
    x = case.make(1, 37, 1, 2, K, V)
    compare(x, edits=edits_for(1, [37], case.sizes(x)[3], K, V), snapshots=[3, 36])


@pytest.mark.parametrize("Hk, H", [(1, 1), (1, 6), (2, 6), (4, 4)])
def test_grouped_heads(Hk, H, case, compare):
    if case.fit(Hk, H) != (Hk, H):
        pytest.skip(f"{case.name} has no such heads")
    compare(case.make(2, 21, Hk, H, 16, 24), which="few")


def test_other_options(case, compare):
    for x, options in case.variants():
        compare(x, which="few", **options)


def test_long(case, compare):
    T = 4096
    on = targets(case, "few")
    on = [target for target in on if target.kind != "reference"] or on[:1]
    T = 4096 if on[0].kind != "reference" else 600
    x = case.make(1, T, 1, 1, 32, 24, correlated=True, decay="weak")
    compare(x, on=on, edits=edits_for(1, [T], 1, 32, 24), snapshots=[T // 4, T // 2 - 1, T // 2, T - 1])


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
def test_decay(decay, correlated, case, compare):
    x = case.make(1, 130, 1, 2, 32, 48, decay=decay, correlated=correlated)
    compare(x, initial_state=state_for(case, x), snapshots=[64, 129])


def test_closed_gates(case, compare):
    x = case.make(1, 40, 1, 2, 16, 24)
    case.close(x)
    compare(x, initial_state=state_for(case, x), snapshots=[5, 6, 39])


def packed(case, lengths, Hk, H, K, V, **options):
    """(inputs of packed sequences, their offsets)"""
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return case.make(1, sum(lengths), Hk, H, K, V, **options), offsets


def test_packed(case, compare):
    lengths = [5, 0, 1, 66, 0, 127, 1, 0]
    x, offsets = packed(case, lengths, 2, 4, 24, 40)
    places = torch.tensor([[5, 126], [0, 0], [3, 65], [3, 3], [6, 0], [3, 3]])
    edits = edits_for(8, lengths, case.sizes(x)[3], 24, 40, count=20)
    compare(x, cu_seqlens=offsets, initial_state=state_for(case, x, 8), snapshots=places, edits=edits)
    compare(x, cu_seqlens=offsets.int(), which="few")


def test_packed_equals_alone(case):
    x, offsets = packed(case, [30, 40], 1, 2, 16, 24)
    for target in targets(case, "few"):
        both = run(case, target, x, cu_seqlens=offsets)
        for n, part in enumerate((slice(0, 30), slice(30, 70))):
            alone = run(case, target, case.tokens(x, lambda y, part=part: y[:, part]))
            assert torch.equal(alone.o, both.o[:, part]) and torch.equal(alone.final_state[0], both.final_state[n])


def test_continues_from_a_state(case):
    x = case.make(2, 50, 1, 2, 16, 24, decay="weak")
    for target in targets(case, "few"):
        whole = run(case, target, x)
        first = run(case, target, case.tokens(x, lambda y: y[:, :19]))
        then = run(case, target, case.tokens(x, lambda y: y[:, 19:]), initial_state=first.final_state)
        check_close(f"o with {target.name}", torch.cat([first.o, then.o], 1), whole.o, 2e-6)
        check_close(f"final state with {target.name}", then.final_state, whole.final_state, 2e-6)


def test_what_is_not_asked_for_changes_nothing(case):
    x = case.make(2, 40, 1, 2, 16, 24)
    for target in targets(case, "few"):
        full = run(case, target, x, snapshots=[3])
        with target.in_use():
            out = to_cpu(case.rule.run(**target.put(x), **case.options, backend=target.kind))
        assert out.final_state is out.writes is out.snapshots is None
        # Tokens around a snapshot go another way, to rounding.
        check_close(f"o with {target.name}", out.o, full.o, 2e-6)


# ---- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("kind", KINDS)
def test_edit_kinds(kind, when, case, compare):
    B, T, K, V = 3, 19, 20, 36
    x = case.make(B, T, 1, 2, K, V, decay="weak", correlated=True)
    head = torch.tensor([0, 1, 1, 1, 0, 1]).clamp(max=case.sizes(x)[3] - 1)
    row, position = [0, 1, 2, 2, -1, -1], [0, T - 1, 7, 7, 8, 3]
    edits = Edits(row, position, head, torch.randn(6, K), torch.randn(6, V), kind, when)
    compare(x, edits=edits, snapshots=[0, 7, 8, T - 1])


def test_delete_ignores_its_sides(case):
    x = case.make(1, 9, 1, 1, 8, 12)
    with_sides = Edits([0], [4], [0], torch.randn(1, 8), torch.randn(1, 12), "delete")
    without = Edits.delete([0], [4], [0], 8, 12)
    for target in targets(case, "few"):
        assert torch.equal(run(case, target, x, edits=with_sides).o, run(case, target, x, edits=without).o)


def test_edits_leave_the_rest_alone(case):
    """Other rows, other heads and earlier positions come out bit for bit as without the edit."""
    x = case.make(2, 33, 1, 2, 16, 24)
    h = case.sizes(x)[3] - 1
    edits = Edits([1], [13], [h], torch.randn(1, 16), torch.randn(1, 24))
    for target in targets(case, "few"):
        clean, edited = (run(case, target, x, edits=e) for e in (None, edits))
        clean, edited = (out.writes.right.new_tensor(0) + out.o.reshape(2, 33, h + 1, 24) for out in (clean, edited))
        assert torch.equal(clean[0], edited[0]) and torch.equal(clean[1, :, :h], edited[1, :, :h])
        assert torch.equal(clean[1, :12, h], edited[1, :12, h])
        assert not torch.equal(clean[1, 13:, h], edited[1, 13:, h])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_token_reads_before_an_edit_after(kind, case):
    """Bit for bit: o up to and with the token, its increment, other heads and rows. Everything after it differs. (On a
    CPU tokens around an edit go one by one, and so they do around a snapshot.)"""
    T = 70
    x = case.make(2, T, 1, 2, 16, 24, decay="weak", correlated=True)
    h = case.sizes(x)[3] - 1
    for target in targets(case):
        for t in (0, 31, 40, T - 1):
            clean = run(case, target, x, snapshots=[40, t])
            edits = Edits([1], [t], [h], torch.randn(1, 16), torch.randn(1, 24), kind, "after")
            out = run(case, target, x, edits=edits, snapshots=[40, t])
            for of in (lambda y: y.o.reshape(2, T, h + 1, 24), lambda y: y.writes.right.flatten(3)):
                a, b = of(out), of(clean)
                assert torch.equal(a[0], b[0]) and torch.equal(a[1, :, :h], b[1, :, :h])
                assert torch.equal(a[1, : t + 1, h], b[1, : t + 1, h])
            a, b = out.o.reshape(2, T, h + 1, 24), clean.o.reshape(2, T, h + 1, 24)
            assert t == T - 1 or (a[1, t + 1, h] != b[1, t + 1, h]).any()
            assert not torch.equal(out.final_state[1, h], clean.final_state[1, h])
            assert torch.equal(out.final_state[0], clean.final_state[0])
            assert torch.equal(out.snapshots[1, 0, h], clean.snapshots[1, 0, h]) == (t > 40)
            check_close("states", out.writes.states([40, t]), out.snapshots, 1e-5)


@pytest.mark.parametrize("kinds", [["delete", "add"], ["add", "delete"], ["replace"]])
def test_the_native_write_put_back(kinds, case):
    x = case.make(2, 70, 1, 2, 16, 24, decay="weak", correlated=True)
    h = case.sizes(x)[3] - 1
    for target in targets(case):
        clean = run(case, target, x)
        p, q = clean.writes.left[1, 33, -1, -1], clean.writes.right[1, 33, h, -1]
        n = len(kinds)
        back = Edits([1] * n, [33] * n, [h] * n, p.expand(n, 16), q.expand(n, 24), kinds, "after")
        out = run(case, target, x, edits=back)
        check_close("o", out.o, clean.o, 1e-6)
        check_close("final state", out.final_state, clean.final_state, 1e-6)


def test_a_removal_before_the_read_leaves_nothing_to_remove_after(case):
    x = case.make(1, 40, 1, 1, 16, 24)
    before = Edits.delete(0, 21, 0, 16, 24)
    both = Edits.cat([Edits.delete(0, 21, 0, 16, 24, when="after"), before])
    for target in targets(case):
        a, b = (run(case, target, x, edits=edits) for edits in (before, both))
        assert torch.equal(a.o, b.o) and torch.equal(a.final_state, b.final_state)
        check_close("states", a.writes.states([21]), b.writes.states([21]))


# ---- dtypes and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_inputs(dtype, case, compare):
    compare(case.make(1, 70, 2, 4, 32, 40, dtype), snapshots=[69])


def test_mixed_dtypes(case, compare):
    kinds = (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    x = case.make(1, 30, 1, 2, 32, 40)
    x = {name: value.to(kind) for (name, value), kind in zip(x.items(), kinds, strict=False)}
    compare(x, which="few", initial_state=state_for(case, x).bfloat16())


def layouts(case, x):
    """The same numbers, laid out otherwise: heads or sizes before tokens, every other of twice as many, cut out."""
    yield case.tokens(x, lambda y: y.transpose(1, 2).contiguous().transpose(1, 2))
    yield case.tokens(x, lambda y: y.transpose(1, -1).contiguous().transpose(1, -1))
    yield case.tokens(x, lambda y: torch.stack([y, y.flip(0)], -1)[..., 0])
    yield case.tokens(x, lambda y: torch.cat([y, y.flip(0)], -1)[..., : y.shape[-1]])


def test_strided_inputs(case, compare):
    x = case.make(2, 33, 2, 4, 24, 40)
    expected = compare(x, which="few")
    for strided in layouts(case, x):
        assert not any(strided[name].is_contiguous() for name in case.operands)
        for target in targets(case, "few"):
            if target.kind == "reference":  # torch's sums go by the layout
                continue
            got = run(case, target, strided)
            assert torch.equal(got.o, expected[target.name].o), target.name
            assert torch.equal(got.final_state, expected[target.name].final_state), target.name


def test_threads_agree(case):
    cpu = next((target for target in targets(case, "few") if target.kind == "cpu"), None)
    if cpu is None:
        pytest.skip("of the CPU's kernels")
    x = case.make(2, 100, 1, 2, 32, 64)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            outs.append(run(case, cpu, x))
    finally:
        torch.set_num_threads(before)
    for out in outs[1:]:
        assert torch.equal(out.o, outs[0].o) and torch.equal(out.final_state, outs[0].final_state)


# ---- one token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", ["after", "after", "before", "after"]], ids=str)
@pytest.mark.parametrize("K, V, dtype", [(32, 64, 0), (20, 12, 1), (64, 40, 0), (7, 5, 2), (128, 256, 0)])
def test_steps_equal_the_sequence(K, V, dtype, when, step_case):
    case, B, T = step_case, 2, 9
    x = case.make(B, T, 2, 4, K, V, (torch.float32, *HALVES)[dtype])
    H = case.sizes(x)[3]
    head = torch.tensor([1, 0, 2, 2]).clamp(max=H - 1)
    kinds = ["add", "delete", "replace", "add"]
    edits = Edits([0, 1, -1, 0], [3, 3, 5, 5], head, torch.randn(4, K), torch.randn(4, V), kinds, when)
    start = torch.randn(B, H, K, V)
    truth = rules.loop(case, x, initial_state=start, edits=edits, snapshots=range(T))
    for target in targets(case):
        wide = target.kind == "reference"
        inputs = rules.doubled(x) if wide else x
        state = target.put((start.double() if wide else start).clone())
        for t in range(T):
            now = target.put(case.tokens(inputs, lambda y, t=t: y[:, t]))
            of_token = edits[edits.position == t]
            with poisoned_memory(), target.in_use():
                out = case.step(
                    **now, **case.options, state=state, edits=of_token if len(of_token) else None, return_writes=True,
                    backend=target.kind,
                )  # fmt: skip
            limit = rules.allowed(case, target, x, out.o.dtype)
            pairs = (out.o, truth.o), (state, truth.snapshots), (out.left, truth.left), (out.right, truth.right)
            for name, (a, b) in zip(("o", "state", "left", "right"), pairs, strict=True):
                check_close(f"{name} at {t} with {target.name}", a.cpu(), b[:, t].reshape(a.shape), limit)
        # Not asked for, not there.
        with target.in_use():
            out = case.step(**now, **case.options, state=state, backend=target.kind)
        assert out.left is None and out.right is None


def test_step_refuses(step_case):
    case = step_case
    x = case.tokens(case.make(2, 1, 1, 2, 16, 24), lambda y: y[:, 0])
    H = case.fit(1, 2)[1]
    value = case.operands[2]
    with pytest.raises(ValueError, match=rf"state: expected \[B=2, H={H}, K=16, V=24\]"):
        case.step(**x, state=torch.zeros(2, H, 24, 16))
    with pytest.raises(ValueError, match="state: expected contiguous torch.float32"):
        case.step(**x, state=torch.zeros(2, H, 16, 24, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="non-contiguous"):
        case.step(**x, state=torch.zeros(2, H, 24, 16).transpose(2, 3))
    with pytest.raises(ValueError, match=f"{value}: expected"):
        case.step(**{**x, value: x[value][0]}, state=torch.zeros(2, H, 16, 24))
    with pytest.raises(RuntimeError, match="no backward"):
        case.step(**{**x, value: x[value].requires_grad_()}, state=torch.zeros(2, H, 16, 24))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_named(case):
    x = case.make(2, 6, 2, 4, 8, 5)
    for name, good in x.items():
        bad = {"an axis more": good[None], "an axis less": good[..., 0]}
        bad["one more"] = torch.cat([good, good[..., :1]], -1)
        if (name, case.gate) == ("g", "channel"):
            del bad["an axis less"]  # a scalar gate
        if name == case.operands[2]:
            del bad["one more"]  # another V
        for what, value in bad.items():
            # Where two arguments do not fit together, either may be named.
            with pytest.raises(ValueError, match=r"^\w+: expected .*, got") as said:
                case.rule.run(**{**x, name: value}, backend="reference")
            assert re.search(rf"\b{name}\b|shape", str(said.value)), (name, what)
        with pytest.raises(ValueError, match=f"^{name}: expected a floating dtype, got torch.int64"):
            case.rule.run(**{**x, name: good.long()}, backend="reference")
        with pytest.raises(ValueError, match=f"^{name}: expected a dense tensor"):
            case.rule.run(**{**x, name: [1.0]}, backend="reference")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"initial_state": (2, "H", 5, 8)}, r"initial_state: expected \[N=2, H=\d, K=8, V=5\]"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens: packed sequences need B = 1, got B = 2"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens: expected .* integers"),
        ({"snapshots": [6]}, "snapshots: .* got row 0, position 6"),
        ({"snapshots": torch.zeros(2, 3, dtype=torch.int64)}, r"snapshots: expected \[P, 2\]"),
        ({"edits": Edits.delete([2], [0], [0], 8, 5)}, "edits.row: expected -1 <= row < 2, got 2"),
        ({"edits": Edits.delete([0], [6], [0], 8, 5)}, "edits.position: expected 0 <= position < 6"),
        ({"edits": Edits.delete([0], [0], [4], 8, 5)}, "edits.head: expected 0 <= head < [14], got 4"),
        ({"edits": Edits.delete([0], [0], [0], 5, 8)}, r"edits: expected left \[E, K=8\]"),
        ({"edits": {"row": 0}}, "edits: expected"),
        ({"backend": "gpu"}, "backend: expected one of reference, cpu, cuda or None, got 'gpu'"),
        ({"backend": "cuda"}, "cannot run this"),
    ],
)  # fmt: skip
def test_bad_input(change, message, case):
    x = case.make(2, 6, 2, 4, 8, 5)
    if "initial_state" in change:
        change = {"initial_state": torch.zeros(*(case.sizes(x)[3] if n == "H" else n for n in change["initial_state"]))}
    with pytest.raises(ValueError, match=message):
        case.rule.run(**x, **{"backend": "reference", **change})


def test_float64_is_no_kernels(case):
    x = case.make(2, 6, 2, 4, 8, 5)
    for target in targets(case, "kernels")[:1]:
        for name in case.operands:
            with pytest.raises(ValueError, match="float64, expected float32"), target.in_use():
                case.rule.run(**{**x, name: x[name].double()}, backend=target.kind)


def test_bad_offsets(case):
    x = case.make(1, 6, 1, 1, 8, 5)
    for offsets in ([1, 6], [0, 5], [0, 4, 2, 6], [0]):
        with pytest.raises(ValueError, match="cu_seqlens: expected offsets rising from 0 to T=6"):
            case.rule.run(**x, cu_seqlens=torch.tensor(offsets), backend="reference")


def test_no_tokens(case):
    with pytest.raises(ValueError, match="at least one token"):
        case.rule.run(**case.make(1, 0, 1, 1, 8, 5), backend="reference")
