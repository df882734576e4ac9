"""The geometry of what a model writes: sizes, directions, how long it lasts, over every head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..experiments.sites import memory
from ..models.sites import layers
from ..writes import Writes
from .lab import Lab, Site
from .measures import above, mean
from .study import Answer, Claim, Figure, Findings, Setting, Study, join
from .trained import held


def run(lab: Lab) -> Findings:
    heads = {site.layer_index: site.num_v_heads for site in layers(lab.model)}
    parts = lab.units(heads, lambda layer: _layer(lab, layer, heads[layer]), "layer")
    table = join(parts)
    cluster = np.arange(len(table["head"]))
    statistics: dict[str, Any] = {"heads": len(cluster)}
    for name in table:
        if name not in ("layer", "head"):
            statistics[name] = mean(table[name], cluster, "head", lab.seed) | {"median": float(np.median(table[name]))}
    answers = []
    compared = (
        ("successive", "shuffled", 1),
        ("first_key", "first_key_null", 1),
        ("state_rank", "state_rank_null", -1),
    )
    for claim, (own, null, sign) in zip(STUDY.claims, compared, strict=True):
        gain = mean(sign * (table[own] - table[null]), cluster, "head", lab.seed)
        statistics[f"{own}_against_null"] = gain
        low, high = sorted(sign * x for x in gain["ci95"])
        answers.append(Answer(
            claim.key, f"{statistics[own]['mean']:.3f}, {sign * gain['mean']:+.3f} from the null model", gain["n"],
            "heads",
            (low, high), f"{_SAID[null]} {statistics[null]['mean']:.3f}", above(gain["ci95"], 0),
        ))  # fmt: skip
    return Findings(statistics, {"heads": table}, _figures(table), answers, [
        "Intervals are of the difference from the null model, by a bootstrap over heads. Of a rule that makes two "
        "writes a token, the new one is looked at.",
        "Effective rank is the exponential of the entropy of the shares of the squared singular values; memory is the "
        "number of tokens until a write has faded to 1/e, by the mean gate.",
    ])  # fmt: skip


_SAID = {
    "shuffled": "writes of two random tokens of a passage", "first_key_null": "Gaussian keys, as many and as long",
    "state_rank_null": "the sum of as many writes with keys and values paired anew, under the same gates",
}  # fmt: skip


@torch.no_grad()
def _layer(lab: Lab, layer: int, heads: int) -> dict[str, np.ndarray]:
    """A row a head."""
    sites: list[Site] = [(layer, head) for head in range(heads)]
    writes = held(lab, "test", lab["passages"], sites)
    lasts = _memory(lab)
    rows = [
        {"layer": site[0], "head": site[1], "memory": lasts[site], **_head(lab, site, writes[site])} for site in sites
    ]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _memory(lab: Lab) -> dict[Site, float]:
    def make():
        found = memory(lab.model, list(lab.whole("test", lab["passages"]).numpy()), lab.progress)
        return {"layer": np.array([x for x, _ in found]), "head": np.array([x for _, x in found]),
                "tokens": np.array(list(found.values()))}  # fmt: skip

    found = lab.unit("memory", make)
    sites = zip(found["layer"].tolist(), found["head"].tolist(), strict=True)
    return dict(zip(sites, found["tokens"].tolist(), strict=True))


def _head(lab: Lab, site: Site, writes: Writes) -> dict[str, float]:
    N, T, _, K, V = writes.shape
    rng = lab.rng("geometry", *site)
    device = writes.right.device
    rows, tokens = torch.arange(N, device=device)[:, None], torch.arange(T, device=device)
    left, right = (x.double() for x in writes.native(rows, tokens, 0))  # [N, T, K], [N, T, V]
    norms = left.norm(dim=2) * right.norm(dim=2)
    other = torch.from_numpy(rng.permuted(np.tile(np.arange(T), (N, 1)), axis=1)).to(device)
    shuffled = left[rows, other], right[rows, other]
    a, b = slice(None, -1), slice(1, None)
    energy = norms.square().flatten()
    keys = torch.nn.functional.normalize(left, dim=2).flatten(0, 1)
    values = torch.nn.functional.normalize(right, dim=2).flatten(0, 1)
    noise = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((N * T, K))).to(keys), dim=1)
    by_key, null = (eigenvalues(x, energy) for x in (keys, noise))
    some = torch.from_numpy(rng.permutation(N * T)[: lab["sample"]]).to(device)
    gram = (keys[some] @ keys[some].T) * (values[some] @ values[some].T)
    ends = torch.tensor([[n, T - 1] for n in range(N)], device=device)
    again = Writes(writes.decay, shuffled[0][:, :, None, None].to(writes.left), writes.right[:, :, :, -1:],
                   decay_matrix=writes.decay_matrix)  # fmt: skip
    return {
        "norm": float(norms.median()), "norm_spread": float(norms.flatten().std() / norms.mean().clamp_min(1e-30)),
        "successive": float(pair_cosine(left[:, a], right[:, a], left[:, b], right[:, b]).mean()),
        "shuffled": float(pair_cosine(*(x[:, a] for x in shuffled), *(x[:, b] for x in shuffled)).mean()),
        "first_key": share(by_key, 1), "first_key_null": share(null, 1), "four_keys": share(by_key, 4),
        "key_rank": entropy_rank(by_key), "value_rank": entropy_rank(eigenvalues(values, energy)),
        "write_rank": entropy_rank(torch.linalg.eigvalsh(gram)),
        "state_rank": _state_rank(writes, ends), "state_rank_null": _state_rank(again, ends),
    }  # fmt: skip


def _state_rank(writes: Writes, places: Tensor) -> float:
    """Mean effective rank of the states at (passage, position)."""
    sigma = torch.linalg.svdvals(writes.states(places)[:, 0].double())
    return float(np.mean([entropy_rank(x.square()) for x in sigma]))


def eigenvalues(unit: Tensor, energy: Tensor) -> Tensor:
    """Of the second moment of directions `[n, D]`, weighted by `energy [n]`, falling."""
    return torch.linalg.eigvalsh(unit.T @ (energy[:, None] * unit)).flip(0)


def share(values: Tensor, first: int) -> float:
    return float(values[:first].sum() / values.sum().clamp_min(1e-300))


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of the shares of values >= 0; rounding below 0 counts as 0."""
    p = values.clamp_min(0) / values.clamp_min(0).sum().clamp_min(1e-300)
    return float(torch.special.entr(p).sum().exp())


def pair_cosine(left: Tensor, right: Tensor, left_b: Tensor, right_b: Tensor) -> Tensor:
    """Cosine of writes `left right^T` and `left_b right_b^T`, over the last axis of each."""
    cosine = torch.nn.functional.cosine_similarity
    return cosine(left, left_b, dim=-1) * cosine(right, right_b, dim=-1)


def _figures(table: dict[str, np.ndarray]) -> dict[str, Figure]:
    def by_layer(axes, colours):
        for name, colour, label in (("successive", "atom", "successive writes"), ("shuffled", "random", "random pairs"),
                                    ("first_key", "delete", "energy in one key direction")):  # fmt: skip
            axes.plot(table["layer"] + 0.06 * (table["head"] - table["head"].mean()), table[name], "o", ms=4.5,
                      color=colours[colour], label=label)  # fmt: skip
        axes.axhline(0, color=colours["line"], lw=0.9)
        axes.set(xlabel="layer", ylabel="mean cosine, or share")
        axes.set_xticks(sorted(set(table["layer"].tolist())))
        axes.legend(fontsize=8)

    def ranks(axes, colours):
        axes.plot(table["memory"], table["state_rank"], "o", ms=5, color=colours["atom"], label="states")
        axes.plot(table["memory"], table["state_rank_null"], "x", ms=5, color=colours["random"], label="paired anew")
        axes.set(
            xscale="log",
            xlabel="memory, tokens until a write has faded to 1/e",
            ylabel="effective rank",
            ylim=(0, None),
        )
        axes.legend()

    return {
        "writes": Figure(by_layer, "Every head: cosine of successive writes and of random pairs, and the share of the "
                         "writes' energy in their first key direction."),
        "states": Figure(ranks, "Effective rank of the states at the ends of passages by the length of a head's "
                         "memory, beside states of the same keys and values paired anew."),
    }  # fmt: skip


_NO_SOURCE = "its sources name the analysis, not its numbers"
STUDY = Study(
    "geometry", "The geometry of writes",
    "Over every head of the model: how large its writes are, how alike successive ones, over how many directions they "
    "spread, how long they last, and of what effective rank the states are that they add up to.",
    (
        Claim("geometry.successive", "Successive writes are more alike than others of a passage.", "–", _NO_SOURCE),
        Claim("geometry.keys", "One key direction holds more of their energy than chance gives.", "–", _NO_SOURCE),
        Claim("geometry.rank", "States have a lower effective rank than sums of as many unrelated writes.", "–",
              _NO_SOURCE),
    ),
    {
        "passages": Setting(100, 8, "passages of test text"),
        "sample": Setting(2000, 400, "writes whose common rank is measured, a head"),
    },
    run,
    needs="",
)  # fmt: skip
