"""Policies: a user's own, what a view shows, counters, nesting, gradients, failed calls, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from decoding import go_on
from policy_cases import F, coded, dense, dictionary, some_sites
from tiny_models import tiny_mamba, tiny_model, tokens

import writesae
from writesae import Amplify, Clamp, Edits, Erase, Install, Policy, Scale, attach
from writesae.models import layers
from writesae.models.arguments import cache_of

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def run(model, saes, policies, ids=None, **kwargs):
    with attach(model, saes, policies=policies, self_test=False, **kwargs) as tap:
        logits = model(tokens(2, 12) if ids is None else ids, use_cache=False).logits
    return logits, tap


class Watch(Policy):
    """Keeps what it is shown, and does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shown = []

    def act(self, view):
        self.shown.append(view)


class AddAt(Policy):
    """Adds to one feature's atom at one position."""

    def act(self, view):
        v, w = view.site.atoms
        return [view.add(v[4, 0], 3 * w[4, 0]), view.add(v[4], w[4])]


# ---- what a view shows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["before", "after"])
def test_a_view_shows_the_token_as_it_is_with_earlier_edits_and_without_its_own(model, read):
    saes = some_sites(model)
    place = (0, 3)
    sae, watch = saes[place], Watch(sites=[place])
    _, tap = run(model, saes, [AddAt(sites=[place], positions=[5], read=read), watch])
    writes = tap.writes[0]
    shown = {(v.row, v.position): v for v in watch.shown}  # the last time it was shown
    assert len(shown) == 24
    for (row, t), view in shown.items():
        left, right = writes.native(row, t, 3)
        torch.testing.assert_close(view.left, left, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(view.right, right, atol=1e-5, rtol=1e-5)
        state = writes.states([t], read=True)[row, 0, 3]
        if t == 5 and read == "before":
            state = state - 4 * torch.outer(*(x[4, 0] for x in sae.atoms()))
        codes = torch.zeros(F).index_put((view.features,), view.activations)
        torch.testing.assert_close(codes.double(), coded(sae, state), atol=1e-4, rtol=1e-4)
        assert view.mine.all() and (view.activations.diff() <= 0).all()
        if row == 1:  # of any features; here of the view that was kept, after the run
            torch.testing.assert_close(
                view.activation([0, 7]).double(), dense(sae, state)[[0, 7]], atol=1e-4, rtol=1e-4
            )


def test_a_policy_is_asked_only_where_its_features_fire_and_at_its_positions(model):
    saes = some_sites(model)
    features, everywhere = Watch([1, 8]), Watch([1, 8], positions=[2, 3, 11])
    with pytest.warns(RuntimeWarning, match="never acted"):
        _, tap = run(model, saes, [features, everywhere])
    firings = tap.firings
    mine = firings[torch.isin(firings.feature, torch.tensor([1, 8]))]
    places = {tuple(x) for x in torch.stack([mine.row, mine.position, mine.layer, mine.head], 1).tolist()}
    assert {(v.row, v.position, *v.site.key) for v in features.shown} == places
    assert {(v.row, v.position, *v.site.key) for v in everywhere.shown} == {x for x in places if x[1] in (2, 3, 11)}
    for view in features.shown:
        assert set(view.features[view.mine].tolist()) == set(view.features.tolist()) & {1, 8}


def test_a_policy_that_answers_nothing_changes_nothing(model):
    saes = some_sites(model)
    with attach(model, saes, self_test=False) as plain:
        logits = model(tokens(2, 12), use_cache=False).logits
    with pytest.warns(RuntimeWarning, match=r"policies\[0\], Watch\(read='after'\), never acted"):
        same, tap = run(model, saes, [Watch()])
    assert torch.equal(logits, same)
    for name, column in plain.firings.columns().items():
        assert torch.equal(column, getattr(tap.firings, name))


def test_what_a_policy_of_ones_own_answers_is_the_edit(model):
    saes, place = some_sites(model), (3, 0)
    v, w = saes[place].atoms()
    edits = Edits([0, 1] * 2, [5] * 4, [0] * 4, v[4], torch.cat([3 * w[4], 3 * w[4], w[4], w[4]]), when="before")
    with attach(model, saes, edits={3: edits}, self_test=False):
        planned = model(tokens(2, 12), use_cache=False).logits
    logits, tap = run(model, saes, [AddAt(sites=[place], positions=[5], read="before")])
    torch.testing.assert_close(logits, planned, atol=1e-5, rtol=1e-5)
    assert tap.policies[0].applied == {place: 2} and tap.policies[0].seen == {place: 24}
    assert len(tap.writes[3].edits) == 4


class Halve(Policy):
    def act(self, view):
        return view.replace(view.left, view.right / 2)


def test_replacing_and_sites_without_a_dictionary(model):
    ids, sites = tokens(1, 9), {(0, 2): None}
    with attach(model, sites, self_test=False) as plain:
        model(ids, use_cache=False)
    _, tap = run(model, sites, [Halve(read="before", positions=[0])], ids)
    left, right = plain.writes[0].native(0, 0, 2)
    torch.testing.assert_close(tap.writes[0].states([0])[0, 0, 2], torch.outer(left, right / 2))
    _, tap = run(model, sites, [Halve(read="after")], ids)
    assert tap.policies[0].total == 9


# ---- what the policies do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("always", [False, True])
def test_a_clamped_feature_reads_the_value(model, always):
    """Encoder and decoder differ, and two features are clamped at once."""
    saes = some_sites(model)
    _, tap = run(model, saes, [Clamp([2, 9], 0.8, always=always, read="before")])
    seen = 0
    for (layer, head), sae in saes.items():
        states = tap.writes[layer].states(range(12), read=True)[:, :, head]
        for row in range(2):
            for t in range(12):
                e = tap.writes[layer].edits
                acted = always or bool(((e.row == row) & (e.position == t) & (e.head == head)).any())
                off = (dense(sae, states[row, t])[[2, 9]] - 0.8).abs()
                assert float(off.max() if always else off.min()) < 1e-4 or not acted
        seen += tap.policies[0].applied[layer, head]
    assert seen == 72 if always else 0 < seen < 72


def test_the_random_control_has_the_dose_of_what_it_stands_for(model):
    saes = some_sites(model)
    ids = tokens(1, 1)  # one token: both see the same codes
    for sae in saes.values():
        sae.v_dec *= torch.linspace(0.5, 2, F)[:, None, None]
    _, real = run(model, saes, [Amplify(range(F), 3.0)], ids)
    _, control = run(model, saes, [Amplify(range(0, F, 2), 3.0, control="random")], ids)
    _, other = run(model, saes, [Amplify(range(0, F, 2), 3.0, control="random", seed=1)], ids)
    found = [[(e.left, e.right) for e in [tap.writes[0].edits]][0] for tap in (real, control, other)]

    def norms(sides):
        return sides[0].norm(dim=1) * sides[1].norm(dim=1)

    per_atom = norms(found[0])
    for left, right in found[1:]:
        for one in norms((left, right)):
            assert float((per_atom - one).abs().min()) < 1e-5 * float(one)
    assert not torch.equal(found[1][0], found[2][0])
    with pytest.raises(ValueError, match=r"policies\[0\] \(Amplify\): control: expected other atoms at site"):
        run(model, saes, [Amplify(range(F), 3.0, control="random")])


def test_install_raises_the_tokens_logit():
    """All heads of a layer of the embedded model: the direct path adds up."""
    model, tokenizer, _ = writesae.load_default()
    ids = tokenizer("def main():\n    return os.path.", return_tensors="pt")["input_ids"]
    site, last = layers(model)[-1], ids.shape[1] - 1
    sites = {(site.layer_index, head): None for head in range(site.num_v_heads)}
    plain = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
    middling = plain.argsort(descending=True)[100:1000:90].tolist()
    gains = []
    for token in middling:
        logits, tap = run(model, sites, [Install(token, [last], 3.0, read="before")], ids)
        gains.append(float(logits[0, -1].log_softmax(-1)[token] - plain[token]))
        assert tap.policies[0].total == len(sites)
    assert sum(gain > 0 for gain in gains) >= 9, gains


# ---- around it ------------------------------------------------------------------------------------------------------


def test_policies_go_with_planned_edits(model):
    """The planned edits of a token are in what it reads; the walk meets them in every stretch."""
    saes, ids = some_sites(model), tokens(2, 10)
    p, q = torch.randn(8), torch.randn(6)
    planned = {0: Edits.add([0, 1, -1], [2, 7, 4], [0, 3, 3], p, q), 3: Edits.delete(-1, range(3, 6), 0, 8, 6)}
    policy = Scale(range(0, F, 3), 1.5)
    _, tap = run(model, saes, [policy], ids, edits=planned)
    parts = {}
    for (layer, head), sae in saes.items():  # what they did, from the states that came out
        states = tap.writes[layer].states(range(10), read=True)
        for row in range(2):
            for t in range(10):
                codes = coded(sae, states[row, t, head])
                parts.setdefault(layer, []).extend(
                    (row, t, head, 0.5 * float(codes[i]) * sae.v_dec[i, 0], sae.w_dec[i, 0])
                    for i in range(0, F, 3)
                    if codes[i] > 0
                )
    both = {}
    for layer, found in parts.items():
        row, t, head, left, right = zip(*found, strict=True)
        made = Edits.add(row, t, head, torch.stack(left).float(), torch.stack(right).float(), when="after")
        both[layer] = Edits.cat([planned[layer], made]) if layer in planned else made
    with attach(model, saes, edits=both, self_test=False) as again:
        logits = model(ids, use_cache=False).logits
    same, _ = run(model, saes, [policy], ids, edits=planned)
    torch.testing.assert_close(same, logits, atol=2e-4, rtol=2e-4)
    assert tap.applied[0].all() and len(again.firings) == len(tap.firings)


def test_chunked_prefill_and_decoding_by_hand(model):
    saes, ids = some_sites(model), tokens(2, 14)
    policies = [Scale(range(0, F, 2), 0.99, read="before"), Erase({(3, 0): range(0, F, 3)})]
    whole, tap = run(model, saes, policies, ids)
    with attach(model, saes, policies=policies, self_test=False) as pieces:
        cache, found = None, []
        for lo, hi in ((0, 5), (5, 6), (6, 7), (7, 12), (12, 14)):
            out = go_on(model, ids[:, lo:hi], lo, cache)
            cache = cache_of(out)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)
    assert [r.applied for r in pieces.policies] == [r.applied for r in tap.policies]
    assert len(pieces.firings) == len(tap.firings)


@pytest.mark.parametrize("read", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", [lambda **x: Scale(range(F), 2.0, **x), lambda **x: Erase(range(F), **x), Halve])
def test_one_token_is_edited_as_planned_edits_would(policy, dtype, read):
    """In float32 without a second pass; what it leaves to the next token too."""
    model, ids, place = tiny_model(dtype=dtype), tokens(2, 8), (0, 3)
    saes = {place: dictionary(layers(model)[0], 3)}
    acting = policy(sites=[place], positions=[6], read=read)

    def decode(**kwargs):
        with attach(model, saes, self_test=False, **kwargs) as tap:
            cache = cache_of(go_on(model, ids[:, :6], 0))
            first = go_on(model, ids[:, 6:7], 6, cache)
            writes = tap.writes[0]
            second = go_on(model, ids[:, 7:], 7, cache_of(first))
        return torch.cat([first.logits, second.logits], 1).float(), writes, tap.firings

    ours, writes, firings = decode(policies=[acting])
    plan = Edits.delete(-1, 6, 3, 8, 6, when=read)
    if policy is Halve:
        with attach(model, saes, self_test=False) as plain:
            model(ids, use_cache=False)
        left, right = plain.writes[0].native(torch.arange(2), 6, 3)
        plan = Edits.replace([0, 1], 6, 3, left, right / 2, when=read)
    elif isinstance(acting, Scale):
        plan = writes.edits._with(position=writes.edits.position + 6)
    planned, theirs, again = decode(edits={0: plan})
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, planned, atol=limit, rtol=limit)
    torch.testing.assert_close(writes.states([0]), theirs.states([0]), atol=limit, rtol=limit)
    torch.testing.assert_close(writes.states([0], read=True), theirs.states([0], read=True), atol=limit, rtol=limit)
    if dtype == torch.float32:
        torch.testing.assert_close(firings.sort().activation, again.sort().activation, atol=1e-4, rtol=1e-4)


def test_nested_attaches_see_the_same_token(model):
    saes, ids = some_sites(model), tokens(2, 10)
    one, two = Scale(range(0, F, 2), 1.3), Erase({(0, 3): [3, 5, 7, 9]}, what="atom")
    both, tap = run(model, saes, [one, two], ids)
    with attach(model, saes, policies=[one], self_test=False) as outer:
        logits, inner = run(model, saes, [two], ids)
    torch.testing.assert_close(logits, both, atol=1e-5, rtol=1e-5)
    assert outer.policies[0].applied == tap.policies[0].applied
    assert inner.policies[0].applied == tap.policies[1].applied
    assert len(outer.firings) == len(inner.firings) == len(tap.firings)


def test_gradients_go_through_what_a_policy_has_edited(model):
    saes, ids, policies = some_sites(model), tokens(1, 8), [Scale(range(0, F, 2), 1.5, read="before")]
    logits, _ = run(model, saes, policies, ids)
    embeddings = model.get_input_embeddings()
    with torch.enable_grad(), attach(model, saes, policies=policies, self_test=False):
        x = embeddings(ids).detach().requires_grad_()
        out = model(inputs_embeds=x, use_cache=False).logits
        out[0, -1].logsumexp(0).backward()
    torch.testing.assert_close(out.detach(), logits, atol=1e-5, rtol=1e-5)
    assert x.grad.abs().max() > 0


def test_a_failed_call_counts_nothing(model):
    class Fails(Policy):
        def act(self, view):
            if view.site.layer == 3:
                raise KeyError("mine")
            return view.delete()

    with pytest.warns(RuntimeWarning, match="never acted"), attach(model, some_sites(model), policies=[Fails()]) as tap:
        with pytest.raises(KeyError, match="mine"):
            model(tokens(1, 4))
        assert tap.policies[0].total == 0 and set(tap.policies[0].seen.values()) == {0}
        with pytest.raises(KeyError):
            model(tokens(1, 4))
        tap.calls.update(dict.fromkeys(tap.calls, 1))


def test_pads_are_not_asked_about(model):
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    saes, watch = some_sites(model), Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with attach(model, saes, policies=[watch], self_test=False) as tap:
            model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    assert {(v.row, v.position) for v in watch.shown} == {(0, t) for t in range(4, 8)} | {(1, t) for t in range(8)}
    assert set(tap.policies[0].seen.values()) == {12}


def test_dictionaries_of_writes(model):
    site = layers(model)[0]
    sae = dictionary(site, 1, target="write")
    _, tap = run(model, {(0, 1): sae}, [Erase(range(0, F, 2), read="before")])
    left, right = tap.writes[0].rank_one("test")
    erased = (right[:, :, 1] == 0).all(-1)
    assert int(erased.sum()) == tap.policies[0].total > 0 and not erased.all()
    _, tap = run(model, {(0, 1): sae}, [Clamp([3, 4], 1.0, always=True, read="before")])
    writes = tap.writes[0]
    for row, t in ((0, 0), (1, 7)):
        e = writes.edits[(writes.edits.row == row) & (writes.edits.position == t)]
        p, q = writes.native(row, t, 1)
        written = torch.outer(p, q) + e.left.T @ e.right
        torch.testing.assert_close(dense(sae, written)[[3, 4]].float(), torch.ones(2), atol=1e-4, rtol=1e-4)


# ---- refusals -------------------------------------------------------------------------------------------------------


class NoInit(Policy):
    def __init__(self):
        pass


class Wrong(Policy):
    def act(self, view):
        return view.left


class WrongSize(Policy):
    def act(self, view):
        return view.add(view.right, view.left)


class NoAct(Policy):
    pass


@pytest.mark.parametrize("make, message", [
    (lambda: Erase([-1]), "features: expected integers >= 0, got -1"),
    (lambda: Erase([1.5]), "features: expected integers, got float 1.5"),
    (lambda: Erase(None), "features: expected numbers, or .*, got None"),
    (lambda: Erase([1], what="all"), "what: expected write or atom, got str all"),
    (lambda: Erase({0: [1]}), r"features: expected \(layer, head\) of two integers, got 0"),
    (lambda: Scale([1], float("nan")), "factor: expected a finite number, got float nan"),
    (lambda: Scale([1], 2.0, read="during"), "read: expected after or before, got str during"),
    (lambda: Scale([1], 2.0, sites=[]), "sites: expected at least one"),
    (lambda: Amplify([1], 0.5), "factor: expected > 1, got 0.5"),
    (lambda: Amplify([1], 2.0, control="zero"), "control: expected None or random, got str zero"),
    (lambda: Clamp([1], 0.5, always=1), "always: expected True or False, got int 1"),
    (lambda: Install(5, [], 1.0), "positions: expected at least one column"),
    (lambda: Install(-5, [1], 1.0), "token: expected integers >= 0, got -5"),
])  # fmt: skip
def test_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("policies, message", [
    (Erase([1]), "policies: expected a list of policies, got Erase"),
    ([3], r"policies\[0\]: expected a writesae.Policy, got int"),
    ([NoInit()], r"policies\[0\]: expected a writesae.Policy, got NoInit \(whose __init__ does not call Policy's\)"),
    ([Erase({(0, 1): [1]})], r"policies\[0\]: expected sites of this attach, got \(0, 1\)"),
    ([Watch(), Erase([F])], rf"policies\[1\] \(Erase\): features: expected 0 <= feature < {F} .*\(0, 0\)\), got {F}"),
    ([Erase({(3, 2): [1]})], r"policies\[0\] \(Erase\): .*encoder\(\) at site \(3, 2\), got a site without dictionary"),
    ([Install(10**6, [1], 1.0)], r"policies\[0\] \(Install\): token: expected 0 <= token < 97 .*got 1000000"),
    ([Clamp([1], 1.0, sites=[(3, 3)])], r"Clamp of feature 1 at site \(3, 3\): expected an atom that moves its own"),
    ([Scale([1], 1.0, sites=[(3, 1)])], r"\(Scale\): .*site \(3, 1\): kind bilinear_flat has dense atoms"),
    ([Erase([1], sites=[(0, 2)])], r"\(Erase\): expected an encoder of factors at site \(0, 2\), got kind flat"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:attach. slow path")
def test_what_cannot_act_is_refused_before_anything_runs(model, policies, message):
    saes, site = some_sites(model), layers(model)[-1]
    other = dictionary(site, 3)
    other.v_enc[1, 0, 0], other.v_dec[1, 0] = 0, torch.eye(8)[0]
    dense_one = dictionary(layers(model)[0], 2, kind="flat")
    saes |= {(3, 2): None, (3, 3): other, (3, 1): dictionary(site, 1, kind="bilinear_flat"), (0, 2): dense_one}
    if isinstance(policies, list) and isinstance(policies[0], Watch):
        saes.pop((0, 2))
    with pytest.raises(ValueError, match=message):
        with attach(model, saes, policies=policies):
            pass


@pytest.mark.parametrize("policy, error, message", [
    (Wrong(), ValueError, "expected Wrong.act to return what view.add, .* or None, got Tensor"),
    (WrongSize(), ValueError, r"left: expected floating \[K=8\] or \[m, K=8\], got a tensor of .* shape \(6,\)"),
    (NoAct(), NotImplementedError, r"NoAct: expected an act\(view\)"),
])  # fmt: skip
def test_a_wrong_answer_is_refused(model, policy, error, message):
    with pytest.raises(error, match=message):
        run(model, some_sites(model), [policy])


def test_a_site_without_atoms_of_its_own_says_so_when_asked():
    model = tiny_mamba()
    site = layers(model)[0]
    with pytest.raises(ValueError, match=r"policies\[0\] \(Erase\): expected sites with a dictionary among those"):
        with attach(model, {(site.layer_index, 0): None}, policies=[Erase([1])]):
            pass


def test_strict_raises_where_a_policy_never_acted(model):
    with pytest.raises(ValueError, match=r"policies\[0\], Install\(positions=\(50,\), read='after'\), never acted"):
        run(model, some_sites(model), [Install(5, [50], 1.0)], strict=True)


def test_names():
    for name in ("Erase", "Scale", "Clamp", "Install", "Amplify", "Policy"):
        assert getattr(writesae, name).__module__ == "writesae.policies"
