"""Atoms described: the direct path is the model's own, keys are the model's own, pairs are counted."""

import inspect
import itertools

import pytest
import torch
from torch.nn.functional import normalize

from writesae import SAE, Edits, Firings, atoms, attach
from writesae.models.seam import intercept, running
from writesae.models.shared_prefix import Stack
from writesae.models.sites import layers
from writesae.models.tiny import every, tiny_mamba2, tiny_model, tokens
from writesae.ops.rule import RuleOutput


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)  # K=8, V=6


def dictionary(site, layer, head, F=12, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = SAE(site.K, site.V, F, 3, layer=layer, head=head, **options)
        for x in sae.parameters():
            x.data.normal_()
    return sae


def spread_norms(model):
    """Norm weights that differ, or what they do could not be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.data.uniform_(0.5, 2.0)
    return model


def module_output(model, site, head, ids, change):
    """What the layer's own module returns for tokens `[1, T]` with `change [V]` added to a head's last output."""
    found = []

    def changed(call, output_final_state):
        out = call.run(output_final_state=output_final_state)
        one = running().head
        if one in (None, head):
            o = out.o.clone()
            o.view(1, ids.shape[1], -1, site.V)[0, -1, head if one is None else 0] += change.to(o)
            out = RuleOutput(o, out.final_state, None, None)
        return out

    def look(module, args, output):
        found.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    hook = site.module.register_forward_hook(look)
    try:
        with intercept(model, calls={site.layer_index: changed}), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return found[0][0, -1]


FAMILIES = {one.family: one for one in every()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_direct_path_is_a_finite_difference_through_the_layers_own_module(family):
    model = spread_norms(FAMILIES[family].make())  # experts know no float64
    site = layers(model)[0]
    head, T = site.num_v_heads - 1, 9
    ids = tokens(1, T)
    values = torch.randn(2, site.V, generator=torch.Generator().manual_seed(1))
    stack = Stack(model)
    final = stack.last(ids)[0, -1].detach()
    if final.numel() > module_output(model, site, head, ids, 0 * values[0]).numel():
        with pytest.raises(ValueError, match="expected one residual stream"):
            atoms.direct_path(model, ids[0], site.layer_index, head, T - 1, values)
        return
    found = atoms.direct_path(model, ids[0], site.layer_index, head, T - 1, values)
    for value, got in zip(values, found, strict=True):
        step = 1e-3
        ends = []
        for sign in (1, -1):
            added = module_output(model, site, head, ids, sign * step * value)
            added = added - module_output(model, site, head, ids, 0 * value)
            ends.append(stack.logits((final + added.to(final))[None])[0].detach().double())
        expected = (ends[0] - ends[1]) / (2 * step)
        error = (got.double() - expected).norm() / expected.norm()
        assert expected.norm() > 0 and error < 5e-3, float(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_by_weights_is_what_norm_and_projection_do_under_an_even_gate(family):
    model = spread_norms(FAMILIES[family].make())
    site = layers(model)[0]
    if FAMILIES[family].library == "fla":
        pytest.skip("its norms run on a GPU alone outside a layer")
    H, V, head = site.num_v_heads, site.V, site.num_v_heads - 1
    draw = torch.Generator().manual_seed(2)
    o, w = torch.randn(H, V, generator=draw), torch.randn(V, generator=draw)
    w = w - o[head] * (o[head] @ w) / (o[head] @ o[head])  # or the norm would shrink what is there

    def run(o):
        if getattr(site.norm, "weight", None) is None:
            y = o
        else:
            x = o if site.norm.weight.numel() == V else o.reshape(1, H * V)
            gated = len(inspect.signature(site.norm.forward).parameters) > 1
            y = site.norm(x, torch.ones_like(x)) if gated else site.norm(x)
        return site.out_proj(y.reshape(1, H * V))[0]

    change = torch.zeros_like(o)
    change[head] = 1e-2 * w
    with torch.no_grad():
        expected = run(o + change) - run(o - change)
    found = w @ atoms.output_map(model, site.layer_index, head)
    assert float(found @ expected / (found.norm() * expected.norm())) > 1 - 1e-4


def test_in_the_last_layer_of_a_plain_stack_the_direct_path_is_all_there_is():
    model = spread_norms(tiny_mamba2()).double()
    site, T = layers(model)[-1], 8
    ids = tokens(1, T, seed=3)
    sae = dictionary(site, site.layer_index, 1)
    left, right = (x.double() for x in atoms.sides(sae, 4))
    with attach(model, {(site.layer_index, 1): None}) as tap, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    ends = []
    for step in (1e-3, -1e-3):
        edit = Edits.add(0, T - 1, 1, step * left, right)
        with attach(model, {}, edits={site.layer_index: edit}), torch.no_grad():
            ends.append(model(input_ids=ids, use_cache=False).logits[0, -1])
    measured = (ends[0] - ends[1]) / 2e-3
    direct = atoms.direct_path(model, ids[0], site.layer_index, 1, T - 1, right[None])[0].double()
    assert tap.writes[site.layer_index].shape[4] == site.V
    measured = measured.double()
    cosine = float(measured @ direct / (measured.norm() * direct.norm()))
    assert abs(cosine) > 1 - 1e-4  # the factor is left . q of that token, of either sign


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_promoted_tokens(family):
    model = FAMILIES[family].make()
    site = layers(model)[-1]
    found = atoms.promoted_tokens(model, None, dictionary(site, site.layer_index, 0), 3, 4)
    assert len({x.token for x in found}) == 4 and all(1 < x.score < 9 for x in found)


def test_promoted_tokens_are_the_largest_and_the_least(model):
    site = layers(model)[0]
    sae = dictionary(site, 0, 2)
    best = atoms.promoted_tokens(model, None, sae, 7, 5)
    worst = atoms.promoted_tokens(model, None, sae, 7, 5, least=True)
    assert [x.score for x in best] == sorted((x.score for x in best), reverse=True)
    assert worst[0].score < 0 < best[0].score and [x.text for x in best] == [str(x.token) for x in best]
    _, w = atoms.sides(sae, 7)
    logits = atoms.to_logits(model, w[None] @ atoms.output_map(model, 0, 2))[0]
    assert [x.token for x in best] == logits.topk(5).indices.tolist()
    everything = atoms.promoted_tokens(model, None, sae, 7, 10**6)
    scores = torch.tensor([x.score for x in everything])
    assert len(scores) == logits.numel() and abs(float(scores.mean())) < 1e-5 and abs(float(scores.std()) - 1) < 1e-5
    ids = tokens(1, 9)[0]
    exact = atoms.direct_path(model, ids, 0, 2, 4, w[None])[0]
    assert atoms.promoted_tokens(model, None, sae, 7, 1, at=(ids, 4))[0].token == int(exact.argmax())


def test_later_tokens_do_not_matter_to_the_direct_path(model):
    ids, values = tokens(1, 12)[0], torch.eye(6, dtype=torch.float64)[:2]
    short = atoms.direct_path(model, ids[:6], 0, 1, 5, values)
    torch.testing.assert_close(atoms.direct_path(model, ids, 0, 1, 5, values), short)


def test_an_atom_of_higher_rank_has_the_sides_of_its_first_singular_pair(model):
    sae = dictionary(layers(model)[0], 0, 1, r=2)
    v, w = atoms.sides(sae, 3)
    matrix = sae.atom_matrix()[3].view(sae.K, sae.V)
    assert float(v @ matrix @ w) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-5)


def test_keys_of_text_are_averaged_by_token(model):
    ids = tokens(3, 20, seed=4) % 7 + 3  # few tokens, often
    sae = dictionary(layers(model)[1], 1, 3)
    found = atoms.answers_to(model, None, sae, 5, 4, ids=ids, least=2)
    with attach(model, {(1, 3): None}) as tap, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    keys, _ = tap.writes[1].native(torch.arange(3)[:, None], torch.arange(20), 3)
    cosine = normalize(keys.float(), dim=-1) @ atoms.sides(sae, 5)[0]
    for one in found:
        mine = cosine[ids == one.token]
        assert one.n == len(mine) and one.cosine == pytest.approx(float(mine.mean()), abs=1e-5)
    others = [float(cosine[ids == t].mean()) for t in ids.unique() if t not in [x.token for x in found]]
    assert min(abs(x.cosine) for x in found) >= max(map(abs, others)) - 1e-6
    both = atoms.answers_to(model, None, sae, [2, 5], 4, ids=ids, least=2)
    assert [x[:2] for x in both[1]] == [x[:2] for x in found] and len(both[0]) == 4


def test_a_planted_key_is_answered_by_its_token(model):
    """An atom whose key side is the key of a token alone finds that token."""
    sae = dictionary(layers(model)[1], 1, 3)
    with attach(model, {(1, 3): None}) as tap, torch.no_grad():
        model(input_ids=torch.tensor([[41]]), use_cache=False)
    key, _ = tap.writes[1].native(0, 0, 3)
    sae.v_dec.data[6, 0] = -key.float()
    first = atoms.answers_to(model, None, sae, 6, 3)[0]
    assert (first.token, first.n) == (41, 1) and first.cosine == pytest.approx(-1, abs=1e-5)


def test_neighbours_are_those_of_dense_matrices(model):
    for r in (1, 2):
        sae = dictionary(layers(model)[0], 0, 1, r=r)
        dense = normalize(sae.atom_matrix().double(), dim=1)
        cosine = (dense @ dense[4]).detach()
        found = atoms.neighbours(sae, 4, 3)
        cosine[4] = 0
        assert [x.feature for x in found] == cosine.abs().topk(3).indices.tolist()
        assert all(x.cosine == pytest.approx(float(cosine[x.feature]), abs=1e-6) for x in found)
        assert len(atoms.neighbours(sae, 4, 99)) == sae.F - 1


def test_what_reports_tell_of_atoms(model):
    sae, ids = dictionary(layers(model)[1], 1, 3), tokens(2, 20)
    found = atoms.describe(model, None, {(1, 3): sae}, {(1, 3): [2, 5]}, 3, ids)["1:3"]
    assert list(found) == ["2", "5"]
    assert found["5"]["promoted"] == [[x.text, x.score] for x in atoms.promoted_tokens(model, None, sae, 5, 3)]
    assert found["5"]["neighbours"] == [[x.feature, x.cosine] for x in atoms.neighbours(sae, 5, 3)]
    answers = atoms.answers_to(model, None, sae, [2, 5], 3, ids=ids)[1]
    assert found["5"]["answers_to"] == [[x.text, x.cosine] for x in answers]


def fired(rows):
    """Firings of (row, position, layer, head, feature)."""
    columns = torch.tensor(rows, dtype=torch.int32).T
    return Firings(*columns, torch.ones(len(rows)))


def test_pairs_that_fire_together_are_counted():
    draw = torch.Generator().manual_seed(0)
    rows = [
        (i % 3, i, 1, f % 2, f) for i in range(60) for f in torch.randperm(8, generator=draw)[:4].sort().values.tolist()
    ]
    found = atoms.co_firing(fired(rows), tokens=100, least=1)
    names = ("layer", "head", "feature", "other_layer", "other_head", "other_feature")
    listed = {tuple(int(found[x][i]) for x in names): i for i in range(len(found["together"]))}
    for a, b in itertools.combinations(range(8), 2):
        at = [{p for r, p, _, _, f in rows if f == x} for x in (a, b)]
        key = (1, a % 2, a, 1, b % 2, b)
        i = listed.get(key, listed.get((1, b % 2, b, 1, a % 2, a)))
        assert int(found["together"][i]) == len(at[0] & at[1])
        assert float(found["expected"][i]) == pytest.approx(len(at[0]) * len(at[1]) / 100)
        assert float(found["jaccard"][i]) == pytest.approx(len(at[0] & at[1]) / len(at[0] | at[1]))
    assert len(listed) == 28 and bool((found["together"].diff() <= 0).all())
    often = atoms.co_firing(fired(rows), least=int(found["together"][3]))
    assert 4 <= len(often["together"]) < 28
    none = atoms.co_firing(fired([(0, 1, 1, 0, 3)]))
    assert not len(none["together"]) and not len(atoms.co_firing(Firings.cat([]))["lift"])


def test_the_same_number_at_two_sites_is_two_features():
    found = atoms.co_firing(fired([(0, p, 1, h, 7) for p in range(6) for h in (0, 2)]))
    assert (found["head"].tolist(), found["other_head"].tolist(), found["lift"].tolist()) == ([0], [2], [1.0])


def test_bad_input(model):
    site = layers(model)[0]
    sae = dictionary(site, 0, 1)
    values = torch.zeros(1, site.V)
    ids = tokens(1, 5)[0]
    for match, call in (
        ("feature: expected 0 <= feature < 12, got 12", lambda: atoms.promoted_tokens(model, None, sae, 12)),
        ("feature: expected 0 <= feature < 12, got -1", lambda: atoms.neighbours(sae, -1)),
        ("does not say its layer", lambda: atoms.promoted_tokens(model, None, dictionary(site, None, None), 1)),
        ("head: expected 0 <= head < 4", lambda: atoms.output_map(model, 0, 4)),
        ("layer", lambda: atoms.output_map(model, 2, 0)),
        ("position: expected one of 5 tokens", lambda: atoms.direct_path(model, ids, 0, 1, 5, values)),
        ("values: expected \\[n, V=6\\]", lambda: atoms.direct_path(model, ids, 0, 1, 2, values[:, 1:])),
        ("dense atoms", lambda: atoms.neighbours(dictionary(site, 0, 1, kind="flat"), 1)),
        ("fires twice", lambda: atoms.co_firing(fired([(0, 0, 1, 1, 1)] * 2))),
        ("tokens: expected at least the 2", lambda: atoms.co_firing(fired([(0, 0, 1, 1, 1), (0, 1, 1, 1, 1)]), 1)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    broken = tiny_model()
    layers(broken)[0].module.out_proj = torch.nn.Sequential(broken.model.layers[0].linear_attn.out_proj)
    with pytest.raises(ValueError, match="expected an output projection .hidden, 24. of .*linear_attn"):
        atoms.output_map(broken, 0, 1)
