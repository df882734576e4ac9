"""The audit of edits: what it says of the state, the predictions and the loss is what happens, and a harmful edit is
told from harmless ones."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from test_paper_report import EVIL, allowed

import writesae
from writesae import SAE, Edits, attach, cli, policies
from writesae.experiments import audit_result
from writesae.experiments.audit import audit, changes, elsewhere, gaussian
from writesae.experiments.audit_edits import (
    Clean,
    DeleteHead,
    EraseFeature,
    InstallToken,
    ScaleFeature,
    read_edits,
)
from writesae.models.sites import layers
from writesae.models.tiny import tiny_mamba, tiny_mamba2, tiny_model, tokens
from writesae.report import audit as report

IDS = tokens(6, 40, seed=9)
SMALL = {"horizon": 12, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model()  # layers 0, 1 and 3, four heads, K=8, V=6


@pytest.fixture(scope="module")
def sae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SAE(8, 6, 12, 3, layer=1, head=2)


def some_edits(K, V, seed=0):
    draw = torch.Generator().manual_seed(seed)
    p, q = torch.randn(4, K, generator=draw), torch.randn(4, V, generator=draw)
    return Edits.cat([
        Edits.add(0, 5, 1, p[0], q[0]), Edits.add(0, 5, 1, p[1], q[1]), Edits.add(0, 9, 0, p[2], q[2], when="after"),
        Edits.delete(1, [7, 8], 1, K, V), Edits.delete(2, 6, 0, K, V, when="after"),
        Edits.replace(4, 10, 1, p[3], q[3]),
    ])  # fmt: skip


def run(model, ids, edits=None):
    every = {(site.layer_index, 0): None for site in layers(model)}
    with attach(model, every, edits=edits) as tap, torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return logits, dict(tap.writes)


@pytest.mark.parametrize("make", [tiny_model, tiny_mamba2, tiny_mamba])
def test_the_numbers_are_those_of_the_model_run_by_hand(make):
    model = make()
    site = layers(model)[1]
    edits = some_edits(site.K, site.V)
    if site.num_v_heads == 1:
        edits = edits._with(head=torch.zeros_like(edits.head))
    result = audit(model, None, {site.layer_index: edits}, IDS, batch=4, **SMALL)
    found = result.runs["edit", "edit"]
    assert found["passage"].tolist() == [0, 1, 2, 4] and found["position"].tolist() == [5, 7, 6, 10]
    assert found["places"].tolist() == [2, 2, 1, 1]
    (plain, clean), (logits, edited) = (run(model, IDS, e) for e in (None, {site.layer_index: edits}))
    for i, (row, t) in enumerate(zip(found["passage"], found["position"], strict=True)):
        p, q = (x[row].double().log_softmax(-1) for x in (plain, logits))
        kl = (p.exp() * (p - q)).sum(-1)[t : t + 13]
        np.testing.assert_allclose(found["kl"][i], kl.numpy(), rtol=1e-3, atol=1e-9)
        flips = (p.argmax(-1) != q.argmax(-1))[t : t + 13]
        assert found["flip"][i].tolist() == flips.double().tolist()
        nll = [-x[range(39), IDS[row, 1:]] for x in (p, q)]
        assert found["plain"][i] == pytest.approx(float(nll[0][t + 1 :].mean()), rel=1e-5)
        assert found["change"][i] == pytest.approx(float((nll[1] - nll[0])[t + 1 :].mean()), rel=1e-3, abs=1e-7)
        for j, layer in enumerate(result.layers):
            at = [int(t) + h for h in result.grid]
            before, after = (x[layer].to(torch.float64).states(at)[row] for x in (clean, edited))
            moved = (after - before).flatten(1).norm(dim=1)
            share = moved / before.flatten(1).norm(dim=1)
            np.testing.assert_allclose(found["share"][i, j], share.numpy(), rtol=1e-3, atol=1e-6)
            if layer == site.layer_index:
                np.testing.assert_allclose(found["state"][i], moved.numpy(), rtol=1e-3, atol=1e-6)
    below = result.layers.index(site.layer_index)
    assert not found["share"][:, :below].any() and found["share"][:, below:, 1:].all()


def test_a_change_of_the_state_decays_as_its_gates_say(model):
    """Below float32's rounding of the states themselves, where a difference of them would only be noise."""
    edit = Edits.add(range(6), 3, 1, torch.ones(8), torch.ones(6), when="after")
    result = audit(model, None, {1: edit}, IDS, horizon=32, progress=False)
    _, clean = run(model, IDS)
    p = clean[1].propagate(edit._with(when=torch.zeros_like(edit.when)))
    expected = p[:, result.grid].norm(dim=-1) * 6**0.5
    np.testing.assert_allclose(result.runs["edit", "edit"]["state"], expected.numpy(), rtol=1e-3)


def test_batches_and_seeds(model):
    one = {"a": DeleteHead(1, 2), "b": InstallToken(5, 3, 0)}
    runs = [audit(model, None, one, IDS, batch=batch, **SMALL).runs for batch in (1, 4)]
    for name in one:
        for column, values in runs[0][name, "edit"].items():
            np.testing.assert_allclose(values, runs[1][name, "edit"][column], rtol=1e-3, atol=1e-6, err_msg=column)
    again = audit(model, None, one, IDS, batch=4, **SMALL).runs
    for key, run_ in again.items():
        assert all(np.array_equal(run_[x], runs[1][key][x], equal_nan=True) for x in run_)
    other = audit(model, None, one, IDS, batch=4, seed=1, **SMALL).runs
    assert (other["a", "edit"]["position"] != again["a", "edit"]["position"]).any()


# ---- what stands beside an edit -------------------------------------------------------------------------------------


def dense(edits, place):
    at = (edits.row == place[0]) & (edits.position == place[1]) & (edits.head == place[2])
    return edits.left[at].double().mT @ edits.right[at].double()


def test_controls_have_the_places_norms_and_ranks_of_what_was_changed(model):
    _, clean = run(model, IDS)
    edits = some_edits(8, 6)
    _, edited = run(model, IDS, {1: edits})
    made = changes(clean[1], edited[1], edits)
    places = {(0, 5, 1), (0, 9, 0), (1, 7, 1), (1, 8, 1), (2, 6, 0), (4, 10, 1)}
    assert {tuple(x) for x in torch.stack([made.row, made.position, made.head], 1).tolist()} == places
    left, right = clean[1].native(1, 7, 1)
    torch.testing.assert_close(dense(made, (1, 7, 1)).float(), -torch.outer(left, right))
    left, right = clean[1].native(2, 6, 0)
    torch.testing.assert_close(dense(made, (2, 6, 0)).float(), -torch.outer(left, right))
    draw = torch.Generator().manual_seed(0)
    for control in (gaussian, elsewhere):
        instead = control(made, clean[1], draw)
        for column in ("row", "position", "head", "kind", "when"):
            assert torch.equal(getattr(instead, column), getattr(made, column))
        for place in places:
            a, b = dense(made, place), dense(instead, place)
            assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-4)
            assert torch.linalg.matrix_rank(a, tol=1e-5) == torch.linalg.matrix_rank(b, tol=1e-5)
            assert float((a * b).sum()) < 0.99 * float(a.norm() * b.norm())
    # Other tokens' writes, each along a write of the head somewhere.
    every = torch.stack([torch.outer(*clean[1].native(row, t, 1)).flatten() for row in range(6) for t in range(40)])
    unit = torch.nn.functional.normalize(every, dim=1)
    cosine = unit @ torch.nn.functional.normalize(dense(instead, (1, 7, 1)).float().flatten(), dim=0)
    assert float(cosine.abs().max()) > 0.9999 and float(cosine[torch.argmax(cosine.abs())]) < 0  # taken away, too


def test_a_policy_is_audited_by_what_it_did(model, sae):
    saes = {(1, 2): sae}
    feature = busiest(model, sae)
    result = audit(
        model, None, {"planned": EraseFeature(feature, 1, 2, every=True)}, IDS, saes=saes,
        policies={"policy": policies.Erase([feature])}, **SMALL,
    )  # fmt: skip
    planned, acted = result.runs["planned", "edit"], result.runs["policy", "edit"]
    at = {int(p): i for i, p in enumerate(acted["passage"])}
    pairs = [(i, at[int(p)]) for i, p in enumerate(planned["passage"]) if acted["position"][at[int(p)]] > 0]
    mine, theirs = map(list, zip(*pairs, strict=True))
    assert len(pairs) >= 3 and planned["position"][mine].tolist() == acted["position"][theirs].tolist()
    # The same up to what the next token reads; from there on a policy answers to what it has changed.
    for column, upto in (("kl", 2), ("flip", 2), ("state", 1)):
        np.testing.assert_allclose(planned[column][mine, :upto], acted[column][theirs, :upto], rtol=1e-3, atol=1e-9)
    assert "polic" in result.says["policy"] and result.runs["policy", "random"]["places"].sum() == acted["places"].sum()


def busiest(model, sae):
    with attach(model, {(1, 2): sae}) as tap, torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    fired = tap.firings
    return int(torch.bincount(fired.feature.long()).argmax())


# ---- edits ----------------------------------------------------------------------------------------------------------


def test_an_edit_of_a_feature_is_made_where_it_fires(model, sae):
    feature = busiest(model, sae)
    with attach(model, {(1, 2): sae}) as tap, torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    fired = tap.firings[tap.firings.feature == feature]
    at = {(int(r), int(p)): float(a) for r, p, a in zip(fired.row, fired.position, fired.activation, strict=True)}
    clean = Clean(model, 0, IDS, dict(tap.writes), tap.firings, {(1, 2): sae}, 25, 0)
    once = EraseFeature(feature, 1, 2).edits(clean)[1]
    assert len(once) == len({r for r, p in at if 0 < p <= 25}) == len(set(once.row.tolist()))
    assert all((r, p) in at and p <= 25 for r, p in zip(once.row.tolist(), once.position.tolist(), strict=True))
    every = ScaleFeature(feature, 1, 2, factor=3.0, every=True).edits(clean)[1]
    rows = {r for r, p in at if 0 < p <= 25}
    assert sorted(zip(every.row.tolist(), every.position.tolist(), strict=True)) == sorted(
        (r, p) for r, p in at if r in rows and p > 0
    )
    v, w = (x.detach()[feature, 0] for x in sae.atoms())
    for i in range(len(every)):
        expected = 2 * at[int(every.row[i]), int(every.position[i])] * torch.outer(v, w)
        torch.testing.assert_close(torch.outer(every.left[i], every.right[i]), expected)


def test_an_installed_token_is_written_three_times_in_a_row(model):
    _, writes = run(model, IDS)
    clean = Clean(model, 0, IDS, writes, None, {}, 25, 0)
    edits = InstallToken(11, 3, 2, 4.0).edits(clean)[3]
    for row in range(6):
        mine = edits[edits.row == row]
        assert mine.position.diff().tolist() == [1, 1] and int(mine.position[0]) <= 25
        left, right = writes[3].native(row, int(mine.position[0]), 2)
        expected = 4 * left.norm() * right.norm()
        assert float(mine.left[0].norm() * mine.right[0].norm()) == pytest.approx(float(expected), rel=1e-4)
    out = model.model.layers[3].linear_attn.out_proj.weight[:, 12:18]
    toward = torch.nn.functional.normalize(model.lm_head.weight[11] @ out, dim=0)
    torch.testing.assert_close(mine.right[0], toward)


SIZES = {0: (8, 6), 1: (8, 6), 3: (8, 6)}


def written(path, *edits, **more):
    path.write_text(json.dumps({"edits": list(edits), **more}))
    return path


def test_edits_of_a_file_are_those(tmp_path, sae):
    file = written(
        tmp_path / "mine.json",
        {"position": 4, "layer": 1, "head": 2, "feature": 3, "scale": -2.0},
        {"row": 2, "position": 5, "layer": 1, "head": 0, "kind": "delete", "when": "before"},
        {"row": 1, "position": 6, "layer": 3, "head": 1, "kind": "replace", "left": [1.0] * 8, "right": [0.5] * 6},
    )
    given = read_edits(file, SIZES, {(1, 2): sae})
    one, other = given.by_layer[1], given.by_layer[3]
    assert (one.row.tolist(), one.position.tolist(), one.kind.tolist(), one.when.tolist()) == (
        [-1, 2], [4, 5], [0, 1], [1, 0],
    )  # fmt: skip
    v, w = (x.detach()[3, 0] for x in sae.atoms())
    torch.testing.assert_close(torch.outer(one.left[0], one.right[0]), -2 * torch.outer(v, w))
    assert (other.kind.tolist(), other.left.tolist()) == ([2], [[1.0] * 8]) and "mine.json" in given.says


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"layer": 1, "head": 2}, "position: expected an integer >= 0, got None"),
        ({"position": 4, "layer": 2, "head": 2}, "layer: expected one of .0, 1, 3., got 2"),
        ({"position": 4, "layer": 1, "head": 0, "feature": 1}, "feature: expected a dictionary of 1:0, got none"),
        ({"position": 4, "layer": 1, "head": 2, "feature": 12}, "feature: expected 0 <= feature < 12, got 12"),
        ({"position": 4, "layer": 1, "head": 2, "feature": 1, "scale": "x"}, "scale: expected a finite number"),
        ({"position": 4, "layer": 1, "head": 2, "left": [1], "right": [1] * 6}, "left: expected 8 finite numbers"),
        ({"position": 4, "layer": 1, "head": 2, "kind": "drop"}, "kind: expected one of add, delete, replace"),
        ({"position": 4, "layer": 1, "head": 2, "when": "now"}, "when: expected one of before, after"),
        ({"position": 4, "layer": 1, "head": 2, "row": -2}, "row: expected the number of a passage"),
        ({"position": 4, "layer": 1, "head": 2, "colour": 1}, "expected entries position.* got 'colour'"),
        ([], "expected an object"),
    ],
)
def test_a_file_of_other_things_is_refused_by_name(tmp_path, sae, entry, message):
    with pytest.raises(ValueError, match=rf"edit: .*edits\[1\]: {message}"):
        read_edits(written(tmp_path / "x.json", {"position": 1, "layer": 1, "head": 2, "kind": "delete"}, entry), SIZES,
                   {(1, 2): sae})  # fmt: skip
    with pytest.raises(ValueError, match="with one at least, got a list of 0"):
        read_edits(written(tmp_path / "y.json"), SIZES, {})


def test_bad_arguments(model, sae):
    for match, call in (
        ("expected at least one, or policies, got none", lambda: audit(model, None, {}, IDS)),
        ("edits: x: expected .layer: Edits., an edit such", lambda: audit(model, None, {"x": 3}, IDS)),
        ("saes: x takes the dictionary of 1:2", lambda: audit(model, None, {"x": EraseFeature(1, 1, 2)}, IDS, **SMALL)),
        ("horizon: expected at least 1", lambda: audit(model, None, DeleteHead(1, 2), IDS, horizon=0)),
        ("context: expected more than horizon", lambda: audit(model, None, DeleteHead(1, 2), IDS)),
        ("text: expected int .P, T.", lambda: audit(model, None, DeleteHead(1, 2), IDS.float())),
        ("layer: expected one of .0, 1, 3., got 2", lambda: audit(model, None, DeleteHead(2, 2), IDS, **SMALL)),
        ("head: expected 0 <= head < 4", lambda: audit(model, None, DeleteHead(1, 4), IDS, **SMALL)),
        ("token: expected 0 <= token < 97", lambda: audit(model, None, InstallToken(97, 1, 2), IDS, **SMALL)),
        ("feature: expected 0 <= feature < 12", lambda: audit(
            model, None, EraseFeature(12, 1, 2), IDS, saes={(1, 2): sae}, **SMALL)),
        ("expected text to follow in passages of 40 tokens, got 39", lambda: audit(
            model, None, {1: Edits.delete(0, 39, 1, 8, 6)}, IDS, **SMALL)),
        ("edits: edit: expected to be made in two passages at least, got 1 of 6", lambda: audit(
            model, None, {1: Edits.delete(0, 9, 1, 8, 6)}, IDS, **SMALL)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()


# ---- verdicts -------------------------------------------------------------------------------------------------------


def test_the_rules():
    assert [audit_result.cost_of(*x) for x in ((0.011, 0.02), (-1, 0.009), (0.009, 0.011))] == [
        "harmful", "harmless", "cannot be told",
    ]  # fmt: skip
    assert [audit_result.beside_of(*x) for x in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == ["more", "less", "no more"]
    assert [audit_result.reach_of(*x) for x in ((-0.2, -0.1), (0.1, 0.2), (-0.1, 0.1))] == [
        "local", "lingering", "cannot be told",
    ]  # fmt: skip


def made_up(change=0.0, random=0.0, kl=None, n=40, spread=0.002, horizon=16):
    """A result whose edit costs `change` nats and whose KL is `kl [horizon + 1]`."""
    draw = np.random.default_rng(0)
    kl = np.exp(-np.arange(horizon + 1.0)) if kl is None else np.asarray(kl, float)
    grid = [0, 1, 2, 4, 8, 16]

    def arm(cost):
        noise = draw.standard_normal(n) * spread
        return {
            "passage": np.arange(n), "position": np.full(n, 5), "places": np.ones(n, np.int64),
            "plain": np.full(n, 2.0), "change": cost + noise, "kl": kl * draw.uniform(0.5, 1.5, (n, 1)),
            "flip": np.zeros((n, horizon + 1)), "state": np.exp(-0.5 * np.array(grid)) * np.ones((n, 1)),
            "share": np.full((n, 2, len(grid)), 0.1),
        }  # fmt: skip

    runs = {("x", "edit"): arm(change), ("x", "random"): arm(random), ("x", "other"): arm(0.0)}
    return audit_result.AuditResult(runs, {"x": "something done"}, [0, 3], grid, horizon, n, 64, 0)


def test_planted_costs_and_reaches_are_told():
    def told(**more):
        found = made_up(**more).summary(500)["edits"][0]
        return found["cost"], found["against"]["random"]["is"], found["reach"], found["verdict"]

    cost, beside, reach, words = told(change=0.2, random=0.01)
    assert (cost, beside, reach) == ("harmful", "more", "local")
    assert words.startswith("Harmful: it changes the perplexity of the rest by +22 %") and "more than random" in words
    assert told()[:3] == ("harmless", "no more", "local")
    assert told(change=0.2, random=0.5)[1] == "less"
    assert told(change=0.01, spread=0.2)[0] == "cannot be told"
    assert told(kl=np.ones(17))[2] == "lingering"
    assert told(change=0.2, n=9)[:3] == ("cannot be told",) * 3 and "Too few passages" in told(n=9)[3]
    found = made_up(kl=[0, 1, 0.5, 0.2, 0.09, *[0.01] * 12]).summary(200)["edits"][0]
    assert (found["peak"]["at"], found["faded_at"]) == (1, 4)
    nothing = made_up(kl=np.zeros(17), spread=0).summary(200)["edits"][0]
    assert nothing["does"] == "nothing" and nothing["verdict"] == "Does nothing: no prediction changes."


def test_an_edit_that_adds_nothing_does_nothing(model):
    result = audit(model, None, {1: Edits.add(-1, 5, 1, torch.zeros(8), torch.ones(6))}, IDS, **SMALL)
    assert result.lines() == "edit: Does nothing: no prediction changes."


def test_of_three_edits_the_harmful_one_is_told(tmp_path, capsys):
    """A head that does nothing, a feature, and a head on which the model relies."""
    command = (
        "audit --delete 0:1 --delete 5:3 --install 300@6:0=0.01 --every --when before --passages 12 --context 96 "
        "--horizon 32 --batch 6"
    )
    assert cli.main([*command.split(), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] + ":" + line.split(": ")[1] for line in lines[:3]] == [
        "delete 0:Harmless", "delete 5:Harmful", "install 300@6:Harmless",
    ]  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    harmful = next(x for x in summary["edits"] if x["cost"] == "harmful")
    assert harmful["name"] == "delete 5:3" and harmful["against"]["random"]["is"] == "more"
    assert summary["command"] == "writesae " + command
    text = allowed((tmp_path / "report.html").read_text())
    assert "Harmful: delete 5:3 (1 of 3)" in text and harmful["verdict"] in text
    rows = (tmp_path / "audit.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 3 * 12
    before = (tmp_path / "report.html").read_bytes()
    assert cli.main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "edit: expected at least one of --edit, --delete"),
        (["--delete", "5"], "delete: expected LAYER:HEAD, got '5'"),
        (["--erase", "5:3"], "erase: expected FEATURE@LAYER:HEAD"),
        (["--scale", "7@5:3"], "scale: expected FEATURE@LAYER:HEAD=FACTOR"),
        (["--scale", "7@5:3=-e"], "scale: expected a finite number behind ="),
        (["--install", " the and@5:3"], "install: expected the text of one token"),
        (["--erase", "7@2:0"], "saes: erase 7@2:0 takes the dictionary of 2:0, got none"),
        (["--edit", "nothing.json"], "nothing.json"),
    ],
)
def test_bad_words_are_refused_by_name(words, message, tmp_path, capsys):
    assert cli.main(["audit", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# ---- page -----------------------------------------------------------------------------------------------------------


def saved(folder, **more):
    made_up(change=0.2, **more).save(
        folder, model="a <tiny> model", corpus="text", command="writesae audit", seconds=3.0
    )
    return folder


def test_the_page_holds_the_numbers_and_fetches_nothing(tmp_path):
    page = report.build(saved(tmp_path), tmp_path).read_text()
    text = allowed(page)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//|<script|url\(", rest) and rest.count("<img") == 5
    for words in ("Harmful: x (1 of 1)", "a <tiny> model", "40 passages of 64 tokens", "+22 %", "local",
                  "above 0.01 nats a token", "fewer than 10 passages", "Something done: 40 places"):  # fmt: skip
        assert words in text.replace("\u202f", " "), words


def test_hostile_words_run_nothing(tmp_path):
    summary = json.loads((saved(tmp_path) / "summary.json").read_text())
    summary.update(model=EVIL, corpus=EVIL, command=EVIL, versions={EVIL: EVIL})
    summary["edits"][0].update(name=EVIL + "$\\frac{1}{0}$", says=EVIL, verdict=EVIL)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert "<script>alert(1)</script>" in allowed(report.build(tmp_path, tmp_path).read_text())


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s.update(horizon="x"), "summary.json.horizon: expected an integer >= 1"),
        (lambda s: s["edits"][0].update(cost="fine"), r"edits\[0\].cost: expected one of harmful"),
        (lambda s: s["edits"][0].pop("reach"), r"edits\[0\]: expected an entry reach"),
        (lambda s: s["edits"][0]["arms"]["edit"]["kl"]["mean"].pop(), "kl.mean: expected a list of 17"),
        (lambda s: s["edits"][0]["arms"]["random"]["share"].pop(), "share: expected a list of 2"),
        (lambda s: s["edits"][0]["arms"].pop("other"), "expected an entry other"),
        (lambda s: s.update(edits=[]), "expected an edit, a layer and a horizon"),
        (lambda s: s["edits"][0].update(name=7), "name: expected text"),
    ],
)
def test_a_strangers_summary_is_checked(change, match, tmp_path):
    summary = json.loads((saved(tmp_path) / "summary.json").read_text())
    change(summary)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=match):
        report.build(tmp_path, tmp_path)


def test_an_edit_that_does_nothing_has_a_page(tmp_path):
    result = dataclasses.replace(made_up(kl=np.zeros(17), spread=0), says={"x": "nothing at all"})
    result.save(tmp_path)
    text = allowed(report.build(tmp_path, tmp_path).read_text())
    assert "does nothing" in text and "None of these edits is harmful" in text


def test_it_is_public():
    assert writesae.audit is audit and "audit" in writesae.__all__
