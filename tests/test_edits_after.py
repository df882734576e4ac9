"""Edits after the read: what token t + 1 meets is edited, what token t read is not. Through everything that carries
edits: writes, codes, hooked models. (The rules themselves, and one-token steps: test_rules.py.)"""

from __future__ import annotations

import pytest
import torch
from rules import EXACT, GATED_DELTA_RULE, edits_for, loop, run
from targets import Target, to_cpu
from test_attach import DenseDictionary, dictionary, one_edit
from test_rules import packed
from tiny_models import families, tiny_model, tokens

from writesae import Edits, attach, ops
from writesae.edits import KINDS
from writesae.testing import check_close, gated_delta_rule_inputs

KIND = "reference"
B, T, HK, H, K, V = 2, 23, 2, 4, 7, 5


def inputs(dtype=torch.float64, **options):
    return gated_delta_rule_inputs(B, T, HK, H, K, V, dtype, decay="weak", correlated=True, **options)


@pytest.mark.parametrize("lengths", [[46], [13, 0, 1, 32]])
def test_codes_are_of_states_as_read(lengths, case):
    x, offsets = packed(case, lengths, HK, H, K, V, dtype=torch.float64, decay="weak", correlated=True)
    heads = case.sizes(x)[3]
    initial = torch.randn(len(lengths), heads, K, V).double()
    edits = edits_for(len(lengths), lengths, heads, K, V, count=24)
    if 0 not in lengths:
        edits = Edits.cat([edits, Edits.add(-1, 0, 0, torch.randn(K), torch.randn(V), "after")])
    places = torch.tensor([[n, t] for n, length in enumerate(lengths) for t in range(length)])
    call = {"initial_state": initial, "cu_seqlens": offsets, "edits": edits, "snapshots": places}
    truth = loop(case, x, **call)
    assert (truth.read - truth.snapshots).abs().max() > 0.1
    out = run(case, Target("reference", "reference"), x, **call)
    check_close("states as read", out.writes.states(places, read=True), truth.read, EXACT)
    v, w = torch.randn(heads, 9, 1, K).double(), torch.randn(heads, 9, 1, V).double()
    codes = ops.encode(out.writes, v, w, k=9)
    expected = torch.einsum("hfk,thkv,hfv->thf", v[:, :, 0], truth.read, w[:, :, 0])
    check_close("codes", codes.values[0], expected.relu().sort(descending=True).values, EXACT)
    after = torch.einsum("hfk,nhkv,hfv->nhf", v[:, :, 0], truth.final_state, w[:, :, 0])
    check_close("carry", codes.carry, after, EXACT)


def test_an_addition_after_is_one_before_the_next_token_decayed_and_erased(case):
    if case.gate == "element":
        pytest.skip("an addition does not stay of rank one")
    reference = Target("reference", "reference")
    x = case.make(B, T, HK, H, K, V, torch.float64, decay="weak", correlated=True)
    clean = run(case, reference, x).writes
    edits = Edits.add([0, 1], [3, 11], [2, 1], torch.randn(2, K).double(), torch.randn(2, V).double(), "after")
    path = clean.propagate(edits)
    assert not path[:, 0].any()
    early = clean.propagate(Edits(edits.row, edits.position, edits.head, edits.left, edits.right))
    assert torch.equal(path[:, 1:], early[:, 1:]) and torch.equal(early[:, 0], edits.left)
    moved = Edits.add(edits.row, edits.position + 1, edits.head, path[:, 1], edits.right)
    a, b = (run(case, reference, x, edits=e) for e in (edits, moved))
    check_close("o", a.o, b.o, EXACT)
    check_close("final state", a.final_state, b.final_state, EXACT)


def test_gradients_of_writes_and_codes():
    """Through codes of edited writes (the opposite of a removed write is among their edits) and states: float64."""
    x = {name: y[:1, :9].clone().requires_grad_() for name, y in inputs().items()}
    sides = [torch.randn(4, size).double().requires_grad_() for size in (K, V)]
    v, w = torch.randn(H, 6, 1, K).double(), torch.randn(H, 6, 1, V).double()

    def loss(read_by_states, *tensors):
        edits = Edits([0] * 4, [2, 5, 8, 8], [1, 1, 0, 0], *tensors[5:], ["add", "replace", "add", "delete"], "after")
        out = ops.gated_delta_rule(*tensors[:5], use_qk_l2norm=True, edits=edits, return_writes=True)
        if not read_by_states:
            return ops.encode(out.writes, v, w, k=6).values.square().sum()
        states = out.writes.states(range(9), read=True)
        return torch.einsum("hfk,bthkv,hfv->bthf", v[:, :, 0], states, w[:, :, 0]).relu().square().sum()

    leaves = (*x.values(), *sides)
    expected, got = (torch.autograd.grad(loss(way, *leaves), leaves[1:]) for way in (True, False))  # q is in none
    for a, b in zip(got, expected, strict=True):
        check_close("gradient", a, b, 1e-10)


def test_codes_go_on_from_a_carry(each_target):
    """A sequence cut right after the edited token: its edit is in no code of the first call, in all of the second."""
    x = gated_delta_rule_inputs(2, 30, 1, 2, 8, 6, decay="weak")
    edits = Edits([0, 1, -1], [11, 11, 11], [1, 0, 0], torch.randn(3, 8), torch.randn(3, 6), list(KINDS), "after")
    v, w = torch.randn(2, 20, 1, 8), torch.randn(2, 20, 1, 6)
    whole = run(GATED_DELTA_RULE, each_target, x, edits=edits)
    first = run(GATED_DELTA_RULE, each_target, {name: y[:, :12] for name, y in x.items()}, edits=edits)
    state = first.final_state
    second = run(GATED_DELTA_RULE, each_target, {name: y[:, 12:] for name, y in x.items()}, initial_state=state)
    check_close("o", torch.cat([first.o, second.o], 1), whole.o)
    clean = run(GATED_DELTA_RULE, each_target, x)

    def codes(writes, **more):
        with each_target.in_use():
            return to_cpu(
                ops.encode(
                    *map(each_target.put, (writes, v, w)), k=20, backend=each_target.kind, **each_target.put(more)
                )
            )

    all_codes, head, untouched = codes(whole.writes), codes(first.writes), codes(clean.writes)
    check_close("before", head.values, untouched.values[:, :12], 1e-6)
    tail = codes(second.writes, carry=head.carry)
    check_close("codes", torch.cat([head.values, tail.values], 1), all_codes.values)
    assert (tail.values - untouched.values[:, 12:]).abs().max() > 0.1


# ---- the type -------------------------------------------------------------------------------------------------------


def test_when_is_a_column():
    p, q = torch.ones(4), torch.ones(3)
    edits = Edits.cat(
        [Edits.add(0, [3, 5], 1, p, q, "after"), Edits.delete(-1, 2, 0, 4, 3), Edits.replace(0, 1, 0, p, q)]
    )
    assert edits.when.tolist() == [1, 1, 0, 0] and edits.when.dtype == torch.int8
    assert Edits(0, [1, 2], 0, p, q, when=["before", "after"]).when.tolist() == [0, 1]
    assert Edits(0, [1, 2], 0, p, q, when=torch.tensor([1, 0])).when.tolist() == [1, 0]
    assert (
        edits[1:3].when.tolist() == [1, 0]
        and edits[edits.kind == 1].when.tolist() == [0]
        and edits[0].when.tolist() == [1]
    )
    wide = Edits.delete([-1, 1], [2, 0], 0, 4, 3, when=["after", "before"]).expand_rows(3)
    assert wide.when.tolist() == [1, 1, 1, 0] and wide.row.tolist() == [0, 1, 2, 1]
    shown = "Edits(1 delete, 1 replace, 2 add after; row -1..0, position 1..5, head 0..1; K=4, V=3)"
    assert repr(edits) == shown
    for when, said in (
        ("later", "when: expected one of before, after, got 'later'"),
        (2, "when: expected codes 0 to 1"),
    ):
        with pytest.raises(ValueError, match=said):
            Edits.add(0, 0, 0, p, q, when)


def test_a_kernel_of_codes_refuses_what_it_does_not_know():
    decay, left, right = torch.zeros(1, 3, 1), torch.ones(1, 3, 1, 1, 2), torch.ones(1, 3, 1, 1, 2)
    factors = torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1, 2)
    edit = torch.tensor([[0, 1, 0, 4]]), torch.ones(1, 2), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="edit 0 is no addition before its token's read"):
        torch.ops.writesae.encode_topk(decay, left, right, torch.tensor([0]), *factors, None, 2, None, None, *edit)
    with pytest.raises(RuntimeError, match="edit 0 is out of range: row 0, head 0, kind 3"):
        index = torch.tensor([[0, 1, 0, 3]])
        x = gated_delta_rule_inputs(1, 3, 1, 1, 2, 2)
        torch.ops.writesae.gated_delta_rule(*x.values(), 1.0, None, False, None, index, *edit[1:], None, False)


# ---- hooked models --------------------------------------------------------------------------------------------------


def test_a_hooked_model_changes_from_the_next_token_on():
    model, x = tiny_model(), tokens(1, 9)
    edit = one_edit(0, 4, 0)
    late = Edits(edit.row, edit.position, edit.head, edit.left, edit.right, "replace", "after")
    sites = {(0, 0): dictionary(0), (0, 1): DenseDictionary(dictionary(1))}
    runs = []
    for plan in ({}, {0: late}, {0: Edits.cat([late, Edits(0, 4, 1, late.left, late.right, when="after")])}):
        with torch.no_grad(), attach(model, sites, edits=plan) as tap:
            logits = model(x, use_cache=False).logits
        runs.append((logits, tap.firings))
    (clean, fired), (one, fired_one), (_, fired_two) = runs
    check_close("logits up to the edit", one[:, :5], clean[:, :5], 1e-6)
    assert (one[:, 5] - clean[:, 5]).abs().max() > 1e-3

    def of(firings, head, positions):
        f = firings[(firings.layer == 0) & (firings.head == head)]
        return f[torch.isin(f.position, positions)].sort()

    early, next_ones = torch.arange(5), torch.arange(5, 9)
    for one, head in ((fired_one, 0), (fired_two, 1)):  # by a running sum, and by a dense encoder from whole states
        a, b = of(one, head, early), of(fired, head, early)
        assert torch.equal(a.feature, b.feature)
        torch.testing.assert_close(a.activation, b.activation, rtol=1e-4, atol=1e-5)
        a, b = of(one, head, next_ones), of(fired, head, next_ones)
        assert len(a) != len(b) or (a.activation - b.activation).abs().max() > 1e-2


def test_decoding_and_packing_equal_one_pass():
    model, x = tiny_model(), tokens(1, 10)
    plan = {
        0: Edits.cat([one_edit(0, 3, 1), one_edit(0, 7, 2, seed=1)]),
        3: Edits.delete(0, [6, 8], [1, 0], 8, 6, when="after"),
    }
    plan[0] = Edits(*(getattr(plan[0], n) for n in ("row", "position", "head", "left", "right", "kind")), "after")
    sites = {(layer, h): dictionary(h) for layer in (0, 3) for h in range(4)}
    with torch.no_grad(), attach(model, sites, edits=plan) as tap:
        whole = model(x, use_cache=False).logits
        firings = tap.firings.sort()
    with torch.no_grad(), attach(model, sites, edits=plan) as tap:
        out, cut = model(x[:, :4], use_cache=True), []
        cut.append(out.logits)
        for t in range(4, 10):
            out = model(x[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            cut.append(out.logits)
        decoded = tap.firings.sort()
    check_close("logits", torch.cat(cut, 1), whole, 1e-5)
    torch.testing.assert_close(decoded.activation, firings.activation, rtol=1e-4, atol=1e-4)
    assert torch.equal(decoded.feature, firings.feature) and torch.equal(decoded.position, firings.position)
    other = tokens(1, 4, seed=9)
    positions = torch.cat([torch.arange(4), torch.arange(10)])[None]
    moved = {layer: e._with(row=e.row + 1) for layer, e in plan.items()}
    with torch.no_grad(), attach(model, sites, edits=moved):
        packed = model(torch.cat([other, x], 1), position_ids=positions, use_cache=False).logits
    check_close("packed", packed[:, 4:], whole, 1e-5)


def state_in(cache, layer):
    """The state `[B, H, K, V]` of a layer in a transformers cache."""
    held = getattr(cache.layers[layer], "recurrent_states", None) if hasattr(cache, "layers") else None
    held = cache.recurrent_states[layer] if held is None else held
    return held[0] if isinstance(held, dict) else held


@pytest.mark.parametrize("family", [x for x in ("qwen3_5", "qwen3_next", "olmo_hybrid") if x in families()])
def test_a_model_whose_cache_is_patched_by_hand(family):
    """The paper's procedure by transformers' own code: token t runs, the cached state is changed, decoding goes on."""
    model, x, t, layer = tiny_model(family), tokens(2, 12), 5, 1
    with torch.no_grad(), attach(model, {(layer, h): None for h in range(4)}) as tap:
        model(x, use_cache=False)
        writes = tap.writes[layer]
    p, q = torch.randn(2, 8), torch.randn(2, 6)
    for kind in KINDS:
        edits = Edits([0, 1], [t, t], [3, 1], p, q, kind, "after")
        with torch.no_grad(), attach(model, {}, edits={layer: edits}):
            got = model(x, use_cache=False).logits
        by_step = []
        with torch.no_grad():
            out = model(x[:, : t + 1], use_cache=True)
            state = state_in(out.past_key_values, layer)
            for b, h, i in ((0, 3, 0), (1, 1, 1)):
                if kind != "add":
                    state[b, h] -= torch.outer(writes.left[b, t, h // 2, 0], writes.right[b, t, h, 0])
                if kind != "delete":
                    state[b, h] += torch.outer(p[i], q[i])
            by_step.append(out.logits)
            for s in range(t + 1, 12):
                out = model(x[:, s : s + 1], past_key_values=out.past_key_values, use_cache=True)
                by_step.append(out.logits)
        by_step = torch.cat(by_step, 1)
        check_close(f"logits, {kind}", got, by_step, 2e-5)
        with torch.no_grad():
            clean = model(x, use_cache=False).logits
        assert (by_step - clean)[:, t + 1 :].abs().max() > 100 * (by_step - got).abs().max(), "the edit must matter"
