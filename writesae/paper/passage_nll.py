"""What deleting a set of features costs over whole passages, in bits a token, beside random writes in their place.

At every test token where one of the set has the largest code, the native write is deleted; or a random write of the
same norm stands in its place; or as many writes are deleted where none of the set does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..edits import Edits
from ..sae import SAE
from . import forks
from .lab import Lab, Site
from .measures import above, mean
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

ARMS = ("delete", "random", "elsewhere")


def run(lab: Lab) -> Findings:
    given = forks.all_sites(lab)
    parts = lab.units(given, lambda name: _site(lab, *given[name]), "passages")
    table = join([{"site": np.full(len(x["row"]), i), **x} for i, x in enumerate(parts)])
    statistics: dict[str, Any] = {
        "of": "change of loss, bits a token, over whole test passages", "features": lab["features"],
        "sites": {name: _statistics(part, lab.seed) for name, part in zip(given, parts, strict=True)},
        "all": _statistics(table, lab.seed),
    }  # fmt: skip
    return Findings(statistics, {"passages": table}, _figures(statistics), _answers(statistics), [
        "The features of a set are those with the largest code most often in validation text.",
        "Writes go after their token has read the state. Norms are of the clean pass, which later ones need not keep.",
        "Of a dictionary at a time: the sets of several heads are not deleted together.",
    ])  # fmt: skip


def _site(lab: Lab, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    layer, head = site
    validation, ids = (lab.whole(split, lab["passages"]) for split in ("validation", "test"))
    counts = np.bincount(forks.top_table(lab, validation, site, sae)["feature"], minlength=sae.F)
    chosen = np.argsort(-counts, kind="stable")[: lab["features"]]
    table = forks.top_table(lab, ids, site, sae)
    fires = np.zeros(tuple(ids.shape), bool)
    mine = forks.some(table, np.isin(table["feature"], chosen[counts[chosen] > 0]))
    fires[mine["row"], mine["position"]] = True
    rng = lab.rng("passages", *site, sae.target)
    elsewhere = np.zeros_like(fires)
    for row in range(len(ids)):
        free = np.flatnonzero(~fires[row])
        elsewhere[row, rng.permutation(free)[: fires[row].sum()]] = True
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def deleted(where: np.ndarray):
        def plan(first: int, writes) -> dict[int, Edits]:
            row, position = np.nonzero(where[first : first + len(writes[layer].right)])
            return {layer: Edits.delete(row.tolist(), position.tolist(), head, sae.K, sae.V, when="after")}

        return plan

    def random(first: int, writes) -> dict[int, Edits]:
        row, position = np.nonzero(fires[first : first + len(writes[layer].right)])
        left, right = writes[layer].native(torch.from_numpy(row), torch.from_numpy(position), head)
        size = (left.norm(dim=1, keepdim=True) * right.norm(dim=1, keepdim=True)).float().cpu()
        p, q = (torch.nn.functional.normalize(torch.randn(len(row), n, generator=generator), dim=1)
                for n in (sae.K, sae.V))  # fmt: skip
        return {layer: Edits.replace(row.tolist(), position.tolist(), head, size * p, q, when="after")}

    keep = np.flatnonzero(fires.any(1) & elsewhere.any(1))
    if not len(keep):
        raise ValueError(f"saes: expected features of {site} that fire on the test text, and not at every token")
    fires, elsewhere = fires[keep], elsewhere[keep]
    plans = {"delete": deleted(fires), "random": random, "elsewhere": deleted(elsewhere)}
    loss = forks.edited_losses(lab, ids[torch.from_numpy(keep)], [site], plans)
    bits = {name: (x - loss["plain"]).mean(1) / np.log(2) for name, x in loss.items()}
    return {"row": keep, "edited": fires.sum(1), "plain": loss["plain"].mean(1) / np.log(2),
            **{name: bits[name] for name in ARMS}}  # fmt: skip


def _statistics(table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    return {
        "edited_tokens": int(table["edited"].sum()),
        **{name: mean(table[name], table["row"], "passage", seed) for name in ARMS},
        "delete_less_random": mean(table["delete"] - table["random"], table["row"], "passage", seed),
        "delete_less_elsewhere": mean(table["delete"] - table["elsewhere"], table["row"], "passage", seed),
    }  # fmt: skip


def _answers(statistics: dict[str, Any]) -> list[Answer]:
    every = statistics["all"]
    found, null, other = (every[name] for name in ARMS)
    low, high = every["delete_less_random"]["ci95"]
    return [
        Answer(
            "passage_nll.cost", f"{found['mean']:+.5f} bits a token, {every['delete_less_random']['mean']:+.5f} less "
            "than random writes", found["n"], "passages of a dictionary each", (low, high),
            f"random writes of the same norm {null['mean']:+.5f}, as many deletions elsewhere {other['mean']:+.5f} "
            "bits a token", above((-high, -low), 0),
        )
    ]  # fmt: skip


def _figures(statistics: dict[str, Any]) -> dict[str, Figure]:
    looks = {"delete": ("delete", "deleted where they fire"), "random": ("random", "a random write of the same norm"),
             "elsewhere": ("previous", "as many deleted elsewhere")}  # fmt: skip
    sites = {**statistics["sites"], "all": statistics["all"]}

    def paint(axes, colours):
        for j, (name, (colour, label)) in enumerate(looks.items()):
            for i, part in enumerate(sites.values()):
                low, high = part[name]["ci95"]
                axes.plot([low, high], [i + 0.22 * (j - 1)] * 2, color=colours[colour], lw=1.5)
                axes.plot([part[name]["mean"]], [i + 0.22 * (j - 1)], "o", ms=4, color=colours[colour],
                          label=label if not i else None)  # fmt: skip
        axes.axvline(0, color=colours["line"], lw=0.8)
        axes.set_yticks(range(len(sites)), list(sites))
        axes.set(xlabel="change of loss, bits a token", ylim=(len(sites) - 0.5, -1.6))
        axes.legend(fontsize=7.5, loc="upper right")

    return {"cost": Figure(paint, "Change of loss over whole passages when the writes of a set of features are "
                           "deleted, beside the two nulls; 95 % intervals over passages.")}  # fmt: skip


STUDY = Study(
    "passage_nll", "What a set of features is worth over passages",
    "Deletes the write wherever one of a set of features has the largest code, over whole passages, and compares the "
    "loss with random writes of the same norm in their place and with as many deletions elsewhere.",
    (
        Claim("passage_nll.cost", "Deleting a set of features costs less than random writes of their norm.",
              "+0.005 against +0.226 bits a token", "other model and set; its sources do not say how it is chosen"),
    ),
    {
        "passages": Setting(96, 8, "passages of validation and of test text"),
        "features": Setting(32, 32, "features of a set, the most frequent in validation text"),
    },
    run,
    needs="",
)  # fmt: skip
