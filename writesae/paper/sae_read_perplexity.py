"""Perplexity with every read of a head's state going through its reconstruction, the state itself left as it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..experiments.codebook import codebook
from ..experiments.recovered import passage_losses
from ..experiments.recovered_rule import deleted, loop_rule, read_rule
from ..models.hf_gated_delta import RuleHandler
from ..sae import SAE
from ..sae.stream import Passages
from . import forks
from .lab import Lab, Site
from .measures import above, mean, ratio
from .state_replacement_perplexity import untrained
from .study import Answer, Claim, Figure, Findings, Setting, Study

ARMS = ("reconstruction", "codebook", "mean", "zero")


def run(lab: Lab) -> Findings:
    for layer, _ in lab.saes:
        binding = forks.layer_of(lab.model, layer).binding
        if binding.rule.name != "gated_delta_rule" or binding.gate != "scalar":
            raise ValueError(
                "model: expected layers on the gated delta rule with a scalar gate, whose reads can go through a "
                f"reconstruction; layer {layer} runs the {binding.name}"
            )
    groups = {f"{layer}:{head}": [(layer, head)] for layer, head in lab.saes}
    if len(lab.saes) > 1:
        groups["all"] = list(lab.saes)
    ids = lab.whole("test", lab["passages"])
    runs = ["plain", *(f"{name} {arm}" for name in groups for arm in ARMS)]
    books: dict[Site, SAE] = {}

    def losses(key: str) -> dict[str, np.ndarray]:
        name, _, arm = key.partition(" ")
        if arm == "codebook" and not books:
            books.update(untrained(lab))
        rules = {} if key == "plain" else _rules(lab, groups[name], arm, books)
        return {"loss": passage_losses(lab.model, Passages(ids), rules, 16) / (ids.shape[1] - 1)}

    loss = {key: x["loss"] for key, x in zip(runs, lab.units(runs, losses, "read"), strict=True)}
    rows = np.arange(len(ids))
    statistics: dict[str, Any] = {
        "tokens": int(ids.numel()), "plain": {**mean(loss["plain"], rows, "passage", lab.seed),
                                              "perplexity": float(np.exp(loss["plain"].mean()))}, "groups": {},
    }  # fmt: skip
    for name in groups:
        zero = loss[f"{name} zero"]
        statistics["groups"][name] = {
            arm: {
                "perplexity": float(np.exp(loss[f"{name} {arm}"].mean())),
                "more_loss": mean(loss[f"{name} {arm}"] - loss["plain"], rows, "passage", lab.seed),
                "recovered": ratio(zero - loss[f"{name} {arm}"], zero - loss["plain"], rows, "passage", lab.seed),
                "less_than_reconstruction": mean(
                    loss[f"{name} reconstruction"] - loss[f"{name} {arm}"], rows, "passage", lab.seed
                ),
            }
            for arm in ARMS
        }
    columns = {key.replace(" ", "_").replace(":", "h"): column for key, column in loss.items()}
    main = "all" if "all" in groups else next(iter(groups))
    return Findings(
        statistics, {"passages": {"passage": rows, **columns}}, {"loss": _figure(statistics["groups"])},
        _answers(statistics, main), [
            "recovered: share of the loss between reading nothing (zero) and the model as it is.",
            "States evolve as they do without: what is read through the reconstruction never comes back into them.",
            *([] if len(lab.saes) > 1 else ["With one dictionary of states, one head and all heads are the same."]),
        ])  # fmt: skip


def _rules(lab: Lab, sites: list[Site], arm: str, books: dict[Site, SAE]) -> dict[int, RuleHandler]:
    found: dict[int, RuleHandler] = {}
    for layer in sorted({layer for layer, _ in sites}):
        heads = [head for at, head in sites if at == layer]
        if arm == "zero":
            found[layer] = loop_rule(dict.fromkeys(heads, deleted), "before")
            continue
        chosen = {head: _dictionary(lab.saes[layer, head], arm, books.get((layer, head))) for head in heads}
        found[layer] = read_rule({head: (sae, None) for head, sae in chosen.items()})
    return found


def _dictionary(sae: SAE, arm: str, book: SAE | None) -> SAE:
    if arm == "reconstruction":
        return sae
    if arm == "codebook":
        assert book is not None
        return book
    silent = codebook(sae, sae.mean.new_ones(sae.F, sae.K), sae.mean.new_ones(sae.F, sae.V))
    silent.v_dec.zero_()
    return silent  # whose reconstruction is the mean


def _answers(statistics: dict[str, Any], main: str) -> list[Answer]:
    part = statistics["groups"][main]
    found = part["reconstruction"]
    best = min(("mean", "codebook"), key=lambda arm: part[arm]["more_loss"]["mean"])
    low, high = part[best]["less_than_reconstruction"]["ci95"]
    said = ", ".join(f"{arm} {part[arm]['perplexity']:.3f}" for arm in ARMS[1:])
    return [
        Answer(
            "sae_read.perplexity", f"perplexity {statistics['plain']['perplexity']:.3f} → {found['perplexity']:.3f}, "
            f"{100 * found['recovered']['ratio']:.1f} % of the loss recovered; loss less that of the best null "
            f"({best}) {part[best]['less_than_reconstruction']['mean']:+.5f} nats a token",
            found["more_loss"]["n"], "passages", (low, high), f"perplexity with {said}", above((-high, -low), 0),
        )
    ]  # fmt: skip


def _figure(groups: dict[str, Any]) -> Figure:
    looks = dict(zip(ARMS, ("atom", "previous", "mean", "zero"), strict=True))

    def paint(axes, colours):
        for i, part in enumerate(groups.values()):
            for j, (arm, colour) in enumerate(looks.items()):
                found, y = part[arm]["more_loss"], i + 0.16 * (j - 1.5)
                axes.plot(found["ci95"], [y, y], color=colours[colour], lw=1.6)
                axes.plot([found["mean"]], [y], "o", ms=5, color=colours[colour], label=arm if not i else None)
        axes.axvline(0, color=colours["line"], lw=0.8)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set(xlabel="more loss, nats a token", ylim=(len(groups) - 0.5, -0.5))
        axes.legend(fontsize=7.5)

    return Figure(paint, "Loss with every read of a head's state through what stands for it, less that of the model as "
                  "it is; 95 % intervals over passages.")  # fmt: skip


STUDY = Study(
    "sae_read_perplexity", "Every read through the reconstruction",
    "The model reads test text while what it reads of a head's state is read of the dictionary's reconstruction; "
    "beside it a codebook of native writes, the mean state, and nothing at all.",
    (
        Claim("sae_read.perplexity", "With every read through the reconstruction the model predicts nearly as well.",
              "–", "not in the paper; the verdict is on its being better than the mean state and the codebook"),
    ),
    {"passages": Setting(96, 8, "passages of test text")},
    run,
)  # fmt: skip
