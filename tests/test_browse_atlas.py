"""The atlas: every number of a page against the store's own rows, counted plainly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fake_source import FakeSource
from fake_source import words as letters
from test_report import made_up

import writesae
from writesae.browse import Atlas, link, native, promoted, sample_store, table, words
from writesae.browse import scan as scan_module
from writesae.browse.contexts import LEVELS, WIDTH
from writesae.browse.results import Results
from writesae.collect import Corpus, ModelSource, collect
from writesae.default import families
from writesae.experiments.parts import write_table
from writesae.files import write_json
from writesae.models.sites import layers as model_layers

ROOT = Path(__file__).parents[1]
SITES, F, K = ((0, 1), (2, 0), (2, 5)), 48, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(store, dictionaries, atlas, every firing as a dictionary, {(document, row): tokens})."""
    root = tmp_path_factory.mktemp("browse")
    store, sae = sample_store(root, SITES, F, 12_000, k=K, context=64, shard=2_000, n=20)
    atlas = Atlas.open(store, sae, progress=False)
    firings = [f for path in sorted((store / "firings").iterdir()) for f in pq.read_table(path).to_pylist()]
    passages: dict = {}
    for path in sorted((store / "tokens").iterdir()):
        for t in pq.read_table(path).to_pylist():
            passages.setdefault((t["document"], t["row"]), []).append(t["token"])
    assert len(list((store / "firings").iterdir())) > 3
    return store, sae, atlas, firings, passages


def of(firings, layer, head, feature):
    return [f for f in firings if (f["layer"], f["head"], f["feature"]) == (layer, head, feature)]


def place(f):
    return f["document"], f["row"], f["position"]


def test_table_is_what_the_store_holds(made):
    _, _, atlas, firings, passages = made
    t = atlas.table
    assert len(t) == len(SITES) * F and t.sites == list(SITES)
    assert (np.lexsort((t.feature, t.site)) == np.arange(len(t))).all()
    tokens = sum(map(len, passages.values()))
    for at in range(0, len(t), 7):
        (layer, head), feature = t.sites[t.site[at]], int(t.feature[at])
        mine = of(firings, layer, head, feature)
        a = [f["activation"] for f in mine]
        assert t.count[at] == len(mine) and t.density[at] == np.float32(len(mine) / tokens)
        assert t.max[at] == max(a, default=0) and t.mean[at] == pytest.approx(np.mean(a or [0]), rel=1e-6)
        counted = Counter(passages[place(f)[:2]][f["position"]] for f in mine)
        best = [i for i in t.key_tokens[at].tolist() if i != table.UNKNOWN]
        assert [counted[i] for i in best] == sorted(counted.values(), reverse=True)[: table.SHOWN]
    assert np.isnan(t.win_rate).all() and np.isnan(t.cosine).all() and (t.promoted == table.UNKNOWN).all()
    assert [t.partitions[i] for i in t.partition] == [
        "dead" if d == 0 else "rare" if d < table.RARE else "dense" if d >= table.DENSE else "common" for d in t.density
    ]


@pytest.mark.parametrize("site, feature", [((0, 1), 0), ((2, 0), 17), ((2, 5), 47)])
def test_page_is_what_the_store_holds(made, site, feature):
    store, _, atlas, firings, passages = made
    page = atlas.feature(*site, feature)
    mine = of(firings, *site, feature)
    at = {place(f): f["activation"] for f in mine}
    largest = max(at.values())
    counts, _ = np.histogram([a / largest * 32 for a in at.values()], 32, (0, 32))
    assert page.histogram["counts"] == counts.tolist() and page.histogram["edges"][-1] == pytest.approx(largest)
    assert [x["name"] for x in page.levels][0] == "top" and len(page.levels) == len(LEVELS)
    top = [c["activation"] for c in page.levels[0]["contexts"]]
    assert top == sorted(at.values(), reverse=True)[: scan_module.TOP]
    for level, (name, low, high) in zip(page.levels, LEVELS, strict=True):
        inside = [a for a in at.values() if low * largest <= a <= high * largest]
        wanted = scan_module.TOP if name == "top" else scan_module.EACH
        assert len(level["contexts"]) == min(wanted, len(inside))
        for c in level["contexts"]:
            assert level["low"] <= c["activation"] <= level["high"] and c["activations"][c["at"]] == c["activation"]
            ids, first = passages[c["document"], c["row"]], c["position"] - c["at"]
            shown = ids[first : first + len(c["tokens"])]
            assert "".join(c["tokens"]) == bytes(shown).decode("utf-8", "replace")
            for i, x in enumerate(c["activations"]):
                expected = at.get((c["document"], c["row"], first + i), 0)
                assert x == expected or abs(first + i - c["position"]) > WIDTH
            assert c["source"] == f"document-{c['document']}.txt"
    counted = Counter(passages[place(f)[:2]][f["position"]] for f in mine)
    found = page.answers["tokens"]
    assert [t["count"] for t in found] == sorted(counted.values(), reverse=True)[:10]
    assert all(counted[t["id"]] == t["count"] for t in found)
    json.dumps(page.as_dict(), allow_nan=False)
    assert page.link == link(*site, feature) == f"{site[0]}/{site[1]}/{feature}"


def test_features_that_fire_together(made):
    _, _, atlas, firings, passages = made
    site, feature = (2, 0), 17
    places = {g: {place(f) for f in of(firings, *site, g)} for g in range(F)}
    tokens = sum(map(len, passages.values()))
    found = atlas.feature(*site, feature).cofiring
    assert len(found) > 2
    score = {}
    for other in range(F):
        together, expected = len(places[feature] & places[other]), len(places[feature]) * len(places[other]) / tokens
        if other != feature and together > expected:
            score[other] = together * np.log(together / expected)
    assert [x["feature"] for x in found] == sorted(score, key=lambda x: -score[x])[: len(found)]
    for x in found:
        together = len(places[feature] & places[x["feature"]])
        assert x["together"] == together and x["lift"] == pytest.approx(together / x["expected"])
        assert 0 < x["npmi"] <= 1


def test_neighbours_are_those_of_atoms(made):
    _, sae, atlas, *_ = made
    loaded = writesae.SAE.from_pretrained(sae / "L2H5")
    expected = writesae.atoms.neighbours(loaded, 9, 10)
    found = atlas.feature(2, 5, 9)
    assert [x["feature"] for x in found.neighbours] == [x.feature for x in expected]
    assert [x["cosine"] for x in found.neighbours] == pytest.approx([x.cosine for x in expected], abs=1e-5)
    v = torch.nn.functional.normalize(loaded.v_dec[:, 0], dim=1)
    cosine = (v @ v[9]).abs()
    cosine[9] = 0
    nearest = [x["feature"] for x in found.answers["neighbours"]]
    assert nearest == cosine.topk(10).indices.tolist()
    assert found.writes["promoted"] == [] and found.writes["why"] == "no model"


@pytest.mark.parametrize("mode", ["top", "reservoir"])
def test_stores_that_keep_some(tmp_path, mode):
    store, _ = sample_store(tmp_path, SITES[:2], F, 6_000, k=K, context=64, shard=2_000, mode=mode, n=12)
    atlas = Atlas.open(store, progress=False)
    index = pq.read_table(store / "index" / "layer-2-head-0.parquet").to_pylist()
    kept = [f for f in index if f["feature"] == 3]
    page = atlas.feature(2, 0, 3)
    assert page.row["count"] > len(kept) == sum(page.histogram["counts"]) == 12
    assert {c["activation"] for x in page.levels for c in x["contexts"]} <= {f["activation"] for f in kept}
    assert page.cofiring == [] and not atlas.info["cofiring"]
    assert any("the store keeps" in note for note in atlas.info["notes"])


def test_stores_of_several_workers_and_without_a_tokenizer(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text("abc def\n" * (9 + 20 * i))
    found = []
    for unit in (None, 300):
        out = tmp_path / f"out-{unit}"
        collect(
            Corpus.from_path(tmp_path / "text"), letters, FakeSource(), out, context=32, shard_passages=7, unit=unit
        )
        atlas = Atlas.open(out, progress=False)
        found.append((atlas.table, atlas.feature(1, 3, 12).as_dict()))
    assert len(list((tmp_path / "out-300" / "units").iterdir())) > 2
    (one, page), (other, same) = found
    assert page == same and page["levels"] and page["cofiring"]
    assert (one.count == other.count).all() and (one.key_tokens == other.key_tokens).all() and one.count.sum() > 0
    assert page["levels"][0]["contexts"][0]["tokens"][0].startswith("<")  # no vocabulary: numbers
    assert page["writes"]["why"] == "no dictionary of layer 1 head 3"


def test_page_needs_no_torch(made):
    store, sae, *_ = made
    code = (
        "import sys; from writesae.browse import Atlas\n"
        "atlas = Atlas.open(sys.argv[1], sys.argv[2], progress=False)\n"
        "assert atlas.feature(2, 0, 17).levels and len(atlas.table)\n"
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, store, sae], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_goes_on_after_an_interrupt(made, tmp_path, monkeypatch):
    store, *_, firings, _ = made
    monkeypatch.setattr(scan_module, "_FEATURES", F)  # a group a site
    seen = []

    def stopping(path, *rest):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(path.name)
        return written(path, *rest)

    written = scan_module.write
    monkeypatch.setattr(scan_module, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        Atlas.open(store, cache=tmp_path, progress=False)
    (first,) = tmp_path.glob("firings-*/*.parquet")
    before = first.stat().st_mtime_ns
    assert not list(tmp_path.glob("table-*"))
    monkeypatch.setattr(scan_module, "write", written)
    atlas = Atlas.open(store, cache=tmp_path, progress=False)
    assert first.stat().st_mtime_ns == before and len(list(tmp_path.glob("firings-*/*.parquet"))) == len(SITES)
    assert atlas.feature(2, 5, 3).row["count"] == len(of(firings, 2, 5, 3))


def test_hostile_store_stays_data(tmp_path):
    store, sae = sample_store(tmp_path, SITES[:2], F, 6_000, k=K, context=64, shard=2_000, hostile=True)
    with torch.no_grad():
        bad = writesae.SAE.from_pretrained(sae / "L2H0")
        bad.v_dec[3] = 0
        bad.w_dec[4] *= 1e30
    bad.save_pretrained(sae / "L2H0")
    atlas = Atlas.open(store, sae, progress=False)
    texts = set()
    for feature in range(0, F, 4):
        page = atlas.feature(2, 0, feature).as_dict()
        text = json.dumps(page, allow_nan=False)
        assert json.loads(text) == page
        texts |= {t for x in page["levels"] for c in x["contexts"] for t in c["tokens"]}
        texts |= {c["source"] for x in page["levels"] for c in x["contexts"]}
    assert "<script>document.title='ran'</script>" in texts  # as it is: whoever shows it escapes it
    json.dumps(atlas.info, allow_nan=False)
    assert not np.isfinite(atlas.table.max[5]) and atlas.feature(0, 1, 5).row["max"] is None
    assert all(json.dumps(atlas.feature(0, 1, i).as_dict(), allow_nan=False) for i in (5, 6, 7))


@pytest.mark.parametrize("damage", ["cut", "other columns", "lists"])
def test_damaged_cache_is_named(made, tmp_path, damage):
    store, *_ = made
    atlas = Atlas.open(store, cache=tmp_path, progress=False)
    path = atlas.scan_path(1)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "other columns":
        pq.write_table(pq.read_table(path).drop(["level"]), path)
    else:
        broken = pq.read_table(path)
        at = broken.schema.get_field_index("around")
        pq.write_table(broken.set_column(at, "around", broken["row"]), path, row_group_size=128)
    with pytest.raises(ValueError, match=path.name):
        atlas.feature(2, 0, 1)


def test_refusals(made, tmp_path):
    store, sae, atlas, *_ = made
    for call, message in (
        (lambda: atlas.feature(1, 0, 0), "layer, head: expected a site of this store"),
        (lambda: atlas.feature(0, 1, F), "feature: expected 0 <= feature < 48, got 48"),
        (lambda: atlas.feature(0, 1, True), "feature: expected"),
        (lambda: Atlas.open(tmp_path), "path: expected a folder made by `writesae collect`"),
        (lambda: Atlas.open(store, tmp_path / "none", progress=False), "sae: expected a dictionary"),
        (lambda: Atlas.open(store, "default", progress=False), "sae: expected dictionaries of the store's sites"),
        (lambda: Atlas.open(store, results=[tmp_path], progress=False), "results: expected a finished replacement run"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    other, _ = sample_store(tmp_path / "other", SITES, F - 8, 2_000, k=K, context=64)
    with pytest.raises(ValueError, match="sae: expected 40 features at 0:1"):
        Atlas.open(other, sae, progress=False)
    assert atlas.live is None and not atlas.info["has_model"]


def test_results_of_single_atoms(tmp_path):
    result = made_up(80, ("native", "atom", "delete"))
    (tmp_path / "run").mkdir()
    write_table(tmp_path / "run" / "firings.parquet", result.table)
    write_json(tmp_path / "run" / "summary.json", result.summary(resamples=20))
    found = Results([tmp_path / "run"])
    sites, first = [(4, 0), (4, 1)], np.array([0, 20, 40])
    win_rate, cosine = found.columns(sites, first)
    atom, delete = (result.kl("increment", x, "coef") for x in ("atom", "delete"))
    for head, feature in ((0, 3), (1, 19)):
        mine = (result.table["head"] == head) & (result.table["feature"] == feature)
        at = 20 * head + feature
        assert win_rate[at] == np.float32((atom < delete)[mine].mean())
        assert cosine[at] == pytest.approx(result.table["cosine"][mine].mean(), rel=1e-6)
        (entry,) = found.of(4, head, feature)
        assert entry["n"] == mine.sum() and entry["win_rate"] == pytest.approx(win_rate[at])
        assert entry["kl_median"]["delete"] == pytest.approx(np.median(delete[mine]))
        assert len(entry["firings"]) == min(12, mine.sum())
    assert found.of(4, 2, 3) is None
    code, names = table.partitioned(np.array([0, 3, 3, 3]), np.zeros(4), np.array([np.nan, np.nan, 0.01, 0.2]))
    assert [names[i] for i in code] == ["dead", "untested", "bundle", "register"]


# ---- text -----------------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_text():
    tokenizer = writesae.models.load("default")[1]
    made = words.from_config(json.loads(tokenizer.backend_tokenizer.to_str()))
    text = "def f(x):\n\treturn '東京 🙂 naïve'  # \u202e done\n"
    ids = tokenizer(text)["input_ids"]
    pieces = made.split(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text == tokenizer.decode(ids)
    assert "".join(made.split(ids[5:-3])) == tokenizer.decode(ids[5:-3])
    assert made.split([10**6]) == ["<1000000>"]


def test_sentencepiece_and_unknown_vocabularies():
    vocabulary = {"\u2581the": 0, "cat": 1, "<0xE6>": 2, "<0x9D>": 3, "<0xB1>": 4, "\u2581": 5}
    config = {"model": {"vocab": vocabulary}, "decoder": {"type": "Metaspace", "replacement": "\u2581"}}
    assert words.from_config(config).split([0, 1, 2, 3, 4]) == [" the", "cat", "", "", "東"]
    assert words.from_config({"model": {"vocab": vocabulary}, "decoder": None}) is None
    with pytest.raises(ValueError, match="where: expected a tokenizer"):
        words.from_config({"model": 3}, "where")


def test_a_window_begins_with_a_line_or_a_word(made):
    _, _, atlas, _, passages = made
    for f in (c for g in range(0, F, 5) for x in atlas.feature(0, 1, g).levels for c in x["contexts"]):
        first = f["position"] - f["at"]
        text = "".join(f["tokens"])
        before = bytes(passages[f["document"], f["row"]][:first]).decode("utf-8", "ignore")[-1:]
        whole = first == 0 or f["at"] >= WIDTH or not (before + text[:1]).isalnum()
        assert whole, (before, text)


# ---- the embedded model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(model, tokenizer, dictionaries, atlas) of a store of the embedded model, as the demo makes it."""
    root = tmp_path_factory.mktemp("embedded")
    model, tokenizer, saes = writesae.load_default()
    corpus, source = Corpus.from_name("stdlib:test"), ModelSource(model, saes, accelerate=True, name="default")
    collect(corpus, tokenizer, source, root / "firings", context=128, max_tokens=2_000)
    return model, tokenizer, saes, Atlas.open(root / "firings", model="default", progress=False)


def test_promoted_tokens_of_the_embedded_model(embedded):
    model, tokenizer, saes, atlas = embedded
    sae = saes[5, 3]
    feature = int(atlas.table.count.argmax())
    page = atlas.feature(5, 3, feature)
    for name, least in (("promoted", False), ("suppressed", True)):
        expected = writesae.atoms.promoted_tokens(model, tokenizer, sae, feature, 10, least=least)
        assert [x["id"] for x in page.writes[name]] == [x.token for x in expected]
        assert [x["value"] for x in page.writes[name]] == pytest.approx([x.score for x in expected], abs=1e-3)
        assert [x["token"] for x in page.writes[name]] == [tokenizer.decode([x.token]) for x in expected]
        assert getattr(atlas.table, name)[feature].tolist() == [x.token for x in expected[:5]]
    assert atlas.info["has_promoted"] and atlas.dictionaries  # found without being named


def test_cosine_and_keys_of_the_embedded_model(embedded):
    """All of its passages are read, so the store's own firings and the model's writes say the same."""
    model, tokenizer, saes, atlas = embedded
    sae, ids = saes[5, 3], native.passages(atlas.store)
    fired, keys = {}, {}
    v, w = (torch.nn.functional.normalize(x.detach()[:, 0], dim=1) for x in sae.atoms())
    with torch.no_grad(), writesae.attach(model, saes) as tap:
        for passage in ids:
            model(torch.tensor(passage.tolist())[None])
            left, right = tap.writes[5].native(0, torch.arange(len(passage)), 3)
            left, right = (torch.nn.functional.normalize(x, dim=1) for x in (left, right))
            for f, p in zip(tap.firings.feature.tolist(), tap.firings.position.tolist(), strict=True):
                fired.setdefault(f, []).append(float((v[f] @ left[p]) * (w[f] @ right[p])))
            for token, key in zip(passage.tolist(), left, strict=True):
                keys.setdefault(token, []).append(key)
            tap.clear()
    assert sum(map(len, ids)) == atlas.info["tokens"]
    for feature in list(fired)[::40]:
        assert atlas.table.cosine[feature] == pytest.approx(np.mean(fired[feature]), abs=1e-4)
        register = np.mean(fired[feature]) > table.REGISTER
        page = atlas.feature(5, 3, feature)
        assert page.row["partition"] == ("register" if register else "bundle")
        mean = {t: float(v[feature] @ torch.stack(k).mean(0)) for t, k in keys.items() if len(k) >= native.LEAST}
        best = sorted(mean, key=lambda t: -abs(mean[t]))[: native.KEYS]
        found = page.answers["keys"]
        assert [x["cosine"] for x in found] == pytest.approx([mean[t] for t in best], abs=1e-4)
        assert all(x["token"] == tokenizer.decode([x["id"]]) and x["n"] == len(keys[x["id"]]) for x in found)


def test_promoted_tokens_of_another_family(monkeypatch):
    model, tokenizer = writesae.models.load(families()["mamba2"])
    site = model_layers(model)[1]
    sae = writesae.SAE(site.K, site.V, 8, 2, layer=site.layer_index, head=1)
    found, why = promoted.facts(sae, model, site.layer_index, 1, 4096)
    expected = writesae.atoms.promoted_tokens(model, tokenizer, sae, 5, 10)
    assert found["promoted"][5].as_py() == [x.token for x in expected] and not why

    def unknown(*_):
        raise ValueError("model: expected an output projection, got none")

    monkeypatch.setattr(writesae.atoms, "output_map", unknown)
    found, why = promoted.facts(sae, model, site.layer_index, 1, 4096)
    assert found["promoted"][5].as_py() == [] and found["neighbour"][5].as_py()
    assert why == {"promoted": "model: expected an output projection, got none"}


def test_dictionaries_of_another_store_are_refused(embedded, tmp_path):
    *_, atlas = embedded
    other = writesae.SAE.from_pretrained(atlas.dictionaries[5, 3])
    with torch.no_grad():
        other.w_dec[0] *= -1
    other.save_pretrained(tmp_path / "L5H3")
    with pytest.raises(ValueError, match="sae: expected the dictionary of 5:3 that the store was collected with"):
        Atlas.open(atlas.store.path, tmp_path, progress=False)


def test_what_fires_in_a_text(embedded):
    model, tokenizer, saes, atlas = embedded
    text = "def read(path):\n    with open(path) as"
    found = atlas.live.text(text, top=3)
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    assert "".join(found["tokens"]) == tokenizer.decode(ids)
    with torch.no_grad(), writesae.attach(model, saes) as tap:
        model(torch.tensor([ids]))
    f = tap.firings
    for position in range(len(ids)):
        mine = f.position == position
        expected = sorted(zip(f.activation[mine].tolist(), f.feature[mine].tolist(), strict=True), reverse=True)[:3]
        shown = [(x["activation"], x["feature"]) for x in found["firings"] if x["position"] == position]
        assert [b for _, b in shown] == [b for _, b in expected]
        assert [a for a, _ in shown] == pytest.approx([a for a, _ in expected], rel=1e-4)


def test_comparing_with_an_edit(embedded):
    model, tokenizer, saes, atlas = embedded
    text = "def read(path):\n    with open(path) as"
    fires = [x["feature"] for x in atlas.live.text(text)["firings"]]
    feature = Counter(fires).most_common(1)[0][0]
    edit = {"kind": "scale", "layer": 5, "head": 3, "feature": feature, "factor": -500.0}
    *events, last = atlas.live.compare(text, [edit], 8)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    generated = {"plain": model.generate(ids, max_new_tokens=8, do_sample=False)}
    policy = writesae.Scale({(5, 3): [feature]}, -500.0)
    with writesae.attach(model, saes, policies=[policy]) as tap:
        generated["edited"] = model.generate(ids, max_new_tokens=8, do_sample=False)
    done = last["done"]
    for side, out in generated.items():
        assert [e["id"] for e in events if e["side"] == side] == out[0, ids.shape[1] :].tolist()
        assert "".join(e["token"] for e in events if e["side"] == side) == done[side]
    assert done["applied"] == [tap.policies[0].total] and done["applied"][0] > 0
    differs = (generated["plain"] != generated["edited"])[0].nonzero().flatten().tolist()
    assert done["first_difference"] == (differs[0] - ids.shape[1] if differs else None)
    assert len(done["kl"]) == 8 and max(done["kl"]) > 1e-3


def test_erasing_and_installing(embedded):
    *_, atlas = embedded
    for edit, moves in (
        ({"kind": "install", "strength": 0.0}, False), ({"kind": "install", "strength": 1e5}, True),
        ({"kind": "erase"}, False), ({"kind": "erase", "what": "atom"}, False),
    ):  # fmt: skip
        silent = int(atlas.table.count.argmin())  # of which there is nothing to erase
        *_, last = atlas.live.compare("import os", [{"layer": 5, "head": 3, "feature": silent, **edit}], 3)
        assert (max(last["done"]["kl"]) > 1e-3) == moves
        assert last["done"]["applied"] == [int(edit["kind"] == "install")]


def test_closing_a_comparison_lets_the_next_one_in(embedded):
    *_, atlas = embedded
    edit = {"kind": "erase", "layer": 5, "head": 3, "feature": 0}
    running = atlas.live.compare("import os", [edit], 200)
    next(running)
    running.close()
    assert atlas.live.text("import os")["tokens"][-1] == " os"


def test_live_refusals(embedded):
    *_, atlas = embedded
    live, edit = atlas.live, {"kind": "scale", "layer": 5, "head": 3, "feature": 0, "factor": 2.0}
    for call, message in (
        (lambda: live.text(""), "text: expected text"), (lambda: live.text("a " * 3000), "text: expected 1 to 2,048"),
        (lambda: live.text("a", top=0), "top: expected"), (lambda: live.text("a", [(1, 1)]), "sites: expected a site"),
        (lambda: live.compare("a", []), "edits: expected a list of 1 to 16"),
        (lambda: live.compare("a", [{**edit, "kind": "melt"}]), r"edits\[0\].kind: expected one of erase, scale"),
        (lambda: live.compare("a", [edit, {**edit, "feature": 4096}]), r"edits\[1\].feature: expected 0 <= feature"),
        (lambda: live.compare("a", [{**edit, "factor": float("nan")}]), r"edits\[0\].factor: expected a number"),
        (lambda: live.compare("a", [{**edit, "positions": [-1]}]), r"edits\[0\].positions: expected"),
        (lambda: live.compare("a", [{**edit, "__proto__": 1}]), r"edits\[0\]: expected no __proto__"),
        (lambda: live.compare("a", [edit], 10_000), "max_new_tokens: expected"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
