"""Training of dictionaries of states under gates of channels and of elements: blocks, losses, gradients, runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_encode_gates import build
from test_sae_training import SITE, Planted, config, same, trainer
from tiny_models import tiny_kda, tiny_mamba, tokens

from writesae.ops import factored_loss, training_loss
from writesae.sae import ModelStream, Passages, Trainer, evaluate
from writesae.sae.block import Block
from writesae.sae.site import Batch, SiteTrainer
from writesae.testing import dictionary, poisoned_memory

GATES = ("channel", "element")
WAYS = [("channel", "reference"), ("channel", "cpu"), ("element", "reference")]
pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {
    "state": dict(B=2, T=70, H=3, Hl=3, K=6, V=5, F=20, k=4, state=True, heads=[2, 0]),
    "two writes": dict(B=2, T=33, H=2, Hl=1, K=5, V=6, F=20, k=3, R=2, r=2),
    "packed": dict(B=1, T=127, H=2, Hl=1, K=7, V=9, F=33, k=4, cu=torch.tensor([0, 0, 1, 64, 127]), state=True),
}


class Gated(Planted):
    """The planted stream under another gate."""

    def __init__(self, gate="channel", **more):
        super().__init__(**more)
        self.gate = gate

    def _writes(self, rows):
        plain = super()._writes(rows)
        g = torch.Generator().manual_seed(7)
        size = len(self.v[0]) if self.gate == "channel" else len(self.w[0])
        decay = plain.decay[..., None] * (0.5 + torch.rand(4, size, generator=g))
        matrix = 0.5 + torch.rand(4, len(self.v[0]), len(self.w[0]), generator=g)
        return replace(plain, decay=decay, decay_matrix=matrix if self.gate == "element" else None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 31, 33, 65])
@pytest.mark.parametrize("decay", [0.02, 40.0])
def test_block_states_are_the_states_of_the_writes(T, gate, decay):
    case = dict(B=3, T=T, H=4, Hl=2, K=6, V=5, F=2, k=1, R=2, state=True)
    writes = build(case, gate, decay=decay)[0]
    writes.decay[writes.decay > -0.3 * decay] *= 1e-3  # some channels hold on beside others that forget at once
    block = Block([writes.to(torch.float32)], 3)
    order = torch.arange(3 * T)
    want = writes.states(list(range(T)))[:, :, 3].reshape(-1, 6, 5)
    found = block.states(order // T, order % T).double()
    assert float((found - want).abs().max()) <= 2e-6 * float(want.abs().max())
    again = block.writes(torch.tensor([2, 0]), 2.0).states([T - 1])[:, 0, 0].double()
    torch.testing.assert_close(again, 2 * want.view(3, T, 6, 5)[[2, 0], -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_a_root_comes_after_the_gate(gate):
    writes = build(dict(B=3, T=40, H=2, Hl=2, K=6, V=5, F=2, k=1, state=True), gate)[0]
    root = torch.randn(6, 6).double()
    root = root @ root.T
    plain, rooted = Block([writes], 1), Block([writes], 1, root=root)
    places = torch.tensor([0, 2, 1]), torch.tensor([39, 0, 33])
    torch.testing.assert_close(rooted.states(*places), root @ plain.states(*places))
    torch.testing.assert_close(rooted.natives(*places)[0], plain.natives(*places)[0] @ root)
    with pytest.raises(ValueError, match=f"root: expected none under the {gate} gate"):
        rooted.writes(places[0])


def from_states(writes, v, w, values, indices, offset, heads):
    """`[B, T, Hs]` squared errors, from states formed one by one."""
    pairs = torch.tensor([(n, t) for n, _, lo, hi in writes.sequences() for t in range(hi - lo)])
    S = writes.states(pairs)[:, heads].unflatten(0, writes.shape[:2])
    at = torch.arange(len(heads))[:, None], indices
    made = torch.einsum("bthj,bthjxk,bthjxv->bthkv", values, v[at], w[at])
    return (S - made - offset).square().sum((3, 4))


def leaf(x):
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize(("gate", "backend"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_factored_loss(name, gate, backend):
    writes, v, w, _, k, heads = build(CASES[name], gate)
    B, T, _, K, V = writes.shape
    values = torch.rand(B, T, len(heads), k, dtype=torch.float64)
    indices = torch.randint(v.shape[1], values.shape)  # with repeats
    inputs = values, v, w, torch.randn(len(heads), K, V, dtype=torch.float64)
    mask, scale = torch.rand(B, T) < 0.7, torch.randn(B, T, len(heads), dtype=torch.float64)
    dtype = torch.float64 if backend == "reference" else torch.float32
    given = [leaf(x.to(dtype)) for x in inputs]
    with poisoned_memory():
        error = factored_loss(
            writes.to(dtype), given[0], indices, *given[1:], heads=heads, mask=mask, backend=backend
        )  # fmt: skip
        (error * scale).sum().backward()
    exact = [leaf(x) for x in inputs]
    want = from_states(writes, exact[1], exact[2], exact[0], indices, exact[3], heads) * mask[..., None]
    (want * scale).sum().backward()
    tolerance = 1e-10 if backend == "reference" else 1e-5
    for got, x in zip(
        (error.detach(), *(g.grad for g in given)), (want.detach(), *(x.grad for x in exact)), strict=True
    ):
        assert float((got.double() - x).abs().max()) <= tolerance * float(x.abs().max())


@pytest.mark.parametrize(("gate", "backend"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_training_loss(name, gate, backend):
    writes, v, w, b, k, heads = build(CASES[name], gate)
    B, T, _, K, V = writes.shape
    gen = torch.Generator().manual_seed(5)
    decoder = dictionary(gen, len(heads), v.shape[1], K, V, v.shape[2])[:2]
    inputs = v, w, b, *decoder, torch.randn(len(heads), K, V, dtype=torch.float64, generator=gen)
    weight = torch.rand(B, T, generator=gen).double() * (torch.rand(B, T, generator=gen) < 0.7)
    dtype = torch.float64 if backend == "reference" else torch.float32
    given = [leaf(x.to(dtype)) for x in inputs]
    with poisoned_memory():
        step = training_loss(writes.to(dtype), *given, k, weight.to(dtype), heads=heads, backend=backend)
        step.loss.backward()
    exact = [leaf(x) for x in inputs]
    pairs = torch.tensor([(n, t) for n, _, lo, hi in writes.sequences() for t in range(hi - lo)])
    S = writes.states(pairs)[:, heads].unflatten(0, writes.shape[:2])
    pre = torch.einsum("hfxk,bthkv,hfxv->bthf", exact[0], S, exact[1]) + exact[2]
    values = pre.gather(-1, step.codes.indices).relu()
    errors = from_states(writes, exact[3], exact[4], values, step.codes.indices, exact[5], heads)
    loss = (errors * weight[..., None]).sum()
    loss.backward()
    tolerance = 1e-10 if backend == "reference" else 2e-5
    pairs = [(step.loss.detach(), loss.detach()), (step.errors, errors.detach() * (weight != 0)[..., None])]
    for got, x in (*pairs, *((g.grad, x.grad) for g, x in zip(given, exact, strict=True))):
        assert float((got.double() - x).abs().max()) <= tolerance * float(x.abs().max())


@pytest.mark.parametrize("gate", GATES)
def test_a_token_of_no_weight_is_left_out(gate):
    writes, v, w, b, k, heads = build(CASES["state"], gate)
    weight = torch.zeros(2, 70, dtype=torch.float64)
    weight[:, :60] = 1
    given = [leaf(x) for x in (v, w, b, v, w)]
    clean = training_loss(writes, *given, None, k, weight, heads=heads, backend="reference")
    writes.right[:, 61:] = torch.nan
    broken = [leaf(x) for x in (v, w, b, v, w)]
    step = training_loss(writes, *broken, None, k, weight, heads=heads, backend="reference")
    for x in (clean, step):
        x.loss.backward()
    assert torch.equal(step.loss, clean.loss)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(given, broken, strict=True))


@pytest.mark.filterwarnings("ignore:.*running the slow token-by-token reference.*:RuntimeWarning")  # float64 on purpose
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("with_dead", [False, True])
def test_factored_path_equals_dense(gate, with_dead):
    block = Block([next(Gated(gate, dtype=torch.float64, noise=0.3).writes(torch.arange(8)))[SITE[0]]], SITE[1])
    pick = torch.randperm(8 * 48, generator=torch.Generator().manual_seed(9))[:50]
    found = {}
    for path in ("dense", "factored"):
        site = SiteTrainer(*SITE, config(path=path, init="random", k_aux=4), block)
        site.silent[4:13] = 99 if with_dead else 0
        losses = site.losses(Batch(block, pick // 48, pick % 48))
        (losses.main + 0.7 * losses.aux).backward()
        found[path] = losses, {name: p.grad for name, p in site.sae.named_parameters()}
    (a, grads), (b, others) = found["dense"], found["factored"]
    assert (float(a.aux.detach()) > 0) == with_dead
    for name in ("main", "aux", "errors"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-12)
    assert torch.equal(a.fired, b.fired)
    for name, x in grads.items():
        assert float(x.abs().max()) > 0, name
        torch.testing.assert_close(x, others[name], rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "path"), [("channel", "dense"), ("channel", "factored"), ("element", "dense")])
def test_planted_atoms_are_found(gate, path):
    run = trainer(Gated(gate), path=path, steps=300, lr=3e-3)
    sae = run.run()[SITE]
    first, last = run.history[0]["loss"], run.history[-1]["loss"]
    assert last < 0.5 * first and last < 0.3
    block = Block([next(Gated(gate).writes(torch.arange(50, 64)))[SITE[0]]], SITE[1])
    found = evaluate(sae, block)
    assert found["fvu"] < 0.3 and found["l0"] <= 3 and abs(found["cosine_median"]) > 0.1


@pytest.mark.parametrize("path", ["dense", "factored"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(path, tmp_path):
    whole = trainer(Gated(), path=path)
    whole.run()
    trainer(Gated(), path=path, folder=tmp_path).run(17)
    again = trainer(Gated(), path=path, folder=tmp_path, resume=True)
    again.run()
    assert same(whole, again)


@pytest.mark.parametrize(
    ("K", "gate", "more", "path"),
    [
        (64, "channel", {}, "dense"), (128, "channel", {}, "factored"), (128, "element", {}, "dense"),
        (128, "channel", {"metric": "readers"}, "dense"), (128, "scalar", {"metric": "readers"}, "factored"),
        (128, "channel", {"sparsity": "batchtopk"}, "dense"),
    ],
)  # fmt: skip
def test_the_path_goes_by_the_gate(K, gate, more, path):
    assert config(**more).resolved_path(K, K, gate) == path


@pytest.mark.filterwarnings("ignore:.*running the slow:RuntimeWarning")
@pytest.mark.parametrize(
    ("tiny", "site", "gate", "path"),
    [
        (tiny_kda, (1, 2), "channel", "dense"), (tiny_kda, (1, 2), "channel", "factored"),
        (tiny_mamba, (1, 0), "element", "dense"),
    ],
)  # fmt: skip
def test_training_at_a_site_of_a_model(tiny, site, gate, path):
    model, passages = tiny(), Passages(tokens(32, 20))
    with ModelStream(model, passages, [site]) as stream:
        run = Trainer(stream, [site], config(F=16, steps=30, states=40, block=16, path=path), progress=False)
        sae = run.run()[site]
        block = Block([part[site[0]] for part in stream.writes(torch.arange(32))], site[1])
    assert block.gate == gate and run.history[-1]["loss"] < 1
    assert evaluate(sae, block)["fvu"] < 1
