"""The studies of interventions: what they compute agrees with edits really made, and with scipy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from writesae.cli import main
from writesae.experiments.statistics import ClusterBootstrap, explained
from writesae.models.tiny import tiny_mamba2, tiny_model, tokens
from writesae.paper import closed_form
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
        assert (tmp_path / name / "plots" / f"{figure}.png").stat().st_size > 5000
        assert (tmp_path / name / "plots" / "dark" / f"{figure}.png").exists()
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
    site = closed_form.forks.layers(model)[0]
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
