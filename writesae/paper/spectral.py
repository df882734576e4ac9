"""Does the spectrum of the memory say where an atom will do? sigma_1 / sigma_2, and other predictors of winning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..experiments.statistics import need
from .lab import Lab
from .measures import above, replaced, replaced_text, spans, states_at
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

# In the order shown; the first two are the study's.
PREDICTORS = ("state", "residual", "cosine", "size", "deletion")


def run(lab: Lab) -> Findings:
    parts = []
    for (layer, head), sae in lab.saes.items():
        result = replaced(lab, {(layer, head): sae}, f"state-{layer}-{head}", conditions=("native", "atom", "delete"),
                          tokens=lab["tokens"])  # fmt: skip
        table = result.table
        X = states_at(lab, (layer, head), replaced_text(lab), table["passage"], table["position"]).to(sae.mean.device)
        kl = {c: result.kl("increment", c, "coef") for c in ("atom", "delete")}
        parts.append({
            **{name: table[name] for name in ("layer", "head", "feature", "passage", "position")}, **kl,
            "state": gap(X), "residual": gap(X - torch.cat([sae(part) for part in X.split(512)])),
            "cosine": table["cosine"], "size": np.log(table["atom_size"] / table["native_norm"].clip(1e-30)),
            "deletion": np.log(kl["delete"].clip(1e-30)),
        })  # fmt: skip
    found = join(parts)
    won = found["atom"] < found["delete"]
    aucs = {name: auc(found[name], won, found["passage"], lab["resamples"], lab.seed) for name in PREDICTORS}
    gain = np.log(found["delete"].clip(1e-30) / found["atom"].clip(1e-30))
    statistics: dict[str, Any] = {
        "firings": len(won), "won": float(won.mean()), "auc": aucs,
        "rank_correlation": {name: _spearman(found[name], gain) for name in PREDICTORS},
        "ratio": {name: _quantiles(np.exp(found[name])) for name in PREDICTORS[:2]},
    }  # fmt: skip
    return Findings(statistics, {"firings": found}, _figures(found, won, aucs), [
        _answer("spectral.state", "state", aucs), _answer("spectral.residual", "residual", aucs),
    ], [
        "The area under the curve is the chance that a firing at which the atom beats deletion has a larger value than "
        "one at which it does not; 0.5 is no prediction, below it the prediction is the other way round.",
        "Ratios are of the state after the token's write, and of what the dictionary's reconstruction leaves of it. "
        "Beside them: the cosine of atom and write, the atom's size over the write's, and deletion's KL.",
    ])  # fmt: skip


def gap(X: Tensor) -> np.ndarray:
    """`[n]` log of the first singular value over the second, of matrices `[n, K, V]`."""
    sigma = torch.linalg.svdvals(X.double())
    return (sigma[:, 0] / sigma[:, 1].clamp_min(1e-30)).clamp(1, 1e12).log().cpu().numpy()


def auc(value: np.ndarray, won: np.ndarray, passage: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Area under the curve with a bootstrap over passages, and its 95 % range where wins are dealt at random."""
    score = need("sklearn.metrics").roc_auc_score
    out: dict[str, Any] = {"statistic": f"area under the curve, {resamples} resamples of passages", "n": len(won)}
    if won.all() or not won.any():
        return {**out, "auc": None, "ci95": None, "null95": None}
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(passage == label) for label in np.unique(passage)]
    drawn, null = [], []
    for _ in range(resamples):
        at = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        if 0 < won[at].sum() < len(at):
            drawn.append(score(won[at], value[at]))
        null.append(score(rng.permutation(won), value))
    ends = (2.5, 97.5)
    return {
        **out, "passages": len(groups), "auc": float(score(won, value)),
        "ci95": np.percentile(drawn, ends).tolist(), "null95": np.percentile(null, ends).tolist(),
    }  # fmt: skip


def _spearman(x: np.ndarray, y: np.ndarray) -> dict:
    found = need("scipy.stats").spearmanr(x, y)
    return {"statistic": "Spearman, with the log of deletion's KL over the atom's", "n": len(x),
            "r": float(found.statistic), "p": float(found.pvalue)}  # fmt: skip


def _quantiles(x: np.ndarray) -> dict:
    return {"n": len(x), "quartiles": np.percentile(x, [25, 50, 75]).tolist()}


def _answer(key: str, name: str, aucs: Mapping[str, dict]) -> Answer:
    own = aucs[name]
    if own["auc"] is None:
        why = "the atom wins at every firing or at none"
        return Answer(key, "–", own["n"], "firings", None, "not measured", "cannot be told", why)
    others = ", ".join(f"{x} {aucs[x]['auc']:.2f}" for x in PREDICTORS[2:])
    return Answer(
        key, f"AUC {own['auc']:.2f}", own["n"], "firings", tuple(own["ci95"]),
        f"wins dealt out at random give {own['null95'][0]:.2f} to {own['null95'][1]:.2f}; other predictors: {others}",
        above(own["ci95"], 0.5),
    )  # fmt: skip


def _figures(found: dict, won: np.ndarray, aucs: dict) -> dict[str, Figure]:
    def ratios(axes, colours):
        for name, colour in (("state", "atom"), ("residual", "delete")):
            order = np.array_split(np.argsort(found[name], kind="stable"), min(8, max(1, len(won) // 5)))
            at = [float(np.exp(np.median(found[name][part]))) for part in order]
            axes.plot(at, [won[part].mean() for part in order], "o-", color=colours[colour], label=f"of the {name}")
        axes.axhline(won.mean(), color=colours["line"], lw=0.9, ls=(0, (4, 3)), label="all firings")
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="first singular value over the second",
                 ylabel="share of firings that beat deletion")  # fmt: skip
        axes.legend()

    def predictors(axes, colours):
        names = [name for name in PREDICTORS if aucs[name]["auc"] is not None][::-1]
        value, spread = spans([aucs[name] for name in names], "auc")
        axes.errorbar(value, names, xerr=spread, fmt="o", color=colours["atom"], lw=1.4)
        axes.axvline(0.5, color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set(xlabel="area under the curve of winning against deletion", xlim=(0, 1))

    return {
        "spectral": Figure(ratios, "Win rate of the atom by the spectral ratio, in groups of as many firings each."),
        "predictors": Figure(predictors, "How well each quantity tells wins from losses, with intervals over passages; "
                             "on the dashed line not at all.", (5.6, 2.8)),
    }  # fmt: skip


STUDY = Study(
    "spectral", "The spectrum as a predictor",
    "An atom has rank 1. Where the memory is nearly of rank 1, too, its first singular value far above the second, an "
    "atom might do better. Tested is how well that ratio tells firings at which the atom beats deletion from others.",
    (
        Claim("spectral.state", "A large ratio of the state's first two singular values goes with winning.", "–",
              "its sources name the predictor, not its strength"),
        Claim("spectral.residual", "So does that of the residual.", "–",
              "its sources name the predictor, not its strength"),
    ),
    {
        "firings": Setting(3000, 150, "firings tested a site"),
        "each": Setting(8, 8, "firings tested a passage at most"),
        "horizon": Setting(8, 2, "tokens followed after the edit"),
        "tokens": Setting(50_000, 5000, "tokens of validation text on which features are chosen"),
        "resamples": Setting(1000, 200, "of the bootstrap and of the null"),
    },
    run,
)  # fmt: skip
