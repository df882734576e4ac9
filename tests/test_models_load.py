"""`models.load`: folders of safetensors, and refusals of everything else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model, tokens

from writesae.models import attach, hf_gated_delta, load
from writesae.models.identity import config_digest, tokenizer_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(where)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(where)
    return where


@pytest.mark.parametrize("as_text", [True, False])
def test_loads_a_folder(folder, as_text):
    model, tokenizer = load(str(folder) if as_text else folder, dtype=torch.float32)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]
    with torch.no_grad(), attach(model, {(0, 0): None}) as tap:
        logits = model(tokens(1, 5)).logits
        assert torch.allclose(logits, tiny_model()(tokens(1, 5)).logits, atol=1e-4) and tap.calls == {0: 1}
    assert next(load(folder, dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16


def test_text_of_a_multi_modal_checkpoint(folder, tmp_path):
    import transformers

    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
    config = transformers.Qwen3_5Config(text_config=tiny_model().config.to_dict(), vision_config=vision)
    whole = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert [s.layer_index for s in hf_gated_delta.layers(model)] == [0, 1, 3]
    with torch.no_grad():
        assert torch.allclose(model(tokens(1, 5)).logits, whole(tokens(1, 5)).logits, atol=1e-5)


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="path: expected a model folder, a repository name or 'default', got './none'"):
        load("./none")
    with pytest.raises(ValueError, match="with config.json, got .* without one"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"expected \*.safetensors weights in .*, got none"):
        load(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="got pytorch_model.bin in .*, which needs unpickling"):
        load(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="path: expected a model folder"):
        load(file)


def test_digests_are_those_that_stores_hold():
    """Of the same configuration and tokenizer for ever: a store is gone on with only where they are found again."""
    said = {"b": 1, "a": "x", "_name_or_path": "y", "architectures": ["Z"], "transformers_version": "5"}
    model = SimpleNamespace(config=SimpleNamespace(to_diff_dict=lambda: dict(said)))
    digest = "385820f0096fd558f4091319e7fa742cebf877dc3baca180981889f1c40eca84"
    assert config_digest(model) == digest
    said.update(_name_or_path="elsewhere", transformers_version="6")
    assert config_digest(model) == digest
    said.update(b=2)
    assert config_digest(model) != digest
    assert config_digest(SimpleNamespace()) is None
    vocabulary = {"b": 1, "a": 0}
    slow = SimpleNamespace(get_vocab=lambda: vocabulary)
    digest = "20b0d53b03b492fa68a9c52a559e36bbe000f5bed2094f4f8d756815f89fc456"
    assert tokenizer_digest(slow, lambda text: [1, 2]) == digest != tokenizer_digest(slow, lambda text: [1, 3])
    vocabulary["c"] = 2
    assert tokenizer_digest(slow, lambda text: [1, 2]) != digest
