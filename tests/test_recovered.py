"""Loss recovered, closed loop: exact where nothing is changed, deletion that of edits, and its figures by hand."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from tiny_models import families, tiny_model, tokens

from writesae import Edits, attach, cli
from writesae.experiments import recovered, run_recovered
from writesae.experiments.recovered import passage_losses
from writesae.experiments.recovered_result import RecoveredResult, flat, printed
from writesae.experiments.recovered_rule import closed_loop, coded, deleted, loop_rule, plain_rule, read_through
from writesae.models.hf_gated_delta import intercept, layers
from writesae.ops import gated_delta_rule
from writesae.report import recovered as report
from writesae.sae import SAE
from writesae.sae.stream import Passages
from writesae.testing import gated_delta_rule_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = dict(atol=1e-4, rtol=1e-4)  # of logits of a model of random weights, which enlarges rounding errors


def identical(left, right):
    """Every write by itself."""
    return left[:, None], right[:, None]


def halved(left, right):
    """Two terms that make half of the write."""
    return torch.stack([left, left], 1), torch.stack([right, -0.5 * right], 1)


def dictionary(layer=1, head=2, F=12, k=2, kind="bilinear", seed=0, target="write", **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = SAE(8, 6, F, k, kind, layer=layer, head=head, target=target, **options)
        if target == "state":
            sae.mean.normal_()
            sae.bias.data.normal_()
            sae.b_enc.data.normal_()
        return sae


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def logits(model, ids, rules):
    every = {site.layer_index: plain_rule for site in layers(model)}
    with torch.no_grad(), intercept(model, every | rules, private=True):
        return model(input_ids=ids, use_cache=False).logits


# ---- the recurrence -----------------------------------------------------------------------------------------------


def by_hand(x, head, group, coder, read, initial=None):
    """One head in float64, a token and a row at a time."""
    q, k, v, g, beta = (x[name].double() for name in ("q", "k", "v", "g", "beta"))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    o = torch.zeros_like(v[:, :, head])
    for b in range(len(v)):
        S = torch.zeros(k.shape[-1], v.shape[-1]).double() if initial is None else initial[b, head].double()
        for t in range(v.shape[1]):
            key, query = k[b, t, head // group], q[b, t, head // group] * k.shape[-1] ** -0.5
            S = g[b, t, head].exp() * S
            u = beta[b, t, head] * (v[b, t, head] - S.T @ key)
            p, r = coder(key[None], u[None])
            after = S + torch.outer(key, u)
            S = S + p[0].T @ r[0]
            o[b, t] = (after if read == "after" else S).T @ query
    return o, S


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("coder", [identical, deleted, halved], ids=lambda f: f.__name__)
def test_one_head_equals_a_plain_loop(coder, read):
    x = gated_delta_rule_inputs(2, 9, 2, 4, 7, 5, torch.float32, decay="weak", correlated=True)
    initial = torch.randn(2, 4, 7, 5)
    o, state = closed_loop(**x, coders={3: coder, 1: coder}, read=read, initial_state=initial, use_qk_l2norm=True)
    for i, head in enumerate((3, 1)):
        expected, last = by_hand(x, head, 2, coder, read, initial)
        torch.testing.assert_close(o[:, :, i].double(), expected, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(state[-1, i].double(), last, atol=2e-6, rtol=2e-5)


def test_a_dictionary_in_the_loop_equals_a_plain_loop():
    x = gated_delta_rule_inputs(1, 7, 1, 2, 8, 6, torch.float32, decay="weak", correlated=True)
    sae = dictionary(F=30, k=3)
    o, _ = closed_loop(**x, coders={1: coded(sae, 2)}, use_qk_l2norm=True)

    def code(left, right):
        codes = sae.encode_writes(left.float()[:, None], right.float()[:, None], k=2)
        assert codes.indices.shape[-1] == 2
        whole = torch.einsum("j,jrk,jrv->kv", codes.values[0], sae.v_dec[codes.indices[0]], sae.w_dec[codes.indices[0]])
        return torch.eye(8)[None].double(), whole[None].double().detach()

    torch.testing.assert_close(o[:, :, 0].double(), by_hand(x, 1, 2, code, "after")[0], atol=2e-6, rtol=2e-5)


def test_the_changed_state_is_what_later_writes_answer():
    """Closed loop: with nothing in the state, nothing is erased, and every write is beta v."""
    x = gated_delta_rule_inputs(1, 8, 1, 1, 8, 6, torch.float32, decay="weak", correlated=True)
    seen = []

    def watching(left, right):
        seen.append(right)
        return deleted(left, right)

    closed_loop(**x, coders={0: watching})
    torch.testing.assert_close(torch.stack(seen, 1), (x["beta"][..., None] * x["v"])[:, :, 0])


FAMILIES = ["qwen3_5", "qwen3_next", "olmo_hybrid"]


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("family", FAMILIES)
def test_writes_coded_as_themselves_leave_the_model_as_it_is(family, read):
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    model, ids = tiny_model(family), tokens(3, 40)
    rules = {layer: loop_rule(dict.fromkeys(range(4), identical), read) for layer in (0, 1, 3)}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits(model, ids, rules), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:gated_delta_rule. running the slow")
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.bfloat16, 0.2)])
def test_other_precisions(dtype, most):
    model, ids = tiny_model(dtype=dtype), tokens(2, 20)
    same = logits(model, ids, {1: loop_rule({0: identical, 3: identical}, "after")})
    assert (same - logits(model, ids, {})).abs().max() <= most
    losses = passage_losses(model, Passages(ids), {1: loop_rule({0: coded(dictionary(), 1)}, "after")}, batch=1)
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("layer, heads", [(1, [2]), (0, [1, 3])])
def test_deletion_is_that_of_edits(model, layer, heads, read):
    ids = tokens(2, 30)
    places = [(row, at, head) for row in range(2) for at in range(30) for head in heads]
    edits = Edits.delete(*(list(x) for x in zip(*places, strict=True)), 8, 6, when=read)
    with torch.no_grad(), attach(model, {(layer, 0): None}, edits={layer: edits}):
        expected = model(input_ids=ids).logits
    found = logits(model, ids, {layer: loop_rule(dict.fromkeys(heads, deleted), read)})
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - logits(model, ids, {})).abs().max() > 1e-2


def test_codes_of_another_shape_are_refused():
    x = gated_delta_rule_inputs(1, 3, 1, 1, 8, 6, torch.float32)
    with pytest.raises(ValueError, match=r"codes of head 0: expected \[1, m, K=8\] and \[1, m, V=6\]"):
        closed_loop(**x, coders={0: lambda left, right: (right[:, None], left[:, None])})
    with pytest.raises(ValueError, match="read: expected after or before, got 'both'"):
        closed_loop(**x, coders={}, read="both")


# ---- dictionaries of states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat"])
@pytest.mark.parametrize("k", [None, 4])
def test_reads_through_the_reconstruction(kind, k):
    x = gated_delta_rule_inputs(2, 19, 2, 4, 8, 6, torch.float32, decay="weak", correlated=True)
    writes = gated_delta_rule(**x, use_qk_l2norm=True, return_writes=True).writes
    sae = dictionary(kind=kind, target="state", r=1 if kind == "flat" else 2)
    q = torch.randn(2, 19, 8)
    found = read_through(writes, q, sae, 3, k)
    whole = writes.states(range(19))[:, :, 3]
    sae.k = k or sae.k
    torch.testing.assert_close(found, torch.einsum("btkv,btk->btv", sae(whole), q).detach(), atol=1e-4, rtol=1e-4)


def test_reads_through_a_threshold_dictionary():
    x = gated_delta_rule_inputs(2, 19, 2, 4, 8, 6, torch.float32, decay="weak", correlated=True)
    writes = gated_delta_rule(**x, use_qk_l2norm=True, return_writes=True).writes
    sae = dictionary(target="state", sparsity="threshold")
    sae.threshold.fill_(0.3)
    q = torch.randn(2, 19, 8)
    whole = writes.states(range(19))[:, :, 1]
    expected = torch.einsum("btkv,btk->btv", sae(whole), q).detach()
    torch.testing.assert_close(read_through(writes, q, sae, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_run_with_dictionaries_of_states(model):
    saes = {(1, 2): dictionary(target="state"), (0, 0): dictionary(0, 0, target="state", kind="flat", seed=1)}
    result = run_recovered(model, saes, tokens(5, 24), ks=None, progress=False)
    assert result.target == "state" and result.reads == (None,) and list(result.groups) == ["0:0", "1:2", "all"]
    summary = result.summary(100)
    assert [(arm["condition"], arm["k"]) for arm in summary["groups"][0]["arms"]] == [("reconstruction", None)]
    # Deletion is to read nothing.
    nothing = passage_losses(model, Passages(tokens(5, 24)), {1: loop_rule({2: deleted}, "before")})
    np.testing.assert_allclose(result.losses("1:2", "deleted"), nothing / 23, rtol=1e-6)


# ---- a run --------------------------------------------------------------------------------------------------------


def small(model, saes=None, **options):
    if saes is None:
        saes = {(1, 2): dictionary(), (1, 0): dictionary(1, 0, seed=1), (3, 1): dictionary(3, 1, F=9, seed=2)}
    options = {"codebook": tokens(4, 20, seed=9), "ks": (1, 3), "progress": False, "batch": 4, **options}
    return run_recovered(model, saes, tokens(6, 24), **options)


def test_a_run(model):
    result = small(model, by=("head", "layer", "all"), conditions={"half": halved, "same": identical})
    assert list(result.groups) == ["1:0", "1:2", "3:1", "layer 1", "layer 3", "all"]
    names = [("deleted", 0), ("coded", 1), ("codebook", 1), ("coded", 3), ("codebook", 3), ("half", 0), ("same", 0)]
    rows = list(zip(result.table["group"], result.table["condition"], result.table["k"], strict=True))[::6]
    assert rows == [("", "plain", 0), *((group, *name) for group in result.groups for name in names)]
    with torch.no_grad():
        made = model(input_ids=tokens(6, 24)).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(made, tokens(6, 24)[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(result.losses("", "plain"), expected, rtol=1e-5)
    for group in result.groups:
        np.testing.assert_allclose(result.losses(group, "same"), expected, rtol=1e-5)
        assert np.abs(result.losses(group, "half") - result.losses(group, "deleted")).max() > 1e-4
    np.testing.assert_array_equal(result.losses("3:1", "coded", 3), result.losses("layer 3", "coded", 3))
    assert np.abs(result.losses("3:1", "coded", 3) - result.losses("3:1", "codebook", 3)).max() > 1e-4
    summary = json.loads(json.dumps(result.summary(50), allow_nan=False))
    assert summary["plain"] == pytest.approx(float(expected.mean()), rel=1e-5) and summary["tokens"] == 6 * 23
    assert [group["heads"] for group in summary["groups"]] == [1, 1, 1, 2, 1, 3]


def test_a_dictionary_with_thresholds_stands_beside_a_codebook_of_its_k(model):
    sae = dictionary(sparsity="threshold", k=2)
    sae.threshold.fill_(0.05)
    result = small(model, saes={(1, 2): sae}, ks=None)
    book = small(model, saes={(1, 2): dictionary(sparsity="topk", k=2)}, ks=(2,))
    np.testing.assert_array_equal(result.losses("1:2", "codebook"), book.losses("1:2", "codebook", 2))
    assert np.abs(result.losses("1:2", "coded") - book.losses("1:2", "coded", 2)).max() > 1e-4


@pytest.mark.parametrize("sparsity", ["topk", "pursuit"])
def test_codes_are_those_of_the_dictionary(sparsity):
    """More atoms by pursuit leave less of a write, and a write of atoms alone is coded as itself."""
    sae = dictionary(F=40, k=3, sparsity=sparsity, kind="bilinear_tied")
    left, right = torch.randn(5, 8), torch.randn(5, 6)
    errors = []
    for k in (1, 3, 8):
        p, q = coded(sae, k)(left, right)
        assert p.shape == (5, k, 8) and q.shape == (5, k, 6)
        errors.append(((p.transpose(1, 2) @ q) - left[:, :, None] * right[:, None]).square().sum())
    assert sparsity == "topk" or errors[0] > errors[1] > errors[2]
    v, w = (x.detach()[:4, 0] for x in sae.atoms())
    p, q = coded(sae, 1)(3 * v, w)
    torch.testing.assert_close(p.transpose(1, 2) @ q, 3 * v[:, :, None] * w[:, None])
    p, _ = coded(sae.half(), 1)(1e-9 * v, w)  # smaller than a half can be
    torch.testing.assert_close(p.norm(dim=-1), torch.full((4, 1), 1e-9), rtol=5e-3, atol=0)


def test_read_before_is_not_read_after(model):
    before, after = (small(model, by="all", read=read, codebook=None) for read in ("before", "after"))
    both = small(model, by="all", read="both", codebook=None)
    assert (before.reads, after.reads, both.reads) == (("before",), ("after",), ("before", "after"))
    assert [group["read"] for group in both.summary(10)["groups"]] == ["before", "after"]
    for name in ("deleted", "coded"):
        k = 3 if name == "coded" else None
        np.testing.assert_array_equal(both.losses("all", name, k, "after"), after.losses("all", name, k))
        np.testing.assert_array_equal(both.losses("all", name, k), before.losses("all", name, k))
    np.testing.assert_array_equal(before.losses("", "plain"), after.losses("", "plain"))
    assert np.abs(before.losses("all", "deleted") - after.losses("all", "deleted")).max() > 1e-4


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch):
    whole = small(model)
    calls = []

    def dies(*args, **options):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return passage_losses(*args, **options)

    monkeypatch.setattr(recovered, "passage_losses", dies)
    with pytest.raises(KeyboardInterrupt):
        small(model, out=tmp_path)
    resumed = small(model, out=tmp_path)
    assert len(calls) == 6 + (1 + 4 * 5) - 5
    for name, column in whole.table.items():
        assert column.tolist() == resumed.table[name].tolist(), name
    again = small(model, out=tmp_path, by="head")  # a part of it: nothing is run again
    assert len(calls) == 6 + (1 + 4 * 5) - 5 and list(again.groups) == ["1:0", "1:2", "3:1"]
    small(model, out=tmp_path, by="all", ks=(1,), read="both")  # more of it: only what is new is run
    assert len(calls) == 6 + (1 + 4 * 5) - 5 + 3
    with pytest.raises(ValueError, match="holds a run with other settings .*batch"):
        small(model, out=tmp_path, batch=3)


def test_an_interrupted_run_keeps_the_pass_in_hand(model, tmp_path, monkeypatch):
    calls = []

    def interrupts(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return passage_losses(*args, **options)

    monkeypatch.setattr(recovered, "passage_losses", interrupts)
    with pytest.raises(KeyboardInterrupt):
        small(model, out=tmp_path)
    assert len(calls) == 2 == len(list((tmp_path / "parts").glob("*.parquet")))
    small(model, out=tmp_path)
    assert len(calls) == 1 + 4 * 5


def test_bad_input(model, monkeypatch):
    ids = tokens(2, 12)

    def refused(match, saes=None, passages=ids, **options):
        with pytest.raises(ValueError, match=match):
            run_recovered(model, dictionary() if saes is None else saes, passages, progress=False, **options)

    monkeypatch.setattr(model.config, "_name_or_path", "some/model")
    refused("was made for the model 'other/one', got the model 'some/model'", dictionary(model="other/one"))
    refused("full-attention", dictionary(2, 0))
    refused("head: expected 0 <= head < 4", dictionary(1, 4))
    refused("head: expected 0 <= head < 4", dictionary(1, 4, target="state"))
    refused("K=8, V=6.*got K=6, V=8", {(1, 0): SAE(6, 8, 5, 2, target="write")})
    refused("K=8, V=6.*got K=6, V=8", {(1, 0): SAE(6, 8, 5, 2)})
    refused("got both; run them apart", {(1, 0): dictionary(1, 0), (1, 1): dictionary(1, 1, target="state")})
    refused("at least one dictionary", {})
    refused("ks: expected integers >= 1", ks=(0,))
    refused("ks: expected integers >= 1", ks=(2, 2))
    refused("ks: expected integers >= 1", ks=())
    refused("ks: expected k <= F=12", ks=(13,))
    refused("ks: expected None", dictionary(target="state", sparsity="threshold"))
    refused("by: expected some of head, layer, all", by=("head", "site"))
    refused("by: expected some of head, layer, all", by=())
    refused(r"read: expected some of before, after \(or both\), each once, got now", read="now")
    refused("batch: expected at least 1", batch=0)
    refused("passages: expected Passages or int", passages=[1, 2])
    refused("passages: expected at least 2 tokens", passages=ids[:, :1])
    refused("tokens: expected ids from 0 to 96", passages=ids + 90)
    refused("train: expected at least 12 tokens", codebook=ids[:1, :5])
    refused("codebook: expected None for dictionaries of states", dictionary(target="state"), codebook=ids)
    refused("conditions: expected {name: function}", conditions={"coded": identical})
    refused("conditions: expected {name: function}", conditions={"../x": identical})
    refused("conditions: expected None", dictionary(target="state"), conditions={"same": identical})
    try:
        model.train()
        refused("evaluation mode")
    finally:
        model.eval()


# ---- figures by hand ----------------------------------------------------------------------------------------------


def made_up(deleted=(2.5, 3.5, 3.0, 3.4), coded=(2.1, 3.1, 2.2, 3.1), codebook=(2.2, 3.2, 2.3, 3.2)):
    """Two groups of four passages of 11 tokens; in the second, deletion costs a thousandth of a nat."""
    plain = np.array([2.0, 3.0, 2.0, 3.0])
    columns = [("", "plain", 0, plain)]
    for group, scale in (("5:3", 1), ("0:1", 1e-3)):
        for name, k, x in (("deleted", 0, deleted), ("coded", 1, coded), ("codebook", 1, codebook)):
            columns.append((group, name, k, plain + scale * (np.array(x) - plain)))
    names = np.empty((2, len(columns) * 4), object)
    names[0], names[1] = ([x[i] for x in columns for _ in range(4)] for i in range(2))
    table = {
        "read": np.where(names[0] == "", "", "after").astype(object), "group": names[0], "condition": names[1],
        "k": np.repeat([x[2] for x in columns], 4),
        "passage": np.tile(np.arange(4), len(columns)), "loss": 10 * np.concatenate([x[3] for x in columns]),
        "tokens": np.full(4 * len(columns), 10),
    }  # fmt: skip
    order = np.random.default_rng(0).permutation(len(names[0]))  # whatever order it comes in
    site = {"kind": "bilinear", "F": 64, "k": 8, "K": 32, "V": 64, "target": "write"}
    return RecoveredResult(
        {name: column[order] for name, column in table.items()}, {"5:3": [(5, 3)], "0:1": [(0, 1)]},
        ("plain", "deleted", "coded", "codebook"), (1,), "write", ("after",), 11, 0, 1.0, {(5, 3): site, (0, 1): site},
    )  # fmt: skip


def test_shares_by_hand():
    summary = made_up().summary()
    first, second = summary["groups"]
    assert summary["plain"] == pytest.approx(2.5) and first["deleted"] == pytest.approx(3.1)
    assert first["cost"] == pytest.approx(0.6) and first["note"] is None
    (arm, book), gain = first["arms"], first["gains"][0]
    # (3.1 - 2.625) / 0.6 and (3.1 - 2.725) / 0.6, token-weighted: not the mean of the passages' own shares
    assert arm["share"] == pytest.approx(0.475 / 0.6) and book["share"] == pytest.approx(0.375 / 0.6)
    assert gain["share"] == pytest.approx(0.1 / 0.6) and gain["ci95"][0] < gain["share"] < gain["ci95"][1]
    # Every resample of four passages, weighed alike, by hand.
    plain, gone = np.array([2.0, 3.0, 2.0, 3.0]), np.array([2.5, 3.5, 3.0, 3.4])
    with_code = np.array([2.1, 3.1, 2.2, 3.1])
    rows = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T
    every = (gone - with_code)[rows].sum(1) / (gone - plain)[rows].sum(1)
    np.testing.assert_allclose(arm["ci95"], np.percentile(every, [2.5, 97.5]), atol=0.02)
    assert second["note"] == "no meaning: this head's writes cost less than 0.005 nats"
    assert [x["share"] for x in second["arms"]] == [None, None] and second["gains"] == []
    assert second["arms"][0]["loss"] == pytest.approx(2.5 + 1e-3 * 0.125)


def test_a_cost_that_may_be_nothing_has_no_share():
    group = made_up(deleted=(2.5, 2.7, 3.0, 2.4)).summary()["groups"][0]
    assert group["cost"] == pytest.approx(0.15) and group["cost_ci95"][0] < 0
    assert "cannot be told from nothing" in group["note"] and group["arms"][0]["share"] is None


def test_the_table_and_the_lines():
    summary = made_up().summary()
    header, *rows = flat(summary)
    assert len(rows) == 4 and all(len(row) == len(header) for row in rows)
    text = printed(summary)
    assert "79.2 % [" in text and "62.5 % [" in text and "0:1" in text and "no meaning: this head's" in text


def test_it_is_saved(tmp_path):
    summary = made_up().save(tmp_path, model="a model")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and summary["test"] == "loss recovered"
    assert (tmp_path / "recovered.csv").read_text().startswith("read,group,heads,plain,deleted,cost")
    assert (tmp_path / "losses.parquet").is_file()


# ---- the page and the command -------------------------------------------------------------------------------------


def test_the_page_holds_the_numbers_and_fetches_nothing(tmp_path, capsys):
    made_up().save(tmp_path, model="a <tiny> model", corpus="some text", train="other text")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    rest = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", rest) and rest.count("<img") == 1
    for text in ("a &lt;tiny&gt; model", "79.2&#8239;%", "62.5&#8239;%", "layer 5, head 3", "Without meaning",
                 "Read after:", "no meaning: this head&#39;s writes cost less than 0.005 nats",
                 "native writes of other text",
                 "<b>is more than that of the codebook</b> (by +16.7 points"):  # fmt: skip
        assert text in page, text
    assert {x.name for x in (tmp_path / "plots").iterdir()} == {"recovered_after.svg", "recovered_after.csv"}


def test_a_run_in_which_nothing_means_anything_has_a_page(tmp_path):
    summary = made_up().summary()
    summary["groups"] = summary["groups"][1:]
    page = report.build(summary, tmp_path).read_text()
    assert "<img" not in page and "Without meaning" in page and "2.5000" in page


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s.update(plain="<b>"), "summary.json.plain: expected a finite number"),
        (lambda s: s["groups"][0].update(group="<script>"), "groups.0..group: expected all, layer N or LAYER:HEAD"),
        (lambda s: s["groups"][0]["arms"][0].update(condition="<i>"), "expected the name of a condition"),
        (lambda s: s["groups"][0]["arms"][0].update(share=None), "either shares or a note"),
        (lambda s: s["groups"][1]["arms"].pop(), "expected the same conditions in every group"),
        (lambda s: s["groups"].append({**s["groups"][0], "gains": []}), "expected gains of the same k"),
        (lambda s: s.update(groups=[]), "expected at least one"),
        (lambda s: s["settings"].update(target="both"), "settings.target: expected one of write, state"),
        (lambda s: s["settings"]["sites"].update({"5:x": {}}), "expected LAYER:HEAD"),
        (lambda s: s.update(model=7), "summary.json.model: expected text"),
    ],
)
def test_a_strangers_summary_is_checked(change, match, tmp_path):
    summary = json.loads(json.dumps(made_up().summary()))
    change(summary)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=match):
        report.build(tmp_path, tmp_path)


def test_the_command(tmp_path, capsys):
    for head in (0, 3):
        with torch.random.fork_rng():
            SAE(32, 64, 40, 4, target="write", layer=5, head=head, model="default").save_pretrained(
                tmp_path / "saes" / f"L5H{head}"
            )
    arguments = ["loss-recovered", "--sae", str(tmp_path / "saes"), "--passages", "3", "--context", "24", "--k", "1",
                 "2", "--max-tokens", "2000", "--train-tokens", "500", "--read", "both"]  # fmt: skip
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "plain" in out and "5:0" in out and "all" in out and "report.html" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["passages"], summary["context"], summary["train"]) == (3, 24, "stdlib:train")
    assert [group["read"] for group in summary["groups"]] == ["before"] * 3 + ["after"] * 3
    assert "read after:" in out and "read before:" in out
    arms = [(arm["condition"], arm["k"]) for arm in summary["groups"][0]["arms"]]
    assert arms == [("coded", 1), ("codebook", 1), ("coded", 2), ("codebook", 2)]
    assert cli.main([*arguments, "--out", str(tmp_path / "own"), "--k", "own", "--no-codebook", "--by", "all"]) == 0
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert [group["group"] for group in summary["groups"]] == ["all"] * 2 and summary["train"] is None
    assert [(arm["condition"], arm["k"]) for arm in summary["groups"][0]["arms"]] == [("coded", None)]
    capsys.readouterr()
    assert cli.main([*arguments, "--out", str(tmp_path / "x"), "--k", "own", "2"]) == 2
    assert "k: expected numbers, or own by itself" in capsys.readouterr().err
