"""A memory put into another prompt: does what the donor was about to say come with it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..edits import Edits
from ..experiments.divergence import kl_pair
from ..experiments.statistics import proportion, wilcoxon
from ..models.attach import attach
from ..models.sites import layers
from .lab import Lab, Site
from .measures import above, mean, spans
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

_ARMS = ("donor", "random")
SCOPES = ("head", "layer", "all layers")
_FIRST = 16  # tokens a prompt has before its memory is taken, at least


def run(lab: Lab) -> Findings:
    heads = {site.layer_index: site.num_v_heads for site in layers(lab.model)}
    given = [*lab.saes, *lab.writes]
    site: Site = given[0] if given else (sorted(heads)[len(heads) // 2], 0)
    scopes = {"head": {site[0]: [site[1]]}, "layer": {site[0]: list(range(heads[site[0]]))},
              "all layers": {layer: list(range(n)) for layer, n in heads.items()}}  # fmt: skip
    ids = lab.whole("test", lab["passages"], lab["context"])
    trios = matched(ids.numpy(), lab["pairs"], lab["horizon"], lab.rng("trios"))
    batches = range(0, len(trios), 8)
    table = join(lab.units(batches, lambda lo: _batch(lab, ids, trios[lo : lo + 8], scopes), "pairs"))
    statistics: dict[str, Any] = {"site": f"{site[0]}:{site[1]}", "pairs": len(trios)}
    answers = []
    for claim, scope in zip(STUDY.claims, SCOPES, strict=True):
        own, null = (table[f"{scope}:{arm}:gain"] for arm in _ARMS)
        cluster = table["receiver"]
        found = {
            "donor": mean(own, cluster, "passage", lab.seed), "random": mean(null, cluster, "passage", lab.seed),
            "difference": mean(own - null, cluster, "passage", lab.seed), "wilcoxon": wilcoxon(null, own),
            "likelier": proportion(own > null, "pairs in which the donor's memory makes its token likelier"),
            "kl": {arm: mean(table[f"{scope}:{arm}:kl"], cluster, "passage", lab.seed) for arm in _ARMS},
            "nearer": {arm: mean(table[f"{scope}:{arm}:nearer"], cluster, "passage", lab.seed) for arm in _ARMS},
        }  # fmt: skip
        statistics[scope] = found
        answers.append(Answer(
            claim.key, f"{found['difference']['mean']:+.4f} nats", len(own), "pairs of prompts",
            tuple(found["difference"]["ci95"]), f"the donor's memory {found['donor']['mean']:+.4f}, a random prompt's "
            f"{found['random']['mean']:+.4f} nats; likelier in {100 * found['likelier']['rate']:.1f} % of pairs",
            above(found["difference"]["ci95"], 0),
        ))  # fmt: skip
    return Findings(statistics, {"pairs": table}, {"transplant": _figure(statistics)}, answers, [
        "Receiver, donor and random prompt all go on with the same token after the place where the memory is "
        "exchanged; the donor's next one after it, which neither of the others has there, is the target. The gain is "
        "of its log-probability in the receiver.",
        "All memory of the scope is exchanged, after the receiver's token has read it; convolutions and attention keep "
        "the receiver's past.",
    ])  # fmt: skip


def matched(ids: np.ndarray, count: int, horizon: int, rng: np.random.Generator) -> np.ndarray:
    """`[n, 3, 2]` (passage, position t) of receiver, donor and random prompt, of three passages `[P, T]`.

    Token t + 1 is the same in all three; the donor's token t + 2 is neither of the others'.

    Raises:
        ValueError: no such trio.
    """
    P, T = ids.shape
    places = [(p, t) for p in range(P) for t in range(_FIRST, T - max(horizon, 1) - 2)]
    by_token: dict[int, list[tuple[int, int]]] = {}
    for p, t in places:
        by_token.setdefault(int(ids[p, t + 1]), []).append((p, t))
    found = []
    for i in rng.permutation(len(places)):
        p, t = places[i]
        others = by_token[int(ids[p, t + 1])]
        order = [others[j] for j in rng.permutation(len(others))[:50]]
        donor = next(((q, s) for q, s in order if q != p and ids[q, s + 2] != ids[p, t + 2]), None)
        if donor is None:
            continue
        target = ids[donor[0], donor[1] + 2]
        third = next(((q, s) for q, s in order if q not in (p, donor[0]) and ids[q, s + 2] != target), None)
        if third is not None:
            found.append(((p, t), donor, third))
        if len(found) == count:
            break
    if not found:
        raise ValueError("test: expected three passages with a token in common that go on in two ways, got none")
    return np.array(found)


@torch.no_grad()
def _batch(lab: Lab, ids: Tensor, trios: np.ndarray, scopes: Mapping[str, Mapping[int, Sequence[int]]]) -> dict:
    """A row a trio, by scope and arm: gain of the target, KL from the plain text, and how much nearer the donor."""
    n, H = len(trios), lab["horizon"]
    device = lab.model.get_input_embeddings().weight.device
    who = ids[torch.from_numpy(trios[:, :, 0]).T.reshape(-1)].to(device)  # receivers, donors, random ones: [3 n, T]
    at = torch.from_numpy(trios[:, :, 1]).T.reshape(-1).to(device)
    everywhere = scopes["all layers"]
    with attach(lab.model, {(layer, head): None for layer in everywhere for head in everywhere[layer]}) as tap:
        logits = lab.model(input_ids=who, use_cache=False).logits
    states = {layer: tap.writes[layer].states(torch.stack([torch.arange(3 * n, device=device), at], 1))
              for layer in everywhere}  # fmt: skip
    rows = torch.arange(n, device=device)
    t, donor_t = at[:n], at[n : 2 * n]
    target = who[n + rows, donor_t + 2]
    plain, donor = logits[:n], logits[n + rows, donor_t + 1]
    later = t[:, None] + torch.arange(1, H + 1, device=device)
    out = {
        "receiver": trios[:, 0, 0], "position": trios[:, 0, 1], "donor": trios[:, 1, 0],
        "token": who[rows, t + 1].cpu().numpy(), "target": target.cpu().numpy(),
    }  # fmt: skip
    for scope, wanted in scopes.items():
        for arm, first in (("donor", n), ("random", 2 * n)):
            edits = {layer: exchange(states[layer][:n], states[layer][first : first + n], t, heads)
                     for layer, heads in wanted.items()}  # fmt: skip
            with attach(lab.model, {}, edits=edits):
                found = lab.model(input_ids=who[:n], use_cache=False).logits
            before, after = (x[rows, t + 1].double().log_softmax(-1) for x in (plain, found))
            kl = kl_pair(plain[rows[:, None], later].flatten(0, 1), {"x": found[rows[:, None], later].flatten(0, 1)})
            far, near = (kl_pair(donor, {"x": x[rows, t + 1]})["x"][0] for x in (plain, found))
            columns = {
                "gain": (after - before)[rows, target], "kl": kl["x"][0].view(n, H).mean(1), "nearer": far - near,
            }  # fmt: skip
            out |= {f"{scope}:{arm}:{name}": x.double().cpu().numpy() for name, x in columns.items()}
    return out


def exchange(own: Tensor, other: Tensor, position: Tensor, heads: Sequence[int]) -> Edits:
    """Edits that turn states `own [n, H, K, V]` of rows 0..n-1 at `position [n]` into `other`, after they are read."""
    n, _, K, V = own.shape
    difference = (other - own)[:, list(heads)]  # [n, h, K, V]
    row = torch.arange(n, device=own.device)[:, None, None].expand(n, len(heads), K)
    head = torch.tensor(list(heads), device=own.device)[None, :, None].expand_as(row)
    left = torch.eye(K, dtype=own.dtype, device=own.device).expand(n, len(heads), K, K)
    return Edits.add(
        row.reshape(-1), position[row].reshape(-1), head.reshape(-1), left.reshape(-1, K), difference.reshape(-1, V),
        when="after",
    )  # fmt: skip


def _figure(statistics: Mapping[str, Any]) -> Figure:
    def paint(axes, colours):
        at = np.arange(len(SCOPES))
        for offset, arm, colour in ((-0.12, "donor", "atom"), (0.12, "random", "random")):
            found = [statistics[scope][arm] for scope in SCOPES]
            value, spread = spans(found)
            label = {"donor": "the donor's memory", "random": "a random prompt's"}[arm]
            axes.errorbar(at + offset, value, spread, fmt="o", ms=6, lw=1.6, color=colours[colour], label=label)
        axes.axhline(0, color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set_xticks(at, ["one head", "one layer", "all layers"])
        axes.set(ylabel="gain of the donor's token, nats", xlim=(-0.5, len(SCOPES) - 0.5))
        axes.legend(loc="upper left")

    return Figure(paint, "Change of the log-probability of the donor's next token in a prompt that got the donor's "
                  "memory, or a random prompt's, with intervals over receiving passages.")  # fmt: skip


_NO_SOURCE = "its sources name the transplant, not its numbers; pairs share a token here, so that there is a target"
STUDY = Study(
    "transplant", "A memory in another prompt",
    "The memory of one prompt is put into another that goes on with the same token. If it carries what the donor was "
    "about to say, the donor's next token becomes likelier than with the memory of a random prompt.",
    (
        Claim("transplant.head", "One head's memory carries what the donor was about to say.", "–", _NO_SOURCE),
        Claim("transplant.layer", "One layer's does.", "–", _NO_SOURCE),
        Claim("transplant.all", "That of all layers does.", "–", _NO_SOURCE),
    ),
    {
        "passages": Setting(400, 40, "passages of test text that prompts are drawn from"),
        "context": Setting(128, 96, "tokens of each"),
        "pairs": Setting(400, 32, "pairs of prompts"),
        "horizon": Setting(8, 4, "tokens followed after the exchange"),
    },
    run,
    needs="",
)  # fmt: skip
