"""The studies of interventions: what they compute agrees with edits really made, and with scipy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from writesae.cli import main
from writesae.experiments.statistics import ClusterBootstrap, explained
from writesae.models import layers
from writesae.models.directions import head_projection
from writesae.models.tiny import tiny_mamba2, tiny_model, tokens
from writesae.paper import closed_form, erase, install
from writesae.paper.tokens_by_rank import bounds, by_rank, semantic
from writesae.sae import SAE


class SmallLab(SimpleNamespace):
    """What a study's parts ask of a `Lab`, on random tokens."""

    def __getitem__(self, name):
        return self.settings[name]

    def rng(self, *labels):
        return np.random.default_rng(len(labels))

    def whole(self, split, passages, context=40):
        return tokens(passages, context)


def small_lab(model, **settings):
    return SmallLab(model=model, seed=0, settings=settings)


def random_sae(K, V, layer, head, F=12, r=1, seed=0):
    sae = SAE(K, V, F, 3, "bilinear", r, layer=layer, head=head)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("v_enc", "w_enc", "v_dec", "w_dec"):
            x = getattr(sae, name)
            x.copy_(torch.randn(x.shape, generator=draw))
    return sae.eval().requires_grad_(False)


def studied(name, tmp_path, *settings):
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["paper", name, "--quick", *words, "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    for figure in summary["figures"]:
        assert (tmp_path / name / "plots" / f"{figure}.svg").stat().st_size > 5000
    assert all(len((tmp_path / name / f"{table}.csv").read_text().splitlines()) == n + 1
               for table, n in summary["tables"].items())  # fmt: skip
    return summary


def test_explained_is_sklearns_and_scipys():
    from sklearn.metrics import r2_score

    draw = np.random.default_rng(0)
    x = draw.standard_t(3, 500)
    y = x + draw.normal(size=500)
    found = explained(y, x, ClusterBootstrap(np.arange(500) // 5, 400), "passage")
    assert found["r2"] == pytest.approx(r2_score(y, x)) and found["n"] == 500 and found["clusters"] == 100
    assert found["spearman"] == pytest.approx(stats.spearmanr(y, x).statistic)
    for name, interval in (("r2", "ci95"), ("spearman", "spearman_ci95")):
        assert found[interval][0] < found[name] < found[interval][1]
    null = explained(y, draw.permutation(x), ClusterBootstrap(np.arange(500), 400), "passage")
    assert null["r2"] < 0 and null["spearman_ci95"][0] < 0 < null["spearman_ci95"][1]


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("make", [tiny_model, tiny_mamba2])
def test_exact_propagation_is_the_edit_over_the_whole_layer_output(make, r):
    model = make()
    site = layers(model)[0]
    assert site.K != site.V
    sae = random_sae(site.K, site.V, site.layer_index, 1, r=r)
    found = closed_form.exactness(small_lab(model, checked=3), (site.layer_index, 1), sae)
    assert found["error"].shape == (3,) and found["error"].max() <= 1e-5


def test_closed_form_of_the_embedded_model(tmp_path):
    found = studied("closed_form", tmp_path, "passages=3", "firings=4", "checked=1", "epsilons=[0.05,3.0]")
    states = found["statistics"]["states"]
    assert states["exact"]["0.05"]["top 50"]["r2"] > 0.99 > states["direct"]["0.05"]["top 50"]["r2"]
    assert states["other"]["0.05"]["top 50"]["r2"] < 0.5
    assert found["statistics"]["float64"]["max"] <= 1e-5
    # What the fitted number tests is linearity alone: an edit as large as the state bends it.
    assert states["exact"]["3"]["top 50"]["r2"] < states["exact"]["0.05"]["top 50"]["r2"]


def test_erase_chooses_on_other_text_and_has_a_control_of_each_kind(tmp_path):
    found = studied("erase", tmp_path, "passages=6", "atoms=3", "learned=3", "firings=3", "places=2", "least=1")
    statistics = found["statistics"]
    assert statistics["atoms"] >= 2 and set(statistics["erase"]) == {"own", "random_token", "other_feature"}
    for name in ("random_token", "other_feature"):
        against = statistics["erase_against"][name]
        assert against["ci95"][0] <= against["mean"] <= against["ci95"][1] and against["wilcoxon"]["n"] == against["n"]


def test_a_planted_preference_is_erased_and_a_planted_null_is_not():
    draw = np.random.default_rng(0)
    site, feature = np.repeat([0, 1], 60), np.tile(np.repeat(np.arange(6), 10), 2)
    other = (feature - 1) % 6
    table = {"site": site, "feature": feature, "of_other": other, "own": -0.2 + 0.1 * draw.normal(size=120),
             "other_feature": 0.1 * draw.normal(size=120), "random_token": 0.1 * draw.normal(size=120)}  # fmt: skip
    for name in ("other_feature", "random_token"):
        found = erase._against(table, name, 0)
        assert found["ci95"][1] < -0.1 and found["n"] == 12 and found["wilcoxon"]["p"] < 0.01
    null = erase._against({**table, "own": 0.1 * draw.normal(size=120)}, "random_token", 0)
    assert null["ci95"][0] < 0 < null["ci95"][1]


def test_strata_are_shares_of_the_vocabulary():
    assert bounds(248_320) == {"frequent": (1, 100), "mid": (100, 1000), "rare": (1000, 10_000)}
    small = bounds(64)  # every stratum keeps a rank of its own
    assert [high > low for low, high in small.values()] == [True] * 3 and small["mid"][0] == small["frequent"][1]
    logits, rng = torch.arange(20.0), np.random.default_rng(0)
    assert {by_rank(logits, 2, 4, set(), rng) for _ in range(30)} == {17, 16}
    assert {by_rank(logits, 2, 4, {17}, rng) for _ in range(9)} == {16} and by_rank(logits, 2, 3, {17}, rng) == -1
    assert semantic(np.array([3, 5, 19, 18]), logits, {5}, rng) == 3


@pytest.mark.parametrize("make", [tiny_model, tiny_mamba2])
def test_install_adds_m_times_the_native_write_with_its_key_and_the_tokens_value(make):
    model, ids = make(), tokens(2, 20)
    layer = layers(model)[-1]
    token, site = np.array([5, 9]), (layer.layer_index, 1)
    edits = install.install_edits(model, ids, token, [site], 2.0, 3)[layer.layer_index]
    assert edits.row.tolist() == [0] * 3 + [1] * 3 and edits.position.tolist() == [17, 18, 19] * 2
    from writesae import attach

    with torch.no_grad(), attach(model, {site: None}) as tap:
        model(input_ids=ids)
    left, right = tap.writes[site[0]].native(edits.row, edits.position, 1)
    norm = edits.left.norm(dim=1) * edits.right.norm(dim=1)
    torch.testing.assert_close(norm, 2 * left.norm(dim=1) * right.norm(dim=1))
    assert torch.cosine_similarity(edits.left, left).min() > 0.9999
    mine = head_projection(layer, 1) @ model.get_output_embeddings().weight[5].detach()
    assert torch.cosine_similarity(edits.right[:3], mine[None]).min() > 0.9999


def test_install_has_its_controls(tmp_path):
    found = studied("install", tmp_path, "prompts=3", "generated=4", "magnitudes=[20.0]", "prompt=16")["statistics"]
    part = found["all heads"]["20"]
    assert part["edited"]["all"]["n"] == found["pairs"] > 6
    difference = part["edited"]["all"]["rate"] - part["control"]["all"]["rate"]
    assert part["less_control"]["mean"] == pytest.approx(difference)
