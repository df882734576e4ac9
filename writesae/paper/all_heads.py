"""Every head of a layer: is a good head the rule or the exception?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..experiments import statistics as st
from ..models.sites import layers
from .lab import Lab
from .measures import above, mean, percent, replaced, spans
from .study import Answer, Claim, Figure, Findings, Setting, Study, join
from .trained import config, held, trained

_KINDS = {"state": {"kind": "bilinear"}, "write": {"kind": "bilinear_tied", "sparsity": "pursuit", "target": "write"}}


def run(lab: Lab) -> Findings:
    layer = _layer(lab)
    heads = {site.layer_index: site.num_v_heads for site in layers(lab.model)}[layer]
    sites = [(layer, head) for head in range(heads)]
    writes = held(lab, "train", lab["passages"], sites)
    statistics: dict[str, Any] = {"layer": layer}
    tables, answers = {}, []
    for target, kind in _KINDS.items():
        saes = {site: trained(lab, site, config(lab, **kind), writes[site]) for site in sites}
        result = replaced(lab, saes, target, least=2, tokens=lab["tokens"])
        kl = {c: result.kl("increment", c, "coef") for c in ("atom", "delete", "codebook")}
        table = {name: result.table[name] for name in ("layer", "head", "feature", "passage", "position")} | kl
        tables[target] = table
        found = _heads(table, lab.seed)
        statistics[target] = found
        null = found["codebook_against_delete"]
        for claim in STUDY.claims:
            if claim.key.endswith(f".{target}"):
                own = found["atom_against_" + claim.key.split(".")[1]]
                sd = "" if own["sd"] is None else f" ± {100 * own['sd']:.1f}"
                answers.append(Answer(
                    claim.key, f"{100 * own['mean']:.1f}{sd} %", own["n"], "heads", percent(own["ci95"]),
                    f"native writes of other text in the atom's place beat deletion at {100 * null['mean']:.1f} %",
                    above(own["ci95"], 0.5),
                ))  # fmt: skip
    return Findings(statistics, {"firings": join([
        {"target": np.full(len(t["head"]), target, object), **t} for target, t in tables.items()
    ])}, {"heads": _figure(statistics)}, answers, [
        f"Every head of layer {layer} has dictionaries trained here, all by the same settings, on train text; "
        "dictionaries that were given are not used, since they do not cover the layer.",
    ])  # fmt: skip


def _layer(lab: Lab) -> int:
    known = [site.layer_index for site in layers(lab.model)]
    if lab["layer"] < 0:
        given = [*lab.saes, *lab.writes]
        return given[0][0] if given else known[len(known) // 2]
    if lab["layer"] not in known:
        raise ValueError(f"layer: expected one of {known}, or -1, got {lab['layer']}")
    return lab["layer"]


def _heads(table: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Of each pair compared: the win rate of every head, their mean and spread, with a bootstrap over heads."""
    out: dict[str, Any] = {"firings": len(table["head"])}
    for one, other in (("atom", "delete"), ("codebook", "delete"), ("atom", "codebook")):
        by = {}
        for head in np.unique(table["head"]):
            mine = table["head"] == head
            by[int(head)] = st.win_rate(table[one][mine], table[other][mine])
        rates = np.array([won["rate"] for won in by.values()])
        name = f"{one}_against_{'codebook' if other == 'codebook' else 'delete'}"
        out[name] = {
            **mean(rates, np.arange(len(rates)), "head", seed),
            "sd": float(rates.std(ddof=1)) if len(rates) > 1 else None,
            "heads": {str(head): {x: won[x] for x in ("n", "rate", "ci95")} for head, won in by.items()},
        }
    return out


def _figure(statistics: dict) -> Figure:
    def paint(axes, colours):
        arms = [(t, kind) for t in ("state", "write") for kind in ("atom", "codebook")]
        for offset, (target, kind) in zip((-0.24, -0.08, 0.08, 0.24), arms, strict=True):
            by = statistics[target][f"{kind}_against_delete"]["heads"]
            rate, spread = spans(by.values(), "rate")
            shade = "random" if kind == "codebook" else "atom" if target == "state" else "delete"
            axes.errorbar(np.array([int(head) for head in by]) + offset, rate, spread, ms=5, lw=1, color=colours[shade],
                          fmt="o" if target == "state" else "s", mfc="none" if kind == "codebook" else None,
                          label=f"{target}s: {kind}")  # fmt: skip
        axes.axhline(0.5, color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set(xlabel="head", ylabel="share of firings that beat deletion", ylim=(0, 1.2))
        axes.set_xticks(sorted(int(head) for head in statistics["state"]["atom_against_delete"]["heads"]))
        axes.legend(fontsize=7, ncols=4, loc="upper center", columnspacing=1)

    return Figure(paint, "Win rate against deletion at every head of the layer, of atoms and of native writes of other "
                  "text, with Wilson intervals.")  # fmt: skip


STUDY = Study(
    "all_heads", "Every head of a layer",
    "The same dictionary is trained at every head of a layer, and every head is tested: mean and spread over heads, "
    "so that one good head does not stand for the others.",
    (
        Claim("all_heads.delete.state", "At an average head of a layer, atoms of states disturb less than deletion.",
              "89.3 ± 2.6 % (15 heads of layer 9)", "small dictionaries, trained within the study"),
        Claim("all_heads.codebook.state", "There they disturb less than the best of as many native writes.", "–",
              "its sources test against no codebook"),
        Claim("all_heads.delete.write", "At an average head of a layer, atoms of writes disturb less than deletion.",
              "–", "its sources train dictionaries of states only"),
        Claim("all_heads.codebook.write", "There they disturb less than the best of as many native writes.", "–",
              "its sources train dictionaries of states only"),
    ),
    {
        "layer": Setting(-1, -1, "layer whose heads are tested; -1 is that of the first dictionary given"),
        "passages": Setting(256, 24, "passages of train text"),
        "F": Setting(1024, 96, "atoms of a dictionary"),
        "k": Setting(8, 4, "atoms active at once"),
        "steps": Setting(3000, 60, "steps of training"),
        "firings": Setting(500, 40, "firings tested a head"),
        "each": Setting(8, 4, "firings tested a passage and head at most"),
        "horizon": Setting(8, 2, "tokens followed after the edit"),
        "tokens": Setting(20_000, 3000, "tokens of validation text on which atoms are chosen"),
    },
    run,
    needs="",
)  # fmt: skip
