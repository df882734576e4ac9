"""`selective_scan` against transformers' Mamba recurrence; its exponentials; its operators, which are its own."""

from __future__ import annotations

import pytest
import torch
from rules import edits_for
from targets import DEVICES

from writesae import Edits, ops
from writesae.ops._dispatch import operators
from writesae.ops.scan import pack_edits
from writesae.testing import check_close, cpu_isa, poisoned_memory


def inputs(rows=2, T=19, V=9, K=5, dtype=torch.float64):
    return {
        "x": torch.randn(rows, T, V, dtype=dtype), "dt": torch.rand(rows, T, V, dtype=dtype),
        "A": -torch.rand(V, K, dtype=dtype) - 0.1, "B": torch.randn(rows, T, K, dtype=dtype),
        "C": torch.randn(rows, T, K, dtype=dtype), "D": torch.randn(V, dtype=dtype),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", None])
def test_equals_transformers(backend):
    peer = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if not hasattr(peer, "mamba_selective_scan"):
        pytest.skip("this release of transformers has no module-level selective scan")
    x = inputs(dtype=torch.float32)
    out = ops.selective_scan(**x, output_final_state=True, backend=backend)
    turned = (x["x"].transpose(1, 2), x["dt"].transpose(1, 2), x["A"], x["B"].transpose(1, 2), x["C"].transpose(1, 2))
    expected, last = peer.mamba_selective_scan(*turned, D=x["D"], return_last_state=True)
    check_close("o", out.o, expected.transpose(1, 2))
    check_close("final_state", out.final_state[:, 0], last.transpose(1, 2))


def test_continues_from_a_state():
    x = inputs()
    whole = ops.selective_scan(**x, output_final_state=True, backend="reference")
    parts, state = [], None
    for piece in (slice(0, 7), slice(7, 19)):
        now = {name: value[:, piece] if value.ndim == 3 else value for name, value in x.items()}
        out = ops.selective_scan(**now, initial_state=state, output_final_state=True, backend="reference")
        state = out.final_state
        parts.append(out.o)
    check_close("o", torch.cat(parts, 1), whole.o, 1e-14)
    check_close("final_state", state, whole.final_state, 1e-14)


def test_edits_snapshots_and_writes():
    """By hand: one head of V channels, each entry with a decay of its own."""
    x, start, T = inputs(), torch.randn(2, 1, 5, 9, dtype=torch.float64), 19
    p, q = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    edits = Edits([0, 1, -1], [4, 0, T - 1], 0, p, q, ["replace", "delete", "add"], ["before", "after", "after"])
    out = ops.selective_scan(
        **x, initial_state=start, output_final_state=True, edits=edits, snapshots=range(T), return_writes=True,
        backend="reference",
    )  # fmt: skip
    state = start[:, 0]
    for t in range(T):
        gate = (x["dt"][:, t, None] * x["A"].T).exp()
        native = x["B"][:, t, :, None] * (x["dt"] * x["x"])[:, t, None]
        state = gate * state + native
        if t == 4:
            state[0] += torch.outer(p[0], q[0]) - native[0]
        check_close("o", out.o[:, t], torch.einsum("bkv,bk->bv", state, x["C"][:, t]) + x["D"] * x["x"][:, t], 1e-13)
        if t == 0:
            state[1] -= native[1]
        if t == T - 1:
            state = state + torch.outer(p[2], q[2])
        check_close("snapshots", out.snapshots[:, t, 0], state, 1e-13)
    check_close("final_state", out.final_state[:, 0], state, 1e-13)
    check_close("states of the writes", out.writes.states(range(T)), out.snapshots, 1e-12)


def test_half_precision_is_computed_in_float32():
    x = inputs(dtype=torch.float32)
    x |= {name: x[name].bfloat16() for name in ("x", "B", "C")}
    out = ops.selective_scan(**x, output_final_state=True, backend="reference")
    wide = ops.selective_scan(**{n: y.double() for n, y in x.items()}, output_final_state=True, backend="reference")
    assert out.o.dtype == torch.bfloat16 and out.final_state.dtype == torch.float32
    check_close("o", out.o, wide.o)
    check_close("final_state", out.final_state, wide.final_state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 19)}, "x: expected"), ({"dt": torch.zeros(2, 19, 8)}, "dt: expected the shape of x"),
        ({"A": torch.zeros(5, 9)}, r"A: expected \[V=9, K\]"), ({"B": torch.zeros(2, 19, 6)}, "B: expected .*K=5"),
        ({"C": torch.zeros(2, 18, 5)}, "C: expected"), ({"D": torch.zeros(8)}, r"D: expected \[V=9\]"),
        ({"initial_state": torch.zeros(2, 5, 9)}, "initial_state: expected"),
        ({"backend": "cuda"}, 'backend="cuda" cannot run this'),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.selective_scan(**{**inputs(), "backend": "reference", **change})


def test_says_once_that_it_is_slow():
    ops._dispatch._said.clear()
    with pytest.warns(RuntimeWarning, match="selective_scan: running the slow token-by-token reference"):
        ops.selective_scan(**inputs())


def test_gradcheck():
    x = tuple(value.requires_grad_() for value in inputs(1, 3, 3, 2).values())

    def run(*z):
        out = ops.selective_scan(*z, output_final_state=True, backend="reference")
        return out.o, out.final_state

    assert torch.autograd.gradcheck(run, x)


# ---- the kernels ----------------------------------------------------------------------------------------------------


def gates(target, dt, A):
    """e^(dt A) of a target's kernel, `[N]` from `[N]`: what one step leaves of a state of ones."""
    x = {"x": torch.zeros(1, len(dt)), "dt": dt[None], "A": A[:, None], "B": torch.zeros(1, 1), "C": torch.zeros(1, 1)}
    state = torch.ones(1, 1, 1, len(dt))
    with target.in_use():
        given = target.put(x | {"state": state})
        ops.selective_scan_step(**given, backend=target.kind)
    return given["state"].flatten().cpu()


def test_the_exponential_is_good_to_a_few_units(each_target):
    """Beside the error of the exponent itself, which is one product rounded to float32."""
    exponent = torch.cat([-torch.logspace(-8, 1.9, 5000), torch.logspace(-8, 1.9, 501)])
    for dt, A in ((exponent.abs(), exponent.sign()), (exponent.abs() / 3, 3 * exponent.sign())):
        found, truth = gates(each_target, dt, A).double(), (dt.double() * A.double()).exp()
        error = (found / truth - 1).abs()
        assert (error <= 1.8e-7 + 1.2e-7 * exponent.double().abs()).all(), error.max()


def test_gates_at_the_ends(each_target):
    inf, nan = torch.inf, torch.nan
    dt = torch.tensor([0.0, 0.0, 1.0, 200.0, 2e38, 90.0, 1.0, 200.0, nan, 1.0, 1e-30])
    A = torch.tensor([-1.0, -2e38, 0.0, -1.0, -2e38, -2.0, -inf, 1.0, -1.0, nan, -1e-30])
    wanted = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, inf, nan, nan, 1.0])
    torch.testing.assert_close(gates(each_target, dt, A), wanted, rtol=0, atol=0, equal_nan=True)


def test_a_strong_gate_leaves_its_neighbours_alone(target):
    """Kernels choose another way for tokens with strong gates: all others come out to the bit."""
    x = inputs(1, 70, 40, 16, torch.float32)
    strong = {**x, "A": x["A"].clone()}
    strong["A"][7] *= 1e4
    with target.in_use():
        a, b = (ops.selective_scan(**target.put(y), backend=target.kind).o.cpu() for y in (x, strong))
    others = torch.arange(40) != 7
    assert torch.equal(a[:, :, others], b[:, :, others])
    assert not torch.equal(a[:, :, 7], b[:, :, 7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_before_tokens_are_read_in_place(dtype, target):
    """As transformers' layers hold x and dt, `[B, V, T]`; the numbers are those of the dense layout."""
    x = inputs(2, 77, 37, 16, torch.float32)
    x |= {name: x[name].to(dtype) for name in ("x", "dt")}
    turned = x | {name: x[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("x", "dt")}
    with target.in_use(), poisoned_memory():
        a, b = (ops.selective_scan(**target.put(y), return_writes=True, backend=target.kind) for y in (x, turned))
    assert torch.equal(a.o, b.o) and torch.equal(a.writes.right, b.writes.right)


def test_the_step_works_in_place(target):
    x = {name: y if name in "AD" else y[:, 0] for name, y in inputs(2, 1, 9, 5, torch.float32).items()}
    state = target.put(torch.randn(2, 1, 5, 9))
    start, place = state.clone(), state.data_ptr()
    with target.in_use():
        ops.selective_scan_step(**target.put(x), state=state, backend=target.kind)
    assert state.data_ptr() == place and not torch.equal(state, start)


# ---- the operators, as torch sees them, and called directly ---------------------------------------------------------


def arguments(edits=True, writes=True):
    x = inputs(1, 10, 12, 8, torch.float32)
    packed = pack_edits(edits_for(2, [4, 6], 1, 8, 12)) if edits else (None, None, None)
    places = torch.tensor([[0, 1], [1, 5]]) if edits else None
    offsets = torch.tensor([0, 4, 10]) if edits else None
    return (*x.values(), torch.randn(2 if edits else 1, 1, 8, 12), offsets, *packed, places, writes)


def with_gradients(values):
    return tuple(
        y.clone().requires_grad_() if isinstance(y, torch.Tensor) and y.is_floating_point() else y for y in values
    )


@pytest.mark.parametrize("edits, writes", [(True, True), (False, False)])
def test_opcheck(edits, writes):
    torch.library.opcheck(torch.ops.writesae.selective_scan.default, with_gradients(arguments(edits, writes)))


def test_opcheck_backward():
    given = arguments()
    gradients = [torch.randn_like(y) for y in torch.ops.writesae.selective_scan(*given)[:4]]
    torch.library.opcheck(torch.ops.writesae.selective_scan_backward.default, (*given[:-1], *gradients))
    with pytest.raises(RuntimeError, match="selective_scan_backward: d_o has the wrong shape"):
        torch.ops.writesae.selective_scan_backward(*given[:-1], gradients[0][:, :5], *gradients[1:])


@pytest.mark.parametrize("writes", [True, False])
def test_opcheck_step(writes):
    x, dt, A, B, C, D = inputs(2, 1, 12, 8, torch.float32).values()
    given = (x, dt, A, B, C, torch.randn(2, 1, 8, 12), D, None, None, None, writes)
    torch.library.opcheck(torch.ops.writesae.selective_scan_step.default, given)


def test_bounds_are_checked():
    """A direct call that skips the wrapper is refused before anything is read out of bounds."""
    good = arguments()
    bad_index = good[8].clone()
    bad_index[0, 1] = 99
    cases = {
        1: (good[1][:, :5], "dt has the wrong shape"), 2: (good[2][:5], "A has the wrong shape"),
        3: (good[3][:, :, :5], "B has the wrong shape"), 5: (good[5][:3], "D has the wrong shape"),
        6: (good[6][:1], "initial_state has the wrong shape"), 7: (torch.tensor([0, 11, 10]), "cu_seqlens must rise"),
        8: (bad_index, "outside its row"), 9: (good[9][:, :3], "edit_left has the wrong shape"),
        11: (torch.tensor([[0, 4]]), "snapshot 0 is out of range"), 0: (good[0].double(), "x must be float32"),
    }  # fmt: skip
    for place, (value, message) in cases.items():
        given = list(good)
        given[place] = value
        with pytest.raises(RuntimeError, match=message):
            torch.ops.writesae.selective_scan(*given)
    unsorted = list(good)
    unsorted[8] = good[8].flip(0).contiguous()
    with pytest.raises(RuntimeError, match="sorted"):
        torch.ops.writesae.selective_scan(*unsorted)


def test_without_writes():
    """A call that does not ask for the writes gets the same gradients."""
    found, asked = [], arguments()
    for writes in (True, False):
        given = with_gradients((*asked[:-1], writes))
        torch.ops.writesae.selective_scan(*given)[0].sum().backward()
        found.append([y.grad for y in given if isinstance(y, torch.Tensor) and y.grad is not None])
    assert len(found[0]) == 9 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_second_derivative():
    x = inputs(1, 5, 4, 3, torch.float32)
    x["x"].requires_grad_()
    out = ops.selective_scan(**x, backend="cpu")
    with pytest.raises(RuntimeError, match='selective_scan_backward: no backward.*backend="reference"'):
        torch.autograd.grad(out.o.square().sum(), x["x"], create_graph=True)


def test_no_tokens_leave_the_state(each_target):
    x, dt, A, B, C, D = inputs(1, 0, 24, 16, torch.float32).values()
    start = torch.randn(2, 1, 16, 24)
    given = [each_target.put(y) for y in (x, dt, A, B, C, D, start)]
    offsets = each_target.put(torch.tensor([0, 0, 0]))
    with each_target.in_use():
        final = operators(each_target.kind).selective_scan(*given, offsets, *[None] * 4, True)[1]
    assert torch.equal(final.cpu(), start)


def test_a_channel_alone_and_among_others():
    """A channel's numbers do not depend on its neighbours, nor on how channels are dealt out."""
    x = inputs(1, 40, 150, 16, torch.float32)
    with cpu_isa("portable"):
        whole = ops.selective_scan(**x, backend="cpu").o
        part = {name: y[..., 100:] if name in ("x", "dt", "D") else y for name, y in x.items()} | {"A": x["A"][100:]}
        assert torch.equal(ops.selective_scan(**part, backend="cpu").o, whole[..., 100:])


def test_large_keys_are_refused_by_cuda():
    x = inputs(1, 3, 4, 264, torch.float32)
    for target in DEVICES[:1]:
        given = [target.put(y) for y in x.values()]
        with target.in_use(), pytest.raises(ValueError, match="B has 264 entries, expected at most 256"):
            ops.selective_scan(*given, backend=target.kind)
        with target.in_use(), pytest.raises(ValueError, match="selective_scan: .* K up to 256, got K = 264"):
            operators(target.kind).selective_scan(*given, *[None] * 6, False)
        gradient = target.put(torch.ones(1, 3, 4))
        with target.in_use(), pytest.raises(ValueError, match="selective_scan_backward: .* K up to 256"):
            operators(target.kind).selective_scan_backward(*given, *[None] * 6, gradient, None, None, None)
