"""`selective_scan` against transformers' Mamba recurrence."""

from __future__ import annotations

import pytest
import torch

from writesae import Edits, ops
from writesae.testing import check_close


def inputs(rows=2, T=19, V=9, K=5, dtype=torch.float64):
    return {
        "x": torch.randn(rows, T, V, dtype=dtype), "dt": torch.rand(rows, T, V, dtype=dtype),
        "A": -torch.rand(V, K, dtype=dtype) - 0.1, "B": torch.randn(rows, T, K, dtype=dtype),
        "C": torch.randn(rows, T, K, dtype=dtype), "D": torch.randn(V, dtype=dtype),
    }  # fmt: skip


def test_equals_transformers():
    peer = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if not hasattr(peer, "mamba_selective_scan"):
        pytest.skip("this release of transformers has no module-level selective scan")
    x = inputs(dtype=torch.float32)
    out = ops.selective_scan(**x, output_final_state=True, backend="reference")
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
