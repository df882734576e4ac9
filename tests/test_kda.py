"""Kimi Delta Attention in transformers: `models.hf_kda`."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import kda_families, tiny_kda, tokens

from writesae import SAE, Edits
from writesae.experiments.engine import ForkEngine, Places, read
from writesae.models import attach, binding, hf_kda, intercept_conv, layers, self_test, sites
from writesae.models.arguments import cache_of, given_cache
from writesae.ops import causal_conv

FAMILIES = kda_families()
pytestmark = [
    pytest.mark.skipif(not FAMILIES, reason="this transformers has no Kimi Delta Attention"),
    pytest.mark.usefixtures("one_thread"),
]
H, K, V = 3, 8, 8
LAYER = 1
family_all = pytest.mark.parametrize("family", FAMILIES)


def close(a, b, tolerance=2e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@functools.cache
def model_of(family="kimi_linear"):
    return tiny_kda(family)


def result(model, text, **given):
    return model(text, **given).logits


def fed_on(model, text, cache):
    """Logits and cache of a call that goes on from a cache, or None."""
    out = model(text, use_cache=True, **({} if cache is None else given_cache(model, cache)))
    return out.logits, cache_of(out)


def cached(cache, layer=LAYER):
    """`[B, H, K, V]`: a copy of a layer's state."""
    return cache.get_recurrent_state(layer, state_idx=0).clone()


@torch.no_grad()
def own_states(model, text, layer=LAYER):
    """`[B, T, H, K, V]`, token by token, by the model alone."""
    cache, found = None, []
    for t in range(text.shape[1]):
        _, cache = fed_on(model, text[:, t : t + 1], cache)
        found.append(cached(cache, layer))
    return torch.stack(found, 1)


# ---- the same model -------------------------------------------------------------------------------------------


@family_all
@pytest.mark.parametrize("accelerate", [False, True])
@torch.no_grad()
def test_outputs_and_writes_are_the_models_own(family, accelerate):
    model, text = model_of(family), tokens(2, 11)
    site = layers(model)[LAYER]
    assert site.binding is hf_kda.BINDING and site.conv_kernel_size == 4 and site.norm is not None
    assert (site.num_k_heads, site.num_v_heads, site.K, site.V) == (H, H, K, V)
    plain, states = result(model, text), own_states(model, text)
    assert states[:, -1].abs().max() > 1e-2
    with attach(model, {(LAYER, 1): None}, accelerate=accelerate) as tap:
        close(result(model, text), plain)
        assert tap.writes[LAYER].gate == "channel" and tap.writes[LAYER].transition == "delta"
        assert tap.writes[LAYER].decay.std(-1).min() > 0  # channels do differ
        close(tap.writes[LAYER].states(range(11)), states)
        out, cache = fed_on(model, text[:, :5], None)
        close(out, plain[:, :5])
        close(cached(cache), states[:, 4])
        out, cache = fed_on(model, text[:, 5:8], cache)  # several on a filled cache
        close(out, plain[:, 5:8])
        close(tap.writes[LAYER].states(range(3)), states[:, 5:8])
        for t in (8, 9, 10):
            out, cache = fed_on(model, text[:, t : t + 1], cache)
            close(out, plain[:, t : t + 1])
            close(tap.writes[LAYER].states([0]), states[:, t : t + 1])
            assert tap.starts[LAYER] == t
        close(cached(cache), states[:, -1])
        assert tap.calls == {LAYER: 6}


@family_all
@torch.no_grad()
def test_the_short_convolution_is_stood_in_for(family):
    """One for q, k and v side by side, in prefill; a single token on a cache keeps the model's own."""
    model, text, seen = model_of(family), tokens(2, 6), []

    def conv(x, weight, bias, activation, *, cu_seqlens, channels):
        seen.append((tuple(x.shape), tuple(weight.shape), bias, activation))
        return causal_conv(x.transpose(1, 2), weight, bias, activation).transpose(1, 2)

    plain, cache = fed_on(model, text, None)
    step, _ = fed_on(model, text[:, :1], cache)
    with intercept_conv(model, {LAYER: conv}):
        ours, cache = fed_on(model, text, None)
        ours_step, _ = fed_on(model, text[:, :1], cache)
    close(ours, plain)
    close(ours_step, step)
    assert len(seen) == 1 and seen[0][1:] == ((3 * H * K, 4), None, "silu") and seen[0][0][:2] == (2, 3 * H * K)


@family_all
@torch.no_grad()
def test_over_several_chunks(family):
    model, text = model_of(family), tokens(1, 70)
    plain, (_, cache) = result(model, text), fed_on(model, text, None)
    with attach(model, {(LAYER, 1): None}) as tap:
        close(result(model, text), plain, 1e-3)
    close(tap.writes[LAYER].states([69])[:, 0], cached(cache))


@family_all
@pytest.mark.parametrize("accelerate", [False, True])
@torch.no_grad()
def test_generate_with_pads(family, accelerate):
    model, text = model_of(family), tokens(3, 7)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    plain = model.generate(text, **arguments)
    sae = dictionary("write")
    with attach(model, {(LAYER, 2): sae}, accelerate=accelerate) as tap:
        assert torch.equal(model.generate(text, **arguments), plain)
    found = tap.firings
    assert int(found.position.max()) == 10 and int(found.position[found.row == 0].min()) == 3


@family_all
@torch.no_grad()
def test_padded_batch(family):
    model, text, pads = model_of(family), tokens(2, 9), 4
    mask = torch.ones_like(text)
    mask[0, :pads] = 0
    plain = result(model, text, attention_mask=mask)
    states = own_states(model, text[:1, pads:], 0)
    with attach(model, {(0, 1): dictionary("write"), (LAYER, 1): None}) as tap:
        close(result(model, text, attention_mask=mask)[mask.bool()], plain[mask.bool()])
    close(tap.writes[0].states(range(pads, 9))[:1], states)
    assert (tap.writes[0].right[0, :pads] == 0).all() and tap.writes[0].right[0, pads:].abs().max() > 0.01
    assert int(tap.firings.position[tap.firings.row == 0].min()) == pads


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "glm5_next"])
@pytest.mark.parametrize("accelerate", [False, True])
@torch.no_grad()
def test_packed_equals_each_sequence_alone(family, accelerate):
    model, lengths = model_of(family), (5, 1, 8)
    rows = [tokens(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([result(model, row, use_cache=False) for row in rows], 1)
    states = torch.cat([own_states(model, row) for row in rows], 1)
    offsets = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    for more in ({}, {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}):
        with attach(model, {(LAYER, 0): None}, accelerate=accelerate) as tap:
            given = {"position_ids": positions, "use_cache": False, **more}
            close(result(model, torch.cat(rows, 1), **given), alone)
        writes = tap.writes[LAYER]
        assert writes.num_sequences == 3
        places = torch.tensor([(i, t) for i, n in enumerate(lengths) for t in range(n)])
        close(writes.states(places), states[0])


@pytest.mark.skipif("glm5_next" not in FAMILIES, reason="this transformers has no GLM 5.3 Flash")
@torch.no_grad()
def test_packed_is_refused_where_the_indexer_mixes():
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    with attach(model_of("glm5_next"), {(LAYER, 0): None}, accelerate=True) as tap:
        with pytest.raises(
            ValueError, match="packed batch: Glm5NextForConditionalGeneration pools and looks up keys across"
        ):
            model_of("glm5_next")(tokens(1, 9), position_ids=positions, use_cache=False)
        result(model_of("glm5_next"), tokens(1, 9))
        assert tap.calls == {LAYER: 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@family_all
@torch.no_grad()
def test_other_dtypes(family, dtype):
    model, text = tiny_kda(family, dtype=dtype, mlp_layer_types=["dense"] * 3), tokens(2, 9)
    out, cache = fed_on(model, text, None)
    step, _ = fed_on(model, text[:, :1], cache)
    with attach(model, {(LAYER, 1): None}, accelerate=True) as tap:
        ours, cache = fed_on(model, text, None)
        ours_step, _ = fed_on(model, text[:, :1], cache)
    assert ours.dtype == out.dtype and cached(cache).dtype == torch.float32
    assert tap.writes[LAYER].right.dtype in (torch.float32, dtype)
    for a, b in ((ours, out), (ours_step, step)):
        off = (a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()
        assert off < (0.05 if dtype == torch.bfloat16 else 1e-4), off


# ---- edits ----------------------------------------------------------------------------------------------------


@family_all
@torch.no_grad()
def test_an_edit_is_what_it_does_to_the_models_own_state(family):
    """After the read, and before it: the next token meets the same state, and with it the tokens after."""
    model, text, t = model_of(family), tokens(2, 9), 4
    left, right = torch.randn(1, K), torch.randn(1, V)
    _, cache = fed_on(model, text[:, : t + 1], None)
    cache.get_recurrent_state(LAYER, state_idx=0)[1, 2] += 2 * left[0][:, None] * right[0]
    expected, _ = fed_on(model, text[:, t + 1 :], cache)
    plain = result(model, text)
    last = LAYER + 1  # the attention layer after it sees the column of an edit before the read, too
    assert layers(model)[-1].layer_index == LAYER and last == 2
    with attach(model, {(LAYER, 0): None}, edits={LAYER: Edits([1], [t], [2], 2 * left, right, when="after")}) as tap:
        edited = result(model, text)
    close(edited[:, t + 1 :], expected)
    close(edited[:, : t + 1], plain[:, : t + 1])
    assert (edited - plain).abs().max() > 1e-2 and tap.applied[LAYER].all()
    after = tap.writes[LAYER].states(range(9))
    with attach(model, {(LAYER, 0): None}, edits={LAYER: Edits([1], [t], [2], 2 * left, right)}) as tap:
        before = result(model, text)
    close(before[:, :t], plain[:, :t])
    assert (before[1, t] - plain[1, t]).abs().max() > 1e-2
    close(tap.writes[LAYER].states(range(9)), after)


@family_all
@torch.no_grad()
def test_a_deleted_write_is_not_made(family):
    """Deleted where beta is made 0 by the model itself: the gates still act."""
    model, text, (row, t, head) = model_of(family), tokens(2, 9), (1, 4, 2)
    seen = layers(model)[LAYER].module.b_proj
    off = torch.zeros(2, 9, H)
    off[row, t, head] = -200.0  # beta = sigmoid(-200 + ..) = 0
    hook = seen.register_forward_hook(lambda module, args, out: out + off)
    try:
        expected = result(model, text)
    finally:
        hook.remove()
    plain = result(model, text)
    with attach(model, {(LAYER, 0): None}, edits={LAYER: Edits.delete([row], [t], [head], K, V)}) as tap:
        close(result(model, text), expected)
    assert (expected - plain).abs().max() > 1e-3 and tap.applied[LAYER].all()


@family_all
@torch.no_grad()
def test_edits_while_decoding(family):
    model, text = model_of(family), tokens(2, 8)
    edits = Edits.cat([Edits.delete([0], [6], [1], K, V), Edits([-1], [3], [0], torch.randn(1, K), torch.randn(1, V))])
    with attach(model, {}, edits={LAYER: edits}):
        whole = result(model, text)
        out, cache = fed_on(model, text[:, :5], None)
        found = [out]
        for t in (5, 6, 7):
            out, cache = fed_on(model, text[:, t : t + 1], cache)
            found.append(out)
    close(torch.cat(found, 1), whole)
    assert (whole - result(model, text))[:, 6:].abs().max() > 1e-3


# ---- gradients ------------------------------------------------------------------------------------------------


def gradients(model, text):
    model.zero_grad(set_to_none=True)
    result(model, text, use_cache=False)[:, -3:].sin().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@family_all
@pytest.mark.parametrize("accelerate", [False, True])
def test_gradients_in_training_mode(family, accelerate):
    model, text = tiny_kda(family).train(), tokens(2, 21)
    plain = gradients(model, text)
    with attach(model, {(LAYER, 1): None}, accelerate=accelerate):
        hooked = gradients(model, text)
    assert hooked.keys() == plain.keys() and any("forget_gate" in name for name in plain)
    size = sum(float(x.double().square().sum()) for x in plain.values()) ** 0.5
    for name in plain:
        off, own = float((hooked[name] - plain[name]).double().norm()), float(plain[name].double().norm())
        assert off <= 5e-4 * max(own, 1e-3 * size), (name, off, own)


def test_gradients_of_writes():
    """Of an increment: as of an edit that adds to it."""
    model, text, (b, t, h) = tiny_kda("kimi_linear"), tokens(2, 7), (1, 3, 2)
    with attach(model, {(LAYER, 0): None}, write_gradients=True) as tap:
        result(model, text)[:, -1].square().sum().backward()
    right = torch.zeros(1, V, requires_grad=True)
    left = tap.writes[LAYER].left[b, t, None, h, 0].detach()
    with attach(model, {}, edits={LAYER: Edits([b], [t], [h], left, right)}):
        result(model, text)[:, -1].square().sum().backward()
    close(tap.write_gradients[LAYER][b, t, h], right.grad[0], 1e-3)
    assert right.grad.abs().max() > 1e-2


# ---- dictionaries ---------------------------------------------------------------------------------------------


def dictionary(target="state", kind="bilinear", seed=0, **more):
    sae = SAE(K, V, 12, k=3, kind=kind, target=target, **more)
    generator = torch.Generator().manual_seed(seed)
    for name, x in sae.named_parameters():
        if "enc" in name:
            x.data = torch.randn(x.shape, generator=generator) * (0.1 if name.startswith("b") else 1)
    return sae


@pytest.mark.parametrize("kind", ["bilinear", "matrix", "threshold"])
@torch.no_grad()
def test_codes_of_states_are_those_of_the_cached_ones(kind):
    model, text = model_of(), tokens(2, 70)
    sae = dictionary(kind="matrix" if kind == "matrix" else "bilinear")
    if kind == "threshold":
        sae.threshold = torch.full((12,), 0.05)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach(model, {(LAYER, 2): sae}) as tap:
            out, cache = fed_on(model, text[:, :67], None)
            for t in (67, 68, 69):
                out, cache = fed_on(model, text[:, t : t + 1], cache)
    slow = [str(w.message) for w in said if "slow" in str(w.message)]
    assert len(slow) == (kind == "matrix") and all("slow path for layer 1 head 2: a dense encoder" in x for x in slow)
    found = tap.firings
    codes = sae.encode(own_states(model, text)[:, :, 2])
    row, position, place = (codes.values > 0).nonzero(as_tuple=True)
    wanted = dict(
        zip(
            zip(row.tolist(), position.tolist(), codes.indices[row, position, place].tolist(), strict=True),
            codes.values[row, position, place].tolist(),
            strict=True,
        )
    )
    keys = zip(found.row.tolist(), found.position.tolist(), found.feature.tolist(), strict=True)
    got = dict(zip(keys, found.activation.tolist(), strict=True))
    assert len(wanted) > 100
    for key in got.keys() | wanted.keys():  # one on either side alone is a rounding away from the cut
        if key in got and key in wanted:
            assert abs(got[key] - wanted[key]) < 1e-3
    assert len(got.keys() ^ wanted.keys()) <= 0.01 * len(wanted)


@torch.no_grad()
def test_codes_of_states_see_edits_before_the_read():
    model, text, t = model_of(), tokens(1, 6), 3
    left, right = torch.randn(1, K), torch.randn(1, V)
    sae = dictionary()
    for when in ("before", "after"):
        edits = {LAYER: Edits([0], [t], [2], left, right, when=when)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with attach(model, {(LAYER, 2): sae}, edits=edits) as tap:
                model(text)
        states = tap.writes[LAYER].states(range(6), read=True)[0, :, 2]
        codes = sae.encode(states)
        fires = codes.values > 0
        close(tap.firings.activation, codes.values[fires].float())
        assert torch.equal(tap.firings.position.long(), fires.nonzero()[:, 0])


@torch.no_grad()
def test_dictionaries_of_writes_need_no_states():
    model, text = model_of(), tokens(2, 9)
    sae = dictionary("write")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, {(LAYER, 2): sae}) as tap:
            model(text)
    writes = tap.writes[LAYER]
    codes = sae.encode_writes(writes.left[:, :, 2], writes.right[:, :, 2])
    close(tap.firings.activation.sort().values, codes.values[codes.values > 0].float().sort().values)
    assert len(tap.firings) > 20


# ---- tables that are wrong ------------------------------------------------------------------------------------


def _scalar(site, given):
    """As if the gate were one a head."""
    call = CHUNK.bind(site, given)
    return replace(call, inputs={**call.inputs, "g": given["g"].mean(-1)})


def _transposed(state):
    return None if state is None else state.transpose(-1, -2)


def _unnormed(site, given):
    return replace(CHUNK.bind(site, given), options={"use_qk_l2norm": False})


CHUNK, STEP = hf_kda.BINDING.recurrences
WRONG = {
    "gate": (CHUNK, {"bind": _scalar}, f"the output of the {hf_kda.BINDING.name} of layer 1 differs"),
    "norm": (CHUNK, {"bind": _unnormed}, f"the output of the {hf_kda.BINDING.name} of layer 1 differs"),
    "state": (
        CHUNK, {"answer": lambda given, out: (out.o, _transposed(out.final_state))},
        f"the state of the {hf_kda.BINDING.name} of layer 1 differs",
    ),
    "step": (STEP, {"bind": _scalar}, "the output of the one-token rule of layer 1 differs"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_self_test_catches_a_wrong_table(monkeypatch, name):
    of, change, message = WRONG[name]
    wrong = replace(
        hf_kda.BINDING, recurrences=tuple(replace(r, **change) if r is of else r for r in hf_kda.BINDING.recurrences)
    )
    monkeypatch.setattr(sites, "bindings", [wrong if b is hf_kda.BINDING else b for b in binding.bindings])
    monkeypatch.setattr(self_test, "_passed", set())
    with pytest.raises(RuntimeError, match=f"attach: self-test failed: {message}"):
        with attach(tiny_kda(), {(LAYER, 0): None}):
            pass


# ---- experiments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [0, 2])
@torch.no_grad()
def test_forks_above_and_below_latent_attention(attention):
    """Which caches latents, not the keys and values that it reads."""
    types = ["full_attention" if i == attention else "linear_attention" for i in range(3)]
    model, text = tiny_kda(layer_types=types), tokens(1, 12)
    places = Places(torch.tensor([0, 0]), torch.tensor([2, 6]), torch.tensor([2, 1]))
    engine = ForkEngine(model, LAYER, 3)
    clean = engine.clean(text, torch.tensor([12]), lambda writes: places)
    native = read(clean, clean.left, clean.right)
    hidden = engine.run(clean, {"baseline": None, "delete": -native})
    logits = {name: engine.logits(x) for name, x in hidden.items()}
    plain = model(text).logits
    with attach(model, {}, edits={LAYER: Edits.delete([0, 1], [2, 6], [2, 1], K, V)}):
        deleted = model(text.expand(2, -1)).logits
    for i, t in enumerate((2, 6)):
        close(logits["baseline"][i], plain[0, t : t + 4])
        close(logits["delete"][i], deleted[i, t : t + 4])
    assert (logits["delete"] - logits["baseline"]).abs().max() > 1e-3
