"""Who reads an atom: how much of its effect goes away when one block above does not see it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..experiments.conditions import BASELINE
from ..experiments.engine import ForkEngine, Places, read
from ..experiments.firing import check_sae, sample, top_codes
from ..experiments.nulls import random_factors
from ..sae import SAE
from .lab import Lab, Site
from .measures import ratio, spans
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

ARMS = ("atom", "random", "write")


class Frozen:
    """Blocks that do not see a change: each adds to the stream what it adds in the run that was recorded.

        with Frozen(blocks) as frozen:
            frozen.record()         # ... a run without the change
            frozen.freeze({5})      # ... one with it: block 5 passes the change on, and does not answer to it

    Args:
        blocks: {number: module}, each of which takes and returns the hidden states.
    """

    def __init__(self, blocks: Mapping[int, nn.Module]):
        self._blocks = dict(blocks)
        self._clean: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[int, Tensor] = {}
        self._records, self._at = False, frozenset[int]()

    def __enter__(self) -> Frozen:
        self._hooks = [
            block.register_forward_hook(partial(self._hook, i), with_kwargs=True) for i, block in self._blocks.items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def record(self) -> None:
        """From now on keeps what goes in and comes out."""
        self._records, self._at = True, frozenset()

    def freeze(self, blocks) -> None:
        """From now on these answer as recorded, the others to what they get."""
        self._records, self._at = False, frozenset(blocks)

    def result(self, out: Tensor) -> Tensor:
        """What the last block returned in the latest run, where `out` is what it would have without this."""
        last = max(self._blocks, default=-1)
        return self._made[last] if last in self._at else out

    def _hook(self, number: int, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(out, tuple) and any(isinstance(other, Tensor) for other in out[1:]):
            raise ValueError(
                f"model: expected blocks that return their hidden states alone, got {type(module).__name__}, which "
                "returns more; which of its readers answer cannot be told"
            )
        if self._records:
            self._clean[number] = x, y
        elif number in self._at:
            before, after = self._clean[number]
            y = self._made[number] = after + (x - before)
            return y if not isinstance(out, tuple) else (y, *out[1:])
        return None


def run(lab: Lab) -> Findings:
    given = [(target, site, sae) for target, saes in (("state", lab.saes), ("write", lab.writes))
             for site, sae in saes.items()]  # fmt: skip
    given = [x for x in given if x[2].rank_one_atoms]
    if not given:
        raise ValueError("saes: readers takes dictionaries with outer-product atoms, got none")
    if lab["sites"]:
        given = given[: lab["sites"]]
    named = {f"{target}-{layer}-{head}": (target, (layer, head), sae) for target, (layer, head), sae in given}
    parts = lab.units(named, lambda name: _site(lab, *named[name]), "site")
    table = join(parts)
    statistics: dict[str, Any] = {"firings": int((table["frozen"] == "none").sum()), "sites": {}}
    for target, (layer, head), _ in given:
        mine = (table["target"] == target) & (table["layer"] == layer) & (table["head"] == head)
        statistics["sites"][f"{target} {layer}:{head}"] = shares({c: x[mine] for c, x in table.items()}, lab.seed)
    direct = _pooled(table, "all", lab.seed)
    first = _pooled(table, "next", lab.seed)
    statistics["direct"], statistics["first_above"] = direct, first
    return Findings(statistics, {"forks": table}, {"readers": _figure(statistics["sites"])}, [
        _answer("readers.above", {arm: _less(x) for arm, x in direct.items()}),
        _answer("readers.first", {arm: _less(x) for arm, x in first.items()}),
    ], [
        "A frozen block adds to the stream what it adds without the change, so that the change passes it and is not "
        "answered. The edited block's own later parts always answer. Shares need not add up to one: readers may work "
        "together, or against each other.",
        "The number of a claim is the share of the KL that goes away when these blocks do not answer, every site "
        "counting alike. The change takes the atom out of the state, at the size of its code; `random` is a random "
        "outer product of the same size, `write` takes the model's own write out.",
    ])  # fmt: skip


@torch.no_grad()
def _site(lab: Lab, target: str, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    """KL of every firing, arm and set of frozen blocks: the mean over the tokens after it."""
    layer, head = site
    engine = ForkEngine(lab.model, layer, lab["horizon"], "after")
    check_sae(sae, engine.site, layer, head)
    above = {i: block for i, block in enumerate(engine.stack.blocks) if i > layer}
    frozen_sets = {"none": (), "all": tuple(above), **{str(i): (i,) for i in above}}
    ids, parts = lab.whole("test", lab["passages"]), []
    for lo in range(0, len(ids), 8):
        batch = ids[lo : lo + 8]
        lengths = [batch.shape[1]] * len(batch)
        chosen: list[tuple[int, int, int, float]] = []

        def choose(writes, lo=lo, lengths=lengths, chosen=chosen):
            feature, value = (x.cpu() for x in top_codes(writes, sae, head))
            names = [f"{target}/{layer}:{head}/{lo + p}" for p in range(len(lengths))]
            for p, t in sample(feature, value, lengths, names, lab["each"], lab["horizon"], None, lab.seed):
                chosen.append((p, t, int(feature[p, t]), float(value[p, t])))
            row, position = torch.tensor([x[:2] for x in chosen or [(0, 0)]]).unbind(1)
            return Places(row, position, torch.full_like(row, head))

        clean = engine.clean(batch, torch.tensor(lengths), choose)
        if not chosen:
            continue
        v, w = (x[[f for _, _, f, _ in chosen]].to(clean.left) for x in sae.atoms())
        code = torch.tensor([a for *_, a in chosen]).to(clean.left)
        gram = (v @ v.mT) * (w @ w.mT)
        size = code * gram.sum((1, 2)).clamp_min(0).sqrt()
        p, q = random_factors([f"{target}/{site}/{lo + r}@{t}" for r, t, *_ in chosen], v[:, 0], w[:, 0], lab.seed)
        change: dict[str, Tensor | None] = {
            "atom": torch.stack([read(clean, -code[:, None] * v[:, r], w[:, r]) for r in range(v.shape[1])]).sum(0),
            "random": read(clean, size[:, None] * p, q), "write": read(clean, -clean.left, clean.right),
        }  # fmt: skip
        with Frozen(above) as frozen:
            frozen.record()
            baseline = engine.run(clean, {BASELINE: None})
            row, position, feature = (np.array(x) for x in list(zip(*chosen, strict=True))[:3])
            n = len(chosen)
            for name, blocks in frozen_sets.items():
                frozen.freeze(blocks)
                changed = {arm: frozen.result(engine.run(clean, {arm: x})[arm]) for arm, x in change.items()}
                frozen.freeze(())  # logits go through the blocks' doors, too
                found = engine.divergences(clean, {**baseline, **changed}, BASELINE)
                same = {"target": np.full(n, target, object), "layer": np.full(n, layer), "head": np.full(n, head),
                        "passage": lo + row, "position": position, "feature": feature,
                        "frozen": np.full(n, name, object)}  # fmt: skip
                for arm in ARMS:
                    kl = found[arm][0].mean(1).cpu().numpy()
                    parts.append({**same, "arm": np.full(n, arm, object), "kl": kl})
    if not parts:
        raise ValueError(f"saes: expected the dictionary of {target}s at {site} to fire on the test text, it never did")
    return join(parts)


def shares(table: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """{arm: {frozen: KL with these blocks frozen over the KL with none}}, with intervals over passages."""
    out: dict[str, Any] = {}
    for arm in ARMS:
        own = table["arm"] == arm
        full = table["kl"][own & (table["frozen"] == "none")]
        cluster = table["passage"][own & (table["frozen"] == "none")]
        out[arm] = {"kl_mean": float(full.mean())} | {
            name: ratio(table["kl"][own & (table["frozen"] == name)], full, cluster, "passage", seed)
            for name in dict.fromkeys(table["frozen"][own].tolist()) if name != "none"
        }  # fmt: skip
    return out


def _pooled(table: Mapping[str, np.ndarray], which: str, seed: int) -> dict[str, dict]:
    """{arm: ratio} over all sites, each firing's KL over the mean of its site and arm, so that sites count alike."""
    out = {}
    site = np.array([f"{t} {a}:{b}" for t, a, b in zip(table["target"], table["layer"], table["head"], strict=True)])
    for arm in ARMS:
        over, below, cluster = [], [], []
        for label in np.unique(site):
            mine = (site == label) & (table["arm"] == arm)
            name = str(table["layer"][mine][0] + 1) if which == "next" else which
            some, full = (table["kl"][mine & (table["frozen"] == x)] for x in (name, "none"))
            if len(some):
                over.append(some / full.mean())
                below.append(full / full.mean())
                cluster.append(table["passage"][mine & (table["frozen"] == "none")])
        if over:
            out[arm] = ratio(np.concatenate(over), np.concatenate(below), np.concatenate(cluster), "passage", seed)
    return out


def _less(x: dict) -> dict:
    """One less a ratio."""
    return {**x, "ratio": 1 - x["ratio"], "ci95": [1 - x["ci95"][1], 1 - x["ci95"][0]]}


def _answer(key: str, found: Mapping[str, dict]) -> Answer:
    if not found:
        why = "no dictionary is of a layer with a block above it"
        return Answer(key, "–", 0, "firings", None, "not measured", "cannot be told", why)
    own = found["atom"]
    low, high = own["ci95"]
    return Answer(
        key, f"{100 * own['ratio']:.1f} % of the KL", own["n"], "firings", (100 * low, 100 * high),
        f"of a random outer product of its size {100 * found['random']['ratio']:.1f} %, of the model's own write "
        f"{100 * found['write']['ratio']:.1f} %",
        "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told",
    )  # fmt: skip


def _figure(sites: Mapping[str, dict]) -> Figure:
    def paint(axes, colours):
        names = [(site, name) for site, found in sites.items() for name in found["atom"] if name != "kl_mean"]
        at = np.arange(len(names))[::-1]
        for offset, arm, colour in ((0.2, "atom", "atom"), (0, "random", "random"), (-0.2, "write", "delete")):
            found = [_less(sites[site][arm][name]) for site, name in names]
            value, spread = spans(found, "ratio")
            axes.errorbar(100 * value, at + offset, xerr=100 * spread, fmt="o", ms=4, lw=1, color=colours[colour],
                          label=arm)  # fmt: skip
        axes.axvline(0, color=colours["line"], lw=0.9)
        axes.set_yticks(at, [f"{site}, {'all above' if name == 'all' else f'block {name}'}" for site, name in names])
        axes.tick_params(axis="y", labelsize=7)
        axes.set(xlabel="share of the effect that goes away when frozen, %")
        axes.legend()

    height = 1.2 + 0.22 * sum(len(found["atom"]) - 1 for found in sites.values())
    return Figure(
        paint,
        "How much of an atom's effect on later tokens goes away when a block above does not answer to "
        "it, beside a random outer product of its size and the model's own write.",
        (6.4, max(height, 2.6)),
    )


STUDY = Study(
    "readers", "Who reads an atom",
    "An atom is taken out of the state, the text goes on as it is, and one block above is kept from answering to the "
    "change. What of the effect on later tokens then goes away is that block's part.",
    (
        Claim("readers.above", "Blocks above read an atom: its effect is not the direct path's alone.", "–",
              "its sources name the analysis, not its numbers"),
        Claim("readers.first", "The first block above is one of its readers.", "–",
              "its sources name the analysis, not its numbers"),
    ),
    {
        "sites": Setting(0, 2, "dictionaries looked at, the first ones; 0 is all"),
        "passages": Setting(150, 12, "passages of test text"),
        "each": Setting(8, 3, "firings a passage"),
        "horizon": Setting(8, 4, "tokens followed after the change"),
    },
    run,
    needs="",
)  # fmt: skip
