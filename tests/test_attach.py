"""`attach`: every family, both paths, generate, padding, packing, nesting, threads, removal, edits, refusals."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_models import families, tiny_model, tokens
from torch import Tensor

import writesae
from writesae import Edits
from writesae.models import attach, hf_gated_delta, sites

FAMILIES = families()
F, TOP = 24, 3
SITES = [(0, 0), (0, 3), (3, 1)]


@dataclass
class Dictionary:
    """What attach asks of a bilinear `SAE`."""

    v: Tensor  # [F, 1, K]
    w: Tensor  # [F, 1, V]
    b: Tensor  # [F]
    kind: str = "bilinear"
    k: int = TOP
    threshold: float | None = None

    def __post_init__(self):
        self.F, self.K, self.V = len(self.v), self.v.shape[-1], self.w.shape[-1]

    def encoder(self):
        return self.v, self.w, self.b


@dataclass
class DenseDictionary:
    """What attach asks of a `matrix` or `flat` `SAE`; the same activations as a bilinear one."""

    like: Dictionary
    kind: str = "matrix"
    threshold: float | None = None

    def __post_init__(self):
        self.k, self.K, self.V = self.like.k, self.like.K, self.like.V
        self.shapes = []

    def encode(self, X):
        self.shapes.append(tuple(X.shape))
        pre = torch.einsum("frk,nkv,frv->nf", self.like.v, X, self.like.w) + self.like.b
        top = pre.topk(self.k)
        return _Codes(top)


class _Codes:
    def __init__(self, top):
        self.values, self.indices = top.values.relu(), top.indices


def dictionary(seed=0, K=8, V=6, features=F, **kwargs):
    g = torch.Generator().manual_seed(seed)
    return Dictionary(
        torch.randn(features, 1, K, generator=g), torch.randn(features, 1, V, generator=g),
        0.01 * torch.randn(features, generator=g), **kwargs,
    )  # fmt: skip


def dictionaries():
    return {site: dictionary(i) for i, site in enumerate(SITES)}


pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(family="qwen3_5", **kwargs):
        key = (family, *sorted(kwargs.items()))
        if key not in made:
            made[key] = tiny_model(family, **kwargs)
        return made[key]

    return get


def close(a, b, limit=1e-4):
    assert a.shape == b.shape
    off = float((a - b).abs().max() / b.abs().max())
    assert off < limit, off


def same_firings(a, b, limit=1e-4):
    a, b = a.sort(), b.sort()
    for name in ("row", "position", "layer", "head", "feature"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape, (name, x.shape, y.shape)
        if name != "feature":
            assert torch.equal(x, y), name
    # Codes within rounding of each other may change places, so features are compared with their activations.
    assert torch.allclose(a.activation, b.activation, atol=limit, rtol=limit)
    assert (a.feature == b.feature).float().mean() > 0.99


def expected_firings(tap_writes, start=0):
    """Firings from states, for one unpadded call: the definition."""
    rows = []
    for layer, writes in tap_writes.items():
        B, T = writes.shape[:2]
        states = writes.states(list(range(T)))  # [B, T, H, K, V]
        for i, (site_layer, head) in enumerate(SITES):
            if site_layer != layer:
                continue
            d = dictionary(i)
            pre = torch.einsum("frk,btkv,frv->btf", d.v, states[:, :, head], d.w) + d.b
            top = pre.topk(TOP)
            for b in range(B):
                for t in range(T):
                    for value, f in zip(top.values[b, t].tolist(), top.indices[b, t].tolist(), strict=True):
                        if value > 0:
                            rows.append((b, t + start, layer, head, f, value))
    columns = list(zip(*rows, strict=True))
    return writesae.Firings(*(torch.tensor(c) for c in columns[:5]), torch.tensor(columns[5]))


def module_functions(model):
    """The namespaces that attach may touch."""
    space = sys.modules[type(hf_gated_delta.layers(model)[0].module).__module__].__dict__
    own = [dict(m.__dict__) for m in model.modules()] + [dict(type(m).__dict__) for m in model.modules()]
    return {k: v for k, v in space.items() if callable(v)}, [{k: v for k, v in d.items() if callable(v)} for d in own]


# ---- runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_prefill_chunk_and_decode(models, family):
    model = models(family)
    x = tokens(2, 14)
    plain = model(x).logits
    before = module_functions(model)
    with attach(model, dictionaries()) as tap:
        close(model(x, use_cache=False).logits, plain)
        whole = tap.firings
        same_firings(whole, expected_firings(tap.writes))
        assert tap.writes[0].shape == (2, 14, 4, 8, 6) and tap.writes[0].left.shape[2] == 2
        tap.clear()
        assert len(tap.firings) == 0
        out = model(x[:, :6], use_cache=True)  # prefill, continuation in a chunk, then steps
        parts = [out.logits]
        out = model(x[:, 6:11], past_key_values=out.past_key_values)
        parts.append(out.logits)
        for t in range(11, 14):
            out = model(x[:, t : t + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
        assert tap.starts[0] == 13
        close(torch.cat(parts, 1), plain)
        same_firings(tap.firings, whole)
        assert tap.calls == {0: 6, 3: 6}
    assert module_functions(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_each_sequence_alone(models, family):
    # Qwen4-Exp's n-gram embeddings read across sequences by themselves (refused, below).
    model = models(family, **({"ple_layer_ids": None} if family == "qwen4_exp" else {}))
    lengths = [5, 1, 8]
    rows = [tokens(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    alone, firings = [], []
    with attach(model, dictionaries()) as tap:
        for n, row in enumerate(rows):
            alone.append(model(row, use_cache=False).logits)
            f = tap.firings
            firings.append(writesae.Firings(f.row + n, f.position, f.layer, f.head, f.feature, f.activation))
            tap.clear()
    index = torch.tensor([0] * 5 + [1] + [2] * 8)[None]
    for extra in ({}, {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}, {"seq_idx": index.int()}):
        with attach(model, dictionaries()) as tap:
            packed = model(torch.cat(rows, 1), position_ids=positions, use_cache=False, **extra).logits
        close(packed, torch.cat(alone, 1))
        same_firings(tap.firings, writesae.Firings.cat(firings))
        assert tap.writes[3].num_sequences == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_fires_and_changes_nothing(models, side):
    model = models()
    short, long = tokens(1, 5, seed=1), tokens(1, 9, seed=2)
    pads = torch.zeros(1, 4, dtype=torch.long)
    row = torch.cat([pads, short] if side == "left" else [short, pads], 1)
    mask = torch.ones(2, 9, dtype=torch.long)
    shift = 4 if side == "left" else 0
    mask[0, :4] = 0 if side == "left" else 1
    if side == "right":
        mask[0, 5:] = 0
    ids = torch.cat([row, long])
    with attach(model, dictionaries()) as tap:
        model(short)
        a = tap.firings
        tap.clear()
        model(long)
        b = tap.firings
        tap.clear()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids, attention_mask=mask, position_ids=positions)
        both = tap.firings
    expected = [
        writesae.Firings(a.row, a.position + shift, a.layer, a.head, a.feature, a.activation),
        writesae.Firings(b.row + 1, b.position, b.layer, b.head, b.feature, b.activation),
    ]
    same_firings(both, writesae.Firings.cat(expected))


def test_left_pads_in_a_chunked_prefill(models):
    model = models()
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with attach(model, dictionaries()) as tap:
        model(ids, attention_mask=mask, use_cache=False)
        whole = tap.firings
        tap.clear()
        # (All pads are in the first chunk: transformers < 5.15 lets a pad of a later one into its own states.)
        out = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
        out = model(ids[:, 4:5], attention_mask=mask[:, :5], past_key_values=out.past_key_values)
        for t in range(5, 8):
            out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=out.past_key_values)
        same_firings(tap.firings, whole)
    assert not ((whole.row == 0) & (whole.position < 3)).any()


GENERATE = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.3, top_k=20),
    "beams": dict(do_sample=False, num_beams=3),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how, accelerate", [("greedy", False), ("greedy", True), ("sampling", True), ("beams", False)])
def test_generate_gives_the_plain_models_tokens(models, family, how, accelerate):
    model = models(family)
    prompt, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    prompt[0, :2], mask[0, :2] = 0, 0
    arguments = dict(attention_mask=mask, max_new_tokens=8, pad_token_id=0, **GENERATE[how])
    torch.manual_seed(3)
    plain = model.generate(prompt, **arguments)
    torch.manual_seed(3)
    with attach(model, dictionaries(), accelerate=accelerate) as tap:
        hooked = model.generate(prompt, **arguments)
    assert torch.equal(plain, hooked)
    beams = GENERATE[how].get("num_beams", 1)
    f = tap.firings
    assert int(f.row.max()) == 2 * beams - 1 and int(f.position.max()) == plain.shape[1] - 2
    assert not ((f.row < beams) & (f.position < 2)).any()  # pads of the first prompt


def test_generate_firings_equal_one_pass_over_its_text(models):
    model = models()
    with attach(model, dictionaries()) as tap:
        text = model.generate(tokens(2, 5), max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
        decoded = tap.firings
        tap.clear()
        model(text[:, :-1])
        same_firings(decoded, tap.firings)


def test_rows_that_generate_has_finished_do_not_fire(models):
    model = models()
    prompt = tokens(3, 5)
    free = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    end = int(free[1, 7])  # row 1 (at least) ends at column 7
    with attach(model, dictionaries()) as tap:
        text = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=end)
        f = tap.firings
    assert any(end not in text[n, 5:].tolist() for n in range(3)), "the test needs a row that goes on"
    for n in range(3):
        generated = text[n, 5:].tolist()
        last = 5 + generated.index(end) if end in generated else text.shape[1] - 2
        assert int(f.position[f.row == n].max()) == min(last, text.shape[1] - 2)


def test_beam_reordering_keeps_carries_exact(models):
    """After a reorder the carried pre-activations belong to other rows: then they must come from the state."""
    model = models()
    x = tokens(2, 7)
    order = torch.tensor([1, 0])
    with attach(model, dictionaries()) as tap:
        out = model(x, use_cache=True)
        cache = out.past_key_values
        cache.reorder_cache(order)
        tap.clear()
        model(tokens(2, 1, seed=5), past_key_values=cache)
        moved = tap.firings
        tap.clear()
        model(torch.cat([x[order], tokens(2, 1, seed=5)], 1))
        f = tap.firings
        same_firings(moved, f[f.position == 7])


def test_attached_in_the_middle_of_a_generation_counts_columns(models):
    model = models()
    x = tokens(2, 9)
    out = model(x[:, :8], use_cache=True)
    with attach(model, dictionaries()) as tap:
        model(x[:, 8:], past_key_values=out.past_key_values)
        step = tap.firings
        tap.clear()
        model(x)
        f = tap.firings
    assert set(step.position.tolist()) == {8}
    same_firings(step, f[f.position == 8])


def test_a_model_of_linear_layers_only():
    """transformers cannot use its caches there; everything else works."""
    model = tiny_model(layer_types=["linear_attention"] * 2)
    x = tokens(1, 6)
    plain = model(x, use_cache=False).logits
    with attach(model, {(1, 0): dictionary()}) as tap:
        close(model(x, use_cache=False).logits, plain)
    assert set(tap.firings.position.tolist()) == set(range(6))


def test_threshold_and_dense_dictionaries(models):
    model = models()
    x, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    x[0, :3], mask[0, :3] = 0, 0
    dense = DenseDictionary(dictionary(1))
    with pytest.warns(RuntimeWarning, match="slow path for layer 0 head 1"):
        with attach(model, {(0, 1): dense, (0, 2): dictionary(1, threshold=0.4), (1, 1): dictionary(1)}) as tap:
            model(x, attention_mask=mask)
    f = tap.firings
    assert max(s[0] for s in dense.shapes) <= 64 and dense.shapes[0][1:] == (8, 6)
    with attach(model, {(0, 1): dictionary(1), (0, 2): dictionary(1, k=F)}) as tap:
        model(x, attention_mask=mask)
    g = tap.firings
    same_firings(f[(f.layer == 0) & (f.head == 1)], g[g.head == 1])
    same_firings(f[(f.layer == 0) & (f.head == 2)], g[(g.head == 2) & (g.activation > 0.4)])


def test_bfloat16(models):
    model = models(dtype=torch.bfloat16)
    x = tokens(2, 9)
    with attach(model, dictionaries(), accelerate=True) as tap:
        out = model.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= 13 and tap.writes[0].right.dtype == torch.float32 and len(tap.firings)


def test_multi_modal_wrapper():
    import transformers

    text = tiny_model().config.to_dict()
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    assert [s.layer_index for s in hf_gated_delta.layers(model)] == [0, 1, 3]
    x, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    plain = model.generate(x, **arguments)
    with attach(model, dictionaries()) as tap:
        assert torch.equal(model.generate(x, **arguments), plain)
    f = tap.firings
    assert len(f) and not ((f.row == 1) & (f.position < 2)).any()


# ---- living together ------------------------------------------------------------------------------------------


def test_nested_attaches_both_record_and_edit(models):
    model = models()
    x = tokens(2, 8)
    edit_a, edit_b = one_edit(0, 2, 1, seed=1), one_edit(1, 4, 3, seed=2)
    with attach(model, {}, edits={0: Edits.cat([edit_a, edit_b])}):
        both = model(x).logits
    with attach(model, {(0, 0): dictionary(0)}, edits={0: edit_a}) as outer:
        one = model(x).logits
        with attach(model, {(0, 3): dictionary(1), (1, 0): None}, edits={0: edit_b}) as inner:
            close(model(x).logits, both)
        close(model(x).logits, one)
    assert outer.calls == {0: 3} and inner.calls == {0: 1, 1: 1}
    assert set(outer.firings.head.tolist()) == {0} and set(inner.firings.head.tolist()) == {3}


def test_other_models_of_the_class_are_untouched(models):
    hooked, plain, other = models(), tiny_model(seed=1), tiny_model(seed=2)
    x = tokens(1, 6)
    expected = plain(x).logits
    with attach(hooked, {(0, 0): None}, accelerate=True) as tap, attach(other, {(1, 0): None}) as tap2:
        assert torch.equal(plain(x).logits, expected)
        hooked(x), other(x), other(x)
    assert tap.calls == {0: 1} and tap2.calls == {1: 2}


def test_threads(models):
    model, plain = models(), tiny_model(seed=1)
    batches = [tokens(1, 4 + n, seed=n) for n in range(4)]
    with attach(model, dictionaries()) as tap:
        expected = []
        for batch in batches:
            expected.append((model(batch).logits, tap.firings))
            tap.clear()
    untouched = plain(batches[0]).logits
    failures = []

    def work(n):
        try:
            with torch.no_grad():
                for _ in range(3):
                    if n == 3:
                        assert torch.equal(plain(batches[0]).logits, untouched)
                        with attach(plain, {(0, 0): None}, self_test=False):
                            plain(batches[0])
                    else:
                        close(model(batches[n]).logits, expected[n][0])
        except BaseException as error:
            failures.append(error)

    with attach(model, dictionaries()) as tap:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not failures, failures
    assert tap.calls == {0: 9, 3: 9}
    same_firings(tap.firings, writesae.Firings.cat([expected[n][1] for n in range(3) for _ in range(3)]))


def test_removed_on_any_exception(models):
    model = models()
    before = module_functions(model)
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), attach(model, dictionaries()):
            assert module_functions(model) != before
            raise error("in the body")
        assert module_functions(model) == before
    with pytest.raises(RuntimeError, match="inside"):
        with attach(model, dictionaries()):
            handle = model.model.layers[3].register_forward_pre_hook(_fail)
            try:
                model(tokens(1, 4))
            finally:
                handle.remove()
    assert module_functions(model) == before and hf_gated_delta.running() is None


def _fail(*_):
    raise RuntimeError("inside")


def test_self_test_leaves_no_trace(models):
    model = models()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with attach(model, {(0, 0): dictionary()}) as outer:
        assert outer.calls == {0: 0} and len(outer.firings) == 0
        with attach(model, {(0, 1): None}) as inner:
            assert outer.calls == {0: 0} and inner.calls == {0: 0}
            model(tokens(1, 3))
    assert torch.equal(torch.rand(3), expected)
    model.train()
    with attach(model, {(0, 0): None}):
        assert all(m.training for m in model.modules())
        model(tokens(1, 3))
    model.eval()


def test_self_test_catches_a_wrong_op(models, monkeypatch):
    right = hf_gated_delta.BINDING

    def wrong(q, k, v, g, beta, **kwargs):
        return right.rule.run(q, k, v, g * 1.5, beta, **kwargs)

    monkeypatch.setattr(sites, "bindings", [replace(right, rule=replace(right.rule, run=wrong))])
    with pytest.raises(RuntimeError, match="self-test failed"):
        with attach(models(), {(0, 0): None}):
            pass


def test_self_test_catches_a_layer_that_something_else_runs():
    model = tiny_model()
    module = model.model.layers[0].linear_attn
    module.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(RuntimeError, match=r"self-test failed: layers \[0\] ran without calling"):
        with attach(model, {(0, 0): None, (1, 0): None}):
            pass
    assert "forward" in module.__dict__


# ---- edits ----------------------------------------------------------------------------------------------------


def one_edit(row, position, head, seed=0, K=8, V=6, size=3.0):
    g = torch.Generator().manual_seed(seed)
    return Edits([row], [position], [head], size * torch.randn(1, K, generator=g), torch.randn(1, V, generator=g))


def test_planned_edits_under_generate_equal_recomputing_from_scratch(models):
    model = models()
    prompt, new = tokens(2, 5), 8
    plan = {
        0: Edits.cat([one_edit(0, 3, 1), one_edit(1, 7, 2, seed=1), one_edit(-1, 9, 0, seed=2)]),
        3: Edits.cat([Edits.delete([0, 1], [8, 4], [1, 1], 8, 6), one_edit(0, 8, 1, seed=3)]),
    }
    arguments = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    plain = model.generate(prompt, **arguments)
    with attach(model, {}, edits=plan):
        fast = model.generate(prompt, **arguments)
    text = prompt
    for _ in range(new):
        reached = {
            layer: e[e.position < text.shape[1]] for layer, e in plan.items() if (e.position < text.shape[1]).any()
        }
        with attach(model, {}, edits=reached, self_test=False):
            logits = model(text, use_cache=False).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(fast, text)
    assert not torch.equal(fast, plain), "the edits must matter for this test to say anything"


def test_edits_reach_firings_and_packed_sequences(models):
    model = models()
    d = dictionary(0)
    edit = one_edit(0, 2, 0)
    x = tokens(1, 6)
    with attach(model, {(0, 0): d}, edits={0: edit}) as tap:
        logits = model(x, use_cache=False).logits
        alone = tap.firings
        wanted = expected_firings(tap.writes)
        same_firings(alone, wanted[wanted.head == 0])
    y = tokens(1, 4, seed=9)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    moved = Edits([1], edit.position, edit.head, edit.left, edit.right)
    with attach(model, {(0, 0): d}, edits={0: moved}) as tap:
        packed = model(torch.cat([y, x], 1), position_ids=positions, use_cache=False).logits
    close(packed[:, 4:], logits)
    f = tap.firings[tap.firings.row == 1]
    same_firings(writesae.Firings(f.row - 1, *list(f.columns().values())[1:]), alone)


def test_edit_that_never_applied_is_told_and_masks_nothing(models):
    model = models()
    missed = r"1 of 2 edits of layer 0 never applied.*edit 1: row 0, position 9, head 2"
    plan = {0: Edits.cat([one_edit(0, 1, 1), one_edit(0, 9, 2)])}
    with pytest.raises(ValueError, match=missed):
        with attach(model, {}, edits=plan, strict=True):
            model(tokens(1, 5))
    with pytest.warns(RuntimeWarning, match=missed):  # the text is not lost for it
        with attach(model, {}, edits=plan) as tap:
            model(tokens(1, 5))
    assert tap.applied[0].tolist() == [True, False]
    with pytest.raises(KeyError, match="mine"):
        with attach(model, {(0, 0): None}, edits={0: one_edit(0, 9, 2)}):
            raise KeyError("mine")
    with pytest.raises(ValueError, match=r"edits.row: expected row < 1 .*layer 0\), got 4 in edit 0"):
        with attach(model, {}, edits={0: one_edit(4, 1, 1)}):
            model(tokens(1, 5))
