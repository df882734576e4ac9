"""Lightning Attention in transformers, whose recurrence is written out in a forward (`models.hf_minimax`); and models
whose layers keep something else than a matrix, refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decoding import close, go_on, states_by_token
from tiny_models import mamba_families, tiny_minimax, tokens

from writesae import SAE, Edits
from writesae.models import attach, hf_minimax, layers, self_test, sites
from writesae.models.arguments import cache_of

pytestmark = [pytest.mark.usefixtures("one_thread")]
H, D = 3, 8  # K = V


def own_states(model, text, layer):
    """`[B, T, H, K, V]`, token by token, by the model alone."""
    return states_by_token(model, text, layer, lambda cache, layer: cache.linear_cache[layer].clone())


@pytest.mark.parametrize("accelerate", [False, True])
@torch.no_grad()
def test_logits_and_writes_are_the_models_own(accelerate):
    model, text = tiny_minimax(), tokens(2, 11)
    found = [(s.layer_index, s.num_k_heads, s.num_v_heads, s.K, s.V) for s in layers(model)]
    assert found == [(0, H, H, D, D), (2, H, H, D, D)]
    plain, states = model(text).logits, own_states(model, text, 0)

    def in_pieces(look=lambda t, stop: None):
        """Logits of each, several on a filled cache and one."""
        found, cache = [], None
        for t, stop in ((0, 6), (6, 9), (9, 10), (10, 11)):
            out = go_on(model, text[:, t:stop], t, cache)
            cache = cache_of(out)
            found.append(out.logits)
            look(t, stop)
        close(cache.linear_cache[0], states[:, -1])
        return torch.cat(found, 1)

    def look(t, stop):
        close(tap.writes[0].states(range(stop - t)), states[:, t:stop])
        assert tap.starts == {0: t, 2: t}

    pieces = in_pieces()
    with attach(model, {(0, 1): None, (2, 2): None}, accelerate=accelerate) as tap:
        close(model(text).logits, plain)
        close(tap.writes[0].states(range(11)), states)
        close(in_pieces(look), pieces)


@torch.no_grad()
def test_generate_with_pads_and_beams_and_what_fires():
    model, text = tiny_minimax(), tokens(3, 7)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    sae = SAE(D, D, 12, k=3)
    for x in (sae.v_enc, sae.w_enc):
        x.data.normal_()
    kwargs = dict(attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    plain, beams = model.generate(text, **kwargs), model.generate(text, **kwargs, num_beams=2)
    logits = model(text, attention_mask=mask).logits
    with attach(model, {(0, 2): sae}) as tap:
        close(model(text, attention_mask=mask).logits, logits)
        right = tap.writes[0].right.flatten(2).abs().amax(-1)
        assert not right[mask == 0].any() and right[mask == 1].min() > 0
        tap.clear()
        assert torch.equal(model.generate(text, **kwargs), plain)
        found = tap.firings
        assert torch.equal(model.generate(text, **kwargs, num_beams=2), beams)
    assert int(found.position.max()) == 10 and int(found.position[found.row == 0].min()) >= 3
    states = own_states(model, plain[1:2, :11], 0)[0, :, 2]
    pre = torch.einsum("frk,tkv,frv->tf", sae.v_enc.data, states - sae.mean, sae.w_enc.data) + sae.b_enc.data
    mine = found[found.row == 1]
    close(mine.activation, pre[mine.position.long(), mine.feature.long()], 1e-3)
    assert len(mine) == int((pre.topk(3).values > 0).sum()) > 10


@torch.no_grad()
def test_packed_sequences_are_kept_apart():
    model, text = tiny_minimax(), tokens(1, 11)
    restarts = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]])
    apart = torch.cat([model(part, use_cache=False).logits for part in text.split([5, 3, 3], 1)], 1)
    with attach(model, {(0, 0): None}) as tap:
        close(model(text, use_cache=False, position_ids=restarts).logits, apart)
    assert tap.writes[0].cu_seqlens.tolist() == [0, 5, 8, 11]
    assert (model(text, use_cache=False, position_ids=restarts).logits - apart).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_dtypes(dtype):
    """Of the layer alone: in half precision the model's experts are chosen otherwise after a rounding."""
    model = tiny_minimax(dtype=dtype)
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 9, 32).to(dtype)

    def run():
        return layer(hidden_states=x, position_embeddings=None, attention_mask=None)

    plain = run()
    self_test._passed.clear()
    with attach(model, {(0, 0): None}) as tap:
        found = run()
    assert tap.calls == {0: 1}
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == b.dtype
        close(a, b, 0.05 if dtype == torch.bfloat16 else 0.01)


def test_gradients_in_training_mode():
    model, text = tiny_minimax().train(), tokens(2, 7)

    def gradients():
        model.zero_grad()
        model(text, use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with attach(model, {(0, 0): None}, write_gradients=True) as tap:
        found = gradients()
    for name, gradient in plain.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name
    b, t, h = 1, 3, 2
    right = torch.zeros(1, D, requires_grad=True)
    left, _ = tap.writes[0].native(b, t, h)
    with attach(model, {}, edits={0: Edits([b], [t], [h], left.detach()[None], right)}):
        model(text, use_cache=False).logits.square().mean().backward()
    close(tap.write_gradients[0][b, t, h], right.grad[0], 1e-6)
    assert right.grad.abs().max() > 1e-7


@torch.no_grad()
def test_a_deleted_write_is_one_that_was_zero():
    model, text, (b, t, h) = tiny_minimax(), tokens(2, 9), (1, 4, 2)
    plain = model(text, use_cache=False).logits
    with attach(model, {}, edits={0: Edits.delete(b, t, h, D, D)}) as tap:
        edited = model(text, use_cache=False).logits
    assert tap.applied[0].all()

    def without(module, args, qkv):
        qkv = qkv.clone()
        qkv.view(2, 9, H, 3 * D)[b, t, h, 2 * D :] = 0
        return qkv

    handle = model.model.layers[0].self_attn.act_fn.register_forward_hook(without)
    expected = model(text, use_cache=False).logits
    handle.remove()
    close(edited, expected)
    assert (edited - plain)[1, 4:].abs().max() > 1e-4


@torch.no_grad()
def test_an_edit_while_decoding_is_what_it_does_to_the_cache():
    model, text, t = tiny_minimax(), tokens(2, 7), 5
    left, right = torch.randn(D), torch.randn(D)

    def run(edit=lambda cache: None):
        out, found = go_on(model, text[:, :4], 0), []
        for i in range(4, 7):
            out = go_on(model, text[:, i : i + 1], i, cache_of(out))
            if i == t:
                edit(cache_of(out))
            found.append(out.logits)
        return torch.cat(found, 1)

    def add(cache):
        cache.linear_cache[2][0, 1] += left[:, None] * right

    plain, expected = run(), run(add)
    with attach(model, {}, edits={2: Edits.add(0, t, 1, left, right, when="after")}):
        close(run(), expected)
    assert (expected - plain)[0, 2:].abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_filled_before():
    model, text = tiny_minimax(), tokens(2, 6)
    cache = cache_of(go_on(model, text[:, :4], 0))
    with attach(model, {(0, 0): None}, self_test=False):
        with pytest.raises(ValueError, match="cache: expected one that was empty or filled while attached"):
            go_on(model, text[:, 4:], 4, cache)
        model(text, use_cache=False)


FORWARD = hf_minimax.BINDING.recurrences[0]


def of_inputs(**changes):
    def bind(site, given):
        call = FORWARD.bind(site, given)
        return replace(call, inputs={**call.inputs, **{name: f(call.inputs[name]) for name, f in changes.items()}})

    return {"bind": bind}


WRONG = {
    "decay": (of_inputs(A=lambda A: 0.5 * A), "output of the Lightning recurrence of layer 0 differs"),
    "queries": (of_inputs(C=lambda C: C.flip(2)), "output of the Lightning recurrence of layer 0 differs"),
    "gate": (
        {"answer": lambda given, output: (lambda o, s: (2 * o, s))(*FORWARD.answer(given, output))},
        "output of the Lightning recurrence of layer 0 differs",
    ),
    "a cache's state": (
        {"bind": lambda site, given: replace(FORWARD.bind(site, given), initial_state=None)},
        "output of the one-token rule of layer 0 differs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_self_test_catches_a_wrong_table(name, monkeypatch):
    changes, message = WRONG[name]
    table = replace(hf_minimax.BINDING, recurrences=(replace(FORWARD, **changes),))
    monkeypatch.setattr(sites, "bindings", [table])
    self_test._passed.clear()
    with pytest.raises(RuntimeError, match=f"attach: self-test failed: the {message}"):
        with attach(tiny_minimax(), {(0, 0): None}):
            pass


# ---- layers that keep something else --------------------------------------------------------------------------

_SMALL = dict(vocab_size=31, hidden_size=32, num_hidden_layers=2, intermediate_size=32)
_ATTENTION = dict(num_attention_heads=2, num_key_value_heads=1)
OTHERS = {
    "Lfm2": (dict(**_ATTENTION, layer_types=["conv", "full_attention"]), "keep the last few tokens and no state"),
    "RecurrentGemma": (dict(**_ATTENTION, lru_width=32), "keeps a number a channel and no matrix"),
    "Rwkv": (dict(attention_hidden_size=32, context_length=8), "keeps a number a channel and no matrix"),
    "xLSTM": (dict(num_heads=2, num_blocks=2), "divides its matrix by a sum of its own"),
    "Llama": (_ATTENTION, "which calls the gated delta rule or .* nowhere"),
}
if not mamba_families():
    OTHERS["Mamba"] = dict(state_size=4), "recurrence is written out in its forward before transformers 5.15"


@pytest.mark.parametrize("name", OTHERS)
def test_what_keeps_no_matrix_is_refused_by_name(name):
    transformers = pytest.importorskip("transformers")
    sizes, reason = OTHERS[name]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**_SMALL, **sizes))
    with pytest.raises(ValueError, match=f"model: expected a model with .* Lightning layers .*, got {name}.*{reason}"):
        with attach(model, {(0, 0): None}):
            pass
