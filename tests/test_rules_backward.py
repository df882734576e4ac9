"""Every write rule's backward on every target that has it, against autograd through `rules.loop` in float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import rules
import torch
from rules import edits_for, targets
from targets import to_cpu
from test_rules import HALVES, layouts, packed, state_for

from writesae.edits import KINDS, WHENS, Edits
from writesae.testing import check_close, poisoned_memory

GRADIENT = True  # cases that have one
OUTPUTS = ("o", "final_state", "left", "right", "snapshots")


@pytest.fixture
def compare(case, record_property):
    def compare(x, **options):
        return compare_gradients(case, x, record_property, **options)

    return compare


def gradients(case, target, x, initial_state=None, edits=None, wanted=OUTPUTS, **options):
    """Gradients of a random linear function of the wanted outputs, by input name, as CPU tensors; of the loop where the
    target is None."""
    put = (lambda value: value) if target is None else target.put
    leaves = {name: put(value.detach().clone()).requires_grad_() for name, value in x.items()}
    if initial_state is not None:
        leaves["initial_state"] = put(initial_state.detach().clone()).requires_grad_()
    given = {"initial_state": leaves.get("initial_state")}
    if edits is not None:
        leaves["left"], leaves["right"] = (y.detach().clone().requires_grad_() for y in (edits.left, edits.right))
        given["edits"] = replace(edits, left=leaves["left"], right=leaves["right"])
    given |= put(options)
    inputs = {name: leaves[name] for name in x}
    with nullcontext() if target is None else target.in_use():
        if target is None:
            out = rules.loop(case, inputs, **given)
            outputs = {name: getattr(out, name) for name in OUTPUTS}
        else:
            out = case.rule.run(
                **inputs, **{**case.options, **given}, output_final_state=True, return_writes=True, backend=target.kind
            )
            sides = {"left": out.writes.left, "right": out.writes.right}
            outputs = {"o": out.o, "final_state": out.final_state, **sides, "snapshots": out.snapshots}
        generator = torch.Generator().manual_seed(7)
        loss = 0
        for name, value in outputs.items():
            if value is None:
                continue
            weight = torch.randn(value.numel(), generator=generator).bfloat16().double()  # the same in every dtype
            if name in wanted and value.requires_grad:
                loss = loss + (value.double().flatten() * put(weight)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: to_cpu(value) for name, value in zip(leaves, found, strict=True)}


def compare_gradients(case, x, record=None, which="all", on=None, **call):
    """The targets' gradients on poisoned memory, then the loop's on the same numbers. Returns them by target."""
    chosen = targets(case, which, gradient=True) if on is None else on
    found, asked = {}, {**x, "initial_state": call.get("initial_state")}
    for target in chosen:
        wide = (lambda y: rules.doubled(y)) if target.kind == "reference" else (lambda y: y)
        with poisoned_memory():
            found[target.name] = gradients(case, target, wide(x), **{name: wide(value) for name, value in call.items()})
    truth = gradients(case, None, rules.doubled(x), **{name: rules.doubled(value) for name, value in call.items()})
    for target in chosen:
        exact, errors = target.kind == "reference", []
        for name, value in found[target.name].items():
            if value is None:
                assert truth[name] is None or not truth[name].any(), f"d_{name} with {target.name} is missing"
                continue
            given = asked.get(name)
            wanted = torch.float64 if exact else torch.float32 if given is None else given.dtype
            assert value.dtype == wanted, f"d_{name} with {target.name} is {value.dtype}"
            expected = truth[name] if truth[name] is not None else torch.zeros_like(value)
            limit = rules.allowed(case, target, x, value.dtype)
            errors.append(check_close(f"d_{name} of {case.name} with {target.name}", value, expected, limit))
        dtype = torch.float64 if exact else x[case.operands[2]].dtype
        rules.note(record, case, target, dtype, errors)
    return found


@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 127])
def test_lengths(T, case, compare):
    x = case.make(2, T, 2, 4, 24, 40)
    compare(x, initial_state=state_for(case, x), snapshots=[0, T // 2, T - 1])


@pytest.mark.parametrize("K, V", [(32, 64), (64, 40), (20, 12), (7, 5), (1, 1), (128, 33), (33, 256)])
def test_sizes(K, V, case, compare):
    x = case.make(1, 37, 1, 2, K, V)
    edits = edits_for(1, [37], case.sizes(x)[3], K, V)
    # A normalised number is 1 or -1: its gradient is what cancellation leaves.
    options = {"use_qk_l2norm": False} if K == 1 and "use_qk_l2norm" in case.options else {}
    compare(x, initial_state=state_for(case, x), edits=edits, snapshots=[3, 36], **options)


@pytest.mark.parametrize("Hk, H", [(1, 1), (1, 6), (2, 6), (4, 4)])
def test_grouped_heads(Hk, H, case, compare):
    if case.fit(Hk, H) != (Hk, H):
        pytest.skip(f"{case.name} has no such heads")
    compare(case.make(2, 21, Hk, H, 16, 24), which="few")


def test_other_options(case, compare):
    for x, options in case.variants():
        compare(x, **(options or {"which": "few"}))


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
def test_decay(decay, correlated, case, compare):
    x = case.make(1, 130, 1, 2, 32, 48, decay=decay, correlated=correlated)
    # Instruction sets differ in their exponentials, which the forward's test_decay has on each.
    compare(x, which="few", initial_state=state_for(case, x), snapshots=[64, 129])


def test_closed_gates(case, compare):
    x = case.make(1, 70, 1, 1, 16, 24)
    case.close(x)
    compare(x)


def test_zeros(case, compare):
    """Nothing is divided by a strength or by a norm."""
    x = case.make(1, 40, 1, 2, 16, 24)
    for name in ("beta", "dt"):
        if name in x:
            x[name][:, ::3] = 0
    x[case.operands[1]][:, ::5] = 0
    compare(x)


def test_segments(case, compare):
    """Longer than two of the segments between kept states; one head alone is split into column blocks."""
    x = case.make(1, 1100, 1, 1, 16, 80, correlated=True, decay="weak")
    edits = edits_for(1, [1100], 1, 16, 80)
    edits.position[2], edits.position[3:8] = 511, 512
    on = [target for target in targets(case, "kernels", gradient=True) if target.kind == "cpu"]
    if not on:
        pytest.skip("of the CPU's kernels: the others' have every chunk's states")
    compare(x, on=on, initial_state=state_for(case, x), edits=edits, snapshots=[511, 512, 1023, 1099])


def test_packed(case, compare):
    lengths = [5, 0, 1, 66, 0, 127, 1, 0]
    x, offsets = packed(case, lengths, 2, 4, 24, 40)
    places = torch.tensor([[5, 126], [0, 0], [3, 65], [3, 3], [6, 0], [3, 3]])
    edits = edits_for(8, lengths, case.sizes(x)[3], 24, 40, count=20)
    compare(x, initial_state=state_for(case, x, 8), edits=edits, cu_seqlens=offsets, snapshots=places)
    compare(x, which="few", cu_seqlens=offsets.int())


@pytest.mark.parametrize("wanted", OUTPUTS)
def test_one_output_alone(wanted, case, compare):
    x = case.make(1, 30, 1, 2, 16, 24)
    compare(x, which="few", initial_state=state_for(case, x), snapshots=[11], wanted=[wanted])


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("kind", KINDS)
def test_edit_kinds(kind, when, case, compare):
    B, T, K, V = 3, 19, 20, 36
    x = case.make(B, T, 1, 2, K, V, decay="weak", correlated=True)
    h = case.sizes(x)[3] - 1
    row, position, head = [0, 1, 2, 2, -1, -1], [0, T - 1, 7, 7, 8, 3], torch.tensor([0, 1, 1, 1, 0, 1]).clamp(max=h)
    edits = Edits(row, position, head, torch.randn(6, K), torch.randn(6, V), kind, when)
    if "D" in x:  # else values reach o by it too
        x["D"] *= 0
    for got in compare(x, edits=edits, snapshots=[0, 7, 8, T - 1]).values():
        gradient = got[case.operands[2]][2, 7].reshape(h + 1, V)[h]
        assert (not gradient.any()) == (kind != "add" and when == "before")


def test_an_edit_at_every_token(case, compare):
    T, K, V = 40, 12, 20
    x = case.make(1, T, 1, 1, K, V)
    kinds, whens = ((names * T)[:T] for names in (KINDS, ("before", "after", "after", "before")))
    edits = Edits([0] * T, range(T), [0] * T, torch.randn(T, K), torch.randn(T, V), kinds, whens)
    compare(x, edits=edits, snapshots=range(T))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_inputs(dtype, case, compare):
    compare(case.make(1, 70, 2, 4, 32, 40, dtype), snapshots=[69])


def test_mixed_dtypes(case, compare):
    kinds = (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    x = case.make(1, 30, 1, 2, 32, 40)
    x = {name: value.to(kind) for (name, value), kind in zip(x.items(), kinds, strict=False)}
    compare(x, which="few", initial_state=state_for(case, x).bfloat16())


def same(case, name, a, b):
    """To the bit; of what has no tokens to rounding, since torch sums over them."""
    if name in case.fixed:
        check_close(f"d_{name}", a, b, 1e-6)
    else:
        assert torch.equal(a, b), f"d_{name}"


def test_strided_inputs(case, compare):
    x = case.make(2, 33, 2, 4, 24, 40)
    expected = compare(x, which="few")
    strided = list(layouts(case, x))[1]
    for target in targets(case, "few", gradient=True):
        if target.kind == "reference":  # torch's sums go by the layout
            continue
        given = {name: value.detach() for name, value in strided.items()}
        leaves = {name: target.put(value).requires_grad_() for name, value in given.items()}
        assert not leaves[case.operands[0]].is_contiguous()
        with target.in_use():
            out = case.rule.run(**leaves, **case.options, backend=target.kind).o
            # A gradient that is one number expanded, as sum() sends it.
            found = torch.autograd.grad(out.sum(), list(leaves.values()))
        dense = {name: target.put(value.clone()).requires_grad_() for name, value in x.items()}
        with target.in_use():
            out = case.rule.run(**dense, **case.options, backend=target.kind).o
            wanted = torch.autograd.grad(out, list(dense.values()), torch.ones_like(out))
        for name, a, b in zip(leaves, found, wanted, strict=True):
            same(case, name, a, b)
        wide = {name: value.double().requires_grad_() for name, value in x.items()}
        truth = torch.autograd.grad(rules.loop(case, wide).o.sum(), wide[case.operands[2]])[0]
        check_close("d_v", to_cpu(found[list(leaves).index(case.operands[2])]), truth)
    assert expected


@pytest.mark.parametrize("H", [1, 8])
def test_threads_agree(H, case):
    cpu = next((target for target in targets(case, "few", gradient=True) if target.kind == "cpu"), None)
    if cpu is None:
        pytest.skip("of the CPU's kernels")
    x = case.make(1, 600, 1, H, 16, 72)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(gradients(case, cpu, x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in other.items():
            same(case, name, value, found[0][name])


def test_a_head_alone_and_among_others(case):
    """NaN in one head's gradient stays in that head (and its key head), and at its token and before."""
    if case.heads == "one":
        pytest.skip("one head")
    x = case.make(1, 70, 2, 4, 16, 24)
    for target in targets(case, "few", gradient=True):
        leaves = {name: target.put(value.clone()).requires_grad_() for name, value in x.items()}
        with target.in_use():
            out = case.rule.run(**leaves, **case.options, backend=target.kind).o
            weight = torch.ones_like(out)
            weight[0, 30, 3, 2] = float("nan")
            out.backward(weight)
        query, _, value = (leaves[name].grad for name in case.operands)
        finite = torch.isfinite(value)
        assert finite[:, :, :3].all() and not finite[:, :31, 3].all()
        heads = query.shape[2] // 2
        assert torch.isfinite(query[:, :, :heads]).all() and torch.isfinite(query[0, 31:, heads:]).all()


def test_no_gradient_where_none_is_asked(case):
    x = case.make(1, 5, 1, 2, 3, 4)
    value = case.operands[2]
    for target in targets(case, "few", gradient=True):
        with target.in_use():
            with torch.no_grad():
                leaf = target.put({**x, value: x[value].clone().requires_grad_()})
                assert not case.rule.run(**leaf, backend=target.kind).o.requires_grad
            assert not case.rule.run(**target.put(x), backend=target.kind).o.requires_grad
