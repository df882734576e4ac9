"""Policies in `generate` and in prompts, of every family, against a reference that reruns the prefix at every token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_cases import SOME, Reference, check, generated, mixed, padded, some_sites
from tiny_models import (
    families,
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

from writesae import Clamp, Erase, Install, Scale, attach

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")
MODELS = (
    *((tiny_model, x) for x in families()), *((tiny_kda, x) for x in kda_families()),
    *((tiny_mamba2, x) for x in mamba2_families()), *((tiny_mamba, x) for x in mamba_families()), (tiny_minimax, None),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("make, family", MODELS, ids=[f"{make.__name__}-{family}" for make, family in MODELS])
def test_every_family_generates_as_by_the_slow_reference(make, family, record_property):
    model = make(family) if family else make()
    saes = some_sites(model)
    pads = 0 if make is tiny_minimax else 3  # its own cached logits of padded rows are not those of one pass
    record_property("codes", check(model, *padded(pads=pads), saes, mixed(saes), do_sample=False))


@pytest.mark.parametrize("read", ["before", "after"])
@pytest.mark.parametrize("policy", [
    lambda read: Erase(SOME, read=read), lambda read: Erase(SOME, what="atom", read=read),
    lambda read: Scale(SOME, 2.0, read=read), lambda read: Clamp([2, 6, 9], 3.0, read=read),
    lambda read: Clamp([2, 6], 3.0, always=True, read=read), lambda read: Install(5, [4, 5, 9], 2.0, read=read),
], ids=["write", "atom", "scale", "clamp", "always", "install"])  # fmt: skip
def test_each_policy_before_and_after_the_read(model, policy, read, record_property):
    record_property("codes", check(model, *padded(), some_sites(model), [policy(read)], do_sample=False))


@pytest.mark.parametrize("kwargs", [
    dict(sparsity="threshold"), dict(r=2), dict(kind="bilinear_tied"), dict(centred=False),
], ids=["threshold", "rank 2", "tied", "no mean"])  # fmt: skip
def test_dictionaries_of_other_kinds(model, kwargs):
    saes = some_sites(model, **kwargs)
    check(model, *padded(), saes, mixed(saes), do_sample=False)


def test_sampling(model):
    saes = some_sites(model)
    torch.manual_seed(3)
    check(model, *padded(), saes, mixed(saes), do_sample=True)


@pytest.mark.parametrize("make, family", [
    at for at in MODELS if at[1] in ("qwen3_5", "kimi_linear", "mamba2", "mamba")
], ids=lambda x: x if isinstance(x, str) else x.__name__)  # fmt: skip
def test_beams(make, family):
    """Of beams the text is compared with `generate` that reruns every prefix, and its score with the reference's."""
    model = make(family)
    saes = some_sites(model)
    policies = mixed(saes)
    ids, mask = padded()
    kwargs = dict(num_beams=3, do_sample=False, output_scores=True)
    out, tap = generated(model, ids, mask, saes, policies, **kwargs)
    again, other = generated(model, ids, mask, saes, policies, use_cache=False, **kwargs)
    assert torch.equal(out.sequences, again.sequences)
    assert [r.applied for r in tap.policies] == [r.applied for r in other.policies]
    text = out.sequences[:, :-1]
    whole = torch.cat([mask, mask.new_ones(len(mask), text.shape[1] - mask.shape[1])], 1)
    logits = Reference(model, text, saes, policies, whole).logits[:, ids.shape[1] - 1 :]
    new = out.sequences[:, ids.shape[1] :]
    score = logits.log_softmax(-1).gather(2, new[..., None])[..., 0].mean(1)
    torch.testing.assert_close(score, out.sequences_scores, atol=1e-4, rtol=1e-4)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3, pad_token_id=0, eos_token_id=None)
    assert not torch.equal(plain, out.sequences)


def test_a_packed_batch_is_its_rows(model):
    saes = some_sites(model)
    policies = mixed(saes)
    rows, lengths = tokens(3, 13), [13, 4, 9]
    packed = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])[None]
    at = torch.cat([torch.arange(n) for n in lengths])[None]
    with attach(model, saes, policies=policies, strict=True) as tap:
        logits = model(packed, position_ids=at, use_cache=False).logits[0].split(lengths)
    applied = [0] * len(policies)
    for i, n in enumerate(lengths):
        reference = Reference(model, rows[i : i + 1, :n], saes, policies)
        applied = [a + b for a, b in zip(applied, reference.applied.values(), strict=True)]
        torch.testing.assert_close(logits[i], reference.logits[0], atol=1e-4, rtol=1e-4)
        mine = tap.firings[tap.firings.row == i]
        reference.check_firings(replace(mine, row=mine.row * 0))
    assert [r.total for r in tap.policies] == applied
