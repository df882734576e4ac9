"""The operators of the rules that have kernels, as torch sees them, and called directly, past the public functions."""

from __future__ import annotations

import pytest
import rules
import torch
from rules import edits_for
from targets import ALL

from writesae import ops
from writesae.ops._dispatch import kernel_error, operators
from writesae.ops.scan import pack_edits

KIND = "scans"  # cases whose operators are alike


def operator(case, suffix=""):
    return getattr(torch.ops.writesae, case.rule.name + suffix)


def arguments(case, edits=True, writes=True):
    """Of the scan's operator; its backward's but for what the forward made."""
    packed = pack_edits(edits_for(2, [4, 6], 2, 8, 12)) if edits else (None, None, None)
    places = torch.tensor([[0, 1], [1, 5]]) if edits else None
    offsets = torch.tensor([0, 4, 10]) if edits else None
    normalised = "use_qk_l2norm" in case.options
    return (
        *rules.operator_inputs(case, 1, 10, 1, 2, 8, 12).values(),
        0.5,
        None,
        normalised,
        offsets,
        *packed,
        places,
        writes,
        *rules.operator_erase(case, 1, 10, 1, 2, 8, 12),
    )


def with_gradients(values):
    return tuple(
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values
    )


def has_backward(case):
    return bool([t for t in rules.targets(case, "few", gradient=True) if t.kind == "cpu"])


@pytest.mark.parametrize("edits, writes", [(True, True), (False, False)])
def test_opcheck(edits, writes, case):
    given = arguments(case, edits, writes)
    torch.library.opcheck(operator(case).default, with_gradients(given) if has_backward(case) else given)


@pytest.mark.parametrize("writes", [True, False])
def test_opcheck_step(writes, step_case):
    case = step_case
    x = [value[:, 0].contiguous() for value in rules.operator_inputs(case, 2, 1, 1, 2, 8, 12).values()]
    normalised = "use_qk_l2norm" in case.options
    erase = (y if y is None else y[:, 0].contiguous() for y in rules.operator_erase(case, 2, 1, 1, 2, 8, 12))
    given = (*x, torch.randn(2, 2, 8, 12), 0.5, normalised, None, None, None, writes, *erase)
    torch.library.opcheck(operator(case, "_step").default, given)


def test_opcheck_backward(case):
    if not has_backward(case):
        pytest.skip("no backward")
    given, erase = arguments(case)[:13], arguments(case)[14:]
    outputs = operator(case)(*given, True, *erase)
    gradients = [outputs[3], *(torch.randn_like(x) for x in outputs[:5]), *erase]
    if erase:
        gradients += [None, None] if erase[0] is None else [outputs[6], torch.randn_like(outputs[6])]
    torch.library.opcheck(operator(case, "_backward").default, (*given, *gradients))
    bad = [*given, *gradients]
    bad[14] = gradients[1][:, :5]
    with pytest.raises(RuntimeError, match=f"{case.rule.name}_backward: d_o has the wrong shape"):
        operator(case, "_backward")(*bad)


def test_bounds_are_checked(case):
    """A direct call that skips the wrapper is refused before anything is read out of bounds."""
    good = list(arguments(case))
    bad_index = good[9].clone()
    bad_index[0, 1] = 99
    cases = {
        1: (good[1][:, :5], "k has the wrong shape"), 8: (torch.tensor([0, 11, 10]), "cu_seqlens must rise"),
        9: (bad_index, "outside its row"), 12: (torch.tensor([[0, 4]]), "snapshot 0 is out of range"),
        10: (good[10][:, :3], "edit_left has the wrong shape"), 2: (good[2].double(), "v must be float32"),
        3: (good[3][:, :, :1], "g .*has the wrong shape"), 4: (good[4][:, :, :1], "beta has the wrong shape"),
    }  # fmt: skip
    for place, (value, message) in cases.items():
        given = list(good)
        given[place] = value
        with pytest.raises(RuntimeError, match=message):
            operator(case)(*given)
    unsorted = list(good)
    unsorted[9] = good[9].flip(0).contiguous()
    with pytest.raises(RuntimeError, match="sorted"):
        operator(case)(*unsorted)


def test_without_writes(case):
    """A direct call that does not keep the increments gets the same gradients: they are computed anew."""
    if not has_backward(case):
        pytest.skip("no backward")
    found = []
    for writes in (True, False):
        given = with_gradients(arguments(case, writes=writes))
        operator(case)(*given)[0].sum().backward()
        found.append([x.grad for x in given if isinstance(x, torch.Tensor) and x.grad is not None])
    erase = arguments(case)[14:]
    assert len(found[0]) == 7 + sum(x is not None for x in erase) and all(
        torch.equal(a, b) for a, b in zip(*found, strict=True)
    )


def test_no_second_derivative(case):
    if not has_backward(case):
        pytest.skip("no backward")
    x = case.make(1, 5, 1, 2, 3, 4)
    v = x[case.operands[2]].requires_grad_()
    out = case.rule.run(**x, backend="cpu")
    with pytest.raises(RuntimeError, match=f'{case.rule.name}_backward: no backward.*backend="reference"'):
        torch.autograd.grad(out.o.square().sum(), v, create_graph=True)


def test_no_tokens_leave_the_state(case):
    x = rules.operator_inputs(case, 1, 0, 1, 2, 16, 24).values()
    start = torch.randn(2, 2, 16, 24)
    for target in rules.targets(case, "kernels"):
        given = [*x, 1.0, start, False, torch.tensor([0, 0, 0]), *[None] * 4, True]
        given += rules.operator_erase(case, 1, 0, 1, 2, 16, 24)
        given = [target.put(y) for y in given]
        with target.in_use():
            final = getattr(operators(target.kind), case.rule.name)(*given)[1]
        assert torch.equal(final.cpu(), start), target.name


def test_what_is_declared_is_built():
    """Else its cases would be left out without a word."""
    for rule in ops.RULES.values():
        for kind in {target.kind for target in ALL}:
            if ("cpu" if kind == "cpu" else "cuda") in rule.limits:
                assert kernel_error(rule.name, kind) is None, f"{rule.name} with {kind}"
