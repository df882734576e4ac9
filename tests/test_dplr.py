"""`dplr` against transformers' Kimi-Linear recurrence, a dense RWKV-7 loop, and `gated_delta_rule`."""

from __future__ import annotations

import pytest
import torch

from writesae import Edits, ops
from writesae.testing import check_close

ROWS, T, H, K, V = 2, 21, 3, 10, 7


def inputs(dtype=torch.float64, T=T):
    def normal(*shape):
        return torch.randn(ROWS, T, H, *shape, dtype=dtype)

    k = torch.nn.functional.normalize(normal(K), dim=-1)
    return {"q": normal(K), "k": k, "v": normal(V), "g": -torch.rand(ROWS, T, H, K, dtype=dtype)}


def kda(x, beta):
    """Arguments of `dplr` for Kimi's rule."""
    k = x["k"]
    return {
        "q": x["q"] * K**-0.5, "k": k, "v": beta[..., None] * x["v"], "g": x["g"], "a": x["g"].exp() * k,
        "b": -beta[..., None] * k,
    }  # fmt: skip


def test_kda_equals_transformers():
    peer = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    x, beta = inputs(torch.float32), torch.rand(ROWS, T, H)
    initial = torch.randn(ROWS, H, K, V)
    out = ops.dplr(**kda(x, beta), initial_state=initial, output_final_state=True, backend="reference")
    expected, last = peer.recurrent_kimi_delta_attention(
        x["q"], x["k"], x["v"], x["g"], beta, initial_state=initial, output_final_state=True
    )
    check_close("o", out.o, expected)
    check_close("final_state", out.final_state, last)
    # As the delta rule that it is, with one write a token in place of two.
    out = ops.gated_delta_rule(
        x["q"], x["k"], x["v"], x["g"], beta, initial_state=initial, output_final_state=True, backend="reference"
    )
    check_close("o", out.o, expected)
    check_close("final_state", out.final_state, last)


def test_equal_gates_are_the_gated_delta_rule():
    x, beta = inputs(), torch.rand(ROWS, T, H).double()
    x["g"] = x["g"][..., :1].expand(-1, -1, -1, K)
    out = ops.dplr(**kda(x, beta), output_final_state=True, backend="reference")
    expected = ops.gated_delta_rule(
        x["q"], x["k"], x["v"], x["g"][..., 0], beta, output_final_state=True, backend="reference"
    )
    check_close("o", out.o, expected.o, 1e-13)
    check_close("final_state", out.final_state, expected.final_state, 1e-13)


def test_rwkv7_equals_dense_loop():
    """`S_t = S_{t-1} (Diag(w) - kappa^T (a (.) kappa)) + v^T k` on S of [V, K], as its paper writes it."""
    x = inputs()
    kappa, a = torch.nn.functional.normalize(torch.randn_like(x["k"]), dim=-1), torch.rand_like(x["k"])
    out = ops.dplr(
        **x, a=kappa, b=-a * kappa, output_final_state=True, return_writes=True, backend="reference"
    )  # fmt: skip
    o, final, writes = out.o, out.final_state, out.writes
    state = torch.zeros(ROWS, H, V, K, dtype=torch.float64)
    for t in range(T):
        kt, at = kappa[:, t], (a * kappa)[:, t]
        transition = torch.diag_embed(x["g"][:, t].exp()) - kt[..., :, None] * at[..., None, :]
        state = state @ transition + x["v"][:, t, :, :, None] * x["k"][:, t, :, None, :]
        check_close("o", o[:, t], (state @ x["q"][:, t, :, :, None])[..., 0], 1e-13)
    check_close("final_state", final, state.transpose(2, 3), 1e-13)
    assert writes.left.shape == (ROWS, T, H, 2, K) and writes.right.shape == (ROWS, T, H, 2, V)


def test_gla_equals_weighted_sum():
    x = inputs()
    out = ops.dplr(**x, return_writes=True, backend="reference")
    o, writes = out.o, out.writes
    total = x["g"].cumsum(1)
    weights = (total[:, :, None] - total[:, None]).exp()  # [B, t, s, H, K]
    scores = torch.einsum("bthk,bshk,btshk->btsh", x["q"], x["k"], weights)
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, :, :, None]
    check_close("o", o, torch.einsum("btsh,bshv->bthv", scores.where(mask, 0), x["v"]), 1e-13)
    assert writes.left.shape[3] == 1 and writes.erase is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(2, 21, 3)}, "v: expected"), ({"k": torch.zeros(2, 21, 2, 10)}, "k: expected"),
        ({"q": torch.zeros(2, 21, 3, 9)}, "q: expected the shape of k"),
        ({"g": torch.zeros(2, 21, 3)}, "g: expected the shape of k"),
        ({"a": torch.zeros(2, 21, 3, 10)}, "b: expected a and b together"),
        ({"initial_state": torch.zeros(2, 3, 7, 10)}, "initial_state: expected"),
        ({"backend": "cpu"}, 'backend="cpu" cannot run this'),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ops.dplr(**{**inputs(), "backend": "reference", **change})


def test_says_once_that_it_is_slow():
    ops._dispatch._said.clear()
    with pytest.warns(RuntimeWarning, match="dplr: running the slow token-by-token reference"):
        ops.dplr(**inputs(T=2))


def test_gradcheck():
    x = [value[:1, :, :1, :3].detach().requires_grad_() for value in inputs(T=3).values()]
    a, b = (torch.randn(1, 3, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(*z):
        out = ops.dplr(*z, output_final_state=True, backend="reference")
        return out.o, out.final_state

    assert torch.autograd.gradcheck(run, (*x, a, b))


def erasing():
    """Inputs of RWKV-7's rule, with keys that the erase reads and writes."""
    x = inputs()
    kappa = torch.nn.functional.normalize(torch.randn_like(x["k"]), dim=-1)
    return x | {"a": kappa, "b": -torch.rand_like(kappa) * kappa}


def test_edits_of_two_writes_a_token():
    """The native write is the one that carries the value; the erase stays. By hand, token by token."""
    x, start = erasing(), torch.randn(ROWS, H, K, V, dtype=torch.float64)
    edits = Edits(
        [0, 0, 1, 1, 1, -1], [3, 5, 0, 5, 5, T - 1], [1, 0, 2, 1, 1, 2],
        torch.randn(6, K, dtype=torch.float64), torch.randn(6, V, dtype=torch.float64),
        ["delete", "replace", "add", "replace", "delete", "add"],
        ["before", "before", "after", "after", "before", "after"],
    )  # fmt: skip
    out = ops.dplr(
        **x, initial_state=start, output_final_state=True, edits=edits, snapshots=range(T), return_writes=True,
        backend="reference",
    )  # fmt: skip
    state = start
    for t in range(T):
        q, k, v, g, a, b = (x[name][:, t] for name in "qkvgab")
        erase = b[..., None] * torch.einsum("bhkv,bhk->bhv", state, a)[:, :, None]
        native = k[..., None] * v[:, :, None]
        read, later = torch.ones(ROWS, H), torch.ones(ROWS, H)
        more, after = torch.zeros_like(native), torch.zeros_like(native)
        for i in (edits.position == t).nonzero().flatten().tolist():
            rows = range(ROWS) if edits.row[i] < 0 else (int(edits.row[i]),)
            for row in rows:
                where = row, int(edits.head[i])
                if edits.kind[i] != 0:
                    (later if edits.when[i] else read)[where] = 0
                if edits.kind[i] != 1:
                    (after if edits.when[i] else more)[where] += torch.outer(edits.left[i], edits.right[i])
        made = read[..., None, None] * native
        state = g.exp()[..., None] * state + erase + made + more
        check_close("o", out.o[:, t], torch.einsum("bhkv,bhk->bhv", state, q), 1e-13)
        state = state - (1 - later)[..., None, None] * made + after
        check_close("snapshots", out.snapshots[:, t], state, 1e-13)
    check_close("final_state", out.final_state, state, 1e-13)
    check_close("states of the writes", out.writes.states(range(T)), out.snapshots, 1e-12)
    assert out.writes.edits is not None and not out.writes.edits.needs_clean_pass


def test_a_write_replaced_by_itself_changes_nothing():
    x = erasing()
    out = ops.dplr(**x, return_writes=True, backend="reference")
    left, right = (getattr(out.writes, side)[1, 4, 2, -1] for side in ("left", "right"))
    same = ops.dplr(**x, edits=Edits.replace(1, 4, 2, left, right), backend="reference")
    check_close("o", same.o, out.o, 1e-14)


def test_packed_sequences_are_their_own():
    x, start = erasing(), torch.randn(3, H, K, V, dtype=torch.float64)
    packed = {name: value[:1] for name, value in x.items()}
    cu, place = torch.tensor([0, 8, 8, T]), torch.tensor([[2, 3]])
    out = ops.dplr(
        **packed, initial_state=start, output_final_state=True, cu_seqlens=cu, snapshots=place, backend="reference"
    )  # fmt: skip
    for n, (lo, hi) in enumerate(((0, 8), (8, T))):
        own = {name: value[:, lo:hi] for name, value in packed.items()}
        one = ops.dplr(
            **own, initial_state=start[2 * n :][:1], output_final_state=True, snapshots=[3], backend="reference"
        )
        assert torch.equal(out.o[:, lo:hi], one.o) and torch.equal(out.final_state[2 * n], one.final_state[0])
    assert torch.equal(out.final_state[1], start[1]) and torch.equal(out.snapshots[0], one.snapshots[0, 0])


@pytest.mark.filterwarnings("ignore:.*running the slow")
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_step_returns_both_writes(backend):
    x = {name: value[:, 0].float() for name, value in erasing().items()}
    start = torch.randn(ROWS, H, K, V)
    state = start.clone()
    out = ops.dplr_step(**x, state=state, return_writes=True, backend=backend)
    read = torch.einsum("bhkv,bhk->bhv", start, x["a"])
    check_close("left", out.left, torch.stack((x["b"], x["k"]), 2))
    check_close("right", out.right, torch.stack((read, x["v"]), 2))
    check_close("state", state, x["g"].exp()[..., None] * start + out.left.transpose(2, 3) @ out.right)
    out = ops.dplr_step(**{name: x[name] for name in "qkvg"}, state=state, return_writes=True, backend=backend)
    assert out.left.shape == x["k"].shape and torch.equal(out.right, x["v"])


def test_a_step_without_one_of_a_and_b_is_refused():
    x = {name: value[:, 0].float() for name, value in erasing().items() if name != "b"}
    with pytest.raises(ValueError, match="b: expected a and b together or neither"):
        ops.dplr_step(**x, state=torch.zeros(ROWS, H, K, V))
    with pytest.raises(ValueError, match=rf"k: expected \[B={ROWS}, H={H}, K\]"):
        ops.dplr_step(**x | {"k": x["k"][:, :1]}, state=torch.zeros(ROWS, H, K, V))
