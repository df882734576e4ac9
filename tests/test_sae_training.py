"""Training: the two paths agree, runs are deterministic and resumable to the bit, planted atoms are found."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
import torch
from tiny_models import tiny_model

import writesae
from writesae.sae import SAE, ModelStream, Passages, TrainConfig, Trainer, evaluate
from writesae.sae.block import Block
from writesae.sae.evaluate import block_fvu, grouped_medians
from writesae.sae.site import Batch, SiteTrainer
from writesae.writes import Writes

K, V, SITE = 6, 9, (2, 3)


pytestmark = pytest.mark.usefixtures("one_thread")


def planted(n=12, seed=3):
    """Unit atoms v `[n, K]`, w `[n, V]`."""
    g = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    return unit(torch.randn(n, K, generator=g), dim=1), unit(torch.randn(n, V, generator=g), dim=1)


class Planted:
    """A stream whose every write is one of a few planted atoms, on 4 value heads that share 2 key heads."""

    length = 48

    def __init__(self, passages=64, decay=0.5, noise=0.0, dtype=torch.float32):
        self.v, self.w = planted()
        self.passages, self.decay, self.noise, self.dtype = passages, decay, noise, dtype
        self.asked = 0

    def __len__(self):
        return self.passages

    def writes(self, rows):
        for part in rows.split(16):
            self.asked += len(part)
            yield {SITE[0]: self._writes(part)}

    def _writes(self, rows):
        left, right, decay = [], [], []
        for row in rows.tolist():
            g = torch.Generator().manual_seed(1000 + row)
            which = torch.randint(len(self.v), (self.length, 2), generator=g)
            size = 1 + torch.rand(self.length, 1, generator=g)
            noise = self.noise * torch.randn(self.length, 2, K, generator=g)
            left.append(self.v[which][:, :, None] + noise[:, :, None])  # key heads 0 and 1
            right.append((size * self.w[which[:, 1]])[:, None, None].expand(-1, 4, 1, -1))  # heads 2, 3: key head 1
            decay.append(self.decay * torch.rand(self.length, 4, generator=g) + self.decay)
        parts = (-torch.stack(decay), torch.stack(left), torch.stack(right))
        return Writes(*(x.to(self.dtype) for x in parts))


def config(**more) -> TrainConfig:
    base = dict(F=24, k=3, steps=40, states=64, block=32, prepare=16, dead_after=5, resample_every=15)
    return TrainConfig(**(base | dict(normalize_every=10) | more))


def trainer(stream=None, **more) -> Trainer:
    folder, resume = more.pop("folder", None), more.pop("resume", False)
    return Trainer(stream or Planted(), [SITE], config(**more), folder, resume, progress=False)


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 31, 32, 33, 65])
@pytest.mark.parametrize("R", [1, 2])
def test_block_states_are_the_states_of_the_writes(T, R):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    writes = Writes(-40 * rand(3, T, 4).abs() * (rand(3, T, 4) > 1), rand(3, T, 2, R, K), rand(3, T, 4, R, V),
                    initial_state=rand(3, 4, K, V))  # fmt: skip
    block = Block([writes], 3)
    order = torch.arange(3 * T)
    want = writes.states(list(range(T)))[:, :, 3].reshape(-1, K, V)
    torch.testing.assert_close(block.states(order // T, order % T), want, rtol=1e-12, atol=1e-12)
    again = block.writes(torch.tensor([2, 0]), 2.0).states([T - 1])[:, 0, 0]
    torch.testing.assert_close(again, 2 * want.view(3, T, K, V)[[2, 0], -1])
    assert block.nbytes < writes.states(list(range(T)))[:, :, 3].numel() * 8 * 4


def test_block_refuses_what_it_cannot_rebuild():
    ok = next(Planted().writes(torch.arange(3)))[2]
    with pytest.raises(ValueError, match="head: expected 0 <= head < H=4, got 4"):
        Block([ok], 4)
    channel = Writes(ok.decay[..., None].expand(*ok.decay.shape, K), ok.left, ok.right)
    places = torch.tensor([0, 2]), torch.tensor([3, 0])
    assert torch.equal(Block([channel], 0, "write").examples(*places), Block([ok], 0, "write").examples(*places))
    ok.right[1, 7, 3, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in right: passage 1, position 7, head 3"):
        Block([ok], 3)


# ---- the two paths --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*running the slow token-by-token reference.*:RuntimeWarning")  # float64 on purpose
@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied"])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("with_dead", [False, True])
def test_factored_loss_and_gradients_equal_dense(kind, r, with_dead):
    stream = Planted(dtype=torch.float64, noise=0.3)
    block = Block([next(stream.writes(torch.arange(8)))[2]], 3)
    got = {}
    for path in ("dense", "factored"):
        site = SiteTrainer(*SITE, config(kind=kind, r=r, path=path, init="random", k_aux=4), block)
        g = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for p in site.sae.parameters():
                p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        site.silent[4:13] = 99 if with_dead else 0
        pick = torch.randperm(8 * 48, generator=g)[:50]
        losses = site.losses(Batch(block, pick // 48, pick % 48))
        (losses.main + 0.7 * losses.aux).backward()
        got[path] = (losses, {n: p.grad for n, p in site.sae.named_parameters()})
    (a, grads), (b, others) = got["dense"], got["factored"]
    assert (float(a.aux.detach()) > 0) == with_dead
    for name in ("main", "aux", "errors"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-12)
    assert torch.equal(a.fired, b.fired)
    for name, x in grads.items():
        assert float(x.abs().max()) > 0, name
        torch.testing.assert_close(x, others[name], rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat"])
def test_loss_is_the_error_of_the_exported_dictionary(kind):
    """What training minimises is what the saved dictionary does, on raw states of any norm."""
    stream = Planted(noise=0.2)
    block = Block([next(stream.writes(torch.arange(16)))[2]], 3)
    block = Block([block.writes(torch.arange(16), 1e3)], 0)
    site = SiteTrainer(*SITE, config(kind=kind, init="random"), block)
    with torch.no_grad():
        for p in site.sae.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    rows, positions = torch.arange(16), torch.arange(16) + 20
    errors = site.losses(Batch(block, rows, positions)).errors
    sae, X = site.export(), block.states(rows, positions)
    assert float(X.norm(dim=(1, 2)).mean()) > 100
    torch.testing.assert_close((sae(X) - X).square().sum((1, 2)) * site.scale**2, errors, rtol=1e-3, atol=1e-4)
    if sae.rank_one_atoms and kind != "bilinear_tied":
        torch.testing.assert_close(sae.v_dec.norm(dim=-1), torch.ones(24, 1))


def test_first_loss_without_atoms_is_one():
    """The loss is a fraction of variance: with nothing firing it is 1 over the states that set mean and scale."""
    stream = Planted(passages=16)
    block = Block([w[2] for w in stream.writes(torch.arange(16))], 3)
    site = SiteTrainer(*SITE, config(), block)
    with torch.no_grad():
        site.sae.b_enc.fill_(-100.0)
    order = torch.arange(16 * 48)
    losses = site.losses(Batch(block, order // 48, order % 48))
    assert float(losses.main.detach()) == pytest.approx(1, abs=1e-5) and not bool(losses.fired.any())


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat"])
@pytest.mark.parametrize("path", ["dense", "factored"])
def test_many_atoms_at_once_start_better_than_the_mean(kind, path):
    """However much atoms overlap, the first reconstruction does not overshoot, nor does the trained one."""
    if path == "factored" and kind not in ("bilinear", "bilinear_tied"):
        with pytest.raises(ValueError, match="trains by path dense only"):
            config(kind=kind, path=path)
        return
    run = trainer(Planted(noise=0.1), F=200, k=50, kind=kind, path=path, steps=20, states=200)
    run.run()
    losses = [h["loss"] for h in run.history]
    assert losses[0] < 0.8 and losses[-1] < losses[0]


# ---- chores ---------------------------------------------------------------------------------------------------------


def test_normalising_leaves_the_function_unchanged():
    run = trainer()
    run.run(7)
    site, batch = run.trainers[SITE], run.batch(7)[SITE]
    with torch.no_grad():
        site.sae.v_dec.mul_(torch.rand(24, 1, 1) + 0.5)
    before = site.losses(batch)
    site.sae.normalize_()
    after = site.losses(batch)
    torch.testing.assert_close(before.errors, after.errors, rtol=1e-5, atol=1e-6)
    assert torch.equal(before.fired, after.fired)
    torch.testing.assert_close(site.sae.v_dec.norm(dim=-1), torch.ones(24, 1))


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat"])
def test_resampling_replaces_dead_atoms_and_clears_their_moments(kind):
    run = trainer(kind=kind, r=1 if kind == "flat" else 2)
    run.run(5)
    site, batch = run.trainers[SITE], run.batch(5)[SITE]
    site.silent[:] = 0
    dead = torch.tensor([2, 5, 11])
    site.silent[dead] = 99
    before = {n: p.detach().clone() for n, p in site.sae.named_parameters()}
    errors = torch.zeros(64)
    errors[[7, 9, 33]] = 1.0  # the only examples with error
    assert site.resample(batch, errors, torch.Generator().manual_seed(0)).tolist() == dead.tolist()
    kept = torch.ones(24, dtype=torch.bool).index_fill(0, dead, False)
    for name, p in site.sae.named_parameters():
        if name == "bias":
            continue
        assert torch.equal(p[kept], before[name][kept])
        state = site.optimizer.state[p]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not state[moment][dead].any(), (name, moment)
            assert state[moment][kept].any(), (name, moment)
    assert site.silent[dead].tolist() == [0, 0, 0]
    X = batch.block.states(batch.rows, batch.positions)[[7, 9, 33]] - site.sae.mean
    if site.sae.rank_one_atoms:
        top = torch.linalg.svd(X)[0][:, :, 0]  # each example's first left singular vector
        match = (torch.nn.functional.normalize(site.sae.v_dec[dead, 0], dim=1) @ top.T).abs().max(1).values
    else:
        match = (site.sae.W_dec[dead] @ torch.nn.functional.normalize(X.flatten(1), dim=1).T).max(1).values
    torch.testing.assert_close(match, torch.ones(3), rtol=1e-4, atol=1e-4)


def test_resampling_happens_in_a_run():
    stream = Planted(noise=0.05)
    run = trainer(stream, F=200, k=2, init="random", steps=60, states=8, resample_until=1.0)
    run.run()
    assert run.trainers[SITE].resampled > 0
    assert any(h["dead"] > 0 for h in run.history)
    assert any(h["aux"] > 0 for h in run.history)


def test_learning_rate():
    c = TrainConfig(steps=1050)
    assert c.rate(0) == pytest.approx(3e-4 / 50) and c.rate(49) == pytest.approx(3e-4)
    assert c.rate(550) == pytest.approx((3e-4 + 3e-5) / 2) and c.rate(1050) == pytest.approx(3e-5)


# ---- determinism, resuming ------------------------------------------------------------------------------------------


def same(a: Trainer, b: Trainer) -> bool:
    """Bitwise equality of parameters, moments and counters."""

    def leaves(x):
        if isinstance(x, dict):
            return [leaf for key in sorted(x, key=str) for leaf in leaves(x[key])]
        return [leaf for y in x for leaf in leaves(y)] if isinstance(x, list) else [x]

    pairs = zip(leaves(a.trainers[SITE].state()), leaves(b.trainers[SITE].state()), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("path, steps", [("dense", 40), ("factored", 20)])
def test_resumed_run_is_bitwise_the_uninterrupted_one(path, steps, tmp_path):
    settings = dict(path=path, steps=steps, resample_every=7)
    whole = trainer(**settings)
    done = whole.run()
    for stop in (13, 32)[: steps // 20]:  # in the middle of a block of passages, and after a resampling
        first = trainer(**settings, folder=tmp_path / f"{stop}")
        first.run(stop)
        torch.manual_seed(stop)
        resumed = trainer(**settings, folder=tmp_path / f"{stop}", resume=True)
        assert resumed.done == stop
        again = resumed.run()
        assert same(whole, resumed)
        assert resumed.history == whole.history
        assert all(torch.equal(x, again[SITE].state_dict()[n]) for n, x in done[SITE].state_dict().items())


def test_deterministic_by_seed():
    a, b, c = trainer(), trainer(), trainer(seed=1)
    torch.manual_seed(5)
    for run in (a, b, c):
        run.run()
    assert same(a, b) and not same(a, c)
    assert json.dumps(a.history) == json.dumps(b.history)


def test_every_token_of_a_block_is_drawn_once_before_any_twice():
    run = trainer(Planted(passages=64), states=64, block=32)
    assert run.steps_a_block == 32 * 48 // 64
    seen = torch.zeros(32, 48, dtype=torch.int64)
    for step in range(run.steps_a_block):
        batch = run.batch(step)[SITE]
        seen[batch.rows, batch.positions] += 1
    assert bool((seen == 1).all())
    first = set(run.order.rows(0).tolist())
    assert not first & set(run.order.rows(1).tolist())
    assert set(run.order.rows(2).tolist()) | set(run.order.rows(3).tolist()) == set(range(64))


def test_interrupt_stops_between_steps_with_a_checkpoint(tmp_path):
    run = trainer(steps=100000, folder=tmp_path)
    before = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in the background
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.done > 0
    resumed = trainer(steps=100000, folder=tmp_path, resume=True)
    assert resumed.done == run.done and same(run, resumed)
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_refuses_another_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        trainer(folder=tmp_path, resume=True)
    trainer(folder=tmp_path).run(3)
    with pytest.raises(ValueError, match="another run: F was 24 and is 30 differs"):
        trainer(folder=tmp_path, resume=True, F=30)
    with pytest.raises(ValueError, match="another run: passages differs"):
        trainer(Planted(passages=65), folder=tmp_path, resume=True)
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a training checkpoint"):
        trainer(folder=tmp_path, resume=True)


# ---- what is learnt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, near",
    [(dict(), 0.9), (dict(kind="bilinear_tied"), 0.7), (dict(init="random", F=24, steps=500), 0.9)],
    ids=["writes", "tied", "random"],
)
def test_planted_atoms_are_recovered(more, near):
    settings = dict(F=16, k=3, steps=200, lr=1e-2, dead_after=30, resample_every=100) | more
    sae = trainer(Planted(passages=96, decay=1.0), **settings).run()[SITE]
    v, w = planted()
    found = ((sae.v_dec[:, 0] @ v.T) * (sae.w_dec[:, 0] @ w.T)).max(0).values  # each planted atom's best match, signed
    assert int((found > near).sum()) >= 10, found
    held_out = Block([Planted(decay=1.0)._writes(torch.arange(500, 520))], 3)
    got = evaluate(sae, held_out)
    assert got["fvu"] < 0.1 and got["l0"] <= 3 and got["winner_cosine_median"] > near
    assert got["alive"] + got["dead"] == sae.F and got["winner_better_than_deletion"] > 0.6


def test_evaluation_by_hand():
    block = Block([next(Planted(noise=0.3).writes(torch.arange(5)))[2]], 3)
    order = torch.randperm(5 * 48)
    assert block_fvu(block, None, order // 48, order % 48) == 1.0
    torch.manual_seed(0)
    sae = SAE(K, V, 10, 3, r=2).requires_grad_(False)
    got = evaluate(sae, block)
    X = block.states(order // 48, order % 48)
    mean = X.double().mean(0)
    error = (sae(X).double() - X).square().sum() / (X - mean).square().sum()
    assert got["fvu"] == pytest.approx(float(error), rel=1e-4)
    codes = sae.encode(X)
    fires = codes.values > 0
    assert got["l0"] == pytest.approx(float(fires.sum(1).float().mean()))
    assert got["alive"] == len(codes.indices[fires].unique())
    left, right = (x[:, 0] for x in block.natives(order // 48, order % 48))
    native = left[:, :, None] * right[:, None]
    atoms = torch.einsum("frk,frv->fkv", sae.v_dec, sae.w_dec)
    cosine = torch.einsum("pkv,fkv->pf", native, atoms) / (native.norm(dim=(1, 2))[:, None] * atoms.norm(dim=(1, 2)))
    winner = codes.values.argmax(1)
    i = codes.indices.gather(1, winner[:, None])
    wins = codes.values.max(1).values > 0
    assert got["winner_cosine_median"] == pytest.approx(float(cosine.gather(1, i)[wins, 0].median()), abs=1e-5)
    residual = native - codes.values.max(1).values[:, None, None] * atoms[i[:, 0]]
    better = residual.norm(dim=(1, 2)) < native.norm(dim=(1, 2))
    assert got["winner_better_than_deletion"] == pytest.approx(float(better[wins].float().mean()))
    assert evaluate(sae, block, states=50)["states"] == 50
    with pytest.raises(ValueError, match="block: expected K=6, V=8"):
        evaluate(SAE(K, 8, 10, 3), block)


def test_grouped_medians():
    groups, medians = grouped_medians(torch.tensor([5, 1, 5, 5, 1]), torch.tensor([3.0, -1.0, 1.0, 2.0, 7.0]))
    assert groups.tolist() == [1, 5] and medians.tolist() == [-1.0, 2.0]


# ---- from a hooked model --------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single letters."""

    bos_token_id, eos_token_id = 2, 1

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


def test_passages():
    passages = Passages.from_texts([("a", "xyz" * 5), ("b", "uv" * 6)], Letters(), 8)
    assert passages.ids.shape == (3, 8) and passages.ids[0, 0] == 2 and passages.ids[2, 0] == 2
    with pytest.raises(ValueError, match="corpus: 1 documents with 4 tokens in all, but one passage takes 8"):
        Passages.from_texts([("a", "xyz")], Letters(), 8)
    with pytest.raises(ValueError, match="corpus: 0 documents"):
        Passages.from_texts([], Letters(), 8)


@pytest.fixture(scope="module")
def model():
    return tiny_model()  # layers 0, 1, 3 linear; K = 8, V = 6, 4 value heads


def passages(n=12, length=20):
    return Passages(torch.randint(3, 97, (n, length), generator=torch.Generator().manual_seed(0)))


def test_model_stream_gives_the_models_writes_and_runs_no_further(model):
    ids = passages()
    ran = []
    hooks = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in (model.model.layers[2], model.lm_head)]
    with ModelStream(model, ids, [(1, 3), (0, 0)], batch=5) as stream:
        ran.clear()
        got = list(stream.writes([7, 2, 9, 1, 0, 3]))
    assert not ran and [len(w[1].decay) for w in got] == [5, 1]
    for hook in hooks:
        hook.remove()
    with writesae.attach(model, {(0, 0): None, (1, 0): None}) as tap, torch.no_grad():
        model(input_ids=ids.ids[[7, 2, 9, 1, 0, 3]].long())
    for layer in (0, 1):
        want = tap.writes[layer]
        torch.testing.assert_close(torch.cat([w[layer].right for w in got]), want.right)
        torch.testing.assert_close(torch.cat([w[layer].decay for w in got]), want.decay)
    assert not model.model.layers[2]._forward_pre_hooks
    with pytest.raises(RuntimeError, match="with stream"):
        list(stream.writes([0]))


def test_model_stream_refuses_a_site_the_model_lacks(model):
    for site in ((2, 0), (9, 0), (1, 4)):
        with pytest.raises(ValueError), ModelStream(model, passages(), [site]):
            pass
    assert all(not layer._forward_pre_hooks for layer in model.model.layers)


def test_training_two_sites_from_one_model(model, tmp_path):
    sites = [(0, 1), (3, 2)]
    with ModelStream(model, passages(32), sites) as stream:
        settings = config(F=16, steps=30, states=40, block=16)
        run = Trainer(stream, sites, settings, tmp_path, model_name="tiny", progress=False)
        saes = run.run()
        losses = {s: [h["loss"] for h in run.history if (h["layer"], h["head"]) == s] for s in sites}
    for site, sae in saes.items():
        assert (sae.layer, sae.head, sae.K, sae.V, sae.model) == (*site, 8, 6, "tiny")
        assert losses[site][-1] < 1
    with writesae.attach(model, saes) as tap, torch.no_grad():
        model(input_ids=passages().ids.long())
    assert set(zip(tap.firings.layer.tolist(), tap.firings.head.tolist(), strict=True)) == set(sites)


def test_a_run_goes_on_only_with_its_own_model_and_text(model, tmp_path):
    settings = config(F=16, steps=6, states=40, block=16)

    def resumed(text, **more):
        with ModelStream(model, text, [(0, 1)]) as stream:
            run = Trainer(stream, [(0, 1)], settings, tmp_path, progress=False, **more)
            run.run()
            return run.done

    assert resumed(passages(32)) == resumed(passages(32), resume=True) == 6
    other = passages(32)
    other.ids[3, 5] += 1
    with pytest.raises(ValueError, match="of another run: tokens differs"):
        resumed(other, resume=True)
    weight = model.model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        with pytest.raises(ValueError, match="of another run: weights differs"):
            resumed(passages(32), resume=True)
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1


def test_a_head_whose_states_never_change_is_refused():
    flat = Planted()
    flat.w = flat.w * 0
    with pytest.raises(ValueError, match="every training state is the same"):
        trainer(flat)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="cubic"), "kind: expected one of bilinear"),
        (dict(init="zeros"), "init: expected one of writes, states, random"),
        (dict(path="fast"), "path: expected one of auto, dense, factored"),
        (dict(path="factored", kind="matrix"), "path: kind matrix has a dense encoder"),
        (dict(k=25), "k: expected k <= F=24, got 25"),
        (dict(steps=0), "steps: expected an integer >= 1, got 0"),
        (dict(lr=0.0), "lr: expected a finite number > 0"),
        (dict(aux=-1.0), "aux: expected >= 0"),
        (dict(passages=99), "passages: expected at most block=32, got 99"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        config(**arguments)


def test_wrong_sites():
    for sites in ([], [SITE, SITE]):
        with pytest.raises(ValueError, match="sites: expected at least one"):
            Trainer(Planted(), sites, config(), progress=False)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    """The tiny model saved with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    letters = {c: i for i, c in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz "])}
    words = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog " * (i + 3))
    (folder / "picture.bin").write_bytes(bytes(range(256)))
    return folder


def command(*more) -> int:
    return writesae.cli.main(["train", "--quiet", *map(str, more)])


SMALL = ["-F", 16, "-k", 2, "--length", 24, "--states", 32, "--block", 8, "--prepare", 8, "--checkpoint-every", 3]


def test_command(model_folder, corpus, tmp_path, capsys):
    import writesae.cli  # noqa: F401

    base = ["--model", model_folder, "--corpus", corpus, *SMALL]
    out = tmp_path / "out"
    assert command(*base, "--site", "0:1", "--site", "3:2", "--steps", 6, "--out", out) == 0
    said = capsys.readouterr()
    assert "L0H1: FVU" in said.out and "skipped picture.bin: binary (" in said.err
    assert "corpus: 4 files; left out: 1 binary" in said.err
    sae = SAE.from_pretrained(out, subfolder="L3H2")
    assert (sae.layer, sae.head, sae.F, sae.training_record["steps"]) == (3, 2, 16, 6)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metrics"]["L3H2"] == sae.metrics and 0 < sae.metrics["fvu"] and sae.metrics["l0"] <= 2
    assert command(*base, "--site", "0:1", "--steps", 6, "--out", out) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err
    assert command(*base, "--site", "0:1", "--site", "3:2", "--steps", 4, "--out", out, "--resume") == 2
    assert "steps: the run has done 6 of 6, got 4" in capsys.readouterr().err
    one = tmp_path / "one"
    assert command(*base, "--layer", 3, "--head", 2, "--steps", 6, "--out", one) == 0
    again = SAE.from_pretrained(one)
    assert all(torch.equal(x, sae.state_dict()[n]) for n, x in again.state_dict().items())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--layer", 2, "--head", 0], "full"),
        (["--layer", 9, "--head", 0], "layer"),
        (["--layer", 0, "--head", 4], "head: expected 0 <= head < 4"),
        (["--layer", 0], "site: expected --layer and --head together"),
        (["--site", "0-1"], "site: expected LAYER:HEAD"),
        (["--site", "0:**"], "site: expected LAYER:HEAD, such as 2:3, 2:* or *:*, got '0:**'"),
        (["--site", "2:*"], "site: 2:* is nowhere in this model, whose layers with a state are 0, 1, 3"),
        (["--site", "*:4"], "site: *:4 is nowhere in this model"),
        (["--site", "0:1", "--device", "tpu"], "device: tpu cannot be used: expected cpu or cuda"),
        (["--site", "0:1", "--tokens", 64], "tokens: expected --steps or --tokens, got both"),
        (["--site", "0:1", "--watch-passages", -1], "watch_passages: expected >= 0, got -1"),
        (["--site", "0:1", "--resume"], "checkpoint.pt: no checkpoint to resume from"),
        ([], "site: expected --layer and --head, or --site"),
        (["--site", "0:1", "-k", 17], "k: expected k <= F=16, got 17"),
        (["--site", "0:1", "--corpus", "nowhere"], "corpus: no file or folder nowhere"),
        (["--site", "0:1", "--corpus", "binaries"], "expected text in binaries, got 1 files and no text among them"),
        (["--site", "0:1", "--corpus", "corpus/0.txt"], "validation: the corpus is a single document"),
        (["--site", "0:1", "--length", 5000], "corpus: 3 documents with"),
        (["--site", "0:1", "--out", "corpus"], "out: corpus holds other things"),
    ],
)
def test_command_refuses(more, message, model_folder, corpus, capsys, monkeypatch):
    import writesae.cli  # noqa: F401

    monkeypatch.chdir(corpus.parent)
    (corpus.parent / "binaries").mkdir()
    (corpus.parent / "binaries" / "a").write_bytes(b"\xff\xfe\x00")
    base = ["--model", model_folder, "--corpus", "corpus", *SMALL, "--steps", 3, "--out", "out"]
    assert command(*base, *more) == 2
    assert message in capsys.readouterr().err
    assert not (corpus.parent / "out" / "cfg.json").exists()
