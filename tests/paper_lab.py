"""A laboratory on a tiny random model and random texts, for tests of the paper's studies."""

import numpy as np
import torch
from tiny_models import tiny_mamba2, tiny_model

from writesae.paper import Lab, studies
from writesae.sae import SAE


class Letters:
    """A tokenizer of 90 tokens: one a byte."""

    bos_token_id = 2

    def __call__(self, text, **_):
        return {"input_ids": [3 + b % 90 for b in text.encode()]}

    def decode(self, ids):
        return "".join(chr(32 + i) for i in ids)


def dictionary(layer, head, target="state", K=8, V=6, F=24, k=4, seed=0, kind="bilinear"):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SAE(K, V, F, k, kind, layer=layer, head=head, target=target).eval().requires_grad_(False)


def texts(folder, length=1400, files=4):
    """{split: folder} of random words out of few."""
    found = {}
    for s, split in enumerate(("train", "validation", "test")):
        (folder / split).mkdir(parents=True)
        draw = np.random.default_rng(s)
        words = ["".join(chr(c) for c in np.random.default_rng(w).integers(97, 123, 4)) for w in range(12)]
        for i in range(files):
            words_here = " ".join(draw.choice(words, length // 5))
            (folder / split / f"{i}.txt").write_text(words_here)
        found[split] = str(folder / split)
    return found


def lab(name, folder, family="gated", saes=True, writes=True, keep=False, **settings):
    """Of the study `name`, by its quick settings and those given."""
    study = studies()[name]
    mamba = family == "mamba2"
    model = tiny_mamba2() if mamba else tiny_model()
    (layer, head), (K, V) = (1, 2), (8, 6)
    if mamba:
        from writesae.models.sites import layers

        site = layers(model)[1]
        layer, head, K, V = site.layer_index, 1, site.K, site.V
    given = {"state": saes, "write": writes}
    made = {t: {(layer, head): dictionary(layer, head, t, K, V)} if on else {} for t, on in given.items()}
    values = {key: setting.quick for key, setting in study.settings.items()} | settings
    where = texts(folder / "text") if not (folder / "text").exists() else {
        split: str(folder / "text" / split) for split in ("train", "validation", "test")
    }  # fmt: skip
    return Lab(
        model, Letters(), made["state"], made["write"], texts=where, settings=values, quick=True, progress=False,
        folder=folder / "out" if keep else None, any_model=True, name=name, bos=False,
    )  # fmt: skip
