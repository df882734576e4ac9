"""Reports of collections and of trainings, what tells the kinds of runs apart, and links into a feature browser."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
from test_paper_report import EVIL, Tags

from writesae import Store, cli
from writesae.browse import link, sample_store
from writesae.report import audit, collect, kinds, train
from writesae.report.links import Links

SITES = ((0, 0), (0, 3), (7, 1))
BROWSER = "http://127.0.0.1:8000"


def allowed(page: str) -> str:
    """Fails on a tag, attribute or address that these pages have no need of; returns the page's text."""
    tags = Tags(page)
    assert not tags.open
    for tag, attributes in tags.found:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "svg"), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        assert attributes.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
        assert re.fullmatch(r"[\w./-]+\.(csv|html)|http://127[\w.:/]+", attributes.get("href", "a.csv")), attributes
    assert "default-src 'none'" in next(a["content"] for tag, a in tags.found if a.get("http-equiv"))
    return " ".join("".join(tags.text).split())


def rows(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- collections ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder, _ = sample_store(tmp_path_factory.mktemp("store"), SITES, 64, 20_000, context=64, dictionaries=False)
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder, _ = sample_store(
        tmp_path_factory.mktemp("hostile"), SITES, 32, 8_000, context=64, dictionaries=False, hostile=True
    )
    return folder


def test_a_collection_has_a_page_with_its_numbers(store, tmp_path):
    text = allowed(collect.build(store, tmp_path).read_text())
    opened = Store(store)
    counts, summary = opened.counts().to_pandas(), opened.summary()
    by_site = counts.groupby(["layer", "head"])
    assert f"{summary['tokens']:,}tokens" in text and f"{summary['firings']:,}firings" in text
    found = {(int(row["layer"]), int(row["head"])): row for row in rows(tmp_path / "sites.csv")}
    assert set(found) == set(SITES)
    for site, mine in by_site:
        row, alive = found[site], mine[mine["count"] > 0]
        assert int(row["firings"]) == mine["count"].sum() and int(row["alive"]) == len(alive)
        assert float(row["median_density"]) == pytest.approx(alive["count"].median() / summary["tokens"])
        assert float(row["max"]) == pytest.approx(mine["max"].max())
        assert f"layer {site[0]}, head {site[1]}" in text
    top = counts[counts["count"] < 0.1 * summary["tokens"]].sort_values("count", ascending=False).iloc[0]
    assert f"Atom {top['feature']:.0f}layer" in text.replace(" layer", "layer") or f"Atom {top['feature']:.0f} " in text
    densities = rows(tmp_path / "plots" / "densities.csv")
    assert sum(int(row["atoms"]) for row in densities) == (counts["count"] > 0).sum()
    curve = rows(tmp_path / "plots" / "concentration.csv")
    assert float(curve[0]["share_of_firings"]) == 0 and float(curve[-1]["share_of_firings"]) == pytest.approx(1)


def test_the_collection_itself_is_left_alone(store, capsys):
    out = store.with_name("firings-report")
    assert cli.main(["report", str(store)]) == 0
    said, err = capsys.readouterr()
    assert said == f"{out / 'report.html'}\n" and err == f"next: open {out}/report.html in a browser\n"
    assert Store(store).verify().sound and not (store / "report.html").exists()
    with pytest.raises(ValueError, match="out: expected a folder outside the collection"):
        collect.build(store, store / "page")


def test_atoms_are_linked_where_there_is_a_browser(store, tmp_path):
    page = collect.build(store, tmp_path / "a", BROWSER + "/").read_text()
    layers = re.findall(rf'<a href="{BROWSER}/(\d+)/(\d+)/(\d+)">Atom (\d+)</a><span> layer (\d+), head (\d+)', page)
    assert len(layers) == collect.TOP and all(x[:3] == (*x[4:], x[3]) for x in layers)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").touch()
    page = collect.build(store, tmp_path / "a", str(tmp_path / "pages")).read_text()
    layer, head, feature = layers[0][:3]
    assert f'href="../pages/L{layer}H{head}/{feature}.html"' in page
    allowed(page)
    assert "Atom" in (page := collect.build(store, tmp_path / "a").read_text()) and page.count("<a ") == 4


@pytest.mark.parametrize("mode", ["top", "reservoir"])
def test_a_collection_of_some_firings_has_a_page(mode, tmp_path):
    made, _ = sample_store(tmp_path, SITES[:1], 16, 2_000, mode=mode, n=3, context=64, dictionaries=False)
    page = collect.build(made, tmp_path / "out").read_text()
    assert ("No text" in page or "no text is shown" in page) == (mode == "reservoir")
    assert ("<mark>" in page) == (mode == "top") and "sites.svg" not in os.listdir(tmp_path / "out" / "plots")


def test_an_unfinished_collection_is_refused(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    (tmp_path / "copy" / "summary.json").unlink()
    with pytest.raises(ValueError, match="^run: the collection in .* is not finished: run the same"):
        kinds.build(tmp_path / "copy")
    summary = tmp_path / "copy" / "summary.json"
    summary.write_text("{}")
    with pytest.raises(ValueError, match="^run: .*summary.json"):
        kinds.build(tmp_path / "copy")


def test_hostile_text_stays_text(hostile, tmp_path):
    page = collect.build(hostile, tmp_path, BROWSER).read_text()
    text = allowed(page)
    assert "<script>document.title='ran'</script>" in text and "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x1b\u202e\u2066]", page)


def test_many_sites_are_drawn_as_a_map(tmp_path):
    sites = [
        {"layer": layer, "head": head, "alive": layer + head, "atoms": 40, "firings_per_token": 1.0}
        for layer in (2, 5, 9) for head in range(20) if (layer, head) != (5, 7)
    ]  # fmt: skip
    count = np.arange(1, 50)
    figures = collect._figures({"count": count}, sites, 1000, tmp_path / "plots")
    assert len(figures) == 3 and len(rows(tmp_path / "plots" / "sites.csv")) == len(sites)
    assert "layers up" in figures[2][2]
    assert not collect._figures({"count": 0 * count}, sites, 1000, tmp_path / "plots")


# ---- trainings ------------------------------------------------------------------------------------------------------

NAMES = ("k4/L5H3", "k4/L2H1", "k8/L5H3", "k8/L2H1")


def training(folder, names=NAMES, diverged=(), **more):
    """The folder of a training that ended, with made-up numbers."""
    metrics = {
        name: {
            "states": 2048, "fvu": math.nan if name in diverged else 0.7 - 0.1 * i, "l0": 4.0 + i, "dead": i,
            "alive": 256 - i, "cosine_median": 0.4, "cosine_above_0.05": 1.0, "winner_cosine_median": 0.5,
            "winner_better_than_deletion": 0.9, "winner_error_median": 0.8,
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    config = {"F": 256, "k": 4, "target": "state", "steps": 40, "text_seed": None}
    variants = {name.rpartition("/")[0]: config for name in names}
    record = {"model": "default", "seconds": 12.5, "config": variants if "" not in variants else config,
              "metrics": metrics, "left_out": {}, **more}  # fmt: skip
    history: list = []
    for step in range(40):
        history += [{"step": step, "layer": 5, "head": 3, "loss": 1 / (1 + step), "aux": 0.0, "dead": 0, "rate": 1e-3}
                    for _ in names]  # fmt: skip
        if step % 20 == 19:
            look = {name: 0.9 - step / 100 for name in names}
            fvu = look | dict.fromkeys(diverged, math.nan)
            history.append({"step": step + 1, "held_out_fvu": fvu, "held_out_l0": look, "dead": dict.fromkeys(names, 2),
                            "beats_deletion": look})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(record))
    (folder / "training.json").write_text(json.dumps(history))
    return folder


def test_a_training_has_a_page_with_its_numbers(tmp_path, capsys):
    assert cli.main(["report", str(training(tmp_path / "run"))]) == 0
    out = tmp_path / "run-report"
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    text = allowed((out / "report.html").read_text())
    for words in ("4 dictionaries of states at 2 sites · variants k4, k8 · 40 steps · 12 s", "best 0.400: k8/L2H1",
                  "6 of 1,024", "90.0\u202f%", "text_seed None"):  # fmt: skip
        assert " ".join(words.split()) in text, words
    assert [row["dictionary"] for row in rows(out / "dictionaries.csv")] == list(NAMES[::-1])
    looks = rows(out / "plots" / "held_out_fvu.csv")
    assert [row["step"] for row in looks] == ["20", "40"] and float(looks[0]["k8/L5H3"]) == pytest.approx(0.71)
    losses = rows(out / "plots" / "loss.csv")
    assert len(losses) == 40 and float(losses[3]["loss"]) == pytest.approx(0.25)
    assert {path.stem for path in (out / "plots").glob("*.svg")} == {*train.LOOKS, "loss", "fvu_l0"}


def test_one_dictionary_and_one_that_diverged(tmp_path):
    page = train.build(training(tmp_path / "one", ["L5H3"]), tmp_path / "a").read_text()
    assert "1 dictionary of states at 1 site ·" in allowed(page) and not (tmp_path / "a/plots/fvu_l0.svg").exists()
    text = allowed(train.build(training(tmp_path / "bad", diverged=NAMES[:1]), tmp_path / "b").read_text())
    assert "diverged" in text and [x["dictionary"] for x in rows(tmp_path / "b/dictionaries.csv")][-1] == NAMES[0]


def test_a_strangers_training_stays_text(tmp_path):
    names = [f"{EVIL}$x_{{1}}$/L1H1", f"=cmd|{EVIL}/L2H2"]
    run = training(tmp_path / "run", names, model=EVIL)
    text = allowed(train.build(run, tmp_path / "out").read_text())
    assert EVIL.replace("\u202e", "") in text and "\u202e" not in text
    assert all(row["dictionary"][0] != "=" for row in rows(tmp_path / "out" / "dictionaries.csv"))
    for figure in (tmp_path / "out" / "plots").glob("*.svg"):
        tags = "".join(re.findall(r"<[^>]*>", figure.read_text()))
        assert "<script" not in tags and "onerror=" not in tags


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda r, h: r.pop("model"), "metrics.json: expected an entry model"),
        (lambda r, h: r["metrics"]["k4/L5H3"].update(dead="<b>"), "metrics.k4/L5H3.dead: expected an integer"),
        (lambda r, h: r["metrics"].clear(), "metrics.json.metrics: expected at least one dictionary"),
        (lambda r, h: h[0].update(loss=[1]), r"training.json\[0\].loss: expected a number, got a list"),
        (lambda r, h: h.insert(0, 7), r"training.json\[0\]: expected an object"),
        (lambda r, h: h[-1].pop("dead"), "expected an entry dead"),
    ],
)
def test_other_than_a_trainings_numbers_are_refused_by_name(change, why, tmp_path):
    training(tmp_path)
    record, history = (json.loads((tmp_path / name).read_text()) for name in ("metrics.json", "training.json"))
    change(record, history)
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    (tmp_path / "training.json").write_text(json.dumps(history))
    with pytest.raises(ValueError, match=f"^run: .*{why}"):
        train.build(tmp_path, tmp_path / "out")


# ---- kinds and links ------------------------------------------------------------------------------------------------


def test_an_unknown_folder_is_told_what_there_is(tmp_path, capsys):
    def said(path) -> str:
        with pytest.raises(ValueError) as error:
            kinds.build(path)
        assert all(kind.name in str(error.value) for kind in kinds.KINDS)
        return str(error.value).rpartition("; got ")[2]

    assert said(tmp_path / "none").endswith("which is not there")
    assert said(tmp_path).endswith("which is empty")
    (tmp_path / "a\x1b[31m.txt").write_text("")
    assert said(tmp_path / "a\x1b[31m.txt").endswith("which is a file")
    (tmp_path / "b").mkdir()
    assert said(tmp_path).endswith(r"which holds a\x1b[31m.txt, b/")
    (tmp_path / "summary.json").write_text('{"test": "another"}')
    assert "its summary.json is of 'another'" in cli_error(["report", str(tmp_path)], capsys)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="a training that did not end; `writesae train --resume` goes on"):
        kinds.kind_of(tmp_path)


def cli_error(words, capsys) -> str:
    assert cli.main(words) == 2
    return capsys.readouterr().err


def test_every_kind_has_one_sign(store, tmp_path):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "summary.json").write_text(json.dumps({"test": audit.TEST}))
    (tmp_path / "parts").mkdir()
    for folder, name in ((store, "collect"), (training(tmp_path / "t"), "train"), (tmp_path / "audit", "audit"),
                         (tmp_path, "replace or demo")):  # fmt: skip
        assert kinds.kind_of(folder).name == name
    with pytest.raises(ValueError, match=r"browse: expected a run that names atoms \(collect, replace or demo\)"):
        kinds.build(tmp_path / "audit", browse=BROWSER)


@pytest.mark.parametrize(
    "browser, address",
    [
        (BROWSER, BROWSER + "/5/3/1258"), ("https://a.org/x/", "https://a.org/x/5/3/1258"), (None, None),
        ("https://a.org/x/index.html", "https://a.org/x/L5H3/1258.html"),
    ],
)  # fmt: skip
def test_an_atoms_address(browser, address, tmp_path):
    assert Links(browser, tmp_path)(5, 3, 1258) == address
    if address is not None:
        assert address.endswith("/" + link(5, 3, 1258, "index.html" in browser))


@pytest.mark.parametrize("browser", ["javascript://x/%0aalert(1)", "file:///etc", "http://", "http://a b/", "nowhere",
                                     'http://a/"onload=1', "http://a/?x=1", "http://a/\u202e"])  # fmt: skip
def test_an_address_that_is_none_is_refused(browser, tmp_path):
    with pytest.raises(ValueError, match="^browse: expected the address|^browse: expected an address"):
        Links(browser, tmp_path)
