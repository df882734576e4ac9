"""Exports without the tools they are for: what is written is what was there, and what cannot be is refused by name."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from bridge_cases import SITE, real_store
from fake_source import FakeSource, words
from safetensors.numpy import load_file
from tiny_models import tiny_kda, tiny_mamba, tiny_mamba2, tokens

import writesae
from writesae.bridges import circuit_tracer, delphi, neuronpedia
from writesae.browse.sample import HOSTILE, sample_store
from writesae.cli import main
from writesae.collect import Corpus, Store, collect
from writesae.models.sites import layers
from writesae.sae import saelens_layout


class Tokenizer:
    """One token a character, with a beginning-of-text token."""

    bos_token_id = 7

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": words(text)}


@pytest.fixture(scope="module", autouse=True)
def _threads(one_thread):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A collection of six documents, one empty, in passages of 32 and shards of 7."""
    root, rng = tmp_path_factory.mktemp("bridges"), random.Random(3)
    (root / "text").mkdir()
    for i, n in enumerate((500, 0, 31, 90, 700, 64)):
        (root / "text" / f"{i}.txt").write_text("".join(rng.choice("abcdefghij \n") for _ in range(n)))
    text = Corpus.from_path(root / "text")
    collect(text, Tokenizer(), FakeSource(), root / "all", n=20, context=32, shard_passages=7)
    collect(text, Tokenizer(), FakeSource(), root / "top", n=20, context=32, shard_passages=7, mode="top")
    return root


def firings(store: Store, layer: int, head: int) -> set[tuple]:
    """(document, row, position, feature, activation)s."""
    names = ("document", "row", "position", "feature", "activation")
    return {tuple(f[name] for name in names) for t in store.firings(layer, head) for f in t.to_pylist()}


# ---- SAELens' folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"kind": "bilinear_tied", "r": 2}, {"kind": "matrix"}, {"kind": "flat", "layer": None, "head": None},
        {"sparsity": "threshold"}, {"kind": "bilinear_tied", "target": "write", "sparsity": "pursuit"},
    ],
    ids=str,
)  # fmt: skip
def test_a_dictionary_goes_to_saelens_folder_and_back(options, tmp_path):
    ours = writesae.SAE(6, 10, F=24, k=4, **{"layer": 1, "head": 2, "model": "m", **options}, metrics={"fvu": 0.5})
    if ours.target == "state":
        torch.nn.init.normal_(ours.mean)
    if ours.threshold is not None:
        ours.threshold.fill_(0.3)
    saelens_layout.save(ours, tmp_path / "x")
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    again = writesae.SAE.from_pretrained(tmp_path / "x")
    for name in ("K", "V", "F", "k", "kind", "r", "sparsity", "target", "centred", "layer", "head", "model", "metrics"):
        assert getattr(again, name) == getattr(ours, name), name
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    again.save_pretrained(tmp_path / "y")  # our own folder, of the same
    assert writesae.SAE.from_pretrained(tmp_path / "y").extra_repr() == ours.extra_repr()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"architecture": "topk"}, "architecture: expected writesae_bilinear, got 'topk'.*from_saelens"),
        ({"architecture": ["x"]}, "architecture: expected"),
        ({"d_in": 61}, "d_in: expected K . V = 60, got 61"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: expected 'none', got 'layer_norm'"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input: expected False"),
        ({"K": "6"}, "K: expected an integer"),
        ({"d_sae": 25}, "expected shape"),
        ({"metadata": []}, "metadata: expected an object"),
        ({"metadata": {"training": 3}}, "training: expected a dictionary"),
        ({"k": None}, "k: expected an integer"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_saelens_folder_should_not_say_is_refused(change, said, tmp_path):
    saelens_layout.save(writesae.SAE(6, 10, F=24, k=4), tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said) as error:
        writesae.SAE.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


# ---- a collection ---------------------------------------------------------------------------------------------------


def read_delphi(folder, documents) -> set[tuple]:
    """(passage, position, feature, activation)s of a site's folder, by the layout alone."""
    found = set()
    for path in folder.glob("*.safetensors"):
        data, first = load_file(path), int(path.stem.split("_")[0])
        for (passage, position, feature), activation in zip(data["locations"], data["activations"], strict=True):
            found.add((int(passage), int(position), int(feature) + first, float(activation)))
    return found


@pytest.mark.parametrize("splits", [1, 5, 1000])
def test_delphi_has_every_firing_and_token(made, tmp_path, splits):
    store = Store(made / "all")
    told = delphi.export(store, tmp_path / "x", sites=[(1, 3), (4, 2)], splits=splits, pad=3)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"layers.1.head.3", "layers.4.head.2"}
    first = dict(zip(*(store.documents[name].to_pylist() for name in ("document", "first_passage")), strict=True))
    total = 0
    for layer, head in ((1, 3), (4, 2)):
        folder = tmp_path / "x" / delphi.hookpoint(layer, head)
        expected = {(first[d] + row, *rest) for d, row, *rest in firings(store, layer, head)}
        assert expected and read_delphi(folder, store.documents) == expected
        total += len(expected)
        edges = sorted(tuple(map(int, p.stem.split("_"))) for p in folder.glob("*.safetensors"))
        size = store.features_of(layer, head)
        assert len(edges) == min(splits, size) and edges[0][0] == 0 and edges[-1][1] == size - 1
        assert all(a[1] + 1 == b[0] for a, b in zip(edges[:-1], edges[1:], strict=True))  # no feature in no file
        tokens = load_file(next(folder.glob("*.safetensors")))["tokens"]
        for document in first:
            ids = store.tokens(document)
            rows = tokens[first[document] : first[document] + -(-len(ids) // 32)].ravel()
            assert rows[: len(ids)].tolist() == ids.tolist() and set(rows[len(ids) :].tolist()) <= {3}
        config = json.loads((folder / "config.json").read_text())
        assert config["ctx_len"] == config["cache_ctx_len"] == 32 and config["n_tokens"] == tokens.size
    assert told["firings"] == total and told["padded"] == tokens.size - store.summary()["tokens"]


def test_what_several_workers_filled_gives_the_same(made, tmp_path):
    """Units, each with shards of its own."""
    text = Corpus.from_path(made / "text")
    collect(text, Tokenizer(), FakeSource(), tmp_path / "units", n=20, context=32, shard_passages=3, unit=400)
    assert len(Store(tmp_path / "units").pieces) > 2
    for name in ("all", "units"):
        store = (made if name == "all" else tmp_path) / name
        delphi.export(store, tmp_path / f"of {name}", sites=[(1, 0)], splits=2)
    files = sorted(p.name for p in (tmp_path / "of all" / "layers.1.head.0").glob("*.safetensors"))
    for name in files:
        a, b = (load_file(tmp_path / f"of {x}" / "layers.1.head.0" / name) for x in ("all", "units"))
        assert all(np.array_equal(a[column], b[column]) for column in a)


def test_what_a_collection_cannot_give_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="mode all, got mode top"):
        delphi.export(made / "top", tmp_path / "x")
    with pytest.raises(ValueError, match=r"site: expected one of this collection \(1:0, 1:3, 4:2\), got 9:9"):
        delphi.export(made / "all", tmp_path / "x", sites=[(9, 9)])
    with pytest.raises(ValueError, match="splits: expected"):
        delphi.export(made / "all", tmp_path / "x", splits=0)
    with pytest.raises(ValueError, match="pad: expected a token id"):
        delphi.export(made / "all", tmp_path / "x", pad=-1)
    with pytest.raises(ValueError, match="tokenizer: expected"):
        neuronpedia.export(made / "all", tmp_path / "x", model="m")
    for name in ("../x", "", "a/b", ".x"):
        with pytest.raises(ValueError, match="name: expected letters"):
            neuronpedia.export(made / "all", tmp_path / "x", model="m", name=name)
        with pytest.raises(ValueError, match="model: expected letters"):
            neuronpedia.export(made / "all", tmp_path / "x", model=name)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(made / "all", unfinished)
    (unfinished / "summary.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        delphi.export(unfinished, tmp_path / "x")
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "all", damaged)
    part = damaged / "tokens" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match="part-000001.parquet is damaged"):
        delphi.export(damaged, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_hostile_collection_stays_in_its_folder(tmp_path):
    """Tokens that would be markup, paths or scripts are text; what is no number, and a size that would fill the memory,
    is refused."""
    options = {"firings": 2_000, "context": 64, "dictionaries": False, "hostile": True}
    path, _ = sample_store(tmp_path / "numbers", F=16, **options)
    with pytest.raises(ValueError, match="expected finite activations, got a NaN or infinity of 0:0 feature [56]"):
        neuronpedia.export(path, tmp_path / "x", model="m")
    path, _ = sample_store(tmp_path / "text", F=5, k=4, **options)  # whose numbers are plain
    store = Store(path)
    for layout in neuronpedia.FORMATS:
        neuronpedia.export(store, tmp_path / layout, layout, model="m")
        files = [p for p in (tmp_path / layout).rglob("*") if p.is_file()]
        assert {p.parent.name for p in files} == {f"{layer}-writesae-h{head}" for layer, head in store.sites}
        texts = {t for p in files for f in json.loads(p.read_text())["features"] for x in f["activations"]
                 for t in x["tokens"]}  # fmt: skip
        assert len(set(HOSTILE) & texts) > 3
    store.context = 2**40
    with pytest.raises(ValueError, match="expected passages that are mostly text"):
        delphi.export(store, tmp_path / "x")


@pytest.mark.parametrize("layout", neuronpedia.FORMATS)
def test_pages_show_what_is_stored(layout, tmp_path):
    """Against the store's own answers: counts, the largest firings, and the text around them."""
    store, (layer, head) = real_store(), SITE
    told = neuronpedia.export(store, tmp_path, layout, width=4, features=130, name="set")
    files = sorted((tmp_path / f"{layer}-set-h{head}").iterdir())
    batches = [json.loads(path.read_text()) for path in files]
    assert [len(x["features"]) for x in batches] == [128, 2] and told == {"features": 130, "files": 2, "sites": 1}
    counts = store.counts(layer, head)
    frequent = np.sort(counts["count"].to_numpy())[::-1]
    index = {"neuronpedia": "index", "sae-dashboard": "feature_index"}[layout]
    density = {"neuronpedia": "density", "sae-dashboard": "frac_nonzero"}[layout]
    low, share = {"neuronpedia": ("quantileMin", "quantileFraction"), "sae-dashboard": ("bin_min", "bin_contains")}[
        layout
    ]
    pages = [page for batch in batches for page in batch["features"]]
    for page in pages[::26]:
        feature = page[index]
        count = counts["count"][feature].as_py()
        assert count >= frequent[129] and page[density] == pytest.approx(count / store.summary()["tokens"])
        contexts = store.contexts(layer, head, feature, n=20, width=4)
        for shown, context in list(zip(page["activations"], contexts, strict=False))[::5]:
            assert "".join(shown["tokens"]) == store.tokenizer()(context.tokens.tolist())
            assert shown["values"][context.at] == pytest.approx(context.activation, rel=1e-4)
            fired = store.at(context.document, context.position - context.at, context.row).to_pylist()
            at_first = [f["activation"] for f in fired if f["feature"] == feature and (f["layer"], f["head"]) == SITE]
            assert shown["values"][0] == pytest.approx(sum(at_first), rel=1e-4)
        shares = {(x[low], x[share]) for x in page["activations"][len(contexts) :]}
        assert sum(x for _, x in shares) == pytest.approx(1, abs=1e-9)  # the levels part all firings
        if layout == "sae-dashboard":
            assert sum(page["freq_hist_data_bar_heights"]) == count


def test_promoted_tokens_are_those_of_the_atoms(tmp_path):
    model, tokenizer, _ = writesae.load_default()
    sae = writesae.SAE.from_pretrained("default")
    neuronpedia.export(real_store(), tmp_path, features=3, writes=(model, {SITE: sae}))
    [path] = (tmp_path / "5-writesae-h3").iterdir()
    for page in json.loads(path.read_text())["features"]:
        for name, least in (("topLogits", False), ("bottomLogits", True)):
            expected = writesae.atoms.promoted_tokens(model, tokenizer, sae, page["index"], least=least)
            assert [x["token"] for x in page[name]] == [x.text for x in expected]
            np.testing.assert_allclose([x["value"] for x in page[name]], [x.score for x in expected], rtol=1e-3)
    with pytest.raises(ValueError, match="sae: expected a dictionary for 5:3, got none"):
        neuronpedia.export(real_store(), tmp_path / "x", writes=(model, {}))
    other = {SITE: writesae.SAE(32, 64, F=8, k=4)}
    with pytest.raises(ValueError, match="expected the dictionary of 5:3 that the store was collected with"):
        neuronpedia.export(real_store(), tmp_path / "x", writes=(model, other))


# ---- a prompt -------------------------------------------------------------------------------------------------------

PROMPT = "import os\nfor name in os.listdir('.'):\n    print("


@pytest.fixture(scope="module")
def traced():
    model, tokenizer, _ = writesae.load_default()
    saes = {SITE: writesae.SAE.from_pretrained("default")}
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"][0]
    return model, tokenizer, saes, circuit_tracer.trace(model, ids, saes, logits=3)


def test_what_tokens_wrote_adds_up_to_the_activation(traced):
    _, _, saes, graph = traced
    f, (_, _, bias) = graph.firings, saes[SITE].encoder()
    assert len(f) > 50 and graph.written.shape == (len(f), len(graph.ids))
    total = graph.written.sum(1) + bias.detach()[f.feature.long()]
    torch.testing.assert_close(total, f.activation, rtol=1e-4, atol=1e-5)
    assert not graph.written.triu(1)[f.position.argsort(stable=True)].isnan().any()
    later = torch.arange(len(graph.ids))[None] > f.position[:, None]
    assert not graph.written[later].any()  # nothing comes from what has not been read yet


@pytest.mark.parametrize("tiny", [tiny_mamba2, tiny_mamba, tiny_kda], ids=["scalar", "element", "channel"])
def test_that_of_every_gate(tiny):
    """Of models of a few random weights."""
    model, ids = tiny(), tokens(1, 12)[0]
    site = layers(model)[0]
    place = (site.layer_index, 0)
    sae = writesae.SAE(site.K, site.V, F=16, k=3)
    torch.nn.init.normal_(sae.mean, std=0.1)
    graph = circuit_tracer.trace(model, ids, {place: sae})
    _, _, bias = sae.encoder()
    total = graph.written.sum(1) + bias.detach()[graph.firings.feature.long()]
    assert len(graph.firings)
    torch.testing.assert_close(total, graph.firings.activation, rtol=1e-3, atol=1e-5)


def test_an_atom_of_a_write_is_of_its_own_token(traced):
    model, _, _, before = traced
    (place, path), *_ = writesae.default.dictionaries("write").items()
    graph = circuit_tracer.trace(model, before.ids, {place: writesae.SAE.from_pretrained(path)}, logits=1)
    f = graph.firings
    assert len(f) and torch.equal(graph.written.sum(1), f.activation)
    assert torch.equal(graph.written.argmax(1), f.position.long()) and graph.effects.abs().max() > 0


def test_effects_are_those_of_small_edits(traced):
    """Of the atoms added a little more of, in a run of their own."""
    model, _, saes, graph = traced
    v, w = saes[SITE].atoms()
    f, step = graph.firings, 1e-2
    for n in graph.effects.abs().sum(1).topk(3).indices.tolist():
        found = []
        for sign in (step, -step):
            value = sign * float(f.activation[n]) * w[int(f.feature[n]), 0].detach()
            edit = writesae.Edits.add(0, [int(f.position[n])], 3, v[int(f.feature[n]), 0].detach(), value)
            with torch.no_grad(), writesae.attach(model, {}, edits={5: edit}):
                logits = model(input_ids=graph.ids[None], use_cache=False).logits[0, -1].double()
            found.append((logits - logits.mean())[graph.targets])
        expected = (found[0] - found[1]) / (2 * step)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(graph.effects[n].double(), expected, rtol=2e-2, atol=2e-4)


def test_a_graph_is_closed(traced, tmp_path):
    model, tokenizer, saes, _ = traced
    told = circuit_tracer.export(PROMPT, tmp_path, model, tokenizer, saes, top=20, logits=3, slug="a-prompt")
    graph = json.loads((tmp_path / "a-prompt.json").read_text())
    assert json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"] == [graph["metadata"]]
    nodes = {x["node_id"]: x for x in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == told["nodes"] and len(graph["links"]) == told["links"]
    assert all(x["source"] in nodes and x["target"] in nodes for x in graph["links"])
    kinds = [x["feature_type"] for x in graph["nodes"]]
    assert kinds.count("cross layer transcoder") == 20 and kinds.count("logit") == 3
    assert "".join(graph["metadata"]["prompt_tokens"]).endswith(PROMPT)
    influence = [x["influence"] for x in graph["nodes"] if x["feature_type"] == "cross layer transcoder"]
    assert influence == sorted(influence) and 0 < influence[0] and influence[-1] <= 1 + 1e-6
    for bad, said in (("../x", "name: expected"), ("", "name: expected")):
        with pytest.raises(ValueError, match=said):
            circuit_tracer.export(PROMPT, tmp_path, model, tokenizer, saes, slug=bad)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_all_or_nothing(made, tmp_path, capsys):
    out = tmp_path / "x"
    assert main(["export", "delphi", str(made / "all"), str(out), "--site", "1:3", "--splits", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "delphi" and told["firings"] == len(firings(Store(made / "all"), 1, 3))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for arguments, said in (
        (["delphi", str(made / "all"), str(out)], "out: expected a new or empty folder"),
        (["delphi", str(made / "top"), str(tmp_path / "y")], "mode all, got mode top"),
        (["delphi", str(made / "none"), str(tmp_path / "y")], "manifest.json"),
        (["delphi", str(made / "all"), str(tmp_path / "y"), "--width", "3"], "width: expected with neuronpedia"),
        (["saelens", str(made / "none"), str(tmp_path / "y")], "no such"),
        (["saelens", str(made / "all"), str(tmp_path / "y")], "cfg.json"),
        (["neuronpedia", str(made / "all"), str(tmp_path / "y"), "--sae", "default"], "sae: expected it with --model"),
        (["circuit-tracer", "", str(tmp_path / "y")], "source: expected the text of a prompt"),
    ):
        assert main(["export", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("writesae export: ") and said in err and err.count("\n") == 1, err
        assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_the_command_runs_a_model(tmp_path, capsys):
    real_store()
    capsys.readouterr()
    store, pages, graph = str(real_store().path), str(tmp_path / "pages"), str(tmp_path / "graph")
    assert main(["export", "neuronpedia", store, pages, "--features", "2", "--model", "default", "--name", "x"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == 2
    body = json.loads((tmp_path / "pages" / "5-x-h3" / "batch-0000.json").read_text())
    assert body["modelId"] == "default" and len(body["features"][0]["topLogits"]) == 10
    assert main(["export", "circuit-tracer", "def f(x):", graph, "--top", "3", "--logits", "2", "--name", "g"]) == 0
    told = json.loads(capsys.readouterr().out)
    nodes = json.loads((tmp_path / "graph" / "g.json").read_text())["nodes"]
    assert told["nodes"] == len(nodes) and sum(x["feature_type"] == "logit" for x in nodes) == 2


def test_the_command_writes_dictionaries(tmp_path, capsys):
    assert main(["export", "saelens", "default", str(tmp_path / "x")]) == 0
    folders = [p.name for p in (tmp_path / "x").iterdir()]
    assert json.loads(capsys.readouterr().out)["dictionaries"] == len(folders) >= 1
    again, ours = (writesae.SAE.from_pretrained(x) for x in (tmp_path / "x" / "L5H3", "default"))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
