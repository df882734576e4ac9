"""The replacement test atom by atom: how does an average atom do, rather than an average firing?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..experiments import statistics as st
from .lab import Lab
from .measures import above, features_of, most_firing, percent, replaced, unmeasured
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

_COLUMNS = ("layer", "head", "feature", "passage", "position", "activation", "cosine")


def run(lab: Lab) -> Findings:
    given = {"state": lab.saes, "write": lab.writes}
    if not any(given.values()):
        raise ValueError("saes: population takes dictionaries of states or writes, got none")
    statistics: dict[str, Any] = {}
    tables, notes, answers = {}, [], []
    for target, saes in given.items():
        if not saes:
            answers += [unmeasured(claim, f"no dictionary of {target}s was given") for claim in _of(target)]
            continue
        least = most_firing(lab, saes, lab["atoms"], lab["tokens"])
        found = []
        for (layer, head), sae in saes.items():
            at = least[layer, head]
            result = replaced(lab, {(layer, head): sae}, f"{target}-{layer}-{head}", least=at, tokens=lab["tokens"])
            kl = {c: result.kl("increment", c, "coef") for c in ("atom", "delete", "codebook")}
            found.append({name: result.table[name] for name in _COLUMNS} | kl)
        table = join(found)
        statistics[target] = _site(table)
        statistics[target]["sites"] = {
            f"{layer}:{head}": _site(one) for (layer, head), one in zip(saes, found, strict=True)
        }
        tables[target], (first, second) = table, _of(target)
        answers += [_answer(first.key, statistics[target]), _against_codebook(second.key, statistics[target])]
    notes.append(
        f"Tested are, at every site, the {lab['atoms']} atoms that most often have the largest code on validation "
        f"text; an atom counts with {st.MIN_FIRINGS} firings or more, of which {st.MAX_FIRINGS} are used."
    )
    return Findings(statistics, tables, _figures(statistics), answers, notes)


def _of(target: str) -> list[Claim]:
    return [claim for claim in STUDY.claims if claim.key.endswith(f".{target}")]


def _site(table: dict[str, np.ndarray]) -> dict[str, Any]:
    feature = features_of(table)
    return {
        "firings": len(feature),
        "atom_against_delete": st.population(table["atom"], table["delete"], feature),
        "codebook_against_delete": st.population(table["codebook"], table["delete"], feature),
        "atom_against_codebook": st.population(table["atom"], table["codebook"], feature),
        "pooled": st.win_rate(table["atom"], table["delete"]),
    }


def _mean(found: dict) -> str:
    return "–" if found["mean"] is None else f"{100 * found['mean']:.1f} %"


def _answer(key: str, found: dict) -> Answer:
    own, null = found["atom_against_delete"], found["codebook_against_delete"]
    return Answer(
        key, _mean(own), own["n"], "atoms", own["mean_ci95"] and percent(own["mean_ci95"]),
        f"a native write of other text in the atom's place beats deletion at {_mean(null)} of an atom's firings",
        above(own["mean_ci95"], 0.5), "fewer than two atoms fired often enough",
    )  # fmt: skip


def _against_codebook(key: str, found: dict) -> Answer:
    own = found["atom_against_codebook"]
    return Answer(
        key, _mean(own), own["n"], "atoms", own["mean_ci95"] and percent(own["mean_ci95"]),
        "50 % is what an atom no better than the codebook's best write would reach",
        above(own["mean_ci95"], 0.5), "fewer than two atoms fired often enough",
    )  # fmt: skip


def _figures(statistics: dict) -> dict[str, Figure]:
    def paint(axes, colours):
        bins = np.linspace(0, 1, 21)
        styles = {"state": ("atom", "solid"), "write": ("delete", "solid")}
        for target, (colour, line) in styles.items():
            found = statistics.get(target, {}).get("atom_against_delete", {})
            if found.get("win_rates"):
                axes.hist(found["win_rates"], bins, histtype="step", lw=1.6, ls=line, color=colours[colour],
                          label=f"atoms of {target}s ({found['n']})")  # fmt: skip
        axes.axvline(0.5, color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set(xlabel="share of an atom's firings at which it beats deletion", ylabel="atoms", xlim=(0, 1))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left")

    return {"population": Figure(paint, "Win rate of every atom over its own firings. To the right of the dashed line "
                                 "an atom disturbs less than deletion at most of its firings.")}  # fmt: skip


STUDY = Study(
    "population", "Atom by atom",
    "Frequent atoms speak loudest in a win rate over firings. Here every atom has one voice: its own win rate against "
    "deleting the write, averaged over atoms, with the share of atoms that win most of their firings.",
    (
        Claim("population.deletion.state", "An average atom of a dictionary of states disturbs less than deletion.",
              "89.8 % of 87 atoms", "atoms are the most frequent ones of a rule, not picked by hand"),
        Claim("population.codebook.state", "It disturbs less than the best of as many native writes.", "–",
              "its sources test against no codebook"),
        Claim("population.deletion.write", "An average atom of a dictionary of writes disturbs less than deletion.",
              "–", "its sources train dictionaries of states only"),
        Claim("population.codebook.write", "It disturbs less than the best of as many native writes.", "–",
              "its sources train dictionaries of states only"),
    ),
    {
        "atoms": Setting(100, 10, "atoms tested a site: those that most often have the largest code on validation"),
        "firings": Setting(2000, 80, "firings tested a site"),
        "each": Setting(16, 8, "firings tested a passage at most"),
        "horizon": Setting(8, 2, "tokens followed after the edit"),
        "tokens": Setting(100_000, 5000, "tokens of validation text on which atoms are chosen"),
    },
    run,
    needs="",
)  # fmt: skip
