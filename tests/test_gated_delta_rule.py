"""The kernels of `gated_delta_rule`, CPU and CUDA, against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from targets import ALL, FEW, to_cpu

from writesae import ops
from writesae._library import CPU_ERROR
from writesae.edits import KINDS, WHENS, Edits
from writesae.ops.reference.gated_delta_rule import gated_delta_rule as reference
from writesae.ops.scan import pack_edits
from writesae.testing import (
    DEVICE_TOLERANCE,
    TOLERANCE,
    check_close,
    difference,
    gated_delta_rule_inputs,
    poisoned_memory,
)

assert CPU_ERROR is None, CPU_ERROR

CHUNK = 32  # tokens that the CUDA kernels take at a time, float32 inputs


def edits_for(rows, lengths, H, K, V, count=12, seed=1):
    """Edits of every kind, before and after the read, at first and last positions, several at one place."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, rows, (count,), generator=generator)
    lengths = torch.tensor(lengths)
    for i in range(count):  # an empty sequence has no position to edit
        while lengths[row[i]] == 0:
            row[i] = (row[i] + 1) % rows
    position = (torch.rand(count, generator=generator) * lengths[row]).long()
    position[0], position[1] = 0, lengths[row[1]] - 1
    head = torch.randint(0, H, (count,), generator=generator)
    for column in (row, position, head):
        column[4:8] = column[3]
    kinds = ["add", "delete", "replace", "delete", "add", "replace", "add", "delete"]
    kinds += ["add"] * (count - len(kinds))
    left, right = torch.randn(count, K, generator=generator), torch.randn(count, V, generator=generator)
    return Edits(row, position, head, left, right, kinds, torch.randint(0, 2, (count,), generator=generator))


def run(target, x, **options):
    """The op on a target, on poisoned memory, from and to CPU tensors."""
    with poisoned_memory(), target.in_use():
        return to_cpu(ops.gated_delta_rule(**target.put(x), **target.put(options), backend=target.kind))


def tolerance(target, x, got):
    """Allowed of an output tensor. The CPU computes in float32; the others in the inputs' type where they share one."""
    if target.kind == "cpu":
        return TOLERANCE[got.dtype]
    kinds = {x[name].dtype for name in "qkv"}
    return max(TOLERANCE[got.dtype], DEVICE_TOLERANCE[kinds.pop() if len(kinds) == 1 else torch.float32])


def compare(x, record=None, targets=FEW, **options):
    """Runs the kernels, then the reference in float64 on the same numbers; compares everything.

    Returns the outputs by target.
    """
    options = {"output_final_state": True, "return_writes": True, **options}
    outs = [run(target, x, **options) for target in targets]
    wide = {name: value.double() for name, value in x.items()}
    if options.get("initial_state") is not None:
        options["initial_state"] = options["initial_state"].double()
    expected = ops.gated_delta_rule(**wide, **options, backend="reference")
    for target, got in zip(targets, outs, strict=True):
        pairs = {
            "o": (got.o, expected.o),
            "final_state": (got.final_state, expected.final_state),
            "left": (got.writes.left, expected.writes.left),
            "right": (got.writes.right, expected.writes.right),
        }
        if options.get("snapshots") is not None:
            pairs["snapshots"] = (got.snapshots, expected.snapshots)
        assert got.o.dtype == x["v"].dtype
        found = [
            check_close(f"{name} with {target.name}", a, b, tolerance(target, x, a)) for name, (a, b) in pairs.items()
        ]
        if record is not None and (target.kind != "cpu" or x["v"].dtype == torch.float32):
            label = target.kind if target.kind == "cpu" else f"{target.kind} {x['v'].dtype}".replace("torch.", "")
            record(f"relative_rms {label}", max(f.rms for f in found))
            record(f"worst_element {label}", max(f.worst for f in found))
    return outs


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127])
def test_lengths(T, record_property):
    x = gated_delta_rule_inputs(2, T, 2, 4, 32, 64)
    initial = torch.randn(2, 4, 32, 64)
    compare(x, record_property, ALL, use_qk_l2norm=True, initial_state=initial, snapshots=[0, T // 2, T - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("initial", [False, True])
def test_one_token(dtype, initial, record_property):
    """What a cached decoding step asks for: sizes that no block divides, strided inputs, edits, a place named twice."""
    x = gated_delta_rule_inputs(3, 3, 2, 6, 40, 33)
    x = {name: value.to(dtype)[:, 1:2] for name, value in x.items()}
    assert not x["v"].is_contiguous()
    options = {"edits": edits_for(3, [1, 1, 1], 6, 40, 33), "snapshots": torch.tensor([[2, 0], [0, 0], [2, 0]])}
    options["initial_state"] = torch.randn(3, 6, 40, 33) if initial else None
    compare(x, record_property, ALL, use_qk_l2norm=True, **options)


@pytest.mark.parametrize("K, V", [(32, 64), (128, 256), (64, 40), (256, 128), (20, 12), (7, 5), (1, 1), (128, 33)])
def test_sizes(K, V, record_property):
    x = gated_delta_rule_inputs(1, 37, 1, 2, K, V)
    edits = edits_for(1, [37], 2, K, V)
    compare(x, record_property, ALL, use_qk_l2norm=True, edits=edits, snapshots=[3, 36])


@pytest.mark.parametrize("Hk, H", [(1, 1), (1, 6), (2, 6), (4, 4)])
def test_grouped_heads(Hk, H, record_property):
    compare(gated_delta_rule_inputs(2, 21, Hk, H, 16, 24), record_property, use_qk_l2norm=True, scale=0.7)


def test_keys_as_given(record_property):
    x = gated_delta_rule_inputs(2, 50, 1, 2, 24, 40, correlated=True)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    compare(x, record_property)


def test_long(record_property):
    x = gated_delta_rule_inputs(1, 4096, 1, 1, 32, 24, correlated=True, decay="weak")
    edits = edits_for(1, [4096], 1, 32, 24)
    compare(x, record_property, use_qk_l2norm=True, edits=edits, snapshots=[1000, 1023, 1024, 4095])


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
def test_decay(decay, correlated, record_property):
    x = gated_delta_rule_inputs(1, 130, 1, 2, 32, 48, decay=decay, correlated=correlated)
    compare(x, record_property, ALL, use_qk_l2norm=True, initial_state=torch.randn(1, 2, 32, 48), snapshots=[64, 129])


def test_underflowing_decay(record_property):
    x = gated_delta_rule_inputs(1, 40, 1, 1, 16, 16)
    x["g"][:, 5::7] = -200.0
    x["g"][:, 6::7] = -float("inf")
    compare(x, record_property, use_qk_l2norm=True)


def test_packed(record_property):
    lengths = [5, 0, 1, 66, 0, 127, 1, 0]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    x = gated_delta_rule_inputs(1, 200, 2, 4, 24, 40)
    places = torch.tensor([[5, 126], [0, 0], [3, 65], [3, 3], [6, 0], [3, 3]])
    initial = torch.randn(8, 4, 24, 40)
    edits = edits_for(8, lengths, 4, 24, 40, count=20)
    compare(
        x, record_property, ALL, cu_seqlens=offsets, initial_state=initial, snapshots=places, edits=edits,
        use_qk_l2norm=True,
    )  # fmt: skip
    compare(x, record_property, ALL, cu_seqlens=offsets.int(), use_qk_l2norm=True)


def test_packed_equals_alone(target):
    x = gated_delta_rule_inputs(1, 70, 1, 2, 16, 24)
    options = {"use_qk_l2norm": True, "output_final_state": True}
    both = run(target, x, cu_seqlens=torch.tensor([0, 30, 70]), **options)
    for n, part in enumerate((slice(0, 30), slice(30, 70))):
        alone = {name: value[:, part] for name, value in x.items()}
        out = run(target, alone, **options)
        assert torch.equal(out.o, both.o[:, part]) and torch.equal(out.final_state[0], both.final_state[n])


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("kind", KINDS)
def test_edit_kinds(kind, when, record_property):
    B, T, H, K, V = 3, 19, 2, 20, 36
    x = gated_delta_rule_inputs(B, T, 1, H, K, V, decay="weak", correlated=True)
    row, position = [0, 1, 2, 2, -1, -1], [0, T - 1, 7, 7, 8, 3]
    edits = Edits(row, position, [0, 1, 1, 1, 0, 1], torch.randn(6, K), torch.randn(6, V), kind, when)
    compare(x, record_property, ALL, use_qk_l2norm=True, edits=edits, snapshots=[0, 7, 8, T - 1])


def test_delete_ignores_its_sides(target):
    x = gated_delta_rule_inputs(1, 9, 1, 1, 8, 8)
    with_sides = Edits([0], [4], [0], torch.randn(1, 8), torch.randn(1, 8), "delete")
    without = Edits.delete([0], [4], [0], 8, 8)
    assert torch.equal(run(target, x, edits=with_sides).o, run(target, x, edits=without).o)
    a, b = (ops.gated_delta_rule(**x, edits=e, backend="reference").o for e in (with_sides, without))
    assert torch.equal(a, b)


def test_edits_leave_the_rest_alone(target):
    """Other rows, other heads and earlier positions come out bit for bit as without the edit."""
    x = gated_delta_rule_inputs(2, 33, 1, 2, 16, 16)
    edits = Edits([1], [13], [1], torch.randn(1, 16), torch.randn(1, 16))
    clean, edited = (run(target, x, use_qk_l2norm=True, edits=e).o for e in (None, edits))
    assert torch.equal(clean[0], edited[0]) and torch.equal(clean[1, :, 0], edited[1, :, 0])
    assert torch.equal(clean[1, :12, 1], edited[1, :12, 1]) and not torch.equal(clean[1, 13:, 1], edited[1, 13:, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    x = gated_delta_rule_inputs(1, 70, 2, 4, 32, 40, dtype=dtype)
    compare(x, targets=ALL, use_qk_l2norm=True, snapshots=[69])


def test_mixed_dtypes():
    x = gated_delta_rule_inputs(1, 30, 1, 2, 32, 40)
    kinds = (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32, torch.float16)
    x = {name: value.to(kind) for (name, value), kind in zip(x.items(), kinds, strict=True)}
    compare(x, use_qk_l2norm=True, initial_state=torch.randn(1, 2, 32, 40).bfloat16())


def test_half_conversions_are_exact(each_target):
    """Every float16 and bfloat16 value goes in and comes out as torch converts it, rounding and subnormals included."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[torch.isfinite(values)].reshape(1, -1, 1, 256).contiguous()
        T = values.shape[1]
        one, zero = torch.ones(1, T, 1, 1), torch.zeros(1, T, 1)
        strong = torch.full((1, T, 1), -float("inf"))
        x = {"q": one, "k": one, "v": values, "g": strong, "beta": zero + 1}
        out = run(each_target, x, scale=1.0, return_writes=True)
        assert torch.equal(out.writes.right.flatten(), values.float().flatten())
        assert torch.equal(out.o, values)
        third = run(each_target, {**x, "beta": zero + 1 / 3}, scale=1.0).o
        assert torch.equal(third.flatten(), (values.float() * torch.tensor(1 / 3)).to(dtype).flatten())


def test_strided_inputs():
    B, T, Hk, H, K, V = 2, 33, 2, 4, 24, 40
    x = gated_delta_rule_inputs(B, T, Hk, H, K, V)
    fused = torch.cat([x["q"].flatten(2), x["k"].flatten(2), x["v"].flatten(2)], 2)
    q, k, v = fused.split([Hk * K, Hk * K, H * V], 2)
    strided = {
        "q": q.unflatten(2, (Hk, K)), "k": k.unflatten(2, (Hk, K)), "v": v.unflatten(2, (H, V)),
        "g": x["g"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "beta": torch.stack([x["beta"], x["beta"]], -1)[..., 1],
    }  # fmt: skip
    assert not any(value.is_contiguous() for value in strided.values())

    def equal(outs, others):
        return all(torch.equal(a.o, b.o) for a, b in zip(outs, others, strict=True))

    expected = compare(x, use_qk_l2norm=True)
    got = compare(strided, use_qk_l2norm=True)
    assert equal(got, expected)
    heads_first = {name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in x.items()}
    assert equal(compare(heads_first, use_qk_l2norm=True), expected)
    size_first = {name: value.transpose(1, -1).contiguous().transpose(1, -1) for name, value in x.items()}
    assert equal(compare(size_first, use_qk_l2norm=True), expected)


def test_threads_agree():
    x = gated_delta_rule_inputs(2, 100, 1, 2, 32, 64)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            outs.append(ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True))
    finally:
        torch.set_num_threads(before)
    for out in outs[1:]:
        assert torch.equal(out.o, outs[0].o) and torch.equal(out.final_state, outs[0].final_state)


# ---- one token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", ["after", "after", "before", "after"]], ids=str)
@pytest.mark.parametrize("K, V", [(32, 64), (20, 12), (64, 40), (128, 256)])
def test_steps_equal_sequence(K, V, when, each_target):
    B, T, Hk, H = 2, 9, 2, 4
    x = gated_delta_rule_inputs(B, T, Hk, H, K, V)
    state = torch.randn(B, H, K, V)
    edits = Edits([0, 1, -1, 0], [3, 3, 5, 5], [1, 0, 2, 2], torch.randn(4, K), torch.randn(4, V),
                  ["add", "delete", "replace", "add"], when)  # fmt: skip
    wide = {name: value.double() for name, value in x.items()}
    expected = ops.gated_delta_rule(
        **wide, use_qk_l2norm=True, initial_state=state.double(), edits=edits, return_writes=True, snapshots=range(T),
        backend="reference",
    )  # fmt: skip
    state = each_target.put(state)
    for t in range(T):
        now = each_target.put({name: value[:, t] for name, value in x.items()})
        here = edits[edits.position == t]
        with poisoned_memory(), each_target.in_use():
            out = ops.gated_delta_rule_step(
                **now, state=state, use_qk_l2norm=True, edits=here if len(here) else None, return_writes=True,
                backend=each_target.kind,
            )  # fmt: skip
        check_close("o", out.o.cpu(), expected.o[:, t])
        check_close("state", state.cpu(), expected.snapshots[:, t])
        check_close("left", out.left.cpu(), expected.writes.left[:, t, :, 0])
        check_close("right", out.right.cpu(), expected.writes.right[:, t, :, 0])


def test_step_backends_agree():
    x = {name: value[:, 0] for name, value in gated_delta_rule_inputs(2, 1, 1, 2, 16, 24).items()}
    start = torch.randn(2, 2, 16, 24)
    states = [start.clone(), start.clone()]
    pairs = zip(states, ("cpu", "reference"), strict=True)
    outs = [ops.gated_delta_rule_step(**x, state=state, backend=backend) for state, backend in pairs]
    check_close("o", outs[0].o, outs[1].o)
    check_close("state", states[0], states[1])
    assert outs[0].left is None and outs[0].right is None


def test_step_refuses():
    x = {name: value[:, 0] for name, value in gated_delta_rule_inputs(2, 1, 1, 2, 16, 24).items()}
    with pytest.raises(ValueError, match=r"state: expected \[B=2, H=2, K=16, V=24\]"):
        ops.gated_delta_rule_step(**x, state=torch.zeros(2, 2, 24, 16))
    with pytest.raises(ValueError, match="state: expected contiguous torch.float32"):
        ops.gated_delta_rule_step(**x, state=torch.zeros(2, 2, 16, 24, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="non-contiguous"):
        ops.gated_delta_rule_step(**x, state=torch.zeros(2, 2, 24, 16).transpose(2, 3))
    with pytest.raises(ValueError, match="v: expected"):
        ops.gated_delta_rule_step(**{**x, "v": x["v"][0]}, state=torch.zeros(2, 2, 16, 24))
    with pytest.raises(RuntimeError, match="no backward"):
        ops.gated_delta_rule_step(**{**x, "v": x["v"].requires_grad_()}, state=torch.zeros(2, 2, 16, 24))


# ---- the operator as torch sees it ----------------------------------------------------------------------------------


def operator_arguments(edits=True, writes=True):
    x = gated_delta_rule_inputs(1, 10, 1, 2, 8, 12)
    packed = pack_edits(edits_for(2, [4, 6], 2, 8, 12)) if edits else (None, None, None)
    places = torch.tensor([[0, 1], [1, 5]]) if edits else None
    offsets = torch.tensor([0, 4, 10]) if edits else None
    return (*x.values(), 0.5, None, True, offsets, *packed, places, writes)


@pytest.mark.parametrize("edits, writes", [(True, True), (False, False)])
def test_opcheck(edits, writes):
    torch.library.opcheck(torch.ops.writesae.gated_delta_rule.default, operator_arguments(edits, writes))


@pytest.mark.parametrize("writes", [True, False])
def test_opcheck_step(writes):
    x = [value[:, 0].contiguous() for value in gated_delta_rule_inputs(2, 1, 1, 2, 8, 12).values()]
    arguments = (*x, torch.randn(2, 2, 8, 12), 0.5, True, None, None, None, writes)
    torch.library.opcheck(torch.ops.writesae.gated_delta_rule_step.default, arguments)


def test_operator_checks_bounds():
    """A direct call that skips the wrapper is refused before anything is read out of bounds."""
    good = list(operator_arguments())
    op = torch.ops.writesae.gated_delta_rule
    bad_index = good[9].clone()
    bad_index[0, 1] = 99
    cases = {
        1: (good[1][:, :5], "k has the wrong shape"), 8: (torch.tensor([0, 11, 10]), "cu_seqlens must rise"),
        9: (bad_index, "outside its row"), 12: (torch.tensor([[0, 4]]), "snapshot 0 is out of range"),
        10: (good[10][:, :3], "edit_left has the wrong shape"), 2: (good[2].double(), "v must be float32"),
    }  # fmt: skip
    for place, (value, message) in cases.items():
        arguments = list(good)
        arguments[place] = value
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    unsorted = list(good)
    unsorted[9] = good[9].flip(0).contiguous()
    with pytest.raises(RuntimeError, match="sorted"):
        op(*unsorted)


def test_gradcheck_reference():
    x = {name: value.double().requires_grad_() for name, value in gated_delta_rule_inputs(1, 5, 1, 2, 3, 4).items()}
    initial = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    sides = [torch.randn(5, size, dtype=torch.float64, requires_grad=True) for size in (3, 4)]

    def run(*inputs):
        where = [0] * 5, [1, 3, 2, 3, 4], [0, 1, 1, 1, 0]
        kinds = "delete", "add", "replace", "add", "delete"
        edits = Edits(*where, *inputs[6:], kinds, ["before", "before", "after", "after", "after"])
        o, final, _, right, shots = reference(*inputs[:5], 0.5, inputs[5], True, None, edits, torch.tensor([[0, 2]]))
        return o, final, right, shots

    assert torch.autograd.gradcheck(run, (*x.values(), initial, *sides))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(2, 6, 4)}, r"v: expected \[B, T, H, V\]"),
        ({"k": torch.zeros(2, 7, 2, 8)}, r"k: expected \[B=2, T=6, Hk dividing H=4, K\]"),
        ({"k": torch.zeros(2, 6, 3, 8)}, "k: expected .* Hk dividing H=4"),
        ({"q": torch.zeros(2, 6, 2, 9)}, "q: expected the shape of k"),
        ({"g": torch.zeros(2, 6, 2)}, r"g: expected \[B=2, T=6, H=4\]"),
        ({"beta": torch.zeros(2, 6)}, r"beta: expected \[B=2, T=6, H=4\]"),
        ({"v": torch.zeros(2, 6, 4, 5, dtype=torch.int64)}, "v: expected a floating dtype, got torch.int64"),
        ({"initial_state": torch.zeros(2, 4, 5, 8)}, r"initial_state: expected \[N=2, H=4, K=8, V=5\]"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens: packed sequences need B = 1, got B = 2"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens: expected .* integers"),
        ({"snapshots": [6]}, "snapshots: .* got row 0, position 6"),
        ({"snapshots": torch.zeros(2, 3, dtype=torch.int64)}, r"snapshots: expected \[P, 2\]"),
        ({"edits": Edits.delete([2], [0], [0], 8, 5)}, "edits.row: expected -1 <= row < 2, got 2"),
        ({"edits": Edits.delete([0], [6], [0], 8, 5)}, "edits.position: expected 0 <= position < 6"),
        ({"edits": Edits.delete([0], [0], [4], 8, 5)}, "edits.head: expected 0 <= head < 4, got 4"),
        ({"edits": Edits.delete([0], [0], [0], 5, 8)}, r"edits: expected left \[E, K=8\]"),
        ({"backend": "gpu"}, "backend: expected one of reference, cpu, cuda or None, got 'gpu'"),
        ({"backend": "cuda"}, "cannot run this"),
        ({"q": torch.zeros(2, 6, 2, 8).double(), "backend": "cpu"}, "q is torch.float64, expected float32"),
    ],
)
def test_bad_input(change, message):
    x = gated_delta_rule_inputs(2, 6, 2, 4, 8, 5)
    with pytest.raises(ValueError, match=message):
        ops.gated_delta_rule(**{**x, **change})


def test_bad_offsets():
    x = gated_delta_rule_inputs(1, 6, 1, 1, 8, 5)
    for offsets in ([1, 6], [0, 5], [0, 4, 2, 6], [0]):
        with pytest.raises(ValueError, match="cu_seqlens: expected offsets rising from 0 to T=6"):
            ops.gated_delta_rule(**x, cu_seqlens=torch.tensor(offsets))


def test_no_tokens():
    with pytest.raises(ValueError, match="at least one token"):
        ops.gated_delta_rule(**gated_delta_rule_inputs(1, 0, 1, 1, 8, 5))


def test_nan_stays_where_it_is(target):
    """A NaN spoils its own head from its own token on, nothing before: `first_nonfinite` names the place.

    The CUDA kernels take tokens in chunks, and in there it spoils tokens before it too.
    """
    for T, bad in ((40, 21), (40, 23), (5, 4), (200, 150)):
        x = gated_delta_rule_inputs(2, T, 2, 2, 16, 24)
        x["k"][1, bad, 1, 3] = float("nan")
        out = run(target, x, use_qk_l2norm=True, return_writes=True)
        right = out.writes.right[:, :, :, 0]
        first = bad if target.kind == "cpu" else bad // CHUNK * CHUNK
        row, position, head = ops.first_nonfinite(right)
        assert (row, head) == (1, 1) and first <= position <= bad
        finite = torch.isfinite(out.o).all(-1)
        assert finite[0].all() and finite[1, :, 0].all() and finite[1, :first, 1].all() and not finite[1, bad:, 1].any()
    assert ops.first_nonfinite(torch.zeros(1, 2, 3, 4)) is None
    assert ops.first_nonfinite(torch.full((1, 2, 3, 4), 3e38)) is None


def test_isa_by_environment():
    code = "from writesae._library import cpu_isa; print(cpu_isa()['kernels'])"

    def run(value):
        environment = {**os.environ, "WRITESAE_CPU_ISA": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("portable").stdout.strip() == "portable"
    assert 'WRITESAE_CPU_ISA: expected avx512, avx2 or portable, got "sse9"' in run("sse9").stderr


def test_difference_sees_errors():
    assert difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])).rms == 0
    assert difference(torch.tensor([float("nan")]), torch.tensor([1.0])).rms == float("inf")
    with pytest.raises(AssertionError, match="worst element"):
        check_close("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))
