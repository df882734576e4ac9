"""The paper's analyses of dictionaries: partition under seeds, atom by atom, head by head, baselines."""

import numpy as np
import pytest
import torch
from paper_lab import dictionary, lab
from scipy import stats

import writesae
from writesae.paper import baselines, residual_coherence, spectral, stability, studies
from writesae.paper.measures import above, mean, ratio, replaced_text
from writesae.paper.trained import config, held, reconstructions, trained
from writesae.sae.block import Block

pytestmark = pytest.mark.usefixtures("one_thread")


def found(name, tmp_path, **settings):
    here = lab(name, tmp_path, **settings)
    findings = studies()[name].run(here)
    claims = {claim.key for claim in studies()[name].claims}
    assert {answer.claim for answer in findings.answers} == claims
    return findings


@pytest.mark.parametrize(
    "interval, verdict", [((0.6, 0.7), "holds"), ((0.1, 0.4), "does not hold"), ((0.4, 0.6), "cannot be told")]
)
def test_a_verdict_is_the_side_of_the_whole_interval(interval, verdict):
    assert above(interval, 0.5) == verdict and above(None, 0.5) == "cannot be told"


def test_means_and_ratios_are_numpys_and_their_intervals_scipys():
    draw = np.random.default_rng(0)
    x, y = draw.normal(3, 1, 400), draw.normal(5, 1, 400)
    got, each = mean(x, np.arange(400), "token"), ratio(x, y, np.arange(400), "token")
    assert got["mean"] == pytest.approx(x.mean()) and each["ratio"] == pytest.approx(x.sum() / y.sum())
    expected = stats.bootstrap((x,), np.mean, n_resamples=5000, method="percentile", rng=draw).confidence_interval
    assert got["ci95"] == pytest.approx(list(expected), abs=0.02)
    expected = stats.bootstrap(
        (x, y), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, n_resamples=5000,
        method="percentile", rng=draw,
    ).confidence_interval  # fmt: skip
    assert each["ci95"] == pytest.approx(list(expected), abs=0.01)


def test_the_same_atoms_match_whatever_their_order_and_others_do_not():
    one, other = (dictionary(1, 0, F=40, seed=seed).atoms() for seed in (0, 1))
    order = torch.randperm(40)
    again = tuple(-x[order] for x in one)  # (-v)(-w)^T is the same matrix
    assert stability.matched([one, again])["mean"] == 1 and stability.matched([one, other])["mean"] == 0
    assert stability.matched([one, (-one[0], one[1])])["mean"] == 0  # signs count
    matrix = torch.einsum("nrk,nrv->nkv", *one).flatten(1)
    expected = torch.cosine_similarity(matrix[:, None], torch.einsum("nrk,nrv->nkv", *other).flatten(1)[None], dim=2)
    assert torch.allclose(stability.cosines(one, other), expected, atol=1e-5)


def test_a_dictionary_is_trained_once_kept_and_better_than_an_untrained_one(tmp_path):
    here = lab("partition", tmp_path, keep=True, F=24, steps=80, passages=8)
    writes = held(here, "train", 8, [(1, 2)], context=64)[1, 2]
    assert writes.shape[:3] == (8, 64, 1)
    first = trained(here, (1, 2), config(here, k=4), writes)
    again = trained(here, (1, 2), config(here, k=4), writes)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert (first.layer, first.head) == (1, 2) and len(list((here.folder / "dictionaries").iterdir())) == 1
    other = trained(here, (1, 2), config(here, k=4, seed=1), writes)
    assert not torch.equal(first.v_dec, other.v_dec)
    block = Block([writes], 0)
    rows, positions = torch.arange(8).repeat_interleave(8), torch.arange(8, 64, 7).repeat(8)
    states = block.states(rows, positions)
    error = (reconstructions(first, block, rows, positions) - states).square().sum()
    assert error < 0.8 * (states - states.mean(0)).square().sum()
    per_state = torch.stack([writes.states(torch.tensor([[r, p]]))[0, 0] for r, p in zip(rows, positions, strict=True)])
    assert torch.allclose(states, per_state, atol=1e-5)


def test_the_partition_is_swept_over_sparsity_and_seeds(tmp_path):
    got = found("partition", tmp_path, passages=3, F=24, steps=30, ks=(2, 4), seeds=2, least=2)
    trained_ = got.statistics["trained"]["k"]
    assert set(trained_) == {"2", "4"}
    rows = got.tables["dictionaries"]
    assert rows["k"].tolist() == [2, 2, 4, 4] and rows["seed"].tolist() == [0, 1, 0, 1]
    for k, record in trained_.items():
        counts = rows["alive"][rows["k"] == int(k)]
        assert record["alive"]["counts"] == counts.tolist()
        assert record["alive"]["cv"] == pytest.approx(counts.std(ddof=1) / counts.mean())


@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_every_atom_has_one_voice(tmp_path, family):
    got = found("population", tmp_path, family=family, firings=60, atoms=6, tokens=1500, each=6, horizon=1)
    for target in ("state", "write"):
        record, table = got.statistics[target], got.tables[target]
        own = record["atom_against_delete"]
        features, counts = np.unique(table["feature"], return_counts=True)
        kept = features[counts >= 5]
        assert own["n"] == len(kept) > 1
        rates = [(table["atom"] < table["delete"])[table["feature"] == f][:30].mean() for f in kept]
        assert own["mean"] == pytest.approx(np.mean(rates)) and own["mean_ci95"][0] <= own["mean"]


def test_population_without_dictionaries_of_writes_says_so(tmp_path):
    got = found("population", tmp_path, writes=False, firings=30, atoms=4, tokens=1500, each=6, horizon=1)
    answers = {answer.claim: answer for answer in got.answers}
    assert answers["population.deletion.write"].why_no_interval == "no dictionary of writes was given"
    with pytest.raises(ValueError, match="saes: population takes dictionaries of states or writes, got none"):
        studies()["population"].run(lab("population", tmp_path, saes=False, writes=False))


def test_every_head_of_the_layer_is_tested(tmp_path):
    got = found(
        "all_heads", tmp_path, passages=4, F=16, k=2, steps=20, firings=12, each=4, horizon=1, tokens=1500
    )  # fmt: skip
    assert got.statistics["layer"] == 1
    for target in ("state", "write"):
        record = got.statistics[target]["atom_against_delete"]
        rates = [x["rate"] for x in record["heads"].values()]
        assert list(record["heads"]) == ["0", "1", "2", "3"] and record["n"] == 4
        assert record["mean"] == pytest.approx(np.mean(rates)) and record["sd"] == pytest.approx(np.std(rates, ddof=1))
    with pytest.raises(ValueError, match="layer: expected one of"):
        studies()["all_heads"].run(lab("all_heads", tmp_path, layer=2))


def test_baselines_without_dictionaries_are_scikit_learns_and_exact_where_they_can_be():
    draw = torch.Generator().manual_seed(0)
    few = torch.einsum("nj,jkv->nkv", torch.randn(80, 4, generator=draw), torch.randn(4, 5, 3, generator=draw))
    found = baselines.without_dictionaries(few[:60] + 1, few[60:] + 1, 4, 0)
    assert torch.allclose(found["PCA 4"], few[60:] + 1, atol=1e-4)  # as many directions as there are
    assert torch.allclose(found["mean"], (few[:60] + 1).mean(0).expand(20, 5, 3), atol=1e-5)
    assert torch.linalg.matrix_rank(found["SVD 2"], atol=1e-4).tolist() == [2] * 20
    left, right = torch.randn(20, 5, 1, generator=draw), torch.randn(20, 1, 3, generator=draw)
    assert torch.allclose(baselines.without_dictionaries(few, left * right, 2, 0)["SVD 1"], left * right, atol=1e-5)
    positive = torch.rand(60, 2, generator=draw) @ torch.rand(2, 15, generator=draw)
    found = baselines.without_dictionaries(positive.view(60, 5, 3), positive.view(60, 5, 3), 2, 0)["NMF 2"]
    assert (found - positive.view(60, 5, 3)).norm() < 0.05 * positive.norm()


def test_the_top_pair_of_a_flat_atom_that_is_an_outer_product_is_the_atom():
    sae = dictionary(1, 0, kind="flat", F=10)
    v, w = torch.randn(10, 8, 1), torch.randn(10, 1, 6)
    sae.W_dec.copy_((v * w).flatten(1))
    cut = baselines.top_pair(sae)
    X = torch.randn(7, 8, 6)
    assert cut.kind == "matrix" and torch.allclose(cut(X), sae(X), atol=1e-5)
    sae.W_dec.copy_(torch.randn(10, 48))
    assert not torch.allclose(baselines.top_pair(sae)(X), sae(X), atol=1e-2)


def test_every_encoder_is_trained_measured_and_where_it_can_be_tested(tmp_path):
    got = found(
        "baselines", tmp_path, passages=4, states=200, F=16, k=2, steps=20, firings=12, each=4, horizon=1, tokens=1500
    )  # fmt: skip
    fvu = got.statistics["fvu"]
    assert {*baselines.SWEEP, baselines.TOP_PAIR, "PCA 2", "PCA 8", "NMF 2", "SVD 1", "SVD 2", "SVD 4"} <= set(fvu)
    errors = got.tables["errors"]
    assert fvu["flat"]["ratio"] == pytest.approx(errors["flat"].sum() / errors["variance"].sum())
    assert fvu["SVD 4"]["ratio"] < fvu["SVD 2"]["ratio"] < fvu["SVD 1"]["ratio"]
    assert set(got.statistics["win_rate"]) == {"bilinear", "tied", "matrix", "rank 2", "flat, top pair"}


def test_the_spectral_gap_and_the_area_under_the_curve():
    X = torch.diag_embed(torch.tensor([[6.0, 2, 1], [3, 3, 0]]))
    assert spectral.gap(X) == pytest.approx(np.log([3, 1]), abs=1e-6)
    draw = np.random.default_rng(0)
    value, passage = draw.normal(size=300), np.repeat(np.arange(30), 10)
    planted = spectral.auc(value, value + draw.normal(size=300) > 0, passage, 100, 0)
    nothing = spectral.auc(value, draw.random(300) > 0.5, passage, 100, 0)
    assert planted["ci95"][0] > 0.7 and planted["auc"] > planted["null95"][1]
    assert nothing["ci95"][0] < 0.5 < nothing["ci95"][1]
    won = value > 0.3
    u = stats.mannwhitneyu(value[won], value[~won]).statistic / won.sum() / (~won).sum()
    assert spectral.auc(value, won, passage, 2, 0)["auc"] == pytest.approx(u)
    assert spectral.auc(value, np.ones(300, bool), passage, 2, 0)["auc"] is None


@pytest.mark.parametrize("family", ["gated", "mamba2"])
def test_the_spectrum_is_that_of_the_states_at_the_firings(tmp_path, family):
    settings = dict(family=family, firings=40, each=5, horizon=1, tokens=1500, resamples=20)
    got = found("spectral", tmp_path, **settings)
    here, table = lab("spectral", tmp_path, **settings), got.tables["firings"]
    (site,) = here.saes
    passages = replaced_text(here)
    i = len(table["passage"]) // 2
    tokens = torch.from_numpy(passages[table["passage"][i]].tokens)[None]
    with torch.no_grad(), writesae.attach(here.model, {site: None}) as tap:
        here.model(input_ids=tokens)
    state = tap.writes[site[0]].states([int(table["position"][i])])[0, 0, site[1]]
    sigma = torch.linalg.svdvals(state)
    assert np.exp(table["state"][i]) == pytest.approx(float(sigma[0] / sigma[1]), rel=1e-3)


def test_residuals_that_last_are_found_coherent_and_noise_is_not(tmp_path):
    got = found("residual_coherence", tmp_path, passages=4, each=6)
    table, statistics = got.tables["tokens"], got.statistics
    assert len(table["passage"]) == 24 and table["position"].min() >= 8
    # An untrained dictionary leaves nearly all of a state, and states last.
    assert statistics["successive_above_null"]["ci95"][0] > 0
    noise = torch.randn(2000, 5, 4, generator=torch.Generator().manual_seed(0))
    assert abs(float(residual_coherence.cosine(noise[:1000], noise[1000:]).mean())) < 0.03
    outer = noise[:, :, :1] * noise[:, :1]
    assert residual_coherence.first_share(outer).allclose(torch.ones(2000), atol=1e-5)
    assert float(residual_coherence.first_share(noise).mean()) < 0.7
