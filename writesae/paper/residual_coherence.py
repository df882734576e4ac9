"""What a dictionary leaves of a state: noise, or something that lasts, has a direction, and is near what is written?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sae.block import Block
from .lab import Lab, Site
from .measures import above, mean
from .study import Answer, Claim, Figure, Findings, Setting, Study, join
from .trained import held, reconstructions

_NO_SOURCE = "its sources name residual coherence and define no measure of it"
_OWN, _NULL = ("successive", "first_share", "write"), ("other_passage", "gaussian", "other_write")


def run(lab: Lab) -> Findings:
    writes = held(lab, "test", lab["passages"], lab.saes)
    parts = lab.units(lab.saes, lambda site: _site(lab, site, Block([writes[site]], 0)), "site")
    table = join(parts)
    cluster = table["passage"]
    statistics: dict[str, Any] = {name: mean(table[name], cluster, "passage", lab.seed)
                                  for name in (*_OWN, *_NULL, "states_successive", "state_first_share")}  # fmt: skip
    answers = []
    for claim, own, null in zip(STUDY.claims, _OWN, _NULL, strict=True):
        gain = mean(table[own] - table[null], cluster, "passage", lab.seed)
        statistics[f"{own}_above_null"] = gain
        answers.append(Answer(
            claim.key, f"{statistics[own]['mean']:.3f}, {gain['mean']:+.3f} above the null model", gain["n"], "tokens",
            tuple(gain["ci95"]), f"{_SAID[null]} {statistics[null]['mean']:.3f}", above(gain["ci95"], 0),
        ))  # fmt: skip
    return Findings(statistics, {"tokens": table}, {"coherence": _figure(table)}, answers, [
        "The interval is of the difference from the null model, by a bootstrap over passages.",
        f"States themselves, less the dictionary's mean: successive ones have a cosine of "
        f"{statistics['states_successive']['mean']:.3f}, and {statistics['state_first_share']['mean']:.3f} of their "
        "energy in the first singular pair.",
    ])  # fmt: skip


_SAID = {
    "other_passage": "with the residual of another passage at the same place",
    "gaussian": "a Gaussian matrix of that size",
    "other_write": "with the write of another token",
}  # fmt: skip


@torch.no_grad()
def _site(lab: Lab, site: Site, block: Block) -> dict[str, np.ndarray]:
    """A row for every token drawn, with the one after it: `coherence` of the residuals there."""
    sae, (N, T, K, V) = lab.saes[site], block.shape
    rng = lab.rng("tokens", *site)
    rows = torch.arange(N).repeat_interleave(lab["each"])
    positions = torch.from_numpy(np.sort(rng.integers(8, T - 1, (N, lab["each"])), 1).reshape(-1))
    rows, positions = rows.to(block.device), positions.to(block.device)
    X, Y = block.states(rows, positions), block.states(rows, positions + 1)
    R = X - reconstructions(sae, block, rows, positions)
    after = Y - reconstructions(sae, block, rows, positions + 1)
    other = (rows + 1 + torch.from_numpy(rng.integers(max(N - 1, 1), size=len(rows))).to(rows)) % N
    elsewhere = block.states(other, positions + 1) - reconstructions(sae, block, other, positions + 1)
    N_t, N_o = ((x[:, -1, :, None] * y[:, -1, None]) for x, y in
                (block.natives(rows, positions), block.natives(other, positions)))  # fmt: skip
    noise = torch.from_numpy(rng.standard_normal((len(rows), K, V))).to(R)
    found = {
        "successive": cosine(R, after), "other_passage": cosine(R, elsewhere),
        "first_share": first_share(R), "gaussian": first_share(noise),
        "write": cosine(R, N_t), "other_write": cosine(R, N_o),
        "states_successive": cosine(X - sae.mean, Y - sae.mean), "state_first_share": first_share(X - sae.mean),
    }  # fmt: skip
    same = {"layer": np.full(len(rows), site[0]), "head": np.full(len(rows), site[1])}
    return {**same, "passage": rows.cpu().numpy(), "position": positions.cpu().numpy(),
            **{name: x.double().cpu().numpy() for name, x in found.items()}}  # fmt: skip


def cosine(A: Tensor, B: Tensor) -> Tensor:
    """`[n]` of matrices `[n, K, V]`."""
    return torch.cosine_similarity(A.flatten(1), B.flatten(1), dim=1)


def first_share(X: Tensor) -> Tensor:
    """`[n]` share of a matrix' squared norm in its first singular pair."""
    square = torch.linalg.svdvals(X).square()
    return square[:, 0] / square.sum(1).clamp_min(1e-30)


def _figure(table: dict) -> Figure:
    def paint(axes, colours):
        labels = ("with the next token's", "share of its first\nsingular pair", "with the token's\nwrite")
        at = np.arange(3)
        for offset, names, colour, label in ((-0.17, _OWN, "atom", "residual"), (0.17, _NULL, "random", "null model")):
            found = [np.percentile(table[name], [25, 50, 75]) for name in names]
            low, middle, high = np.array(found).T
            axes.errorbar(at + offset, middle, [middle - low, high - middle], fmt="o", ms=6, lw=2,
                          color=colours[colour], label=label)  # fmt: skip
        axes.axhline(0, color=colours["line"], lw=0.9)
        axes.set_xticks(at, labels)
        axes.set(ylabel="cosine, or share", xlim=(-0.6, 2.6))
        axes.legend()

    return Figure(paint, "Residuals of a dictionary of states: cosine with the next token's, share of energy in the "
                  "first singular pair, cosine with the token's write. Medians and quartiles of tokens.")  # fmt: skip


STUDY = Study(
    "residual_coherence", "What a dictionary leaves",
    "The residual of a state, what its code does not reconstruct, is compared with the next token's residual, with a "
    "matrix of rank 1, and with what the token wrote; each beside what chance would give.",
    (
        Claim("residual_coherence.successive", "Residuals of successive tokens are alike.", "–", _NO_SOURCE),
        Claim("residual_coherence.rank", "A residual is nearer to rank 1 than noise.", "–", _NO_SOURCE),
        Claim("residual_coherence.write", "A residual points towards what its token wrote.", "–", _NO_SOURCE),
    ),
    {
        "passages": Setting(200, 24, "passages of test text"),
        "each": Setting(40, 12, "tokens drawn of each"),
    },
    run,
)  # fmt: skip
