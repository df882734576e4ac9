"""Models of the package mamba-ssm on a CPU: `models.mamba_ssm`."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forking import compare_times_of_reading, compare_with_whole_passes

from writesae import SAE, Edits
from writesae.models import attach, binding, layers, mamba_ssm, patch, self_test
from writesae.models.tiny import VOCAB
from writesae.models.tiny import tiny_mamba_ssm as tiny
from writesae.ops import selective_scan, ssd
from writesae.testing import check_close

if importlib.util.find_spec("mamba_ssm") is None:
    pytest.skip(
        "mamba-ssm is not installed; `make test-libraries LIBRARIES=mamba-ssm` runs these with it",
        allow_module_level=True,
    )

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:mamba_ssm. ", "ignore:.*running the slow", "ignore:attach. slow path"),
]
mamba_ssm.import_library()
T = 12
# of a layer: heads, K, V
SIZES = {"Mamba2": (4, 8, 16), "Mamba1": (1, 8, 64)}
each_layer = pytest.mark.parametrize("layer", ["Mamba2", "Mamba1"])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(rows=2, length=T):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def on_cache(model, text, prefill, look=lambda params: None):
    """Logits of a prefill and of single tokens after it, and what `look` says after each."""
    from mamba_ssm.utils.generation import InferenceParams

    params = InferenceParams(max_seqlen=text.shape[1], max_batch_size=len(text))
    out, seen = [model(text[:, :prefill], inference_params=params).logits], [look(params)]
    for t in range(prefill, text.shape[1]):
        params.seqlen_offset = t
        out.append(model(text[:, t : t + 1], inference_params=params).logits)
        seen.append(look(params))
    return torch.cat(out, 1), seen


def kept(params, index):
    """`[B, H, K, V]` of the package's own cache."""
    state = params.key_value_memory_dict[index][1].mT.clone()
    return state if state.ndim == 4 else state[:, None]


def dictionary(layer):
    """A random one, which fires as a random one does."""
    _, K, V = SIZES[layer]
    return SAE(K, V, 24, k=4)


# ---- the same model --------------------------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("accelerate", [False, True])
@torch.no_grad()
def test_logits_states_and_decode_are_the_models_own(layer, accelerate):
    model, text = tiny(layer), tokens()
    H, K, V = SIZES[layer]
    site = layers(model)[1]
    assert [s.layer_index for s in layers(model)] == [0, 1, 2] and site.conv_kernel_size == 4
    assert (site.num_v_heads, site.K, site.V) == (H, K, V)
    with mamba_ssm.on_cpu():
        plain = model(text).logits
        _, states = on_cache(model, text, 1, lambda params: kept(params, 1))
    assert states[-1].abs().max() > 1e-2
    with attach(model, {(1, 0): None}, accelerate=accelerate) as tap:
        close(model(text).logits, plain)
        close(tap.writes[1].states(range(T)), torch.stack(states, 1))
        starts, seen = on_cache(model, text, 7, lambda params: (tap.starts[1], kept(params, 1)))
        close(starts, plain)
        assert [start for start, _ in seen] == [0, 7, 8, 9, 10, 11]
        close(seen[-1][1], states[-1])
        close(tap.writes[1].states([0])[:, 0], states[-1])
    assert not patch.patches and not patch.entries


@each_layer
@torch.no_grad()
def test_generate_is_the_models_own_and_fires_once_a_token(layer):
    model, text = tiny(layer), tokens()[:, :5]
    with mamba_ssm.on_cpu():
        plain = model.generate(text, max_length=T)
    with attach(model, {(1, 0): None}) as tap:
        assert torch.equal(model.generate(text, max_length=T), plain) and tap.calls == {1: T - 5}
    sae = dictionary(layer)
    with attach(model, {(1, 0): sae}) as tap:
        assert torch.equal(model.generate(text, max_length=T), plain)
    made = tap.firings
    with attach(model, {(1, 0): sae}) as tap:
        model(plain[:, :-1])
        states = tap.writes[1].states(range(T - 1))[:, :, 0]
    at_once = tap.firings

    def dense(firings):
        out = torch.zeros(2, T - 1, 24)
        out[firings.row.long(), firings.position.long(), firings.feature.long()] = firings.activation
        return out

    assert len(made) and dense(made).abs().sum() > 1e-2
    close(dense(made), dense(at_once), 2e-4)
    v_enc, w_enc, b_enc = (x.detach() for x in sae.encoder())
    pre = torch.einsum("frk,btkv,frv->btf", v_enc, states, w_enc) + b_enc
    top = torch.zeros_like(pre).scatter(-1, pre.topk(4).indices, pre.topk(4).values.relu())
    close(dense(at_once), top, 2e-4)


@each_layer
@torch.no_grad()
def test_edits_planned_are_edits_made_on_the_cache(layer):
    """Deleting a write equals taking its product out of the package's own state after the token."""
    model, text = tiny(layer), tokens()
    H, K, V = SIZES[layer]
    head, column = H - 1, 6
    edits = Edits.delete(1, column, head, K=K, V=V)
    with attach(model, {(2, head): None}, edits={2: edits}) as tap:
        planned = model(text).logits
        by_tokens, _ = on_cache(model, text, column)
        assert bool(tap.applied[2].all())
    close(by_tokens, planned)

    with attach(model, {(2, head): None}) as tap:
        plain, left, right = model(text).logits, *tap.writes[2].native(1, column, head)
        assert (planned - plain)[1, column:].abs().max() > 1e-3
        assert torch.equal(planned[0], plain[0]) and (planned - plain)[1, :column].abs().max() < 1e-5

        def look(params):
            if params.seqlen_offset == column:
                state = params.key_value_memory_dict[2][1]
                product = (left.reshape(-1, K).mT @ right.reshape(-1, V)).mT
                (state[1, head] if state.ndim == 4 else state[1]).sub_(product)

        recomputed, _ = on_cache(model, text, column, look)
    close(recomputed[:, column + 1 :], planned[:, column + 1 :])


@each_layer
def test_gradients_in_training_mode(layer):
    model, text = tiny(layer).train(), tokens()

    def gradients():
        model.zero_grad()
        F.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with mamba_ssm.on_cpu():
        plain = gradients()
    with attach(model, {(0, 0): None}):
        check_close("gradients", gradients(), plain, 2e-5)


SETTINGS = [
    {"D_has_hdim": True}, {"rmsnorm": False}, {"d_ssm": 32}, {"norm_before_gate": True}, {"dt_limit": (0.1, 0.6)},
    {"attention": (1,)},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
@torch.no_grad()
def test_settings_of_mamba2(settings):
    model, text = tiny(**settings), tokens()
    with mamba_ssm.on_cpu():
        plain = model(text).logits
    with attach(model, {(2, 1): None}) as tap:
        close(model(text).logits, plain)
        assert tap.writes[2].right.abs().max() > 0


@pytest.mark.parametrize("layer", ["Mamba2", "Mamba1"])
@torch.no_grad()
def test_half_precision(layer):
    model, text = tiny(layer, dtype=torch.bfloat16), tokens()
    with mamba_ssm.on_cpu():
        plain = model(text).logits
    with attach(model, {(0, 0): None}):
        check_close("logits", model(text).logits, plain, 2e-2)


# ---- beside others ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_same_weights_in_transformers():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    theirs, text = tiny(), tokens()
    model_vocab = theirs.backbone.embedding.num_embeddings  # padded to a multiple of eight
    config = Mamba2Config(
        vocab_size=model_vocab, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16, state_size=8, n_groups=2,
        expand=2, chunk_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    weights = {name.replace(".embedding.", ".embeddings."): x for name, x in theirs.state_dict().items()}
    model.load_state_dict(weights)
    sites = {(1, 2): None}
    with attach(model, sites) as tap, attach(theirs, sites) as their_tap:
        close(theirs(text).logits, model(text).logits)
    close(their_tap.writes[1].states([5, T - 1]), tap.writes[1].states([5, T - 1]))
    close(model(text).logits, model(text).logits)  # transformers keeps to torch where there is no GPU


@pytest.mark.parametrize("seed", range(4))
def test_their_references_agree_with_the_rules(seed):
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref

    g = torch.Generator().manual_seed(seed)
    B, T, H, G, K, V = 2, (16, 32, 48, 64)[seed], 6, (1, 2, 3, 6)[seed], (4, 8, 16, 5)[seed], (12, 3, 8, 16)[seed]
    x, b, c = (torch.randn(B, T, *size, generator=g) for size in ((H, V), (G, K), (G, K)))
    dt, A, D = torch.rand(B, T, H, generator=g), -torch.rand(H, generator=g) - 0.1, torch.randn(H, generator=g)
    S = torch.randn(B, H, K, V, generator=g)
    out = ssd(x, dt, A, b, c, None, S, output_final_state=True)
    grouped = (y.repeat_interleave(H // G, 2) for y in (b, c))
    y, final = ssd_minimal_discrete(x * dt[..., None], A * dt, *grouped, 16, S.mT[:, None])
    check_close("ssd_minimal_discrete y", out.o, y)
    check_close("ssd_minimal_discrete state", out.final_state, final.mT)

    wide = (dt[:, 0, :, None].expand(-1, -1, V), A[:, None, None].expand(-1, V, K))
    state = S.mT.contiguous()
    y = selective_state_update_ref(state, x[:, 0], *wide, b[:, 0], c[:, 0], D[:, None].expand(-1, V))
    out = ssd(x[:, :1], dt[:, :1], A, b[:, :1], c[:, :1], D, S, output_final_state=True)
    check_close("selective_state_update_ref y", out.o[:, 0], y)
    check_close("selective_state_update_ref state", out.final_state, state.mT)

    u, rate, skip = x[:, :, 0], torch.rand(B, T, V, generator=g), torch.randn(V, generator=g)
    A1 = -torch.rand(V, K, generator=g) - 0.1
    y, final = selective_scan_ref(
        u.mT, rate.mT, A1, b[:, :, 0].mT, c[:, :, 0].mT, skip, return_last_state=True,
    )  # fmt: skip
    out = selective_scan(u, rate, A1, b[:, :, 0], c[:, :, 0], skip, output_final_state=True)
    check_close("selective_scan_ref y", out.o, y.mT)
    check_close("selective_scan_ref state", out.final_state[:, 0], final.mT)


def test_its_own_triton_code_agrees():
    """Interpreted, in a process of its own."""
    oracle = Path(__file__).with_name("mamba_ssm_oracle.py")
    run = subprocess.run([sys.executable, oracle], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split("\n")[:3] == ["steps: the same", "norms: the same", "sequences: the same"]


@torch.no_grad()
def test_packed_sequences_are_kept_apart():
    model, text = tiny(), tokens(1)
    index = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    with mamba_ssm.on_cpu():
        apart = torch.cat([model(text[:, :5]).logits, model(text[:, 5:]).logits], 1)
        close(model(text, seq_idx=index).logits, apart)
    with attach(model, {(1, 0): None}, accelerate=True) as tap:
        close(model(text, seq_idx=index).logits, apart)
        assert tap.writes[1].cu_seqlens.tolist() == [0, 5, 12]
        # What `generate` passes for form's sake does not pack.
        positions = torch.tensor([[*range(5), *range(7)]])
        alone = model(text).logits
        close(model(text, position_ids=positions).logits, alone)
        with pytest.raises(ValueError, match="seq_idx: expected one index"):
            model(tokens(), seq_idx=index.expand(2, -1))
    model = tiny(attention=(1,))
    with pytest.raises(ValueError, match="full-attention layers mix"), attach(model, {(0, 0): None}):
        model(text, seq_idx=index)


# ---- what is refused, and what is left -------------------------------------------------------------------------------


@torch.no_grad()
def test_what_cannot_be_seen_is_refused():
    model, text = tiny(), tokens()
    with attach(model, {(0, 0): None}):
        with pytest.raises(ValueError, match="cg: expected False while attached"):
            model.generate(text, max_length=T + 2, cg=True)
        model(text)
    model = tiny(D_has_hdim=True)
    with pytest.raises(ValueError, match="cannot do D_has_hdim"), attach(model, {(0, 0): None}):
        model.generate(text, max_length=T + 2)


@each_layer
@torch.no_grad()
def test_nothing_is_left_behind(layer):
    model, text = tiny(layer), tokens()
    flag = "use_mem_eff_path" if layer == "Mamba2" else "use_fast_path"
    mixer = model.backbone.layers[0].mixer
    spaces = [vars(sys.modules[type(mixer).__module__]), vars(sys.modules["mamba_ssm.ops.triton.layer_norm"]),
              vars(sys.modules["mamba_ssm.utils.generation"]), dict(vars(type(mixer)))]  # fmt: skip
    before = [dict(space) for space in spaces]
    with attach(model, {(0, 0): None}):
        model(text)
        assert getattr(mixer, flag) is False
        assert vars(copy.deepcopy(model).backbone.layers[0].mixer)[flag] is True
    assert getattr(mixer, flag) is True
    spaces[-1] = dict(vars(type(mixer)))
    assert [dict(space) for space in spaces] == before
    with pytest.raises((TypeError, RuntimeError, AttributeError)):  # its kernels, as ever
        model(text)


@each_layer
@torch.no_grad()
def test_contexts_nest_in_any_order(layer):
    model, text = tiny(layer), tokens()
    with mamba_ssm.on_cpu():
        plain = model(text).logits
        with attach(model, {(0, 0): None}) as outer, attach(model, {(1, 0): None}) as inner:
            with mamba_ssm.on_cpu():
                close(model(text).logits, plain)
            close(model(text).logits, plain)
        assert torch.equal(model(text).logits, plain)
    assert outer.calls == {0: 2} and inner.calls == {1: 2}
    assert not patch.patches and not patch.entries


def test_gradients_of_writes():
    """The gradient of what a token writes, times that, is the first-order change of its being deleted."""
    model, text = tiny(), tokens()

    def loss():
        return F.cross_entropy(model(text).logits[:, -1], text[:, 0])

    with attach(model, {(1, 2): None}, write_gradients=True) as tap:
        loss().backward()
    right = tap.writes[1].native(0, 6, 2)[1].flatten()
    predicted = -(right @ tap.write_gradients[1][0, 6, 2])
    small = torch.zeros(1, 8), torch.zeros(1, 16)
    left = tap.writes[1].native(0, 6, 2)[0].reshape(1, 8)
    with torch.no_grad():
        with attach(model, {(1, 2): None}, edits={1: Edits([0], [6], [2], left, -right[None] * 1e-2)}):
            changed = loss()
        with attach(model, {(1, 2): None}, edits={1: Edits([0], [6], [2], *small)}):
            before = loss()
    assert predicted.abs() > 1e-6
    torch.testing.assert_close((changed - before) / 1e-2, predicted.detach(), rtol=0.1, atol=1e-5)


@torch.no_grad()
def test_a_wrong_table_is_caught():
    def halved(site, given):
        call = scan.bind(site, given)
        return replace(call, inputs={**call.inputs, "dt": call.inputs["dt"] / 2})

    scan = mamba_ssm.MAMBA2.recurrences[0]
    model = tiny()
    self_test._passed.clear()
    wrong = replace(mamba_ssm.MAMBA2, recurrences=(replace(scan, bind=halved), mamba_ssm.MAMBA2.recurrences[1]))
    at = binding.bindings.index(mamba_ssm.MAMBA2)
    binding.bindings[at] = wrong
    try:
        with pytest.raises(RuntimeError, match="differs on our op from the model's own"), attach(model, {(0, 0): None}):
            pass
    finally:
        binding.bindings[at] = mamba_ssm.MAMBA2


def test_it_says_what_stands_in_once_and_needs_no_convolution_package():
    """In a process of its own, without causal_conv1d."""
    code = """
import sys, warnings
sys.modules["causal_conv1d"] = None
import torch
sys.path.insert(0, "tests")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import test_mamba_ssm as t
    for layer in ("Mamba2", "Mamba1", "Mamba2"):
        model, text = t.tiny(layer), t.tokens()
        with torch.no_grad(), t.mamba_ssm.on_cpu():
            plain = model(text).logits
        with torch.no_grad(), t.attach(model, {(0, 0): None}):
            t.close(model(text).logits, plain)
said = [str(w.message) for w in said if str(w.message).startswith("mamba_ssm: ")]
assert len(said) == 2, said
assert "without its CUDA extension" in said[0] and "definitions in torch" in said[1], said
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("index", [0, 1, 2])  # the residual is not there yet, is handed on, and is not read any more
@each_layer
def test_forks_equal_whole_forward_passes(layer, index):
    model = tiny(layer)
    with attach(model, {}, accelerate=True):
        compare_with_whole_passes(model, index)
        compare_times_of_reading(model, index)


def test_forks_with_attention_above_them_are_refused_by_name():
    model = tiny("Mamba2", attention=(2,))
    wrong = pytest.raises(RuntimeError, match="forks of MambaLMHeadModel without a change differ")
    with attach(model, {}, accelerate=True), wrong:
        compare_with_whole_passes(model, 0)
