"""The README's examples run as printed, in any folder, and show what the README says they show. Its links and commands:
test_docs.py."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from writesae import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_example_shows_tokens_and_the_effect_of_its_edit(elsewhere, capsys):
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    *fired, plain, edited = capsys.readouterr().out.splitlines()
    assert len(fired) > 5
    for line in fired:
        assert re.fullmatch(r"('.*'|\".*\") +atom +\d+ \d+\.\d\d", line), line
    sons = [line.split("atom")[1].split()[0] for line in fired if line.startswith("'son'")]
    assert len(set(sons)) < len(sons), "one atom fires at both mentions of json"
    assert "json" in plain and "json" not in edited
    for line in (plain, edited):
        assert line in README


def test_the_collection_and_its_store(elsewhere, capsys):
    for line in blocks("sh")[0].splitlines():
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    capsys.readouterr()
    names: dict = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    assert len(names["frame"]) > 50_000 and set(names["frame"].columns) >= {"document", "position", "activation"}
    out = capsys.readouterr().out
    assert len(re.findall(r"^\d\.\d\d  .*\.py$", out, re.MULTILINE)) == 5


def test_the_example_is_short():
    assert blocks("python")[0].count("\n") <= 20
