"""What a whole state is worth to the text after it, and how much of that its reconstruction keeps.

In the middle of long passages the state of a head, or of all heads with a dictionary, is replaced once, after its token
has read it: by its reconstruction, and by nulls that no dictionary is needed for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..edits import Edits
from ..experiments.codebook import codebook
from ..experiments.firing import native_writes
from ..sae import SAE
from . import forks
from .lab import Lab, Site
from .measures import above, mean
from .study import Answer, Claim, Figure, Findings, Setting, Study

ARMS = ("reconstruction", "mean", "low_rank", "codebook", "same_error", "zero")


def run(lab: Lab) -> Findings:
    groups = {f"{layer}:{head}": [(layer, head)] for layer, head in lab.saes}
    if len(lab.saes) > 1:
        groups["all"] = list(lab.saes)
    books = untrained(lab)
    found = lab.units(groups, lambda name: _group(lab, groups[name], books), "suffixes")
    statistics: dict[str, Any] = {
        "context": lab["context"], "replaced_at": lab["context"] // 2, "groups": {},
        "of": "loss of the tokens after the replaced state, nats a token",
    }  # fmt: skip
    for name, table in zip(groups, found, strict=True):
        plain = mean(table["plain"], table["passage"], "passage", lab.seed)
        part: dict[str, Any] = {"plain": {**plain, "perplexity": float(np.exp(plain["mean"]))}}
        for arm in ARMS:
            more = mean(table[arm] - table["plain"], table["passage"], "passage", lab.seed)
            less = mean(table["reconstruction"] - table[arm], table["passage"], "passage", lab.seed)
            part[arm] = {"more_loss": more, "reconstruction_less": less, "perplexity": float(np.exp(table[arm].mean()))}
        statistics["groups"][name] = part
    main = "all" if "all" in groups else next(iter(groups))
    tables = {name.replace(":", "h"): table for name, table in zip(groups, found, strict=True)}
    return Findings(statistics, tables, {"perplexity": _figure(statistics["groups"])}, _answers(statistics, main), [
        "low_rank: the state's best approximation of as many rank-1 terms as the dictionary has active atoms, which is "
        "the least error any of that rank can have; it needs no dictionary and stores more.",
        "same_error: the state plus Gaussian noise as large as the reconstruction's error.",
        "codebook: as many native writes of training text as atoms, coded by the same rule.",
        *([] if len(lab.saes) > 1 else ["With one dictionary of states, one head and all heads are the same."]),
    ])  # fmt: skip


def untrained(lab: Lab) -> dict[Site, SAE]:
    """{site: as many native writes of training text as its dictionary has atoms, coded by its rule}."""
    tokens = 2 * max(sae.F for sae in lab.saes.values())
    text = [passage.tokens for passage in lab.text("train", tokens)]
    found, _ = native_writes(lab.model, lab.saes, text, lab.seed)
    return {site: codebook(sae, *found[site]) for site, sae in lab.saes.items()}


def _group(lab: Lab, sites: list[Site], books: Mapping[Site, SAE]) -> dict[str, np.ndarray]:
    ids = lab.whole("test", lab["passages"], lab["context"])
    at = lab["context"] // 2 - 1  # the state after this token
    generator = torch.Generator().manual_seed(lab.seed)

    def plan(arm: str):
        def edits(first: int, writes) -> dict[int, Edits]:
            parts: dict[int, list[Edits]] = {}
            for layer, head in sites:
                state = writes[layer].states([at])[:, 0, head].detach()  # [B, K, V]
                change = replaced(arm, state.float(), lab.saes[layer, head], books[layer, head], generator) - state
                parts.setdefault(layer, []).append(matrix_edits(change.cpu(), at, head))
            return {layer: Edits.cat(found) for layer, found in parts.items()}

        return edits

    loss = forks.edited_losses(lab, ids, sites, {arm: plan(arm) for arm in ARMS}, lab["batch"])
    return {"passage": np.arange(len(ids)), **{name: x[:, at + 1 :].mean(1) for name, x in loss.items()}}


def replaced(arm: str, state: Tensor, sae: SAE, book: SAE, generator: torch.Generator) -> Tensor:
    """`[B, K, V]`: what stands in for states `[B, K, V]`."""
    if arm == "zero":
        return torch.zeros_like(state)
    if arm == "mean":
        return sae.mean.detach().to(state).expand_as(state)
    if arm == "low_rank":
        u, s, v = torch.linalg.svd(state, full_matrices=False)
        return (u[..., : sae.k] * s[..., None, : sae.k]) @ v[..., : sae.k, :]
    coder = book if arm == "codebook" else sae
    found = coder.decode(coder.encode(state.to(coder.mean.device))).to(state)
    if arm != "same_error":
        return found
    noise = torch.randn(state.shape, generator=generator).to(state)
    return state + noise * (torch.linalg.matrix_norm(found - state) / torch.linalg.matrix_norm(noise))[:, None, None]


def matrix_edits(change: Tensor, position: int, head: int) -> Edits:
    """Adds a matrix of `[B, K, V]` to the state of each row after the token has read it: K additions a row."""
    B, K, _ = change.shape
    left = torch.eye(K).repeat(B, 1)
    return Edits.add(torch.arange(B).repeat_interleave(K), [position] * (B * K), head, left,
                     change.flatten(0, 1).float(), when="after")  # fmt: skip


def _answers(statistics: dict[str, Any], main: str) -> list[Answer]:
    part = statistics["groups"][main]
    found, plain = part["reconstruction"], part["plain"]["perplexity"]
    nulls = {arm: part[arm] for arm in ARMS[1:]}
    best = min(("mean", "low_rank", "codebook"), key=lambda arm: nulls[arm]["more_loss"]["mean"])
    low, high = nulls[best]["reconstruction_less"]["ci95"]
    said = ", ".join(f"{arm} {x['perplexity']:.3f}" for arm, x in nulls.items())
    return [
        Answer(
            "state_replacement.suffix", f"perplexity {plain:.3f} → {found['perplexity']:.3f}; loss less that of the "
            f"best null ({best}) {nulls[best]['reconstruction_less']['mean']:+.5f} nats a token",
            found["more_loss"]["n"], "passages", (low, high), f"perplexity with {said}", above((-high, -low), 0),
        )
    ]  # fmt: skip


def _figure(groups: dict[str, Any]) -> Figure:
    looks = dict(zip(ARMS, ("atom", "mean", "singular", "previous", "random", "zero"), strict=True))

    def paint(axes, colours):
        for i, part in enumerate(groups.values()):
            for j, (arm, colour) in enumerate(looks.items()):
                found, y = part[arm]["more_loss"], i + 0.13 * (j - 2.5)
                axes.plot([1000 * x for x in found["ci95"]], [y, y], color=colours[colour], lw=1.6)
                axes.plot([1000 * found["mean"]], [y], "o", ms=5, color=colours[colour],
                          label=arm.replace("_", " ") if not i else None)  # fmt: skip
        axes.axvline(0, color=colours["line"], lw=0.8)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set(xlabel="more loss of the text after it, thousandths of a nat a token", ylim=(len(groups) - 0.5, -0.5))
        axes.legend(fontsize=7.5)

    return Figure(paint, "Loss of the text after a state is replaced, less that of the model as it is, by what stands "
                  "in its place; 95 % intervals over passages.")  # fmt: skip


STUDY = Study(
    "state_replacement_perplexity", "Replacing a whole state",
    "Replaces the state in the middle of long passages once, by its reconstruction or by a null (the mean state, the "
    "best of low rank, a codebook of native writes, noise of the same error, nothing), and reads on.",
    (
        Claim("state_replacement.suffix", "The text after is predicted nearly as well from a state's reconstruction.",
              "–", "the verdict is on its being better than the best of mean, low rank and codebook"),
    ),
    {
        "passages": Setting(64, 6, "passages of test text"),
        "context": Setting(1024, 1024, "tokens of a passage; the state in its middle is replaced"),
        "batch": Setting(8, 6, "passages at once"),
    },
    run,
)  # fmt: skip
