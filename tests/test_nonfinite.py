"""Where increments are not finite, as every rule says it beside what it returns, on every target that has it."""

from __future__ import annotations

import pytest
import rules
import torch
from rules import run, targets
from targets import TRUNCATING

from writesae import ops
from writesae.edits import Edits
from writesae.ops.nonfinite import of_heads, place_of

BAD = (float("nan"), float("inf"), -float("inf"))
CHUNK = 64  # of the CUDA kernels, where a NaN spoils tokens before it in some rules


def first_of(right) -> list[int]:
    """Of each row of increments `[B, T, H, ...]`, place by place."""
    bad = [[(t * right.shape[2] + h) for t, row in enumerate(rows) for h, x in enumerate(row) if not _finite(x)]
           for rows in right]  # fmt: skip
    return [min(places, default=-1) for places in bad]


def _finite(x) -> bool:
    return all(abs(y) < float("inf") for y in x.flatten().tolist())


def check(case, target, x, expected, **call):
    """expected: `[B]` places, t H + h. Where tokens meet in products of a chunk, it may stand earlier in that chunk."""
    out = run(case, target, x, **call)
    found = out.first_nonfinite.tolist()
    assert out.first_nonfinite.dtype == torch.int64 and found == first_of(out.writes.right), target.name
    H = out.writes.right.shape[2]
    if target.kind in ("reference", "cpu") or case.name in ("ssd", "gla", "selective_scan"):
        assert found == expected, target.name
    for at, where in zip(found, expected, strict=True):
        assert (at < 0) == (where < 0) and at <= where and at // H >= where // H // CHUNK * CHUNK, target.name


def plant(case, x, *places, value=BAD[0]):
    """Changes v at (row, token, head), in its column `token % V`; returns the places as t H + h by row."""
    v = x[case.operands[2]]
    H = 1 if case.heads == "one" else v.shape[2]
    first = [-1] * v.shape[0]
    for b, t, h in places:
        at = (b, t, t % v.shape[-1]) if case.heads == "one" else (b, t, h % H, t % v.shape[-1])
        v[at] = value
        number = t * H + h % H
        first[b] = number if first[b] < 0 else min(first[b], number)
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_first_of_each_row(dtype, case):
    """Rows, tokens and heads in this order, wherever in a chunk, a block of columns or the last tokens they stand."""
    for value, places in zip(
        (*BAD, BAD[0]),
        (
            [(1, 69, 3), (1, 69, 0)],
            [(0, 0, 1), (1, 33, 2), (1, 33, 1)],
            [(0, 69, 0)],
            [(0, 12, 3), (0, 13, 0), (1, 1, 2)],
        ),
        strict=True,
    ):
        x = case.make(2, 70, 2, 4, 16, 72, dtype)
        expected = plant(case, x, *places, value=value)
        for target in targets(case):
            check(case, target, x, expected)


@pytest.mark.parametrize("K, V", [(1, 1), (7, 5), (256, 40), (128, 136), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(dtype, K, V, case):
    """Also in the last column, whatever the keys: zeros make a NaN of an infinity too."""
    x = case.make(1, 67, 1, 1, K, V, dtype)
    x[case.operands[1]][:, 30:] = 0
    v = x[case.operands[2]]
    (v[0, 65] if case.heads == "one" else v[0, 65, 0])[-1] = float("inf")
    for target in targets(case, "few"):
        check(case, target, x, [65])


def test_nothing_where_all_is_finite(case):
    """Sums of the increments, and states, may overflow."""
    x = case.make(2, 40, 1, 2, 16, 24)
    for name in (case.operands[1], "a"):
        if name in x:
            x[name] *= 1e-3
    huge = {**x, case.operands[2]: torch.full_like(x[case.operands[2]], 1e36)}
    if "dt" in x:
        huge["dt"] = torch.ones_like(x["dt"])
    for target in targets(case):
        assert run(case, target, x).first_nonfinite.tolist() == [-1, -1], target.name
        out = run(case, target, huge)
        assert not out.writes.right.sum().isfinite() and out.first_nonfinite.tolist() == [-1, -1], target.name
    if case.name in ("ssd", "gla", "selective_scan"):
        huge[case.operands[1]] = torch.full_like(x[case.operands[1]], 20.0)
        if "A" in x:
            huge["A"] = torch.zeros_like(x["A"])
        if "g" in x:
            huge["g"] = torch.zeros_like(x["g"])
        for target in targets(case):
            out = run(case, target, huge)
            # What a sum of products that is cut off makes of an overflow is the hardware's business.
            assert target.name in TRUNCATING or not out.final_state.isfinite().any(), target.name
            assert out.first_nonfinite.tolist() == [-1, -1], target.name


def test_a_broken_start(case):
    """What reads a broken state writes what is broken; what only adds does not."""
    x = case.make(2, 20, 1, 2, 16, 24)
    start = torch.zeros(2, case.sizes(x)[3], 16, 24)
    start[1, -1, 3, 5] = float("inf")
    adds = case.name in ("ssd", "gla", "selective_scan")
    for target in targets(case):
        check(case, target, x, [-1, -1 if adds else case.sizes(x)[3] - 1], initial_state=start)


def test_packed(case):
    """A packed batch is one row, its tokens counted through."""
    lengths = [5, 0, 1, 66, 40]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    for places in ([(0, 5, 1)], [(0, 111, 1), (0, 71, 0)], [(0, 30, 0), (0, 3, 1)]):
        x = case.make(1, sum(lengths), 1, 2, 16, 24)
        expected = plant(case, x, *places)
        for target in targets(case):
            check(case, target, x, expected, cu_seqlens=offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments(dtype, case):
    """A long sequence of few heads, which blocks share. On a CUDA device a first pass makes states and no report."""
    T = 1600 if dtype == torch.bfloat16 else 832
    for t in (T - 1, T // 2, 3):
        x = case.make(1, T, 1, 1, 16, 24, dtype)
        expected = plant(case, x, (0, t, 0), (0, T - 1, 0))
        for target in targets(case, "devices") or targets(case, "few"):
            check(case, target, x, expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["add", "delete", "replace"])
def test_edits(kind, when, case):
    """A write that is removed before its read is not made; one that is removed after it was, and is told of."""
    T = 40
    x = case.make(2, T, 1, 2, 16, 24)
    head = case.sizes(x)[3] - 1
    expected = plant(case, x, (1, 21, head))
    edits = Edits([1, 0], [21, 7], [head, head], torch.randn(2, 16), torch.randn(2, 24), kind, when)
    for target in targets(case):
        out = run(case, target, x, edits=edits)
        assert out.first_nonfinite.tolist() == first_of(out.writes.right), target.name
        if target.kind in ("reference", "cpu"):
            gone = kind != "add" and when == "before"
            assert out.first_nonfinite.tolist() == ([-1, -1] if gone else expected), target.name


def test_step(step_case):
    case = step_case
    for places in ([], [(0, 0, 3), (2, 0, 2), (2, 0, 1)], [(1, 0, 0)]):
        x = case.make(3, 1, 2, 4, 16, 72)
        expected = plant(case, x, *places, value=BAD[len(places) // 2])
        H = case.sizes(x)[3]
        one = case.tokens(x, lambda y: y[:, 0].contiguous())
        for target in targets(case):
            check(case, target, x, expected)
            with target.in_use(), torch.no_grad():
                state = torch.zeros(3, H, 16, 72)
                given = target.put({**one, "state": state})
                out = case.step(**given, **case.options, return_writes=True, backend=target.kind)
                assert out.first_nonfinite.tolist() == expected == first_of(out.right[:, None]), target.name
                assert case.step(**given, **case.options, backend=target.kind).first_nonfinite is None


def test_only_with_writes_and_without_a_gradient(case):
    x = case.make(2, 5, 1, 2, 8, 12)
    expected = plant(case, x, (1, 2, 0))
    x[case.operands[1]].requires_grad_()
    for target in targets(case, "few", gradient=True):
        with target.in_use():
            given = target.put(x)
            assert case.rule.run(**given, **case.options, backend=target.kind).first_nonfinite is None
            out = case.rule.run(**given, **case.options, return_writes=True, backend=target.kind)
        assert out.o.requires_grad and not out.first_nonfinite.requires_grad
        assert (out.first_nonfinite.cpu() < 0).tolist() == [at < 0 for at in expected]
        out.o[0].sum().backward()


@pytest.mark.filterwarnings("ignore:.*running the slow")
def test_vmap(case):
    x = {name: torch.stack([y, y]) for name, y in case.make(2, 5, 1, 2, 8, 12).items()}
    x[case.operands[2]][1, 0, 3] = float("nan")
    for target in targets(case, "few"):
        with target.in_use():
            found = torch.vmap(
                lambda y, kind=target.kind: (
                    case.rule.run(**y, **case.options, return_writes=True, backend=kind).first_nonfinite
                )
            )(target.put(x)).cpu()
        assert found.shape == (2, 2) and (found < 0).tolist() == [[True, True], [False, True]], target.name


def test_places():
    assert place_of(torch.tensor([-1, -1]), 3) is None
    assert place_of(torch.tensor([-1, 7, 2]), 3) == (1, 2, 1)
    heads = torch.tensor([[-1, 4, 2], [-1, -1, 2], [-1, 3, -1]])  # [H, B]
    assert of_heads(heads.unbind()).tolist() == [-1, 3 * 3 + 2, 2 * 3]
    right = torch.zeros(2, 3, 2, 4)
    right[1, 2, 1, 3] = right[1, 2, 0, 0] = float("inf")
    assert ops.first_nonfinite(right) == (1, 2, 0)


def test_rules_are_all_here():
    assert {case.rule.name for case in rules.cases()} == set(ops.RULES)
