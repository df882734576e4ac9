"""What an attach knows of the calls it serves: columns and ends as the caller says, failed calls, and models as people
have them: wrapped, quantized, offloaded, in training, under forward mode."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from test_attach import _fail, close, dictionaries, dictionary, one_edit, same_firings
from tiny_models import VOCAB, tiny_model, tokens
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import writesae
from writesae import Edits
from writesae.models import Stopped, attach, hf_gated_delta, load, self_test
from writesae.models.arguments import NAMES, Reader, cache_of, given_cache
from writesae.models.model_call import ModelCall
from writesae.models.sites import targets

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")


@pytest.fixture
def model():
    return tiny_model()


def unique(firings):
    keys = torch.stack([getattr(firings, n) for n in ("row", "position", "layer", "head", "feature")], 1)
    return len(keys) == len(keys.unique(dim=0))


class Script(LogitsProcessor):
    """Makes `generate` say what is given, a list a row."""

    def __init__(self, *text, after):
        self.text, self.after = text, after

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -1e9)
        for row in range(len(ids)):
            forced[row, self.text[row % len(self.text)][ids.shape[1] - self.after]] = 0
        return forced


def generate(model, prompt, *text, **kwargs):
    script = LogitsProcessorList([Script(*text, after=prompt.shape[1])])
    settings = dict(do_sample=False, pad_token_id=0, max_new_tokens=len(text[0]), logits_processor=script)
    return model.generate(prompt, **{**settings, **kwargs})


def one_pass(model, text):
    with attach(model, dictionaries()) as tap:
        model(text, use_cache=False)
    return tap.firings


# ---- where a row ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_an_end_token_in_a_streamed_text_is_a_token(model, pad):
    """Two texts joined by two end tokens, fed a token at a time: nothing is guessed from token values."""
    model.generation_config.pad_token_id = pad
    text = torch.tensor([[5, 6, 1, 1, 7, 8, 9, 10, 11]])
    with attach(model, dictionaries()) as tap:
        out = model(text[:, :2], use_cache=True)
        for t in range(2, text.shape[1]):
            out = model(text[:, t : t + 1], **given_cache(model, cache_of(out)))
    assert len(tap.firings) == 81
    same_firings(tap.firings, one_pass(model, text))


def test_without_an_end_token_nothing_ends(model):
    prompt = tokens(2, 4)
    with attach(model, dictionaries()) as tap:
        out = generate(model, prompt, [1, 1, 5, 6, 7, 1, 1], [8, 9, 1, 1, 0, 0, 6], eos_token_id=None)
    same_firings(tap.firings, one_pass(model, out[:, :-1]))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", [0, 1])
def test_a_row_that_generate_has_ended_is_fed_pads(model, use_cache, pad):
    """Also where the pad is the end token, and where every step feeds the whole text again."""
    prompt = tokens(2, 4)
    with attach(model, dictionaries()) as tap:
        out = generate(model, prompt, [5, 6, 1, 7, 8, 8, 8], [8, 9, 0, 9, 9, 5, 6], eos_token_id=1, pad_token_id=pad,
                       use_cache=use_cache)  # fmt: skip
    assert out[0, 4:].tolist() == [5, 6, 1] + [pad] * 4
    f = one_pass(model, out[:, :-1])
    assert unique(tap.firings)
    same_firings(tap.firings, f[~((f.row == 0) & (f.position > 6))])


class _StopRows(StoppingCriteria):
    def __call__(self, ids, scores, **_):
        return torch.tensor([ids.shape[1] >= 6, ids.shape[1] >= 9])


@pytest.mark.parametrize("end", [1, None])
def test_a_row_ends_however_generate_ends_it(model, end):
    """By a criterion of the user's: then it gets pads where there is an end token, and goes on talking where not."""
    prompt = tokens(2, 4)
    with attach(model, dictionaries()) as tap:
        out = generate(model, prompt, [5, 6, 7, 8, 9, 10, 11, 12, 13], eos_token_id=end,
                       stopping_criteria=StoppingCriteriaList([_StopRows()]))  # fmt: skip
    f = one_pass(model, out[:, :-1])
    if end is not None:
        assert out[0, 6:].tolist() == [0, 0, 0]
        f = f[~((f.row == 0) & (f.position > 5))]
    same_firings(tap.firings, f)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_guiding_text_has_rows_of_its_own(model, use_cache):
    prompt = tokens(2, 4)
    guide = dict(negative_prompt_ids=tokens(2, 4, seed=5), guidance_scale=1.5, use_cache=use_cache)
    with attach(model, dictionaries(), edits={0: one_edit(1, 5, 1)}) as tap:
        out = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, **guide)
    assert unique(tap.firings) and set(tap.firings.row.tolist()) == {0, 1, 2, 3} and tap.applied[0].all()
    with attach(model, dictionaries(), edits={0: one_edit(1, 5, 1)}) as again:
        model(out[:, :-1], use_cache=False)
    same_firings(tap.firings[tap.firings.row < 2], again.firings)


def test_every_name_a_release_has_for_the_cache(model):
    """Whoever passes the past by an older name, as transformers allows, gets the same columns."""
    text = tokens(1, 6)
    seen = 0
    for name in NAMES["cache"]:
        with attach(model, dictionaries(), edits={0: one_edit(0, 4, 1)}) as tap:
            cache = cache_of(model(text[:, :4], use_cache=True))
            try:
                model(text[:, 4:], **{name: cache}, use_cache=True)
            except TypeError:  # not a name of this release
                continue
            finally:
                tap.applied[0][:] = True
        seen += 1
        assert sorted(set(tap.firings.position.tolist())) == [0, 1, 2, 3, 4, 5], name
    assert seen


def test_what_cannot_be_read_is_refused(model, monkeypatch):
    cache = cache_of(model(tokens(1, 3), use_cache=True))
    read = Reader(lambda hidden_states, memory=None: None, "Layer")
    with pytest.raises(ValueError, match="expected the cache of Layer as cache, .* got it as 'memory'"):
        read((torch.zeros(1), cache), {})
    with pytest.raises(ValueError, match=r"a forward of Layer that takes cache or .* got \(hidden_states, memory\)"):
        read.require("hidden_states", "cache")
    x = torch.zeros(1, 1, 1, 1)
    recurrence = hf_gated_delta.BINDING.recurrences[0]
    known = (
        "beta, chunk_size, cu_seqlens, g, initial_state, key, output_final_state, query, use_qk_l2norm_in_kernel, value"
    )
    with pytest.raises(ValueError, match=f"called with {known}, got A_log, which changes what it computes"):
        recurrence.read((x, x, x), {"g": x, "beta": x, "A_log": x})
    with pytest.raises(ValueError, match="expected the recurrence to be called with query.* got no beta"):
        recurrence.read((x, x, x), {"g": x, "b": x})
    monkeypatch.setitem(NAMES, "cache", ("remembered",))
    with pytest.raises(ValueError, match="forward of Qwen3_5GatedDeltaNet that takes remembered"):
        with attach(model, dictionaries(), self_test=False):
            pass


def test_a_mask_that_fits_nothing_is_refused(model):
    call = ModelCall(model)
    for columns, wanted in ((7, 7), (10, 7), (12, 7)):  # of this call, with those held, of a cache with room to spare
        call.fill(model, {"attention_mask": torch.ones(2, columns)})
        assert call.real_tokens((2, 7), 3, torch.device("cpu")).shape == (2, wanted)
    for shape in ((2, 5), (2, 9), (3, 7)):
        call.fill(model, {"attention_mask": torch.ones(shape)})
        with pytest.raises(ValueError, match=r"attention_mask: expected \[2, 7\] .* or \[2, 10\] .*, got"):
            call.real_tokens((2, 7), 3, torch.device("cpu"))


class _PromptTuned(nn.Module):
    """Puts trained columns in front of the text, as prompt tuning does, and a longer mask with them."""

    def __init__(self, model, columns=3):
        super().__init__()
        self.model, self.columns = model, columns
        self.prompt = nn.Parameter(torch.randn(1, columns, model.config.hidden_size))

    def forward(self, input_ids, attention_mask):
        embedded = self.model.get_input_embeddings()(input_ids)
        embedded = torch.cat([self.prompt.expand(len(input_ids), -1, -1), embedded], 1)
        longer = torch.cat([attention_mask.new_ones(len(input_ids), self.columns), attention_mask], 1)
        return self.model(inputs_embeds=embedded, attention_mask=longer, use_cache=False)


def test_the_innermost_mask_counts(model):
    tuned, text = _PromptTuned(model), tokens(2, 6)
    mask = torch.ones_like(text)
    mask[0, 4:] = 0
    with attach(tuned, dictionaries()) as tap:
        tuned(text, mask)
    found = {(r, p) for r, p in zip(tap.firings.row.tolist(), tap.firings.position.tolist(), strict=True)}
    assert found == {(0, p) for p in range(7)} | {(1, p) for p in range(9)}


# ---- failed calls ---------------------------------------------------------------------------------------------


def test_a_failed_call_leaves_nothing(model):
    """Out of memory above layer 0, retried in halves."""
    text = tokens(4, 6)
    with attach(model, {(0, 0): dictionary()}) as tap:
        for half in text.split(2):
            model(half)
        expected = tap.firings
        tap.clear()
        kept = tap.writes
        handle = model.model.layers[3].register_forward_pre_hook(_fail)
        try:
            with pytest.raises(RuntimeError, match="inside"):
                model(text)
        finally:
            handle.remove()
        assert len(tap.firings) == 0 and tap.calls == {0: 2} and tap.writes == kept == {} and tap.starts == {}
        for half in text.split(2):
            model(half)
        assert tap.calls == {0: 4}
        same_firings(tap.firings, expected)
        shape = tap.writes[0].shape
        handle = model.lm_head.register_forward_pre_hook(_fail)  # after every layer
        try:
            with pytest.raises(RuntimeError, match="inside"):
                model(text)
        finally:
            handle.remove()
        assert tap.calls == {0: 4} and tap.writes[0].shape == shape
        same_firings(tap.firings, expected)


def test_an_edit_of_a_failed_call_has_not_applied(model):
    handle = model.model.layers[3].register_forward_pre_hook(_fail)
    with pytest.warns(RuntimeWarning, match="1 of 1 edits of layer 0 never applied"):
        with attach(model, {(0, 0): None}, edits={0: one_edit(0, 1, 1)}, self_test=False) as tap:
            with pytest.raises(RuntimeError, match="inside"):
                model(tokens(1, 4))
            handle.remove()
            tap.calls[0] = 1
    assert not tap.applied[0].any()


def test_a_call_ended_on_purpose_is_kept(model):
    def stop(*_):
        raise Stopped

    with attach(model, {(0, 0): dictionary()}) as tap:
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(Stopped):
            model(tokens(1, 4))
        handle.remove()
    assert tap.calls == {0: 1} and len(tap.firings)


# ---- where people really are ----------------------------------------------------------------------------------


def _classifier(kind, dtype):
    name = f"Qwen3NextFor{kind}Classification"
    config = tiny_model("qwen3_next").config
    config.num_labels = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name)(config).eval().to(dtype)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classification_heads(kind, dtype):
    model, text = _classifier(kind, dtype), tokens(1, 6)
    plain = model(text).logits
    with attach(model, dictionaries()) as tap:
        close(model(text).logits.float(), plain.float(), 1e-4 if dtype == torch.float32 else 0.05)
    assert tap.calls == {0: 1, 3: 1} and len(tap.firings)


def test_wrappers(model):
    text = tokens(2, 6)
    plain = model(text).logits
    expected = one_pass(model, text)
    with attach(nn.DataParallel(model), dictionaries()) as tap:
        close(nn.DataParallel(model)(text).logits, plain)
    same_firings(tap.firings, expected)
    two = nn.DataParallel(model)
    two.device_ids = [0, 1]
    with pytest.raises(ValueError, match="nn.DataParallel over 2 devices"), attach(two, dictionaries()):
        pass
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with attach(wrapped, dictionaries()) as tap:
            close(wrapped(text).logits, plain)
        same_firings(tap.firings, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_quantized_and_autocast(model):
    text = tokens(2, 6)
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    exact, plain = model(text).logits, small(text).logits
    with attach(small, dictionaries(), accelerate=True) as tap:
        hooked = small(text).logits
    # A rounding more or less moves numbers to the next of 256 levels, so the measure is what eight bits cost anyway.
    assert len(tap.firings) and (hooked - exact).norm() < 1.5 * (plain - exact).norm()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            plain = model(text).logits.float()
            with attach(model, dictionaries(), accelerate=True) as tap:
                hooked = model(text).logits.float()
        assert len(tap.firings) and (hooked - exact).norm() < 1.5 * (plain - exact).norm()


def test_a_training_model_is_tried_as_it_is(model):
    model.train()
    model.config.attention_dropout = 0.5
    seen = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    self_test._passed.clear()
    with attach(model, {(0, 0): None}):
        assert seen and all(seen)
        model(tokens(1, 3))
    handle.remove()


def test_offloaded_weights(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    text = tokens(2, 6)
    plain, expected = model(text).logits, one_pass(model, text)
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert next(away.parameters()).device.type == "meta"
    with attach(away, dictionaries()) as tap:
        close(away(text).logits, plain)
    same_firings(tap.firings, expected)
    bare = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="got parameters on the meta device"), attach(bare, {(0, 0): None}):
        pass


def test_the_self_test_runs_once_for_a_kind():
    model, _ = load("default")
    runs, right = [], self_test._run
    self_test._passed.clear()
    self_test._run = lambda inner: (runs.append(inner), right(inner))
    try:
        for _ in range(3):
            with attach(model, {}, edits={0: Edits.delete([0], [0], [0], 32, 64)}):
                model(torch.ones(1, 2, dtype=torch.long))
        assert len(runs) == 1
        with attach(model, {}, accelerate=True):
            pass
        model.model.layers[0].forward = model.model.layers[0].forward  # somebody's own: tried every time
        for _ in range(2):
            with attach(model, {}, accelerate=True):
                pass
        assert len(runs) == 4
    finally:
        self_test._run = right


def test_token_ids_are_not_the_vocabulary(model):
    """The end of the vocabulary is a token like any other."""
    text = torch.tensor([[VOCAB - 1, 0, 1, 2]])
    with attach(model, dictionaries()) as tap:
        model(text)
    assert set(tap.firings.position.tolist()) == {0, 1, 2, 3}


def test_forward_mode_goes_through_a_hooked_model(model):
    """A direction in the weights and in the embeddings: the hooked model's tangent is the plain one's."""
    text, forward_mode = tokens(2, 9), torch.autograd.forward_ad
    model.set_attn_implementation("eager")  # torch's fused attention knows no forward mode
    embedded = model.get_input_embeddings()(text)
    direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1))

    def tangent():
        with forward_mode.dual_level():
            logits = model(inputs_embeds=forward_mode.make_dual(embedded, direction), use_cache=False).logits
            return forward_mode.unpack_dual(logits)

    plain = tangent()
    for accelerate in (False, True):
        with attach(model, dictionaries(), accelerate=accelerate) as tap:
            hooked = tangent()
        close(hooked.primal, plain.primal)
        close(hooked.tangent, plain.tangent, 1e-3)
        same_firings(tap.firings, one_pass(model, text))
        assert not tap.firings.activation.requires_grad


def test_torch_func_is_right_or_refused(model):
    model.set_attn_implementation("eager")
    embedded = model.get_input_embeddings()(tokens(2, 9))
    direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1))

    def run(x):
        return model(inputs_embeds=x, use_cache=False).logits

    plain = torch.func.jvp(run, (embedded,), (direction,))
    with attach(model, {}, accelerate=True):
        for a, b in zip(torch.func.jvp(run, (embedded,), (direction,)), plain, strict=True):
            close(a, b, 1e-3)
    with attach(model, dictionaries()) as tap:
        with pytest.raises(RuntimeError, match="attach: layer 0 runs under torch.func"):
            torch.func.jvp(run, (embedded,), (direction,))
        assert tap.calls == {0: 0, 3: 0}
        run(embedded)


def test_a_dictionary_of_another_model_is_refused(model):
    default, _, saes = writesae.load_default()
    with attach(default, saes) as tap:
        default(torch.ones(1, 3, dtype=torch.long))
    assert len(tap.firings)
    other = copy.deepcopy(default)
    other.config._name_or_path = "somebody/else-0.8B"
    with pytest.raises(ValueError, match="made for the model 'default', got the model 'somebody/else-0.8B'"):
        with attach(other, saes):
            pass
    with attach(other, saes, any_model=True):
        other(torch.ones(1, 3, dtype=torch.long))
    assert "calls 1" in repr(tap) and "Tap(sites [(5, 3)]" in repr(tap)


def test_functions_that_cannot_run_here_are_not_called(model):
    """Bound to a GPU's kernel where there is no GPU: the model runs on ours, tried against the definition."""
    text = tokens(2, 6)
    plain, before = model(text).logits, []

    def kernel(*args, **kwargs):
        raise RuntimeError("0 active drivers")

    for site in hf_gated_delta.layers(model):
        for space, name in targets(site.module):
            if site.binding.recurrence(name) is not None:
                before.append((space, name, space[name]))
                space[name] = kernel
    try:
        with pytest.raises(RuntimeError, match="0 active drivers"):
            model(text)
        self_test._passed.clear()
        with attach(model, dictionaries(), accelerate=True) as tap:
            close(model(text).logits, plain)
            model.generate(text, max_new_tokens=3, do_sample=False, pad_token_id=0)
    finally:
        for space, name, function in reversed(before):
            space[name] = function
    assert len(tap.firings)
