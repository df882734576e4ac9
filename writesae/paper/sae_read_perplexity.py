"""Every read of a head through its state's reconstruction: what does the model lose?"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..models.binding import LayerSite
from ..models.run_with_sae import read_states
from ..models.seam import intercept
from ..models.sites import layers
from ..ops.rule import RuleCall, RuleOutput
from .lab import Lab, Site
from .losses import StandIn, against, condition_table, groups, loss_figure, perplexities, stand_ins, token_losses
from .study import Claim, Findings, Setting, Study, join


def run(lab: Lab) -> Findings:
    known_sites = {site.layer_index: site for site in layers(lab.model)}
    for layer, _ in lab.saes:
        if known_sites[layer].binding.one_head_a_call:
            raise ValueError(
                f"model: sae_read_perplexity takes layers that run all their heads in one call, but layer {layer} runs "
                f"the {known_sites[layer].binding.name} head by head"
            )
    ids = lab.whole("test", lab["passages"], lab["context"])
    known: dict[Site, dict[str, StandIn]] = {}

    def make(first: int) -> dict[str, np.ndarray]:
        if not known:
            known.update(stand_ins(lab, lab["train"], lab["context"], lab["states"]))
        some = ids[first : first + lab["batch"]].to(next(lab.model.parameters()).device)
        plain = read_losses(lab.model, some, {})
        out = [condition_table(first, "", "plain", plain)]
        for group, sites in groups(list(lab.saes)).items():
            for name in lab["conditions"]:
                loss = read_losses(lab.model, some, {site: known[site][name] for site in sites})
                out.append(condition_table(first, group, name, loss))
        return join(out)

    table = join(lab.units(range(0, len(ids), lab["batch"]), make, "passages"))
    statistics = perplexities(table, lab.seed)
    whole = statistics[list(statistics)[-1]]
    answers = [against(claim.key, claim.key.rpartition(".")[2], whole) for claim in STUDY.claims]
    return Findings(
        {"context": lab["context"], "groups": statistics}, {"passages": table},
        {"loss": loss_figure(whole, "Loss when every token of a passage reads a stand-in for the state, less that of "
                             "the plain model, with 95 % intervals over passages.")},
        answers,
        ["The states themselves evolve as they would; only what is read of them is changed, at every token.",
         "Of several heads each is read so by itself, and all at once; answers are of all at once."],
    )  # fmt: skip


@torch.no_grad()
def read_losses(model, ids: Tensor, through: Mapping[Site, StandIn]) -> np.ndarray:
    """`[B, T - 1]` losses of passages `[B, T]`, in nats, with every state of some heads read through a stand-in."""
    known = {site.layer_index: site for site in layers(model)}
    calls = {}
    for layer in sorted({layer for layer, _ in through}):
        calls[layer] = _reading(known[layer], {head: f for (at, head), f in through.items() if at == layer})
    with intercept(model, private=True, calls=calls) if calls else contextlib.nullcontext():
        return token_losses(model(input_ids=ids, use_cache=False).logits, ids)


def _reading(site: LayerSite, through: Mapping[int, StandIn]):
    """A layer whose heads read `f(S_t)` in the place of S_t: the output changes by `(f(S_t) - S_t)^T q_t`."""

    def handler(call: RuleCall, output_final_state: bool) -> RuleOutput:
        out = call.run(output_final_state=output_final_state, return_writes=True)
        assert out.writes is not None
        q = site.binding.queries(call)
        o = out.o.view(*out.o.shape[:2], site.num_v_heads, site.V)
        for head, f in through.items():
            mine = q[:, :, out.writes.left_head(head)].float()
            o[:, :, head] += read_states(out.writes, mine, head, _less_itself(f)).to(o)
        return out

    return handler


def _less_itself(f: StandIn) -> StandIn:
    return lambda states: f(states.float()) - states


STUDY = Study(
    "sae_read_perplexity", "Every read through the reconstruction",
    "Tokens read the states of a head only through what its dictionary makes of them, at every position of a passage. "
    "The loss then says how much of what is read the dictionary keeps, beside principal components, native writes, the "
    "mean state and no state at all.",
    (
        Claim("sae_read_perplexity.zero", "Reading reconstructions costs less than reading nothing.", "–",
              "its sources define the measure, and name no number and no null"),
        Claim("sae_read_perplexity.mean", "It costs less than reading the mean state of other text.", "–",
              "its sources define the measure, and name no number and no null"),
        Claim("sae_read_perplexity.PCA", "It costs less than reading as many principal components.", "–",
              "its sources define the measure, and name no number and no null"),
    ),
    {
        "passages": Setting(96, 4, "passages of test text"),
        "context": Setting(256, 128, "tokens a passage"),
        "train": Setting(64, 12, "passages of train text, for principal components and mean"),
        "states": Setting(4000, 500, "states drawn of them"),
        "conditions": Setting(("reconstruction", "codebook", "PCA", "mean", "zero"),
                              ("reconstruction", "PCA", "mean", "zero"), "what is read in a state's place"),
        "batch": Setting(8, 4, "passages at a time"),
    },
    run,
)  # fmt: skip
