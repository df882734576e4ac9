"""Models on Mamba-2's rule in transformers: `models.hf_mamba2`, and columns of caches that do not count them."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from decoding import close, functions, go_on, states_by_token
from tiny_models import mamba2_families, tiny_mamba2, tokens

from writesae import SAE, Edits
from writesae.models import attach, hf_mamba2, layers, self_test, sites
from writesae.models.arguments import cache_of, given_cache

FAMILIES = mamba2_families()
pytestmark = [
    pytest.mark.skipif(not FAMILIES, reason="transformers before 5.15 has no functions to stand in for"),
    pytest.mark.usefixtures("one_thread"),
]
H, G, K, V = 4, 2, 8, 16
family_all = pytest.mark.parametrize("family", FAMILIES)
family_some = pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("mamba2", "bamba")])


def recurrent_state(cache, layer):
    """`[B, H, K, V]` of a cache."""
    state = cache.layers[layer].recurrent_states
    return (state[0] if isinstance(state, dict) else state).transpose(-1, -2).clone()


def own_states(model, text, layer):
    """`[B, T, H, K, V]`, token by token, by the model alone."""
    return states_by_token(model, text, layer, recurrent_state)


# ---- the same model -------------------------------------------------------------------------------------------


@family_all
@pytest.mark.parametrize("accelerate", [False, True])
@torch.no_grad()
def test_logits_and_writes_are_the_models_own(family, accelerate):
    model, text = tiny_mamba2(family), tokens(2, 11)
    site = layers(model)[-1]
    assert (site.num_k_heads, site.num_v_heads, site.K, site.V, site.conv_kernel_size) == (G, H, K, V, 4)
    layer = site.layer_index
    plain, states = model(text).logits, own_states(model, text, layer)
    assert states[:, -1].abs().max() > 1e-2
    with attach(model, {(layer, 1): None}, accelerate=accelerate) as tap:
        close(model(text).logits, plain)
        close(tap.writes[layer].states(range(11)), states)
        out = model(text[:, :5], use_cache=True)
        close(out.logits, plain[:, :5])
        out = go_on(model, text[:, 5:8], 5, cache_of(out))  # several on a filled cache
        close(out.logits, plain[:, 5:8])
        close(tap.writes[layer].states(range(3)), states[:, 5:8])
        for t in (8, 9, 10):
            out = go_on(model, text[:, t : t + 1], t, cache_of(out))
            close(out.logits, plain[:, t : t + 1])
            close(tap.writes[layer].states([0]), states[:, t : t + 1])
            assert tap.starts[layer] == t
        close(recurrent_state(cache_of(out), layer), states[:, -1])


@family_all
@torch.no_grad()
def test_generate_with_pads(family):
    model, text = tiny_mamba2(family), tokens(3, 7)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    layer = layers(model)[-1].layer_index
    sae = SAE(K, V, 12, k=3)
    for x in (sae.v_enc, sae.w_enc):
        x.data.normal_()
    generate = functools.partial(
        model.generate, text, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    plain = generate()
    with attach(model, {(layer, 2): sae}) as tap:
        assert torch.equal(generate(), plain)
        found = tap.firings
    assert set(found.position[found.row == 1].tolist()) <= set(range(11)) and int(found.position.max()) >= 9
    assert int(found.position[found.row == 0].min()) >= 3
    # What fires is what the encoder says of the model's own states.
    state = own_states(model, plain[1:, :11], layer)[0, :, 2]
    pre = torch.einsum("frk,tkv,frv->tf", sae.v_enc.data, state - sae.mean, sae.w_enc.data) + sae.b_enc.data
    mine = found[(found.row == 1)]
    close(mine.activation, pre[mine.position.long(), mine.feature.long()], 1e-3)
    assert len(mine) == int((pre.topk(3).values > 0).sum()) > 10


@family_all
@torch.no_grad()
def test_padded_rows(family):
    model, text = tiny_mamba2(family), tokens(3, 9)
    mask = torch.ones_like(text)
    mask[0, :4], mask[1, 6:] = 0, 0
    layer = layers(model)[-1].layer_index
    plain = model(text, attention_mask=mask).logits
    with attach(model, {(layer, 0): None}, accelerate=True) as tap:
        close(model(text, attention_mask=mask).logits[mask.bool()], plain[mask.bool()])
    right = tap.writes[layer].right.flatten(2).abs().amax(-1)
    assert not right[mask == 0].any() and right[mask == 1].min() > 0
    close(model(text[:1, 4:], position_ids=torch.arange(4, 9)[None]).logits, plain[:1, 4:], 1e-4)


def test_under_autocast():
    model, text = tiny_mamba2(), tokens(2, 9)
    self_test._passed.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(text).logits
        with attach(model, {(1, 0): None}) as tap:
            close(model(text).logits.float(), plain.float(), 0.1)
    assert tap.calls == {1: 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype):
    model, text = tiny_mamba2(dtype=dtype), tokens(2, 9)

    def run():
        out = model(text, use_cache=True)
        last = model(text[:, :1], use_cache=True, **given_cache(model, cache_of(out)))
        return out.logits, last.logits, recurrent_state(cache_of(last), 0)

    plain = run()
    self_test._passed.clear()
    with attach(model, {(0, 0): None}):
        found = run()
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == b.dtype
        close(a, b, 0.05 if dtype == torch.bfloat16 else 1e-5)


@torch.no_grad()
def test_wide_heads():
    """Zamba2's heads are 640 wide."""
    if "zamba2" not in FAMILIES:
        pytest.skip("no Zamba2")
    model = tiny_mamba2(
        "zamba2", hidden_size=320, n_mamba_heads=1, mamba_headdim=640, mamba_d_state=64, mamba_ngroups=1,
        attention_head_dim=160,
    )  # fmt: skip
    text = tokens(1, 5)
    plain = model(text).logits
    with attach(model, {(0, 0): None}) as tap:
        close(model(text).logits, plain)
    assert tap.writes[0].left.shape[-1] == 64 and tap.writes[0].right.shape[-1] == 640


@torch.no_grad()
def test_falcon_with_a_norm_has_no_gate_in_its_step():
    if "falcon_h1" not in FAMILIES:
        pytest.skip("no Falcon-H1")
    model, text = tiny_mamba2("falcon_h1", mamba_rms_norm=True), tokens(2, 5)
    plain, states = model(text).logits, own_states(model, text, 0)
    with attach(model, {(0, 0): None}):
        out = go_on(model, text[:, :4], 0)
        out = go_on(model, text[:, 4:], 4, cache_of(out))
    close(out.logits, plain[:, 4:])
    close(recurrent_state(cache_of(out), 0), states[:, -1])


@torch.no_grad()
def test_kernels_of_the_model_that_cannot_run_here(monkeypatch):
    """With mamba_ssm installed and no GPU, the model's own functions fail; ours are held against the definition."""
    model, text = tiny_mamba2(), tokens(2, 5)
    plain = model(text).logits

    def no_driver(*args, **kwargs):
        raise RuntimeError("0 active drivers")

    for name in ("mamba2_chunk_scan", "mamba2_selective_state_update"):
        monkeypatch.setattr(functions(model), name, no_driver)
    self_test._passed.clear()
    with attach(model, {(0, 0): None}, accelerate=True):
        out = go_on(model, text[:, :4], 0)
        close(go_on(model, text[:, 4:], 4, cache_of(out)).logits, plain[:, 4:])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("nemotron_h", "zamba2")])
@torch.no_grad()
def test_step_sizes_are_limited_where_the_model_limits_them(family):
    """In whole sequences and not in single tokens: what transformers does, though the two then differ."""
    model, text = tiny_mamba2(family), tokens(2, 6)
    for site in layers(model):
        site.module.in_proj.weight.data[-H:] = 0
        site.module.dt_bias.data.fill_(-9.0)  # softplus: 1.2e-4, limit 1e-3
    plain, states = model(text).logits, own_states(model, text, 0)
    with attach(model, {(0, 0): None}) as tap:
        close(model(text).logits, plain)
        first = tap.writes[0].right[:, :1].clone()
        out = model(text[:, :1], use_cache=True)
        for t in range(1, 6):
            out = go_on(model, text[:, t : t + 1], t, cache_of(out))
        close(recurrent_state(cache_of(out), 0), states[:, -1], 1e-7)
        many = go_on(model, text[:, 1:], 1, cache_of(go_on(model, text[:, :1], 0)))
    assert recurrent_state(cache_of(many), 0).abs().max() > 3 * states[:, -1].abs().max()
    assert first.abs().max() > 0


# ---- training -------------------------------------------------------------------------------------------------


@family_all
def test_gradients_in_training_mode(family):
    model, text = tiny_mamba2(family).train(), tokens(2, 9)
    layer = layers(model)[0].layer_index

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
    b, t, h = 1, 3, 2
    right = torch.zeros(1, V, requires_grad=True)
    left = tap.writes[layer].left[b, t, None, h // (H // G), 0].detach()
    with attach(model, {}, edits={layer: Edits([b], [t], [h], left, right)}):
        model(text, use_cache=False).logits.square().mean().backward()
    close(tap.write_gradients[layer][b, t, h], right.grad[0], 1e-6)
    assert right.grad.abs().max() > 1e-7


def test_training_mode_does_not_go_past_the_rule(monkeypatch):
    """With a kernel for all at once, which is what a machine with mamba_ssm has."""
    model, text = tiny_mamba2().train(), tokens(2, 6)
    plain = model(text).logits
    asked = []

    def at_once(projected, *args, **kwargs):
        asked.append(1)
        return projected[..., :32] * 0

    monkeypatch.setattr(functions(model), "mamba2_split_conv1d_scan_combined", at_once)
    assert (model(text).logits - plain).abs().max() > 1e-3 and asked
    asked.clear()
    with attach(model, {(layer, 0): None for layer in range(3)}) as tap:
        close(model(text).logits, plain)
    assert not asked and tap.calls == {0: 1, 1: 1, 2: 1}
    self_test._passed.clear()
    monkeypatch.setattr(sites, "bindings", [replace(hf_mamba2.BINDING, bypasses={})])
    with pytest.raises(RuntimeError, match=r"layers \[0\] ran without calling the Mamba-2 recurrence"):
        with attach(model, {(0, 0): None}):
            pass


# ---- edits ----------------------------------------------------------------------------------------------------


def without_write(monkeypatch, model, place, after=False):
    """Has the first layer run as if dt x of a place were zero in its state; `after`: once that token has read."""
    space, calls = functions(model), []
    original = space.mamba2_chunk_scan
    b, t, h = place

    def scan(hidden_states, dt, A, B, C, **kwargs):
        calls.append(1)
        plain = original(hidden_states, dt, A, B, C, **kwargs)
        if len(calls) > 1:
            return plain
        x = hidden_states.clone()
        x[b, t, h] = 0
        out = original(x, dt, A, B, C, **kwargs)
        out[b, t, h] = plain[b, t, h] if after else out[b, t, h] + kwargs["D"][h] * hidden_states[b, t, h]
        return out

    monkeypatch.setattr(space, "mamba2_chunk_scan", scan)


@family_all
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_a_deleted_write_is_one_that_was_zero(family, when, monkeypatch):
    model, text, place = tiny_mamba2(family), tokens(2, 9), (1, 4, 2)
    layer = layers(model)[0].layer_index
    plain = model(text, use_cache=False).logits
    with attach(model, {}, edits={layer: Edits.delete(*place, K, V, when=when)}) as tap:
        edited = model(text, use_cache=False).logits
    assert tap.applied[layer].all()
    without_write(monkeypatch, model, place, after=when == "after")
    expected = model(text, use_cache=False).logits
    close(edited, expected)
    close(edited[:, :4], plain[:, :4])
    close(edited[0], plain[0])
    moved = (edited - plain)[1].abs().amax(-1)
    assert moved[5:].max() > 1e-4 and (moved[4] > 1e-4) == (when == "before")


@torch.no_grad()
def test_an_edit_while_decoding_is_what_it_does_to_the_cache():
    model, text, t = tiny_mamba2(), tokens(2, 8), 5
    left, right = torch.randn(K), torch.randn(V)

    def run(edit=lambda cache: None):
        out, found = model(text[:, :4], use_cache=True), []
        for i in range(4, 8):
            out = model(text[:, i : i + 1], use_cache=True, **given_cache(model, cache_of(out)))
            if i == t:
                edit(cache_of(out))
            found.append(out.logits)
        return torch.cat(found, 1)

    def add(cache):
        state = cache.layers[1].recurrent_states
        state = state[0] if isinstance(state, dict) else state
        state[0, 3] += right[:, None] * left

    plain, expected = run(), run(add)
    with attach(model, {}, edits={1: Edits.add(0, t, 3, left, right, when="after")}):
        close(run(), expected)
    assert (expected - plain)[0, 2:].abs().max() > 1e-3


# ---- packed batches -------------------------------------------------------------------------------------------


def packing(kind):
    restarts = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]])
    offsets = torch.tensor([0, 5, 8, 11], dtype=torch.int32)
    lengths = dict(max_length_q=5, max_length_k=5)
    return {
        "position_ids": dict(position_ids=restarts),
        "cu_seq_lens": dict(position_ids=restarts, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, **lengths),
        "cu_seqlens": dict(position_ids=restarts, cu_seqlens=offsets),
        "seq_idx": dict(position_ids=restarts, seq_idx=torch.tensor([[0] * 5 + [1] * 3 + [2] * 3], dtype=torch.int32)),
    }[kind]


@family_all
@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens", "cu_seqlens", "seq_idx"])
@torch.no_grad()
def test_packed_sequences_are_kept_apart(family, kind):
    model, text = tiny_mamba2(family), tokens(1, 11)
    layer = layers(model)[-1].layer_index
    if family == "granitemoehybrid":  # its attention masks are made without position_ids
        with attach(model, {(layer, 0): None}, self_test=False):
            with pytest.raises(ValueError, match="full-attention layers of GraniteMoeHybridForCausalLM mix the seq"):
                model(text, use_cache=False, **packing(kind))
            model(text, use_cache=False)
        return
    apart = torch.cat([model(part, use_cache=False).logits for part in text.split([5, 3, 3], 1)], 1)
    with attach(model, {(layer, 0): None}) as tap:
        packed = model(text, use_cache=False, **packing(kind)).logits
    close(packed, apart)
    assert tap.writes[layer].cu_seqlens.tolist() == [0, 5, 8, 11]
    assert (model(text, use_cache=False).logits - apart).abs().max() > 1e-3


def test_packed_sequences_with_a_cache_are_refused():
    model = tiny_mamba2()
    with attach(model, {(0, 0): None}, self_test=False):
        with pytest.raises(ValueError, match="packed batch: expected use_cache=False and no cache"):
            model(tokens(1, 11), use_cache=True, **packing("position_ids"))
        model(tokens(1, 3), use_cache=False)


# ---- caches that do not count ---------------------------------------------------------------------------------


@family_some
@torch.no_grad()
def test_a_cache_filled_before(family):
    """One of recurrent layers alone does not say how much it holds; then columns would be guessed, and are not."""
    model, text = tiny_mamba2(family), tokens(2, 6)
    cache = cache_of(model(text[:, :4], use_cache=True))
    with attach(model, {(0, 0): None}, self_test=False) as tap:
        if family == "mamba2":
            with pytest.raises(ValueError, match="cache: expected one that was empty or filled while attached"):
                model(text[:, 4:], use_cache=True, **given_cache(model, cache))
            model(text, use_cache=False)
        else:
            model(text[:, 4:], use_cache=True, **given_cache(model, cache))
            assert tap.starts[0] == 4


@torch.no_grad()
def test_a_cache_filled_before_will_do_where_no_column_is_asked_for():
    model, text = tiny_mamba2(), tokens(2, 6)
    plain = model(text).logits
    cache = cache_of(model(text[:, :4], use_cache=True))
    with attach(model, {}, accelerate=True):
        close(model(text[:, 4:], use_cache=True, **given_cache(model, cache)).logits, plain[:, 4:])


@torch.no_grad()
def test_columns_of_copies_and_of_a_cache_that_was_used_elsewhere():
    model, text = tiny_mamba2(), tokens(2, 8)
    plain = model(text).logits
    with attach(model, {(0, 0): None}) as tap:
        cache = cache_of(model(text[:, :4], use_cache=True))
        for _ in range(2):
            out = model(text[:, 4:], use_cache=True, **given_cache(model, copy.deepcopy(cache)))
            close(out.logits, plain[:, 4:])
            assert tap.starts[0] == 4
        model(text[:, 4:6], use_cache=True, **given_cache(model, cache))
    model(text[:, 6:7], use_cache=True, **given_cache(model, cache))
    with attach(model, {(0, 0): None}) as tap:
        with pytest.raises(ValueError, match="filled or changed while nothing was attached"):
            model(text[:, 7:], use_cache=True, **given_cache(model, cache))
        cache.reset()
        model(text, use_cache=True, **given_cache(model, cache))
        assert tap.starts[0] == 0


@torch.no_grad()
def test_beams():
    model, text = tiny_mamba2(), tokens(2, 5)
    kwargs = dict(max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False)
    plain = model.generate(text, **kwargs)
    with attach(model, {(0, 0): None}) as tap:
        assert torch.equal(model.generate(text, **kwargs), plain)
        assert tap.starts[0] == 9


# ---- what is wrong is refused ---------------------------------------------------------------------------------


def changed(recurrence, bind):
    """The table with another `bind` of one of its functions."""
    table = hf_mamba2.BINDING
    others = tuple(replace(r, bind=bind) if r is recurrence else r for r in table.recurrences)
    return replace(table, recurrences=others)


def with_input(bind, name, change):
    def wrong(site, given):
        call = bind(site, given)
        return replace(call, inputs={**call.inputs, name: change(call.inputs[name])})

    return wrong


SCAN, STEP = hf_mamba2.BINDING.recurrences
WRONG = {
    "groups": (SCAN, "B", lambda B: B.flip(2), "the output of the Mamba-2 recurrence of layer 0 differs"),
    "dt": (SCAN, "dt", lambda dt: dt + 0.1, "the output of the Mamba-2 recurrence of layer 0 differs"),
    "A": (SCAN, "A", lambda A: 1.5 * A, "the output of the Mamba-2 recurrence of layer 0 differs"),
    "x of a step": (STEP, "x", lambda x: x.flip(2), "the output of the one-token rule of layer 0 differs"),
    "state of a step": (STEP, "A", lambda A: 0.5 * A, "the output of the one-token rule of layer 0 differs"),
    "dt of a step": (STEP, "dt", lambda dt: dt.clamp(min=5.0), "the output of the one-token rule of layer 0 differs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_self_test_catches_a_wrong_table(name, monkeypatch):
    recurrence, which, change, message = WRONG[name]
    table = changed(recurrence, with_input(recurrence.bind, which, change))
    monkeypatch.setattr(sites, "bindings", [table])
    self_test._passed.clear()
    with pytest.raises(RuntimeError, match=f"attach: self-test failed: {message}"):
        with attach(tiny_mamba2(), {(0, 0): None}):
            pass


def test_the_self_test_catches_a_state_that_lies_otherwise(monkeypatch):
    table = hf_mamba2.BINDING
    scan = replace(SCAN, answer=lambda given, output: (output.o, output.final_state))
    monkeypatch.setattr(sites, "bindings", [replace(table, recurrences=(scan, STEP))])
    self_test._passed.clear()
    with pytest.raises(RuntimeError, match="attach: self-test failed: the .* of the Mamba-2 recurrence of layer 0"):
        with attach(tiny_mamba2(), {(0, 0): None}):
            pass


def test_the_self_test_catches_a_forgotten_gate(monkeypatch):
    step = replace(STEP, answer=lambda given, output: STEP.answer({**given, "z": None}, output))
    monkeypatch.setattr(sites, "bindings", [replace(hf_mamba2.BINDING, recurrences=(SCAN, step))])
    self_test._passed.clear()
    with pytest.raises(RuntimeError, match="self-test failed: the output of the one-token rule of layer 0 differs"):
        with attach(tiny_mamba2(), {(0, 0): None}):
            pass


def test_arguments_that_are_not_one_value_a_head():
    site = layers(tiny_mamba2())[0]
    x, B = torch.randn(2, H, V), torch.randn(2, G, K)
    given = dict(
        state=torch.zeros(2, H, V, K), hidden_states=x, dt=torch.rand(2, H, V), A=-torch.ones(H, V, K), B=B, C=B
    )
    with pytest.raises(ValueError, match=r"expected dt of mamba2_selective_state_update to be one value a head"):
        STEP.bind(site, given)
    with pytest.raises(ValueError, match="got z, which changes what it computes"):
        SCAN.read((x[:, None], x[:, None, :, 0], given["A"][:, 0, 0], B[:, None], B[:, None]), {"z": x})
