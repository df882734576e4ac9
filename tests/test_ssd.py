"""`ssd` against transformers' Mamba-2 chunk scan, which shares no code or form with it."""

from __future__ import annotations

import pytest
import torch

from writesae import ops
from writesae.testing import check_close


def inputs(rows=2, T=37, H=4, G=2, K=12, V=8, dtype=torch.float64):
    return {
        "x": torch.randn(rows, T, H, V, dtype=dtype), "dt": torch.rand(rows, T, H, dtype=dtype),
        "A": -torch.rand(H, dtype=dtype) - 0.1, "B": torch.randn(rows, T, G, K, dtype=dtype),
        "C": torch.randn(rows, T, G, K, dtype=dtype), "D": torch.randn(H, dtype=dtype),
    }  # fmt: skip


@pytest.mark.parametrize("state", [False, True])
def test_equals_transformers(state):
    peer = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(peer, "mamba2_chunk_scan"):
        pytest.skip("this release of transformers has no module-level chunk scan")
    x = inputs(dtype=torch.float32)
    initial = torch.randn(2, 4, 12, 8) if state else None
    y, final, _ = ops.ssd(**x, initial_state=initial, backend="reference")
    expected, last = peer.mamba2_chunk_scan(
        x["x"], x["dt"], x["A"], x["B"], x["C"], 16, D=x["D"], return_final_states=True,
        initial_states=None if initial is None else initial.transpose(2, 3),
    )  # fmt: skip
    check_close("y", y, expected)
    check_close("final_state", final, last.transpose(2, 3))


def test_backends():
    x = inputs()
    with pytest.raises(ValueError, match='ssd: backend="cpu" cannot run this: ssd has no cpu kernel'):
        ops.ssd(**x, backend="cpu")
    with pytest.raises(ValueError, match="backend: expected one of"):
        ops.ssd(**x, backend="gpu")
    ops._dispatch._said.clear()
    with pytest.warns(RuntimeWarning, match="ssd: running the slow token-by-token reference"):
        ops.ssd(**x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 37, 4)}, "x: expected"), ({"dt": torch.zeros(2, 37, 3)}, "dt: expected"),
        ({"A": torch.zeros(3)}, r"A: expected \[H=4\]"), ({"D": torch.zeros(3)}, r"D: expected \[H=4\]"),
        ({"B": torch.zeros(2, 37, 3, 12)}, "B: expected .* dividing H=4"),
        ({"C": torch.zeros(2, 37, 2, 11)}, "C: expected the shape of B"),
        ({"initial_state": torch.zeros(2, 4, 8, 12)}, "initial_state: expected"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.ssd(**{**inputs(), **change}, backend="reference")


def test_gradcheck():
    x = {name: value.requires_grad_() for name, value in inputs(1, 4, 2, 1, 3, 2).items()}
    assert torch.autograd.gradcheck(lambda *a: ops.ssd(*a, backend="reference")[:2], tuple(x.values()))
