"""The state in the middle of a passage replaced by its reconstruction: what does the rest of the passage lose?"""

from __future__ import annotations

import numpy as np
import torch

from ..edits import Edits
from ..models.attach import attach
from .lab import Lab, Site
from .losses import StandIn, against, condition_table, groups, loss_figure, perplexities, stand_ins, token_losses
from .study import Claim, Findings, Setting, Study, join


def run(lab: Lab) -> Findings:
    context, at = lab["context"], lab["position"]
    if not 1 <= at < context - 2:
        raise ValueError(f"position: expected 1 <= position < {context - 2} (context less 2), got {at}")
    ids = lab.whole("test", lab["passages"], context)
    known: dict[Site, dict[str, StandIn]] = {}

    def make(first: int) -> dict[str, np.ndarray]:
        if not known:  # when first asked for: a resumed run may not need them
            known.update(stand_ins(lab, lab["train"], context, lab["states"]))
        return replaced_at(lab, ids[first : first + lab["batch"]], first, at, known)

    table = join(lab.units(range(0, len(ids), lab["batch"]), make, "passages"))
    statistics, near = (perplexities(table, lab.seed, column) for column in ("loss", "near"))
    whole = statistics[list(statistics)[-1]]
    answers = [against(claim.key, claim.key.rpartition(".")[2], whole) for claim in STUDY.claims]
    caption = (
        f"Loss of the 16 tokens behind position {at} of passages of {context} when the state there is replaced, less "
        "that of the plain model, with 95 % intervals over passages. SVD, the state's own first singular pairs, is no "
        "null but the best that as many rank-one terms can do."
    )
    return Findings(
        {"position": at, "context": context, "groups": statistics, "near": near}, {"passages": table},
        {"loss": loss_figure(near[list(near)[-1]], caption)}, answers,
        ["Answers are of the whole suffix; a head that forgets soon shows it in the first 16 tokens (`near`) alone.",
         "The state is changed once its token has read it, so the first loss counted is that of the token two on.",
         "Of several heads each is replaced by itself, and all at once; answers are of all at once. States of layers "
         "above are those of the clean pass, as a patched cache has them."],
    )  # fmt: skip


@torch.no_grad()
def replaced_at(
    lab: Lab, ids: torch.Tensor, first: int, at: int, known: dict[Site, dict[str, StandIn]]
) -> dict[str, np.ndarray]:
    """Mean suffix loss of passages `[B, T]`, plain and with the state after token `at` replaced."""
    ids = ids.to(next(lab.model.parameters()).device)
    sites: dict[Site, None] = dict.fromkeys(lab.saes)
    with attach(lab.model, sites, any_model=True) as tap:
        plain = token_losses(lab.model(input_ids=ids, use_cache=False).logits, ids)
    states = {site: tap.writes[site[0]].head(site[1]).states([at])[:, 0, 0] for site in sites}
    out = [condition_table(first, "", "plain", plain[:, at + 1 :])]
    for group, some in groups(list(sites)).items():
        for name in next(iter(known.values())):
            edits: dict[int, list[Edits]] = {}
            for layer, head in some:
                X = states[layer, head].float()
                edits.setdefault(layer, []).append(added(known[layer, head][name](X) - X, at, head))
            planned = {layer: Edits.cat(parts) for layer, parts in edits.items()}
            with attach(lab.model, {}, edits=planned, strict=True, self_test=False):
                loss = token_losses(lab.model(input_ids=ids, use_cache=False).logits, ids)
            out.append(condition_table(first, group, name, loss[:, at + 1 :]))
    return join(out)


def added(change: torch.Tensor, position: int, head: int) -> Edits:
    """A matrix `[B, K, V]` added to the states of B rows after `position` has read: an edit a row of the matrix."""
    B, K, V = change.shape
    row = torch.arange(B).repeat_interleave(K)
    eye = torch.eye(K, dtype=change.dtype, device=change.device).repeat(B, 1)
    return Edits.add(row, position, head, eye, change.reshape(B * K, V), when="after")


STUDY = Study(
    "state_replacement_perplexity", "A state replaced by its reconstruction",
    "In the middle of a long passage the state of a head is replaced by what its dictionary makes of it. The model "
    "reads on, and the perplexity of the rest says what was lost, beside what simpler stand-ins lose: native writes "
    "that nobody trained, principal components, the mean state, an empty state.",
    (
        Claim("state_replacement_perplexity.zero", "A reconstructed state costs less than an empty one.", "–",
              "its sources define the measure, and name no number and no null"),
        Claim("state_replacement_perplexity.mean", "It costs less than the mean state of other text.", "–",
              "its sources define the measure, and name no number and no null"),
        Claim("state_replacement_perplexity.PCA", "It costs less than as many principal components.", "–",
              "its sources define the measure, and name no number and no null"),
        Claim("state_replacement_perplexity.codebook", "It costs less than as many native writes of other text, fitted "
              "to the state.", "–", "its sources define the measure, and name no number and no null"),
    ),
    {
        "passages": Setting(96, 8, "passages of test text"),
        "context": Setting(1024, 256, "tokens a passage"),
        "position": Setting(512, 128, "token after which the state is replaced"),
        "train": Setting(32, 12, "passages of train text, for principal components and mean"),
        "states": Setting(4000, 500, "states drawn of them"),
        "batch": Setting(8, 8, "passages at a time"),
    },
    run,
)  # fmt: skip
