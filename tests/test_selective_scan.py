"""`selective_scan` against transformers' Mamba recurrence."""

from __future__ import annotations

import pytest
import torch

from writesae import ops
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
    y, final, _ = ops.selective_scan(**x, backend="reference")
    turned = (x["x"].transpose(1, 2), x["dt"].transpose(1, 2), x["A"], x["B"].transpose(1, 2), x["C"].transpose(1, 2))
    expected, last = peer.mamba_selective_scan(*turned, D=x["D"], return_last_state=True)
    check_close("y", y, expected.transpose(1, 2))
    check_close("final_state", final[:, 0], last.transpose(1, 2))


def test_continues_from_a_state():
    x = inputs()
    whole, final, _ = ops.selective_scan(**x, backend="reference")
    parts, state = [], None
    for piece in (slice(0, 7), slice(7, 19)):
        now = {name: value[:, piece] if value.ndim == 3 else value for name, value in x.items()}
        y, state, _ = ops.selective_scan(**now, initial_state=state, backend="reference")
        parts.append(y)
    check_close("y", torch.cat(parts, 1), whole, 1e-14)
    check_close("final_state", state, final, 1e-14)


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
    assert torch.autograd.gradcheck(lambda *z: ops.selective_scan(*z, backend="reference")[:2], x)
