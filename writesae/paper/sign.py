"""The sign test: does a write whose value points at a token raise that token, and its opposite lower it?

At one place, `m ||N||_F k_t w*^T` is added to the state, with N the native write, k_t its key at unit length and
`w* = W_O[head]^T W_U[token]` at unit length. Nulls: the direction of another token, and a random one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from ..experiments.engine import ForkEngine, read, unread
from ..experiments.statistics import proportion
from ..sae import SAE
from . import forks
from .lab import Lab, Site
from .measures import mean, percent
from .study import Answer, Claim, Figure, Findings, Setting, Study, join
from .tokens_by_rank import bounds, by_rank

READS = ("after", "before")
DIRECTIONS = ("own", "other", "random")


def run(lab: Lab) -> Findings:
    ids = lab.whole("test", lab["passages"])
    given = forks.all_sites(lab)
    parts = lab.units(given, lambda name: _site(lab, ids, *given[name]), "signs")
    table = join([{"site": np.full(len(x["row"]), i), **x} for i, x in enumerate(parts) if x])
    if not table:
        raise ValueError("vocabulary: expected tokens of the ranks asked for, got none")
    statistics: dict[str, Any] = {"magnitude": lab["magnitude"], "sites": list(given)}
    for stratum in np.unique(table["stratum"]):
        part = forks.some(table, table["stratum"] == stratum)
        statistics[str(stratum)] = {
            "ranks": [int(part["rank"].min()), int(part["rank"].max())],
            **{read: {way: _signs(part, read, way, lab.seed) for way in DIRECTIONS} for read in READS},
        }
    statistics["by_site"] = {
        name: {read: _signs(forks.some(table, table["site"] == i), read, "own", lab.seed)["right"] for read in READS}
        for i, name in enumerate(given) if (table["site"] == i).any()
    }  # fmt: skip
    return Findings(statistics, {"signs": table}, _figures(statistics), _answers(statistics), [
        "A sign is right where the token's log-probability rises with the write, and falls with its opposite; `both` "
        "counts the places where both are.",
        'Read "after", the token of the place has read its state before the write is added, and the next one is looked '
        'at; "before", it reads it too, and is looked at itself.',
        "The direction knows nothing of the gate after the memory, whose sign a head may turn: see `by_site`.",
        "Ranks are of the token after the place. "
        "`mid` are ranks at the paper's share of the vocabulary, `absolute` its ranks 100 to 1,000 as they are.",
    ])  # fmt: skip


def _site(lab: Lab, ids: torch.Tensor, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    engine = ForkEngine(lab.model, site[0], 1, read="before")
    layer, head = engine.site, site[1]
    rng = lab.rng("sign", *site, sae.target)
    row, position = np.divmod(rng.permutation(len(ids) * (ids.shape[1] - 2))[: lab["places"]], ids.shape[1] - 2)
    position += 1
    vocabulary = engine.stack.vocabulary
    ranks = {"mid": bounds(vocabulary)["mid"]}
    if vocabulary > 1000:
        ranks["absolute"] = (100, 1000)
    barred = set(lab.tokenizer.all_special_ids) | set(range(len(lab.tokenizer), vocabulary))
    parts = []
    for index, clean in forks.forks(engine, ids, row, position, head):
        n, size = len(index), clean.left.norm(dim=1) * clean.right.norm(dim=1)
        key = lab["magnitude"] * size[:, None] * normalize(clean.left, dim=1)
        base = forks.log_probs(engine, engine.run(clean, {"clean": None})["clean"])  # [n, 2, vocabulary]
        for stratum, (low, high) in ranks.items():
            token = np.array([by_rank(x[-1], low, high, barred, rng) for x in base])
            keep = np.flatnonzero(token >= 0)
            if not len(keep):
                continue
            other = np.roll(token, 1)
            values = {
                "own": forks.token_directions(lab.model, layer, head, np.maximum(token, 0)),
                "other": forks.token_directions(lab.model, layer, head, np.maximum(other, 0)),
                "random": normalize(torch.from_numpy(rng.standard_normal((n, layer.V))), dim=1),
            }
            deltas = {}
            for way, value in values.items():
                for sign in (1, -1):
                    change = read(clean, sign * key, value.to(key))
                    deltas[f"before {way} {sign}"], deltas[f"after {way} {sign}"] = change, unread(clean, change)
            shown = torch.from_numpy(np.maximum(token, 0))[:, None].to(base.device)
            column: dict[str, np.ndarray] = {
                "row": row[index], "position": position[index], "token": token,
                "rank": np.array([int((x[-1] > x[-1, t]).sum()) for x, t in zip(base, np.maximum(token, 0),
                                                                                strict=True)]),
                "stratum": np.full(n, stratum),
            }  # fmt: skip
            for name, hidden in engine.run(clean, deltas).items():
                when, way, sign = name.split()
                at = 1 if when == "after" else 0
                shift = (forks.log_probs(engine, hidden)[:, at] - base[:, at]).gather(1, shown)[:, 0]
                column[f"{when}_{way}_{'plus' if sign == '1' else 'minus'}"] = shift.double().cpu().numpy()
            # Another token's direction is none where the tokens are the same.
            keep = keep[(token != other)[keep] & (other >= 0)[keep]] if n > 1 else keep[:0]
            parts.append(forks.some(column, keep))
    return join(parts) if any(len(x["row"]) for x in parts) else {}


def _signs(table: dict[str, np.ndarray], read: str, way: str, seed: int) -> dict[str, Any]:
    plus, minus = table[f"{read}_{way}_plus"], table[f"{read}_{way}_minus"]
    return {
        "right": {**proportion(plus > 0, "the token rises with the write, Wilson 95 % interval"),
                  "by_passage": mean(plus > 0, table["row"], "passage", seed)["ci95"]},
        "both": proportion((plus > 0) & (minus < 0), "rises with the write, falls with its opposite"),
        "shift": mean(plus, table["row"], "passage", seed),
    }  # fmt: skip


def _answers(statistics: dict[str, Any]) -> list[Answer]:
    found = statistics.get("absolute") or statistics["mid"]
    own, other, random = (found["after"][way] for way in DIRECTIONS)
    early = found["before"]["own"]
    null = max(other["right"]["ci95"][1], random["right"]["ci95"][1])
    low, high = own["right"]["ci95"]
    heads = [x["after"]["rate"] for x in statistics["by_site"].values()]
    said = (f"another token's direction {100 * other['right']['rate']:.1f} %, {other['shift']['mean']:+.3f} nats; a "
            f"random one {100 * random['right']['rate']:.1f} %, {random['shift']['mean']:+.3f} nats")  # fmt: skip
    shift = own["shift"]
    top = max(other["shift"]["ci95"][1], random["shift"]["ci95"][1])
    return [
        Answer(
            "sign.right", f"{100 * own['right']['rate']:.1f} % (read before: {100 * early['right']['rate']:.1f} %; "
            f"by head {100 * min(heads):.0f} to {100 * max(heads):.0f} %)",
            own["right"]["n"], "places", percent(own["right"]["ci95"]), said,
            "holds" if low > max(null, 0.5) else "does not hold" if high < max(null, 0.5) else "cannot be told",
        ),
        Answer(
            "sign.size", f"{shift['mean']:+.3f} nats (read before: {early['shift']['mean']:+.3f})", shift["n"],
            "places", tuple(shift["ci95"]), said, "holds" if shift["ci95"][0] > max(top, 0) else
            "does not hold" if shift["ci95"][1] < max(top, 0) else "cannot be told",
        ),
    ]  # fmt: skip


def _figures(statistics: dict[str, Any]) -> dict[str, Figure]:
    strata = [s for s in ("mid", "absolute") if s in statistics]
    labels = {"own": ("atom", "its direction"), "other": ("delete", "another token's"), "random": ("random", "random")}

    def paint(axes, colours):
        ticks = []
        for i, (stratum, when) in enumerate((s, r) for s in strata for r in READS):
            for j, (way, (colour, label)) in enumerate(labels.items()):
                found = statistics[stratum][when][way]["right"]
                low, high = found["ci95"]
                axes.bar(i + 0.26 * (j - 1), 100 * found["rate"], 0.24, color=colours[colour],
                         label=label if not i else None)  # fmt: skip
                axes.plot([i + 0.26 * (j - 1)] * 2, [100 * low, 100 * high], color=colours["line"], lw=1.2)
            ranks = statistics[stratum]["ranks"]
            ticks.append(f"ranks {ranks[0]}–{ranks[1]}\nread {when}")
        axes.axhline(50, color=colours["line"], lw=0.8, ls=(0, (4, 3)))
        axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
        axes.set(ylabel="places where the token rises, %", ylim=(0, 122))
        axes.legend(ncols=3, loc="upper center", fontsize=8)

    return {"signs": Figure(paint, "How often a token's log-probability rises when a write that points at it is added, "
                            "beside writes that point elsewhere. Lines are Wilson 95 % intervals.")}  # fmt: skip


STUDY = Study(
    "sign", "The sign test",
    "Adds, at one place, a write with the native key and a value that points at a token by the head's output map and "
    "the unembedding, and counts how often that token becomes likelier; beside it another token's direction and a "
    "random one.",
    (
        Claim("sign.right", "A write that points at a token raises it.", "84.6 % of 2,000", "other model; its sources "
              "state no null"),
        Claim("sign.size", "It raises the token's log-probability by more than a nat.", "+1.27 nats",
              "other model; the verdict is on the sign, above both nulls"),
    ),
    {
        "passages": Setting(64, 12, "passages of test text"),
        "places": Setting(384, 48, "places of each head with a dictionary"),
        "magnitude": Setting(3.0, 3.0, "m: norm of the write, in units of the native one's"),
    },
    run,
    needs="",
)  # fmt: skip
