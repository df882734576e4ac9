"""Features amplified and suppressed while the model generates: does the text move by the feature, or by the dose?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.attach import attach
from ..policies import Change, Policy, Scale, TokenView
from ..sae import SAE
from .frequent import frequent
from .lab import Lab, Site
from .measures import above, features_of, mean, spans, unmeasured
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

ARMS = ("amplify", "amplify_control", "suppress", "suppress_control")


def run(lab: Lab) -> Findings:
    given = {target: saes for target, saes in (("state", lab.saes), ("write", lab.writes)) if saes}
    if not given:
        raise ValueError("saes: amplify_suppress takes dictionaries of states or writes, got none")
    parts, skipped, tried = [], 0, 0
    for target, every in given.items():
        saes = dict(list(every.items())[: lab["sites"]])
        chosen = frequent(lab, saes, lab["select"], lab["context"], lab["features"] + 1, lab["most"])

        def make(key: tuple[int, int, int], saes=saes, chosen=chosen) -> dict[str, np.ndarray]:
            layer, head, feature = key
            return _feature(lab, (layer, head), saes[layer, head], chosen[layer, head].tolist(), feature)

        # The last of a site has none left to stand beside it, where it is the only one.
        keys = [(*site, int(f)) for site, some in chosen.items() for f in some[: lab["features"]] if len(some) > 1]
        found = lab.units(keys, make, target)
        tried, skipped = tried + len(keys), skipped + sum(not len(x) or not len(x["plain"]) for x in found)
        one = join(found)
        if one:
            parts.append({"target": np.full(len(one["layer"]), target, object), **one})
    table = join(parts) if parts else {}
    if not table:
        why = "none of the chosen features fired in a prompt of the test text"
        return Findings({}, answers=[unmeasured(claim, why, "prompts and features") for claim in STUDY.claims])
    statistics: dict[str, Any] = {"all": moves(table, lab.seed)}
    for target in dict.fromkeys(table["target"]):
        mine = table["target"] == target
        statistics[target] = moves({name: column[mine] for name, column in table.items()}, lab.seed)
    return Findings(statistics, {"prompts": table}, _figures(statistics), _answers(statistics["all"]), [
        f"Features are those that fire most often on validation text, of those that fire at no more than "
        f"{100 * lab['most']:g} % of its tokens; their tokens are the {lab['tokens']} whose log-probability amplifying "
        "raises most on validation text. Reported is the log of the probability of all of these together, a mean over "
        "the generated tokens.",
        "A control does the same at the same tokens with the atom of another chosen feature of the head, scaled to the "
        "norm of what it stands for. Everything is closed loop: prompt and generated text.",
        f"{skipped} of {tried} features fired in no prompt and are left out.",
    ])  # fmt: skip


class OtherAtom(Policy):
    """`Scale` of a feature with another's atom in its place, of the same norm: a control of the same dose."""

    def __init__(self, feature: int, other: int, factor: float, **where):
        super().__init__([feature], **where)
        self.other, self.factor = other, factor

    def act(self, view: TokenView) -> Change:
        v, w = view.site.atoms
        (feature,) = self.features_at(view.site.key) or ()
        own, other = (torch.linalg.matrix_norm(v[f].mT @ w[f]) for f in (feature, self.other))
        dose = (self.factor - 1) * view.activations[view.mine].sum() * own / other.clamp_min(1e-30)
        return view.add(dose * v[self.other], w[self.other])


def policies(site: Site, feature: int, other: int, factor: float) -> dict[str, Policy]:
    """{arm: policy} of one feature: its part times `factor`, and taken away, each with its control."""
    where = {"sites": [site]}
    return {
        "amplify": Scale([feature], factor, **where), "amplify_control": OtherAtom(feature, other, factor, **where),
        "suppress": Scale([feature], 0.0, **where), "suppress_control": OtherAtom(feature, other, 0.0, **where),
    }  # fmt: skip


def _feature(lab: Lab, site: Site, sae: SAE, chosen: list[int], feature: int) -> dict[str, np.ndarray]:
    """A row for every test prompt in which the feature fires."""
    other = chosen[(chosen.index(feature) + 1) % len(chosen)]
    acting = policies(site, feature, other, lab["factor"])
    tokens = preferred(lab, site, sae, feature, acting["amplify"])
    if tokens is None:
        return {}
    prompts = _with_firing(lab, "test", site, sae, feature, lab["prompts"])
    if not len(prompts):
        return {}
    texts, out = {}, {}
    for arm in ("plain", *ARMS):
        texts[arm], log_p = generated(lab, prompts, site, sae, acting.get(arm), lab["new"])
        out[arm] = log_p[:, :, tokens.to(log_p.device)].logsumexp(-1).mean(1).cpu().numpy()
    for arm in ARMS:
        out[f"{arm}_changed"] = (texts[arm] != texts["plain"]).double().mean(1).cpu().numpy()
    n = len(prompts)
    return {"layer": np.full(n, site[0]), "head": np.full(n, site[1]), "feature": np.full(n, feature),
            "prompt": np.arange(n), **out}  # fmt: skip


def _with_firing(lab: Lab, split: str, site: Site, sae: SAE, feature: int, count: int) -> Tensor:
    """`[n, prompt]`: up to `count` passages' beginnings in which a feature fires, of a pool drawn by the seed."""
    ids = lab.whole(split, lab["pool"], lab["context"])[:, : lab["prompt"]]
    rows = []
    for reading in lab.read(ids, {site: sae}):
        rows.append(reading.first + reading.firings.row[reading.firings.feature == feature].long().cpu())
    return ids[torch.unique(torch.cat(rows))[:count]]


@torch.no_grad()
def preferred(lab: Lab, site: Site, sae: SAE, feature: int, policy: Policy) -> Tensor | None:
    """`[n]` tokens that amplifying a feature raises most on validation text; None if it fires nowhere there."""
    ids = _with_firing(lab, "validation", site, sae, feature, lab["prompts"])
    if not len(ids):
        return None
    ids = ids.to(next(lab.model.parameters()).device)
    found = []
    for acting in ([], [policy]):
        with attach(lab.model, {site: sae}, policies=acting, any_model=True, self_test=False):
            found.append(lab.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).mean((0, 1)))
    return (found[1] - found[0]).topk(lab["tokens"]).indices.cpu()


@torch.no_grad()
def generated(
    lab: Lab, prompts: Tensor, site: Site, sae: SAE, policy: Policy | None, new: int
) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[n, new]` and log-probabilities `[n, new, vocabulary]`, with a policy or without."""
    prompts = prompts.to(next(lab.model.parameters()).device)
    with attach(lab.model, {site: sae}, policies=[policy] if policy else [], any_model=True, self_test=False):
        out: Any = lab.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False, pad_token_id=0,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[:, prompts.shape[1] :], torch.stack(out.logits, 1).float().log_softmax(-1)


def moves(table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Of each arm: by how much the log-probability of the feature's tokens moves and what share of the generated text
    changes; and how much further than its control an arm goes in its own direction. Bootstrap over features."""
    by = (features_of(table) * 2 + (table["target"] == "write"), "feature", seed)
    out: dict[str, Any] = {}
    for arm in ARMS:
        out[arm] = {"move": mean(table[arm] - table["plain"], *by), "changed": mean(table[f"{arm}_changed"], *by)}
    for arm, sign in (("amplify", 1), ("suppress", -1)):
        out[arm]["over_control"] = mean(sign * (table[arm] - table[f"{arm}_control"]), *by)
    return out


def _answers(found: dict[str, Any]) -> list[Answer]:
    out = []
    for claim, arm in zip(STUDY.claims, ("amplify", "suppress"), strict=True):
        over, own, control = found[arm]["over_control"], found[arm]["move"], found[f"{arm}_control"]["move"]
        out.append(Answer(
            claim.key, f"{over['mean']:+.4f} nats further than its control (own {own['mean']:+.4f})", over["n"],
            "prompts and features", tuple(over["ci95"]),
            f"another feature's atom of the same norm moves them by {control['mean']:+.4f} nats",
            above(over["ci95"], 0),
        ))  # fmt: skip
    return out


def _figures(statistics: dict[str, Any]) -> dict[str, Figure]:
    def paint(axes, colours):
        at = np.arange(len(ARMS))
        kinds = [kind for kind in ("state", "write") if kind in statistics]
        for i, kind in enumerate(kinds):
            found = [statistics[kind][arm]["move"] for arm in ARMS]
            value, error = spans(found)
            shift = 0.16 * (i - (len(kinds) - 1) / 2)
            colour = colours["atom" if kind == "state" else "delete"]
            axes.errorbar(at + shift, value, yerr=error, fmt="o", ms=5, color=colour, label=f"atoms of {kind}s")
        axes.axhline(0, color=colours["line"], lw=0.9)
        axes.set(ylabel="nats by which its tokens move", xlim=(-0.5, len(ARMS) - 0.5))
        axes.set_xticks(at, [arm.replace("_", "\n") for arm in ARMS])
        axes.legend()

    return {"moves": Figure(paint, "Mean change, over generated tokens, of the log-probability of the tokens that a "
                            "feature raises, when its part of the state is amplified or taken away wherever it fires, "
                            "beside another feature's atom of the same norm; 95 % intervals over "
                            "features.")}  # fmt: skip


STUDY = Study(
    "amplify_suppress", "Amplified and suppressed while generating",
    "While the model reads a prompt and goes on from it, a feature's part of the state is multiplied, or taken away, "
    "at every token where it fires. Do the tokens that it raises on other text become more or less likely, and more so "
    "than when another feature's atom of the same size is put there?",
    (
        Claim("amplify_suppress.amplify", "An amplified feature raises its tokens in generated text by more than "
              "another feature does at the same dose.", "–",
              "its sources show examples and define no measure of the effect"),
        Claim("amplify_suppress.suppress", "A suppressed feature lowers its tokens in generated text by more than "
              "another feature's removal does.", "–", "its sources show examples and define no measure of the effect"),
    ),
    {
        "sites": Setting(5, 1, "heads of each kind of dictionary, the first"),
        "features": Setting(12, 2, "features of a head"),
        "factor": Setting(4.0, 4.0, "by which an amplified feature's part is multiplied"),
        "tokens": Setting(20, 20, "tokens of a feature"),
        "prompts": Setting(24, 4, "test prompts of a feature, at most"),
        "pool": Setting(400, 48, "passages among which prompts with a firing are looked for"),
        "prompt": Setting(48, 32, "tokens of a prompt"),
        "new": Setting(32, 10, "tokens generated"),
        "context": Setting(256, 96, "tokens of the passages that prompts begin"),
        "select": Setting(200, 16, "passages of validation text on which features are chosen"),
        "most": Setting(0.05, 0.05, "share of tokens at which a chosen feature may fire at most"),
    },
    run,
    needs="",
)  # fmt: skip
