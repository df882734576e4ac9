"""The paper's report: every claim beside what was found, what is missing said, and nothing of a stranger's runs."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from writesae import cli
from writesae.paper.study import VERDICTS, Answer, Claim, Figure, Findings, Setting, Study, remember, save
from writesae.report import paper

ROOT = Path(__file__).parents[1]
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>\u202e{{ 7 * 7 }}'


def study(name, claims=(), **more):
    return Study(name, f"All about {name}", "What it is.", tuple(claims), {"size": Setting(9, 3, "size")}, None, **more)


def findings(answers, figures=1):
    def paint(axes, colours):
        axes.plot([0, 1, 3], color=colours["atom"])

    share = {"statistic": "Wilson 95 %", "n": 1234, "count": 800, "rate": 0.648, "ci95": [0.62, 0.675]}
    return Findings(
        {"tokens": 99, "sites": {"5:3": {"share": share}}, "sweep": [{"threshold": 0.1, **share}]},
        {"rows": {"layer": np.arange(3), "x": np.array([0.5, 1.5, -1.0])}},
        {f"curve_{i}": Figure(paint, f"Curve {i} goes up.") for i in range(figures)}, list(answers), ["A note."],
    )  # fmt: skip


def record(name, **more):
    return {
        "command": f"writesae paper {name}", "model": "default", "seed": 0, "quick": False, "settings": {"size": 9},
        "texts": {"test": "stdlib:test"}, "seconds": 12.3, "versions": {"torch": "2"}, **more,
    }  # fmt: skip


def claims_of(name):
    return [
        Claim(f"{name}.a", "Atoms are closer than deletion.", "92.4 % of 4,851 firings"),
        Claim(f"{name}.b", "Something it gives no number for.", "–", "its sources define none"),
    ]


def answers_of(name, verdict="holds"):
    return [
        Answer(f"{name}.a", "64.8 %", 1234, "firings", (62.0, 67.5), "the codebook wins 63 %", verdict),
        Answer(f"{name}.b", "0.3", 7, "prompts", None, "not measured", "cannot be told", "7 prompts are too few"),
    ]


@pytest.fixture
def folder(tmp_path):
    known = [study(name, claims_of(name)) for name in ("second", "first", "broken", "never")]
    for one, verdict in zip(known[:2], ("holds", "does not hold"), strict=True):
        save(one, findings(answers_of(one.name, verdict)), tmp_path / one.name, record(one.name))
    remember(tmp_path, known, ["second", "first", "broken"], {"broken": "places: expected <more>, got none"})
    return tmp_path


class Tags(HTMLParser):
    """Every tag with its attributes; whether all that were opened are closed."""

    EMPTY = ("meta", "img", "source", "br", "link")

    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def allowed(page):
    """Fails on a tag, attribute or address that a page has no need of; returns the page's text."""
    tags = Tags(page)
    assert not tags.open
    for tag, attributes in tags.found:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "svg"), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
        assert re.fullmatch(r"#[\w-]+|[\w./-]+\.csv", attributes.get("href", "#a"))
    assert "default-src 'none'" in next(a["content"] for tag, a in tags.found if a.get("http-equiv"))
    return " ".join("".join(tags.text).split())


def test_every_claim_is_told_with_what_was_found(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = (folder / "report.html").read_text()
    text = allowed(page)
    for words in ("Of 4 claims 1 holds here, 1 does not hold, 2 cannot be told", "92.4 % of 4,851 firings", "64.8 %",
                  "For 2 of them the paper gives a number; of those 1 holds and 1 does not.",
                  "95 %: 62 to 67.5", "n = 1,234 firings", "the codebook wins 63 %", "its sources define none",
                  "no interval: 7 prompts are too few", "writesae paper second", "Curve 0 goes up.", "A note.",
                  "rows.csv (3)", "broken failed: places: expected <more>, got none",
                  "Not run: All about never (never)", "sites · 5:3 · share", "rate 0.648", "0.62 to"):  # fmt: skip
        assert words in text, words
    assert text.index("All about second") < text.index("All about first")  # the studies' order, not the alphabet's
    assert [tag for tag, _ in Tags(page).found].count("img") == 2
    assert page.count('href="second/rows.csv"') == 1 == page.count('href="first/rows.csv"')
    assert set(paper.VERDICTS) == set(VERDICTS)


def test_quick_runs_and_different_models_are_warned_of(folder):
    assert "quick run" not in paper.build(folder).read_text()
    save(study("first", claims_of("first")), findings(answers_of("first")), folder / "first",
         record("first", quick=True, model="another"))  # fmt: skip
    text = allowed(paper.build(folder).read_text())
    assert "Some studies are quick runs." in text and "The studies are of different models" in text


def test_hostile_words_in_every_field_run_nothing(folder):
    def poisoned(x):
        if isinstance(x, dict):
            return {name: value if name in ("verdict", "study", "key", "claim") else poisoned(value)
                    for name, value in x.items()}  # fmt: skip
        return [poisoned(one) for one in x] if isinstance(x, list) else EVIL if isinstance(x, str) else x

    for name in ("first", "second"):
        path = folder / name / "summary.json"
        summary = poisoned(json.loads(path.read_text()))
        summary["statistics"][EVIL] = {EVIL: {"n": 3, EVIL: EVIL, "x": 1.0, "statistic": EVIL, "ci95": [EVIL, 2]}}
        summary["settings"][EVIL] = [EVIL]
        summary["texts"][EVIL], summary["versions"][EVIL] = EVIL, EVIL
        path.write_text(json.dumps(summary))
    run = json.loads((folder / "paper.json").read_text())
    for one in run["studies"]:
        one.update(title=EVIL, failed=EVIL if one["failed"] else None)
    (folder / "paper.json").write_text(json.dumps(run))
    text = allowed(paper.build(folder).read_text())
    assert "<script>alert(1)</script>" in text and "\u202e" not in text and "{{ 7 * 7 }}" in text


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda s: s.update(study="../x"), "summary.json.study: expected a name"),
        (lambda s: s["figures"].update({"../../secret": "x"}), "figures: a key: expected a name"),
        (lambda s: s["figures"].update(absent="x"), "absent.svg: cannot be read"),
        (lambda s: s["tables"].update(rows="many"), "tables.rows: expected an integer"),
        (lambda s: s["answers"][0].update(verdict="wonderful"), "verdict: expected one of holds"),
        (lambda s: s["answers"].pop(), "answers: expected one for each claim"),
        (lambda s: s["answers"][0].update(ci95=[1]), "ci95: expected a list of 2"),
        (lambda s: s.update(quick="no"), "quick: expected true or false"),
        (lambda s: s.update(notes="one"), "notes: expected a list"),
    ],
)
def test_a_study_that_cannot_be_read_is_named_and_the_others_shown(folder, change, why):
    path = folder / "first" / "summary.json"
    summary = json.loads(path.read_text())
    change(summary)
    path.write_text(json.dumps(summary))
    text = allowed(paper.build(folder).read_text())
    assert "first cannot be read: " in text and why in text and "All about second" in text
    assert "Of 2 claims" in text


def test_a_picture_that_is_none_is_not_shown(folder):
    (folder / "first" / "plots" / "curve_0.svg").write_text("<script>alert(1)</script>")
    assert "expected an SVG picture" in allowed(paper.build(folder).read_text())


def test_a_folder_without_studies_is_refused(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="expected a folder with studies of the paper that can be read, got none"):
        paper.build(empty)
    assert not paper.is_run(empty) and paper.is_run(folder)


def test_what_failed_once_is_forgotten_when_it_ran(folder):
    known = [study(name) for name in ("second", "first", "broken", "never")]
    remember(folder, known, ["first"], {})
    assert [x["failed"] is None for x in json.loads((folder / "paper.json").read_text())["studies"]] == [
        True, True, False, True,
    ]  # fmt: skip
    remember(folder, known, ["broken"], {})
    assert all(x["failed"] is None for x in json.loads((folder / "paper.json").read_text())["studies"])


def test_it_needs_no_model(folder):
    code = (
        "import sys; from writesae.report import paper;"
        f"paper.build({str(folder)!r});"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'matplotlib')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_a_statistic_is_whatever_says_its_n():
    rows = paper.statistics(
        {"a": {"b": {"n": 3, "mean": 0.5, "note": "x" * 99}}, "c": [{"n": 2, "d": {"n": 1}}], "e": 5}
    )
    assert [(row["what"], row["n"]) for row in rows] == [("a · b", 3), ("c · 1", 2), ("c · 1 · d", 1)]
    assert rows[0]["values"] == [("mean", "0.5")]
