"""What the outer-product encoder is worth: other encoders, other ranks, and what needs no dictionary at all."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..experiments import statistics as st
from ..experiments.statistics import ClusterBootstrap, need
from ..sae import SAE
from ..sae.block import Block
from .lab import Lab, Site
from .measures import above, features_of, percent, ratio, replaced, spans
from .study import Answer, Claim, Figure, Findings, Setting, Study, join
from .trained import config, drawn, examples, held, reconstructions, trained

# The encoder sweep, and rank 2: name, and what of the config differs.
SWEEP: dict[str, dict[str, Any]] = {
    "bilinear": {"kind": "bilinear"}, "tied": {"kind": "bilinear_tied"}, "matrix": {"kind": "matrix"},
    "bilinear_flat": {"kind": "bilinear_flat"}, "flat": {"kind": "flat"}, "rank 2": {"kind": "bilinear", "r": 2},
}  # fmt: skip
TOP_PAIR = "flat, top pair"
_TESTED = ("bilinear", "tied", "matrix", "rank 2", TOP_PAIR)  # whose atoms can stand in for a write


def run(lab: Lab) -> Findings:
    site: Site = next(iter(lab.saes))
    train, test = (held(lab, split, lab["passages"], [site])[site] for split in ("train", "test"))
    learnt, block = Block([train], 0), Block([test], 0)
    rows, positions = drawn(lab, test, lab["states"], "test")
    X = examples(block, rows, positions)
    saes = {name: trained(lab, site, config(lab, **other), train) for name, other in SWEEP.items()}
    saes[TOP_PAIR] = top_pair(saes["flat"])
    guesses = {name: reconstructions(sae, block, rows, positions) for name, sae in saes.items()}
    guesses |= without_dictionaries(examples(learnt, *drawn(lab, train, lab["states"], "train")), X, lab["k"], lab.seed)
    variance = _square(X, X.mean(0, keepdim=True).expand_as(X))
    error = {name: _square(X, guess) for name, guess in guesses.items()}
    passage = rows.cpu().numpy()
    fvu = {name: ratio(each, variance, passage, "passage", lab.seed) for name, each in error.items()}
    tested = {name: _tested(lab, site, saes[name], name) for name in _TESTED}
    statistics: dict[str, Any] = {
        "site": f"{site[0]}:{site[1]}", "states": len(passage), "fvu": fvu,
        "win_rate": {name: _rates(table, lab.seed) for name, table in tested.items()},
    }  # fmt: skip
    tables = {
        "errors": {"passage": passage, "position": positions.cpu().numpy(), "variance": variance, **error},
        "firings": join([{"dictionary": np.full(len(t["head"]), name, object), **t} for name, t in tested.items()]),
    }
    best = min((name for name in fvu if name in SWEEP), key=lambda name: fvu[name]["ratio"])
    answers = [
        _fvu_answer(error, variance, passage, fvu, lab.seed), _flat_answer(error, variance, passage, lab.seed),
        _win_answer("baselines.wins", "bilinear", statistics["win_rate"]),
        _win_answer("baselines.top_pair", TOP_PAIR, statistics["win_rate"]),
    ]  # fmt: skip
    return Findings(statistics, tables, _figures(fvu, statistics["win_rate"]), answers, [
        f"All dictionaries are trained here by the same settings on the same train text, the lowest error is {best}'s. "
        "FVU: squared error on test states over their variance about their own mean.",
        "A sparse code of k atoms also says which; PCA and NMF have as many numbers a state and a fixed basis. The "
        "truncated SVD is of each test state by itself, r (K + V) numbers, nothing learnt.",
        "NMF is of the positive and negative parts of the states side by side, since states have signs.",
    ])  # fmt: skip


def top_pair(sae: SAE) -> SAE:
    """A flat dictionary with each atom cut to its top singular pair; encoder and biases as they are."""
    out = SAE(sae.K, sae.V, sae.F, sae.k, "matrix", 1, "topk", sae.layer, sae.head, sae.model, sae.centred)
    u, sigma, vh = torch.linalg.svd(sae.W_dec.detach().view(sae.F, sae.K, sae.V), full_matrices=False)
    with torch.no_grad():
        out.v_dec.copy_((u[:, :, 0] * sigma[:, :1])[:, None])
        out.w_dec.copy_(vh[:, :1])
        for name in ("W_enc", "b_enc", "bias", "mean"):
            getattr(out, name).copy_(getattr(sae, name))
    return out.to(sae.mean.device).eval().requires_grad_(False)


def without_dictionaries(learnt: Tensor, X: Tensor, k: int, seed: int) -> dict[str, Tensor]:
    """{name: reconstructions of states X `[n, K, V]`}: PCA and NMF of other states `[m, K, V]`, truncated SVDs of X."""
    decomposition = need("sklearn.decomposition")
    shape = X.shape
    train, test = (x.double().flatten(1).cpu().numpy() for x in (learnt, X))
    found = {"mean": np.broadcast_to(train.mean(0), test.shape)}
    for n in sorted({k, 4 * k}):
        if n <= min(train.shape):
            pca = decomposition.PCA(n, random_state=seed).fit(train)
            found[f"PCA {n}"] = pca.inverse_transform(pca.transform(test))
    nmf = decomposition.NMF(min(k, *train.shape), init="nndsvd", max_iter=300, tol=1e-3, random_state=seed)
    scale = np.abs(train).mean()
    with warnings.catch_warnings():  # a few hundred sweeps are what it gets; that it could go on is no news
        warnings.simplefilter("ignore", need("sklearn.exceptions").ConvergenceWarning)
        nmf.fit(_parts(train / scale))
        plus, minus = np.split(scale * nmf.inverse_transform(nmf.transform(_parts(test / scale))), 2, 1)
    found[f"NMF {nmf.n_components}"] = plus - minus
    out = {name: torch.from_numpy(np.array(x)).to(X).view(shape) for name, x in found.items()}
    u, sigma, vh = torch.linalg.svd(X, full_matrices=False)
    for r in (1, 2, 4):
        if r < len(sigma[0]):
            out[f"SVD {r}"] = (u[:, :, :r] * sigma[:, None, :r]) @ vh[:, :r]
    return out


def _parts(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], 1)


def _square(X: Tensor, guess: Tensor) -> np.ndarray:
    return (X - guess).double().square().sum((1, 2)).cpu().numpy()


def _tested(lab: Lab, site: Site, sae: SAE, name: str) -> dict[str, np.ndarray]:
    conditions = ("native", "atom", "delete", "codebook", "singular")
    folder = "replaced-" + "".join(c for c in name if c.isalnum())
    result = replaced(lab, {site: sae}, folder, conditions=conditions, least=1, tokens=lab["tokens"])
    kl = {c: result.kl("increment", c, "coef") for c in conditions[1:]}
    matched = {f"{c}_matched": result.kl("increment", c, "matched") for c in ("atom", "codebook")}
    return {c: result.table[c] for c in ("layer", "head", "feature", "passage", "position")} | kl | matched


def _rates(table: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    by_feature = ClusterBootstrap(features_of(table), seed=seed)
    out: dict[str, Any] = {"features": by_feature.clusters}
    for one, other in (("atom", "delete"), ("codebook", "delete"), ("singular", "delete"), ("atom", "codebook"),
                       ("atom_matched", "delete"), ("atom_matched", "codebook_matched")):  # fmt: skip
        won = st.win_rate(table[one], table[other])
        won["ci95_by_feature"] = by_feature.interval(table[one] < table[other], "feature")["ci95"]
        out[f"{one}_against_{other}"] = won
    return out


def _difference(error: dict, variance: np.ndarray, passage: np.ndarray, one: str, other: str, seed: int) -> dict:
    """FVU of one less that of another, with a bootstrap over passages."""
    draws = ClusterBootstrap(passage, seed=seed)
    drawn_ = (draws.mean(error[one]) - draws.mean(error[other])) / draws.mean(variance)
    value = (error[one].sum() - error[other].sum()) / variance.sum()
    return {"difference": float(value), "ci95": np.percentile(drawn_, [2.5, 97.5]).tolist()}


def _fvu_answer(error, variance, passage, fvu, seed) -> Answer:
    """Against PCA with as many numbers a state: the sparse code must be the better for it."""
    other = next(name for name in fvu if name.startswith("PCA"))
    found = _difference(error, variance, passage, other, "bilinear", seed)
    return Answer(
        "baselines.pca", f"{found['difference']:+.3f} FVU (of {fvu[other]['ratio']:.3f})",
        len(passage), "states", tuple(found["ci95"]),
        "; ".join(f"{name} {x['ratio']:.3f}" for name, x in fvu.items() if name not in (*SWEEP, TOP_PAIR)),
        above(found["ci95"], 0),
    )  # fmt: skip


def _flat_answer(error, variance, passage, seed) -> Answer:
    found = _difference(error, variance, passage, "flat", "bilinear", seed)
    others = [f"{name} {_difference(error, variance, passage, name, 'bilinear', seed)['difference']:+.3f}"
              for name in ("tied", "matrix", "bilinear_flat", "rank 2")]  # fmt: skip
    return Answer(
        "baselines.flat", f"{found['difference']:+.3f} FVU", len(passage), "states", tuple(found["ci95"]),
        f"the other encoders, less bilinear: {', '.join(others)}", above(found["ci95"], 0),
    )  # fmt: skip


def _win_answer(key: str, name: str, rates: dict[str, Any]) -> Answer:
    own = rates[name]["atom_against_delete"]
    null = rates[name]["codebook_against_delete"], rates[name]["singular_against_delete"]
    others = ", ".join(f"{x} {100 * r['atom_against_delete']['rate']:.1f}" for x, r in rates.items() if x != name)
    return Answer(
        key, f"{100 * own['rate']:.1f} %", own["n"], "firings", percent(own["ci95_by_feature"]),
        f"codebook {100 * null[0]['rate']:.1f} %, the state's top singular pair {100 * null[1]['rate']:.1f} %; other "
        f"dictionaries: {others} %", above(own["ci95_by_feature"], 0.5),
    )  # fmt: skip


def _figures(fvu: dict, rates: dict) -> dict[str, Figure]:
    def errors(axes, colours):
        names = list(fvu)[::-1]
        value, spread = spans([fvu[name] for name in names], "ratio")
        shade = [colours["atom" if name in SWEEP or name == TOP_PAIR else "random"] for name in names]
        axes.barh(names, value, color=shade, height=0.62)
        axes.errorbar(value, names, xerr=spread, fmt="none", ecolor=colours["native"], lw=1)
        axes.set(xlabel="fraction of variance unexplained, test text")
        axes.grid(visible=False, axis="y")

    def wins(axes, colours):
        at = np.arange(len(rates))
        labels = {"atom": "atom", "codebook": "codebook", "singular": "top pair of the state"}
        for offset, (arm, label) in zip((-0.22, 0, 0.22), labels.items(), strict=True):
            found = [x[f"{arm}_against_delete"] for x in rates.values()]
            rate, spread = spans(found, "rate")
            axes.errorbar(at + offset, rate, spread, fmt="o", ms=5, lw=1.2, color=colours[arm], label=label)
        axes.axhline(0.5, color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set_xticks(at, list(rates))
        axes.set(ylabel="share of firings that beat deletion", ylim=(0, 1.15))
        axes.legend(ncols=3, loc="upper center")

    return {
        "fvu": Figure(errors, "Error on test states: dictionaries (blue), and what needs none (grey), with intervals "
                      "over passages.", (5.6, 4.2)),
        "wins": Figure(wins, "Replacement test of each dictionary whose atoms can stand in for a write, with its null "
                       "models, and Wilson intervals."),
    }  # fmt: skip


STUDY = Study(
    "baselines", "Other encoders, and none",
    "The same states are coded by dictionaries that differ in their encoder or rank alone, by PCA, NMF and truncated "
    "SVDs. Reported are the error on test states and, where atoms can stand in for a write, the replacement test.",
    (
        Claim("baselines.pca", "A sparse code of k atoms explains more of a state than PCA with k numbers.", "–",
              "its sources name the baselines, not their errors"),
        Claim("baselines.flat", "The outer-product dictionary explains more than the flat one.", "–",
              "its sources name the sweep, not its errors"),
        Claim("baselines.wins", "Outer-product atoms disturb less than deletion.", "92.4 % of 4,851 firings",
              "small dictionaries trained here, every feature instead of 18 picked by hand"),
        Claim("baselines.top_pair", "Flat atoms cut to their top singular pair do so, too.", "–",
              "its sources name this control, not its number"),
    ),
    {
        "passages": Setting(256, 16, "passages of train text, and of test text"),
        "states": Setting(8000, 800, "states of each"),
        "F": Setting(1024, 64, "atoms of a dictionary"),
        "k": Setting(8, 4, "atoms active at once"),
        "steps": Setting(3000, 80, "steps of training"),
        "firings": Setting(1000, 40, "firings tested a dictionary"),
        "each": Setting(8, 4, "firings tested a passage at most"),
        "horizon": Setting(8, 2, "tokens followed after the edit"),
        "tokens": Setting(20_000, 2500, "tokens of validation text on which features are chosen"),
    },
    run,
)  # fmt: skip
