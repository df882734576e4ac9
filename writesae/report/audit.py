"""The page of an audit: each edit's verdict, and what it and random changes of its size do to the rest."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files import make_folder, write_text
from ..untrusted import is_integer
from . import plots
from .html import Figure, figure, template
from .load import is_test, summary_of
from .paper import shown
from .schema import COUNT, INTEGER, NUMBER, RATE, TEXT, Check, _fields, _is, _list, _mapping, _one_of, _or_none
from .style import STYLE

TEST = "audit"
ARMS = {"edit": "the edit", "random": "random, same size", "other": "other tokens’ writes"}
_COLOUR = {"edit": "atom", "random": "random", "other": "codebook"}
_LOOK = {"harmful": "loss", "harmless": "win", "cannot be told": "tie", "nothing": "tie"}
_REACH = {"local": "win", "lingering": "loss", "cannot be told": "tie"}
_PAIR = _list(NUMBER, 2)
_SOME = _is(lambda x: is_integer(x, 1), "an integer >= 1")
_FADED = 1e-9  # of its first size: what is less is drawn there


def _summary(horizon: int, grid: int, layers: int) -> Check:
    """The schema of a run with curves of these lengths."""
    each, some = _list(NUMBER, horizon + 1), _list(NUMBER, grid)
    curve = _fields({"n": _list(COUNT, horizon + 1), "mean": each, "low": each, "high": each})
    arm = _fields({
        "change": _fields({"n": COUNT, "mean": NUMBER, "ci95": _PAIR}),
        "perplexity_rise": _fields({"share": NUMBER, "ci95": _PAIR}), "flips": _fields({"n": COUNT, "share": RATE}),
        "kl": curve, "flip": curve, "decay": some, "share": _list(some, layers),
    })  # fmt: skip
    against = _fields({"change": NUMBER, "ci95": _PAIR, "is": _one_of("more", "less", "no more", "cannot be told")})
    return _fields(
        {
            "test": _one_of(TEST), "passages": _SOME, "context": _SOME, "horizon": _SOME, "seed": INTEGER,
            "resamples": COUNT, "layers": _list(COUNT), "grid": _list(COUNT),
            "rules": _fields({"harm": NUMBER, "faded": NUMBER, "least": COUNT}), "versions": _mapping(TEXT, TEXT),
            "edits": _list(_fields(
                {
                    "name": TEXT, "says": TEXT, "verdict": TEXT, "n": COUNT, "places": COUNT, "plain": NUMBER,
                    "perplexity": NUMBER, "does": _one_of("something", "nothing"),
                    "arms": _fields({name: arm for name in ARMS}),
                },
                {
                    "cost": _one_of("harmful", "harmless", "cannot be told"),
                    "reach": _one_of("local", "lingering", "cannot be told"),
                    "against": _fields({name: against for name in ARMS if name != "edit"}),
                    "peak": _fields({"at": COUNT, "kl": NUMBER}), "faded_at": _or_none(COUNT),
                },
            )),
        },
        {"model": TEXT, "corpus": TEXT, "command": TEXT, "seconds": NUMBER},
    )  # fmt: skip


def check(summary: Mapping) -> None:
    """Raises ValueError, naming the entry, for a summary of other types than an audit's."""
    _fields({"horizon": _SOME, "grid": _list(COUNT), "layers": _list(COUNT)})(summary, "summary.json")
    _summary(summary["horizon"], len(summary["grid"]), len(summary["layers"]))(summary, "summary.json")
    if not summary["edits"] or not summary["grid"] or not summary["layers"]:
        raise ValueError("run: summary.json: expected an edit, a layer and a horizon at least, got none")
    for i, edit in enumerate(summary["edits"]):
        missing = [x for x in ("cost", "reach", "against", "peak", "faded_at") if x not in edit]
        if edit["does"] == "something" and missing:
            raise ValueError(f"run: summary.json.edits[{i}]: expected an entry {missing[0]}, got none")


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds the summary of an audit."""
    return is_test(folder, TEST)


def build(source: str | Path | Mapping, out: str | Path) -> Path:
    """Draws the figures and writes `report.html` into `out`.

    Args:
        source: the folder of a finished audit, or its summary.
        out: folder for `report.html` and `plots/*.svg`, each with its numbers in a .csv beside it.
    Returns:
        Path of the page.
    Raises:
        ValueError: values of other types than an audit's, or a link where a file would be written.
    """
    summary = summary_of(source, check)
    out = make_folder(Path(out))
    page = out / "report.html"
    write_text(page, render(summary, out / "plots"))
    return page


def render(summary: Mapping, folder: Path) -> str:
    """The page as text; its figures are drawn into `folder`."""
    from markupsafe import Markup

    def pictured(path: Path, caption: str) -> tuple[Figure, str]:
        return figure(path), caption

    overview = pictured(
        costs(summary["edits"], summary["rules"]["harm"], folder / "costs.svg"),
        "How much the perplexity of the rest grows, with 95 % intervals over passages. The dashed line is the rule’s: "
        "what lies right of it altogether is harmful.",
    )
    sections = []
    for i, edit in enumerate(summary["edits"]):
        figures = []
        if edit["does"] == "something":
            figures = [
                pictured(curves(edit, "kl", folder / f"kl_{i}.svg"), "Mean KL of each later prediction, with 95 % "
                         "intervals. 0 is the prediction of the first edited token itself."),
                pictured(decay(edit, summary["grid"], folder / f"decay_{i}.svg"), "Size of the change of the edited "
                         "layer’s state, |δS|, as a share of what it is at first; medians, exact."),
                pictured(curves(edit, "flip", folder / f"flip_{i}.svg"), "Share of later predictions whose most "
                         "likely token is another one."),
                pictured(spread(edit, summary["layers"], summary["grid"], folder / f"spread_{i}.svg"), "How far every "
                         "layer’s memory is moved, as a share of its norm; medians of the edit."),
            ]  # fmt: skip
        sections.append({"edit": edit, "figures": figures})
    harmful = [edit["name"] for edit in summary["edits"] if edit.get("cost") == "harmful"]
    return template("audit.html.j2").render(
        s=summary, sections=sections, overview=overview, arms=ARMS, look=_LOOK, reach=_REACH, shown=shown,
        harmful=harmful, signed=signed, style=Markup(STYLE),
        style_digest=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
    )  # fmt: skip


def signed(share: float) -> str:
    """A change in per cent with its sign, two digits or those before the point."""
    value = 100 * share
    text = f"{value:+.2g}" if abs(value) < 100 else f"{value:+,.0f}"
    return (f"{value:+.1e}" if "e" in text else text).replace("-", "−")


# ---- figures --------------------------------------------------------------------------------------------------------


def costs(edits: Sequence[Mapping], harm: float, path: Path) -> Path:
    """Change of the perplexity of the rest by every edit and its controls."""

    def paint(axes, colours):
        ends = [0.01]
        for y, edit in enumerate(edits):
            for i, arm in enumerate(ARMS):
                rise = edit["arms"][arm]["perplexity_rise"]
                at, (low, high) = y + 0.22 * (i - 1), (100 * x for x in rise["ci95"])
                axes.plot([low, high], [at, at], color=colours[_COLOUR[arm]], lw=1.5)
                axes.plot([100 * rise["share"]], [at], "o^s"[i], color=colours[_COLOUR[arm]], markersize=4.8,
                          linestyle="none", label=None if y else ARMS[arm])  # fmt: skip
                ends += [low, high]
        axes.axvline(0, color=colours["line"], lw=0.8)
        axes.axvline(100 * np.expm1(harm), color=colours["line"], lw=0.9, linestyle=(0, (4, 3)))
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_yticks(range(len(edits)), [plots.plain(shown(edit["name"])) for edit in edits])
        axes.set(ylim=(len(edits) - 0.5, -0.5), xlabel="change of the perplexity of the rest")
        most = max(np.abs(ends).max(), 2.0)
        ticks = [x for x in (0, 0.1, 1, 10, 100, 1000, 1e4) if x <= 2 * most]
        axes.set_xticks([*(-x for x in ticks[:0:-1] if x <= 2 * -min(ends)), *ticks])
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:+g} %".replace("-", "−") if v else "0")
        axes.grid(False, axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, columnspacing=1.2)

    data: dict[str, list] = {"edit": [], "arm": [], "change": [], "low": [], "high": []}
    for edit in edits:
        for arm in ARMS:
            rise = edit["arms"][arm]["perplexity_rise"]
            for name, value in zip(data, (edit["name"], arm, rise["share"], *rise["ci95"]), strict=True):
                data[name].append(value)
    return plots.draw(path, (7.2, 1.2 + 0.55 * len(edits)), paint, data)


def curves(edit: Mapping, what: str, path: Path) -> Path:
    """KL or flips by tokens after the first edit, of the edit and its controls."""

    def paint(axes, colours):
        smallest = []
        for arm in ARMS:
            curve = edit["arms"][arm][what]
            mean, low, high = (np.asarray(curve[x]) for x in ("mean", "low", "high"))
            there = np.asarray(curve["n"]) > 0
            h = np.flatnonzero(there & (mean > 0)) if what == "kl" else np.flatnonzero(there)
            colour = colours[_COLOUR[arm]]
            axes.plot(h, mean[h], color=colour, lw=1.7 if arm == "edit" else 1.2, label=ARMS[arm],
                      zorder=3 if arm == "edit" else 2)  # fmt: skip
            if arm == "edit" and len(h):
                least = 1e-300 if what == "kl" else 0
                axes.fill_between(h, np.maximum(low[h], least), high[h], color=colour, alpha=0.2, linewidth=0)
            smallest += mean[h[h > 0]].tolist()  # the edited token itself may see no more than rounding
        if what == "kl":
            axes.set(yscale="log", ylabel="KL (nats)")
            if smallest:
                axes.set_ylim(bottom=max(min(smallest) / 2, 1e-14))
        else:
            axes.set(ylabel="predictions that flip")
            axes.set_ylim(bottom=0, top=max(1.1 * max(smallest, default=0), 0.02))
            axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
        axes.set(xlabel="tokens after the first edit")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, columnspacing=1.0)

    arms = {arm: edit["arms"][arm][what] for arm in ARMS}
    data = {"tokens_after": range(len(arms["edit"]["mean"]))}
    data |= {f"{arm}_{x}": curve[x] for arm, curve in arms.items() for x in ("n", "mean", "low", "high")}
    return plots.draw(path, (5.4, 3.4), paint, data)


def decay(edit: Mapping, grid: Sequence[int], path: Path) -> Path:
    """Size of the change of the edited layer's state by tokens after the first edit."""

    least = min(min(edit["arms"][arm]["decay"]) for arm in ARMS)

    def paint(axes, colours):
        for arm, mark in (("edit", "o"), ("random", "^"), ("other", "s")):
            share = np.maximum(edit["arms"][arm]["decay"], _FADED)
            axes.plot(
                range(len(grid)), share, color=colours[_COLOUR[arm]], marker=mark, markersize=4, lw=1.5, label=ARMS[arm]
            )
        axes.set(yscale="log", xlabel="tokens after the first edit", ylabel="|δS| of its first size")
        axes.set_xticks(range(len(grid)), [str(h) for h in grid])
        axes.set_ylim(bottom=min(max(least / 3, _FADED / 2), 0.1))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=3, columnspacing=1.0)

    data = {"tokens_after": grid, **{arm: edit["arms"][arm]["decay"] for arm in ARMS}}
    return plots.draw(path, (5.4, 3.4), paint, data)


def spread(edit: Mapping, layers: Sequence[int], grid: Sequence[int], path: Path) -> Path:
    """How far every layer's memory is moved: layers up, tokens after the first edit across."""
    share = np.asarray(edit["arms"]["edit"]["share"], float)

    def paint(axes, colours):
        axes.imshow(np.log10(np.maximum(share, 1e-8)), cmap="cividis", vmin=-8, vmax=0, aspect="auto", origin="lower")
        every = max(1, -(-len(layers) // 16))
        for y in range(0, len(layers) if len(layers) <= 16 else 0):
            for x in range(len(grid)):
                ink = "#111111" if share[y, x] > 1e-3 else "#f4f4f4"
                axes.text(x, y, _share(share[y, x]), ha="center", va="center", fontsize=7, color=ink)
        axes.set_yticks(range(0, len(layers), every), [str(x) for x in layers[::every]])
        axes.set_xticks(range(len(grid)), [str(h) for h in grid])
        axes.set(xlabel="tokens after the first edit", ylabel="layer")
        axes.grid(False)

    data = {"layer": layers, **{f"after_{h}": share[:, x] for x, h in enumerate(grid)}}
    return plots.draw(path, (5.4, 1.2 + 0.28 * min(max(len(layers), 4), 12)), paint, data)


def _share(x: float) -> str:
    if x < 1e-8:
        return "0"
    return f"{100 * x:.0f}%" if x >= 0.1 else f"{100 * x:.1g}%" if x >= 1e-4 else f"1e{int(np.floor(np.log10(x)))}"
