"""The paper's studies of what edits cost a passage: perplexity, and what steers it."""

import numpy as np
import pytest
import torch
from paper_lab import lab

import writesae
from writesae.atoms import direction_to
from writesae.paper import amplify_suppress, losses, passage_nll, sae_read_perplexity, sign, studies
from writesae.paper.frequent import frequent
from writesae.paper.state_replacement_perplexity import replaced_at

pytestmark = pytest.mark.usefixtures("one_thread")


def found(name, tmp_path, **settings):
    here = lab(name, tmp_path, **settings)
    findings = studies()[name].run(here)
    assert {answer.claim for answer in findings.answers} == {claim.key for claim in studies()[name].claims}
    return findings


def of(table, condition, group="1:2"):
    return table["loss"][(table["condition"] == condition) & (table["group"] == group)]


def test_stand_ins_are_what_they_say(tmp_path):
    here = lab("state_replacement_perplexity", tmp_path)
    made = losses.stand_ins(here, 4, 32, 60)[1, 2]
    X = torch.randn(5, 8, 6)
    sae = here.saes[1, 2]
    assert torch.allclose(made["reconstruction"](X), sae.decode(sae.encode(X)))
    assert torch.linalg.matrix_rank(made["SVD"](X), atol=1e-4).tolist() == [4] * 5
    error = {name: (f(X) - X).square().sum() for name, f in made.items()}
    assert error["SVD"] < error["codebook"] < error["mean"] and error["PCA"] < error["mean"]
    assert error["zero"] == X.square().sum()
    centre = made["mean"](X)[0]
    inside = made["PCA"](X)
    assert torch.allclose(made["PCA"](inside), inside, atol=1e-5)  # a projection
    assert torch.linalg.matrix_rank((inside - centre).flatten(1), atol=1e-4) <= 4


def test_a_combination_of_few_writes_is_found_exactly():
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(7, 8, generator=draw), torch.randn(7, 6, generator=draw)
    left, right = (torch.nn.functional.normalize(x, dim=1) for x in (left, right))
    X = (3 * left[2, :, None] * right[2] - 2.5 * left[5, :, None] * right[5])[None]
    assert torch.allclose(losses._nearest(X, left, right, 7), X, atol=1e-4)


@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_a_replaced_state_is_read_from_the_next_token_on(tmp_path, family):
    here = lab("state_replacement_perplexity", tmp_path, family=family)
    (site,) = here.saes
    ids = here.whole("test", 3, 24)
    known = {site: {"same": lambda X: X, "reconstruction": torch.zeros_like}}
    table = replaced_at(here, ids, 5, 9, known)
    group = f"{site[0]}:{site[1]}"
    assert table["passage"].tolist() == [5, 6, 7] * 3 and set(table["tokens"]) == {13}
    assert set(table["near"] == table["loss"]) == {True}  # fewer tokens than are near
    plain = of(table, "plain", "")
    assert np.allclose(of(table, "same", group), plain, atol=1e-5)
    assert not np.allclose(of(table, "reconstruction", group), plain, atol=1e-5)
    # By the cache: the prefix alone, the state emptied in it, then the rest.
    with torch.no_grad():
        first = here.model(input_ids=ids[:, :10], use_cache=True)
        cache = first.past_key_values
        states = cache.layers[site[0]].recurrent_states
        (states[0] if isinstance(states, dict) else states)[:, site[1]] = 0
        # Token by token: not every family goes on with several at once.
        given = {"cache_params" if family == "mamba2" else "past_key_values": cache}
        logits = [here.model(input_ids=ids[:, t : t + 1], **given).logits for t in range(10, 24)]
    again = losses.token_losses(torch.cat(logits, 1), ids[:, 10:])
    assert np.allclose(of(table, "reconstruction", group), again.mean(1), atol=1e-4)


@pytest.mark.parametrize("name", ["state_replacement_perplexity", "sae_read_perplexity"])
@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_perplexity_is_compared_passage_by_passage(tmp_path, name, family):
    small = dict(passages=6, context=24, train=4, states=40, batch=4)
    more = {"position": 9} if name.startswith("state") else {}
    got = found(name, tmp_path, family=family, **small, **more)
    table = got.tables["passages"]
    ((group, record),) = got.statistics["groups"].items()
    assert record["plain"] == pytest.approx(np.exp(of(table, "plain", "").mean()))
    for condition, x in record["conditions"].items():
        loss = of(table, condition, group)
        assert len(loss) == 6
        assert x["mean"] == pytest.approx((loss - of(table, "plain", "")).mean())
        if condition != "reconstruction":
            over = loss - of(table, "reconstruction", group)
            assert x["over_reconstruction"]["mean"] == pytest.approx(over.mean())
            assert x["over_reconstruction"]["ci95"][0] <= over.mean() <= x["over_reconstruction"]["ci95"][1]


def test_a_planted_difference_of_losses_holds_and_none_does_not():
    draw = np.random.default_rng(0)
    plain = draw.normal(3, 0.5, 40)
    parts = [losses.condition_table(0, "", "plain", plain[:, None])]
    for name, more in (("reconstruction", 0.1), ("mean", 0.3), ("zero", 0.1), ("PCA", 0.02)):
        parts.append(losses.condition_table(0, "5:3", name, (plain + more + draw.normal(0, 0.05, 40))[:, None]))
    table = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    record = losses.perplexities(table, 0)["5:3"]
    verdicts = [losses.against("x", null, record).verdict for null in ("mean", "zero", "PCA")]
    assert verdicts == ["holds", "cannot be told", "does not hold"]


@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_reading_the_state_itself_is_the_plain_model_and_reading_nothing_is_deletion(tmp_path, family):
    here = lab("sae_read_perplexity", tmp_path, family=family)
    (site,) = here.saes
    ids = here.whole("test", 3, 20)

    def read(f):
        return sae_read_perplexity.read_losses(here.model, ids, {site: f})

    plain = sae_read_perplexity.read_losses(here.model, ids, {})
    assert np.allclose(read(lambda X: X), plain, atol=1e-6)
    if family == "gated":  # where nothing but the state is read: no state at all is read if nothing is ever written
        places = dict(row=-1, position=range(20), head=site[1], K=8, V=6)
        with torch.no_grad(), writesae.attach(here.model, {}, edits={site[0]: writesae.Edits.delete(**places)}):
            loss = losses.token_losses(here.model(input_ids=ids, use_cache=False).logits, ids)
        assert np.allclose(read(torch.zeros_like), loss, atol=1e-5) and not np.allclose(loss, plain, atol=1e-5)


@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_writes_are_deleted_where_the_set_fires(tmp_path, family):
    small = dict(family=family, passages=4, context=24, select=4, features=5, most=1.0, batch=4)
    got = found("passage_nll", tmp_path, **small)
    table, here = got.tables["passages"], lab("passage_nll", tmp_path, **small)
    (site,) = here.saes
    chosen = torch.from_numpy(frequent(here, here.saes, 4, 24, 5, 1.0)[site])
    ids = here.whole("test", 4, 24)
    (reading,) = here.read(ids)
    fires = torch.isin(reading.firings.feature, chosen)
    assert len(chosen) == 5 and fires.any()
    places = {
        (int(r), int(p)) for r, p in zip(reading.firings.row[fires], reading.firings.position[fires], strict=True)
    }
    edits = [writesae.Edits.delete(r, p, site[1], here.saes[site].K, here.saes[site].V) for r, p in places]
    with torch.no_grad(), writesae.attach(here.model, {}, edits={site[0]: writesae.Edits.cat(edits)}):
        loss = losses.token_losses(here.model(input_ids=ids, use_cache=False).logits, ids).mean(1)
    mine = table["target"] == "state"
    assert np.allclose(table["delete"][mine], loss[table["passage"][mine]], atol=1e-5)
    assert table["places"][mine].sum() == len(places)


def test_random_writes_have_the_norm_of_those_they_replace_and_other_deletions_are_elsewhere(tmp_path):
    here = lab("passage_nll", tmp_path)
    (reading,) = here.read(here.whole("test", 3, 20))
    row, position = torch.tensor([0, 0, 2]), torch.tensor([3, 7, 5])
    edits = passage_nll.planned(reading, 1, 2, row, position, (8, 6), torch.Generator().manual_seed(0))
    left, right = reading.writes[1].native(row, position, 2)
    random = edits["random"]
    assert torch.allclose(random.left.norm(dim=1) * random.right.norm(dim=1), left.norm(dim=1) * right.norm(dim=1))
    other = set(zip(edits["elsewhere"].row.tolist(), edits["elsewhere"].position.tolist(), strict=True))
    assert len(other) == 3 and not other & {(0, 3), (0, 7), (2, 5)} and sorted(r for r, _ in other) == [0, 0, 2]


def test_bits_are_nats_over_log_two_and_verdicts_follow_the_interval():
    draw = np.random.default_rng(0)
    plain = draw.normal(3, 0.3, 60)
    table = {"passage": np.arange(60), "places": np.full(60, 3), "plain": plain}
    for name, more in (("delete", 0.1), ("random", 0.3), ("elsewhere", 0.1)):
        table[name] = plain + np.log(2) * (more + draw.normal(0, 0.05, 60))
    record = passage_nll.bits(table, 0)
    assert record["delete"]["mean"] == pytest.approx(0.1, abs=0.03)
    assert [answer.verdict for answer in passage_nll._answers(record)] == ["holds", "cannot be told"]


def test_frequent_features_fire_often_but_not_everywhere(tmp_path):
    here = lab("passage_nll", tmp_path)
    ids = here.whole("validation", 4, 24)
    (reading,) = here.read(ids)
    counts = np.bincount(reading.firings.feature.numpy(), minlength=24)
    chosen = frequent(here, here.saes, 4, 24, 3, 0.3)[1, 2]
    allowed = counts[counts <= 0.3 * ids.numel()]
    assert sorted(counts[chosen]) == sorted(np.sort(allowed)[-3:])


@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_a_targets_move_is_that_of_an_edited_model(tmp_path, family):
    small = dict(family=family, passages=3, context=24, each=2, batch=3, strata=(0.02, 0.2, 0.6))
    got = found("sign", tmp_path, **small)
    table, here = got.tables["forks"], lab("sign", tmp_path, **small)
    (site,) = here.saes
    layer, head = site
    assert len(table["own"]) == 12 and set(table["stratum"]) == {0, 1}
    ids = here.whole("test", 3, 24)
    (reading,) = here.read(ids)
    for i in (0, 7, 11):
        p, t, token = (int(table[name][i]) for name in ("passage", "position", "token"))
        left, right = reading.writes[layer].native(torch.tensor([p]), torch.tensor([t]), head)
        value = direction_to(here.model, layer, head, token)
        edit = writesae.Edits.add(0, t, head, 3 * right.norm() * left[0], value)  # the write's key keeps its length
        with torch.no_grad(), writesae.attach(here.model, {}, edits={layer: edit}):
            edited = here.model(input_ids=ids[p : p + 1], use_cache=False).logits[0].log_softmax(-1)
        plain = reading.logits[p].log_softmax(-1)
        assert table["own"][i] == pytest.approx(float(edited[t, token] - plain[t, token]), abs=1e-4)
        assert table["own_later"][i] == pytest.approx(float(edited[t + 1, token] - plain[t + 1, token]), abs=1e-4)
        assert int((plain[t] > plain[t, token]).sum()) + 1 == table["rank"][i]


def test_a_planted_sign_is_found_and_noise_is_not():
    draw = np.random.default_rng(0)
    noise = {arm: draw.normal(0, 1, 200) for arm in sign.ARMS}
    planted = {**noise, "own": noise["own"] + 1.2, "negative": noise["negative"] - 1.2}
    verdicts = []
    for table in (planted, noise):
        later = {f"{arm}_later": x for arm, x in table.items()}
        record = sign.signs({**table, **later, "passage": np.arange(200) // 4}, 0)
        assert record["own"]["rate"] == pytest.approx((table["own"] > 0).mean())
        assert record["negative"]["rate"] == pytest.approx((table["negative"] < 0).mean())
        verdicts.append([answer.verdict for answer in sign._answers(record)])
    assert verdicts == [["holds"] * 2, ["cannot be told"] * 2]


@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_features_are_amplified_and_suppressed_while_text_is_generated(tmp_path, family):
    small = dict(
        family=family, features=2, prompts=2, pool=4, prompt=10, new=4, context=24, select=4, most=1.0, tokens=5
    )
    got = found("amplify_suppress", tmp_path, **small)
    table = got.tables["prompts"]
    assert set(table["target"]) == {"state", "write"} and len(np.unique(table["feature"])) >= 2
    assert np.abs(table["amplify"] - table["plain"]).max() > 1e-6
    assert np.abs(table["amplify"] - table["amplify_control"]).max() > 1e-6
    for arm in amplify_suppress.ARMS:
        move = got.statistics["all"][arm]["move"]
        assert move["mean"] == pytest.approx((table[arm] - table["plain"]).mean())


def test_a_control_has_the_dose_of_what_it_stands_for(tmp_path):
    here = lab("amplify_suppress", tmp_path)
    ((site, sae),) = here.saes.items()
    ids = here.whole("test", 1, 24)
    (reading,) = here.read(ids)
    fired = reading.firings
    feature = int(fired.feature[fired.position == 20][0])
    other = (feature + 1) % sae.F
    last = int(fired.position[fired.feature == feature].max())
    changed = {}
    for arm, policy in amplify_suppress.policies(site, feature, other, 3.0).items():
        policy.positions = (last,)
        with torch.no_grad(), writesae.attach(here.model, {site: sae}, policies=[policy]) as tap:
            here.model(input_ids=ids, use_cache=False)
        changed[arm] = tap.writes[1].states([last])[0, 0, 2] - reading.writes[1].states([last])[0, 0, 2]
    v, w = (x.detach() for x in sae.atoms())
    code = float(fired.activation[(fired.feature == feature) & (fired.position == last)][0])
    assert torch.allclose(changed["amplify"], 2 * code * v[feature].mT @ w[feature], atol=1e-4)
    assert torch.allclose(changed["suppress"], -code * v[feature].mT @ w[feature], atol=1e-4)
    for arm in ("amplify", "suppress"):
        control = changed[f"{arm}_control"]
        assert float(control.norm()) == pytest.approx(float(changed[arm].norm()), rel=1e-3)
        direction = (control * (v[other].mT @ w[other])).sum() / control.norm() / (v[other].mT @ w[other]).norm()
        assert float(direction) == pytest.approx(1.0 if arm == "amplify" else -1.0, abs=1e-3)


def test_a_planted_move_beyond_the_control_is_found_and_none_is_not():
    draw = np.random.default_rng(0)
    n = 120
    noise = lambda more=0.0: draw.normal(more, 0.2, n)  # noqa: E731
    base = {"target": np.full(n, "state", object), "layer": np.full(n, 1), "head": np.full(n, 2),
            "feature": np.arange(n) // 6, "plain": np.zeros(n)}  # fmt: skip
    base |= {f"{arm}_changed": np.full(n, 0.5) for arm in amplify_suppress.ARMS}
    planted = {"amplify": noise(0.3), "amplify_control": noise(), "suppress": noise(-0.3), "suppress_control": noise()}
    null = {arm: noise(0.3) for arm in amplify_suppress.ARMS}
    verdicts = [
        [answer.verdict for answer in amplify_suppress._answers(amplify_suppress.moves({**base, **arms}, 0))]
        for arms in (planted, null)
    ]
    assert verdicts == [["holds"] * 2, ["cannot be told"] * 2]
