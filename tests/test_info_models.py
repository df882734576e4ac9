"""`writesae info --models`: every class that is attached to, on a tiny instance."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from writesae import cli
from writesae.models import binding, tiny, trial


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_class_passes(capsys):
    """The command itself, of all classes whose libraries are installed here."""
    status = cli.main(["info", "--models"])
    said = capsys.readouterr().out
    assert status == 0, said
    made = len(tiny.every())
    assert f"{made} of {made} classes pass (logits, generate, edits, firings)" in said
    assert "Qwen3_5ForCausalLM" in said and "gated_delta_rule (scalar gate)" in said and "FAIL" not in said
    assert "transformers: tests run with" in said


def test_it_is_told_as_json_and_failures_by_name(capsys, monkeypatch, request):
    """A table that halves what is written: self-test and logits find it out, and the status says so."""
    right = next(b for b in binding.bindings if b.kind == "gated-delta" and not b.home)
    scan = right.recurrences[0]

    def halved(site, given):
        call = scan.bind(site, given)
        return replace(call, inputs={**call.inputs, "beta": call.inputs["beta"] / 2})

    wrong = replace(right, recurrences=(replace(scan, bind=halved), *right.recurrences[1:]))
    request.addfinalizer(lambda found=list(binding.bindings): binding.bindings.__setitem__(slice(None), found))
    binding.bindings[binding.bindings.index(right)] = wrong
    only = [t for t in tiny.every() if t.family in ("qwen3_5", "mamba2")]
    monkeypatch.setattr(trial, "every", lambda: only)
    monkeypatch.setattr(tiny, "absent", lambda: {"fla": ["gla"]})
    assert cli.main(["info", "--models", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    by_family = {row["family"]: row for row in found["models"]}
    assert found["not_installed"] == {"fla": ["gla"]}
    bad = by_family["qwen3_5"]
    assert not bad["passed"] and "self-test failed" in bad["checks"]["logits"]
    assert bad["rule"] == "gated_delta_rule" and bad["library"] == "transformers" and bad["release"] in bad["releases"]
    if "mamba2" in by_family:
        assert by_family["mamba2"]["passed"] and set(by_family["mamba2"]["checks"].values()) == {None}


def test_what_is_refused_by_name_passes_and_says_so(monkeypatch):
    def refuses(self):
        raise trial._Refused("dictionaries of this gate")

    monkeypatch.setattr(trial._Trial, "firings", refuses)
    monkeypatch.setattr(trial, "every", lambda: tiny.every()[:1])
    (found,) = trial.trials()
    assert found.passed and found.checks["firings"] == "refused: dictionaries of this gate"
