"""The pictures of reports. Plain arrays in, SVG files out, each with its numbers in a CSV file beside it.

One file serves light and dark paper: it is drawn in the light colours, and a style sheet inside it puts the dark ones
in their place where the reader's theme asks for them. Nothing here loads a model.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import make_folder, whole_file, write_text
from .schema import CONDITIONS as NAMES

# Okabe-Ito: told apart with any colour vision, and in grey; on dark paper the same hues, lighter.
COLOURS = {
    "atom": "#0072B2", "delete": "#D55E00", "random": "#6E6E6E", "native": "#000000", "mean": "#009E73",
    "previous": "#CC79A7", "singular": "#E69F00", "codebook": "#009E73", "zero": "#8C6BB1", "tie": "#9a9a9a",
    "line": "#444444",
}  # fmt: skip
DARK_COLOURS = {
    "atom": "#4BA9E2", "delete": "#F08A4B", "random": "#A6A6A6", "native": "#FFFFFF", "mean": "#33C699",
    "previous": "#DE9FC3", "singular": "#F2BC45", "codebook": "#33C699", "zero": "#B79BDD", "tie": "#7a828b",
    "line": "#b9c0c8",
}  # fmt: skip
_STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "axes.titlesize": 10.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a8a8a", "axes.linewidth": 0.8,
    "axes.labelcolor": "#333333", "text.color": "#222222", "xtick.color": "#555555", "ytick.color": "#555555",
    "axes.grid": True, "grid.color": "#e9e9e9", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 170,
    "axes.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": "writesae",
}  # fmt: skip
_DARK_STYLE = {
    **_STYLE, "axes.edgecolor": "#6b7480", "axes.labelcolor": "#cfd4da", "text.color": "#dfe3e8",
    "xtick.color": "#a9b1ba", "ytick.color": "#a9b1ba", "grid.color": "#2a3038",
}  # fmt: skip
PAPER, DARK_PAPER = "#ffffff", "#14171b"


_POINTS = 2000  # of a scatter; more are a picture inside the figure, or its file would be slow to show


def _dark_style() -> str:
    """CSS that turns every light colour of a figure, wherever matplotlib wrote it, into its dark one."""
    light = {**COLOURS, **{name: _STYLE[name] for name in _DARK_STYLE}, "paper": PAPER}
    night = {**DARK_COLOURS, **_DARK_STYLE, "paper": DARK_PAPER}
    pairs = {str(light[name]).lower(): str(night[name]).lower() for name in light if str(light[name]).startswith("#")}
    rules = [f'[style*="{what}: {a}"]{{{what}:{b}!important}}' for a, b in pairs.items() for what in ("fill", "stroke")]
    return "@media (prefers-color-scheme:dark){" + "".join(rules) + "}"


def draw(path: Path, size: tuple[float, float], paint, data: Mapping[str, Any] | None = None) -> Path:
    """Runs `paint(axes, colours)` on a fresh figure of `size` inches, and writes it to `path`.

    Args:
        path: an .svg, for either theme; or a .png, with its twin for dark paper in the folder `dark`.
        data: what is drawn, as columns of one length, for `path` with .csv; None writes none.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is needed to draw a report: pip install writesae[experiments]") from error
    path = Path(path)
    themes = [(path, _STYLE, COLOURS, PAPER)]
    if path.suffix != ".svg":
        themes.append((path.parent / "dark" / path.name, _DARK_STYLE, DARK_COLOURS, DARK_PAPER))
    make_folder(path.parent.parent, path.parent.name, *(["dark"] if len(themes) > 1 else []))
    for to, style, colours, paper in themes:
        with rc_context(style):
            # No pyplot: a figure of our own needs no global state and no display.
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            paint(figure.add_subplot(), colours)
            if path.suffix == ".svg":
                text = io.StringIO()
                figure.savefig(text, format="svg", facecolor=paper, metadata={"Date": None, "Creator": "writesae"})
                write_text(to, _for_either_theme(text.getvalue()))
                continue
            with whole_file(to) as temporary:
                figure.savefig(temporary, format="png", facecolor=paper, metadata={"Software": "writesae"})
    if data is not None:
        write_text(path.with_suffix(".csv"), table(data))
    return path


def _for_either_theme(svg: str) -> str:
    svg = re.sub(r"<\?xml[^>]*>\s*|<!DOCTYPE[^>]*>\s*", "", svg, count=2)
    return svg.replace("</style>", f"{_dark_style()}</style>", 1)


def table(columns: Mapping[str, Any]) -> str:
    """CSV of columns of one length; a text that a spreadsheet would run as a formula is quoted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    values = [x.tolist() if isinstance(x, np.ndarray) else x for x in columns.values()]
    for row in zip(*values, strict=True):
        writer.writerow(f"'{x}" if isinstance(x, str) and x[:1] in ("=", "+", "-", "@", "\t") else x for x in row)
    return text.getvalue()


def plain(text: str, most: int = 32) -> str:
    """A name for a figure: short, and what matplotlib would take for mathematics taken as it is."""
    text = text.replace("$", r"\$")
    return text if len(text) <= most else text[: most - 1] + "…"


def _no_narrower(axes, least: float) -> None:
    """Widens the horizontal axis to `least`: of a single value matplotlib shows a meaningless sliver."""
    low, high = axes.get_xlim()
    if high - low < least:
        axes.set_xlim((low + high - least) / 2, (low + high + least) / 2)


def _floor(*columns: np.ndarray) -> float:
    """The smallest positive value: where a logarithmic axis puts exact zeros."""
    positive = np.concatenate([np.asarray(c, float)[np.asarray(c) > 0] for c in columns])
    return float(positive.min()) if len(positive) else 1e-12


def kl_scatter(atom: np.ndarray, delete: np.ndarray, path: Path) -> Path:
    """KL after the atom against KL after deletion, one point a firing (`[n]` each)."""

    def paint(axes, colours):
        floor = _floor(atom, delete)
        x, y = np.maximum(delete, floor), np.maximum(atom, floor)
        groups = ((atom < delete, "atom", "atom closer"), (atom > delete, "delete", "deletion closer"),
                  (atom == delete, "tie", "tie"))  # fmt: skip
        size, alpha = (16, 0.6) if len(x) < 400 else (9, 0.45) if len(x) < 3000 else (4, 0.25)
        for mask, colour, label in groups:
            if colour != "tie" or mask.any():
                axes.scatter(
                    x[mask], y[mask], s=size, alpha=alpha, color=colours[colour], linewidths=0,
                    label=f"{label}  ({mask.mean():.0%})", rasterized=len(x) > _POINTS,
                )  # fmt: skip
        low, high = np.percentile(np.concatenate([x, y]), [0, 100])
        span = [low * 0.7, high * 1.4]
        axes.plot(span, span, color=colours["line"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set(xscale="log", yscale="log", xlim=span, ylim=span, aspect="equal")
        axes.set_xlabel("KL with the write deleted (nats)")
        axes.set_ylabel("KL with the atom in its place (nats)")
        axes.legend(loc="upper left", markerscale=2.2, handletextpad=0.2)

    return draw(path, (4.9, 4.7), paint, {"kl_delete": delete, "kl_atom": atom})


def ratio_densities(atom: np.ndarray, delete: np.ndarray, random: np.ndarray, path: Path) -> Path:
    """Densities of log10 KL_atom / KL_delete and log10 KL_delete / KL_random over firings (`[n]` each)."""

    data = {"kl_atom": atom, "kl_delete": delete, "kl_random": random}

    def paint(axes, colours):
        floor = _floor(atom, delete, random)
        a, d, r = (np.log10(np.maximum(x, floor)) for x in (atom, delete, random))
        series = (
            (a - d, colours["atom"], "atom / deletion"),
            (d - r, colours["delete"], "deletion / random"),
        )
        both = np.concatenate([values for values, _, _ in series])
        low, high = np.percentile(both, [0.5, 99.5])
        low, high = min(low, -0.1), max(high, 0.1)  # never narrower, so that ratios of one look like it
        pad = 0.08 * max(high - low, 1e-3)
        grid = np.linspace(low - pad, high + pad, 400)
        for values, colour, label in series:
            curve = _density(values, grid)
            axes.fill_between(grid, curve, color=colour, alpha=0.18, linewidth=0)
            axes.plot(grid, curve, color=colour, linewidth=1.6, label=f"{label}: {np.mean(values < 0):.0%} below 1")
            axes.plot([np.median(values)] * 2, [0, np.interp(np.median(values), grid, curve)], color=colour, lw=1)
        axes.axvline(0, color=colours["line"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set(xlim=(grid[0], grid[-1]), ylim=(0, None), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        round_ratios = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1e3, 1e4)
        ticks = [x for x in round_ratios if grid[0] < np.log10(x) < grid[-1]]
        axes.set_xticks(np.log10(ticks), [f"{x:g}×" for x in ticks])
        axes.set_xlabel("ratio of KLs (logarithmic)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)  # above: the curves fill the frame

    return draw(path, (5.0, 3.3), paint, data)


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with Silverman's width; a spike of its own width where all values agree."""
    spread = min(values.std(), (np.percentile(values, 75) - np.percentile(values, 25)) / 1.34 or np.inf)
    width = max(0.9 * spread * len(values) ** -0.2, (grid[-1] - grid[0]) / 400)
    counts, edges = np.histogram(values, bins=4 * len(grid), range=(grid[0], grid[-1]))
    centres = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-0.5 * ((grid[:, None] - centres) / width) ** 2)
    return kernel @ counts / (len(values) * width * np.sqrt(2 * np.pi))


def activation_histogram(activation: np.ndarray, path: Path) -> Path:
    """Histogram of the codes of the firings tested (`[n]`)."""

    def paint(axes, colours):
        axes.hist(activation, bins=min(60, max(10, len(activation) // 15)), color=colours["atom"], alpha=0.85)
        middle = float(np.median(activation))
        axes.axvline(middle, color=colours["line"], linewidth=1)
        axes.annotate(
            f"median {middle:.3g}", (middle, 1), xycoords=("data", "axes fraction"), xytext=(5, -10),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
        axes.grid(False, axis="x")
        axes.set(xlim=(0, None), xlabel="activation of the replaced write's atom", ylabel="firings")
        axes.margins(y=0.12)  # room for the label

    return draw(path, (5.0, 2.9), paint, {"activation": activation})


def horizon_curve(curves: Mapping[str, np.ndarray], path: Path, first: int = 0) -> Path:
    """Median KL by tokens after the edit; bands hold the middle half for atom and deletion. {condition: `[n, H + 1]`}.

    `first` is the first token drawn: 1 where the token itself cannot have seen the change.
    """

    def paint(axes, colours):
        lowest = np.inf
        for name, whole in curves.items():
            curve = whole[:, first:]
            h = np.arange(first, whole.shape[1])
            low, mid, high = np.nanpercentile(curve, [25, 50, 75], axis=0)
            if not (mid > 0).all():
                continue
            lowest = min(lowest, low[low > 0].min(initial=mid.min()))
            colour = colours.get(name, colours["line"])
            if name in ("atom", "delete"):  # more bands would hide each other
                axes.fill_between(h, np.maximum(low, 1e-300), high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(h, mid, color=colour, linewidth=1.7, marker="o", markersize=3.5, label=NAMES.get(name, name))
        axes.set(yscale="log", xlabel="tokens after the edit" + ("" if first else " (0: the token itself)"))
        if np.isfinite(lowest):
            axes.set_ylim(bottom=lowest * 0.8)
        axes.set_ylabel("KL (nats), median and middle half")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if np.isfinite(lowest):
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2, columnspacing=1.2)

    rows = []
    for name, whole in curves.items():
        for h in range(first, whole.shape[1]):
            rows.append((name, h, *np.nanpercentile(whole[:, h], [25, 50, 75]).tolist()))
    names = ("condition", "tokens_after", "kl_quarter", "kl_median", "kl_three_quarters")
    return draw(path, (5.0, 3.9), paint, _columns(names, rows))


def _columns(names: Sequence[str], rows: Sequence[Sequence]) -> dict[str, list]:
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def null_models(rows: Sequence[tuple[str, Mapping[str, tuple[float, float, float]]]], path: Path) -> Path:
    """How often the atom is closer than each thing one could write instead, with 95 % intervals, by size.

    Args:
        rows: (condition, {scale: (share, low, high)}), top to bottom.
    """

    def paint(axes, colours):
        look = {"coef": ("atom", "o", "at the atom’s size"), "matched": ("delete", "s", "at the write’s norm")}
        labelled = set()
        for y, (_, shares) in enumerate(rows):
            for scale, (share, low, high) in shares.items():
                colour, marker, label = look[scale]
                at = y + (0 if len(shares) == 1 else {"coef": -0.14, "matched": 0.14}[scale])
                axes.plot([low, high], [at, at], color=colours[colour], linewidth=1.3, alpha=0.8)
                axes.plot(
                    [share], [at], marker, color=colours[colour], markersize=4.5, linestyle="none",
                    label=None if scale in labelled else label,
                )  # fmt: skip
                labelled.add(scale)
        axes.axvline(0.5, color=colours["line"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [NAMES.get(name, name) for name, _ in rows])
        axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="share of firings with the atom closer")
        axes.grid(False, axis="y")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2, columnspacing=1.2)

    flat = [(name, scale, *found) for name, shares in rows for scale, found in shares.items()]
    data = _columns(("condition", "scale", "share", "low", "high"), flat)
    return draw(path, (5.6, 1.3 + 0.31 * max(len(rows), 3)), paint, data)


def feature_win_rates(win_rates: Sequence[float], firings: int, path: Path) -> Path:
    """Every tested feature's own win rate, ranked: is the result a few frequent features, or most of them?"""

    def paint(axes, colours):
        rates = np.sort(np.asarray(win_rates, float))
        x = np.arange(1, len(rates) + 1)
        axes.axhline(0.5, color=colours["line"], linewidth=0.9, linestyle=(0, (4, 3)))
        colour = [colours["atom" if rate > 0.5 else "delete" if rate < 0.5 else "tie"] for rate in rates]
        axes.vlines(x, 0.5, rates, color=colour, alpha=0.4, lw=1.2)
        axes.scatter(x, rates, s=14, color=colour, linewidths=0)
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        many = "" if len(rates) == 1 else "s"
        axes.set(ylim=(-0.03, 1.03), xlabel=f"features, ranked ({len(rates)} feature{many}, {firings} firings)")
        axes.set_xlim(0.5 - 0.01 * len(rates), len(rates) + 0.5 + 0.01 * len(rates))
        if len(rates) <= 10:
            axes.set_xticks(x)  # no feature has half a rank
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("share of its firings won")

    return draw(path, (5.0, 2.9), paint, {"win_rate": sorted(win_rates)})


def win_rate_by(value: np.ndarray, won: np.ndarray, label: str, path: Path, bins: int = 10) -> Path:
    """Win rate in equal-count bins of `value [n]`, with 95 % intervals: where does the atom win?"""

    def paint(axes, colours):
        count = max(1, min(bins, len(value) // 15))
        for part in np.array_split(np.argsort(value, kind="stable"), count):
            n, rate = len(part), float(won[part].mean())
            centre, half = (rate + 1.92 / n) / (1 + 3.84 / n), 1.96 * np.sqrt(rate * (1 - rate) / n + 0.9604 / n**2)
            half /= 1 + 3.84 / n
            at = float(np.median(value[part]))
            axes.plot([at, at], [centre - half, centre + half], color=colours["atom"], linewidth=1.2, alpha=0.7)
            axes.plot([at], [rate], "o", color=colours["atom"], markersize=4.5)
        axes.axhline(0.5, color=colours["line"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        axes.set(ylim=(-0.02, 1.02), xlabel=label, ylabel="win rate against deletion")
        _no_narrower(axes, 0.2)

    return draw(path, (5.0, 2.9), paint, {label.replace(" ", "_"): value, "atom_closer": won})


def recovered(rows: Sequence[tuple[str, Sequence[tuple]]], path: Path) -> Path:
    """Share of the loss recovered by each condition, with 95 % intervals, a row for each head, layer or all.

    Args:
        rows: (name, [(condition, its label, share, interval)]), top to bottom; the same conditions in all.
    """
    shares = [share for _, arms in rows for _, _, share, _ in arms]
    low, high = max(min(0.0, *shares), -1.0), min(max(1.0, *shares), 2.0)  # beyond it, a mark at the edge

    def paint(axes, colours):
        first = [condition for condition, *_ in rows[0][1]]

        def look(i: int) -> dict:
            """Colour by condition, marker by its k."""
            hue = {"coded": "atom", "reconstruction": "atom", "codebook": "codebook"}.get(first[i], "delete")
            return {"color": colours[hue], "marker": "o^sDvP*X"[first[:i].count(first[i]) % 8], "markersize": 4.8}

        for i, (_, label, _, _) in enumerate(rows[0][1]):
            axes.plot([], [], linestyle="none", label=label, **look(i))
            for y, (_, arms) in enumerate(rows):
                share, interval = arms[i][2:]
                at = y + 0.66 * ((i + 0.5) / len(arms) - 0.5)
                if interval is not None:
                    axes.plot(np.clip(interval, low - 0.04, high + 0.04), [at, at], color=look(i)["color"], lw=1.2)
                beyond = {} if low <= share <= high else {"marker": "<" if share < low else ">"}
                axes.plot([min(max(share, low), high)], [at], linestyle="none", **{**look(i), **beyond})
        for at in (0, 1):
            axes.axvline(at, color=colours["line"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set(xlim=(low - 0.04, high + 0.04), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xlabel("share of the loss recovered (0: writes deleted, 100 %: plain model)")
        axes.grid(False, axis="y")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2, columnspacing=1.2)

    many = len(rows[0][1])
    flat = [(name, condition, label, share, *(interval or (None, None)))
            for name, arms in rows for condition, label, share, interval in arms]  # fmt: skip
    data = _columns(("changed", "condition", "label", "share", "low", "high"), flat)
    return draw(path, (6.6, 1.0 + 0.1 * many + len(rows) * (0.1 + 0.085 * many)), paint, data)
