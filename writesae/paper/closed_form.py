"""How well does a closed form predict the change of logits that an atom, added to a state, makes later?

What is added at token t is S_t += eps A_i, of unit Frobenius norm, after t has read. At t + h the head's output changes
by exactly (p_h . q_h) w_i, with p_h the key side as the recurrence carries it. Four predictions of the logits' change:

| version | propagation | path to the logits | what it tests |
|---|---|---|---|
| gate | product of the gates alone | direct: gate, norm, output map, final norm, unembedding | the paper's formula |
| direct | exact | direct | how much goes by the layers above |
| exact | exact | the derivative of everything above | linearity of the model in eps |
| fitted | one number fitted for each (place, read, token) over all eps | | linearity in eps and nothing else |

Derivatives are forward-mode, through the blocks above the layer, on the forks of `experiments.engine`.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..edits import Edits
from ..experiments.engine import Clean, ForkEngine, reader
from ..experiments.statistics import ClusterBootstrap, explained
from ..models.attach import attach
from ..models.directions import head_projection
from ..models.seam import intercept
from ..sae import SAE
from . import forks
from .lab import Lab, Site
from .study import Answer, Claim, Figure, Findings, Setting, Study, join

VERSIONS = ("gate", "direct", "exact", "fitted", "other")
_SMALL = 0.3  # eps up to which the exact version is asked to hold
_CHECKED, _STEP = 24, 1e-4  # tokens of the passages of the float64 check, and its finite difference


def run(lab: Lab) -> Findings:
    ids = lab.whole("test", lab["passages"])
    given = forks.all_sites(lab)
    parts = lab.units(given, lambda name: _site(lab, ids, *given[name]), "shifts")
    table = join([{**part, "site": np.full(len(part["row"]), i)} for i, part in enumerate(parts)])
    kinds = {
        kind: [i for i, (_, sae) in enumerate(given.values()) if sae.target == kind] for kind in ("state", "write")
    }
    pooled = {f"{kind}s": _statistics(lab, forks.some(table, np.isin(table["site"], which)))
              for kind, which in kinds.items() if which}  # fmt: skip
    statistics: dict[str, Any] = {
        "tokens": list(lab["tokens"]), "epsilons": list(lab["epsilons"]), "horizon": lab["horizon"],
        "of": "change of raw logits of the tokens with the largest clean logits at the reading place",
        "sites": {name: _statistics(lab, part) for name, part in zip(given, parts, strict=True)},
        **pooled,
    }  # fmt: skip
    if lab["checked"]:
        found = lab.units(given, lambda name: exactness(lab, *given[name]), "float64")
        error = np.concatenate([x["error"] for x in found])
        statistics["float64"] = {
            "statistic": "largest difference of the layer's whole output, exact propagation against central finite "
            "difference in float64, as a share of its largest change", "n": len(error), "max": float(error.max()),
        }  # fmt: skip
    rows = {name: column for name, column in table.items() if column.ndim == 1}
    sizes = np.linspace(0, len(rows["row"]) - 1, min(len(rows["row"]), 20000)).astype(int)
    first = next(iter(pooled))
    mine = forks.some(table, np.isin(table["site"], next(which for which in kinds.values() if which)))
    return Findings(
        statistics, {"shifts": forks.some(rows, np.unique(sizes))}, _figures(pooled[first], lab["epsilons"], mine),
        _answers(lab, pooled[first]), [
            f"Answers and figures are of the dictionaries of {first}; each one's own statistics are under `sites`. How "
            "far a head is linear in eps differs by head, with the size of its state.",
            "Atoms are scaled to a Frobenius norm of 1, so eps is the norm of what is added to the state.",
            "The CSV holds at most 20,000 shifts, evenly taken; statistics are of all.",
            "R^2 is 1 less the squared error over the variance of the measured shifts, without any fit; below 0 where "
            "predicting the mean shift would do better.",
        ])  # fmt: skip


# ---- predictions and measurements ---------------------------------------------------------------------------------


def _site(lab: Lab, ids: Tensor, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    layer, head = site
    rng = lab.rng("closed form", *site)
    table = forks.followed(forks.top_table(lab, ids, site, sae), ids.shape[1], lab["horizon"])
    table = forks.drawn(table, lab["firings"], rng)
    if not len(table["row"]):
        raise ValueError(f"saes: expected a dictionary that fires on the test text at {site}, got none")
    engine = ForkEngine(lab.model, layer, lab["horizon"], read="after")
    require_rank_one(engine)
    other = rng.integers(sae.F, size=len(table["row"]))
    found = []
    for index, clean in forks.forks(engine, ids, table["row"], table["position"], head):
        query = _queries(lab.model, engine, ids[torch.from_numpy(np.unique(table["row"][index]))], clean)
        atom = forks.atoms(sae, table["feature"][index], clean.left, unit=True)
        shuffled = forks.atoms(sae, other[index], clean.left, unit=True)
        found.append(_shifts(lab, engine, clean, query, atom, shuffled, table["row"][index], table["position"][index]))
    return join(found)


def require_rank_one(engine: ForkEngine) -> None:
    """Raises ValueError where a rank-1 addition does not stay one, or the layer's output map is unknown."""
    if engine.site.binding.gate == "element":
        raise ValueError(
            f"model: the closed form needs a gate a head or a key channel, under which an addition stays rank 1; layer "
            f"{engine.layer} runs the {engine.site.binding.name} with a gate for every entry"
        )
    head_projection(engine.site, 0)


def _shifts(
    lab: Lab, engine: ForkEngine, clean: Clean, query: Tensor, atom, shuffled, row: np.ndarray, position: np.ndarray
) -> dict[str, np.ndarray]:
    """Measured and predicted shifts per unit eps of some places: a row a (place, reading place, token, eps)."""
    epsilons = lab["epsilons"]
    exact = change(clean.reader, *atom)
    deltas: dict[str, Tensor | None] = {"clean": None} | {str(e): e * exact for e in epsilons}
    hidden = engine.run(clean, deltas)
    base = engine.logits(hidden["clean"])
    many = min(max(lab["tokens"]), base.shape[-1])
    top = base.topk(many, -1).indices  # [n, L, m]
    above, direct = slopes(engine, clean, exact, hidden["clean"], top)
    _, gate = slopes(engine, clean, change(query, *atom), hidden["clean"], top)
    other, _ = slopes(engine, clean, change(clean.reader, *shuffled), hidden["clean"], top)
    measured = torch.stack([(engine.logits(hidden[str(e)]) - base).gather(-1, top) for e in epsilons])  # [E, n, L, m]
    scale = torch.tensor(epsilons, dtype=measured.dtype, device=measured.device)
    fitted = torch.einsum("e,enlm->nlm", scale, measured) / scale.square().sum()
    valid = clean.valid.to(top.device)[..., None].expand_as(top)
    n, L, _ = top.shape
    out: dict[str, Tensor] = {
        "measured": measured,
        **{name: scale[:, None, None, None] * slope[None] for name, slope in
           zip(VERSIONS, (gate, direct, above, fitted, other), strict=True)},
        "epsilon": scale[:, None, None, None].expand(measured.shape),
        "rank": torch.arange(1, many + 1).expand(measured.shape),
        "horizon": torch.arange(1, L + 1)[:, None].expand(measured.shape),
        "row": torch.from_numpy(row)[:, None, None].expand(measured.shape),
        "position": torch.from_numpy(position)[:, None, None].expand(measured.shape),
    }  # fmt: skip
    keep = valid.expand(measured.shape).cpu()
    return {name: x.cpu()[keep].numpy() for name, x in out.items()}


def change(readers: Tensor | None, v: Tensor, w: Tensor) -> Tensor:
    """`[n, L, V]`: change of the head's output by atoms v `[n, r, K]`, w `[n, r, V]` under `[n, L, K]` readers."""
    assert readers is not None
    return torch.einsum("nlk,nrk,nrv->nlv", readers, v.to(readers), w.to(readers))


def slopes(engine: ForkEngine, clean: Clean, delta: Tensor, final: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative of the logits of tokens `top [n, L, m]` along a change `[n, L, V]` of the head's output.

    Returns:
        (through everything above, by the direct path alone), `[n, L, m]` each.
    """
    with forward_mode.dual_level(), _output(engine) as written:
        dual = forward_mode.make_dual(torch.zeros_like(delta), delta)
        above = engine.run(clean, {"dual": dual})["dual"]
        through = _tangent(engine.logits(above)).gather(-1, top)
        residual = _tangent(written[-1]).view(final.shape).to(final)
        direct = _tangent(engine.logits(forward_mode.make_dual(final, residual))).gather(-1, top)
    return through, direct


@contextmanager
def _output(engine: ForkEngine):
    """Within: a list that what the layer's output map returns is put into."""
    found: list[Tensor] = []
    assert engine.site.out_proj is not None
    hook = engine.site.out_proj.register_forward_hook(lambda module, args, out: found.append(out))
    try:
        yield found
    finally:
        hook.remove()


def _tangent(x: Tensor) -> Tensor:
    tangent = forward_mode.unpack_dual(x).tangent
    if tangent is None:
        raise RuntimeError("model: expected a derivative through its blocks, got none: one of them stops it")
    return tangent.clone()


def _queries(model, engine: ForkEngine, ids: Tensor, clean: Clean) -> Tensor:
    """`[n, L, K]`: how later tokens would read an addition that gates alone act on (the paper's propagation)."""
    kept: dict[str, Tensor] = {}

    def watch(call, output_final_state):
        kept["query"] = engine.site.binding.queries(call)
        return NotImplemented

    with torch.no_grad(), intercept(model, calls={engine.layer: watch}, private=True):
        model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    places, writes = clean.places, clean.writes
    every = places.position[:, None] + torch.arange(engine.horizon + 1, device=places.position.device)
    rows, heads = places.row[:, None], places.head[:, None]
    query = kept["query"].to(clean.left)[rows, every, writes.left_head(heads)]
    keys = query  # not looked at without an erase
    return reader(query, keys, writes.decay[rows, every, heads].to(query))[:, clean.first :]


# ---- the check in float64 -----------------------------------------------------------------------------------------


def exactness(lab: Lab, site: Site, sae: SAE) -> dict[str, np.ndarray]:
    """Exact propagation, and the derivative of gate, norm and output map, against an edit that is really made.

    Returns:
        error `[n]`: largest absolute difference of the layer's whole output at all later tokens, over its largest
        change.
    """
    model = copy.deepcopy(lab.model).double()
    layer, head = site
    rng = lab.rng("float64", *site)
    ids = lab.whole("test", lab["checked"])[:, :_CHECKED]
    position = rng.integers(1, _CHECKED // 2, len(ids))
    feature = rng.integers(sae.F, size=len(ids))
    engine = ForkEngine(model, layer, _CHECKED - 2, read="after")
    v, w = forks.atoms(sae, feature, torch.zeros((), dtype=torch.float64), unit=True)
    error = np.zeros(len(ids))
    with _Double():
        made = list(forks.forks(engine, ids, np.arange(len(ids)), position, head))
    for index, clean in made:
        delta = change(clean.reader, v[index], w[index])
        with forward_mode.dual_level(), _output(engine) as written, _Double():
            engine.run(clean, {"dual": forward_mode.make_dual(torch.zeros_like(delta), delta)})
            expected = _tangent(written[-1]).view(*delta.shape[:2], -1)
        for i, at in enumerate(index):
            found = _difference(model, engine, ids[at][None], int(position[at]), head, v[at], w[at])
            later = int(clean.valid[i].sum())
            wrong = (found[position[at] + 1 :] - expected[i, :later]).abs().max()
            before = found[: position[at] + 1].abs().max()  # what was read earlier does not change
            error[at] = float(torch.maximum(wrong, before) / expected[i, :later].abs().max())
    return {"error": error}


class _Double(TorchFunctionMode):
    """Within, what a model does in float32 whatever its weights are (norms, gates) stays in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is Tensor.to and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        if kwargs.get("dtype") is torch.float32 and any(
            isinstance(x, Tensor) and x.dtype == torch.float64 for x in args
        ):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _difference(model, engine: ForkEngine, ids: Tensor, position: int, head: int, v: Tensor, w: Tensor) -> Tensor:
    """`[T, hidden]`: central finite difference of the layer's output by an edit `v w^T` (`[r, K]`, `[r, V]`)."""
    found = []
    for sign in (1, -1):
        edits = Edits.add(0, [position] * len(v), head, sign * _STEP * v, w, when="after")
        sites: dict = {(engine.layer, head): None}
        with torch.no_grad(), attach(model, sites, {engine.layer: edits}), _output(engine) as written, _Double():
            model(input_ids=ids, use_cache=False)
        found.append(written[-1].view(ids.shape[1], -1))
    return (found[0] - found[1]) / (2 * _STEP)


# ---- statistics ---------------------------------------------------------------------------------------------------


def _statistics(lab: Lab, table: dict[str, np.ndarray]) -> dict[str, Any]:
    """{version: {eps, or "all": {"top 1": ..., ...}}}."""
    out: dict[str, Any] = {name: {} for name in VERSIONS}
    near = {f"{e:g}": np.isclose(table["epsilon"], e) for e in lab["epsilons"]}
    for epsilon, mask in (*near.items(), ("all", np.ones_like(table["rank"], bool))):
        for many in lab["tokens"]:
            part = forks.some(table, mask & (table["rank"] <= many))
            boot = ClusterBootstrap(part["row"], 1000, lab.seed)
            for name in VERSIONS:
                found = explained(part["measured"], part[name], boot, "passage")
                out[name].setdefault(epsilon, {})[f"top {many}"] = found
    return out


def _answers(lab: Lab, every: dict[str, Any]) -> list[Answer]:
    most, small = f"top {max(lab['tokens'])}", [e for e in lab["epsilons"] if e <= _SMALL] or [min(lab["epsilons"])]
    largest = f"{max(small):g}"
    other = every["other"][largest][most]
    null = f"the exact derivative for another atom of the dictionary has R² {other['r2']:.3f}"

    def answer(claim: str, version: str, epsilon: str, least: float) -> Answer:
        found = every[version][epsilon][most]
        low, high = found["ci95"]
        verdict = "holds" if low >= least else "does not hold" if high < least else "cannot be told"
        ats = "all ε" if epsilon == "all" else f"ε = {epsilon}"
        ours = f"R² {found['r2']:.3f}, rank correlation {found['spearman']:.3f}, at {ats} (to hold: {least})"
        return Answer(claim, ours, found["n"], "shifts of logits", (low, high), null, verdict)

    return [
        answer("closed_form.gate", "gate", largest, 0.5),
        answer("closed_form.direct", "direct", largest, 0.5),
        answer("closed_form.exact", "exact", largest, 0.98),
        answer("closed_form.fitted", "fitted", "all", 0.98),
    ]


def _figures(every: dict[str, Any], epsilons, table: dict[str, np.ndarray]) -> dict[str, Figure]:
    many = list(next(iter(every["exact"].values())))[-1]
    looks = {
        "exact": ("atom", "o-", "exact propagation, true derivative"),
        "fitted": ("singular", "s--", "one number fitted a place and token"),
        "direct": ("delete", "^-", "exact propagation, direct path"),
        "gate": ("previous", "v-", "gate product, direct path"),
        "other": ("random", "x:", "derivative for another atom"),
    }

    def sweep(axes, colours):
        for name, (colour, style, label) in looks.items():
            found = [every[name][f"{e:g}"][many] for e in epsilons]
            middle = np.array([x["r2"] for x in found])
            middle, ends = (np.clip(x, -1, 1) for x in (middle, np.array([x["ci95"] for x in found]).T))
            axes.errorbar(epsilons, middle, np.abs(ends - middle), fmt=style, color=colours[colour], ms=4, lw=1.3,
                          elinewidth=0.8, label=label)  # fmt: skip
        axes.set_xscale("log")
        axes.set(xlabel="ε: norm of what is added to the state", ylabel=f"R² of logit shifts ({many} tokens)",
                 ylim=(-1.05, 1.05))  # fmt: skip
        axes.set_xticks(epsilons, [f"{e:g}" for e in epsilons])
        axes.minorticks_off()
        axes.legend(fontsize=7.5, loc="lower left")

    shown = np.flatnonzero(np.isclose(table["epsilon"], max([e for e in epsilons if e <= _SMALL] or [min(epsilons)])))
    shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), 4000)).astype(int)]

    def scatter(axes, colours):
        measured = table["measured"][shown]
        for name, colour in (("direct", "delete"), ("exact", "atom")):
            axes.plot(table[name][shown], measured, ".", ms=2.5, alpha=0.4, color=colours[colour], label=looks[name][2])
        ends = np.array([measured.min(), measured.max()])
        axes.plot(ends, ends, color=colours["line"], lw=0.8)
        axes.set(xlabel="predicted shift of a logit", ylabel="measured shift")
        axes.legend(fontsize=7.5)

    return {
        "sweep": Figure(sweep, "R² of four predictions, and of the exact one made for another atom, by the norm of the "
                        "edit; bars are 95 % intervals over passages. Values below -1 are drawn at -1."),
        "shifts": Figure(scatter, "Measured against predicted shifts of logits, at ε of 0.3 or the largest below; on "
                         "the line prediction and measurement agree."),
    }  # fmt: skip


STUDY = Study(
    "closed_form", "Closed form of the logit shift",
    "Adds an atom of unit norm, times eps, to a state where the atom fires, and compares the change of later logits "
    "with four predictions: the paper's gate product by the direct path, exact propagation by the direct path, exact "
    "propagation with the true derivative of everything above, and a fitted slope.",
    (
        Claim("closed_form.gate", "The gate product and the direct path predict the shift without a fitted number.",
              "–", "the paper's sources state no R² of the formula without a fit"),
        Claim("closed_form.direct", "With exact propagation the direct path predicts the shift.", "–",
              "not in the paper: it separates the propagation from the path"),
        Claim("closed_form.exact", "With exact propagation and the true derivative of what is above, the shift is "
              "predicted at small eps.", "–", "not in the paper: it is what the closed form approximates"),
        Claim("closed_form.fitted", "The closed form explains the shift with R² 0.98.", "R² 0.98",
              "its procedure fits one number for each prompt, feature and token, which tests that shifts are linear in "
              "eps and nothing else; other model"),
    ),
    {
        "passages": Setting(64, 12, "passages of test text"),
        "firings": Setting(192, 20, "firings of each dictionary that are perturbed"),
        "horizon": Setting(4, 2, "tokens after it at which the shift is read"),
        "epsilons": Setting((0.1, 0.3, 1.0, 3.0), (0.1, 0.3, 1.0, 3.0), "norms of what is added"),
        "tokens": Setting((1, 5, 10, 50), (1, 10, 50), "how many tokens, by their clean logit"),
        "checked": Setting(4, 2, "passages for the check in float64, on a copy of the model; 0 leaves it out"),
    },
    run,
    needs="",
)  # fmt: skip
