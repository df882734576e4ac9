"""The paper's analyses of features and memories: selectivity, readers, transplants, probes, the geometry of writes."""

import numpy as np
import pytest
import torch
from paper_lab import lab
from scipy import stats

import writesae
from writesae.experiments.engine import ForkEngine, Places, read
from writesae.paper import geometry, probing, readers, selectivity, studies, token_classes, trained, transplant
from writesae.paper.readers import Frozen
from writesae.writes import Writes

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("gated", "mamba2")


def found(name, tmp_path, **settings):
    findings = studies()[name].run(lab(name, tmp_path, **settings))
    assert [answer.claim for answer in findings.answers] == [claim.key for claim in studies()[name].claims]
    return findings


# ---- selectivity ----------------------------------------------------------------------------------------------


def planted(seed=0):
    """Tokens `[P, T]`, and firings of feature 0 at token 3, of 1 after token 5, of 2 anywhere."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 20, (40, 60))
    fired = [(p, t, 0) for p, t in zip(*np.nonzero(ids == 3), strict=True)]
    fired += [(p, t + 1, 1) for p, t in zip(*np.nonzero(ids[:, :-1] == 5), strict=True)]
    fired += [(int(draw.integers(40)), int(draw.integers(60)), 2) for _ in range(150)]
    fired += [(0, 1, 7)]  # too rare
    return ids, np.array(fired)


def test_planted_preferences_are_found_and_planted_nothing_is_not():
    (ids, fired), (test_ids, test) = planted(0), planted(1)
    shifts = np.random.default_rng(2).integers(8, 52, (6, 40))
    got = selectivity.selective(ids, fired, test_ids, test, 5, shifts)
    assert got["feature"].tolist() == [0, 1, 2]
    assert got["token_id"][0] == 3 and got["token_share"][0] == 1 and got["token_q"][0] < 1e-10
    assert got["previous_id"][1] == 5 and got["previous_share"][1] == 1 and got["previous_q"][1] < 1e-10
    assert got["token_share"][2] < 0.2 and got["token_q"][2] > 0.05 and got["previous_q"][2] > 0.05
    assert np.all(got["token_shifted"] < 0.15) and np.all(got["next_q"] > 0.05)


def test_the_exact_test_is_what_permutations_of_the_tokens_give():
    (ids, fired), (test_ids, test) = planted(3), planted(4)
    got = selectivity.selective(ids, fired, test_ids, test, 5, np.full((1, 40), 9))
    mine = test[(test[:, 1] > 0) & (test[:, 1] < 59) & (test[:, 2] == 2)]
    hit = (test_ids[mine[:, 0], mine[:, 1]] == got["token_id"][2]).sum()
    tokens, draw = test_ids[:, 1:-1].reshape(-1), np.random.default_rng(0)
    permuted = [(draw.permutation(tokens)[: len(mine)] == got["token_id"][2]).sum() for _ in range(4000)]
    assert got["token_p"][2] == pytest.approx(np.mean(np.array(permuted) >= hit), abs=0.03)


def test_modes_are_scipys():
    draw = np.random.default_rng(0)
    group, value = np.concatenate([np.arange(9), draw.integers(0, 9, 400)]), draw.integers(0, 6, 409)
    expected = [stats.mode(value[group == g]).mode for g in range(9)]
    assert selectivity._modes(group, value, 9).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_selectivity_of_both_kinds_of_dictionary(tmp_path, family):
    got = found("selectivity", tmp_path, family=family, passages=3, least=3, shifts=2)
    table = got.tables["features"]
    assert set(table["target"]) == {"state", "write"} and np.all(table["firings"] >= 3)
    assert got.statistics["write"]["dictionary"]["token"]["share"]["mean"] == pytest.approx(
        table["token_share"][table["target"] == "write"].mean()
    )


# ---- readers --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_frozen_blocks_pass_a_change_on_and_do_not_answer(tmp_path):
    model = lab("readers", tmp_path).model
    engine = ForkEngine(model, 1, 3, "after")
    last = len(engine.stack.blocks) - 1
    above = {i: block for i, block in enumerate(engine.stack.blocks) if i > 1}
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    places = Places(torch.tensor([0, 1]), torch.tensor([5, 9]), torch.tensor([2, 2]))
    clean = engine.clean(ids, torch.tensor([20, 20]), lambda writes: places)
    change = read(clean, torch.ones(2, 8), torch.ones(2, 6))
    with Frozen(above) as frozen:
        frozen.record()
        plain = engine.run(clean, {"x": None})["x"]
        runs = {}
        for name, blocks in (("none", ()), ("first", (2,)), ("last", (last,)), ("all", tuple(above))):
            frozen.freeze(blocks)
            same = frozen.result(engine.run(clean, {"x": torch.zeros_like(change)})["x"])
            assert torch.allclose(same, plain, atol=1e-5)  # nothing to answer to
            runs[name] = frozen.result(engine.run(clean, {"x": change})["x"])
        entered = frozen._clean[2][0]
    assert torch.allclose(runs["none"], engine.run(clean, {"x": change})["x"], atol=1e-6)
    # With all frozen, the stream moves by what came out of the edited block, whatever the blocks above are.
    moved = []
    hook = above[2].register_forward_pre_hook(lambda module, args, kwargs: moved.append(
        args[0] if args else kwargs["hidden_states"]), with_kwargs=True)  # fmt: skip
    engine.run(clean, {"x": change})
    hook.remove()
    assert torch.allclose(runs["all"] - plain, moved[0] - entered, atol=1e-5)
    for one, other in (("first", "none"), ("last", "none"), ("all", "first"), ("all", "last")):
        assert not torch.allclose(runs[one], runs[other], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_are_measured_at_every_block_above(tmp_path, family):
    got = found("readers", tmp_path, family=family, passages=2, each=3, horizon=2)
    table = got.tables["forks"]
    (layer,) = set(table["layer"].tolist())
    kinds = set(table["frozen"].tolist()) - {"none", "all"}
    assert kinds and all(int(block) > layer for block in kinds) and set(table["arm"]) == set(readers.ARMS)
    counts = {name: (table["frozen"] == name).sum() for name in ("none", "all", *kinds)}
    assert len(set(counts.values())) == 1
    for answer in got.answers:
        assert answer.ci95[0] <= float(answer.ours.split(" ")[0]) <= answer.ci95[1]


# ---- transplant -----------------------------------------------------------------------------------------------


def test_trios_share_a_token_and_differ_in_what_follows():
    ids = np.random.default_rng(0).integers(0, 9, (12, 40))
    trios = transplant.matched(ids, 30, 4, np.random.default_rng(1))
    assert trios.shape == (30, 3, 2)
    p, t = trios[:, :, 0], trios[:, :, 1]
    now, then = ids[p, t + 1], ids[p, t + 2]
    assert np.all(now == now[:, :1]) and np.all(then[:, 1:2] != then[:, [0, 2]])
    assert all(len(set(row)) == 3 for row in p.tolist()) and t.min() >= 16 and t.max() < 40 - 6
    with pytest.raises(ValueError, match="test: expected three passages with a token in common"):
        transplant.matched(np.zeros((5, 40), int), 3, 4, np.random.default_rng(1))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_exchanged_memory_is_the_other_one_and_ones_own_changes_nothing(tmp_path, family):
    here = lab("transplant", tmp_path, family=family)
    (layer, _), model = next(iter(here.saes)), here.model
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    position = torch.tensor([9, 12])
    with writesae.attach(model, {(layer, 0): None}) as tap:
        plain = model(input_ids=ids, use_cache=False).logits
    writes = tap.writes[layer]
    at = torch.stack([torch.arange(4), position.repeat(2)], 1)
    states, heads = writes.states(at), range(writes.shape[2])
    with writesae.attach(model, {(layer, 0): None}, edits={
        layer: transplant.exchange(states[:2], states[2:], position, heads)
    }) as tap:  # fmt: skip
        moved = model(input_ids=ids[:2], use_cache=False).logits
    assert torch.allclose(tap.writes[layer].states(at[:2]), states[2:], atol=1e-5)
    for row, t in enumerate(position.tolist()):
        assert torch.allclose(moved[row, : t + 1], plain[row, : t + 1], atol=1e-5)  # it was read before
        assert not torch.allclose(moved[row, t + 1], plain[row, t + 1], atol=1e-5)
    with writesae.attach(model, {}, edits={layer: transplant.exchange(states[:2], states[:2], position, heads)}):
        same = model(input_ids=ids[:2], use_cache=False).logits
    assert torch.allclose(same, plain[:2], atol=1e-5)


def test_transplants_of_a_head_a_layer_and_all(tmp_path):
    got = found("transplant", tmp_path, passages=20, context=48, pairs=10, horizon=2)
    table = got.tables["pairs"]
    assert len(table["target"]) == 10
    for scope in transplant.SCOPES:
        gain = table[f"{scope}:donor:gain"] - table[f"{scope}:random:gain"]
        assert got.statistics[scope]["difference"]["mean"] == pytest.approx(gain.mean())
        assert np.all(table[f"{scope}:donor:kl"] > 0)
    wide, narrow = (table[f"{scope}:random:kl"].mean() for scope in ("all layers", "head"))
    assert wide > narrow


# ---- probing --------------------------------------------------------------------------------------------------

SOURCE = '''def area(r):  # of a circle
    """Its area,
    in square metres."""
    return 3.14 * r
'''


def test_tokens_get_the_class_python_gives_them():
    pieces = ["def", " area", "(", "r", "):", "  # of", " a circle", "\n", '    """Its', " area,\n", "    in",
              " square", ' metres."""', "\n", "    return", " 3", ".14", " *", " r", "\n"]  # fmt: skip
    assert "".join(pieces) == SOURCE
    got = token_classes.classes_of(pieces)
    assert got == ["keyword", "name", "operator", "name", "operator", "comment", "comment", "", "string", "string",
                   "string", "string", "string", "", "keyword", "number", "number", "operator", "name", ""]  # fmt: skip
    cut = token_classes.classes_of(pieces[:10])  # inside an open string nothing is known
    assert cut[:7] == got[:7] and cut[9] == ""


def test_labels_follow_documents_through_their_passages_and_other_text_is_refused():
    from writesae.experiments.replace import Passage

    class Characters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    codes = np.array([ord(c) for c in SOURCE])
    parts = [Passage("a.py", 1, codes[30:]), Passage("a.py", 0, codes[:30]), Passage("b.py", 3, codes)]
    got = token_classes.labelled(parts, Characters(), "inside")
    text = "".join("#" if x == "prose" else "." if x == "code" else " " for x in [*got[1], *got[0]])
    at = SOURCE.index("metres")
    assert set(text[at : at + 6]) == {"#"} and set(text[:3]) == {"."} and (got[2] == "").all()
    assert token_classes.labelled(parts, Characters(), "shape")[2][:4].tolist() == ["word", "word", "word", "space"]
    with pytest.raises(ValueError, match="label: expected Python source text"):
        token_classes.labelled([Passage("x", 0, np.array([ord(c) for c in "((( no 'end"]))][:0], Characters(), "class")
    with pytest.raises(ValueError, match="label: expected one of"):
        token_classes.labelled(parts, Characters(), "verb")


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_find_what_is_there_and_nothing_in_shuffled_labels(tmp_path, family, monkeypatch):
    def odd(passages, tokenizer, label):  # the label is in the residual stream, nowhere near linear in the state
        return [np.array(["odd" if t % 2 else "even" for t in passage.tokens], object) for passage in passages]

    monkeypatch.setattr(probing, "labelled", odd)
    got = found("probing", tmp_path, family=family, train=300, validation=100, test=200, each=30, sweeps=50)
    accuracy = got.statistics["accuracy"]
    assert accuracy["residual stream"]["ci95"][0] > 0.6
    assert accuracy["residual stream"]["ratio"] > accuracy["residual stream, labels shuffled"]["ratio"] + 0.15
    from sklearn.metrics import balanced_accuracy_score

    table = got.tables["tokens"]
    hit, y = table["codes"].astype(bool), table["label"]
    guess = np.where(hit, y, np.where(y == "odd", "even", "odd"))
    assert accuracy["codes"]["ratio"] == pytest.approx(balanced_accuracy_score(y, guess))


# ---- geometry -------------------------------------------------------------------------------------------------


def test_ranks_shares_and_cosines_are_those_of_the_matrices():
    assert geometry.entropy_rank(torch.tensor([2.0, 2, 2, 0])) == pytest.approx(3)
    assert geometry.entropy_rank(torch.tensor([5.0, -1e-12])) == pytest.approx(1)
    draw = torch.Generator().manual_seed(0)
    x, energy = torch.randn(50, 4, generator=draw), torch.rand(50, generator=draw)
    expected = np.linalg.svd((energy.sqrt()[:, None] * x).numpy(), compute_uv=False) ** 2
    assert geometry.eigenvalues(x, energy).numpy() == pytest.approx(expected, rel=1e-4)
    assert geometry.share(torch.tensor([3.0, 1]), 1) == 0.75
    left, right = torch.randn(2, 9, 5, generator=draw), torch.randn(2, 9, 3, generator=draw)
    outer = torch.einsum("xnk,xnv->xnkv", left, right).flatten(2)
    got = geometry.pair_cosine(left[0], right[0], left[1], right[1])
    assert torch.allclose(got, torch.cosine_similarity(outer[0], outer[1], dim=1), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_of_the_model_has_a_row(tmp_path, family):
    got = found("geometry", tmp_path, family=family, passages=2, sample=60)
    here, table = lab("geometry", tmp_path, family=family), got.tables["heads"]
    from writesae.models.sites import layers

    assert len(table["head"]) == sum(site.num_v_heads for site in layers(here.model))
    K = max(site.K for site in layers(here.model))
    for name in ("key_rank", "state_rank", "write_rank"):
        assert table[name].min() >= 1 - 1e-9
    assert np.all(table["first_key"] >= 1 / max(K, 64) - 1e-9) and np.all(
        table["first_key"] <= table["four_keys"] + 1e-9
    )
    assert np.all(table["memory"] > 0) and np.all(np.abs(table["successive"]) <= 1)


def test_of_two_writes_a_token_the_new_one_is_looked_at(tmp_path):
    here = lab("geometry", tmp_path, sample=40)
    draw = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(2, 30, *shape, generator=draw)

    decay, left, right = -0.1 * torch.rand(2, 30, 1, 5, generator=draw), some(1, 2, 5), some(1, 2, 3)
    erase = (some(1, 5), some(1, 5))
    both = Writes(decay, left, right, erase=erase)
    got = geometry._head(here, (0, 0), trained._joined([both]))
    assert got["norm"] == pytest.approx(float((left[..., 1, :].norm(dim=-1) * right[..., 1, :].norm(dim=-1)).median()))
    halves = [
        Writes(*(x[i : i + 1] for x in (decay, left, right)), erase=tuple(x[i : i + 1] for x in erase)) for i in (0, 1)
    ]
    assert geometry._head(here, (0, 0), trained._joined(halves)) == got


def test_a_study_that_is_run_again_reads_its_units_and_finds_the_same(tmp_path, monkeypatch):
    settings = dict(keep=True, passages=2, each=2, horizon=1)
    first = found("readers", tmp_path, **settings)
    monkeypatch.setattr(readers, "_site", lambda *args: pytest.fail("made again"))
    again = found("readers", tmp_path, **settings)
    assert again.statistics == first.statistics and [x.ours for x in again.answers] == [x.ours for x in first.answers]
