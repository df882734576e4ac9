"""A write along the direction of a token: does that token's probability move by the sign of the write?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..atoms import direction_to
from ..experiments.engine import Clean, ForkEngine, Places, read
from ..experiments.statistics import proportion
from .lab import Lab, Site
from .measures import above, mean, percent
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

ARMS = ("own", "negative", "other", "random")


def run(lab: Lab) -> Findings:
    sites = sorted({*lab.saes, *lab.writes})
    if not sites:
        raise ValueError("saes: sign takes dictionaries, whose heads are tested, got none")
    strata = lab["strata"]
    if len(strata) < 2 or list(strata) != sorted(set(strata)) or not 0 <= strata[0] < strata[-1] <= 1:
        raise ValueError(f"strata: expected rising shares of the vocabulary, from 0 to 1, got {strata}")
    ids = lab.whole("test", lab["passages"], lab["context"])

    def make(key: tuple[int, int, int]) -> dict[str, np.ndarray]:
        layer, head, first = key
        return join(list(_forks(lab, ids[first : first + lab["batch"]], (layer, head), first)))

    keys = [(*site, first) for site in sites for first in range(0, len(ids), lab["batch"])]
    table = join(lab.units(keys, make, "forks"))
    statistics: dict[str, Any] = {"strata": [], "sites": {}}
    for stratum in range(len(strata) - 1):
        some = _where(table, table["stratum"] == stratum)
        share = f"{100 * strata[stratum]:g} to {100 * strata[stratum + 1]:g} % of the vocabulary"
        statistics["strata"].append({"rank": share, **signs(some, lab.seed)})
    first = _where(table, table["stratum"] == 0)
    for layer, head in sites:
        mine = (first["layer"] == layer) & (first["head"] == head)
        statistics["sites"][f"{layer}:{head}"] = signs(_where(first, mine), lab.seed)
    return Findings(statistics, {"forks": table}, _figures(statistics), _answers(statistics["strata"][0]), [
        "The addition is m times as large as the token's own write, along the key of that token; its direction is that "
        "of the head's output that raises the target's logit by the direct path. It is made before the token reads the "
        "state, and measured on the next token; `later` columns are of the token after.",
        "Answers are of the first stratum of ranks, as shares of the vocabulary: 100 to 1000 of 248,320, as the "
        "paper's, are 2 to 16 of 4,096.",
    ])  # fmt: skip


def _forks(lab: Lab, ids: Tensor, site: Site, first: int) -> Iterator[dict[str, np.ndarray]]:
    """Tables of one head's forks in passages `[P, T]`, a stratum at a time."""
    (layer, head), rng = site, lab.rng("forks", *site, first)
    engine = ForkEngine(lab.model, layer, horizon=1)
    P, T = ids.shape
    each = min(lab["each"], T - 10)
    if each < 1:
        raise ValueError(f"context: expected more than 10 tokens a passage, got {T}")
    position = np.sort(np.stack([8 + rng.permutation(T - 10)[:each] for _ in range(P)]), 1)
    row = np.repeat(np.arange(P), each)
    places = Places(*(torch.from_numpy(x.astype(np.int64)) for x in (row, position.ravel(), np.full(len(row), head))))
    clean = engine.clean(ids, torch.full((P,), T), lambda writes: places)
    plain = _log_p(engine, clean, {"plain": None})["plain"]
    order = plain[:, 0].argsort(-1, descending=True).cpu().numpy()
    strata = lab["strata"]
    for stratum in range(len(strata) - 1):
        low, high = (int(round(x * order.shape[1])) for x in strata[stratum : stratum + 2])
        rank = rng.integers(low, max(high, low + 1), len(row))
        target = order[np.arange(len(row)), rank]
        deltas = additions(lab.model, clean, site, target, lab["m"], rng)
        log_p = _log_p(engine, clean, deltas)
        at = torch.from_numpy(target).to(plain.device)[:, None, None].expand(-1, plain.shape[1], 1)
        out = {"layer": np.full(len(row), layer), "head": np.full(len(row), head), "passage": first + row,
               "position": position.ravel(), "stratum": np.full(len(row), stratum), "token": target,
               "rank": rank + 1}  # fmt: skip
        for arm, x in log_p.items():
            change = (x - plain).gather(2, at)[..., 0].cpu().numpy()  # [n, 2]
            out |= {arm: change[:, 0], f"{arm}_later": change[:, 1]}
        yield out


def _log_p(engine: ForkEngine, clean: Clean, deltas: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """{name: `[n, L, vocabulary]` log-probabilities}, in float64."""
    hidden = engine.run(clean, deltas)
    return {name: engine.logits(x).double().log_softmax(-1) for name, x in hidden.items()}


def additions(
    model, clean: Clean, site: Site, target: np.ndarray, m: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """{arm: `[n, L, V]` change of the head's output} of m times a write along each target's direction, `target [n]`.

    "negative" is the same with m negative, "other" along the direction of another fork's target, "random" a Gaussian
    one.
    """
    own = torch.stack([direction_to(model, *site, int(token)) for token in target]).to(clean.right)
    size = m * clean.left.norm(dim=1) * clean.right.norm(dim=1)
    left = size[:, None] * normalize(clean.left, dim=1)
    # Another target: the fork half the table on, or the next that has another token.
    n, other = len(target), np.arange(len(target))
    for i in range(n):
        steps = (i + n // 2 + np.arange(n)) % n
        other[i] = next((j for j in steps if target[j] != target[i]), i)
    random = normalize(torch.from_numpy(rng.standard_normal(own.shape)).to(own), dim=1)
    return {
        "own": read(clean, left, own), "negative": read(clean, -left, own),
        "other": read(clean, left, own[torch.from_numpy(other).to(own.device)]), "random": read(clean, left, random),
    }  # fmt: skip


def _where(table: Mapping[str, np.ndarray], mine: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[mine] for name, column in table.items()}


def signs(table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Of each arm: the share of forks in which the target's log-probability moved by the addition's sign, with its
    Wilson interval and one by passage, and the mean move; and how much more often and further than another token's
    direction moves it."""
    by, out = (table["passage"], "passage", seed), {}
    for arm in (*ARMS, *(f"{arm}_later" for arm in ARMS)):
        right = table[arm] < 0 if arm.startswith("negative") else table[arm] > 0
        found = proportion(right, "share of right signs, Wilson 95 % interval")
        out[arm] = {**found, "ci95_by_passage": mean(right, *by)["ci95"], "move": mean(table[arm], *by)}
    for null in ("other", "random"):
        more = (table["own"] > 0).astype(np.float64) - (table[null] > 0)
        out[f"own_over_{null}"] = {"share": mean(more, *by), "move": mean(table["own"] - table[null], *by)}
    return out


def _answers(found: dict[str, Any]) -> list[Answer]:
    own, over = found["own"], found["own_over_other"]
    verdicts = {above(own["ci95_by_passage"], 0.5), above(over["share"]["ci95"], 0)}
    verdict = next(x for x in ("does not hold", "cannot be told", "holds") if x in verdicts)
    rates = {arm: f"{100 * found[arm]['rate']:.1f} %" for arm in ARMS}
    moves = {arm: found[arm]["move"]["mean"] for arm in ARMS}
    return [
        Answer(
            "sign.share", rates["own"], own["n"], "forks", percent(own["ci95_by_passage"]),
            f"another token's direction raises it at {rates['other']}, a random one at {rates['random']}; the negative "
            f"lowers it at {rates['negative']}", verdict,
        ),
        Answer(
            "sign.size", f"{over['move']['mean']:+.4f} nats more than another token's direction (own "
            f"{moves['own']:+.4f})", own["n"], "forks", tuple(over["move"]["ci95"]),
            f"another token's direction {moves['other']:+.4f} nats, a random one {moves['random']:+.4f}",
            above(over["move"]["ci95"], 0),
        ),
    ]  # fmt: skip


def _figures(statistics: dict[str, Any]) -> dict[str, Figure]:
    strata = statistics["strata"]
    words = {"own": "its own direction", "other": "another token's", "random": "a random one"}

    def paint(axes, colours):
        at = np.arange(len(strata))
        for shift, (arm, label), colour in zip(
            (-0.15, 0, 0.15), words.items(), ("atom", "delete", "random"), strict=True
        ):
            value = np.array([x[arm]["rate"] for x in strata])
            low, high = np.array([x[arm]["ci95_by_passage"] for x in strata]).T
            error = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
            axes.errorbar(at + shift, value, yerr=error, fmt="o", ms=5, color=colours[colour], label=label)
        axes.axhline(0.5, color=colours["line"], lw=0.9, ls=(0, (4, 3)))
        axes.set(ylabel="share of forks that raise the target", ylim=(0, 1), xlim=(-0.5, len(strata) - 0.5))
        axes.set(xlabel="native rank of the target, % of the vocabulary")
        axes.set_xticks(at, [x["rank"].removesuffix(" % of the vocabulary") for x in strata])
        axes.legend(loc="lower left")

    return {"sign": Figure(paint, "Share of one-place writes that raise the log-probability of their target, by its "
                           "native rank, with 95 % intervals over passages. A direction that does nothing of its own "
                           "lies on the dashed line.")}  # fmt: skip


STUDY = Study(
    "sign", "The sign of a write",
    "At one token, a write along the direction that should raise a target token is added to a head's state, in units "
    "of the head's own write. Does the target become more likely, and more so than by the direction of another token?",
    (
        Claim("sign.share", "A write along a token's direction makes the token more likely.", "84.6 % of 2,000"),
        Claim("sign.size", "It does so by more than the direction of another token would.", "+1.27 nats",
              "its sources give the own direction's move; tested here is how much more that is than another's"),
    ),
    {
        "passages": Setting(128, 8, "passages of test text"),
        "context": Setting(256, 96, "tokens a passage"),
        "each": Setting(4, 4, "places tested a passage and head"),
        "m": Setting(3.0, 3.0, "size of the addition, in norms of the token's own write"),
        "strata": Setting((0.0004, 0.004, 0.024, 0.24), (0.0004, 0.004, 0.024, 0.24),
                          "edges of the strata of native ranks, as shares of the vocabulary"),
        "batch": Setting(8, 8, "passages at a time"),
    },
    run,
    needs="",
)  # fmt: skip
