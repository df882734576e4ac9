"""What several studies do alike: a replacement test on their texts, ratios with intervals, verdicts from intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..experiments.firing import stream, survey
from ..experiments.replace import Passage, run_replacement
from ..experiments.result import ReplacementResult
from ..experiments.statistics import ClusterBootstrap
from ..sae import SAE
from .lab import Lab, Site
from .study import Answer, Claim


def above(interval: Sequence[float] | None, line: float) -> str:
    """The verdict of "more than `line`": by the side on which the whole interval lies."""
    if interval is None:
        return "cannot be told"
    low, high = interval
    return "holds" if low > line else "does not hold" if high < line else "cannot be told"


def unmeasured(claim: Claim, why: str, of: str = "firings") -> Answer:
    """The answer to a claim of which nothing could be measured."""
    return Answer(claim.key, "–", 0, of, None, "not measured", "cannot be told", why)


def percent(interval: Sequence[float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def mean(values: np.ndarray, clusters: np.ndarray, by: str, seed: int = 0) -> dict:
    """Mean of `values [n]` with a bootstrap over `clusters [n]`."""
    values = np.asarray(values, np.float64)
    return {**ClusterBootstrap(clusters, seed=seed).interval(values, by), "mean": float(values.mean())}


def spans(found: Iterable[Mapping], of: str = "mean") -> tuple[np.ndarray, np.ndarray]:
    """(values `[n]`, how far their intervals reach below and above them `[2, n]`) of statistics, for error bars."""
    every = list(found)
    value = np.array([x[of] for x in every], float)
    low, high = np.array([x["ci95"] for x in every], float).reshape(-1, 2).T
    return value, np.maximum([value - low, high - value], 0)


def ratio(above_: np.ndarray, below: np.ndarray, clusters: np.ndarray, by: str, seed: int = 0) -> dict:
    """Sum of one column over the sum of another `[n]`, with a bootstrap over `clusters [n]`."""
    draws = ClusterBootstrap(clusters, seed=seed)
    drawn = draws.mean(above_) / np.maximum(draws.mean(below), 1e-300)
    return {
        "statistic": f"ratio of sums; cluster bootstrap by {by}, percentile 95 % interval", "n": len(above_),
        "clusters": draws.clusters, "ratio": float(np.sum(above_) / max(float(np.sum(below)), 1e-300)),
        "ci95": np.percentile(drawn, [2.5, 97.5]).tolist(),
    }  # fmt: skip


def most_firing(lab: Lab, saes: Mapping[Site, SAE], atoms: int, tokens: int) -> dict[Site, int]:
    """{site: how often a feature must have the largest code on validation text to be among the `atoms` that have it
    most often}; at least 2. What is tested is thus chosen blind to the test."""
    text = [passage.tokens for passage in lab.text("validation", tokens)]
    name = "-".join(["counts", *sorted({sae.target for sae in saes.values()})])

    def count() -> dict[str, np.ndarray]:
        counts, _ = survey(lab.model, saes, text, lab.progress)
        kept = {site: int(np.sort(x)[-min(atoms, len(x))]) for site, x in counts.items()}
        return {"layer": np.array([site[0] for site in kept]), "head": np.array([site[1] for site in kept]),
                "least": np.array(list(kept.values()))}  # fmt: skip

    found = lab.unit(name, count)
    rows = zip(found["layer"].tolist(), found["head"].tolist(), found["least"].tolist(), strict=True)
    return {(layer, head): max(2, least) for layer, head, least in rows}


def replaced_text(lab: Lab) -> list[Passage]:
    """The test passages of `replaced`."""
    return lab.text("test", 40 * lab["firings"] + 2000)


def replaced(
    lab: Lab,
    saes: Mapping[Site, SAE],
    name: str,
    *,
    conditions: Sequence[str] = ("native", "atom", "delete", "codebook"),
    least: int = 2,
    tokens: int = 50_000,
) -> ReplacementResult:
    """The replacement test of `writesae replace` on the lab's texts, by the study's settings "firings", "each" and
    "horizon": features chosen on validation, codebook from train, firings on test. Kept under `name`, and resumed."""
    book = max(sae.F for sae in saes.values())
    return run_replacement(
        lab.model, None, saes, replaced_text(lab), select=lab.text("validation", tokens),
        train=lab.text("train", max(2 * book, 4000)), min_selected=least, firings=lab["firings"], each=lab["each"],
        horizon=lab["horizon"], natives=("increment",), scales=("coef", "matched"), conditions=list(conditions),
        seed=lab.seed, out=lab.place(name), progress=lab.progress, any_model=True,
    )  # fmt: skip


@torch.no_grad()
def states_at(lab: Lab, site: Site, passages: Sequence[Passage], passage: np.ndarray, position: np.ndarray) -> Tensor:
    """`[n, K, V]` states of a site after the tokens at (passage, position) `[n]`, on the CPU."""
    used, at = np.unique(passage, return_inverse=True)
    text = [passages[i].tokens for i in used]
    number = torch.from_numpy(np.cumsum([0, *map(len, text)])[at] + position)
    wanted, back = number.unique(return_inverse=True)
    out: list[tuple[Tensor, Tensor]] = []
    for found, _, here in stream(lab.model, [site], text, "states", lab.progress):
        places = torch.isin(here, wanted).nonzero()
        if len(places):
            states = found[site[0]].head(site[1]).states(places.to(found[site[0]].right.device))[:, 0]
            out.append((here[places[:, 0], places[:, 1]], states.float().cpu()))
    numbers, states = (torch.cat(x) for x in zip(*out, strict=True))
    return states[numbers.argsort()][back]


def features_of(table: Mapping[str, np.ndarray]) -> np.ndarray:
    """`[n]` numbers that tell features of several sites apart."""
    return (table["layer"].astype(np.int64) * 100_000 + table["head"]) * 10_000_000 + table["feature"]
