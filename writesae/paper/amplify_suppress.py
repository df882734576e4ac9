"""Amplify and suppress in closed loop: whenever an atom fires while the model generates, its part is scaled.

What was generated is read again by the model as it is: how often does the atom fire in it, and what is its loss? Beside
it stands the same dose of another atom of the dictionary, drawn at random, given at the same atom's firings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.attach import attach
from ..policies import Change, Policy, Scale, TokenView
from ..sae import SAE
from . import forks
from .lab import Lab, Site
from .measures import above, mean
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

WAYS = ("amplify", "suppress")
ARMS = ("own", "random")


class Instead(Policy):
    """Adds `(factor - 1) a_i` of another atom where feature i fires, as large as that of its own atom would be."""

    def __init__(self, feature: int, other: int, factor: float, **where):
        super().__init__([feature], **where)
        self.feature, self.other, self.factor = feature, other, factor

    def act(self, view: TokenView) -> Change:
        v, w = view.site.atoms
        size = [float(((v[i] @ v[i].mT) * (w[i] @ w[i].mT)).sum().sqrt()) for i in (self.feature, self.other)]
        dose = (self.factor - 1) * view.activations[view.mine].sum() * size[0] / size[1]
        return view.add(dose * v[self.other], w[self.other])


def run(lab: Lab) -> Findings:
    sites = {f"{layer}:{head}": ((layer, head), sae) for (layer, head), sae in lab.saes.items()}
    parts = lab.units(sites, lambda name: _site(lab, *sites[name]), "generate")
    table = join([{"site": np.full(len(x["prompt"]), i), **x} for i, x in enumerate(parts)])
    if not table:
        raise ValueError("saes: expected dictionaries of which something fires on the validation text, got none")
    label = (table["site"].astype(np.int64) << 32) + table["feature"]
    statistics: dict[str, Any] = {"sites": list(sites), "atoms": len(np.unique(label)), "generated": lab["generated"]}
    for way in WAYS:
        statistics[way] = {"factor": lab[way]}
        for arm in ARMS:
            name = f"{way}_{arm}"
            statistics[way][arm] = {
                "firing": mean(table[f"{name}_fires"] - table["plain_fires"], label, "feature", lab.seed),
                "loss": mean(table[f"{name}_loss"] - table["plain_loss"], label, "feature", lab.seed),
                "applied": int(table[f"{name}_applied"].sum()),
            }
        gap = table[f"{way}_own_fires"] - table[f"{way}_random_fires"]
        statistics[way]["own_less_random"] = mean(gap, label, "feature", lab.seed)
    return Findings(statistics, {"texts": table}, {"firing": _figure(statistics)}, _answers(statistics), [
        "Firing is the share of generated tokens at which the atom is active when the model as it is reads the text "
        "again; differences are to what it generates without a policy.",
        "Policies act from the first generated token on, after the token has read its state.",
        "Atoms are those that are active most often in what the model generates from validation prompts.",
    ])  # fmt: skip


def _site(lab: Lab, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    counts = np.zeros(sae.F, np.int64)
    said, _ = _generated(lab, lab.whole("validation", lab["prompts"], lab["prompt"]), site, sae, None)
    for reading in lab.read(said, {site: sae}):
        fired = reading.firings
        counts += np.bincount(fired.feature[fired.position >= lab["prompt"]].cpu().numpy(), minlength=sae.F)
    chosen = np.argsort(-counts, kind="stable")[: lab["atoms"]]
    chosen = chosen[counts[chosen] > 0]
    prompts = lab.whole("test", lab["prompts"], lab["prompt"])
    rng, parts = lab.rng("amplify", *site), []
    later = range(lab["prompt"], lab["prompt"] + lab["generated"])
    plain, _ = _generated(lab, prompts, site, sae, None)
    base, base_loss = _reread(lab, plain, site, sae, chosen)
    for i, feature in enumerate(chosen.tolist()):
        other = int(rng.choice(np.setdiff1d(np.arange(sae.F), chosen)))
        column = {"prompt": np.arange(len(prompts)), "feature": np.full(len(prompts), feature),
                  "plain_fires": base[i], "plain_loss": base_loss}  # fmt: skip
        for way in WAYS:
            for arm in ARMS:
                policy: Policy = Scale([feature], lab[way], positions=later)
                if arm == "random":
                    policy = Instead(feature, other, lab[way], positions=later)
                text, applied = _generated(lab, prompts, site, sae, policy)
                fires, loss = _reread(lab, text, site, sae, chosen[i : i + 1])
                column |= {f"{way}_{arm}_fires": fires[0], f"{way}_{arm}_loss": loss,
                           f"{way}_{arm}_applied": np.full(len(prompts), applied / len(prompts))}  # fmt: skip
        parts.append(column)
    return join(parts) if parts else {}


def _generated(lab: Lab, prompts: Tensor, site: Site, sae: SAE, policy: Policy | None) -> tuple[Tensor, int]:
    """Prompts with what is generated, `[n, T]`, all as long, and how often the policy acted."""
    ids = prompts.to(lab.model.get_input_embeddings().weight.device)
    more = {"do_sample": False, "max_new_tokens": lab["generated"], "min_new_tokens": lab["generated"]}
    mask, acting = torch.ones_like(ids), [] if policy is None else [policy]
    with torch.no_grad(), attach(lab.model, {site: sae}, policies=acting, any_model=True) as tap:
        text = lab.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **more)
    return text, tap.policies[0].total if acting else 0


def _reread(lab: Lab, text: Tensor, site: Site, sae: SAE, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of generated tokens at which each feature fires, `[m, n]`, and their mean loss, `[n]`."""
    fires = np.zeros((len(features), len(text)))
    loss = np.zeros(len(text))
    for reading in lab.read(text, {site: sae}):
        fired = reading.firings[reading.firings.position >= lab["prompt"]]
        for i, feature in enumerate(features):
            row = fired.row[fired.feature == int(feature)].cpu().numpy() + reading.first
            fires[i] += np.bincount(row, minlength=len(text)) / lab["generated"]
        part = forks.losses(reading.logits, reading.ids)[:, lab["prompt"] - 1 :]
        loss[reading.first : reading.first + len(part)] = part.mean(1)
    return fires, loss


def _answers(statistics: dict[str, Any]) -> list[Answer]:
    out = []
    for way, sign in (("amplify", 1), ("suppress", -1)):
        part = statistics[way]
        own, null, gap = part["own"], part["random"], part["own_less_random"]
        low, high = (100 * x for x in gap["ci95"])
        out.append(Answer(
            f"amplify_suppress.{way}", f"fires {100 * own['firing']['mean']:+.2f} points more often (loss "
            f"{own['loss']['mean']:+.3f} nats), {100 * gap['mean']:+.2f} more than with another atom's dose", gap["n"],
            "texts", (low, high), f"the same dose of another atom: {100 * null['firing']['mean']:+.2f} points, loss "
            f"{null['loss']['mean']:+.3f} nats", above((low, high) if sign > 0 else (-high, -low), 0),
        ))  # fmt: skip
    return out


def _figure(statistics: dict[str, Any]) -> Figure:
    def paint(axes, colours):
        for i, way in enumerate(WAYS):
            for j, (arm, colour, label) in enumerate((("own", "atom", "its own atom"),
                                                      ("random", "random", "another atom, same dose"))):  # fmt: skip
                found, y = statistics[way][arm]["firing"], i + 0.2 * (j - 0.5)
                axes.plot([100 * x for x in found["ci95"]], [y, y], color=colours[colour], lw=1.8)
                axes.plot([100 * found["mean"]], [y], "o", color=colours[colour], label=label if not i else None)
        axes.axvline(0, color=colours["line"], lw=0.8)
        axes.set_yticks(range(2), [f"{way}\n× {statistics[way]['factor']:g}" for way in WAYS])
        axes.set(xlabel="change of how often the atom fires in generated text, points", ylim=(1.5, -0.9))
        axes.legend(fontsize=8, loc="upper right")

    return Figure(paint, "How often an atom fires in text generated while its part is scaled, less that without; "
                  "beside it the same dose of another atom. 95 % intervals over atoms.", (5.6, 2.6))  # fmt: skip


STUDY = Study(
    "amplify_suppress", "Amplify and suppress while generating",
    "Scales what an atom contributes whenever it fires during generation, and reads the text again: does it fire more, "
    "or less, than after the same dose of another atom?",
    (
        Claim("amplify_suppress.amplify", "Amplifying an atom makes what it stands for more frequent.", "–",
              "its sources give no number with a control of the same dose"),
        Claim("amplify_suppress.suppress", "Suppressing an atom makes it less frequent.", "–",
              "its sources give no number with a control of the same dose"),
    ),
    {
        "prompts": Setting(64, 12, "prompts of validation and of test text"),
        "prompt": Setting(32, 24, "tokens of a prompt"),
        "generated": Setting(48, 16, "tokens generated, greedily"),
        "atoms": Setting(12, 3, "atoms of each dictionary"),
        "amplify": Setting(16.0, 16.0, "factor by which an atom's part is amplified"),
        "suppress": Setting(-14.0, -14.0, "factor by which it is suppressed: 0 takes it away, below 0 turns it round"),
    },
    run,
)  # fmt: skip
