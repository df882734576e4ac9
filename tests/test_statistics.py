"""The statistics against small cases counted by hand, and against slower ways to the same number."""

import json

import numpy as np
import pytest
from scipy import stats

from writesae.experiments.statistics import (
    ClusterBootstrap,
    across_heads,
    against,
    by_quartile,
    check_finite,
    cliffs_delta,
    population,
    replacement_tests,
    strict_chain,
    wilcoxon,
    win_rate,
)

ATOM = np.array([1.0, 2.0, 3.0, 1.0, 5.0])
DELETE = np.array([2.0, 2.0, 1.0, 4.0, 9.0])
RANDOM = np.array([3.0, 5.0, 5.0, 4.0, 10.0])


def test_win_rate_by_hand():
    out = win_rate(ATOM, DELETE)
    assert (out["wins"], out["ties"], out["losses"], out["n"]) == (3, 1, 1, 5)  # a tie is no win
    assert out["rate"] == 0.6 and out["paired_effect"] == pytest.approx(2 / 5)
    # Wilson: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    z, p, n = 1.959964, 0.6, 5
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(p + z**2 / (2 * n) - half) / (1 + z**2 / n), (p + z**2 / (2 * n) + half) / (1 + z**2 / n)]
    assert out["ci95"] == pytest.approx(expected, abs=1e-6)
    sure = win_rate(np.zeros(20), np.ones(20))
    assert sure["rate"] == 1 and 0.8 < sure["ci95"][0] < sure["ci95"][1] == pytest.approx(1)


def test_strict_chain_by_hand():
    out = strict_chain(ATOM, DELETE, RANDOM)
    assert out["count"] == 2 and out["rate"] == 0.4  # firings 0 and 4; 1 and 3 tie
    assert out["ties"] == 2


def test_wilcoxon_is_scipys():
    draw = np.random.default_rng(0)
    a, b = draw.exponential(1, 200), draw.exponential(1.3, 200)
    a[:7] = b[:7]
    out = wilcoxon(a, b)
    assert (out["n"], out["zeros"], out["n_used"]) == (200, 7, 193)
    assert out["p"] == stats.wilcoxon(a[7:], b[7:]).pvalue
    # Signed ranks by hand: differences -1, 2, -3, -4 have ranks 1 to 4; the smaller sum is that of the plus sign.
    assert wilcoxon(ATOM, DELETE)["W"] == 2.0
    assert wilcoxon(np.ones(4), np.ones(4)) == {**wilcoxon(np.ones(4), np.ones(4)), "p": 1.0, "n_used": 0}


def test_bootstrap_resamples_clusters():
    draw = np.random.default_rng(1)
    clusters = draw.integers(0, 12, 90)
    values = (draw.random(90) < 0.3 + 0.05 * clusters).astype(float)
    bootstrap = ClusterBootstrap(clusters, 4000, seed=3)
    # The slow way: draw clusters, put their firings together, take the mean.
    labels, slow = np.unique(clusters), []
    for _ in range(4000):
        slow.append(np.concatenate([values[clusters == c] for c in draw.choice(labels, len(labels))]).mean())
    fast = bootstrap.mean(values)
    assert fast.mean() == pytest.approx(np.mean(slow), abs=0.01)
    assert fast.std() == pytest.approx(np.std(slow), rel=0.1)
    out = bootstrap.interval(values, "feature")
    assert out["ci95"] == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.03)
    assert (out["n"], out["clusters"], out["resamples"]) == (90, 12, 4000)
    again = ClusterBootstrap(clusters, 4000, seed=3).interval(values, "feature")
    assert again == out
    # A cluster a firing is the plain bootstrap; one cluster has nothing to resample.
    assert ClusterBootstrap(np.zeros(90), 10).mean(values) == pytest.approx(np.full(10, values.mean()))
    with pytest.raises(ValueError, match="values: expected 90"):
        bootstrap.mean(values[:5])


def test_population_by_hand():
    feature = np.repeat([7, 8, 9, 10], [40, 5, 4, 6])
    atom, delete = np.ones(55), np.full(55, 2.0)
    atom[30:40] = 3.0  # past the 30 that count
    atom[40:43] = 3.0  # feature 8 loses 3 of 5
    delete[51:54] = 0.5  # feature 10 loses 3, ties 1 (below), wins 2
    atom[54] = delete[54]
    out = population(atom, delete, feature)
    assert out["features"] == [7, 8, 10] and out["n"] == 3 and out["count"] == 1
    assert out["firings"] == 30 + 5 + 6
    assert out["win_rates"] == pytest.approx([1.0, 2 / 5, 2 / 6])
    assert out["significant"] == 1
    assert out["mean"] == pytest.approx((1 + 2 / 5 + 1 / 3) / 3)
    low, high = out["mean_ci95"]  # of three features: any of them, thrice, is a resample
    assert 1 / 3 <= low < out["mean"] < high <= 1
    assert population(atom[:4], delete[:4], np.arange(4))["n"] == 0


def test_the_mean_of_features_is_bootstrapped_over_features():
    draw = np.random.default_rng(0)
    feature = np.repeat(np.arange(40), 10)
    chance = np.repeat(draw.uniform(0.3, 1.0, 40), 10)
    atom, delete = (draw.random(400) > chance).astype(float), np.full(400, 0.5)
    out = population(atom, delete, feature)
    rates = np.array(out["win_rates"])
    assert out["mean"] == pytest.approx(rates.mean())
    half = 1.96 * rates.std(ddof=1) / np.sqrt(40)
    assert out["mean_ci95"] == pytest.approx([rates.mean() - half, rates.mean() + half], abs=0.02)
    one = population(atom[:10], delete[:10], feature[:10])
    assert one["mean"] == rates[0] and one["mean_ci95"] is None


def test_cliffs_delta_by_hand():
    out = cliffs_delta(ATOM, DELETE)
    pairs = [np.sign(d - a) for a in ATOM for d in DELETE]
    assert out["delta"] == pytest.approx(np.mean(pairs)) and out["n"] == 5
    assert cliffs_delta(DELETE, ATOM)["delta"] == pytest.approx(-out["delta"])
    assert cliffs_delta(np.zeros(4), np.ones(4)) == {**out, "n": 4, "delta": 1.0, "word": "large"}
    assert cliffs_delta(ATOM, ATOM)["word"] == "negligible" and cliffs_delta(ATOM, ATOM)["delta"] == 0
    steps = np.arange(100.0)
    words = [cliffs_delta(steps, steps + shift)["word"] for shift in (5, 10, 20, 40)]
    assert words == ["negligible", "small", "medium", "large"]


def test_quartiles_are_of_the_control():
    control = np.array([8.0, 1, 7, 2, 6, 3, 5, 4])
    treatment = np.array([9.0, 0, 6, 2, 5, 4, 4, 3])  # loses at 8 and 3, ties at 2
    out = by_quartile(treatment, control)
    assert [(q["from"], q["to"], q["n"], q["rate"], q["losses"], q["ties"]) for q in out] == [
        (1, 2, 2, 0.5, 0, 1), (3, 4, 2, 0.5, 1, 0), (5, 6, 2, 1.0, 0, 0), (7, 8, 2, 0.5, 1, 0),
    ]  # fmt: skip
    assert len(by_quartile(treatment[:2], control[:2])) == 2


def test_the_atom_against_another():
    feature = np.array([0, 0, 1, 1, 1])
    out = against(ATOM, DELETE, ClusterBootstrap(feature, 100), ClusterBootstrap(np.arange(5), 100))
    assert out["rate"] == 0.6 and out["cliffs_delta"]["delta"] == cliffs_delta(ATOM, DELETE)["delta"]
    assert 0 <= out["by_feature"][0] <= 0.6 <= out["by_feature"][1] <= 1


def test_heads():
    out = across_heads({(9, 0): 0.5, (9, 4): 0.7, (12, 1): 0.9})
    assert out["9"]["mean"] == pytest.approx(0.6) and out["9"]["sd"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert out["9"]["n"] == 2 and out["12"]["sd"] is None


def test_everything_is_named_and_fits_json():
    feature = np.array([0, 0, 1, 1, 1])
    by_feature, by_passage = ClusterBootstrap(feature, 100), ClusterBootstrap(np.arange(5), 100)
    kl = {"atom": ATOM, "delete": DELETE, "random": RANDOM, "previous": RANDOM}
    out = json.loads(json.dumps(replacement_tests(kl, by_feature, by_passage, feature, ["previous"]), allow_nan=False))
    assert out["win_rate"]["rate"] == 0.6 and out["strict_chain"]["rate"] == 0.4
    assert out["kl"]["delete"]["median"] == 2.0 and out["kl"]["delete"]["n"] == 5
    assert out["atom_against"]["previous"]["wins"] == 5


def test_a_nan_is_refused():
    bad = ATOM.copy()
    bad[3] = np.nan
    for call in (
        lambda: win_rate(bad, DELETE),
        lambda: wilcoxon(ATOM, bad),
        lambda: strict_chain(ATOM, DELETE, bad),
        lambda: population(bad, DELETE, np.arange(5)),
    ):
        with pytest.raises(ValueError, match="1 NaN or infinite of 5 .first at firing 3"):
            call()
    with pytest.raises(ValueError, match="expected 5 values"):
        check_finite(a=ATOM, b=ATOM[:2])
    with pytest.raises(ValueError, match="none"):
        check_finite(a=ATOM[:0])
