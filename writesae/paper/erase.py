"""Erase: does deleting the writes at which an atom fires take away the token that the atom prefers?

An atom's preferred token is the one whose log-probability falls most, on average, where its firings' writes are deleted
in validation text; test text then says by how much it falls there. Beside it stand a random token at the same places,
and the same token where the writes of another atom's firings are deleted. The other way round, doses of the atom are
added where it does not fire.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..experiments.engine import Clean, ForkEngine, read
from ..experiments.statistics import proportion, wilcoxon
from ..sae import SAE
from . import forks
from .lab import Lab, Site
from .measures import above, mean, spans
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

CONTROLS = ("own", "random_token", "other_feature")


def run(lab: Lab) -> Findings:
    given = forks.all_sites(lab)
    chosen = lab.units(given, lambda name: _choose(lab, *given[name]), "tokens")
    numbered = dict(zip(given, range(len(given)), strict=True))
    erased = join(lab.units(given, lambda name: _numbered(_erase(lab, *given[name], chosen[numbered[name]]),
                                                          numbered[name]), "erase"))  # fmt: skip
    doses = join(lab.units(given, lambda name: _numbered(_dose(lab, *given[name], chosen[numbered[name]]),
                                                         numbered[name]), "dose"))  # fmt: skip
    if not erased:
        raise ValueError(f"saes: expected features with {lab['least']} firings on the validation text, got none")
    statistics: dict[str, Any] = {
        "horizon": lab["horizon"], "sites": list(given), "atoms": len(np.unique(_label(erased))),
        "of": "change of log-probability, mean of the tokens after the edited one, in nats",
        "erase": {name: _effect(erased, name, lab.seed) for name in CONTROLS},
        "erase_against": {name: _against(erased, name, lab.seed) for name in CONTROLS[1:]},
        "features_falling": proportion(_by_feature(erased, erased["own"]) < 0, "atoms whose token falls on average"),
        "dose": {}, "dose_against": {},
    }  # fmt: skip
    for dose in lab["doses"]:
        part = forks.some(doses, np.isclose(doses["dose"], dose))
        statistics["dose"][f"{dose:g}"] = {name: _effect(part, name, lab.seed) for name in CONTROLS}
        statistics["dose_against"][f"{dose:g}"] = {name: _against(part, name, lab.seed) for name in CONTROLS[1:]}
    rises = np.stack([_by_feature(doses, doses["own"], np.isclose(doses["dose"], dose)) for dose in lab["doses"]])
    statistics["dose_response"] = proportion(
        np.asarray((np.diff(rises, axis=0) > 0).all(0)), "atoms whose token rises with every larger dose"
    )
    return Findings(
        statistics, {"erase": erased, "dose": doses}, _figures(statistics, lab["doses"]), _answers(lab, statistics), [
            "The preferred token is chosen on validation text; all effects are of test text.",
            "Writes are deleted, and doses added, after the token has read the state; tokens after it are followed.",
            f"Of each dictionary, the {lab['atoms']} atoms that have the largest code most often in validation text.",
            "The number in column `site` counts the sites under `sites` of the summary.",
        ])  # fmt: skip


def _numbered(table: dict[str, np.ndarray], site: int) -> dict[str, np.ndarray]:
    return {"site": np.full(len(next(iter(table.values()), ())), site), **table}


def _choose(lab: Lab, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    """feature, token (the preferred one), random (a token), code (median): of the atoms that are tested."""
    ids = lab.whole("validation", lab["passages"])
    rng = lab.rng("erase", *site)
    table = forks.followed(forks.top_table(lab, ids, site, sae), ids.shape[1], lab["horizon"])
    counts = np.bincount(table["feature"], minlength=sae.F)
    features = np.argsort(-counts, kind="stable")[: lab["atoms"]]
    features = features[counts[features] >= lab["least"]]
    engine = ForkEngine(lab.model, site[0], lab["horizon"], read="after")
    every = [forks.drawn(forks.some(table, table["feature"] == f), lab["learned"], rng) for f in features]
    if not every:
        return {name: np.zeros(0, int) for name in ("feature", "token", "random", "code")}
    mine, which = join(every), torch.from_numpy(np.repeat(np.arange(len(every)), [len(x["row"]) for x in every]))
    total = torch.zeros(len(every), engine.stack.vocabulary)
    for index, clean in forks.forks(engine, ids, mine["row"], mine["position"], site[1]):
        total.index_add_(0, which[index], _shift(engine, clean, {"delete": _deleted(clean)})["delete"].cpu())
    special = sorted(set(lab.tokenizer.all_special_ids))
    total[:, special] = torch.inf
    ordinary = np.setdiff1d(np.arange(len(lab.tokenizer)), special)
    return {
        "feature": features, "token": total.argmin(1).numpy(), "random": rng.choice(ordinary, len(features)),
        "code": np.array([np.median(x["code"]) for x in every]),
    }  # fmt: skip


def _deleted(clean: Clean) -> Tensor:
    return -read(clean, clean.left, clean.right)


def _shift(engine: ForkEngine, clean: Clean, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`[n, vocabulary]` of each edit: change of log-probabilities, mean over the tokens that follow."""
    hidden = engine.run(clean, {"clean": None, **deltas})
    base = forks.log_probs(engine, hidden.pop("clean"))
    return {name: (forks.log_probs(engine, x) - base).mean(1) for name, x in hidden.items()}


def _erase(lab: Lab, site: Site, sae: SAE, chosen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = lab.whole("test", lab["passages"])
    rng = lab.rng("erased", *site)
    table = forks.followed(forks.top_table(lab, ids, site, sae), ids.shape[1], lab["horizon"])
    every = [forks.drawn(forks.some(table, table["feature"] == f), lab["firings"], rng) for f in chosen["feature"]]
    which = np.repeat(np.arange(len(every)), [len(x["row"]) for x in every])
    if not len(which):
        return {}
    table = join(every)
    engine = ForkEngine(lab.model, site[0], lab["horizon"], read="after")
    # The writes that stand for another feature are those of the next one of the list: a cycle through all of them.
    other = (which - 1) % len(every)
    out = {name: np.zeros(len(which)) for name in CONTROLS}
    for index, clean in forks.forks(engine, ids, table["row"], table["position"], site[1]):
        shift = _shift(engine, clean, {"delete": _deleted(clean)})["delete"].cpu().numpy()
        n = np.arange(len(index))
        out["own"][index] = shift[n, chosen["token"][which[index]]]
        out["random_token"][index] = shift[n, chosen["random"][which[index]]]
        out["other_feature"][index] = shift[n, chosen["token"][other[index]]]
    places = {name: table[name] for name in ("row", "position", "feature")}
    return {**places, "of_other": chosen["feature"][other], "token": chosen["token"][which], **out}


def _dose(lab: Lab, site: Site, sae: SAE, chosen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Doses of each atom's median code where it does not fire; other_feature: an atom drawn at random, as large."""
    ids = lab.whole("test", lab["passages"])
    rng, length = lab.rng("dose", *site), ids.shape[1]
    fires = np.zeros((len(chosen["feature"]), *ids.shape), bool)
    for reading in lab.read(ids, {site: sae}):
        fired = reading.firings
        for i, feature in enumerate(chosen["feature"]):
            mine = fired[fired.feature == int(feature)]
            fires[i, mine.row.cpu().numpy() + reading.first, mine.position.cpu().numpy()] = True
    engine = ForkEngine(lab.model, site[0], lab["horizon"], read="after")
    places: dict[str, list] = {name: [] for name in ("row", "position", "which", "other")}
    for i, feature in enumerate(chosen["feature"]):
        row, position = np.nonzero(~fires[i, :, 1 : length - lab["horizon"]])
        at = np.sort(rng.permutation(len(row))[: lab["places"]])
        other = rng.choice(np.setdiff1d(np.arange(sae.F), [feature]))
        for name, x in zip(
            places, (row[at], position[at] + 1, *(np.full(len(at), y) for y in (i, other))), strict=True
        ):
            places[name].append(x)
    if not places["row"]:
        return {}
    table, parts = {name: np.concatenate(x) for name, x in places.items()}, []
    for index, clean in forks.forks(engine, ids, table["row"], table["position"], site[1]):
        which, n = table["which"][index], torch.arange(len(index))
        v, w = forks.atoms(sae, chosen["feature"][which], clean.left)
        p, q = forks.atoms(sae, table["other"][index], clean.left, unit=True)
        code = torch.from_numpy(chosen["code"][which]).to(v)[:, None, None]
        deltas = {f"own {dose}": _added(clean, dose * code * v, w) for dose in lab["doses"]}
        like = p * (code * _norm((v, w))[:, None, None])
        deltas |= {f"other {dose}": _added(clean, dose * like, q) for dose in lab["doses"]}
        shift = {name: found.cpu() for name, found in _shift(engine, clean, deltas).items()}
        for dose in lab["doses"]:
            own, other = shift[f"own {dose}"], shift[f"other {dose}"]
            token, random = (torch.from_numpy(chosen[name][which]) for name in ("token", "random"))
            parts.append({
                "row": table["row"][index], "position": table["position"][index],
                "feature": chosen["feature"][which], "token": token.numpy(), "dose": np.full(len(index), dose),
                "own": own[n, token].double().numpy(), "random_token": own[n, random].double().numpy(),
                "other_feature": other[n, token].double().numpy(),
            })  # fmt: skip
    return join(parts)


def _norm(atom: tuple[Tensor, Tensor]) -> Tensor:
    v, w = atom
    return ((v @ v.mT) * (w @ w.mT)).sum((1, 2)).clamp_min(0).sqrt()


def _added(clean: Clean, v: Tensor, w: Tensor) -> Tensor:
    """`[n, L, V]`: change of the head's output by `sum_r v w^T` (v `[n, r, K]`, w `[n, r, V]`) added to the state."""
    return torch.stack([read(clean, v[:, r], w[:, r]) for r in range(v.shape[1])]).sum(0)


# ---- statistics ---------------------------------------------------------------------------------------------------


def _label(table: dict[str, np.ndarray], name: str = "feature") -> np.ndarray:
    return (table["site"].astype(np.int64) << 32) + table[name]


def _effect(table: dict[str, np.ndarray], name: str, seed: int) -> dict:
    return mean(table[name], _label(table), "feature", seed)


def _against(table: dict[str, np.ndarray], name: str, seed: int) -> dict:
    """Own less control, of each token, with a bootstrap over features and Wilcoxon's test of the features' means."""
    if name == "other_feature" and "of_other" in table:  # of other places: one mean a token
        label, stranger = _label(table), _label(table, "of_other")
        shared = np.intersect1d(label, stranger)
        if not len(shared):
            raise ValueError("saes: expected two atoms of a dictionary that fire on the test text, got one of each")
        own = np.array([table["own"][label == x].mean() for x in shared])
        control = np.array([table[name][stranger == x].mean() for x in shared])
        clusters = shared
    else:
        label = _label(table)
        clusters = np.unique(label)
        own, control = (np.array([table[key][label == x].mean() for x in clusters]) for key in ("own", name))
    return {**mean(own - control, clusters, "feature", seed), "wilcoxon": wilcoxon(own, control)}


def _by_feature(table: dict[str, np.ndarray], values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    label = _label(table)
    mask = np.ones(len(label), bool) if mask is None else mask
    return np.array([values[mask & (label == x)].mean() for x in np.unique(label)])


def _answers(lab: Lab, statistics: dict[str, Any]) -> list[Answer]:
    own, control = statistics["erase"]["own"], statistics["erase_against"]["other_feature"]
    erase, random = statistics["erase"]["other_feature"]["mean"], statistics["erase"]["random_token"]["mean"]
    low, high = control["ci95"]
    dose = f"{max(lab['doses']):g}"
    rise, against = statistics["dose"][dose], statistics["dose_against"][dose]["other_feature"]
    return [
        Answer(
            "erase.token", f"{own['mean']:+.4f} nats at {own['n']} firings; {control['mean']:+.4f} less than where "
            "another atom's writes are deleted", control["n"], "atoms", (low, high),
            f"deleting another atom's writes moves the token by {erase:+.4f} nats, a random token moves by "
            f"{random:+.4f}", above((-high, -low), 0),
        ),
        Answer(
            "erase.dose", f"{rise['own']['mean']:+.4f} nats at {dose} times the usual code; {against['mean']:+.4f} "
            "more than by another atom of the same size", against["n"], "atoms", tuple(against["ci95"]),
            f"another atom of the same size moves it by {rise['other_feature']['mean']:+.4f} nats, a random token "
            f"moves by {rise['random_token']['mean']:+.4f}", above(against["ci95"], 0),
        ),
    ]  # fmt: skip


def _figures(statistics: dict[str, Any], doses) -> dict[str, Figure]:
    names = {"own": ("atom", "its token"), "random_token": ("random", "a random token"),
             "other_feature": ("delete", "its token, another atom")}  # fmt: skip

    def erase(axes, colours):
        for i, (name, (colour, _)) in enumerate(names.items()):
            found = statistics["erase"][name]
            low, high = found["ci95"]
            axes.errorbar([found["mean"]], [i], xerr=[[found["mean"] - low], [high - found["mean"]]], fmt="o",
                          color=colours[colour])  # fmt: skip
        axes.axvline(0, color=colours["line"], lw=0.8)
        axes.set_yticks(range(3), [label for _, label in names.values()])
        axes.set(ylim=(2.5, -0.5), xlabel="change of log-probability when the write is deleted, nats")

    def dose(axes, colours):
        for name, (colour, label) in names.items():
            found = [statistics["dose"][f"{d:g}"][name] for d in doses]
            middle, spread = spans(found)
            axes.errorbar(doses, middle, spread, fmt="o-", ms=4, lw=1.3, color=colours[colour], label=label)
        axes.axhline(0, color=colours["line"], lw=0.8)
        axes.set(xlabel="dose, in units of the atom's usual code", ylabel="change of log-probability, nats")
        axes.legend()

    return {
        "erase": Figure(erase, "Deleting the writes of an atom's firings: what happens to the token chosen for it on "
                        "other text, with 95 % intervals over atoms.", (5.6, 2.2)),
        "dose": Figure(dose, "Adding the atom where it does not fire, by dose, with 95 % intervals over atoms."),
    }  # fmt: skip


STUDY = Study(
    "erase", "Erase, and dose response",
    "Deletes the writes at an atom's firings and asks what becomes of the token that the atom prefers, a token chosen "
    "on other text; then adds doses of the atom where it does not fire. A random token, and other atoms, are controls.",
    (
        Claim("erase.token", "Deleting the writes at an atom's firings lowers the token it prefers, more than deleting "
              "another atom's.", "–", "its sources define neither the choice of the token nor a control"),
        Claim("erase.dose", "Adding the atom where it does not fire raises its token, more than another atom does.",
              "–", "its sources give no number with a control"),
    ),
    {
        "passages": Setting(96, 12, "passages of validation and of test text"),
        "atoms": Setting(12, 4, "atoms of each dictionary, the most frequent in validation text"),
        "least": Setting(12, 3, "validation firings that an atom needs"),
        "learned": Setting(32, 8, "validation firings of which its token is learned"),
        "firings": Setting(32, 8, "test firings of each atom"),
        "places": Setting(16, 4, "places of each atom at which doses are added"),
        "doses": Setting((0.5, 1.0, 2.0, 4.0), (1.0, 4.0), "doses, in units of the atom's median code"),
        "horizon": Setting(4, 2, "tokens followed"),
    },
    run,
    needs="",
)  # fmt: skip
