"""The replacement test on a tiny random model: what is put where, resuming, and bad input."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    kda_families,
    mamba2_families,
    mamba_families,
    tiny_kda,
    tiny_mamba,
    tiny_mamba2,
    tiny_model,
)

import writesae
from writesae.experiments import passages_of, replace, run_replacement
from writesae.experiments.conditions import CONDITIONS as EVERY
from writesae.experiments.conditions import DEFAULT_CONDITIONS, OF_WRITES, arms
from writesae.experiments.engine import ForkEngine, Places
from writesae.experiments.firing import sample, top_codes
from writesae.experiments.sites import longest_memory, memory
from writesae.models import load
from writesae.models.hf_gated_delta import layers
from writesae.sae import SAE

pytestmark = pytest.mark.usefixtures("one_thread")

CONDITIONS = tuple(c for c in EVERY if c not in OF_WRITES)


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


def same_or_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-9)


def test_every_condition_and_statistic(model):
    select = passages_of(texts(4, seed=1), Letters(), 50)
    result = run(model, select=select, min_selected=2, conditions=CONDITIONS, read="both")
    assert len(result) == 20
    summary = json.loads(json.dumps(result.summary(200), allow_nan=False))
    assert summary["native_kl_max"] == 0.0
    assert set(summary["tests"]) == {
        f"{r}/{n}/{s}" for r in ("after", "before") for n in ("increment", "outer") for s in ("coef", "matched")
    }
    others = set(CONDITIONS) - {"native", "atom", "delete"}
    for name, metrics in summary["tests"].items():
        assert set(metrics) == ({"h1", "mean"} if name.startswith("after") else {"h0", "h1", "mean"})
        for directions in metrics.values():
            for test in directions.values():
                for statistic in ("win_rate", "wilcoxon", "population", "cliffs_delta", "strict_chain"):
                    assert test[statistic]["statistic"] and "n" in test[statistic]
                assert [q["n"] for q in test["by_quartile"]] == [5] * 4
                assert set(test["atom_against"]) == others - ({"scaled"} if name.endswith("matched") else set())
    assert {c for c in result.table if c.startswith("forward:")} == {
        f"forward:{x}" for x in arms(("increment", "outer"), ("coef", "matched"), CONDITIONS, ("after", "before"))
    }
    for name, column in result.table.items():
        if name.startswith(("forward:", "reverse:")):
            assert column.shape == (20, 4) and np.isfinite(column).all()
            if name.endswith(".native"):
                assert (column == 0).all()
            else:  # read after, the token itself cannot tell
                assert (column[:, 0] == 0).all() if ":after." in name else (column[:, 0] > 0).all()
                assert (column[:, 1:] > 0).all()
    assert summary["kl_median"]["atom"] == np.median(result.kl("increment", "atom", "coef"))
    assert summary["atom_vs_codebook"] == np.mean(
        result.kl("increment", "atom", "coef") < result.kl("increment", "codebook", "coef")
    )
    rows = {(r["read"], r["scale"], r["condition"]): r for r in summary["table"]}
    assert len(rows) == len(summary["table"]) == 2 * (1 + 2 * (len(others) - 3) + 2 + 1 + 2)
    row = rows["before", "matched", "codebook"]
    codebook = result.kl("increment", "codebook", "matched", read="before")
    assert row["beats_delete"]["rate"] == np.mean(codebook < result.kl("increment", "delete", read="before"))
    deletion = result.kl("increment", "delete", read="before")
    upper = deletion > np.median(deletion)
    assert row["upper"]["rate"] == np.mean(codebook[upper] < deletion[upper]) and summary["pooled"] == []
    assert row["atom_beats"]["rate"] == np.mean(result.kl("increment", "atom", "matched", read="before") < codebook)
    assert row["of_zero"] == np.median(codebook) / np.median(result.kl("increment", "zero", read="before"))


def test_one_read_time_alone_is_that_of_both(model):
    both = run(model, read="both", natives=("increment",))
    assert both.reads == ("after", "before")
    for when in ("after", "before"):
        alone = run(model, read=when, natives=("increment",))
        name = f"forward:{when}.increment.coef.atom"
        assert {c.split(":")[1].split(".")[0] for c in alone.table if c.startswith("forward:")} == {when}
        same_or_close(alone.table[name], both.table[name])


def test_a_condition_of_ones_own(model, tmp_path):
    def mine(edited):
        assert edited.states.after.shape == (len(edited.left), 8, 6)
        left, right = edited.left / edited.left.norm(dim=1, keepdim=True), edited.w[:, 0]
        return edited.size[:, None] * left, right / right.norm(dim=1, keepdim=True)

    def whole(edited):
        return edited.left[:, :, None] * edited.right[:, None]

    result = run(model, conditions={"mine": mine, "whole": whole}, out=tmp_path)
    kept = [c for c in DEFAULT_CONDITIONS if c != "codebook"]  # there is no text to take native writes from
    assert list(result.conditions) == [*kept, "mine", "whole"]
    # The whole write as a matrix is the write, to rounding; its KL with nothing changed is nothing.
    assert (result.kl("increment", "whole", "coef") < 1e-3 * result.kl("increment", "delete")).all()
    assert {"mine", "whole"} <= set(result.summary(50)["kl_median"])
    run(model, conditions={"mine": mine, "whole": whole}, out=tmp_path)
    with pytest.raises(ValueError, match="other settings .conditions"):
        run(model, conditions={"mine": whole, "whole": whole}, out=tmp_path)
    only = run(model, conditions=["atom", "delete", ("mine", mine)])
    assert only.conditions == ("atom", "delete", "mine")
    same_or_close(only.kl("outer", "mine", "matched"), result.kl("outer", "mine", "matched"))


def test_the_codebook_is_of_the_text_given(model):
    """Other text, other writes; and as many as there are atoms, or the text is too short."""
    select, train = passages_of(texts(4, seed=1), Letters(), 50), passages_of(texts(4, seed=2), Letters(), 50)
    one, two = (run(model, select=select, min_selected=1, train=t) for t in (None, train))
    assert one.table["position"].tolist() == two.table["position"].tolist()
    same_or_close(one.kl("increment", "atom", "coef"), two.kl("increment", "atom", "coef"))
    assert not np.allclose(one.kl("increment", "codebook", "coef"), two.kl("increment", "codebook", "coef"))
    with pytest.raises(ValueError, match="train: expected at least 12 tokens"):
        run(model, train=passages_of([("a", "short")], Letters(), 50))


def test_sites_are_named_by_rule(model):
    assert run(model, n=2, firings=4).rule == "given"
    everything = {(1, h): dictionary(head=h) for h in range(4)}
    assert run(model, everything, n=2, firings=4).rule == "all heads"
    everything |= {(layer, h): dictionary(layer, h) for layer in (0, 3) for h in range(4)}
    passages = [p.tokens for p in passages_of(texts(2), Letters(), 50)]
    wanted = longest_memory(model, passages, 2)
    result = run(model, everything, n=2, firings=4, longest=2)
    assert result.rule == "longest memory" and sorted(result.sites) == sorted(wanted)
    del everything[wanted[1]]
    with pytest.raises(ValueError, match="longest: expected a dictionary for each of the 2 heads"):
        run(model, everything, n=2, firings=4, longest=2)
    with pytest.raises(ValueError, match="longest: expected 1 to 12 heads of this model, got 0"):
        run(model, everything, n=2, longest=0)


def test_memory_is_that_of_the_decay(model):
    passages = [p.tokens for p in passages_of(texts(3, 70), Letters(), 50)]
    found = memory(model, passages)
    assert set(found) == {(layer, head) for layer in (0, 1, 3) for head in range(4)}
    fades = {}
    for tokens in passages:
        with torch.no_grad(), writesae.attach(model, {site: None for site in found}) as tap:
            model(torch.from_numpy(tokens)[None])
        for layer, head in found:
            fades.setdefault((layer, head), []).append(tap.writes[layer].decay[0, :, head])
    for site, parts in fades.items():
        assert found[site] == pytest.approx(-1 / float(torch.cat(parts).double().mean()), rel=1e-5)


def other(family):
    """A tiny model on another rule."""
    for make, known in ((tiny_mamba2, mamba2_families), (tiny_kda, kda_families), (tiny_mamba, mamba_families)):
        if family in known():
            return make(family)
    pytest.skip(f"this transformers has no {family}")


@pytest.mark.parametrize("family", ["mamba2", "kimi_linear", "mamba"])
def test_other_rules_are_tested_in_the_same_way(family):
    model = other(family)
    site = layers(model)[0]
    sae = SAE(site.K, site.V, 12, 3, "bilinear", layer=site.layer_index, head=site.num_v_heads // 2, target="write")
    select = passages_of(texts(2, seed=1), Letters(), 50)
    conditions = ("native", "atom", "delete", "codebook", "singular", "reconstruction", "zero")
    result = run(model, sae, n=3, firings=6, select=select, min_selected=1, conditions=conditions, read="both")
    assert len(result) == 6
    for name, column in result.table.items():
        if name.startswith(("forward:", "reverse:")):
            later = column[:, 1:]
            assert (column == 0).all() if name.endswith(".native") else (later > 0).all(), name
    same = all(
        np.array_equal(result.kl("increment", c, s, read=r), result.kl("outer", c, s, read=r))
        for r in ("before", "after") for c, s in (("delete", None), ("atom", "coef"))
    )  # fmt: skip
    assert same == (family != "kimi_linear")  # without an erase, the increment is the outer product


@pytest.mark.parametrize("family, gate", [("mamba2", "scalar"), ("kimi_linear", "channel"), ("mamba", "element")])
def test_memory_of_other_rules(family, gate):
    model = other(family)
    [passage] = passages_of(texts(1, 49), Letters(), 50)
    found = memory(model, [passage.tokens])
    with torch.no_grad(), writesae.attach(model, {(1, 0): None}) as tap:
        model(torch.from_numpy(passage.tokens)[None])
    decay = tap.writes[1].decay
    assert tap.writes[1].gate == gate
    if gate == "element":
        decay = decay[:, :, :, None] * tap.writes[1].decay_matrix
    for head in range(decay.shape[2]):
        assert found[1, head] == pytest.approx(-1 / float(decay[0, :, head].double().mean()), rel=1e-5)


def test_a_site_chosen_by_its_outcome_says_so(model):
    sae = dictionary()
    sae.training_record = {"survey": [{"win_rate": 0.9}] * 7}
    found = run(model, sae, n=2, firings=4).summary(50)["settings"]["sites"]
    assert found["1:2"]["chosen_of"] == 7
    assert run(model, n=2, firings=4).summary(50)["settings"]["sites"]["1:2"]["chosen_of"] is None


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


def two_a_batch(model) -> dict:
    """Options with which a batch is of two passages."""
    kept = [c for c in DEFAULT_CONDITIONS if c != "codebook"]
    edits = 1 + len(arms(("increment", "outer"), ("coef", "matched"), kept))
    return dict(firings=30, each=2, memory=2 * 2 * ForkEngine(model, 1, 3, "after").bytes_a_fork(50, edits))


def test_a_killed_run_resumes_to_the_same_rows(model, tmp_path):
    options = two_a_batch(model)
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


def test_an_interrupted_run_keeps_the_batch_in_hand(model, tmp_path, monkeypatch):
    """Ctrl-C in the first batch: it is finished and kept, nothing more is begun, and the same call goes on."""
    made = []

    def batch(*args, **options):
        made.append(args)
        if len(made) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole_batch(*args, **options)

    whole_batch = replace._batch
    options = two_a_batch(model)
    plain = run(model, **options)
    monkeypatch.setattr(replace, "_batch", batch)
    with pytest.raises(KeyboardInterrupt):
        run(model, out=tmp_path, **options)
    (part,) = (tmp_path / "parts").glob("*.parquet")
    before = part.read_bytes(), len(made)
    same(plain.table, run(model, out=tmp_path, **options).table)
    assert part.read_bytes() == before[0] and before[1] == 1 < len(made)


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
    name = "forward:after.increment.coef.random"
    same_or_close(alone.table[name], result.table[name][mine])


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
    result = run_replacement(
        model, tokenizer, sae, passages, firings=8, each=4, horizon=3, read="both", progress=False
    )  # fmt: skip
    summary = result.summary(50)
    assert summary["native_kl_max"] == 0.0
    assert 0 < summary["kl_median"]["delete"] < 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"firings": 0}, "firings: expected at least 1"),
        ({"horizon": 0}, "horizon"),
        ({"conditions": ["atom", "random"]}, "atom and delete"),
        ({"conditions": ["atom", "delete", "mean"]}, '"mean" needs text'),
        ({"conditions": ["atom", "delete", "codebook"]}, '"codebook" needs text'),
        ({"conditions": ["atom", "delete", "atom"]}, "atom twice"),
        ({"conditions": ["atom", "delete", "oracle"]}, "or a name with a function, got 'oracle'"),
        ({"conditions": "atom"}, "a list of names, got the text 'atom'"),
        ({"conditions": {"mine": 3}}, "mine: expected a function, got int"),
        ({"conditions": {"zero": len}}, "a name of your own"),
        ({"conditions": {"A b": len}}, "a name of your own"),
        ({"conditions": {"mine": lambda e: e.left}}, "mine: expected factors"),
        ({"conditions": {"mine": lambda e: (e.left, e.left)}}, "mine: expected factors"),
        ({"conditions": {"mine": lambda e: None}}, "mine: expected factors"),
        ({"conditions": {"mine": lambda e: (e.left / 0, e.right)}}, "mine: expected finite values"),
        ({"read": "during"}, "read: expected some of after, before .or both., each once, got during"),
        ({"read": ["after", "after"]}, "read: expected"),
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
