"""`dplr` against transformers' Kimi-Linear recurrence, a dense RWKV-7 loop, and `gated_delta_rule`."""

from __future__ import annotations

import pytest
import torch

from writesae import ops
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
    o, final, _ = ops.dplr(**kda(x, beta), initial_state=initial, backend="reference")
    expected, last = peer.recurrent_kimi_delta_attention(
        x["q"], x["k"], x["v"], x["g"], beta, initial_state=initial, output_final_state=True
    )
    check_close("o", o, expected)
    check_close("final_state", final, last)


def test_equal_gates_are_the_gated_delta_rule():
    x, beta = inputs(), torch.rand(ROWS, T, H).double()
    x["g"] = x["g"][..., :1].expand(-1, -1, -1, K)
    o, final, _ = ops.dplr(**kda(x, beta), backend="reference")
    expected = ops.gated_delta_rule(
        x["q"], x["k"], x["v"], x["g"][..., 0], beta, output_final_state=True, backend="reference"
    )
    check_close("o", o, expected.o, 1e-13)
    check_close("final_state", final, expected.final_state, 1e-13)


def test_rwkv7_equals_dense_loop():
    """`S_t = S_{t-1} (Diag(w) - kappa^T (a (.) kappa)) + v^T k` on S of [V, K], as its paper writes it."""
    x = inputs()
    kappa, a = torch.nn.functional.normalize(torch.randn_like(x["k"]), dim=-1), torch.rand_like(x["k"])
    o, final, writes = ops.dplr(**x, a=kappa, b=-a * kappa, backend="reference")
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
    o, final, writes = ops.dplr(**x, backend="reference")
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
    assert torch.autograd.gradcheck(lambda *z: ops.dplr(*z, backend="reference")[:2], (*x, a, b))
