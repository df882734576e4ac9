"""Dictionaries of writes: what they code, where they are hooked in, how they are trained, and in which metric."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from targets import to_cpu
from test_replace import Letters
from test_sae_training import SITE, K, Planted, V, config
from tiny_models import kda_families, mamba2_families, tiny_kda, tiny_mamba2, tiny_model, tokens

from writesae import SAE, Edits, attach, ops
from writesae.experiments import passages_of, run_replacement
from writesae.experiments.codebook import codebook
from writesae.experiments.firing import top_codes
from writesae.models import intercept, layers
from writesae.sae import Trainer, evaluate
from writesae.sae.block import Block
from writesae.sae.readers import reader_moments, roots, seen_through
from writesae.writes import Writes

pytestmark = pytest.mark.usefixtures("one_thread")


def dictionary(kind="bilinear", sparsity="topk", seed=0, K=8, V=6, F=12, weighed=True, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = SAE(K, V, F, 3, kind, sparsity=sparsity, target="write", **more)
        if sparsity == "threshold":
            sae.threshold.fill_(0.05)
        if sparsity == "pursuit" and weighed:
            root = torch.randn(K, K)
            with torch.no_grad():
                sae.metric.copy_(root @ root.T)
                sae.v_dec.div_((sae.v_dec @ sae.metric * sae.v_dec).sum(-1, keepdim=True).sqrt())
    return sae.eval().requires_grad_(False)


KINDS = [("bilinear", "topk"), ("bilinear_tied", "threshold"), ("bilinear_tied", "pursuit"),
         ("matrix", "topk"), ("flat", "threshold"), ("bilinear_flat", "topk")]  # fmt: skip


def dense(codes, F=12):
    return torch.zeros(*codes.values.shape[:-1], F).scatter_(-1, codes.indices, codes.values)


@pytest.mark.parametrize(("kind", "sparsity"), KINDS)
def test_codes_of_factors_are_codes_of_matrices(kind, sparsity):
    sae = dictionary(kind, sparsity)
    g = torch.Generator().manual_seed(1)
    left, right = torch.randn(4, 5, 2, 8, generator=g), torch.randn(4, 5, 2, 6, generator=g)
    codes = sae.encode_writes(left, right)
    if sparsity == "pursuit":
        with pytest.raises(ValueError, match="^X: a pursuit dictionary codes factors"):
            sae.encode(left.transpose(-1, -2) @ right)
        return
    expected = sae.encode(torch.einsum("...rk,...rv->...kv", left, right))
    torch.testing.assert_close(dense(codes), dense(expected), rtol=1e-4, atol=1e-5)
    if sparsity == "topk":
        assert sae.encode_writes(left, right, k=2).values.shape == (4, 5, 2)
        torch.testing.assert_close(sae.encode_writes(left, right, k=2).values, codes.values[..., :2])


@pytest.mark.filterwarnings("ignore:attach. slow path")
@pytest.mark.parametrize(("kind", "sparsity"), KINDS)
def test_attached(kind, sparsity):
    """Firings are the codes of the increments: beside dictionaries of states, padded, while decoding, under edits."""
    model, sae = tiny_model(), dictionary(kind, sparsity)
    ids = tokens(2, 30)
    beside = SAE(8, 6, 12, 2).eval().requires_grad_(False)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    edits = {1: Edits.delete(1, [4, 9], 3, K=8, V=6)}
    saes = {(1, 3): sae, (1, 2): beside, (1, 0): sae}
    with torch.no_grad(), attach(model, saes, edits=edits) as tap:
        model(input_ids=ids, attention_mask=mask)
    firings, writes = tap.firings, tap.writes[1]
    with torch.no_grad(), attach(model, {(1, 2): beside}, edits=edits) as alone:
        model(input_ids=ids, attention_mask=mask)
    for head in (0, 3):
        codes = sae.encode_writes(writes.left[:, :, head // 2], writes.right[:, :, head])
        expected = dense(codes) * mask[..., None]
        found, f = torch.zeros(2, 30, 12), firings[firings.head == head]
        found[f.row.long(), f.position.long(), f.feature.long()] = f.activation
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert len(f) == int((expected > 0).sum()) > 20
    of_states = firings[firings.head == 2]
    assert len(of_states) == len(alone.firings) and torch.equal(of_states.activation, alone.firings.activation)
    with torch.no_grad(), attach(model, {(1, 3): sae}) as tap:
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        for t in range(20, 30):
            model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    by_token = tap.firings.sort()
    with torch.no_grad(), attach(model, {(1, 3): sae}) as tap:
        model(input_ids=ids)
    whole = tap.firings.sort()
    assert len(by_token) == len(whole)
    torch.testing.assert_close(by_token.activation, whole.activation, rtol=1e-3, atol=1e-5)


def test_memoryless_states_are_the_writes():
    writes = Planted()._writes(torch.arange(3)).to(torch.float64)
    alone = replace(writes, initial_state=torch.ones(3, 4, K, V, dtype=torch.float64)).memoryless()
    states = alone.states(range(48))[:, :, 3]
    expected = torch.einsum("btk,btv->btkv", writes.left[:, :, 1, 0], writes.right[:, :, 3, 0])
    torch.testing.assert_close(states, expected)
    channel = Writes(writes.decay[..., None].expand(3, 48, 4, K), writes.left, writes.right).memoryless()
    assert channel.gate == "scalar" and torch.equal(channel.states(range(48))[:, :, 3], states)


def test_of_two_writes_a_token_the_new_one_is_coded():
    q, k, v, g, a, b = (torch.randn(2, 9, 3, n, generator=torch.Generator().manual_seed(0)) for n in (K, K, V, K, K, K))
    writes = ops.dplr(q, k, v, -g.abs(), a * 0.1, b * 0.1, return_writes=True).writes
    alone = writes.memoryless()
    assert (writes.right.shape[3], alone.right.shape[3]) == (2, 1)
    left, right = writes.native(torch.arange(2)[:, None], torch.arange(9), 1)
    torch.testing.assert_close(alone.states(range(9))[:, :, 1], left[..., None] * right[..., None, :])
    torch.testing.assert_close(right, v[:, :, 1])
    mine = SAE(K, V, 12, 3, "bilinear_tied", layer=0, head=1, target="write", sparsity="pursuit")
    feature, value = top_codes(writes, mine, 1)
    with torch.no_grad():
        codes = mine.encode_writes(left[:, :, None], right[:, :, None], k=1)
    assert torch.equal(feature, codes.indices[..., 0]) and torch.equal(value, codes.values[..., 0])


@pytest.mark.parametrize("long", [False, True])
def test_encoder_forgets_all_but_the_write(long, target):
    """Over chunks and their ends."""
    T = 700 if long else 65
    g = torch.Generator().manual_seed(0)
    writes = Writes(-torch.rand(1, T, 2, generator=g), torch.randn(1, T, 1, 1, 8, generator=g),
                    torch.randn(1, T, 2, 1, 6, generator=g))  # fmt: skip
    sae = dictionary()
    v, w, b = sae.encoder()
    with target.in_use():
        arguments = target.put({"v_enc": v[None], "w_enc": w[None], "b_enc": b[None]})
        codes = ops.encode(target.put(writes.memoryless()), **arguments, k=3, heads=[1], backend=target.kind)
    codes = to_cpu(codes)
    expected = sae.encode_writes(writes.left[:, :, 0], writes.right[:, :, 1])
    torch.testing.assert_close(dense(codes)[:, :, 0], dense(expected), rtol=1e-4, atol=1e-5)


# ---- files, refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "sparsity"), KINDS)
def test_saved_and_loaded(kind, sparsity, tmp_path):
    sae = dictionary(kind, sparsity, layer=1, head=2)
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert (again.target, again.sparsity, again.kind, again.centred) == ("write", sparsity, kind, False)
    g = torch.Generator().manual_seed(1)
    pair = torch.randn(9, 1, 8, generator=g), torch.randn(9, 1, 6, generator=g)
    assert torch.equal(dense(again.encode_writes(*pair)), dense(sae.encode_writes(*pair)))
    with torch.no_grad():
        sae.bias[0, 0] = 1.0
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bias: expected zeros of a .* dictionary of writes"):
        SAE.from_pretrained(tmp_path)


def test_a_folder_that_does_not_say_is_of_states(tmp_path):
    SAE(8, 6, 12, 3).save_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    record = json.loads(path.read_text())
    assert record.pop("target") == "state"
    path.write_text(json.dumps(record))
    assert SAE.from_pretrained(tmp_path).target == "state"
    path.write_text(json.dumps(record | {"target": "query"}))
    with pytest.raises(ValueError, match="target: expected one of state, write, got 'query'"):
        SAE.from_pretrained(tmp_path)


def test_a_metric_must_be_one(tmp_path):
    sae = dictionary("bilinear_tied", "pursuit")
    for change in (lambda M: M[0, 1].add_(0.1), lambda M: M.neg_(), lambda M: M.zero_()):
        M = sae.metric.clone()
        change(sae.metric)
        sae.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="metric: expected a symmetric matrix with eigenvalues > 0"):
            SAE.from_pretrained(tmp_path)
        sae.metric.copy_(M)


def test_in_half_precision(tmp_path):
    """Half the bytes; codes of small writes stay what they are."""
    sae = dictionary("bilinear_tied", "pursuit")
    sae.half().save_pretrained(tmp_path)
    half = SAE.from_pretrained(tmp_path)
    assert half.v_dec.dtype == torch.float16
    g = torch.Generator().manual_seed(1)
    left, right = torch.randn(50, 1, 8, generator=g), 1e-6 * torch.randn(50, 1, 6, generator=g)
    got, expected = half.encode_writes(left, right), half.float().encode_writes(left, right)
    torch.testing.assert_close(dense(got), dense(expected), rtol=1e-4, atol=1e-10)


def test_refusals():
    with pytest.raises(ValueError, match="^centred: a dictionary of writes has no mean"):
        SAE(8, 6, 12, 3, centred=True, target="write")
    for wrong in (dict(target="state"), dict(target="write", kind="matrix")):
        with pytest.raises(ValueError, match="^sparsity: pursuit codes writes"):
            SAE(8, 6, 12, 3, sparsity="pursuit", **wrong)
    pair = torch.zeros(2, 1, 8), torch.zeros(2, 1, 6)
    with pytest.raises(ValueError, match="^target: expected a dictionary of writes"):
        SAE(8, 6, 12, 3).encode_writes(*pair)
    with pytest.raises(ValueError, match=r"^right: expected floating \[\.\.\., R, V=6\]"):
        dictionary().encode_writes(pair[0], pair[0])
    for k in (0, 13, 1.0):
        with pytest.raises(ValueError, match="^k: expected an integer"):
            dictionary().encode_writes(*pair, k=k)
    with pytest.raises(ValueError, match="^k: .*without thresholds"):
        dictionary(sparsity="threshold").encode_writes(*pair, k=2)
    for wrong, message in (
        (dict(kind="bilinear_tied", sparsity="pursuit"), "sparsity: pursuit codes writes by their atoms"),
        (dict(target="write", path="factored"), "path: dictionaries of writes train by path dense"),
        (dict(also_k=1), "also_k: expected less than k=3, of sparsity pursuit, got 1"),
        (dict(metric="readers", kind="flat"), "metric: readers weighs the key side"),
        (dict(metric="readers", kind="bilinear_tied"), "metric: readers makes encoder and atoms differ"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**wrong)
    with pytest.raises(ValueError, match="^roots: expected one a site"):
        Trainer(Planted(), [SITE], config(target="write", metric="readers"), progress=False)
    with pytest.raises(ValueError, match="^block: expected one of writes"):
        evaluate(dictionary(K=K, V=V), Block([Planted()._writes(torch.arange(2))], 3))


# ---- the readers' metric --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gated delta rule", *mamba2_families()[:1], *kda_families()[:1]])
def test_the_metric_is_what_later_outputs_change_by(family):
    """tr E^T M E, against outputs of the layer with E added to its memory: all later tokens, mean over positions."""
    if family == "gated delta rule":
        model, layer, head = tiny_model(dtype=torch.float64), 3, 2
    elif family == "mamba2":
        model, layer, head = tiny_mamba2(dtype=torch.float64), 1, 3
    else:
        model, layer, head = tiny_kda(family), 1, 2
    ids = tokens(2, 36)
    M = reader_moments(model, ids, [0, layer])[layer][head].double()
    K, V = next((site.K, site.V) for site in layers(model) if site.layer_index == layer)
    g = torch.Generator().manual_seed(2)
    E = torch.randn(K, V, generator=g, dtype=torch.float64)
    norms = []

    def rule(call, output_final_state):
        call = replace(call, inputs={name: None if x is None else x.double() for name, x in call.inputs.items()})
        plain, unit = call.run(output_final_state=output_final_state), torch.eye(K, dtype=torch.float64)
        for position in range(36 - 32):
            rows = [Edits.add([0, 1], position, head, unit[i], E[i], when="after") for i in range(K)]
            norms.append((call.run(edits=Edits.cat(rows)).o - plain.o).square().sum() / 2)
        return replace(plain, o=plain.o.to(model.dtype))

    with torch.no_grad(), intercept(model, calls={layer: rule}, private=True):
        model(input_ids=ids, use_cache=False)
    torch.testing.assert_close((E.T @ M @ E).trace(), torch.stack(norms).mean(), rtol=1e-4, atol=0)
    root = roots({layer: M[None].expand(4, -1, -1)}, [(layer, head)])[layer, head].double()
    floor = 1e-3 * torch.eye(K, dtype=torch.float64)
    torch.testing.assert_close(root @ root, M / M.trace() * K + floor, rtol=1e-5, atol=1e-6)


def test_seen_through_a_root_it_fires_alike():
    sae = dictionary("bilinear_tied", "pursuit")
    g = torch.Generator().manual_seed(1)
    left, right = torch.randn(30, 1, 8, generator=g), torch.randn(30, 1, 6, generator=g)
    root = torch.randn(8, 8, generator=g)
    root = root @ root.T + torch.eye(8)
    codes, inside = sae.encode_writes(left, right), seen_through(sae, root)
    again = inside.encode_writes(left @ root, right)
    torch.testing.assert_close(dense(again), dense(codes), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(inside.decode(again), root @ sae.decode(codes), rtol=1e-3, atol=1e-3)
    assert dictionary().metric is None
    with pytest.raises(ValueError, match="^sae: expected encoder and atoms of factors"):
        seen_through(dictionary("flat"), root)


# ---- training -------------------------------------------------------------------------------------------------------


def held_out(root=None):
    return Block([Planted()._writes(torch.arange(500, 516))], SITE[1], "write", root)


@pytest.mark.parametrize(
    "more",
    [dict(kind="bilinear_tied", sparsity="pursuit"),
     dict(kind="bilinear_tied", sparsity="pursuit", also_k=1, balance=2.0), dict(sparsity="topk", balance=0.0),
     dict(sparsity="jumprelu"), dict(kind="flat"), dict(kind="bilinear_tied", sparsity="batchtopk"),
     dict(sparsity="gated")],
    ids=lambda x: "-".join(map(str, x.values())),
)  # fmt: skip
def test_planted_writes_are_learnt(more):
    run = Trainer(Planted(noise=0.05), [SITE], config(target="write", steps=150, lr=1e-2, lr_end=1e-3, init="random",
                                                      **more), progress=False)  # fmt: skip
    start = evaluate(run.export()[SITE], held_out())
    sae = run.run()[SITE]
    got = evaluate(sae, held_out())
    assert sae.target == "write" and not sae.mean.any() and not sae.bias.any()
    assert got["fvu"] < 0.15 and got["fvu"] < 0.6 * start["fvu"], (start["fvu"], got["fvu"])
    assert got["write_cosine_median"] > 0.93
    if more.get("also_k"):
        assert not sae.b_enc.any()
        writes = Planted()._writes(torch.arange(500, 510))
        left, right = writes.left[:, :, 1], writes.right[:, :, 3]
        one = sae.decode(sae.encode_writes(left, right, k=1))
        X = torch.einsum("btrk,btrv->btkv", left, right)
        assert (one - X).square().sum() / X.square().sum() < 0.05


def test_in_a_metric():
    """Trained through a root, a dictionary is best as that root sees it; files hold it as the raw writes need it."""
    root = torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.3, 0.1, 0.03]))
    settings = dict(target="write", kind="bilinear_tied", sparsity="pursuit", k=2, F=6, steps=150, lr=1e-2, balance=0.0)
    plain = Trainer(Planted(), [SITE], config(**settings), progress=False).run()[SITE]
    run = Trainer(Planted(), [SITE], config(metric="readers", **settings), progress=False, roots={SITE: root},
                  held_out={SITE: held_out(root)})  # fmt: skip
    sae = run.run()[SITE]
    torch.testing.assert_close(sae.metric, root @ root, rtol=1e-3, atol=1e-3)
    inside = {name: evaluate(seen_through(x, root), held_out(root))["fvu"] for name, x in (("no", plain), ("yes", sae))}
    assert inside["yes"] < inside["no"]
    assert run.history[-1]["held_out_fvu"]["L2H3"] == pytest.approx(inside["yes"], rel=1e-4)


def test_resumed_to_the_bit(tmp_path):
    settings = config(target="write", kind="bilinear_tied", sparsity="pursuit", also_k=1, steps=30)
    whole = Trainer(Planted(), [SITE], settings, progress=False).run()[SITE]
    Trainer(Planted(), [SITE], settings, tmp_path, progress=False).run(13)
    again = Trainer(Planted(), [SITE], settings, tmp_path, True, progress=False).run()[SITE]
    for name, x in whole.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name


# ---- the replacement test -------------------------------------------------------------------------------------------


def test_codebook_by_the_same_rule():
    sae = dictionary("bilinear_tied", "pursuit")
    g = torch.Generator().manual_seed(4)
    left, right = torch.randn(12, 8, generator=g), torch.randn(12, 6, generator=g)
    book = codebook(sae, left, right)
    torch.testing.assert_close(book.metric, sae.metric, rtol=1e-3, atol=1e-3)
    keys, values = torch.randn(50, 1, 8, generator=g), torch.randn(50, 1, 6, generator=g)
    M, unit = sae.metric, torch.nn.functional.normalize
    length = ((left @ M) * left).sum(1).sqrt()
    score = (keys[:, 0] @ M @ left.T) / length * (values[:, 0] @ unit(right, dim=1).T)
    assert torch.equal(book.encode_writes(keys, values, k=1).indices[:, 0], score.argmax(1))
    with pytest.raises(ValueError, match=r"^left: expected \[F=12, 8\]"):
        codebook(sae, left[1:], right)


def test_replacement_with_a_dictionary_of_writes(tmp_path):
    model = tiny_model()
    sae = dictionary("bilinear_tied", "pursuit", layer=1, head=3)
    draw = torch.Generator().manual_seed(0)
    words = ["".join(chr(int(c)) for c in torch.randint(33, 120, (150,), generator=draw)) for _ in range(6)]
    text = passages_of([(f"text {i}", x) for i, x in enumerate(words)], Letters(), 50)
    names = ("native", "atom", "delete", "codebook", "reconstruction", "codebook_reconstruction", "zero")
    result = run_replacement(
        model, Letters(), sae, text, train=text, min_selected=1, firings=20, each=4, horizon=3, conditions=names,
        natives=("increment",), progress=False, out=tmp_path,
    )  # fmt: skip
    assert len(result) == 20 and not result.table["forward:after.increment.native"][:, 1:].any()
    kl = {c: result.table[f"forward:after.{c}"][:, 1:].mean() for c in ("reconstruction", "codebook_reconstruction")}
    assert all(x > 0 for x in kl.values())
    states = SAE(8, 6, 12, 3, layer=1, head=3).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="^conditions: codebook_reconstruction codes writes"):
        run_replacement(model, Letters(), states, text, train=text, conditions=names, progress=False)


def test_the_atom_of_pursuit_is_the_nearest_one():
    model, sae = tiny_model(), dictionary("bilinear_tied", "pursuit")
    with torch.no_grad(), attach(model, {(1, 3): None}) as tap:
        model(input_ids=tokens(2, 20))
    writes = tap.writes[1]
    feature, value = top_codes(writes, sae, 3)
    codes = sae.encode_writes(writes.left[:, :, 1], writes.right[:, :, 3], k=1)
    assert torch.equal(feature, codes.indices[..., 0]) and torch.equal(value, codes.values[..., 0])
