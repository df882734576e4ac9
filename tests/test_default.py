"""The embedded model and dictionary are found from anywhere, under their one name."""

from __future__ import annotations

import pytest
import torch

import writesae


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


@pytest.mark.parametrize("name", writesae.__all__)
def test_every_public_name_is_found_and_listed(name):
    assert getattr(writesae, name) is not None and name in dir(writesae)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        writesae.nothing  # noqa: B018
