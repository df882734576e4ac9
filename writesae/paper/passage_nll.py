"""Writes deleted at every firing of a set of features: what does a passage lose?"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..edits import Edits
from ..models.attach import attach
from ..sae import SAE
from .frequent import frequent
from .lab import Lab, Reading, Site
from .losses import token_losses
from .measures import above, mean, spans, unmeasured
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

CONDITIONS = ("delete", "random", "elsewhere")


def run(lab: Lab) -> Findings:
    given = {target: saes for target, saes in (("state", lab.saes), ("write", lab.writes)) if saes}
    if not given:
        raise ValueError("saes: passage_nll takes dictionaries of states or writes, got none")
    ids = lab.whole("test", lab["passages"], lab["context"])
    parts = []
    for target, saes in given.items():
        chosen = frequent(lab, saes, lab["select"], lab["context"], lab["features"], lab["most"])

        def make(first: int, saes=saes, chosen=chosen) -> dict[str, np.ndarray]:
            (reading,) = lab.read(ids[first : first + lab["batch"]], saes, lab["batch"])
            return _batch(lab, reading, first, saes, chosen)

        one = join(lab.units(range(0, len(ids), lab["batch"]), make, target))
        if one:
            parts.append({"target": np.full(len(one["layer"]), target, object), **one})
    table = join(parts) if parts else {}
    if not table:
        why = "none of the chosen features fired on the test text"
        return Findings({}, answers=[unmeasured(claim, why, "passages and heads") for claim in STUDY.claims])
    statistics: dict[str, Any] = {"all": bits(table, lab.seed), "sites": {}}
    for target, saes in given.items():
        for layer, head in saes:
            mine = (table["target"] == target) & (table["layer"] == layer) & (table["head"] == head)
            if mine.any():
                one = {name: column[mine] for name, column in table.items()}
                statistics["sites"][f"{target} {layer}:{head}"] = bits(one, lab.seed)
    return Findings(statistics, {"passages": table}, _figures(statistics), _answers(statistics["all"]), [
        f"A set is the {lab['features']} features of a head that fire most often on validation text, of those that "
        f"fire at no more than {100 * lab['most']:g} % of its tokens. Passages without a firing of it are left out.",
        "Bits are a mean over all tokens of a passage. Random writes have, at every place, the norm of the write that "
        "they replace; elsewhere deletes as many writes of the same head and passage where none of the set fires.",
    ])  # fmt: skip


def _batch(
    lab: Lab, reading: Reading, first: int, saes: Mapping[Site, SAE], chosen: Mapping[Site, np.ndarray]
) -> dict[str, np.ndarray]:
    """A row for every passage and head with a firing: places, and mean losses in nats."""
    plain = token_losses(reading.logits, reading.ids).mean(1)
    fired, out = reading.firings, []
    for (layer, head), sae in saes.items():
        mine = (fired.layer == layer) & (fired.head == head)
        mine &= torch.isin(fired.feature.cpu(), torch.from_numpy(chosen[layer, head]).long()).to(mine.device)
        places = torch.unique(torch.stack([fired.row[mine], fired.position[mine]], 1).long().cpu(), dim=0)
        if not len(places):
            continue
        row, position = places.T
        rng = torch.Generator().manual_seed(int(lab.rng("writes", layer, head, first).integers(2**62)))
        edits = planned(reading, layer, head, row, position, (sae.K, sae.V), rng)
        loss = {name: _edited(lab, reading.ids, layer, edit).mean(1) for name, edit in edits.items()}
        rows = torch.unique(row).numpy()
        n = len(rows)
        out.append({
            "layer": np.full(n, layer), "head": np.full(n, head), "passage": first + rows,
            "places": np.bincount(row.numpy(), minlength=len(plain))[rows], "plain": plain[rows],
            **{name: x[rows] for name, x in loss.items()},
        })  # fmt: skip
    return join(out) if out else {}


def planned(
    reading: Reading, layer: int, head: int, row: Tensor, position: Tensor, size: tuple[int, int],
    rng: torch.Generator,
) -> dict[str, Edits]:  # fmt: skip
    """{condition: edits} at places `row [n]`, `position [n]` of one head: see the study's notes."""
    left, right = (x.float().cpu() for x in reading.writes[layer].native(row, position, head))
    norm = left.norm(dim=-1) * right.norm(dim=-1)
    p, q = (normalize(torch.randn(x.shape, generator=rng), dim=-1) for x in (left, right))
    B, T = reading.ids.shape
    taken = torch.zeros(B, T, dtype=torch.bool)
    taken[row, position] = True
    # As many other places of each row, or all there are.
    score = torch.rand(B, T, generator=rng).masked_fill(taken, 2.0)
    order = score.argsort(1).argsort(1)
    others = ((order < taken.sum(1, keepdim=True)) & ~taken).nonzero()
    return {
        "delete": Edits.delete(row, position, head, *size),
        "random": Edits.replace(row, position, head, norm[:, None] * p, q),
        "elsewhere": Edits.delete(others[:, 0], others[:, 1], head, *size),
    }


@torch.no_grad()
def _edited(lab: Lab, ids: Tensor, layer: int, edits: Edits) -> np.ndarray:
    with attach(lab.model, {}, edits={layer: edits}, self_test=False):
        return token_losses(lab.model(input_ids=ids, use_cache=False).logits, ids)


def bits(table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Mean change of a passage's loss in bits a token, by condition, and the two differences that claims are about."""
    change = {name: (table[name] - table["plain"]) / log(2) for name in CONDITIONS}
    change["random_over_delete"] = change["random"] - change["delete"]
    change["delete_over_elsewhere"] = change["delete"] - change["elsewhere"]
    share = {"places": int(table["places"].sum()), "passages_and_heads": len(table["places"])}
    return share | {name: mean(x, table["passage"], "passage", seed) for name, x in change.items()}


def _answers(found: dict[str, Any]) -> list[Answer]:
    own, random, elsewhere = (found[name]["mean"] for name in CONDITIONS)
    out = []
    for claim, name in zip(STUDY.claims, ("random_over_delete", "delete_over_elsewhere"), strict=True):
        one = found[name]
        out.append(Answer(
            claim.key, f"{one['mean']:+.5f} bits a token (deleted {own:+.5f}, random {random:+.5f})", one["n"],
            "passages and heads", tuple(one["ci95"]),
            f"random writes {random:+.5f} bits a token, as many other writes deleted {elsewhere:+.5f}",
            above(one["ci95"], 0),
        ))  # fmt: skip
    return out


def _figures(statistics: dict[str, Any]) -> dict[str, Figure]:
    sites = list(statistics["sites"])

    def paint(axes, colours):
        at = np.arange(len(sites))
        for shift, name, colour in ((-0.2, "delete", "delete"), (0, "random", "random"), (0.2, "elsewhere", "line")):
            found = [statistics["sites"][site][name] for site in sites]
            value, error = spans(found)
            label = {"delete": "deleted", "random": "random in its place", "elsewhere": "others deleted"}[name]
            axes.errorbar(at + shift, value, yerr=error, fmt="o", ms=4, color=colours[colour], label=label)
        axes.axhline(0, color=colours["line"], lw=0.9)
        axes.set(ylabel="bits a token more than plain", xlim=(-0.6, len(sites) - 0.4))
        axes.set_xticks(at, sites, rotation=30, ha="right")
        axes.legend()

    return {"bits": Figure(paint, "What passages lose when the writes at every firing of a set of features are "
                           "deleted, replaced by random ones of their norm, or as many others deleted; 95 % intervals "
                           "over passages.")}  # fmt: skip


STUDY = Study(
    "passage_nll", "Deleting at every firing",
    "At every token where one of a set of features fires, the head's write is deleted. How many bits a token does the "
    "passage lose, beside random writes of the same norm in their place and beside deletion of as many other writes?",
    (
        Claim("passage_nll.random", "Deleted writes cost a passage less than random writes of their norm.",
              "+0.005 against +0.226 bits a token",
              "sets of features by a rule and not by hand; its sources do not say how often theirs fire"),
        Claim("passage_nll.elsewhere", "Deleting at a set's firings costs more than deleting as many other writes of "
              "the head.", "–", "its sources test against no other deletion"),
    ),
    {
        "passages": Setting(200, 12, "passages of test text"),
        "context": Setting(256, 128, "tokens a passage"),
        "select": Setting(200, 16, "passages of validation text on which features are chosen"),
        "features": Setting(16, 16, "features of a set"),
        "most": Setting(0.05, 0.05, "share of tokens at which a chosen feature may fire at most"),
        "batch": Setting(16, 12, "passages at a time"),
    },
    run,
    needs="",
)  # fmt: skip
