"""`run_with_sae`: every state read through its reconstruction, against edits that make the state that and undo it."""

from __future__ import annotations

import pytest
import torch
from policy_cases import some_sites
from tiny_models import (
    kda_families,
    mamba2_families,
    mamba_families,
    tiny_kda,
    tiny_mamba,
    tiny_mamba2,
    tiny_minimax,
    tiny_model,
    tokens,
)

import writesae
from writesae import Edits, attach

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")
MODELS = {"gated delta": tiny_model, "minimax": tiny_minimax}
MODELS |= {"kda": tiny_kda} if kda_families() else {}
MODELS |= {"mamba-2": tiny_mamba2} if mamba2_families() else {}
MODELS |= {
    name: (lambda f=f: tiny_mamba(f)) for name, f in (("mamba-1", "mamba"), ("zamba", "zamba")) if f in mamba_families()
}


def by_edits(model, saes, ids):
    """The same by edits: at every token the state becomes its reconstruction before the read, and itself again after.

    Layer by layer, since what an upper one reconstructs is the state that follows from changed outputs below.
    """
    edits: dict[int, Edits] = {}
    for layer in sorted({ell for ell, _ in saes}):
        with attach(model, dict.fromkeys(saes), edits=edits, self_test=False) as tap:
            model(ids, use_cache=False)
        states = tap.writes[layer].states(range(ids.shape[1]))  # [B, T, H, K, V]
        parts = []
        for (ell, head), sae in saes.items():
            if ell != layer:
                continue
            for b in range(len(ids)):
                for t in range(ids.shape[1]):
                    state = states[b, t, head]
                    off = sae(state) - state  # [K, V], row by row an outer product
                    K = len(off)
                    at = [b] * K, [t] * K, [head] * K
                    parts += [
                        Edits.add(*at, torch.eye(K), off, when="before"),
                        Edits.add(*at, torch.eye(K), -off, when="after"),
                    ]
        edits[layer] = Edits.cat(parts)
    with attach(model, {}, edits=edits, self_test=False):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", MODELS)
def test_every_read_goes_through_the_reconstruction(family):
    model, ids = MODELS[family](), tokens(2, 9)
    saes = some_sites(model)
    for sae in saes.values():
        sae.mean.normal_(generator=torch.Generator().manual_seed(4)).mul_(0.1)
    plain = model(ids, use_cache=False).logits
    run = writesae.run_with_sae(model, saes, ids)
    torch.testing.assert_close(run.logits, by_edits(model, saes, ids), atol=2e-4, rtol=2e-4)
    assert float((run.logits - plain).abs().max()) > 1e-2
    whole = writesae.run_with_sae(model, saes, ids, error_term=True)
    torch.testing.assert_close(whole.logits, plain, atol=1e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(run.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert run.loss == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("kwargs", [
    dict(sparsity="threshold"), dict(r=2), dict(kind="bilinear_flat"), dict(kind="matrix"), dict(kind="flat"),
], ids=lambda x: next(iter(x.values())))  # fmt: skip
def test_dictionaries_of_other_kinds(kwargs):
    model, ids = tiny_model(), tokens(1, 18)  # more than a block of states
    saes = some_sites(model, **kwargs)
    got = writesae.run_with_sae(model, saes, ids).logits
    torch.testing.assert_close(got, by_edits(model, saes, ids), atol=2e-4, rtol=2e-4)


def test_pads_are_no_part_of_the_loss():
    model, ids = tiny_model(), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    saes = some_sites(model)
    run = writesae.run_with_sae(model, saes, ids, attention_mask=mask)
    rows = [writesae.run_with_sae(model, saes, x[None]) for x in (ids[0, 3:], ids[1])]
    assert run.loss == pytest.approx((4 * rows[0].loss + 7 * rows[1].loss) / 11, rel=1e-4)


def test_refusals():
    model, ids = tiny_model(), tokens(1, 4)
    saes = some_sites(model)
    of_writes = next(iter(some_sites(model, target="write").values()))
    for bad, message in (
        ({}, "saes: expected at least one"), ({(0, 0): None}, r"saes\[\(0, 0\)\]: expected a dictionary, got None"),
        ({(0, 0): of_writes}, r"saes\[\(0, 0\)\]: expected a dictionary of states, got one of writes"),
        ({(2, 0): saes[0, 0]}, "layer 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            writesae.run_with_sae(model, bad, ids)
