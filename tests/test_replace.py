"""The replacement test on a tiny random model: what is put where, resuming, and bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

import writesae
from writesae.experiments import passages_of, run_replacement
from writesae.experiments.conditions import CONDITIONS, Fired, deltas, random_factors
from writesae.experiments.engine import ForkEngine, Places, read
from writesae.experiments.firing import sample, top_codes
from writesae.models import load
from writesae.models.hf_gated_delta import layers
from writesae.sae import SAE


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only lose time to threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Letters:
    """A tokenizer of 90 tokens: one a byte."""

    def __call__(self, text, **_):
        return {"input_ids": [3 + b % 90 for b in text.encode()]}

    def decode(self, ids):
        return "".join(chr(32 + i) for i in ids)


def texts(n, length=150, seed=0):
    draw = np.random.default_rng(seed)
    return [(f"text {i}", "".join(chr(c) for c in draw.integers(33, 120, length))) for i in range(n)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def dictionary(layer=1, head=2, kind="bilinear", seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SAE(8, 6, 12, 3, kind, layer=layer, head=head, **options)


def run(model, sae=None, n=6, **options):
    passages = passages_of(texts(n), Letters(), 50)
    options = {"firings": 20, "each": 3, "horizon": 3, "progress": False, **options}
    return run_replacement(model, Letters(), dictionary() if sae is None else sae, passages, **options)


def test_every_condition_and_statistic(model):
    select = passages_of(texts(4, seed=1), Letters(), 50)
    result = run(model, select=select, min_selected=2, conditions=CONDITIONS)
    assert len(result) == 20
    summary = json.loads(json.dumps(result.summary(200), allow_nan=False))
    assert summary["native_kl_max"] == 0.0
    assert set(summary["tests"]) == {"increment/coef", "increment/matched", "outer/coef", "outer/matched"}
    for metrics in summary["tests"].values():
        for directions in metrics.values():
            for test in directions.values():
                for name, statistic in test.items():
                    if name not in ("kl", "atom_against"):
                        assert statistic["statistic"] and "n" in statistic
                assert set(test["atom_against"]) == {"mean", "previous", "singular"}
    for name, column in result.table.items():
        if name.startswith(("forward:", "reverse:")):
            assert column.shape == (20, 4) and np.isfinite(column).all()
            assert (column == 0).all() if name.endswith(".native") else (column[:, 0] > 0).all()
    assert summary["kl_median"]["atom"] == np.median(result.kl("increment", "atom", "coef"))


def test_conditions_have_the_sizes_they_say(model):
    engine = ForkEngine(model, 1, 2)
    places = Places(torch.tensor([0, 0, 0]), torch.tensor([4, 4, 9]), torch.tensor([0, 3, 1]))
    clean = engine.clean(torch.arange(3, 23)[None], torch.tensor([20]), lambda writes: places)
    v, w = torch.randn(3, 1, 8), torch.randn(3, 1, 6)
    fired = Fired(v, w, torch.tensor([0.5, 1.0, 2.0]), ["a", "b", "c"], torch.randn(3, 8, 6))
    out = deltas(clean, fired, ("increment", "outer"), ("coef", "matched"), CONDITIONS, 0)
    assert out.pop("baseline") is None
    assert (out["increment.native"] == 0).all() and (out["outer.native"] == 0).all()
    removed = read(clean, clean.left, clean.right)
    atom = read(clean, v[:, 0] * fired.coefficient[:, None], w[:, 0])
    torch.testing.assert_close(out["increment.delete"], -removed)
    torch.testing.assert_close(out["increment.coef.atom"], atom - removed)
    outer = read(clean, clean.left, clean.outer_right)
    torch.testing.assert_close(out["outer.coef.atom"], atom - outer)
    assert not torch.allclose(removed, outer)
    # beta_t v_t is the whole write less its erase: u_t = beta_t (v_t - S~^T k_t).
    states = clean.writes.states(torch.tensor([[0, 3], [0, 8]]))[torch.tensor([0, 0, 1]), places.head]
    decay, beta = (x[0, places.position, places.head] for x in (clean.writes.decay, clean.writes.beta))
    erased = beta[:, None] * torch.einsum("nkv,nk->nv", decay.exp()[:, None, None] * states, clean.left)
    torch.testing.assert_close(clean.right, clean.outer_right - erased, atol=1e-5, rtol=1e-4)
    p, q = random_factors(fired.identity, clean.left, clean.right, 0)
    torch.testing.assert_close(p.norm(dim=1), torch.ones(3))
    matched = (clean.left.norm(dim=1) * clean.right.norm(dim=1))[:, None]
    torch.testing.assert_close(out["increment.matched.random"], read(clean, matched * p, q) - removed)
    coef = (fired.coefficient * v[:, 0].norm(dim=1) * w[:, 0].norm(dim=1))[:, None]
    torch.testing.assert_close(out["increment.coef.random"], read(clean, coef * p, q) - removed)
    again, _ = random_factors(["c", "a"], clean.left[:2], clean.right[:2], 0)
    torch.testing.assert_close(again, p[[2, 0]])  # by name, not by place in the batch
    assert not torch.allclose(random_factors(["c"], clean.left, clean.right, 1)[0], p[2:])


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "matrix"])
@pytest.mark.parametrize("sparsity", ["topk", "threshold"])
def test_top_codes_are_the_dictionarys(model, kind, sparsity):
    sae = dictionary(kind=kind, sparsity=sparsity, r=2)
    if sparsity == "threshold":
        sae.threshold.uniform_(0, 0.3)
    engine = ForkEngine(model, 1, 2)
    places = Places(*torch.tensor([[0], [1], [0]]))
    writes = engine.clean(torch.arange(3, 43).view(2, 20), torch.tensor([20, 20]), lambda writes: places).writes
    feature, value = top_codes(writes, sae, 2)
    codes = sae.encode(writes.states(range(20))[:, :, 2])
    best = codes.values.max(-1)
    torch.testing.assert_close(value, best.values.detach(), atol=1e-5, rtol=1e-4)
    fires = value > 0
    assert fires.any()
    assert torch.equal(feature[fires], codes.indices.gather(-1, best.indices[..., None])[..., 0][fires])


def test_sample_spreads_and_stays_inside():
    feature, value = torch.zeros(2, 30, dtype=torch.int64), torch.ones(2, 30)
    feature[:, 10:] = 1
    found = sample(feature, value, [30, 7], ["a", "b"], 50, 4, None, 0)
    assert [t for p, t in found if p == 0] == list(range(1, 26)) and [t for p, t in found if p == 1] == [1, 2]
    assert all(t >= 10 for _, t in sample(feature, value, [30, 7], ["a", "b"], 50, 4, np.array([False, True]), 0))
    few = sample(feature, value, [30, 7], ["a", "b"], 5, 4, None, 0)
    assert len([1 for p, _ in few if p == 0]) == 5
    assert [t for _, t in sample(feature[:1], value[:1], [30], ["a"], 5, 4, None, 0)] == [t for p, t in few if p == 0]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tolist() == b[name].tolist(), name


def test_a_killed_run_resumes_to_the_same_rows(model, tmp_path):
    options = dict(firings=30, each=2, memory=40_000_000)
    options["memory"] = 2 * 2 * ForkEngine(model, 1, 3).bytes_a_fork(50)  # two passages a batch
    whole = run(model, out=tmp_path / "a", **options)
    same(whole.table, run(model, **options).table)
    parts = sorted((tmp_path / "a" / "parts").glob("*.parquet"))
    assert len(parts) > 4
    # Killed after two parts, in the middle of writing a third.
    (tmp_path / "b" / "parts").mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "plan.json", tmp_path / "b")
    for part in parts[:2]:
        shutil.copy(part, tmp_path / "b" / "parts")
        shutil.copy(part.with_suffix(".json"), tmp_path / "b" / "parts")
    (tmp_path / "b" / "parts" / f"{parts[2].name}.77.tmp").write_bytes(parts[2].read_bytes()[:100])
    same(whole.table, run(model, out=tmp_path / "b", **options).table)
    assert not list((tmp_path / "b" / "parts").glob("*.tmp"))
    with pytest.raises(ValueError, match="other settings.*seed"):
        run(model, out=tmp_path / "a", seed=1, **options)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder"):
        run(model, out=tmp_path / "c", **options)


def test_several_heads_share_a_layer(model):
    saes = {(1, 0): dictionary(head=0), (1, 2): dictionary(), (3, 1): dictionary(3, 1, seed=2)}
    result = run(model, saes, n=10, firings=12)
    sites = list(zip(result.table["layer"].tolist(), result.table["head"].tolist(), strict=True))
    assert {site: sites.count(site) for site in saes} == dict.fromkeys(saes, 12)
    heads = result.summary(50)["heads"]
    assert heads["1"]["n"] == 2 and heads["3"]["n"] == 1 and heads["3"]["sd"] is None
    alone = run(model, n=10, firings=12)
    mine = [i for i, site in enumerate(sites) if site == (1, 2)]
    for name in ("document", "position", "feature", "token"):
        assert alone.table[name].tolist() == result.table[name][mine].tolist()
    name = "forward:increment.coef.random"
    np.testing.assert_allclose(alone.table[name], result.table[name][mine], rtol=1e-3, atol=1e-9)


def test_save_and_report_data(model, tmp_path):
    result = run(model)
    result.save(tmp_path, model="tiny")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == "tiny" and summary["n"] == 20


DEFAULT = Path(writesae.__file__).parent / "default" / "model"


@pytest.mark.skipif(not DEFAULT.is_dir(), reason="this tree does not hold the embedded model")
def test_native_writes_put_back_change_nothing_in_the_default_model():
    model, tokenizer = load("default")
    site = next(s for s in layers(model) if s.layer_index > 0)
    sae = SAE(site.K, site.V, 64, 4, layer=site.layer_index, head=site.num_v_heads - 1)
    code = Path(__file__).read_text()
    passages = passages_of([("this file", code)], tokenizer, 128)
    result = run_replacement(model, tokenizer, sae, passages, firings=16, each=4, horizon=4, progress=False)
    summary = result.summary(50)
    assert summary["native_kl_max"] == 0.0
    assert 0 < summary["kl_median"]["delete"] < 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"firings": 0}, "firings: expected at least 1"),
        ({"horizon": 0}, "horizon"),
        ({"conditions": ["atom", "random"]}, "atom and delete"),
        ({"conditions": ["atom", "delete", "mean"]}, "mean"),
        ({"natives": ["outre"]}, "natives: expected some of increment, outer"),
        ({"scales": []}, "scales"),
        ({"memory": 1000}, "memory: expected at least"),
        ({"sae": {}}, "at least one dictionary"),
        ({"sae": {(2, 0): dictionary()}}, "full-attention"),
        ({"sae": {(1, 4): dictionary()}}, "head: expected"),
        ({"sae": {(1, 0): SAE(6, 8, 12, 3)}}, "K=8, V=6"),
        ({"sae": {(1, 0): SAE(8, 6, 12, 3, "flat")}}, "dense atoms"),
        ({"sae": SAE(8, 6, 12, 3)}, "layer and head"),
        ({"horizon": 80}, "passages: expected one of more than"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, **options)
