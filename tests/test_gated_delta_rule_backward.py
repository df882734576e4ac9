"""The backward of `gated_delta_rule`, CPU and CUDA kernels, against autograd through the float64 reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from targets import ALL, FEW, to_cpu
from test_gated_delta_rule import edits_for, operator_arguments

from writesae import ops
from writesae.edits import KINDS, WHENS, Edits
from writesae.testing import DEVICE_TOLERANCE, check_close, gated_delta_rule_inputs, poisoned_memory

# Relative RMS error allowed, by the dtype of the gradient. Measured over every case below on AVX-512, AVX2 and portable
# code: float32 at most 1.9e-6, worst element 2.5e-6 of the largest; the halves' is the rounding of the gradient itself.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def gradients(x, initial_state=None, edits=None, target=None, wanted=None, use_qk_l2norm=True, **options):
    """Gradients of a random linear function of every output (or of the `wanted` ones), by input name, as CPU tensors.

    Without a target, of the reference.
    """
    put = (lambda value: value) if target is None else target.put
    leaves = {name: put(value.detach()).requires_grad_() for name, value in x.items()}
    if initial_state is not None:
        leaves["initial_state"] = put(initial_state.detach()).requires_grad_()
    if edits is not None:
        leaves["left"], leaves["right"] = edits.left.detach().requires_grad_(), edits.right.detach().requires_grad_()
        edits = replace(edits, left=leaves["left"], right=leaves["right"])
    arguments = {name: value for name, value in leaves.items() if name not in ("left", "right")}
    with nullcontext() if target is None else target.in_use():
        out = ops.gated_delta_rule(
            **arguments, edits=edits, output_final_state=True, return_writes=True, use_qk_l2norm=use_qk_l2norm,
            backend="reference" if target is None else target.kind, **put(options),
        )  # fmt: skip
        outputs = {
            "o": out.o, "final_state": out.final_state, "left": out.writes.left, "right": out.writes.right,
            "snapshots": out.snapshots,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(7)
        loss = 0
        for name, value in outputs.items():
            if value is None:
                continue
            weight = torch.randn(value.shape, generator=generator).bfloat16().double()  # the same number in every dtype
            if wanted is None or name in wanted:
                loss = loss + (value.double() * put(weight)).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: to_cpu(value) for name, value in zip(leaves, found, strict=True)}


def tolerance(target, x, dtype):
    """Allowed of a gradient. The CUDA kernels take their forward's increments, as exact as DEVICE_TOLERANCE says."""
    kinds = {x[name].dtype for name in "qkv"}
    if target.kind == "cpu" or len(kinds) > 1:
        return TOLERANCE[dtype]
    return max(TOLERANCE[dtype], DEVICE_TOLERANCE[kinds.pop()])


def compare(x, record=None, targets=FEW, initial_state=None, edits=None, **options):
    """The kernels' gradients on poisoned memory, then the reference's in float64 on the same numbers.

    Returns the gradients by target.
    """
    found = []
    for target in targets:
        with poisoned_memory():
            found.append(gradients(x, initial_state, edits, target, **options))
    wide = {name: value.double() for name, value in x.items()}
    initial = None if initial_state is None else initial_state.double()
    if edits is not None:
        edits = replace(edits, left=edits.left.double(), right=edits.right.double())
    expected = gradients(wide, initial, edits, **options)
    for target, got in zip(targets, found, strict=True):
        for name, value in got.items():
            given = x.get(name, initial_state if name == "initial_state" else None)
            assert value.dtype == (torch.float32 if given is None else given.dtype)
            truth = expected[name] if expected[name] is not None else torch.zeros_like(value)
            error = check_close(f"d_{name} with {target.name}", value, truth, tolerance(target, x, value.dtype))
            if record is not None and (target.kind != "cpu" or value.dtype == torch.float32):
                label = target.kind if target.kind == "cpu" else f"{target.kind} {x['v'].dtype}".replace("torch.", "")
                record(f"relative_rms {label}", error.rms)
                record(f"worst_element {label}", error.worst)
    return found


@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 127])
def test_lengths(T, record_property):
    x = gated_delta_rule_inputs(2, T, 2, 4, 24, 40)
    compare(x, record_property, ALL, torch.randn(2, 4, 24, 40), snapshots=[0, T // 2, T - 1])


@pytest.mark.parametrize("K, V", [(32, 64), (64, 40), (20, 12), (7, 5), (1, 1), (128, 33), (33, 256)])
def test_sizes(K, V, record_property):
    x = gated_delta_rule_inputs(1, 37, 1, 2, K, V)
    # A normalised number is 1 or -1: its gradient is what cancellation leaves.
    options = {"snapshots": [3, 36], "use_qk_l2norm": K > 1}
    compare(x, record_property, ALL, torch.randn(1, 2, K, V), edits_for(1, [37], 2, K, V), **options)


@pytest.mark.parametrize("Hk, H", [(1, 1), (1, 6), (2, 6), (4, 4)])
def test_grouped_heads(Hk, H, record_property):
    compare(gated_delta_rule_inputs(2, 21, Hk, H, 16, 24), record_property, scale=0.7)


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("decay", ["none", "weak", "usual", "strong"])
def test_decay(decay, correlated, record_property):
    x = gated_delta_rule_inputs(1, 130, 1, 2, 32, 48, decay=decay, correlated=correlated)
    compare(x, record_property, ALL, torch.randn(1, 2, 32, 48), snapshots=[64, 129])


def test_underflowing_decay(record_property):
    x = gated_delta_rule_inputs(1, 70, 1, 1, 16, 16)
    x["g"][:, 5::7] = -200.0
    x["g"][:, 6::7] = -float("inf")
    compare(x, record_property, ALL)


def test_zero_beta_and_keys(record_property):
    """Nothing is divided by beta or by a norm."""
    x = gated_delta_rule_inputs(1, 40, 1, 2, 16, 24)
    x["beta"][:, ::3] = 0
    x["k"][:, ::5] = 0
    compare(x, record_property, ALL)


def test_keys_as_given(record_property):
    x = gated_delta_rule_inputs(2, 50, 1, 2, 24, 40, correlated=True)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    compare(x, record_property, ALL, use_qk_l2norm=False)


def test_segments(record_property):
    """Longer than two of the segments between kept states; one head alone is split into column blocks."""
    x = gated_delta_rule_inputs(1, 1100, 1, 1, 16, 80, correlated=True, decay="weak")
    edits = edits_for(1, [1100], 1, 16, 80)
    edits.position[2], edits.position[3:8] = 511, 512
    compare(x, record_property, ALL, torch.randn(1, 1, 16, 80), edits, snapshots=[511, 512, 1023, 1099])


def test_packed(record_property):
    lengths = [5, 0, 1, 66, 0, 127, 1, 0]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    x = gated_delta_rule_inputs(1, 200, 2, 4, 24, 40)
    places = torch.tensor([[5, 126], [0, 0], [3, 65], [3, 3], [6, 0], [3, 3]])
    edits = edits_for(8, lengths, 4, 24, 40, count=20)
    compare(x, record_property, ALL, torch.randn(8, 4, 24, 40), edits, cu_seqlens=offsets, snapshots=places)
    compare(x, record_property, cu_seqlens=offsets.int())


@pytest.mark.parametrize("wanted", ["o", "final_state", "left", "right", "snapshots"])
def test_one_output_alone(wanted, record_property):
    x = gated_delta_rule_inputs(1, 30, 1, 2, 16, 24)
    compare(x, record_property, FEW, torch.randn(1, 2, 16, 24), snapshots=[11], wanted=[wanted])


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("kind", KINDS)
def test_edit_kinds(kind, when, record_property):
    B, T, H, K, V = 3, 19, 2, 20, 36
    x = gated_delta_rule_inputs(B, T, 1, H, K, V, decay="weak", correlated=True)
    row, position = [0, 1, 2, 2, -1, -1], [0, T - 1, 7, 7, 8, 3]
    edits = Edits(row, position, [0, 1, 1, 1, 0, 1], torch.randn(6, K), torch.randn(6, V), kind, when)
    for got in compare(x, record_property, ALL, edits=edits, snapshots=[0, 7, 8, T - 1]):
        removed = got["v"][2, 7, 1].abs().sum() + got["beta"][2, 7, 1].abs()
        assert (removed == 0) == (kind != "add" and when == "before")


def test_an_edit_at_every_token(record_property):
    T, K, V = 40, 12, 20
    x = gated_delta_rule_inputs(1, T, 1, 1, K, V)
    kinds, whens = ((names * T)[:T] for names in (KINDS, ("before", "after", "after", "before")))
    edits = Edits([0] * T, range(T), [0] * T, torch.randn(T, K), torch.randn(T, V), kinds, whens)
    compare(x, record_property, ALL, edits=edits, snapshots=range(T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    compare(gated_delta_rule_inputs(1, 70, 2, 4, 32, 40, dtype=dtype), targets=ALL, snapshots=[69])


def test_mixed_dtypes():
    x = gated_delta_rule_inputs(1, 30, 1, 2, 32, 40)
    kinds = (torch.bfloat16, torch.float16, torch.bfloat16, torch.float32, torch.float16)
    x = {name: value.to(kind) for (name, value), kind in zip(x.items(), kinds, strict=True)}
    compare(x, initial_state=torch.randn(1, 2, 32, 40).bfloat16())


def test_strided_inputs():
    B, T, Hk, H, K, V = 2, 33, 2, 4, 24, 40
    x = gated_delta_rule_inputs(B, T, Hk, H, K, V)
    expected = compare(x)
    strided = {name: value.transpose(1, -1).contiguous().transpose(1, -1) for name, value in x.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    for got, of_dense in zip(compare(strided), expected, strict=True):
        for name, value in got.items():
            assert torch.equal(value, of_dense[name])
    # A gradient that is one number expanded, as sum() sends it.
    wide = {name: value.double() for name, value in x.items()}
    truth = wide["v"].requires_grad_()
    ops.gated_delta_rule(**wide, backend="reference").o.sum().backward()
    for target in FEW:
        leaf = target.put(x["v"].clone()).requires_grad_()
        with target.in_use():
            ops.gated_delta_rule(**target.put({**x, "v": leaf}), backend=target.kind).o.sum().backward()
        check_close("d_v", to_cpu(leaf.grad), truth.grad)


@pytest.mark.parametrize("H", [1, 8])
def test_threads_agree(H):
    cpu = next((target for target in FEW if target.kind == "cpu"), None)
    if cpu is None:
        pytest.skip("of the CPU's kernels")
    x = gated_delta_rule_inputs(1, 600, 1, H, 16, 72)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(gradients(x, target=cpu))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


def test_a_head_alone_and_among_others(target):
    """NaN in one head's gradient stays in that head (and its key head)."""
    x = gated_delta_rule_inputs(1, 70, 2, 4, 16, 24)
    leaves = {name: target.put(value).requires_grad_() for name, value in x.items()}
    with target.in_use():
        out = ops.gated_delta_rule(**leaves, backend=target.kind).o
        weight = torch.ones_like(out)
        weight[0, 30, 3, 2] = float("nan")
        out.backward(weight)
    for name in ("v", "g", "beta"):
        finite = torch.isfinite(leaves[name].grad)
        assert finite[:, :, :3].all() and not finite[:, :31, 3].all()
    assert torch.isfinite(leaves["q"].grad[:, :, 0]).all() and torch.isfinite(leaves["q"].grad[0, 31:, 1]).all()


# ---- as torch sees it -----------------------------------------------------------------------------------------------


def with_gradients(arguments):
    return tuple(
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    )


@pytest.mark.parametrize("edits, writes", [(True, True), (False, False)])
def test_opcheck(edits, writes):
    arguments = with_gradients(operator_arguments(edits, writes))
    torch.library.opcheck(torch.ops.writesae.gated_delta_rule.default, arguments)


def test_opcheck_backward():
    arguments = operator_arguments()[:-1]
    outputs = torch.ops.writesae.gated_delta_rule(*arguments, True)
    given = (outputs[3], *(torch.randn_like(x) for x in outputs))
    torch.library.opcheck(torch.ops.writesae.gated_delta_rule_backward.default, (*arguments, *given))
    bad = [*arguments, *given]
    bad[14] = given[1][:, :5]
    with pytest.raises(RuntimeError, match="gated_delta_rule_backward: d_o has the wrong shape"):
        torch.ops.writesae.gated_delta_rule_backward(*bad)


def test_operator_without_writes():
    """A direct call that does not keep the increments gets the same gradients: they are computed anew."""
    found = []
    for writes in (True, False):
        arguments = with_gradients(operator_arguments(writes=writes))
        torch.ops.writesae.gated_delta_rule(*arguments)[0].sum().backward()
        found.append([x.grad for x in arguments if isinstance(x, torch.Tensor) and x.grad is not None])
    assert len(found[0]) == 7 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_second_derivative():
    x = gated_delta_rule_inputs(1, 5, 1, 2, 3, 4)
    v = x["v"].requires_grad_()
    out = ops.gated_delta_rule(**x)
    with pytest.raises(RuntimeError, match='gated_delta_rule_backward: no backward.*backend="reference"'):
        torch.autograd.grad(out.o.square().sum(), v, create_graph=True)


def test_no_gradient_where_none_is_asked():
    x = gated_delta_rule_inputs(1, 5, 1, 2, 3, 4)
    with torch.no_grad():
        assert not ops.gated_delta_rule(**{**x, "v": x["v"].requires_grad_()}).o.requires_grad
    assert not ops.gated_delta_rule(**{**x, "v": x["v"].detach()}).o.requires_grad
