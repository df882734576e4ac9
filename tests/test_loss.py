"""The factored loss equals the dense one, gradients included, without ever forming a state."""

from __future__ import annotations

import pytest
import torch

from writesae.ops.encode import encode
from writesae.ops.loss import factored_loss, state_product
from writesae.writes import Writes

B, T, H, HL, K, V, F, ACTIVE = 2, 70, 4, 2, 6, 5, 24, 4


def make_writes(seed=0, R=1, packed=False, state=True, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    rows, tokens = (1, 100) if packed else (B, T)
    cu = torch.tensor([0, 40, 40, 41, 100]) if packed else None
    N = 4 if packed else rows
    rand = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    return Writes(
        -rand(rows, tokens, H).abs() * 0.1, rand(rows, tokens, HL, R, K), rand(rows, tokens, H, R, V),
        initial_state=rand(N, H, K, V) if state else None, cu_seqlens=cu,
    )  # fmt: skip


def dense_states(writes):
    """`[B, T, H, K, V]`."""
    rows, tokens, _, _, _ = writes.shape
    parts = [[] for _ in range(rows)]
    pairs = [(n, t) for n, _, lo, hi in writes.sequences() for t in range(hi - lo)]
    states = writes.states(torch.tensor(pairs))
    at = 0
    for _, b, lo, hi in writes.sequences():
        parts[b].append(states[at : at + hi - lo])
        at += hi - lo
    return torch.stack([torch.cat(p) for p in parts])


def dense_loss(writes, values, indices, v, w, bias, heads):
    states = dense_states(writes)[:, :, heads]
    total = torch.zeros_like(states)
    for i in range(len(heads)):
        atoms = torch.einsum("fxk,fxv->fkv", v[i], w[i])
        total[:, :, i] = torch.einsum("btm,btmkv->btkv", values[:, :, i], atoms[indices[:, :, i]])
    residual = states - total
    if bias is not None:
        residual = residual - bias
    return residual.square().sum((-2, -1))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [3, 1]])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_dense_with_gradients(rank, packed, heads, with_bias):
    writes = make_writes(seed=rank, packed=packed, R=rank)
    gen = torch.Generator().manual_seed(7)
    rows, tokens = writes.shape[:2]
    Hs = len(heads)
    rand = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    values = rand(rows, tokens, Hs, ACTIVE).relu().requires_grad_()
    indices = torch.rand(rows, tokens, Hs, F, generator=gen).argsort(-1)[..., :ACTIVE]
    v, w = rand(Hs, F, rank, K).requires_grad_(), rand(Hs, F, rank, V).requires_grad_()
    bias = rand(Hs, K, V).requires_grad_() if with_bias else None
    inputs = [x for x in (values, v, w, bias) if x is not None]
    weight = rand(rows, tokens, Hs)
    got = factored_loss(writes, values, indices, v, w, bias, heads, backend="reference")
    want = dense_loss(writes, values, indices, v, w, bias, heads)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)
    got_grad = torch.autograd.grad((got * weight).sum(), inputs)
    want_grad = torch.autograd.grad((want * weight).sum(), inputs)
    for a, b in zip(got_grad, want_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_mask_and_memory_blocks(monkeypatch):
    writes = make_writes()
    monkeypatch.setattr("writesae.ops.loss._GATHERED", 500)  # several parts
    gen = torch.Generator().manual_seed(1)
    values = torch.rand(B, T, H, ACTIVE, generator=gen, dtype=torch.float64).requires_grad_()
    indices = torch.randint(F, (B, T, H, ACTIVE), generator=gen)
    v = torch.randn(H, F, K, generator=gen, dtype=torch.float64, requires_grad=True)
    w = torch.randn(H, F, V, generator=gen, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(B, T, generator=gen) < 0.2
    got = factored_loss(writes, values, indices, v, w, mask=mask, backend="reference")
    want = dense_loss(writes, values, indices, v[:, :, None], w[:, :, None], None, list(range(H))) * mask[..., None]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (values, v, w)), torch.autograd.grad(want.sum(), (values, v, w)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
def test_state_product(packed):
    writes = make_writes(packed=packed)
    matrix = torch.randn(H, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = (dense_states(writes) * matrix).sum((-2, -1))
    torch.testing.assert_close(state_product(writes, matrix), want, rtol=1e-11, atol=1e-11)


def test_float32_end_to_end_through_encode():
    """Loss of codes from `encode`: the gradient reaches encoder and decoder, as in a dense fp64 computation."""
    exact = make_writes(seed=3)
    gen = torch.Generator().manual_seed(4)
    shapes = ((H, F, K), (H, F, V), (H, F), (H, F, K), (H, F, V), (H, K, V))
    params = [torch.randn(*s, generator=gen, dtype=torch.float64) for s in shapes]

    def run(writes, dtype, loss):
        p = [x.to(dtype).requires_grad_() for x in params]
        backend = None if dtype == torch.float32 else "reference"
        codes = encode(writes.to(dtype), p[0], p[1], p[2], k=ACTIVE, backend=backend)
        error = loss(writes.to(dtype), codes.values, codes.indices, *p[3:])
        return error, torch.autograd.grad(error.mean(), p)

    def dense(writes, values, indices, v, w, bias):
        return dense_loss(writes, values, indices, v[:, :, None], w[:, :, None], bias, list(range(H)))

    got, got_grad = run(exact, torch.float32, factored_loss)
    want, want_grad = run(exact, torch.float64, dense)
    assert got.dtype == torch.float32
    scale = want.square().mean().sqrt()
    assert (got - want).square().mean().sqrt() <= 2e-5 * scale
    for a, b in zip(got_grad, want_grad, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_bad_input_by_name():
    writes = make_writes(dtype=torch.float32)
    values, indices = torch.rand(B, T, H, 2), torch.zeros(B, T, H, 2, dtype=torch.int64)
    v, w = torch.randn(H, F, K), torch.randn(H, F, V)
    for name, arguments in {
        "values": (values[:, :, :, :1], indices, v, w),
        "indices": (values, indices + F, v, w),
        "v_dec": (values, indices, v[:, :, :-1], w),
        "w_dec": (values, indices, v, w[:, :-1]),
        "bias": (values, indices, v, w, torch.zeros(H, V, K)),
        "mask": (values, indices, v, w, None, None, torch.ones(B, T)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            factored_loss(writes, *arguments)
