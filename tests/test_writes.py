"""The identities that let `Writes` stand for the states, in float64, over every write rule."""

from __future__ import annotations

import pytest
import torch

from writesae import Edits, ops
from writesae.ops.reference.encode import preactivations
from writesae.testing import check_close, gated_delta_rule_inputs
from writesae.writes import Writes

EXACT = 1e-12
B, T, H, K, V = 2, 70, 4, 6, 9


def delta_rule(edits=None, packed=None, snapshots=range(T)):
    """(inputs, output) of the gated delta rule in float64, from a random initial state, keys normalised."""
    rows = B if packed is None else 1
    x = gated_delta_rule_inputs(rows, T, 2, H, K, V, torch.float64, correlated=True)
    sequences = rows if packed is None else len(packed) - 1
    initial = torch.randn(sequences, H, K, V, generator=torch.Generator().manual_seed(3)).double()
    out = ops.gated_delta_rule(
        **x, use_qk_l2norm=True, initial_state=initial, output_final_state=True, return_writes=True, edits=edits,
        cu_seqlens=packed, snapshots=snapshots, backend="reference",
    )  # fmt: skip
    return x, out


def rule(name):
    """(writes, final state, states `[N, T, H, K, V]` as the recurrence itself has them, a token further each time)."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    T = 23
    if name == "ssd":
        inputs = (normal(B, T, H, V), normal(B, T, H).abs(), -normal(H).abs(), normal(B, T, 2, K), normal(B, T, 2, K))
        initial, run, sequence = normal(B, H, K, V), ops.ssd, (0, 1, 3, 4)
    elif name == "selective_scan":
        inputs = (normal(B, T, V), normal(B, T, V).abs(), -normal(V, K).abs(), normal(B, T, K), normal(B, T, K))
        initial, run, sequence = normal(B, 1, K, V), ops.selective_scan, (0, 1, 3, 4)
    else:
        q, k, v, g = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), -normal(B, T, H, K).abs()
        k = torch.nn.functional.normalize(k, dim=-1)
        beta = normal(B, T, H, 1).sigmoid()
        erase = {
            "rwkv7": (k, -k * normal(B, T, H, K).sigmoid()), "kda": (g.exp() * k, -beta * k), "gla": (None, None),
        }[name]  # fmt: skip
        inputs = (q, k, v * beta, g, *erase)
        initial, run, sequence = normal(B, H, K, V), ops.dplr, (0, 1, 2, 3, 4, 5)

    def until(t):
        cut = [x[:, :t] if i in sequence and x is not None else x for i, x in enumerate(inputs)]
        return run(*cut, initial_state=initial, output_final_state=True, return_writes=True, backend="reference")

    out = until(T)
    return out.writes, out.final_state, torch.stack([until(t + 1).final_state for t in range(T)], 1)


RULES = ["ssd", "rwkv7", "kda", "gla", "selective_scan"]


@pytest.mark.parametrize("name", RULES)
def test_states_of_every_rule(name):
    writes, final, states = rule(name)
    found = writes.states(range(states.shape[1]))
    check_close("states", found, states, EXACT)
    check_close("final_state", found[:, -1], final, EXACT)
    places = torch.tensor([[1, 4], [0, 22], [1, 4], [0, 0]])
    check_close("states", writes.states(places), states[places[:, 0], places[:, 1]], EXACT)
    assert writes.nbytes > 0 and writes.num_sequences == B


def test_states_equal_snapshots():
    _, out = delta_rule()
    check_close("states", out.writes.states(range(T)), out.snapshots, EXACT)
    check_close("final_state", out.writes.states([T - 1])[:, 0], out.final_state, EXACT)


def test_states_of_a_long_stretch():
    """More than one block of the folded sum, under decay that underflows and gates that close."""
    x = gated_delta_rule_inputs(1, 600, 1, 1, K, V, torch.float64)
    x["g"][:, 10::50] = -800.0
    x["g"][:, 20::90] = -float("inf")
    places = [599, 300, 21]
    out = ops.gated_delta_rule(**x, use_qk_l2norm=True, snapshots=places, return_writes=True, backend="reference")
    check_close("states", out.writes.states(places), out.snapshots, EXACT)
    every = torch.arange(600)
    states = out.writes.states(every)
    check_close("norms", out.writes.norms()[0], states.norm(dim=(3, 4))[0], EXACT)


def test_states_with_edits_and_packing():
    offsets = torch.tensor([0, 30, 30, 31, T])
    edits = Edits([0, 0, 3, 3, 2, 0], [3, 3, 38, 5, 0, 29], [0, 0, 1, 2, 3, 3], torch.randn(6, K), torch.randn(6, V),
                  ["add", "replace", "add", "delete", "replace", "add"])  # fmt: skip
    places = torch.tensor([[0, 3], [0, 29], [2, 0], [3, 38], [3, 4], [3, 5]])
    _, out = delta_rule(edits, packed=offsets, snapshots=places)
    check_close("states", out.writes.states(places), out.snapshots, EXACT)
    check_close("float32", out.writes.to(torch.float32).states(places), out.snapshots)


def test_norms():
    _, out = delta_rule()
    check_close("norms", out.writes.norms(), out.snapshots.norm(dim=(3, 4)), EXACT)
    writes, _, states = rule("ssd")
    check_close("norms", writes.norms(), states.norm(dim=(3, 4)), EXACT)
    with pytest.raises(ValueError, match="norms: expected a scalar gate"):
        rule("gla")[0].norms()
    with pytest.raises(ValueError, match="norms: not defined for writes with edits"):
        delta_rule(Edits([0], [1], [0], torch.ones(1, K), torch.ones(1, V)))[1].writes.norms()


@pytest.mark.parametrize("family", ["delta", "ssd"])
def test_identity_1_activations_without_states(family):
    if family == "delta":
        _, out = delta_rule()
        writes, states = out.writes, out.snapshots
    else:
        writes, _, states = rule("ssd")
    v, w = (torch.randn(H, 5, 2, size).double() for size in (K, V))
    pre, last = preactivations(writes, v, w, list(range(H)), writes.initial_state)
    expected = torch.einsum("hfrk,bthkv,hfrv->bthf", v, states, w)
    check_close("activations", pre, expected, EXACT)
    check_close("carry", last, expected[:, -1], EXACT)


def test_identity_2_channel_gate():
    """`v^T S_t w` by carrying `y = S w`, one vector of K an atom, through a channel gate."""
    writes, _, states = rule("rwkv7")
    v, w = torch.randn(K).double(), torch.randn(V).double()
    y = torch.einsum("bhkv,v->bhk", writes.initial_state, w)
    for t in range(states.shape[1]):
        y = writes.decay[:, t].exp() * y + torch.einsum("bhrk,bhrv,v->bhk", writes.left[:, t], writes.right[:, t], w)
        check_close("activation", y @ v, torch.einsum("k,bhkv,v->bh", v, states[:, t], w), EXACT)


def test_identity_3_propagation():
    """The change an addition makes to all later states and outputs, from the clean pass alone."""
    edits = Edits([0, 1, 1], [0, 17, T - 1], [0, 3, 1], torch.randn(3, K).double(), torch.randn(3, V).double())
    x, clean = delta_rule()
    paths = clean.writes.propagate(edits)
    q = x["q"] * torch.rsqrt(x["q"].square().sum(-1, keepdim=True) + 1e-6) * K**-0.5
    for i in range(len(edits)):
        n, t, h = int(edits.row[i]), int(edits.position[i]), int(edits.head[i])
        _, edited = delta_rule(edits[i : i + 1])
        length = T - t
        moved = torch.einsum("tk,v->tkv", paths[i, :length], edits.right[i])
        check_close("state change", (edited.snapshots - clean.snapshots)[n, t:, h], moved, 1e-11)
        read = (paths[i, :length] * q[n, t:, h // 2]).sum(1, keepdim=True) * edits.right[i]
        check_close("output change", (edited.o - clean.o)[n, t:, h], read, 1e-11)
        assert not paths[i, length:].any() and not (edited.o - clean.o)[n, :t].any()
        assert not (edited.o - clean.o)[1 - n].any()


@pytest.mark.parametrize("name", ["ssd", "rwkv7", "kda", "gla"])
def test_identity_3_every_rule(name):
    """The same by linearity: the recurrence without writes, started from the perturbation."""
    writes, _, states = rule(name)
    p, q = torch.randn(1, K).double(), torch.randn(1, V).double()
    path = writes.propagate(Edits([1], [4], [2], p, q), length=9)[0]
    decay = writes.decay[1, :, 2].exp()
    state = torch.outer(p[0], q[0])
    for step in range(9):
        if step:
            t = 4 + step
            gate = decay[t, :, None] if decay.ndim == 2 else decay[t]
            erase = 0
            if writes.erase is not None:
                read, write = (x[1, t, 2] for x in writes.erase)
                erase = torch.outer(write, read @ state)
            state = gate * state + erase
        check_close("perturbation", torch.outer(path[step], q[0]), state, EXACT)


def test_identity_3_splice():
    """Adding `p q^T` after token t moves the activations of that token by (v.p)(q.w), and earlier ones not at all."""
    edit = Edits([0], [20], [1], torch.randn(1, K).double(), torch.randn(1, V).double())
    v, w = (torch.randn(H, 7, 1, size).double() for size in (K, V))
    (_, clean), (_, edited) = delta_rule(), delta_rule(edit)
    before, after = (
        preactivations(out.writes, v, w, list(range(H)), out.writes.initial_state)[0] for out in (clean, edited)
    )
    assert torch.equal(before[0, :20], after[0, :20])
    moved = (v[1, :, 0] @ edit.left[0]) * (w[1, :, 0] @ edit.right[0])
    check_close("splice", (after - before)[0, 20, 1], moved, EXACT)
    expected = torch.einsum("hfrk,bthkv,hfrv->bthf", v, edited.snapshots, w)
    check_close("activations", after, expected, EXACT)


def test_identity_4_loss_without_states():
    """`||S - M - sum a A||^2` from inner products, the Gram matrix and the norms."""
    _, out = delta_rule()
    v, w = torch.randn(3, K).double(), torch.randn(3, V).double()
    a, M = torch.randn(B, T, H, 3).double(), torch.randn(H, K, V).double()
    dense = (out.snapshots - M - torch.einsum("bthf,fk,fv->bthkv", a, v, w)).square().sum((3, 4))
    factors = (v.expand(H, 3, K)[:, :, None], w.expand(H, 3, V)[:, :, None])
    products, _ = preactivations(out.writes, *factors, list(range(H)), out.writes.initial_state)
    products = products - torch.einsum("fk,hkv,fv->hf", v, M, w)
    # <M, S> is an activation too, of the rank-K atom M = sum_k e_k M_k^T.
    unit = torch.eye(K).double().expand(H, 1, K, K)
    mean, _ = preactivations(out.writes, unit, M[:, None], list(range(H)), out.writes.initial_state)
    residual = out.writes.norms().square() - 2 * mean[..., 0] + M.square().sum((1, 2))
    gram = (v @ v.T) * (w @ w.T)
    loss = residual - 2 * (a * products).sum(-1) + torch.einsum("bthf,fg,bthg->bth", a, gram, a)
    check_close("loss", loss, dense, EXACT)


def test_identity_5_two_propagators():
    """Increments under the gate alone and `beta k v^T` under the full transition sum to the same state."""
    x, out = delta_rule()
    writes = out.writes
    k = writes.left[:, :, :, 0].repeat_interleave(2, 2)
    state = writes.initial_state
    for t in range(T):
        transition = torch.eye(K).double() - x["beta"][:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None, :]
        state = x["g"][:, t].exp()[..., None, None] * (transition @ state)
        state = state + x["beta"][:, t, :, None, None] * k[:, t, :, :, None] * x["v"][:, t, :, None, :]
    total = x["g"].cumsum(1)
    weight = (total[:, -1:] - total).exp()
    summed = torch.einsum("bth,bthk,bthv->bhkv", weight, k, writes.right[:, :, :, 0])
    summed = summed + total[:, -1].exp()[..., None, None] * writes.initial_state
    check_close("states", summed, state, EXACT)
    check_close("final_state", out.final_state, state, EXACT)


def test_cosine():
    _, out = delta_rule(Edits.delete([0], [5], [1], K, V))
    v, w = torch.randn(K).double(), torch.randn(V).double()
    left = out.writes.left.repeat_interleave(2, 2)
    cosine = torch.nn.functional.cosine_similarity
    increments = torch.einsum("bthrk,bthrv->bthrkv", left, out.writes.right).flatten(-2)
    expected = cosine(increments, torch.outer(v, w).flatten(), dim=-1)
    found = out.writes.cosine((v, w))
    check_close("cosine", found, expected, EXACT)
    assert found[0, 5, 1] == 0 and torch.equal(out.writes.cosine((v.expand(H, K), w.expand(H, V))), found)
    with pytest.raises(ValueError, match="atom: expected v"):
        out.writes.cosine((w, v))


def test_bad_input():
    left, right, decay = torch.zeros(1, 3, 1, 1, K), torch.zeros(1, 3, 2, 1, V), torch.zeros(1, 3, 2)
    writes = Writes(decay, left, right)
    for arguments, message in (
        ((decay, left[0], right), r"left: expected \[B, T, Hl, R, K\]"),
        ((decay, left, right[0]), r"right: expected \[B, T, H, R, V\]"),
        ((decay, left, right[:, :2]), "right: expected .*T=3"),
        ((decay[..., :1], left, right), r"decay: expected \[B=1, T=3, H=2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Writes(*arguments)
    with pytest.raises(ValueError, match="decay_matrix: expected"):
        Writes(decay, left, right, decay_matrix=torch.zeros(2, K, V))
    with pytest.raises(ValueError, match="positions: .* row 0, position 3"):
        writes.states([3])
    with pytest.raises(ValueError, match="edit: out of range: row 0, position 3"):
        writes.propagate(Edits([0], [3], [0], torch.zeros(1, K), torch.zeros(1, V)))
    with pytest.raises(ValueError, match='propagate takes kind "add" only'):
        writes.propagate(Edits.delete([0], [1], [0], K, V))
    with pytest.raises(ValueError, match="element gate does not keep"):
        rule("selective_scan")[0].propagate(Edits([0], [1], [0], torch.zeros(1, K), torch.zeros(1, V)))
