"""What the studies of perplexity share: losses of tokens, and what can stand in for a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..experiments.divergence import token_losses as losses
from ..experiments.firing import native_writes
from ..experiments.statistics import need
from ..sae import SAE
from .lab import Lab, Site
from .measures import above, mean, spans
from .study import Answer, Figure
from .trained import drawn, held

# [n, K, V] -> [n, K, V]: what is put in the place of states.
StandIn = Callable[[Tensor], Tensor]
RECONSTRUCTION = "reconstruction"


def token_losses(logits: Tensor, ids: Tensor) -> np.ndarray:
    """`experiments.divergence.token_losses`, as a column of a table."""
    return losses(logits, ids).numpy()


def groups(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """{name: sites changed at once}: each by itself, and, of several, all of them."""
    found = {f"{layer}:{head}": [(layer, head)] for layer, head in sites}
    return found if len(found) < 2 else {**found, "all": list(sites)}


@torch.no_grad()
def stand_ins(lab: Lab, passages: int, context: int, states: int) -> dict[Site, dict[str, StandIn]]:
    """{site: {name: function}} of the lab's dictionaries of states; all but the reconstruction are untrained nulls.

    "reconstruction" is the dictionary's; "codebook" the combination nearest the state of those k native writes of train
    text, out of as many as there are atoms, that score best; "PCA" that of the k first principal components of train
    states; "mean" the mean train state; "zero" an empty state; "SVD" the state's own k first singular pairs, which is
    no null, but the best that k rank-one terms can do.

    Args:
        passages, context: train text, from which `states` states a site are drawn.
    """
    of_train = held(lab, "train", passages, lab.saes, context)
    text = [p.tokens for p in lab.text("train", max(2 * max(sae.F for sae in lab.saes.values()), 4000))]
    books, _ = native_writes(lab.model, lab.saes, text, lab.seed)
    out = {}
    for site, sae in lab.saes.items():
        rows, positions = drawn(lab, of_train[site], states, f"{site}")
        learnt = of_train[site].states(torch.stack([rows, positions], 1))[:, 0].float()
        out[site] = _of_site(sae, learnt, books[site], lab.seed)
    return out


def _of_site(sae: SAE, learnt: Tensor, book: tuple[Tensor, Tensor], seed: int) -> dict[str, StandIn]:
    centre, k = learnt.mean(0), min(sae.k, sae.F)
    flat = learnt.flatten(1).cpu().numpy()
    pca = need("sklearn.decomposition").PCA(min(k, *flat.shape), random_state=seed).fit(flat)
    basis = torch.from_numpy(pca.components_).to(learnt)  # [k, K V], orthonormal
    left, right = (normalize(x.to(learnt), dim=1) for x in book)

    def coded(X: Tensor) -> Tensor:
        return sae.decode(sae.encode(X.to(sae.compute_dtype))).to(X)

    def principal(X: Tensor) -> Tensor:
        offset = (X - centre).flatten(1)
        return centre + (offset @ basis.T @ basis).view_as(X)

    def of_writes(X: Tensor) -> Tensor:
        return torch.cat([centre + _nearest(part - centre, left, right, k) for part in X.split(16)])

    def truncated(X: Tensor) -> Tensor:
        u, sigma, vh = torch.linalg.svd(X, full_matrices=False)
        return (u[..., :k] * sigma[..., None, :k]) @ vh[..., :k, :]

    return {
        RECONSTRUCTION: coded, "codebook": of_writes, "PCA": principal, "mean": lambda X: centre.expand_as(X),
        "zero": torch.zeros_like, "SVD": truncated,
    }  # fmt: skip


def _nearest(X: Tensor, left: Tensor, right: Tensor, k: int) -> Tensor:
    """`[n, K, V]`: the combination nearest X of its k best scoring atoms out of `left [F, K] right [F, V]^T`, unit."""
    score, at = torch.einsum("nkf,fk->nf", X @ right.T, left).topk(k, 1)
    v, w = left[at].double(), right[at].double()  # [n, k, *]
    gram = (v @ v.mT) * (w @ w.mT)
    share = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ score.double()[..., None]  # [n, k, 1]
    return ((v * share).mT @ w).to(X)


def condition_table(first: int, group: str, condition: str, loss: np.ndarray, near: int = 16) -> dict[str, np.ndarray]:
    """Rows of a batch of passages, of which `first` is the first's number: means of `loss [B, n]` over all of its
    tokens, and over the first `near` (column "near")."""
    B, n = loss.shape
    text = {"group": np.empty(B, object), "condition": np.empty(B, object)}
    text["group"][:], text["condition"][:] = group, condition
    return {
        "passage": first + np.arange(B), **text, "loss": loss.mean(1), "near": loss[:, :near].mean(1),
        "tokens": np.full(B, n),
    }  # fmt: skip


def perplexities(table: Mapping[str, np.ndarray], seed: int, column: str = "loss") -> dict[str, Any]:
    """{group: {"plain": perplexity, "conditions": {name: ...}}} of tables of `condition_table` with a "plain" group.

    Of a condition: its perplexity, the mean change of the loss in nats a token (`mean`, `ci95`), and by how much more
    than the reconstruction it costs (`over_reconstruction`), each with a bootstrap over passages.
    """
    table = {**table, "loss": table[column]}
    plain = _of(table, "", "plain")
    passage = np.arange(len(plain))
    out: dict[str, Any] = {}
    for group in filter(None, dict.fromkeys(table["group"])):
        names = list(dict.fromkeys(table["condition"][table["group"] == group]))
        loss = {name: _of(table, group, name) for name in names}
        found: dict[str, Any] = {}
        for name in names:
            found[name] = {"perplexity": _exp(loss[name]), **mean(loss[name] - plain, passage, "passage", seed)}
            if name != RECONSTRUCTION:
                over = loss[name] - loss[RECONSTRUCTION]
                found[name]["over_reconstruction"] = mean(over, passage, "passage", seed)
        out[group] = {"plain": _exp(plain), "passages": len(plain), "conditions": found}
    return out


def _of(table: Mapping[str, np.ndarray], group: str, condition: str) -> np.ndarray:
    mine = (table["group"] == group) & (table["condition"] == condition)
    return table["loss"][mine][np.argsort(table["passage"][mine])]


def _exp(loss: np.ndarray) -> float:
    return float(np.exp(loss.mean()))


def against(key: str, null: str, found: Mapping[str, Any]) -> Answer:
    """The reconstruction beats a null: it costs fewer nats a token, by an interval that lies above 0."""
    of = found["conditions"]
    over = of[null]["over_reconstruction"]
    return Answer(
        key,
        f"{over['mean']:+.6f} nats a token (perplexity {found['plain']:.3f} plain, "
        f"{of[RECONSTRUCTION]['perplexity']:.3f} reconstruction, {of[null]['perplexity']:.3f} {null})",
        over["n"], "passages", tuple(over["ci95"]),
        "more nats a token than plain: " + ", ".join(f"{name} {x['mean']:+.6f}" for name, x in of.items()),
        above(over["ci95"], 0),
    )  # fmt: skip


def loss_figure(found: Mapping[str, Any], caption: str) -> Figure:
    """What each condition costs, with intervals; of the last group, which is all sites where there are several."""
    of = found["conditions"]

    def paint(axes, colours):
        names = list(of)[::-1]
        value, error = spans([of[name] for name in names])
        colour = [colours["atom"] if name == RECONSTRUCTION else colours["random"] for name in names]
        at = np.arange(len(names))
        axes.barh(at, value, color=colour, height=0.62)
        axes.errorbar(value, at, xerr=error, fmt="none",
                      ecolor=colours["line"], elinewidth=1, capsize=2)  # fmt: skip
        axes.axvline(0, color=colours["line"], lw=0.9)
        axes.set(xlabel="more loss than the plain model, nats a token")
        axes.set_yticks(at, names)

    return Figure(paint, caption)
