"""The stand-ins of other families of write rules: what they are, how they are trained, and what is shipped of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import kda_families, mamba2_families, mamba_families

import writesae
from writesae.default import families
from writesae.models import layers, load
from writesae.models.tiny import fla_families

SCRIPTS = Path(__file__).parent.parent / "scripts"
OF_FLA = ("rwkv7", "deltanet", "gla")
KNOWN = {"mamba2": mamba2_families, "kda": kda_families, "mamba": mamba_families, **dict.fromkeys(OF_FLA, fla_families)}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stand_ins():
    """scripts/families_models.py"""
    spec = importlib.util.spec_from_file_location("families_models", SCRIPTS / "families_models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", KNOWN)
def test_stand_ins_are_small_and_of_recurrent_layers_alone(stand_ins, family):
    if not KNOWN[family]():
        pytest.skip(f"no {family} here")
    model = stand_ins.build_model(family)
    assert sum(p.numel() for p in model.parameters()) <= 4e6
    sites = layers(model)
    assert len(sites) == model.config.num_hidden_layers
    assert {s.K == s.V for s in sites} == {family in ("kda", "rwkv7")}
    assert all(not s.out_proj.weight.any() for s in sites)


@pytest.mark.skipif(not mamba2_families(), reason="this transformers has no Mamba-2 to stand in for")
def test_training_on_our_kernels_has_the_loss_and_gradients_of_the_models_own(stand_ins, capsys, monkeypatch):
    tiny = stand_ins.transformers.Mamba2Config(
        vocab_size=stand_ins.VOCAB, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=16, state_size=8,
        n_groups=1, expand=2, chunk_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = stand_ins.transformers.Mamba2ForCausalLM(tiny)
    stand_ins.check_kernels(model)
    assert "fast operators: loss differs" in capsys.readouterr().out

    def no_context(x, weight, bias, *_, **__):  # the last column of the kernel alone
        return torch.nn.functional.silu(x * weight[:, -1:] + bias[:, None])

    monkeypatch.setattr(stand_ins, "fast_conv", no_context)
    with pytest.raises(RuntimeError, match="disagree with transformers' own"):
        stand_ins.check_kernels(model)


@pytest.mark.parametrize("family", OF_FLA)
def test_flas_classes_train_on_our_kernels_as_token_by_token(stand_ins, family, capsys):
    if not fla_families():
        pytest.skip("needs flash-linear-attention")
    model = stand_ins.build_model(family)
    stand_ins.check_kernels(model)
    assert "gradient by" in capsys.readouterr().out
    assert not any(p.grad is not None for p in model.parameters())  # a model of its own was tried


@pytest.mark.skipif(bool(fla_families()), reason="flash-linear-attention is here")
def test_without_flas_library_its_models_are_refused_by_name(stand_ins, tmp_path):
    with pytest.raises(ValueError, match="--family: RWKV7 needs flash-linear-attention: pip install"):
        stand_ins.build_model("rwkv7")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gla", "hidden_size": 4}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a gla model is of flash-linear-attention, which is not installed: pip"):
        load(tmp_path)


@pytest.mark.parametrize("name", families())
def test_shipped_stand_ins_load_write_and_beat_counts_of_two_tokens(name):
    folder = families()[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    record = json.loads((folder / "training.json").read_text())
    assert record["family"] == name and record["complete"]
    for split in ("validation", "test"):
        assert record[split]["loss"] < record[split]["bigram_loss"] < record[split]["unigram_loss"]
    if not KNOWN[name]():
        pytest.skip(f"no {name} here")
    model, tokenizer = load(folder)
    _, ours = load()
    text = "import os\n\n\ndef main():\n    return os.path.join(a, b)\n"
    assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad(), writesae.attach(model, {(0, 0): None}) as tap:
        logits = model(**batch).logits
    assert tap.writes[0].right.abs().max() > 0
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])
    assert loss < record["validation"]["unigram_loss"]
