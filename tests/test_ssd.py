"""`ssd` against transformers' Mamba-2 chunk scan, which shares no code or form with it, and against its formula."""

from __future__ import annotations

import pytest
import torch

from writesae import Edits, ops
from writesae.testing import check_close


def inputs(rows=2, T=37, H=4, G=2, K=12, V=8, dtype=torch.float64):
    return {
        "x": torch.randn(rows, T, H, V, dtype=dtype), "dt": torch.rand(rows, T, H, dtype=dtype),
        "A": -torch.rand(H, dtype=dtype) - 0.1, "B": torch.randn(rows, T, G, K, dtype=dtype),
        "C": torch.randn(rows, T, G, K, dtype=dtype), "D": torch.randn(H, dtype=dtype),
    }  # fmt: skip


def token(x, t):
    """The arguments of `ssd_step` for one token."""
    return {name: value if name in "AD" else value[:, t] for name, value in x.items()}


@pytest.mark.filterwarnings("ignore:.*running the slow")
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("state", [False, True])
def test_equals_transformers(state, backend):
    peer = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(peer, "mamba2_chunk_scan"):
        pytest.skip("this release of transformers has no module-level chunk scan")
    x = inputs(dtype=torch.float32)
    initial = torch.randn(2, 4, 12, 8) if state else None
    out = ops.ssd(**x, initial_state=initial, output_final_state=True, backend=backend)
    expected, last = peer.mamba2_chunk_scan(
        x["x"], x["dt"], x["A"], x["B"], x["C"], 16, D=x["D"], return_final_states=True,
        initial_states=None if initial is None else initial.transpose(2, 3),
    )  # fmt: skip
    check_close("o", out.o, expected)
    check_close("final_state", out.final_state, last.transpose(2, 3))


def test_edits_snapshots_and_writes():
    """By hand, token by token; of what was not asked for there is nothing."""
    T, K, V = 37, 12, 8
    x, start = inputs(), torch.randn(2, 4, K, V, dtype=torch.float64)
    p, q = torch.randn(3, K, dtype=torch.float64), torch.randn(3, V, dtype=torch.float64)
    edits = Edits([0, 1, -1], [4, 0, 7], [1, 3, 2], p, q, ["replace", "delete", "add"], ["before", "after", "after"])
    out = ops.ssd(
        **x, initial_state=start, output_final_state=True, edits=edits, snapshots=range(T), return_writes=True,
        backend="reference",
    )  # fmt: skip
    state = start
    for t in range(T):
        b, c = (x[name][:, t].repeat_interleave(2, 1) for name in "BC")
        native = b[..., None] * (x["dt"][..., None] * x["x"])[:, t, :, None]
        state = (x["dt"][:, t] * x["A"]).exp()[..., None, None] * state + native
        if t == 4:
            state[0, 1] += torch.outer(p[0], q[0]) - native[0, 1]
        skip = x["D"][:, None] * x["x"][:, t]
        check_close("o", out.o[:, t], torch.einsum("bhkv,bhk->bhv", state, c) + skip, 1e-13)
        if t == 0:
            state[1, 3] -= native[1, 3]
        if t == 7:
            state[:, 2] += torch.outer(p[2], q[2])
        check_close("snapshots", out.snapshots[:, t], state, 1e-13)
    check_close("final_state", out.final_state, state, 1e-13)
    writes = out.writes
    check_close("states of the writes", writes.states(range(T)), out.snapshots, 1e-12)
    assert writes.beta is None and torch.equal(writes.left[:, :, :, 0], x["B"])
    check_close("decay", writes.decay, x["dt"] * x["A"], 1e-15)
    plain = ops.ssd(**x, backend="reference")
    assert plain.final_state is None and plain.writes is None and plain.snapshots is None


def test_packed_sequences_are_their_own():
    x = inputs(rows=1)
    out = ops.ssd(**x, output_final_state=True, cu_seqlens=torch.tensor([0, 20, 20, 37]), backend="reference")
    for n, (lo, hi) in enumerate(((0, 20), (20, 37))):
        own = {name: value[:, lo:hi] if value.ndim > 1 else value for name, value in x.items()}
        one = ops.ssd(**own, output_final_state=True, backend="reference")
        assert torch.equal(out.o[:, lo:hi], one.o) and torch.equal(out.final_state[2 * n], one.final_state[0])
    assert not out.final_state[1].any()


@pytest.mark.filterwarnings("ignore:.*running the slow")
@pytest.mark.parametrize("backend", ["reference", None])
def test_steps_equal_sequence(backend):
    x, T = inputs(T=5, dtype=torch.float32), 5
    state = torch.randn(2, 4, 12, 8)
    edits = Edits([0, -1], [2, 2], [1, 3], torch.randn(2, 12), torch.randn(2, 8), ["delete", "add"], "after")
    wide = {name: value.double() for name, value in x.items()}
    expected = ops.ssd(
        **wide, initial_state=state.double(), edits=edits, snapshots=range(T), return_writes=True, backend="reference"
    )
    for t in range(T):
        here = edits if t == 2 else None
        out = ops.ssd_step(**token(x, t), state=state, edits=here, return_writes=True, backend=backend)
        check_close("o", out.o, expected.o[:, t])
        check_close("state", state, expected.snapshots[:, t])
        check_close("left", out.left, expected.writes.left[:, t, :, 0])
        check_close("right", out.right, expected.writes.right[:, t, :, 0])
    assert ops.ssd_step(**token(x, 0), state=state, backend=backend).left is None


def test_half_precision():
    """Summed in float32: a decay near 1 is not rounded to 1, and D x is added before the rounding."""
    x = inputs()
    half = {name: value.bfloat16() for name, value in x.items()}
    half["A"] = torch.full((4,), -1e-3)
    out = ops.ssd(**half, output_final_state=True, backend="reference")
    wide = {name: value.double() for name, value in half.items()}
    expected = ops.ssd(**wide, output_final_state=True, backend="reference")
    assert out.o.dtype == torch.bfloat16 and out.final_state.dtype == torch.float32
    check_close("o", out.o, expected.o)
    check_close("final_state", out.final_state, expected.final_state)


def test_backends():
    x = inputs()
    with pytest.raises(ValueError, match='ssd: backend="cpu" cannot run this: '):
        ops.ssd(**x, backend="cpu")  # float64, or no kernel
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
        ({"x": torch.zeros(2, 0, 4, 8), "dt": torch.zeros(2, 0, 4), "B": torch.zeros(2, 0, 2, 12),
          "C": torch.zeros(2, 0, 2, 12)}, "x: expected at least one token"),
        ({"cu_seqlens": torch.tensor([0, 37])}, "cu_seqlens: packed sequences need B = 1"),
        ({"edits": 3}, "edits: expected Edits or None"), ({"snapshots": [37]}, "snapshots: expected"),
        ({"edits": Edits.add(0, 0, 4, torch.zeros(12), torch.zeros(8))}, "edits.head: expected"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.ssd(**{**inputs(), **change}, backend="reference")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 1, 4, 8)}, r"x: expected \[B, H, V\]"), ({"dt": torch.zeros(2, 3)}, "dt: expected"),
        ({"B": torch.zeros(3, 2, 12)}, r"B: expected \[B=2, G dividing H=4, K\]"),
        ({"state": torch.zeros(2, 4, 8, 12)}, r"state: expected \[B=2, H=4, K=12, V=8\]"),
        ({"state": torch.zeros(2, 4, 12, 8).double()}, "state: expected contiguous torch.float32"),
    ],
)  # fmt: skip
def test_bad_step(change, message):
    good = {**token(inputs(dtype=torch.float32), 0), "state": torch.zeros(2, 4, 12, 8)}
    with pytest.raises(ValueError, match=message):
        ops.ssd_step(**{**good, **change}, backend="reference")


def test_gradcheck():
    x = {name: value.requires_grad_() for name, value in inputs(1, 4, 2, 1, 3, 2).items()}

    def run(*a):
        out = ops.ssd(*a, output_final_state=True, return_writes=True, backend="reference")
        return out.o, out.final_state, out.writes.right

    assert torch.autograd.gradcheck(run, tuple(x.values()))
