"""What `attach` refuses: before any work, while running, and at the end."""

from __future__ import annotations

import pytest
import torch
from test_attach import (  # noqa: F401  (models is a fixture)
    FAMILIES,
    dictionary,
    models,
    module_functions,
    one_edit,
)
from tiny_models import VOCAB, tiny_model, tokens

from writesae.models import attach, hf_gated_delta

# ruff: noqa: F811  (a fixture's name as an argument)
pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")


@pytest.mark.parametrize(
    "sites, kwargs, message",
    [
        ({(2, 0): None}, {}, r"layer: expected one of .*\[0, 1, 3\], got layer 2, which is a full-attention layer"),
        ({(4, 0): None}, {}, r"layer: expected one of .*\[0, 1, 3\], got layer 4, which .* does not have"),
        ({(-1, 0): None}, {}, r"got layer -1, which .* does not have"),
        ({(0, 4): None}, {}, r"head: expected 0 <= head < 4 \(value heads of layer 0\), got 4"),
        ({(0, -1): None}, {}, r"head: expected 0 <= head < 4"),
        ({0: None}, {}, r"sites: expected keys \(layer, head\) of two integers, got 0"),
        ([(0, 0)], {}, r"sites: expected \{\(layer, head\): dictionary or None\}, got list"),
        ({}, {}, r"sites: expected at least one"),
        ({(0, 1): "x"}, {}, r"sites\[\(0, 1\)\]: expected a dictionary .*, got str"),
        ({(0, 1): dictionary(K=6, V=8)}, {}, r"expected a dictionary for states of K=8, V=6, got one for K=6, V=8"),
        ({}, {"edits": [1]}, r"edits: expected \{layer: Edits\}, got list"),
        ({}, {"edits": {0: 3}}, r"edits\[0\]: expected Edits, got int"),
        ({}, {"edits": {2: one_edit(0, 0, 0)}}, r"full-attention layer"),
        ({}, {"edits": {0: one_edit(0, 0, 4)}}, r"edits\[0\]: edits.head: expected 0 <= head < 4, got 4 in edit 0"),
        ({}, {"edits": {0: one_edit(0, 0, 0, K=6, V=8)}}, r"edits\[0\]: edits: expected left \[E, K=8\]"),
        ({}, {"edits": {0: one_edit(0, -1, 0)}}, r"edits\[0\]: edits.position: expected 0 <= position"),
    ],
)
def test_refused_before_any_work(models, sites, kwargs, message):
    model = models()
    before = module_functions(model)
    with pytest.raises(ValueError, match=message):
        with attach(model, sites, **kwargs):
            raise AssertionError("the body must not run")
    assert module_functions(model) == before


def test_unsupported_and_compiled_models(models):
    import transformers

    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match="got LlamaForCausalLM, which calls the gated delta rule or"):
        with attach(llama, {(0, 0): None}):
            pass
    with pytest.raises(ValueError, match="model: expected a torch module, got str"):
        with attach("model", {(0, 0): None}):
            pass
    with pytest.raises(RuntimeError, match="compiled with torch.compile"):
        with attach(torch.compile(models()), {(0, 0): None}):
            pass
    model = tiny_model()
    with pytest.raises(RuntimeError, match="cannot be traced by torch.compile"):
        with attach(model, {(0, 0): None}):
            torch.compile(model, backend="eager")(tokens(1, 4))


def test_site_that_never_ran(models):
    with pytest.raises(ValueError, match=r"sites: layer 3 never ran while attached, so its site\(s\) \[\(3, 1\)\]"):
        with attach(models(), {(3, 1): dictionary()}):
            pass


def test_nan_in_the_state_is_named(models):
    model = models()
    x = tokens(2, 6)

    def poison(module, args, kwargs):
        kwargs["hidden_states"] = kwargs["hidden_states"].clone()
        kwargs["hidden_states"][1, -1] = float("nan")
        return args, kwargs

    handle = hf_gated_delta.layers(model)[1].module.register_forward_pre_hook(poison, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match="state of layer 1, first at row 1, position 5, head 0"):
            with attach(model, {(1, 2): None}, self_test=False):
                model(x)
        with pytest.raises(ValueError, match="state of layer 1, first at row 1, position 6, head 0"):
            with attach(model, {(1, 2): None}, self_test=False):
                handle.remove()
                out = model(x, use_cache=True)
                layer = hf_gated_delta.layers(model)[1].module
                handle = layer.register_forward_pre_hook(poison, with_kwargs=True)
                model(x[:, :1], past_key_values=out.past_key_values)
        with attach(model, {(1, 2): None}, self_test=False, check_finite=False):
            model(x)
    finally:
        handle.remove()


@pytest.mark.skipif("qwen4_exp" not in FAMILIES, reason="this transformers has no Qwen4-Exp")
def test_packed_refused_where_the_model_itself_mixes(models):
    with pytest.raises(ValueError, match="packed batch: Qwen4ExpForCausalLM reads n-grams across sequences"):
        with attach(models("qwen4_exp"), {(0, 0): None}):
            models("qwen4_exp")(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]), use_cache=False)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(use_cache=True), "packed batch: expected use_cache=False"),
        (dict(position_ids=None), "packed batch: expected position_ids that restart"),
        (dict(attention_mask=torch.ones(1, 6, dtype=torch.long)), "got an attention_mask"),
        (dict(cu_seq_lens_q=torch.tensor([0, 4, 7])), "cu_seq_lens_q: expected offsets rising from 0 to 6"),
        (dict(input_ids=tokens(2, 6), cu_seq_lens_q=None), "jumps inside a row mean packed sequences"),
    ],
)
def test_packed_refusals(models, kwargs, message):
    given = dict(
        input_ids=tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1]]), use_cache=False,
        cu_seq_lens_q=torch.tensor([0, 4, 6]),
    )  # fmt: skip
    given.update(kwargs)
    if given["input_ids"].shape[0] == 2:
        given["position_ids"] = given["position_ids"].expand(2, -1)
    with pytest.raises(ValueError, match=message):
        with attach(models(), {(0, 0): None}):
            model_arguments = {k: v for k, v in given.items() if v is not None}
            models()(**model_arguments)
