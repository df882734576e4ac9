"""How specific are a feature's firings to a token, to the one before, to the one after?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..experiments.codebook import codebook
from ..experiments.firing import native_writes
from ..experiments.statistics import need, proportion
from ..sae import SAE
from .lab import Lab, Site
from .measures import above, mean
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

# The token looked at, counted from the firing's own.
PLACES = {"token": 0, "previous": -1, "next": 1}


def run(lab: Lab) -> Findings:
    given = {"state": lab.saes, "write": lab.writes}
    if not any(given.values()):
        raise ValueError("saes: selectivity takes dictionaries of states or writes, got none")
    statistics: dict[str, Any] = {}
    parts, answers = [], []
    for target, every in given.items():
        saes = dict(list(every.items())[: lab["sites"] or None])
        claims = [claim for claim in STUDY.claims if claim.key.endswith(f".{target}")]
        if not saes:
            answers += [Answer(claim.key, "–", 0, "features", None, "not measured", "cannot be told",
                               f"no dictionary of {target}s was given") for claim in claims]  # fmt: skip
            continue
        books = _codebooks(lab, saes)
        table = _table(lab, saes, f"{target}s")
        null = _table(lab, books, f"{target}s-codebook")
        parts.append(
            {"target": np.full(len(table["feature"]), target, object), **table, "preferred": _text(lab, table)}
        )
        statistics[target] = {"dictionary": _summary(table, lab.seed), "codebook": _summary(null, lab.seed)}
        answers += _answers(claims, statistics[target])
    return Findings(statistics, {"features": join(parts)}, {"selectivity": _figure(join(parts))}, answers, [
        f"A feature counts with {lab['least']} firings on validation and as many on test text. Its preferred token is "
        "the most frequent one at its validation firings; shares are of its test firings.",
        "Null models: the exact permutation test, a feature's firings put on any of the test tokens (hypergeometric, "
        f"false discovery rate 5 %), and each passage's tokens moved round by {lab['shifts']} random distances, which "
        "keeps how firings and tokens come in bursts.",
    ])  # fmt: skip


def _codebooks(lab: Lab, saes: Mapping[Site, SAE]) -> dict[Site, SAE]:
    most = max(sae.F for sae in saes.values())
    text = [passage.tokens for passage in lab.text("train", max(2 * most, 4000))]
    books, _ = native_writes(lab.model, saes, text, lab.seed, lab.progress)
    return {site: codebook(sae, *books[site]).to(sae.mean.device) for site, sae in saes.items()}


def _table(lab: Lab, saes: Mapping[Site, SAE], what: str) -> dict[str, np.ndarray]:
    """A row a feature that fires often enough on both texts, at every site."""

    def make() -> dict[str, np.ndarray]:
        found = {split: _firings(lab, split, saes) for split in ("validation", "test")}
        shifts = _shifts(lab, found["test"][0].shape)
        return join([
            {"layer": np.full(len(rows["feature"]), site[0]), "head": np.full(len(rows["feature"]), site[1]), **rows}
            for site in saes
            for rows in [selective(found["validation"][0], found["validation"][1][site], found["test"][0],
                                   found["test"][1][site], lab["least"], shifts)]
            if len(rows["feature"])
        ] or [_nothing()])  # fmt: skip

    return lab.unit(what, make)


def _nothing():
    raise ValueError("least: expected features that fire that often on validation and test text, got none; lower it")


def _shifts(lab: Lab, shape: tuple[int, int]) -> np.ndarray:
    """`[shifts, passages]`: how far each passage's tokens are moved round."""
    return lab.rng("shifts").integers(8, max(shape[1] - 8, 9), (lab["shifts"], shape[0]))


def _firings(lab: Lab, split: str, saes: Mapping[Site, SAE]) -> tuple[np.ndarray, dict[Site, np.ndarray]]:
    """(tokens `[P, T]`, {site: `[n, 3]` passage, position and feature of every firing})."""
    ids = lab.whole(split, lab["passages"])
    parts: dict[Site, list[np.ndarray]] = {site: [] for site in saes}
    for reading in lab.read(ids, saes):
        fired = reading.firings
        for layer, head in saes:
            mine = fired[(fired.layer == layer) & (fired.head == head)]
            columns = mine.row.long() + reading.first, mine.position.long(), mine.feature.long()
            parts[layer, head].append(np.stack([x.cpu().numpy() for x in columns], 1))
    return ids.numpy(), {site: np.concatenate(some) for site, some in parts.items()}


def selective(
    ids: np.ndarray, chosen_on: np.ndarray, test_ids: np.ndarray, fired: np.ndarray, least: int, shifts: np.ndarray
) -> dict[str, np.ndarray]:
    """Of every feature with enough firings: its preferred token at each place, and how that does on the test text.

    Args:
        ids, test_ids: `[P, T]` tokens on which the preferred token is chosen, and on which it is tested.
        chosen_on, fired: `[n, 3]` passage, position and feature of the firings there.
        least: firings a feature needs in both.
        shifts: `[S, P]` distances of the moved-round null model.
    Returns:
        feature, firings `[m]`, and for each of `PLACES`: `<place>_id` (the preferred token), `_share` (of the test
        firings), `_base` (of all tokens), `_shifted` (its share with tokens moved round), `_p` and `_q`
        (one-sided exact permutation test, and as a false discovery rate).
    """
    T = ids.shape[1]
    inside = [x[(x[:, 1] > 0) & (x[:, 1] < T - 1)] for x in (chosen_on, fired)]
    features = [np.unique(x[:, 2], return_counts=True) for x in inside]
    one, other = (labels[counts >= least] for labels, counts in features)
    kept = np.intersect1d(one, other)
    seen, test = (x[np.isin(x[:, 2], kept)] for x in inside)
    index, at = np.searchsorted(kept, seen[:, 2]), np.searchsorted(kept, test[:, 2])
    n = np.bincount(at, minlength=len(kept))
    out = {"feature": kept, "firings": n}
    for place, offset in PLACES.items():
        best = _modes(index, ids[seen[:, 0], seen[:, 1] + offset], len(kept))
        tokens = test_ids[test[:, 0], test[:, 1] + offset]
        hit = np.bincount(at, tokens == best[at], len(kept))
        everywhere = test_ids[:, 1 + offset : T - 1 + offset]
        labels, counts = np.unique(everywhere, return_counts=True)
        of = dict(zip(labels.tolist(), counts.tolist(), strict=True))
        base = np.array([of.get(token, 0) for token in best.tolist()])
        moved = np.zeros(len(kept))
        for shift in shifts:
            there = (test[:, 1] + offset + shift[test[:, 0]]) % T
            moved += np.bincount(at, test_ids[test[:, 0], there] == best[at], len(kept)) / n
        p = need("scipy.stats").hypergeom.sf(hit - 1, everywhere.size, base, n)
        q = need("statsmodels.stats.multitest").multipletests(p, method="fdr_bh")[1] if len(p) else p
        found = {"id": best, "share": hit / n, "base": base / everywhere.size, "shifted": moved / len(shifts),
                 "p": p, "q": q}  # fmt: skip
        out |= {f"{place}_{name}": column for name, column in found.items()}
    return out


def _modes(group: np.ndarray, value: np.ndarray, groups: int) -> np.ndarray:
    """`[groups]` most frequent value of each group, the smallest of equals."""
    pairs, counts = np.unique(np.stack([group, value], 1), axis=0, return_counts=True)
    order = np.lexsort((-pairs[:, 1], counts, pairs[:, 0]))  # the last of each group is its most frequent
    last = np.searchsorted(pairs[order, 0], np.arange(groups), side="right") - 1
    return pairs[order[last], 1] if len(pairs) else np.zeros(0, np.int64)


def _text(lab: Lab, table: Mapping[str, np.ndarray]) -> np.ndarray:
    known = {token: lab.tokenizer.decode([token]) for token in np.unique(table["token_id"]).tolist()}
    out = np.empty(len(table["token_id"]), object)
    out[:] = [known[token] for token in table["token_id"].tolist()]
    return out


def _summary(table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    feature = np.arange(len(table["feature"]))
    out: dict[str, Any] = {"features": len(feature)}
    for place in PLACES:
        share, shifted = table[f"{place}_share"], table[f"{place}_shifted"]
        out[place] = {
            "share": mean(share, feature, "feature", seed), "median": float(np.median(share)),
            "shifted": mean(shifted, feature, "feature", seed),
            "above": mean(share - shifted, feature, "feature", seed),
            "significant": proportion(table[f"{place}_q"] < 0.05, "features above chance, false discovery rate 5 %"),
        }  # fmt: skip
    return out


def _answers(claims: list[Claim], found: dict) -> list[Answer]:
    own, book = found["dictionary"], found["codebook"]
    answers = []
    for claim, place in zip(claims, ("token", "next"), strict=True):
        x, gain = own[place], own[place]["above"]
        answers.append(Answer(
            claim.key, f"{100 * x['share']['mean']:.1f} %, {100 * gain['mean']:+.1f} over the null model", gain["n"],
            "features", (100 * gain["ci95"][0], 100 * gain["ci95"][1]),
            f"tokens moved round: {100 * x['shifted']['mean']:.1f} %; features of a codebook of native writes: "
            f"{100 * book[place]['share']['mean']:.1f} %", above(gain["ci95"], 0),
        ))  # fmt: skip
    return answers


def _figure(table: dict) -> Figure:
    def paint(axes, colours):
        for i, place in enumerate(PLACES):
            for name, colour, offset in (("share", "atom", -0.15), ("shifted", "random", 0.15)):
                low, first, middle, third, high = np.percentile(table[f"{place}_{name}"], [5, 25, 50, 75, 95])
                label = {"share": "features", "shifted": "tokens moved round"}[name] if i == 0 else None
                axes.plot([i + offset] * 2, [low, high], color=colours[colour], lw=1)
                axes.plot([i + offset] * 2, [first, third], color=colours[colour], lw=5, label=label)
                axes.plot(i + offset, middle, "o", ms=6, color=colours["native"])
        axes.set_xticks(range(len(PLACES)), ["the token itself", "the one before", "the one after"])
        axes.set(ylabel="share of firings at the preferred token", ylim=(-0.02, 1.02), xlim=(-0.6, 2.6))
        axes.legend()

    return Figure(paint, "How many of a feature's firings on test text are at the token it preferred on validation "
                  "text: median (dot), quartiles (bar) and 5 to 95 % (line) over features.")  # fmt: skip


STUDY = Study(
    "selectivity", "What features fire at",
    "For every feature, the share of its firings at one preferred token, chosen on other text, and the same for the "
    "token before and after, beside what chance gives and what features of a codebook of native writes do.",
    (
        Claim("selectivity.token.state", "A feature of states fires at a preferred token more often than chance.", "–",
              "its sources show a table of hand-picked features"),
        Claim("selectivity.next.state", "And before a preferred token.", "–",
              "its sources show a table of hand-picked features"),
        Claim("selectivity.token.write", "A feature of writes fires at a preferred token more often than chance.", "–",
              "its sources train dictionaries of states only"),
        Claim("selectivity.next.write", "And before a preferred token.", "–",
              "its sources train dictionaries of states only"),
    ),
    {
        "sites": Setting(0, 1, "dictionaries looked at of each kind, the first ones; 0 is all"),
        "passages": Setting(300, 8, "passages of validation text, and of test text"),
        "least": Setting(20, 5, "firings a feature needs on each"),
        "shifts": Setting(20, 5, "random distances of the moved-round null model"),
    },
    run,
    needs="",
)  # fmt: skip
