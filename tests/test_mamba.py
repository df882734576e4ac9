"""Models on Mamba-1's rule in transformers: `models.hf_mamba`, and layers that call their function once a head."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from decoding import close, functions, go_on, states_by_token
from tiny_models import mamba_families, tiny_mamba, tokens

from writesae import SAE, Edits
from writesae.models import Stopped, attach, hf_mamba, layers, running, self_test, sites, stopping_after
from writesae.models.arguments import cache_of, given_cache

FAMILIES = mamba_families()
pytestmark = [
    pytest.mark.skipif(not FAMILIES, reason="transformers before 5.15 has no functions to stand in for"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(selective_scan|encode). running the slow"),
]
K = 4
family_all = pytest.mark.parametrize("family", FAMILIES)


def state_in(cache, layer):
    """The cache's own tensor, `[B, V, K]` or Zamba's `[B, H, V, K]`."""
    state = cache.layers[layer].recurrent_states
    return state[0] if isinstance(state, dict) else state


def recurrent_state(cache, layer):
    """`[B, H, K, V]` of a cache."""
    state = state_in(cache, layer)
    return (state if state.ndim == 4 else state[:, None]).mT.clone()


def own_states(model, text, layer):
    """`[B, T, H, K, V]`, token by token, by the model alone."""
    return states_by_token(model, text, layer, recurrent_state)


# ---- the same model -------------------------------------------------------------------------------------------


@family_all
@pytest.mark.parametrize("accelerate", [False, True])
@torch.no_grad()
def test_logits_and_writes_are_the_models_own(family, accelerate):
    model, text = tiny_mamba(family), tokens(2, 9)
    site = layers(model)[-1]
    heads = 2 if family == "zamba" else 1
    assert (site.num_v_heads, site.K, site.conv_kernel_size) == (heads, K, 4)
    layer = site.layer_index
    plain, states = model(text).logits, own_states(model, text, layer)
    assert states.shape[2:] == (heads, K, site.V) and states[:, -1].abs().amax((0, 2, 3)).min() > 1e-2
    with attach(model, {(layer, heads - 1): None}, accelerate=accelerate) as tap:
        close(model(text).logits, plain)
        close(tap.writes[layer].states(range(9)), states)
        out = model(text[:, :6], use_cache=True)
        close(out.logits, plain[:, :6])
        for t in (6, 7, 8):
            out = go_on(model, text[:, t : t + 1], t, cache_of(out))
            close(out.logits, plain[:, t : t + 1])
            close(tap.writes[layer].states([0]), states[:, t : t + 1])
            assert tap.starts[layer] == t
        close(recurrent_state(cache_of(out), layer), states[:, -1])
    assert tap.calls == {layer: 5}


@family_all
@torch.no_grad()
def test_several_tokens_on_a_filled_cache_are_refused(family):
    """There the model forgets what it has read, and says nothing."""
    model, text = tiny_mamba(family), tokens(2, 8)
    layer, name = layers(model)[0].layer_index, type(layers(model)[0].module).__name__
    plain = model(text).logits
    alone = go_on(model, text[:, 5:], 5, cache_of(go_on(model, text[:, :5], 0))).logits
    assert (alone - plain[:, 5:]).abs().max() > 1e-2
    for accelerate in (False, True):
        with attach(model, {} if accelerate else {(layer, 0): None}, accelerate=accelerate) as tap:
            cache = cache_of(go_on(model, text[:, :5], 0))
            with pytest.raises(ValueError, match=f"one token at a time, got 3 tokens on a filled cache of {name}"):
                go_on(model, text[:, 5:], 5, cache)
            assert set(tap.calls.values()) <= {1}


@family_all
@torch.no_grad()
def test_generate_with_pads_and_what_fires(family):
    model, text = tiny_mamba(family), tokens(3, 7)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    site = layers(model)[-1]
    layer, head = site.layer_index, site.num_v_heads - 1
    sae = SAE(K, site.V, 12, k=3)
    for x in (sae.v_enc, sae.w_enc):
        x.data.normal_()
    of_writes = SAE(K, site.V, 12, k=3, target="write")
    of_writes.load_state_dict(sae.state_dict())
    generate = functools.partial(
        model.generate, text, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    plain = generate()
    with attach(model, {(layer, head): sae}) as tap, attach(model, {(layer, head): of_writes}) as beside:
        assert torch.equal(generate(), plain)
    found = tap.firings
    assert int(found.position.max()) == 10 and set(found.head.tolist()) == {head}
    assert int(found.position[found.row == 0].min()) >= 3
    # What fires is what the encoder says of the model's own states, and of what each token changes in them.
    states = own_states(model, plain[1:2, :11], layer)[0, :, head]
    with attach(model, {(layer, head): None}) as whole:
        model(plain[1:2, :11])
    left, right = whole.writes[layer].rank_one("test")
    writes = left[0, :, head, :, None] * right[0, :, head, None, :]
    for seen, of in ((found, states), (beside.firings, writes)):
        pre = torch.einsum("frk,tkv,frv->tf", sae.v_enc.data, of - sae.mean, sae.w_enc.data) + sae.b_enc.data
        mine = seen[seen.row == 1]
        close(mine.activation, pre[mine.position.long(), mine.feature.long()], 1e-3)
        assert len(mine) == int((pre.topk(3).values > 0).sum()) > 10


@torch.no_grad()
def test_beams_and_a_cache_that_does_not_count():
    model, text = tiny_mamba(), tokens(2, 5)
    kwargs = dict(max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False)
    plain, cache = model.generate(text, **kwargs), cache_of(model(text, use_cache=True))
    with attach(model, {(0, 0): None}) as tap:
        assert torch.equal(model.generate(text, **kwargs), plain)
        assert tap.starts[0] == 9
        with pytest.raises(ValueError, match="cache: expected one that was empty or filled while attached"):
            model(text[:, :1], use_cache=True, **given_cache(model, cache))


@family_all
@torch.no_grad()
def test_padded_rows(family):
    model, text = tiny_mamba(family), tokens(3, 9)
    mask = torch.ones_like(text)
    mask[0, :4], mask[1, 6:] = 0, 0
    layer = layers(model)[-1].layer_index
    plain = model(text, attention_mask=mask).logits
    with attach(model, {(layer, 0): None}, accelerate=True) as tap:
        close(model(text, attention_mask=mask).logits[mask.bool()], plain[mask.bool()])
    right = tap.writes[layer].right.flatten(2).abs().amax(-1)
    assert not right[mask == 0].any() and right[mask == 1].min() > 0


@family_all
@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens", "seq_idx"])
@torch.no_grad()
def test_packed_sequences_are_kept_apart(family, kind):
    restarts = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]])
    offsets = torch.tensor([0, 5, 8, 11], dtype=torch.int32)
    said = {"cu_seq_lens": {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5},
            "seq_idx": {"seq_idx": torch.tensor([[0] * 5 + [1] * 3 + [2] * 3], dtype=torch.int32)}}  # fmt: skip
    model, text = tiny_mamba(family), tokens(1, 11)
    layer = layers(model)[-1].layer_index
    apart = torch.cat([model(part, use_cache=False).logits for part in text.split([5, 3, 3], 1)], 1)
    with attach(model, {(layer, 0): None}) as tap:
        packed = model(text, use_cache=False, position_ids=restarts, **said.get(kind, {})).logits
    close(packed, apart)
    assert tap.writes[layer].cu_seqlens.tolist() == [0, 5, 8, 11]
    assert (model(text, use_cache=False).logits - apart).abs().max() > 1e-3


@family_all
@torch.no_grad()
def test_a_forward_ends_after_any_layer(family):
    """Zamba's layer in the middle lies deeper in its block than the others."""
    model, text = tiny_mamba(family), tokens(1, 4)
    for site in layers(model)[:-1]:
        with attach(model, {(site.layer_index, 0): None}) as tap, stopping_after(model, site.layer_index):
            with pytest.raises(Stopped):
                model(text, use_cache=False)
        assert tap.calls == {site.layer_index: 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "autocast"])
@torch.no_grad()
def test_other_dtypes(dtype):
    autocast = dtype == "autocast"
    model, text = tiny_mamba(dtype=torch.float32 if autocast else dtype), tokens(2, 9)

    def run():
        out = model(text, use_cache=True)
        last = model(text[:, :1], use_cache=True, **given_cache(model, cache_of(out)))
        return out.logits, last.logits, recurrent_state(cache_of(last), 0)

    self_test._passed.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = run()
        with attach(model, {(0, 0): None}):
            found = run()
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == b.dtype
        close(a, b, 1e-6 if dtype == torch.float64 else 0.1 if autocast else 0.05)


# ---- training -------------------------------------------------------------------------------------------------


@family_all
def test_gradients_in_training_mode(family):
    model, text = tiny_mamba(family).train(), tokens(2, 7)
    site = layers(model)[0]
    layer, h = site.layer_index, site.num_v_heads - 1

    def gradients():
        model.zero_grad()
        model(text, use_cache=False).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with attach(model, {(layer, 0): None}, write_gradients=True) as tap:
        found = gradients()
    assert tap.calls == {layer: 1} and plain.keys() == found.keys()
    for name, gradient in plain.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name
    # The gradient of a write is that of an edit that adds to it: the skip D x is no part of it.
    b, t = 1, 3
    right = torch.zeros(1, site.V, requires_grad=True)
    left, _ = tap.writes[layer].native(b, t, h)
    with attach(model, {}, edits={layer: Edits([b], [t], [h], left.detach()[None], right)}):
        model(text, use_cache=False).logits.square().mean().backward()
    close(tap.write_gradients[layer][b, t, h], right.grad[0], 1e-6)
    assert right.grad.abs().max() > 1e-7


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.endswith("mamba")])
def test_training_mode_does_not_go_past_the_rule(family, monkeypatch):
    """With a kernel for all at once, which is what a machine with mamba_ssm has."""
    model, text = tiny_mamba(family).train(), tokens(2, 6)
    plain = model(text).logits
    asked = []

    def at_once(projected, *args, **kwargs):
        asked.append(1)
        return projected.transpose(1, 2)[..., :32] * 0

    monkeypatch.setattr(functions(model), "mamba_inner_fn", at_once)
    assert (model(text).logits - plain).abs().max() > 1e-3 and asked
    asked.clear()
    with attach(model, {(layer, 0): None for layer in range(2)}) as tap:
        close(model(text).logits, plain)
    assert not asked and tap.calls == {0: 1, 1: 1}


# ---- edits ----------------------------------------------------------------------------------------------------


def without_write(monkeypatch, model, place, after):
    """Has the first layer run as if x of a place were zero in its state; `after`: once that token has read."""
    space, calls = functions(model), []
    original = space.mamba_selective_scan
    b, t, h = place

    def scan(hidden_states, dt, A, B, C, **kwargs):
        calls.append(1)
        plain = original(hidden_states, dt, A, B, C, **kwargs)
        if len(calls) != h + 1:
            return plain
        x = hidden_states.clone()
        x[b, :, t] = 0
        out = original(x, dt, A, B, C, **kwargs)
        skip = kwargs["D"] * hidden_states[b, :, t] * torch.nn.functional.silu(kwargs["z"][b, :, t])
        out[b, :, t] = plain[b, :, t] if after else out[b, :, t] + skip
        return out

    monkeypatch.setattr(space, "mamba_selective_scan", scan)


@family_all
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_a_deleted_write_is_one_that_was_zero(family, when, monkeypatch):
    model, text = tiny_mamba(family), tokens(2, 9)
    site = layers(model)[0]
    layer, place = site.layer_index, (1, 4, site.num_v_heads - 1)
    plain = model(text, use_cache=False).logits
    with attach(model, {}, edits={layer: Edits.delete(*place, K, site.V, when=when)}) as tap:
        edited = model(text, use_cache=False).logits
    assert tap.applied[layer].all()
    without_write(monkeypatch, model, place, after=when == "after")
    expected = model(text, use_cache=False).logits
    close(edited, expected)
    close(edited[:, :4], plain[:, :4])
    close(edited[0], plain[0])
    moved = (edited - plain)[1].abs().amax(-1)
    assert moved[5:].max() > 1e-4 and (moved[4] > 1e-4) == (when == "before")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("mamba", "zamba")])
@torch.no_grad()
def test_an_edit_while_decoding_is_what_it_does_to_the_cache(family):
    model, text, t = tiny_mamba(family), tokens(2, 7), 5
    site = layers(model)[1]
    layer, h = site.layer_index, site.num_v_heads - 1
    left, right = torch.randn(K), torch.randn(site.V)

    def run(edit=lambda cache: None):
        out, found = model(text[:, :4], use_cache=True), []
        for i in range(4, 7):
            out = model(text[:, i : i + 1], use_cache=True, **given_cache(model, cache_of(out)))
            if i == t:
                edit(cache_of(out))
            found.append(out.logits)
        return torch.cat(found, 1)

    def add(cache):
        state = state_in(cache, layer)
        (state[0, h] if state.ndim == 4 else state[0]).add_(right[:, None] * left)

    plain, expected = run(), run(add)
    with attach(model, {}, edits={layer: Edits.add(0, t, h, left, right, when="after")}):
        close(run(), expected)
    assert (expected - plain)[0, 2:].abs().max() > 1e-3


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("falcon_mamba", "zamba")])
@torch.no_grad()
def test_edits_planned_for_generate_are_those_of_the_whole_text(family):
    """In the prompt and in what is generated, of every head, by attaches around one another."""
    model, text = tiny_mamba(family), tokens(2, 6)
    site = layers(model)[0]
    layer, last = site.layer_index, site.num_v_heads - 1
    deleted = [Edits.delete(row, t, h, K, site.V) for row, t, h in ((0, 2, 0), (1, 4, last), (0, 8, last))]
    around, inside = {layer: deleted[0]}, {layer: Edits.cat(deleted[1:])}
    kwargs = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    plain = model.generate(text, **kwargs)
    with attach(model, {}, edits=around, strict=True), attach(model, {}, edits=inside, strict=True):
        out = model.generate(text, **kwargs)
    with attach(model, {}, edits={layer: Edits.cat(deleted)}):
        whole = model(out.sequences, use_cache=False).logits
    close(torch.stack(out.logits, 1), whole[:, 5:-1])
    assert (torch.stack(out.logits, 1) - torch.stack(plain.logits, 1)).abs().amax((1, 2)).min() > 1e-4


# ---- what is wrong is refused ---------------------------------------------------------------------------------


SCAN, STEP = hf_mamba.BINDING.recurrences
WRONG = {
    "dt": (SCAN, "dt", lambda dt: dt + 0.1, "the output of the selective scan of layer 0 differs"),
    "A": (SCAN, "A", lambda A: 1.5 * A, "the output of the selective scan of layer 0 differs"),
    "x of a step": (STEP, "x", lambda x: x.flip(2), "the output of the one-token rule of layer 0 differs"),
    "state of a step": (STEP, "A", lambda A: 0.5 * A, "the output of the one-token rule of layer 0 differs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_self_test_catches_a_wrong_table(name, monkeypatch):
    recurrence, which, change, message = WRONG[name]

    def bind(site, given):
        call = recurrence.bind(site, given)
        return replace(call, inputs={**call.inputs, which: change(call.inputs[which])})

    refused_as(monkeypatch, message, recurrence, bind=bind)


def test_the_self_test_catches_a_forgotten_gate_and_a_state_that_lies_otherwise(monkeypatch):
    def ungated(given, output):
        return STEP.answer({**given, "z": None}, output)

    def untransposed(given, output):
        out = SCAN.answer(given, output)
        return (out[0], output.final_state[:, 0]) if isinstance(out, tuple) else out

    refused_as(monkeypatch, "the output of the one-token rule of layer 0 differs", STEP, answer=ungated)
    refused_as(monkeypatch, "the state of the selective scan of layer 0 is", SCAN, answer=untransposed)


def refused_as(monkeypatch, message, recurrence, family="mamba", **changes):
    table = hf_mamba.BINDING
    others = tuple(replace(r, **changes) if r is recurrence else r for r in table.recurrences)
    monkeypatch.setattr(sites, "bindings", [replace(table, recurrences=others)])
    self_test._passed.clear()
    with pytest.raises(RuntimeError, match=f"attach: self-test failed: {message}"):
        with attach(tiny_mamba(family), {(0, 0): None}):
            pass


@pytest.mark.skipif("zamba" not in FAMILIES, reason="no Zamba")
def test_the_self_test_tries_every_head(monkeypatch):
    def bind(site, given):
        call = SCAN.bind(site, given)
        return replace(call, inputs={**call.inputs, "x": call.inputs["x"] * (1 + running().head)})

    refused_as(monkeypatch, "the output of the selective scan of layer 0 differs", SCAN, "zamba", bind=bind)


@torch.no_grad()
def test_a_layer_that_calls_more_often_than_it_has_heads():
    model = tiny_mamba()
    space = functions(model)
    with attach(model, {(0, 0): None}, self_test=False):
        shim = space.mamba_selective_scan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(space, "mamba_selective_scan", lambda *a, **k: [shim(*a, **k) for _ in range(2)][1])
            with pytest.raises(ValueError, match="to call mamba_selective_scan once for each of its 1 heads"):
                model(tokens(1, 4))
        model(tokens(1, 4))
