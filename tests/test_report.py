"""The report: every figure in one page, nothing fetched, nothing unescaped, and no model needed to draw it."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from writesae.experiments.conditions import CONDITIONS, arm, arms
from writesae.experiments.result import ReplacementResult
from writesae.report import build, load_run
from writesae.report.html import top_atoms

ROOT = Path(__file__).parents[1]
NATIVES, SCALES = ("increment", "outer"), ("coef", "matched")


def made_up(n=300, conditions=CONDITIONS, horizon=6, seed=0, spread=1.0, reads=("after", "before")):
    """A result with plausible numbers and awkward tokens."""
    draw = np.random.default_rng(seed)
    level = dict(native=0, atom=1e-3, random=4e-3, previous=3e-3, singular=5e-4, codebook=1.1e-3, zero=5e-3)
    decay = np.exp(-0.3 * np.arange(horizon + 1))
    words = ["def", " <b>", "&amp;", "\n", "\t", "self", ".", "é", '"', "</code>"]
    context = np.empty(n, object)
    context[:] = [[words[i] for i in draw.integers(0, len(words), 20)] for _ in range(n)]
    document = np.empty(n, object)
    document[:] = [f"pkg/<{i % 9}>.py" for i in range(n)]
    table = {
        "document": document, "passage": np.arange(n) // 4, "row": np.arange(n) % 7, "position": np.arange(n) % 50 + 1,
        "token": np.arange(n), "layer": np.full(n, 4), "head": np.arange(n) % 2, "feature": draw.integers(0, 20, n),
        "activation": draw.exponential(2, n) + 0.1, "native_norm": np.ones(n), "outer_norm": np.ones(n),
        "atom_norm": np.ones(n), "atom_size": np.full(n, 0.3),
        "cosine": draw.uniform(-0.2, 0.9, n), "context": context, "context_at": np.full(n, 12),
    }  # fmt: skip
    for direction in ("forward", "reverse"):
        for name in arms(NATIVES, SCALES, conditions, reads):
            noise = np.exp(spread * draw.standard_normal((n, 1)))
            table[f"{direction}:{name}"] = level.get(name.split(".")[-1], 2e-3) * noise * decay
            if name.startswith("after"):
                table[f"{direction}:{name}"][:, 0] = 0
    sites = {(4, h): {"kind": "bilinear", "F": 512, "k": 16, "K": 32, "V": 64, "metrics": {"fvu": 0.4}} for h in (0, 1)}
    return ReplacementResult(
        table, NATIVES, SCALES, tuple(conditions), horizon, 0, n, 12345, 10.0,
        {"tokens": 999, "passages": 9, "min_selected": 5, "features": {"4:0": 20}}, sites, reads,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    made_up().save(folder, model="a <tiny> model")
    build(folder, folder)
    return folder


def test_all_figures_are_inlined_and_nothing_is_fetched(folder):
    page = (folder / "report.html").read_text()
    figures = sorted((folder / "plots").glob("*.svg"))
    assert {f.stem for f in figures} == {
        "null_models", "kl_scatter", "ratio_densities", "horizon_curve", "feature_win_rates", "win_rate_by_cosine",
        "activation_histogram",
    }  # fmt: skip
    for figure in figures:
        data = figure.read_bytes()
        assert data.startswith(b"<svg ") and base64.b64encode(data).decode() in page
        numbers = figure.with_suffix(".csv").read_text().splitlines()
        assert len(numbers) > 2 and len({line.count(",") for line in numbers}) == 1
        assert f'href="plots/{figure.stem}.csv"' in page
    rest = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", rest)
    assert rest.count("<img") == len(figures)


def test_the_page_holds_the_numbers(folder):
    page = (folder / "report.html").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    population = summary["tests"]["after/increment/coef"]["mean"]["forward"]["population"]["mean"]
    for rate in (summary["win_rate"], summary["strict_chain"], summary["atom_vs_codebook"], population):
        assert f"{100 * rate:.1f}&#8239;%" in page
    for x in summary["table"]:
        for share in (x["beats_delete"], x["atom_beats"]):
            assert share is None or f"{100 * share['rate']:.1f}&#8239;%" in page
    for paper in ("92.4", "89.5", "89.8"):
        assert f"paper: {paper}&#8239;%" in page
    assert page.count('class="group"') == 8 and page.count("class=here") == 1
    assert "atom closer than an untrained codebook" in page and "at the write’s norm" in page
    for text in ("a &lt;tiny&gt; model", "pkg/&lt;", "<mark>", "FVU 0.400", "Heads of layer 4", "previous write",
                 "negligible", "largest", "nothing here says that they were not chosen"):  # fmt: skip
        assert text in page
    assert "<b>&amp;amp;" not in page and " <b>" not in re.sub(r"<figcaption>.*?</figcaption>", "", page)
    opened = re.findall(r"<(section|div|table|figure|details)\b", page)
    assert len(opened) == len(re.findall(r"</(section|div|table|figure|details)>", page))


def test_a_run_survives_its_folder(folder):
    result = made_up()
    summary, table = load_run(folder)
    assert summary["n"] == 300
    for name, column in result.table.items():
        assert table[name].tolist() == column.tolist(), name


@pytest.mark.parametrize(
    "n, conditions, spread", [(1, ("atom", "delete"), 1.0), (7, ("native", "atom", "delete", "random"), 0.0)]
)
def test_small_and_degenerate_runs_draw(tmp_path, n, conditions, spread):
    result = made_up(n, conditions, spread=spread)
    result.table[f"forward:{arm('increment', 'delete')}"][:] = 0  # exact zeros on logarithmic axes
    page = build((json.loads(json.dumps(result.summary(50))), result.table), tmp_path)
    assert page.read_text().startswith("<!doctype html>")


def test_reports_need_no_model_and_no_kernel(folder, tmp_path):
    code = (
        "import sys; from writesae.report.command import configure, run; import argparse; p = "
        "argparse.ArgumentParser();"
        f"configure(p); run(p.parse_args([{str(folder)!r}, '--out', {str(tmp_path)!r}]));"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers') or m == 'writesae.ops'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = out.stdout.splitlines()
    assert lines == [str(tmp_path / "report.html"), "[]"]
    assert (tmp_path / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="without summary.json"):
        load_run(tmp_path)
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="not finished"):
        load_run(tmp_path)


def test_a_condition_of_ones_own_and_a_chosen_site_show(tmp_path):
    result = made_up(60, ("native", "atom", "delete", "mine"), reads=("before",))
    result.sites[4, 1]["chosen_of"] = 7
    result.save(tmp_path)
    summary = result.summary(200)
    pooled = {(r["condition"], r["scale"]): r for r in summary["pooled"]}
    assert {r["n"] for r in summary["pooled"]} == {60} == {sum(x["n"] for x in summary["sites"].values())}
    assert pooled["mine", "coef"]["kl_median"] == np.median(result.kl("increment", "mine", "coef"))
    page = build(tmp_path, tmp_path).read_text()
    assert "<th>mine</th>" in page and "all 2 sites pooled" in page
    assert page.count("was chosen by its outcome") == 1 and "Layer 4, head 1 was chosen by its outcome: of 7 " in page
    assert "untrained codebook</div>" not in page  # there was none
    assert "before the token reads it" in page and page.count("<details") == 3  # two sites, and both


@pytest.mark.parametrize("rule, says", [("all heads", "all heads of the layers"), ("longest memory", "longest memory")])
def test_the_rule_of_the_sites_is_named(tmp_path, rule, says):
    result = dataclasses.replace(made_up(40), rule=rule)
    assert says in build((result.summary(50), result.table), tmp_path).read_text()


ABOUT = {"promoted": [[" <b>def", 3.21], ["\n", 1.5]], "answers_to": [["self", -0.5]], "neighbours": [[17, 0.25]]}


def test_what_is_known_of_atoms_stands_beside_them(tmp_path):
    result = made_up(60)
    (layer, head, feature), _ = top_atoms(result.table)[0]
    result.save(tmp_path, atoms={f"{layer}:{head}": {str(feature): ABOUT}})
    page = build(tmp_path, tmp_path).read_text()
    for text in ('<code title="+3.21"> &lt;b&gt;def</code>', ">⏎</code>", '<code title="−0.50">self</code>',
                 '<code title="+0.25">17</code>'):  # fmt: skip
        assert page.count(text) == 1, text
    for wrong in ({"promoted": [["x"]]}, {"answers_to": [[7, 1.0]]}, {"neighbours": [["7", 1.0]]}):
        result.save(tmp_path, atoms={f"{layer}:{head}": {str(feature): {**ABOUT, **wrong}}})
        with pytest.raises(ValueError, match=rf"atoms.{layer}:{head}.{feature}.{next(iter(wrong))}.0.: expected"):
            build(tmp_path, tmp_path)
