"""The identities that let `Writes` stand for the states, in float64, over every write rule."""

from __future__ import annotations

from dataclasses import replace

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


def kda(x, initial, edits=()):
    """Kimi Delta, a token at a time: (states `[B, T, H, K, V]`, its writes), of a delta rule with a channel gate."""
    k = torch.nn.functional.normalize(x["k"], dim=-1)
    keys, state, states, rights = k.repeat_interleave(2, 2), initial, [], []
    for t in range(T):
        state = x["decay"][:, t].exp()[..., None] * state
        u = x["beta"][:, t, :, None] * (x["v"][:, t] - torch.einsum("bhkv,bhk->bhv", state, keys[:, t]))
        state = state + keys[:, t, :, :, None] * u[..., None, :]
        for row, position, head, p, q in edits:
            if position == t:
                state = state.clone()
                state[row, head] += torch.outer(p, q)
        states.append(state)
        rights.append(u)
    right = torch.stack(rights, 1)[:, :, :, None]
    return torch.stack(states, 1), Writes(x["decay"], k[:, :, :, None], right, x["beta"], initial_state=initial)


def kda_inputs():
    generator = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = {"k": normal(B, T, 2, K), "v": normal(B, T, H, V), "beta": normal(B, T, H).sigmoid()}
    return x | {"decay": -0.3 * normal(B, T, H, K).abs()}, normal(B, H, K, V)


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
    with pytest.raises(ValueError, match="norms: not defined for writes with edits"):
        delta_rule(Edits([0], [1], [0], torch.ones(1, K), torch.ones(1, V)))[1].writes.norms()


@pytest.mark.parametrize("name", RULES)
def test_norms_of_every_rule(name):
    writes, _, states = rule(name)
    check_close("norms", writes.norms(), states.norm(dim=(3, 4)), EXACT)


def test_delta_rule_with_a_channel_gate():
    """Kimi Delta, whose erase reads the decayed state: states, norms and the path of a perturbation."""
    x, initial = kda_inputs()
    states, writes = kda(x, initial)
    assert (writes.gate, writes.transition) == ("channel", "delta")
    check_close("states", writes.states(range(T)), states, EXACT)
    check_close("norms", writes.norms(), states.norm(dim=(3, 4)), EXACT)
    edits = Edits([0, 1], [3, 40], [2, 1], torch.randn(2, K).double(), torch.randn(2, V).double())
    paths = writes.propagate(edits)
    for i, (row, t, head) in enumerate(((0, 3, 2), (1, 40, 1))):
        edited, _ = kda(x, initial, [(row, t, head, edits.left[i], edits.right[i])])
        moved = torch.einsum("tk,v->tkv", paths[i, : T - t], edits.right[i])
        check_close("state change", (edited - states)[row, t:, head], moved, 1e-11)
        assert paths[i, 1].any() and not paths[i, T - t :].any()
    alone = writes.head(2).propagate(edits[:1]._with(head=torch.tensor([0])))
    assert torch.equal(alone[0], paths[0])


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
    k, u = writes.rank_one("this test")
    state = writes.initial_state
    for t in range(T):
        transition = torch.eye(K).double() - x["beta"][:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None, :]
        state = x["g"][:, t].exp()[..., None, None] * (transition @ state)
        state = state + x["beta"][:, t, :, None, None] * k[:, t, :, :, None] * x["v"][:, t, :, None, :]
    total = x["g"].cumsum(1)
    weight = (total[:, -1:] - total).exp()
    summed = torch.einsum("bth,bthk,bthv->bhkv", weight, k, u)
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
    for atom in ((w, v), (v.expand(3, K), w), (v, w.expand(1, 1, V))):
        with pytest.raises(ValueError, match="atom: expected v"):
            out.writes.cosine(atom)


# ---- doors ----------------------------------------------------------------------------------------------------------


def test_kinds():
    found = {name: (w.gate, w.transition) for name in RULES for w in [rule(name)[0]]}
    assert found == {
        "ssd": ("scalar", "none"), "rwkv7": ("channel", "low rank"), "kda": ("channel", "low rank"),
        "gla": ("channel", "none"), "selective_scan": ("element", "none"),
    }  # fmt: skip
    _, out = delta_rule()
    assert (out.writes.gate, out.writes.transition) == ("scalar", "delta")
    assert "scalar gate, transition delta" in repr(out.writes)


def same(one: Writes, other: Writes) -> None:
    for name in ("decay", "left", "right", "beta", "decay_matrix", "initial_state", "cu_seqlens"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
    assert (one.erase is None) == (other.erase is None)


@pytest.mark.parametrize("name", [*RULES, "delta"])
def test_one_head_and_some_heads(name):
    writes = rule(name)[0] if name != "delta" else delta_rule()[1].writes
    states, norms = writes.states([0, 5, 22]), writes.norms()
    heads = writes.shape[2]
    for h in range(heads):
        one = writes.head(h)
        assert one.shape == (B, writes.shape[1], 1, *writes.shape[3:]) and one.left.shape[2] == 1
        assert (one.gate, one.transition) == (writes.gate, writes.transition)
        check_close("states", one.states([0, 5, 22])[:, :, 0], states[:, :, h], EXACT)
        check_close("norms", one.norms()[:, :, 0], norms[:, :, h], EXACT)
        assert one.right.data_ptr() == writes.right[:, :, h].data_ptr()  # a view
        same(writes.heads([h]), one)
    whole = Writes.of_heads([writes.head(h) for h in range(heads)])
    check_close("states", whole.states([0, 5, 22]), states, EXACT)
    some = replace(writes.tokens(1, 6, 23), initial_state=states[1, 1:2])
    check_close("states", some.states([16])[0, 0], states[1, 2], EXACT)
    few = writes.heads([heads - 1, 0, 0])
    check_close("states", few.states([5]), states[:, 1:2, [heads - 1, 0, 0]], EXACT)
    if writes.gate != "element":
        edit = Edits([1], [4], [heads - 1], torch.randn(1, K).double(), torch.randn(1, V).double())
        moved = few.propagate(edit._with(head=torch.tensor([0])))
        assert torch.equal(moved, writes.propagate(edit))


@pytest.mark.parametrize("packed", [None, [0, 30, 30, 31, T]])
def test_heads_keep_their_own_edits(packed):
    offsets = None if packed is None else torch.tensor(packed)
    writes = delta_rule(packed=offsets, snapshots=None)[1].writes
    last = writes.num_sequences - 1
    edits = Edits([0, last, last], [3, 38, 5], [0, 1, 0], torch.randn(3, K).double(), torch.randn(3, V).double())
    writes = replace(writes, edits=edits)
    places = torch.tensor([[0, 3], [0, 29], [last, 38], [last, 4], [last, 5]])
    states = writes.states(places)
    for h in range(H):
        one = writes.head(h)
        check_close("states", one.states(places)[:, 0], states[:, h], EXACT)
        assert (one.edits is None) == (h > 1)
    whole = Writes.of_heads([writes.head(h) for h in range(H)])
    check_close("states", whole.states(places), states, EXACT)
    few = writes.heads([1, 0, 1])
    check_close("states", few.states(places), states[:, [1, 0, 1]], EXACT)
    assert few.edits.head.tolist() == [0, 1, 1, 2] and few.edits.position.tolist() == [38, 3, 5, 38]


def test_edits_of_every_row_are_in_every_state():
    _, out = delta_rule()
    edit = Edits.add(-1, 7, 2, torch.randn(K).double(), torch.randn(V).double())
    plain, edited = (replace(out.writes, edits=e).states([7]) for e in (None, edit))
    added = torch.zeros_like(plain)
    added[:, 0, 2] = torch.outer(edit.left[0], edit.right[0])
    check_close("states", edited - plain, added, 1e-11)


@pytest.mark.parametrize("packed", [None, [0, 30, 30, 31, T]])
def test_native_writes(packed):
    """At numbers and tensors of places, in rows and packed sequences, they are what the states differ by."""
    _, out = delta_rule(packed=None if packed is None else torch.tensor(packed), snapshots=None)
    writes = out.writes
    row, position, head = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 29, 20, 5]), torch.tensor([0, 3, 2, 1])
    row = row if packed is None else 3 * row
    left, right = writes.native(row, position, head)
    assert left.shape == (4, K) and right.shape == (4, V)
    before, after = (writes.states(torch.stack([row, t], 1))[torch.arange(4), head] for t in (position - 1, position))
    token = position if packed is None else torch.tensor(packed)[row] + position
    gate = writes.decay[0 * row if packed else row, token, head].exp()
    check_close("write", torch.einsum("nk,nv->nkv", left, right), after - gate[:, None, None] * before, 1e-11)
    for i in range(4):
        one = writes.native(int(row[i]), int(position[i]), int(head[i]))
        assert torch.equal(one[0], left[i]) and torch.equal(one[1], right[i])
    p, q = writes.native(row[:, None], torch.arange(5), head[:, None])
    assert p.shape == (4, 5, K) and q.shape == (4, 5, V) and torch.equal(q[3, 4], writes.native(row[3], 4, 1)[1])
    total = writes.native(row, position, head, write="total")
    assert torch.equal(total[0], left[:, None]) and torch.equal(total[1], right[:, None])
    assert writes.native(row[:0], position[:0], head[:0])[0].shape == (0, K)


def test_native_writes_of_two_a_token():
    """RWKV-7 erases and writes: which is meant is said, and the new one is k v^T."""
    writes, _, states = rule("rwkv7")
    row, position, head = torch.tensor([0, 1]), torch.tensor([3, 9]), torch.tensor([1, 3])
    new, erase, total = (writes.native(row, position, head, write) for write in ("new", "erase", "total"))
    assert torch.equal(writes.native(row, position, head)[0], new[0])
    read, write = (x[row, position, head] for x in writes.erase)
    check_close("erased", erase[1], torch.einsum("nk,nkv->nv", read, states[row, position - 1, head]), EXACT)
    assert torch.equal(erase[0], write) and torch.equal(total[1], torch.stack([erase[1], new[1]], 1))
    with pytest.raises(ValueError, match=r"readers: expected one write a token \(R = 1\), got R=2"):
        writes.rank_one("readers")
    with pytest.raises(ValueError, match="write: expected new or total, got erase"):
        rule("ssd")[0].native(0, 0, 0, write="erase")
    two = Writes(writes.decay, writes.left, writes.right)
    with pytest.raises(ValueError, match="write: expected total, got new, and which of R=2"):
        two.native(0, 0, 0)
    with pytest.raises(ValueError, match="propagate: expected one write a token"):
        replace(two, beta=writes.decay[..., 0]).propagate(Edits([0], [1], [0], torch.zeros(1, K), torch.zeros(1, V)))


def test_doors_refuse_by_name():
    _, out = delta_rule()
    packed = delta_rule(packed=torch.tensor([0, 30, 31, T]), snapshots=None)[1].writes
    for call, message in (
        (lambda: out.writes.head(H), f"^head: expected 0 <= head < H={H}, got {H}"),
        (lambda: out.writes.head(-1), f"^head: expected 0 <= head < H={H}, got -1"),
        (lambda: out.writes.heads([0, H]), f"^head: expected 0 <= head < H={H}, got {H}"),
        (lambda: out.writes.left_head(1.5), "^head: expected integers, got float 1.5"),
        (lambda: out.writes.native(B, 0, 0), rf"^row: expected 0 <= row < {B} \(rows\), got {B}"),
        (lambda: out.writes.native(0, torch.tensor([0, T]), 0), f"^position: expected 0 <= position < {T} .*, got {T}"),
        (lambda: out.writes.native(0, 0, torch.tensor([0, -1])), f"^head: expected 0 <= head < {H} .*, got -1"),
        (lambda: packed.native(3, 0, 0), r"^row: expected 0 <= row < 3 \(packed sequences\), got 3"),
        (lambda: packed.native(torch.tensor([0, 1]), 1, 0), "^position: expected 0 <= position < 1 .*, got 1"),
        (lambda: out.writes.native(0, 0.5, 0), "^position: expected integers, got float 0.5"),
        (lambda: out.writes.native(0, torch.zeros(2), 0), "^position: expected a tensor of integers"),
        (lambda: out.writes.native(torch.zeros(2).long(), torch.zeros(3).long(), 0), "^row, position, head: expected"),
        (lambda: out.writes.native(0, 0, 0, write="first"), "^write: expected one of new, erase, total, got 'first'"),
        (lambda: replace(out.writes, beta=out.writes.beta[:, :5]), r"^beta: expected \[B=2, T=70, H=4\], got"),
        (lambda: replace(rule("rwkv7")[0], beta=torch.zeros(B, 23, H)), "^beta: .* beside an erase"),
        (lambda: replace(rule("rwkv7")[0], erase=(torch.zeros(2), torch.zeros(3))), r"^erase: expected \(read, write"),
        (lambda: replace(out.writes, edits=Edits.delete(0, 1, 2, K, V)).states([3]), 'edits of kind "add" only'),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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
    with pytest.raises(ValueError, match=r"edit.position: expected 0 <= position < 3 \(tokens\), got 3"):
        writes.propagate(Edits([0], [3], [0], torch.zeros(1, K), torch.zeros(1, V)))
    with pytest.raises(ValueError, match='propagate takes kind "add" only'):
        writes.propagate(Edits.delete([0], [1], [0], K, V))
    with pytest.raises(ValueError, match="element gate does not keep"):
        rule("selective_scan")[0].propagate(Edits([0], [1], [0], torch.zeros(1, K), torch.zeros(1, V)))
