"""The paper's analyses of dictionaries: partition under seeds, atom by atom, head by head, baselines."""

import numpy as np
import pytest
import torch
from paper_lab import dictionary, lab
from scipy import stats

from writesae.paper import stability, studies
from writesae.paper.measures import above, mean, ratio
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
