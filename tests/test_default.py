"""The embedded model and dictionary are found from anywhere, under their one name."""

from __future__ import annotations

import pytest
import torch

import writesae
from writesae.experiments.codebook import codebook
from writesae.sae import Passages
from writesae.text import Corpus


def test_load_default_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()  # a folder of that name does not come in its stead
    default = writesae.load_default()
    model, tokenizer, saes = default
    assert default.saes is saes and not model.training
    for (layer, head), sae in saes.items():
        assert (sae.layer, sae.head) == (layer, head)
    sae = writesae.SAE.from_pretrained("default")
    assert (sae.layer, sae.head) in saes
    for name, given in sae.state_dict().items():
        assert torch.equal(given, saes[sae.layer, sae.head].state_dict()[name])


def test_the_dictionary_fits_its_model():
    model, tokenizer, saes = writesae.load_default()
    batch = tokenizer("import os", return_tensors="pt")
    with torch.no_grad(), writesae.attach(model, saes) as tap:
        model(**batch)
    assert {(int(a), int(b)) for a, b in zip(tap.firings.layer, tap.firings.head, strict=True)} == set(saes)


def test_the_dictionaries_of_writes():
    """They fire in their model, at every token, and code held-out writes better than as many writes untrained."""
    model, tokenizer, saes = writesae.load_default("write")
    assert len(saes) == 5 and all(sae.target == "write" for sae in saes.values())
    texts = {name: Passages.from_corpus(Corpus.from_name(f"stdlib:{name}"), tokenizer, max_tokens=9000)
             for name in ("train", "test")}  # fmt: skip
    found = {}
    for name, text in texts.items():
        with torch.no_grad(), writesae.attach(model, saes if name == "test" else dict.fromkeys(saes)) as tap:
            model(input_ids=text.ids.long())
        found[name] = tap.writes
    assert len(tap.firings) > 0.99 * 8 * len(saes) * texts["test"].ids.numel()
    for (layer, head), sae in saes.items():
        factors = {}
        for name, writes in found.items():
            left, right = writes[layer].left[:, :, head // 2], writes[layer].right[:, :, head]
            factors[name] = left.flatten(0, 1), right.flatten(0, 1)
        sae = sae.float()
        book = codebook(sae, *(x[: sae.F, 0] for x in factors["train"]))
        left, right = (x[:1000] for x in factors["test"])
        X = torch.einsum("prk,prv->pkv", left, right)
        for k in (1, 8):
            error = [
                torch.einsum("pkv,kl,plv->", E, sae.metric, E)
                for E in (X - x.decode(x.encode_writes(left, right, k=k)) for x in (sae, book))
            ]
            assert error[0] < error[1], (layer, head, k)
    with pytest.raises(ValueError, match="^target: expected one of state, write, got 'key'"):
        writesae.load_default("key")


@pytest.mark.parametrize("name", writesae.__all__)
def test_every_public_name_is_found_and_listed(name):
    assert getattr(writesae, name) is not None and name in dir(writesae)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        writesae.nothing  # noqa: B018
