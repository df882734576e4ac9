"""Orthogonal matching pursuit on factors against the same on matrices, in double precision."""

from __future__ import annotations

import pytest
import torch

from writesae import ops

pytestmark = pytest.mark.usefixtures("one_thread")

F, K, V, P = 14, 5, 7, 40


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(v, w):
    return torch.einsum("frk,frv->fkv", v, w)


def atoms(r=1, F=F, metric=None, seed=1):
    """(v_enc, w_enc, v_dec, w_dec) of unit length in a metric."""
    v, w = normal(F, r, K, seed=seed), normal(F, r, V, seed=seed + 1)
    M = torch.eye(K, dtype=torch.float64) if metric is None else metric
    size = torch.einsum("fkv,kl,flv->f", matrices(v, w), M, matrices(v, w)).sqrt()
    v = v / size[:, None, None]
    return v @ M, w, v, w


def slow(X, enc, dec, k):
    """Codes `[F]` of one matrix: the most responsive atom joins, all codes anew, those below 0 leave."""
    E, A = matrices(*enc), matrices(*dec)
    response, gram = (E * X).sum((1, 2)), torch.einsum("ikv,jkv->ij", E, A)
    taken, codes, first = [], torch.zeros(len(A), dtype=X.dtype), None
    for _ in range(k):
        rest = response - gram @ codes
        rest[taken] = -torch.inf
        best = int(rest.argmax())
        first = float(rest[best]) if first is None else first
        if rest[best] <= max(0.0, 1e-5 * first):
            break
        taken.append(best)
        on = list(taken)
        for _ in range(3):
            codes = torch.zeros_like(codes)
            codes[on] = torch.linalg.solve(gram[on][:, on], response[on])
            if not (codes < 0).any():
                break
            on = [i for i in on if codes[i] >= 0]
        codes = codes.relu()
    return codes


def dense(values, indices, F=F):
    return torch.zeros(*values.shape[:-1], F, dtype=values.dtype).scatter_(-1, indices, values)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_same_as_on_matrices(k, R, r, weighed):
    root = normal(K, K, seed=9)
    factors = atoms(r, metric=root @ root.T if weighed else None)
    left, right = normal(P, R, K, seed=5), normal(P, R, V, seed=6)
    values, indices = ops.pursuit(left, right, *factors, k)
    assert values.shape == indices.shape == (P, k) and indices.dtype == torch.int64
    expected = torch.stack([slow(X, factors[:2], factors[2:], k) for X in matrices(left, right)])
    torch.testing.assert_close(dense(values, indices), expected, rtol=1e-4, atol=1e-5)  # of the ridge
    assert (values >= 0).all() and (values.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    single = ops.pursuit(*(x.float() for x in (left, right, *factors)), k)
    assert (single[1] == indices).all(1).float().mean() > 0.9  # near ties aside
    same = (single[1] == indices).all(1)
    torch.testing.assert_close(single[0][same], values[same].float(), rtol=1e-3, atol=1e-4)


def test_one_atom_is_the_nearest():
    """Whatever the metric, no other atom at its best size leaves less error in it."""
    root = normal(K, K, seed=9)
    M = root @ root.T
    factors = atoms(metric=M)
    left, right = normal(P, 1, K, seed=5), normal(P, 1, V, seed=6)
    values, indices = ops.pursuit(left, right, *factors, 1)
    X, A = matrices(left, right), matrices(*factors[2:])

    def error(E):
        return torch.einsum("...kv,kl,...lv->...", E, M, E)

    got = error(X - values[:, :, None] * A[indices[:, 0]])
    inner = torch.einsum("pkv,kl,flv->pf", X, M, A).relu()
    every = error(X[:, None] - inner[..., None, None] * A)
    torch.testing.assert_close(got, every.min(1).values)


def test_what_was_put_in_is_found():
    factors = atoms(F=30, seed=3)
    g = torch.Generator().manual_seed(0)
    which = torch.stack([torch.randperm(30, generator=g)[:2] for _ in range(P)])
    size = 1 + torch.rand(P, 2, generator=g, dtype=torch.float64)
    left, right = factors[2][which, 0] * size[..., None], factors[3][which, 0]
    values, indices = ops.pursuit(left, right, *factors, 8)
    made = torch.einsum("pj,pjkv->pkv", values, matrices(*factors[2:])[indices])
    X = matrices(left, right)
    left_over = (made - X).square().sum((1, 2)) / X.square().sum((1, 2))
    assert left_over.median() < 1e-6
    exact = ops.pursuit(left[:, :1], right[:, :1], *factors, 3)  # one atom each: the rest has nothing to do
    assert torch.equal(exact[1][:, 0], which[:, 0]) and (exact[0][:, 1:] == 0).all()


def test_nothing_spreads_from_a_write_to_another():
    factors = atoms()
    left, right = normal(2, 20, 1, K, seed=5), normal(2, 20, 1, V, seed=6)
    left[1, 3] = 0.0
    clean = ops.pursuit(left, right, *factors, 3)
    assert (clean[0][1, 3] == 0).all()
    for bad in (float("nan"), float("inf")):
        right[0, 7] = bad
        values, indices = ops.pursuit(left, right, *factors, 3)
        assert not values[0, 7].isfinite().all()
        keep = torch.ones(2, 20, dtype=torch.bool)
        keep[0, 7] = False
        assert torch.equal(values[keep], clean[0][keep]) and torch.equal(indices[keep], clean[1][keep])


def test_parts_and_strides(monkeypatch):
    factors = atoms()
    left, right = normal(P, 1, K, seed=5), normal(P, 1, V, seed=6)
    whole = ops.pursuit(left, right, *factors, 3)
    monkeypatch.setitem(ops.pursuit.__globals__, "_FLOATS", 3 * F * 5)
    strided = [torch.stack([x, x.flip(0)], -1)[..., 0] for x in (left, right, *factors)]
    torch.testing.assert_close(ops.pursuit(*strided, 3), whole)


def test_refusals():
    factors, left, right = list(atoms()), normal(P, 1, K), normal(P, 1, V)
    for k in (0, F + 1, 2.0, True):
        with pytest.raises(ValueError, match="^k: expected an integer"):
            ops.pursuit(left, right, *factors, k)
    with pytest.raises(ValueError, match=r"^right: expected \[\.\.\., R, V\] beside left"):
        ops.pursuit(left, right[1:], *factors, 2)
    for i, name in enumerate(("v_enc", "w_enc", "v_dec", "w_dec")):
        wrong = [x[..., :-1] if j == i else x for j, x in enumerate(factors)]
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            ops.pursuit(left, right, *wrong, 2)
    with pytest.raises(RuntimeError, match="pursuit.*no_grad"):
        ops.pursuit(left.requires_grad_(), right, *factors, 2)
