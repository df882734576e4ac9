"""Models whose code comes with them and calls functions of known libraries by names of its own: `models.sites`."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch
from tiny_models import mamba2_families, tokens

from writesae import Edits
from writesae.models import attach, layers, load, patch
from writesae.models.sites import require_layer

pytestmark = pytest.mark.skipif(
    not mamba2_families(), reason="transformers before 5.15 has no functions for code to import"
)

CODE = '''
"""A language model of a stranger's: two layers on Mamba-2's functions."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan as {scan}
from transformers.modeling_outputs import CausalLMOutput
from transformers.generation import GenerationMixin


class StrangerConfig(PretrainedConfig):
    model_type = "stranger"

    def __init__(self, vocab_size=97, width=16, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.width, self.num_hidden_layers = vocab_size, width, num_hidden_layers
        super().__init__(**kwargs)


class StrangerCache:
    def __init__(self):
        self.states, self.columns = {{}}, 0

    def get_seq_length(self):
        return self.columns


def run_over(x, dt, A, B, C, **options):
    return {scan}(x, dt, A, B, C, chunk_size=4, dt_softplus=True, return_final_states=True, **options)


class Blender(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.layer_idx, self.num_heads, self.head_dim, self.ssm_state_size, self.n_groups = number, 4, 3, 5, {groups}
        self.mix = nn.Linear(config.width, 4 * 3 + 2 * 2 * 5 + 4, bias=False)
        self.out = nn.Linear(4 * 3, config.width, bias=False)
        self.A_log = nn.Parameter(torch.linspace(-3, -1, 4))

    def forward(self, hidden_states, cache=None):
        x, B, C, dt = self.mix(hidden_states).split([12, 10, 10, 4], -1)
        x, B, C = x.unflatten(-1, (4, 3)), B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))
        A = -self.A_log.exp()
        if cache is None or not cache.columns:
            y, state = run_over(x, dt, A, B, C)
            if cache is not None:
                cache.states[self.layer_idx] = state
        else:
            y = self.advance(cache.states[self.layer_idx], x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0])[:, None]
        return self.out(y.flatten(2))

    def advance(self, state, x, dt, A, B, C):
        {advance}


class Body(PreTrainedModel):
    config_class = StrangerConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(nn.ModuleDict({{"blend": Blender(config, i)}}) for i in range(2))
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None):
        x = self.table(input_ids)
        for block in self.blocks:
            x = x + block["blend"](x, cache=cache)
        if cache is not None:
            cache.columns += input_ids.shape[1]
        return x


class StrangerForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = StrangerConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = Body(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.table

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None):
        return CausalLMOutput(logits=self.head(self.body(input_ids, attention_mask, cache, use_cache)))
'''
THEIRS = """of_head = lambda y: y[..., None].expand(*y.shape, 3)
        return modeling_mamba2.mamba2_selective_state_update(
            state, x, of_head(dt), A[:, None, None].expand(4, 3, 5), B, C, dt_softplus=True)"""
ITS_OWN = """dt = torch.nn.functional.softplus(dt)
        B, C = (y.repeat_interleave(2, 1) for y in (B, C))
        state.mul_((dt * A).exp()[..., None, None]).add_((dt[..., None] * x)[..., None] * B[:, :, None])
        return (state @ C[..., None])[..., 0]"""


def folder_of(path, monkeypatch, scan="blend", groups=2, advance=THEIRS, change=lambda code: code):
    """A folder with code, configuration, weights and a tokenizer."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("HF_MODULES_CACHE", str(path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(path / "modules"))
    folder = path / f"stranger_{scan}"
    folder.mkdir()
    code = CODE.format(scan=scan, groups=groups, advance=textwrap.indent(advance, "").strip())
    (folder / "modeling_stranger.py").write_text(change(code))
    auto = {"AutoConfig": "StrangerConfig", "AutoModelForCausalLM": "StrangerForCausalLM"}
    config = {
        "model_type": "stranger", "architectures": ["StrangerForCausalLM"], "vocab_size": 97, "width": 16,
        "num_hidden_layers": 2, "auto_map": {k: f"modeling_stranger.{v}" for k, v in auto.items()},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    sizes = {"mix.weight": (36, 16), "out.weight": (16, 12)}
    drawn = [(i, n, torch.randn(s) * s[1] ** -0.5 / 2) for i in range(2) for n, s in sizes.items()]
    weights = {f"body.blocks.{i}.blend.{n}": x for i, n, x in drawn}
    weights |= {f"body.blocks.{i}.blend.A_log": torch.linspace(-3, -1, 4) for i in range(2)}
    weights |= {"body.table.weight": torch.randn(97, 16), "head.weight": torch.randn(97, 16) / 4}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def cache_for(model):
    return sys.modules[type(model).__module__].StrangerCache()


@torch.no_grad()
def test_functions_are_found_by_what_they_are(tmp_path, monkeypatch):
    model, _ = load(folder_of(tmp_path, monkeypatch), trust_remote_code=True)
    text = tokens(2, 9)
    site = layers(model)[1]
    assert (site.binding.kind, site.K, site.V, site.num_v_heads, site.num_k_heads) == ("Mamba-2", 5, 3, 4, 2)
    plain, cache = model(text).logits, cache_for(model)
    for t in range(9):
        model(text[:, t : t + 1], cache=cache)
    state = cache.states[1].mT
    edits = Edits.delete(0, 3, 2, K=5, V=3)
    with attach(model, {(1, 2): None}) as tap:
        torch.testing.assert_close(model(text).logits, plain, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(tap.writes[1].states([8])[:, 0], state, atol=2e-5, rtol=2e-5)
        cache = cache_for(model)
        model(text[:, :8], cache=cache)
        last = model(text[:, 8:], cache=cache).logits
        torch.testing.assert_close(last, plain[:, 8:], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(tap.writes[1].states([0])[:, 0], state, atol=2e-5, rtol=2e-5)
        assert tap.starts[1] == 8
    with attach(model, {(1, 2): None}, edits={1: edits}):
        moved = (model(text).logits - plain).abs().amax(-1)
    assert moved[0, 3:].min() > 1e-4 and moved[1].max() < 1e-5 and moved[0, :3].max() < 1e-5
    assert not patch.patches


@torch.no_grad()
def test_a_step_of_its_own_is_not_passed_over(tmp_path, monkeypatch):
    """Whole sequences call the known function, single tokens nothing that is known."""
    model, _ = load(folder_of(tmp_path, monkeypatch, "over_all", advance=ITS_OWN), trust_remote_code=True)
    text, cache = tokens(2, 6), cache_for(model)
    with attach(model, {(0, 0): None}):
        model(text[:, :5], cache=cache)
        with pytest.raises(
            RuntimeError, match=r"layer 0 \(Blender\) to call the Mamba-2 recurrence, got a forward that"
        ):
            model(text[:, 5:], cache=cache)


def test_what_was_found_is_named_in_refusals(tmp_path, monkeypatch):
    def without(code):
        return code.replace("self.num_heads, ", "self.many, ")

    model, _ = load(folder_of(tmp_path, monkeypatch, "swirl", change=without), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"none of num_heads; body.blocks.0.blend is taken for .* it calls .*swirl"):
        layers(model)


def test_functions_that_no_table_has_are_named(monkeypatch):
    def chunk_of_a_later_release(x):
        return x

    chunk_of_a_later_release.__module__ = "fla.ops.later.chunk"
    namespace = {"torch": torch, "whirl": chunk_of_a_later_release, "__name__": "somebodys_model"}
    exec("class Whirl(torch.nn.Module):\n    def forward(self, x):\n        return whirl(x)\n", namespace)
    model = torch.nn.Sequential(namespace["Whirl"]())
    with pytest.raises(
        ValueError, match=r"whose Whirl calls fla.ops.later.chunk.chunk_of_a_later_release \(as whirl\)"
    ):
        require_layer(model, {}, 0)
