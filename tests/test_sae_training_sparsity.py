"""Dictionaries trained with other sparsities than top k: k fire on average, and the threshold kept does the same."""

from __future__ import annotations

import pytest
import torch
from test_sae_training import SITE, K, Planted, V, config, planted, same, trainer  # noqa: F401

from writesae.sae import SAE, evaluate
from writesae.sae.block import Block
from writesae.sae.site import Batch, SiteTrainer
from writesae.sae.sparsity import Jump, level_of, packed

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = ["batchtopk", "jumprelu", "gated"]


@pytest.mark.parametrize("sparsity", OTHERS)
@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat"])
def test_exported_dictionary_does_what_was_trained(sparsity, kind):
    """On raw states of any norm the kept threshold fires the atoms that fired in training, with the same codes."""
    if (sparsity, kind) == ("gated", "bilinear_tied"):
        with pytest.raises(ValueError, match="sparsity: gated scales the encoder apart from the atoms"):
            config(sparsity=sparsity, kind=kind)
        return
    block = Block([next(Planted(noise=0.3).writes(torch.arange(16)))[2]], 3)
    block = Block([block.writes(torch.arange(16), 1e3)], 0)
    site = SiteTrainer(*SITE, config(kind=kind, sparsity=sparsity, init="random"), block)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*site.sae.parameters(), *site.sparsity.parameters()):
            p += 0.1 * p.abs().mean() * torch.randn(p.shape, generator=g)
    order = torch.arange(16 * 48)
    batch = Batch(block, order // 48, order % 48)
    for _ in range(80):  # of BatchTopK the mean threshold of this batch is this batch's threshold
        losses = site.losses(batch)
    sae, X = site.export(), block.states(batch.rows, batch.positions)
    assert sae.sparsity == "threshold" and bool((sae.threshold >= 0).all()) and float(X.norm(dim=(1, 2)).mean()) > 100
    error = (sae(X) - X).square().sum((1, 2)) * site.scale**2
    close = (error - losses.errors).abs() <= 1e-3 * losses.errors + 1e-4
    assert close.float().mean() > 0.99  # but for a pre-activation within rounding of its threshold
    codes = sae.encode(X)
    fired = torch.zeros(sae.F, dtype=torch.bool)
    fired[codes.indices[codes.values > 0]] = True
    assert torch.equal(fired, losses.fired)


@pytest.mark.parametrize("sparsity, near", [("batchtopk", 0.1), ("jumprelu", 0.5), ("gated", 0.5)])
def test_k_atoms_fire_on_average(sparsity, near, tmp_path):
    settings = dict(F=16, k=3, steps=300, lr=1e-2, dead_after=30, resample_every=100, sparsity=sparsity)
    run = trainer(Planted(passages=96, decay=1.0), **settings)
    sae = run.run()[SITE]
    held_out = Block([Planted(decay=1.0)._writes(torch.arange(500, 520))], 3)
    got = evaluate(sae, held_out)
    assert got["l0"] == pytest.approx(3, rel=near) and got["fvu"] < 0.15
    v, w = planted()
    found = ((sae.v_dec[:, 0] @ v.T) * (sae.w_dec[:, 0] @ w.T)).max(0).values
    assert int((found > 0.8).sum()) >= 9, found
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert torch.equal(again.threshold, sae.threshold) and again.training_record["sparsity"] == sparsity


@pytest.mark.parametrize("sparsity", OTHERS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(sparsity, tmp_path):
    settings = dict(sparsity=sparsity, steps=30, resample_every=7, F=200, k=2, states=8, init="random",
                    resample_until=1.0)  # fmt: skip
    whole = trainer(**settings)
    whole.run()
    trainer(**settings, folder=tmp_path).run(17)
    resumed = trainer(**settings, folder=tmp_path, resume=True)
    resumed.run()
    assert same(whole, resumed) and resumed.history == whole.history
    assert whole.trainers[SITE].resampled > 0


def test_jump_by_hand():
    """Values, and the rectangle's estimate of the gradient of a threshold: of x over it, and of whether it is."""
    x = torch.tensor([[0.5, 1.04, 0.96, 2.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    values, fires = Jump.apply(x, threshold, torch.full((1, 4), 0.1, dtype=torch.float64))
    assert values.tolist() == [[0, 1.04, 0, 2]] and fires.tolist() == [[0, 1, 0, 1]]
    (3 * values.sum() + 5 * fires.sum()).backward()
    assert x.grad.tolist() == [[0, 3, 0, 3]]
    torch.testing.assert_close(threshold.grad, torch.tensor([[0, -80, -80, 0]], dtype=torch.float64))


def test_packed_and_level():
    pre = torch.tensor([[3.0, -1, 2, 0.5], [0.1, 5, -2, 0.2]])
    assert float(level_of(pre, 1)) == 3 and float(level_of(pre, 4)) == pytest.approx(1e-6)
    indices, on = packed(pre >= 0.5)
    assert indices[0].tolist() == [0, 2, 3] and on.tolist() == [[True] * 3, [True, False, False]]
    assert indices[1, 0] == 1
    indices, on = packed(pre > 9)
    assert indices.shape == (2, 1) and not on.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sparsity="l1"), "sparsity: expected one of topk, batchtopk, jumprelu, gated, pursuit, got 'l1'"),
        (dict(sparsity="gated", path="factored"), "path: sparsity gated trains by path dense only"),
        (dict(penalty=0.0), "penalty: expected a finite number > 0"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        config(**arguments)
    assert config(sparsity="jumprelu").resolved_path(128, 128) == "dense" and K != V
