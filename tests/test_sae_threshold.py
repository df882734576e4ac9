"""The threshold of a BatchTopK dictionary, estimated from states: against the publisher's batch and by brute force."""

from __future__ import annotations

import pytest
import torch
from test_published import TOP, F, K, V, forward, publish, same_codes, states, tensors

from writesae.sae import SAE, estimate_threshold
from writesae.sae.block import Block
from writesae.sae.sparsity import level_of
from writesae.sae.threshold import nth_largest
from writesae.writes import Writes


@pytest.mark.parametrize("sae_type", ["flat", "rank1", "bilinear", "bilinear_tied", "bilinear_flat"])
@pytest.mark.parametrize("layout", ["rank1", "old"])
def test_an_estimate_gives_the_publishers_batch(sae_type, layout, tmp_path):
    """Over the states it was estimated from, atoms fire as in the publisher's forward pass of one batch of them."""
    publish(tmp_path, sae_type, layout, use_batchtopk=True)
    sae = SAE.from_pretrained(tmp_path, batchtopk="topk")
    sae.metrics = {"fvu": 0.5}
    X = states(1100, seed=5)  # three parts
    before = {n: x.clone() for n, x in sae.state_dict().items()}
    got = estimate_threshold(sae, X)
    codes, _ = forward(tensors(sae_type, layout), X, batchtopk=True)
    assert int((codes > 0).sum()) == TOP * len(X)
    same_codes(got, X, codes)
    assert (
        got.sparsity == "threshold"
        and got.k == TOP
        and got.metrics == {}
        and bool((got.threshold == got.threshold[0]).all())
    )
    torch.testing.assert_close(got.threshold[0], level_of(sae.preactivations(X), TOP))
    assert sae.sparsity == "topk" and sae.threshold is None and sae.metrics == {"fvu": 0.5}
    assert all(torch.equal(x, before[n]) for n, x in sae.state_dict().items())


def test_an_estimate_from_a_block(tmp_path):
    publish(tmp_path, use_batchtopk=True)
    sae = SAE.from_pretrained(tmp_path, batchtopk="topk")
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 33, 2, 1, K, generator=g) / 2, torch.randn(5, 33, 4, 1, V, generator=g) / 2
    writes = Writes(-torch.rand(5, 33, 4, generator=g), left, right)
    block, X = Block([writes], 3), writes.states(list(range(33)))[:, :, 3].flatten(0, 1)
    got = estimate_threshold(sae, block)
    assert got.training_record["published"]["batchtopk"] == "threshold estimated from 165 states"
    assert int((got.encode(X).values > 0).sum()) == TOP * 165
    some = estimate_threshold(sae, block, 20, seed=7)
    assert some.training_record["published"]["batchtopk"] == "threshold estimated from 20 states"
    again, other = (estimate_threshold(sae, block, 20, seed=s).threshold for s in (7, 8))
    assert torch.equal(some.threshold, again) and not torch.equal(again, other)
    assert torch.equal(estimate_threshold(got, block).threshold, got.threshold)  # one threshold may be found anew
    several = estimate_threshold(sae, [X[:40].view(5, 8, K, V), block, X[40:40]])
    assert several.training_record["published"]["batchtopk"] == "threshold estimated from 205 states"
    assert int((several.encode(torch.cat([X[:40], X])).values > 0).sum()) >= TOP * 205  # some of them are twice there


def test_an_estimate_where_few_atoms_fire():
    sae = SAE(K, V, F, TOP)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
        sae.b_enc[3] = 100
    got = estimate_threshold(sae, states())
    codes = got.encode(states())
    assert torch.equal(got.threshold, torch.zeros(F)) and codes.indices.tolist() == [[3]] * 40
    assert got.training_record == {"threshold": "threshold estimated from 40 states"}  # not a published one


def test_wrong_estimates():
    sae = SAE(K, V, F, TOP)
    for X, message in (
        (torch.zeros(4, V, K), r"states: expected a Block or states \[..., K=6, V=9\], got shape \(4, 9, 6\)"),
        (torch.zeros(K, V), r"states: expected a Block or states .*got shape \(6, 9\)"),
        (torch.zeros(0, K, V), "states: expected at least one, got none"),
        (torch.full((4, K, V), float("nan")), "states: expected finite pre-activations"),
        ([torch.zeros(4, K, V), "text"], "states: expected a Block or states .*got 'text'"),
        ([], "states: expected at least one, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_threshold(sae, X)
    with pytest.raises(ValueError, match="number: expected an integer >= 1, got 0"):
        estimate_threshold(sae, states(), 0)
    sae = SAE(K, V, F, TOP, sparsity="threshold")
    sae.threshold[2] = 1
    with pytest.raises(
        ValueError, match="sae: expected top k or one threshold for all atoms, got a threshold for each"
    ):
        estimate_threshold(sae, states())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_nth_largest_is_exact(dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(4000, generator=g, dtype=torch.float64) * torch.logspace(-8, 3, 4000, dtype=torch.float64)).to(
        dtype
    )
    x[100:200] = x[300]  # ties
    x[200:210], x[210] = 0.0, -0.0
    order = x.sort(descending=True).values
    for n in (1, 2, 17, 500, int((x > 0).sum()), int((x > 0).sum()) + 1, 4000):
        got = nth_largest(lambda: iter(x.view(-1, 8).split(200)), n)
        assert got.dtype == dtype and got == order[n - 1].clamp_min(0), n


def test_an_estimate_takes_the_memory_of_a_part():
    """The pre-activations of these states are 16 MB."""

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            if isinstance(out, torch.Tensor):
                self.most = max(self.most, out.untyped_storage().nbytes())
            return out

    sae, X = SAE(K, V, 512, 32), states(8000)
    with Seen() as seen:
        estimate_threshold(sae, X)
    assert seen.most < 3 * 2**20
