"""`attach` inside other tools that run a model: nnsight's traces, TransformerLens' bridges. Each is skipped where its
package is not installed; `python scripts/test_libraries.py bridges transformer-lens` installs them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from tiny_models import tiny_mamba, tiny_mamba2, tiny_model, tokens

import writesae
from writesae.bridges import transformer_lens
from writesae.models.sites import layers

MODELS = {"qwen3_5": tiny_model, "mamba2": tiny_mamba2, "mamba": tiny_mamba}


def needs(name: str):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.fixture(autouse=True)
def _threads(one_thread, nothing_stays):
    pass


def dictionaries(model) -> dict:
    site = layers(model)[0]
    torch.manual_seed(1)
    return {(site.layer_index, 0): writesae.SAE(site.K, site.V, F=16, k=3)}


def plain(model, saes, ids, **options):
    """(logits, firings) without any other tool."""
    with writesae.attach(model, saes, **options) as tap:
        logits = model(input_ids=ids).logits
    return logits, tap.firings


def same(a, b):
    assert len(a) and all(torch.equal(x, b.columns()[name]) for name, x in a.columns().items())


def edit_of(model):
    site = layers(model)[0]
    return {site.layer_index: writesae.Edits.add(0, 3, 0, torch.ones(site.K), torch.ones(site.V))}


# ---- nnsight --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edited", [False, True])
def test_a_trace_of_nnsight_inside_attach(edited):
    """Logits and firings are the plain ones, and what the trace changes is seen; also by a generation."""
    needs("nnsight")
    from nnsight import LanguageModel

    model, _, _ = writesae.load_default()
    tokenizer = writesae.load_default()[1]
    saes, ids = {(5, 3): writesae.SAE.from_pretrained("default")}, tokens(1, 12)
    options = {"edits": {5: writesae.Edits.delete(0, 4, 3, 32, 64)}} if edited else {}
    expected, fired = plain(model, saes, ids, **options)
    lens = LanguageModel(model, tokenizer=tokenizer)
    with writesae.attach(model, saes, **options) as tap:
        with lens.trace(ids):
            logits = lens.output.logits.save()
    assert torch.equal(logits, expected)
    same(tap.firings, fired)
    with writesae.attach(model, saes) as tap:  # and a change that the trace makes before the layer
        with lens.trace(ids):
            lens.model.embed_tokens.output[:, 2] = 0
    changed = (tap.firings.position, fired.position)
    assert len(tap.firings) and not all(
        torch.equal(x, fired.columns()[name]) for name, x in tap.firings.columns().items()
    )
    before = [tap.firings[changed[0] < 2], fired[changed[1] < 2]]
    if not edited:
        same(*before)


# ---- TransformerLens ------------------------------------------------------------------------------------------------


def bridged(name: str, folder):
    """(the bridge, the model inside it, another of the same weights, dictionaries)."""
    needs("transformer_lens")
    from transformer_lens.model_bridge import TransformerBridge

    inside, other = MODELS[name](), MODELS[name]()
    inside.save_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=inside, device="cpu")
    return bridge.eval(), inside, other, dictionaries(other)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("edited", [False, True])
def test_the_model_inside_a_bridge(name, edited, tmp_path):
    """Called through the bridge, whose cache is filled, and by itself: as the same weights without one."""
    bridge, inside, other, saes = bridged(name, tmp_path)
    ids = tokens(1, 12)
    options = {"edits": edit_of(other)} if edited else {}
    expected, fired = plain(other, saes, ids, **options)
    own = {"own_layers": True} if name == "qwen3_5" else {}
    with transformer_lens.attach(bridge, saes, **own, **options) as tap:
        logits, cache = bridge.run_with_cache(ids, use_cache=False)
    assert any("hook_out" in x for x in cache)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    same(tap.firings, fired)
    with transformer_lens.attach(bridge, saes, **own, **options) as tap:
        again = inside(input_ids=ids).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    same(tap.firings, fired)


@pytest.mark.parametrize("name", MODELS)
def test_a_generation_inside_a_bridge(name, tmp_path):
    """Without a cache, as the plain model; with one it is refused, since what the bridge makes of it may be wrong."""
    bridge, inside, other, saes = bridged(name, tmp_path)
    ids, own = tokens(1, 12), {"own_layers": True} if name == "qwen3_5" else {}
    expected = other.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    asked = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "return_type": "tokens", "stop_at_eos": False}
    with transformer_lens.attach(bridge, saes, **own) as tap:
        assert torch.equal(bridge.generate(ids, use_past_kv_cache=False, **asked), expected)
        assert {int(x) for x in tap.firings.position} >= {13, 14}
        tap.clear()
        with pytest.raises(ValueError, match="expected none inside TransformerLens' bridge.*use_past_kv_cache=False"):
            bridge.generate(ids, use_past_kv_cache=True, **asked)
        if name == "qwen3_5":
            with pytest.raises(ValueError, match="use_cache=False of the model"):
                inside.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        else:
            again = inside.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert torch.equal(again, expected)
        bridge(ids)
    assert not inside._forward_pre_hooks


def test_a_layer_that_the_bridge_computes_itself_is_refused(tmp_path):
    bridge, inside, other, saes = bridged("qwen3_5", tmp_path)
    said = "layer 0 is computed by TransformerLens' GatedDeltaNetBridge.*own_layers=True"
    with pytest.raises(ValueError, match=said), transformer_lens.attach(bridge, saes):
        pass
    ids = tokens(1, 12)
    before = bridge(ids)
    with transformer_lens.attach(bridge, saes, own_layers=True):
        bridge(ids)
    assert torch.equal(bridge(ids), before)  # and it computes it again afterwards
    assert not any("forward" in x.__dict__ for x in inside.modules())
    with pytest.raises(RuntimeError, match="without calling the gated delta rule"), writesae.attach(inside, saes):
        pass  # past the bridge: found out by the self-test


def test_what_is_no_bridge_is_refused():
    """A HookedTransformer (TransformerLens before 4), or a plain model."""
    with pytest.raises(ValueError, match="bridge: expected a TransformerBridge .* got Linear"):
        with transformer_lens.attach(torch.nn.Linear(2, 2), {(0, 0): None}):
            pass
