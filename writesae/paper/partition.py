"""Register and bundle atoms: does the median cosine of an atom with the writes at which it fires fall in two groups?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..experiments.statistics import need, proportion
from ..sae import SAE
from .lab import Lab, Site
from .measures import above
from .stability import sweep
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

_LEAST = 10  # alive features below which no mixture is fitted


def run(lab: Lab) -> Findings:
    ids = lab.whole("validation", lab["passages"])
    table = lab.unit("cosines", lambda: _cosines(lab, ids))
    null = lab.unit("cosines-shuffled", lambda: _cosines(lab, ids, shuffled=True))
    statistics: dict[str, Any] = {"tokens": int(ids.numel()), "least_firings": lab["least"], "sites": {}}
    columns: tuple[str, ...] = ("layer", "head", "feature", "firings", "median", "shuffled")
    rows: dict[str, list] = {name: [] for name in columns}
    for layer, head in lab.saes:
        features, counts, medians = _medians(table, (layer, head), lab["least"])
        _, _, shuffled = _medians(null, (layer, head), lab["least"])
        same = np.full(len(features), layer), np.full(len(features), head)
        for name, column in zip(columns, (*same, features, counts, medians, shuffled), strict=True):
            rows[name].append(column)
        statistics["sites"][f"{layer}:{head}"] = _site(medians, shuffled, lab["threshold"], lab.seed)
    found = {name: np.concatenate(parts) for name, parts in rows.items()}
    median, shuffled = found["median"], found["shuffled"]
    whole = _site(median, shuffled, lab["threshold"], lab.seed)
    statistics["all"] = whole
    thresholds = [proportion(median > x, f"median cosine above {x}") for x in lab["sweep"]]
    statistics["sweep"] = [{"threshold": x, **p} for x, p in zip(lab["sweep"], thresholds, strict=True)]
    tables = {"features": found}
    site = next(iter(lab.saes))
    statistics["trained"], tables["dictionaries"] = sweep(lab, site, lambda sae: _alive(lab, ids, site, sae))
    answers = [*_answers(whole), _seeds_agree(statistics["trained"]["k"])]
    return Findings(statistics, tables, _figures(median, shuffled, lab["threshold"]), answers, [
        "A site of the paper is one head; with several dictionaries the statistics of each are under `sites`.",
        "The author's script multiplies the state with the key on its other side, which K = V hides; his medians are "
        "therefore not the cosines defined here.",
    ])  # fmt: skip


def _cosines(lab: Lab, ids, shuffled: bool = False, saes: Mapping[Site, SAE] | None = None) -> dict[str, np.ndarray]:
    """Site, feature and signed cosine of every firing; shuffled: against the write of another firing of the site."""
    parts = []
    saes = lab.saes if saes is None else saes
    for reading in lab.read(ids, saes):
        fired = reading.firings
        for layer, head in saes:
            mine = fired[(fired.layer == layer) & (fired.head == head)]
            if not len(mine):
                continue
            left, right = reading.writes[layer].native(mine.row, mine.position, head)
            v, w = (x.detach()[mine.feature.long()] for x in saes[layer, head].atoms())
            if shuffled:
                other = lab.rng("shuffle", layer, head, reading.first).permutation(len(mine))
                left, right = left[other], right[other]
            inner = ((v * left[:, None]).sum(-1) * (w * right[:, None]).sum(-1)).sum(-1)
            size = ((v @ v.mT) * (w @ w.mT)).sum((-1, -2)).sqrt()
            norm = size * left.norm(dim=-1) * right.norm(dim=-1)
            cosine = (inner / norm.clamp_min(1e-30)).double().cpu().numpy()
            at = np.full(len(mine), layer), np.full(len(mine), head)
            parts.append({"layer": at[0], "head": at[1], "feature": mine.feature.cpu().numpy(), "cosine": cosine})
    if not parts:
        raise ValueError("saes: expected dictionaries of which something fires on the validation text, got none")
    return join(parts)


def _alive(lab: Lab, ids, site: Site, sae: SAE) -> tuple[np.ndarray, np.ndarray]:
    """(features alive, their median cosines) of one dictionary of a site."""
    features, _, medians = _medians(_cosines(lab, ids, saes={site: sae}), site, lab["least"])
    return features, medians


def _medians(table: Mapping[str, np.ndarray], site: Site, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features with that many firings, their firings, their median cosines) of one site."""
    mine = (table["layer"] == site[0]) & (table["head"] == site[1])
    feature, cosine = table["feature"][mine], table["cosine"][mine]
    order = np.argsort(feature, kind="stable")
    features, first, counts = np.unique(feature[order], return_index=True, return_counts=True)
    medians = np.array([np.median(part) for part in np.split(cosine[order], first[1:])] if len(features) else [])
    enough = counts >= least
    return features[enough], counts[enough], medians[enough]


def _site(medians: np.ndarray, shuffled: np.ndarray, threshold: float, seed: int) -> dict:
    """Two components against one by BIC, for the cosines and for those with another firing's write, and the split."""
    out: dict[str, Any] = {"alive": len(medians)}
    if len(medians) < _LEAST:
        return {**out, "note": f"fewer than {_LEAST} alive features: no mixture is fitted"}
    register = medians > threshold
    out["register"] = proportion(register, f"alive features with a median cosine above {threshold}")
    out["register_median"] = float(np.median(medians[register])) if register.any() else None
    for name, values in (("mixture", medians), ("mixture_shuffled", shuffled)):
        out[name] = _mixture(values, seed)
    return out


def _mixture(values: np.ndarray, seed: int) -> dict:
    """BIC of two Gaussians less that of one (below 0: two are better), with a bootstrap over features."""
    mixture = need("sklearn.mixture").GaussianMixture

    def difference(x: np.ndarray) -> float:
        column = x[:, None]
        two, one = (mixture(n, random_state=seed, n_init=3).fit(column).bic(column) for n in (2, 1))
        return float(two - one)

    fitted = mixture(2, random_state=seed, n_init=3).fit(values[:, None])
    order = np.argsort(fitted.means_[:, 0])
    rng = np.random.default_rng(seed)
    draws = [difference(rng.choice(values, len(values))) for _ in range(100)]
    return {
        "statistic": "BIC of two Gaussians less that of one; percentile 95 % interval over 100 bootstraps of features",
        "n": len(values), "delta_bic": difference(values), "ci95": np.percentile(draws, [2.5, 97.5]).tolist(),
        "means": fitted.means_[order, 0].tolist(), "weights": fitted.weights_[order].tolist(),
    }  # fmt: skip


def _answers(whole: dict) -> list[Answer]:
    if "mixture" not in whole:
        return [
            Answer(
                claim.key, "–", whole["alive"], "alive features", None, "not measured", "cannot be told", whole["note"]
            )
            for claim in STUDY.claims[:2]
        ]
    mixture, null, share = whole["mixture"], whole["mixture_shuffled"], whole["register"]
    low, high = mixture["ci95"]
    apart = high < null["delta_bic"]
    two = "holds" if high < 0 and apart else "does not hold" if low > 0 else "cannot be told"
    return [
        Answer(
            "partition.two_groups", f"ΔBIC {mixture['delta_bic']:.0f}", mixture["n"], "alive features", (low, high),
            f"medians against the write of another firing give ΔBIC {null['delta_bic']:.0f}", two,
        ),
        Answer(
            "partition.register_share", f"{100 * share['rate']:.1f} %", share["n"], "alive features",
            (100 * share["ci95"][0], 100 * share["ci95"][1]),
            "a share has no null of its own: the threshold 0.05 is the paper's", "not comparable",
        ),
    ]  # fmt: skip


def _seeds_agree(by_k: Mapping[str, dict]) -> Answer:
    """Of the largest k that was trained under several seeds with anything alive."""
    key, of = STUDY.claims[2].key, "atoms and other seeds"
    found = [x for x in by_k.values() if "matched" in x]
    if not found:
        return Answer(key, "–", 0, of, None, "not measured", "cannot be told", "no two dictionaries with alive atoms")
    own, null = found[-1]["matched"], found[-1]["matched_shuffled"]
    low, high = own["ci95"]
    return Answer(
        key, f"{100 * own['mean']:.1f} %", own["n"], of, (100 * low, 100 * high),
        f"with key and value sides paired anew {100 * null['mean']:.1f} % have a match", above((low, high), 0.5),
    )  # fmt: skip


def _figures(median: np.ndarray, shuffled: np.ndarray, threshold: float) -> dict[str, Figure]:
    def paint(axes, colours):
        bins = np.linspace(min(median.min(), shuffled.min(), -0.05), max(median.max(), shuffled.max(), 0.1), 50)
        axes.hist(median, bins, color=colours["atom"], alpha=0.75, label="its own firings' writes")
        axes.hist(shuffled, bins, histtype="step", color=colours["random"], lw=1.4, label="writes of other firings")
        axes.axvline(threshold, color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set(xlabel="median cosine of atom and native write", ylabel="alive features")
        axes.legend()

    return {"partition": Figure(paint, "Median signed cosine of every alive feature with the model's own writes at its "
                                "firings, beside the same with writes of other firings. The dashed line is the simple "
                                "rule's threshold.")}  # fmt: skip


STUDY = Study(
    "partition", "Registers and bundles",
    "For every alive feature, the median over its firings of the signed cosine of its atom with the write that the "
    "model itself makes there. The paper finds two groups: registers, which look like writes, and bundles, which "
    "don't. Dictionaries of other sparsity and other seeds, trained here, say what of it is the training's doing.",
    (
        Claim("partition.two_groups", "Median cosines form two groups: a mixture of two beats one by BIC.",
              "ΔBIC −296 (L9H4)", "the paper's script multiplies the state on its other side"),
        Claim("partition.register_share", "Most alive features are registers.", "222 of 316 (70 %), median 0.262",
              "other model, other number of atoms, and the paper's cosines are of another product"),
        Claim("partition.seeds", "Most alive atoms are found again, with a cosine above 0.9, under another seed.", "–",
              "its sources count groups over seeds and name the threshold of a match; here small dictionaries, trained "
              "within the study"),
    ),
    {
        "passages": Setting(200, 24, "passages of validation text"),
        "least": Setting(5, 3, "firings a feature needs to be alive"),
        "threshold": Setting(0.05, 0.05, "median cosine above which a feature is a register"),
        "ks": Setting((2, 4, 8, 16, 32), (2, 8), "atoms active at once, of the dictionaries trained for the sweep"),
        "seeds": Setting(3, 2, "seeds they are trained under, each k under all"),
        "F": Setting(1024, 128, "their atoms"),
        "steps": Setting(3000, 100, "their steps of training"),
        "sweep": Setting((0.0, 0.02, 0.05, 0.1, 0.2), (0.0, 0.05, 0.1), "thresholds tried"),
    },
    run,
)  # fmt: skip
