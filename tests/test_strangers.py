"""Strangers' files: no code runs, nothing large is taken on their word, what is wrong is named (see `fuzz/` too)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import made_up
from test_sae import F, K, V, published, some_sae

from writesae import SAE
from writesae.cli import main
from writesae.report import build, load_run
from writesae.report.html import _says, verdict
from writesae.sae import load_published
from writesae.untrusted import read_json

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "fuzz"))
from watch import in_child  # noqa: E402


@pytest.mark.parametrize(
    "module, function, count",
    [("hostile_dictionaries", "folders", 100), ("hostile_dictionaries", "published", 64),
     ("hostile_models", "folders", 56), ("hostile_runs", "injected", 60)],
)  # fmt: skip
def test_hostile_files(module, function, count):
    found = in_child(module, function, seed=20, count=count)
    assert found["cases"] == count and found["bad"] == []
    assert found["refused"] > count / 8


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from hostile_models import a_model

    folder = tmp_path_factory.mktemp("model")
    a_model(folder)
    return folder


@pytest.mark.parametrize("stdin", ["y\n", None])
def test_code_of_a_model_runs_only_when_allowed(model_folder, tmp_path, stdin):
    """Nobody is asked, whatever waits on standard input."""
    marker = tmp_path / "owned"
    config = json.loads((model_folder / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    some_sae().save_pretrained(tmp_path / "sae")
    (tmp_path / "text.txt").write_text("w1 w2")
    command = [sys.executable, "-m", "writesae.cli", "collect", str(tmp_path / "text.txt"), "--model", str(folder),
               "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out"), "--yes"]  # fmt: skip
    how = {"input": stdin} if stdin else {"stdin": subprocess.DEVNULL}
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **how)
    assert out.returncode == 2 and not marker.exists()
    last = out.stderr.splitlines()[-1]
    assert str(folder) in last and "--trust-remote-code" in last and "Traceback" not in out.stderr
    if stdin:
        subprocess.run([*command, "--trust-remote-code"], capture_output=True, cwd=ROOT, input="")
        assert marker.exists()


@pytest.mark.parametrize("command", ["train", "collect", "replace"])
def test_every_command_with_a_model_can_allow_its_code(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--trust-remote-code" in capsys.readouterr().out


def test_weights_that_are_missing_are_not_made_up(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from writesae.models import load

    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("out_proj.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the weights are without .*out_proj.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_damaged_file_of_a_model_is_named(model_folder, tmp_path, name):
    from writesae.models import load

    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}: not "):
        load(tmp_path)


def test_a_repository_is_checked_like_a_folder(model_folder, monkeypatch):
    import huggingface_hub

    from writesae.models import load

    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        if name == "some/nothing":
            raise OSError("offline")
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert not load("some/model")[0].training
    load("some/model", trust_remote_code=True)
    assert [("*.py" in patterns, "*.bin" in patterns) for _, patterns in asked] == [(False, False), (True, False)]
    with pytest.raises(ValueError, match="'some/nothing': no such folder, and not to be had from the hub: offline"):
        load("some/nothing")


# ---- dictionaries ---------------------------------------------------------------------------------------------------


def test_a_double_beyond_single_precision_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    some_sae().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    for dtype, value in ((torch.float64, 1e300), (torch.int8, 1), (torch.bool, 1), (torch.complex64, 1)):
        save_file({**tensors, "b_enc": torch.full((F,), value, dtype=dtype)}, tmp_path / "sae.safetensors")
        with pytest.raises(ValueError, match=r"sae.safetensors: b_enc: expected dtype torch.float32 .* got "):
            SAE.from_pretrained(tmp_path)


def test_sites_and_thresholds_are_checked(tmp_path):
    sae = some_sae(sparsity="threshold")
    with torch.no_grad():
        sae.threshold[2] = -1
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="threshold: expected values >= 0, got -1"):
        SAE.from_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"layer": "../../x"}, "layer: expected an integer >= 0 or None, got '../../x'"),
        ({"head": True}, "head: expected an integer >= 0 or None, got True"),
        ({"model": 3}, "model: expected a name or None, got 3"),
        ({"centred": "yes"}, "centred: expected true or false"),
        ({"metrics": [1]}, "metrics: expected a dictionary or None"),
        ({"metrics": {"fvu": "<b>"}}, "metrics: fvu: expected a number"),
        ({"d_sae": 2**50, "K": 2**20, "V": 2**20}, r"F: expected F \* K \* V <= "),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"cfg.json: {message}"):
            SAE.from_pretrained(tmp_path)


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    some_sae().save_pretrained(tmp_path)
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    SAE.from_pretrained(tmp_path)
    assert torch.equal(torch.randn(3), expected)


def test_a_dictionary_is_not_saved_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "sae.safetensors").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="symbolic link"):
        some_sae().save_pretrained(tmp_path / "sae")
    assert (tmp_path / "precious").read_text() == "mine"


def test_deep_json_is_refused(tmp_path):
    for text in ("[" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5, '{"a": ' + "[" * 100 + "]" * 100 + "}"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="x.json: not JSON"):
            read_json(tmp_path / "x.json")


def a_file(path: Path, kind="bilinear", config=None, **tensors) -> Path:
    state = published(kind) | tensors
    torch.save({"model_state_dict": state, "config": {"k": 3, "d_k": K, "d_v": V, **(config or {})}}, path)
    return path


@pytest.mark.parametrize(
    "kind, config, tensors, message",
    [
        ("bilinear", {"use_batchtopk": True, "threshold": -1}, {}, "threshold: expected a finite number >= 0, got -1"),
        ("bilinear", {"use_batchtopk": True}, {"threshold": torch.tensor(-1.0)}, "threshold: expected values >= 0"),
        ("bilinear", {}, {"threshold": torch.tensor(1.0)}, "threshold: only a BatchTopK dictionary has one"),
        ("bilinear", {"d_k": V, "d_v": K}, {}, "d_k: 9, but V_dec says K = 6 .K and V swapped"),
        ("bilinear_flat", {"d_k": V, "d_v": K}, {}, "d_k: 9, but V_enc says K = 6"),
        ("flat", {"d_k": V, "d_v": V}, {}, "decoder.bias: expected K.V = 81 entries, got 54"),
        ("bilinear", {"k": 10**6}, {}, "k: expected at most the 20 atoms"),
        ("bilinear", {"k": "3"}, {}, "k: expected an integer >= 1"),
        ("bilinear", {"layer": "../../x"}, {}, "layer: expected an integer >= 0"),
        ("bilinear", {}, {"b_enc": torch.zeros(F, dtype=torch.int8)}, "b_enc: expected a floating dtype"),
        ("bilinear", {}, {"bias": torch.full((K, V), 1e300, dtype=torch.float64)}, "bias: expected finite values"),
        ("bilinear", {}, {"bias": torch.zeros(V, K)}, r"bias: expected shape \(6, 9\), got \(9, 6\)"),
        ("bilinear", {}, {"V_dec": torch.zeros(1).expand(10**9)}, "a tensor of shape .* in a storage of 1 elements"),
        ("bilinear", {}, {"b_gate": torch.zeros(F)}, "expected all of b_gate, b_mag, r_mag"),
        ("bilinear", {}, {"V": torch.zeros(F, K)}, "tensors V do not belong to a bilinear dictionary"),
    ],
)
def test_published_files_are_checked(kind, config, tensors, message, tmp_path):
    path = a_file(tmp_path / "best.pt", kind, config, **tensors)
    with pytest.raises(ValueError, match=message):
        SAE.from_pretrained(path)


def test_sizes_given_for_a_flat_dictionary_must_agree(tmp_path):
    path = a_file(tmp_path / "best.pt", "flat", {"d_k": V, "d_v": K})
    with pytest.raises(ValueError, match="swapped"):
        load_published(path, K=K, V=V)
    path = a_file(tmp_path / "best.pt", "flat")
    (tmp_path / "config.json").write_text(json.dumps({"d_k": V, "d_v": K}))
    with pytest.raises(ValueError, match="d_k: 6, but 9 in the config.json beside it"):
        SAE.from_pretrained(path)


def test_archives_hold_what_they_claim(tmp_path):
    path = a_file(tmp_path / "best.pt")
    with zipfile.ZipFile(path) as file:
        records = [(name, file.read(name)) for name in file.namelist()]

    def rewritten(change, compression=zipfile.ZIP_STORED):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compression) as file:
            for name, data in records:
                file.writestr(name, change(name, data))
        path.write_bytes(out.getvalue())

    rewritten(lambda name, data: data)
    assert SAE.from_pretrained(path).F == F
    rewritten(lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="refused: .*a compressed record"):
        SAE.from_pretrained(path)
    rewritten(lambda name, data: data[:-4] if "/data/" in name else data)
    with pytest.raises(ValueError, match="claims other bytes than its record holds"):
        SAE.from_pretrained(path)


# ---- reports --------------------------------------------------------------------------------------------------------


def test_a_report_forbids_what_it_does_not_need(tmp_path):
    made_up(60).save(tmp_path)
    page = build(tmp_path, tmp_path).read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page).group(1)
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy and " style=" not in page
    assert page.index("Content-Security-Policy") < page.index("<title>")


def test_a_report_is_not_written_through_a_link(tmp_path):
    run, precious = tmp_path / "run", tmp_path / "precious"
    made_up(30).save(run)
    precious.write_text("mine")
    (run / "report.html").symlink_to(precious)
    with pytest.raises(ValueError, match="symbolic link"):
        build(run, run)
    (run / "report.html").unlink()
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / "plots", ignore_errors=True)
    (run / "plots").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic link"):
        build(run, run)
    assert precious.read_text() == "mine" and not list((tmp_path / "elsewhere").iterdir())


def test_every_colour_of_a_figure_has_one_for_dark_paper(tmp_path):
    """By a style sheet in the figure itself, which names what matplotlib wrote."""
    made_up(60).save(tmp_path)
    build(tmp_path, tmp_path)
    for path in (tmp_path / "plots").glob("*.svg"):
        text = path.read_text()
        light, _, rules = text.partition("@media (prefers-color-scheme:dark){")
        rules, _, drawn = rules.partition("</style>")
        asked = set(re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", drawn))
        there = set(re.findall(r'\[style\*="([^"]+)"\]', rules))
        assert len(asked) >= 5 and asked <= there, (path.name, asked - there)


@pytest.mark.parametrize(
    "low, high, atom, delete, expected",
    [
        (0.6, 0.7, 1.0, 2.0, "win"), (0.6, 0.7, 1.0, 1.0, "tie"), (0.6, 0.7, 1.0, 1.01, "tie"),
        (0.45, 0.55, 1.0, 2.0, "tie"), (0.38, 0.45, 2.0, 1.0, "loss"), (0.38, 0.45, 1.0, 1.0, "tie"),
        (0.6, 0.7, 2.0, 1.0, "tie"), (0.6, 0.7, 0.0, 0.0, "tie"),
    ],
)  # fmt: skip
def test_a_tie_is_called_a_tie(low, high, atom, delete, expected):
    found = verdict(low, high, atom, delete)
    assert found == expected
    says = _says({"is": found, "low": low, "high": high, "atom": atom, "delete": delete})
    assert says.startswith("A tie") == (expected == "tie")


def test_ties_sites_and_indentation_show(tmp_path):
    result = made_up(200)
    table = result.table
    for name in [n for n in table if n.startswith("forward:after.increment") and n.endswith(".atom")]:
        table[name] = table["forward:after.increment.delete"].copy()
    for i in range(len(result)):
        table["context"][i] = ["def f():", "\n", "        return", "\n\t", "x"] * 4
    result.save(tmp_path)
    page = build(tmp_path, tmp_path).read_text()
    assert '<b class="verdict tie">A tie' in page and "200 ties" in page
    assert "        return" in page and "⏎</span>\n\t" in page
    assert "Site by site" in page and page.count("<th>layer 4, head ") == 4  # read after, and before
    summary, _ = load_run(tmp_path)
    assert {s: x["ties"] for s, x in summary["sites"].items()} == {"4:0": 100, "4:1": 100}


def test_a_figure_of_one_feature_has_a_sensible_axis(tmp_path, monkeypatch):
    from writesae.report import plots

    seen, ticks = {}, {}
    draw = plots.draw

    def spy(path, size, paint, data=None):
        def watched(axes, colours):
            paint(axes, colours)
            seen[path.stem], ticks[path.stem] = axes.get_xlim(), list(axes.get_xticks())

        return draw(path, size, watched)

    monkeypatch.setattr(plots, "draw", spy)
    plots.feature_win_rates([0.8], 7, tmp_path / "p" / "one.svg")
    plots.win_rate_by(np.full(5, 0.3), np.ones(5, bool), "cosine", tmp_path / "p" / "by.svg")
    plots.ratio_densities(*[np.full(5, 1e-3)] * 3, tmp_path / "p" / "ratio.svg")
    assert seen["one"] == pytest.approx((0.49, 1.51)) and ticks["one"] == [1]
    assert all(seen[name][1] - seen[name][0] >= 0.199 for name in ("by", "ratio"))
