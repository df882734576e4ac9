"""The page of a collection: what was read, how often atoms fire, site by site, and what the most frequent fire on."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..collect.store import Context, Store
from ..files import make_folder, write_text
from ..untrusted import is_integer, is_number, read_json
from . import plots
from .html import Figure, clean, figure, template
from .links import Links
from .style import STYLE

FORMAT = "writesae-firings"
TOP, CONTEXTS, WIDTH = 12, 4, 14  # features shown, firings of each, tokens either side
DENSE = 0.1  # share of tokens from which on a feature is left out of those shown
_ROWS = 400  # sites that the page lists; sites.csv has all
_BARS = 40  # sites that are drawn by name
_POINTS = 400  # of a curve


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a collection's manifest."""
    path = Path(folder) / "manifest.json"
    try:
        return path.is_file() and read_json(path).get("format") == FORMAT
    except ValueError:
        return False


def build(folder: str | Path, out: str | Path, browse: str | None = None) -> Path:
    """Draws the figures and writes `report.html` into `out`.

    Args:
        folder: a finished collection.
        out: folder for `report.html`, `sites.csv` and `plots/*.svg` with their numbers; not the collection's own,
            whose every file has a digest.
        browse: where its atoms' pages are, see `links.Links`.
    Returns:
        Path of the page.
    Raises:
        ValueError: no finished collection, a damaged one, or `out` inside it.
    """
    out = Path(out)
    if Path(folder).resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"out: expected a folder outside the collection, whose files are all sealed, got {out}")
    try:
        store = Store(folder)
        if not store.complete:
            raise ValueError(f"the collection in {folder} is not finished: run the same `writesae collect` again")
        summary = store.summary()
        sites, features = _counted(store, summary.get("tokens"))
        links = Links(browse, out)
        top = [_with_text(store, one, links) for one in _top(features, summary["tokens"])]
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("browse: ") else f"run: {text.removeprefix('path: ')}") from error
    out = make_folder(out)
    columns = ("layer", "head", "atoms", "alive", "firings", "firings_per_token", "median_density", "densest", "max")
    write_text(out / "sites.csv", plots.table({name: [site[name] for site in sites] for name in columns}))
    page = out / "report.html"
    write_text(page, _render(store, summary, sites, top, _figures(features, sites, summary["tokens"], out / "plots")))
    return page


# ---- numbers --------------------------------------------------------------------------------------------------------


def _counted(store: Store, tokens) -> tuple[list[dict], dict[str, np.ndarray]]:
    """(a record a site, columns of all its features)."""
    table = store.counts()
    names = ("layer", "head", "feature", "count", "sum", "max")
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in names}
    if not is_integer(tokens, 1) or (columns["count"] < 0).any():
        raise ValueError(f"{store.path}: expected counts of at least a token, got other")
    if (columns["count"] > tokens).any():
        raise ValueError(f"{store.path}: a feature fires more often than there are tokens")
    sites = []
    for layer, head, size, k in store.manifest["sites"]:
        mine = (columns["layer"] == layer) & (columns["head"] == head)
        count, most = columns["count"][mine], columns["max"][mine]
        alive = count[count > 0]
        sites.append({
            "layer": layer, "head": head, "atoms": size, "k": k if is_number(k) else None, "alive": len(alive),
            "firings": int(count.sum()), "firings_per_token": float(count.sum() / tokens),
            "median_density": float(np.median(alive) / tokens) if len(alive) else 0.0,
            "densest": float(count.max(initial=0) / tokens), "max": float(most.max(initial=0)),
        })  # fmt: skip
    return sites, columns


def _top(features: Mapping[str, np.ndarray], tokens: int) -> list[dict]:
    """(layer, head, feature, count, density, mean, max) of the most frequent that are not dense: those that fire at
    every tenth token and more say little by what they fire on."""
    count = features["count"]
    shown = np.where(count < DENSE * tokens, count, 0)
    shown = shown if shown.any() else count
    order = np.argsort(-shown, kind="stable")[:TOP]
    return [
        {
            **{name: int(features[name][i]) for name in ("layer", "head", "feature", "count")},
            "density": float(count[i] / tokens), "mean": float(features["sum"][i] / count[i]),
            "max": float(features["max"][i]),
        }
        for i in order if shown[i] > 0
    ]  # fmt: skip


def _with_text(store: Store, found: dict, links: Links) -> dict:
    """A feature with its address and its largest firings."""
    place = found["layer"], found["head"], found["feature"]
    contexts: list[Context] = []
    if store.mode != "reservoir":  # a sample's largest are not the largest
        contexts = store.contexts(*place, min(CONTEXTS, store.manifest["n"]), WIDTH)
    return {**found, "href": links(*place), "contexts": [_shown(one) for one in contexts]}


def _shown(one: Context) -> dict:
    """A firing with its text; without a tokenizer the numbers of its tokens."""
    texts = (one.before, one.token, one.after)
    if one.token is None:
        ids = [f"{token} " for token in one.tokens.tolist()]
        texts = "".join(ids[: one.at]), ids[one.at], "".join(ids[one.at + 1 :])
    before, token, after = (clean(part or "", 2000) for part in texts)
    return {
        "activation": one.activation, "before": before, "token": token, "after": after,
        "document": clean(one.source or str(one.document)),
    }  # fmt: skip


# ---- figures --------------------------------------------------------------------------------------------------------


def _figures(features: Mapping[str, np.ndarray], sites: list[dict], tokens: int, folder: Path) -> list:
    """(figure, title, what it shows) of each."""
    count = features["count"][features["count"] > 0]
    if not len(count):
        return []
    found = [
        (densities(count / tokens, folder / "densities.svg"), "How often do atoms fire?",
         "Atoms that fired, by the share of tokens at which they do. The line is the median."),
        (concentration(count, folder / "concentration.svg"), "Is it a few atoms or most?",
         "Share of all firings that the most frequent atoms make. The dashed line is what equal shares would give."),
    ]  # fmt: skip
    if 1 < len(sites) <= _BARS:
        text = "Firings a token, and the share of a site’s atoms that fired at all."
        found.append((by_site(sites, folder / "sites.svg"), "Where?", text))
    elif len(sites) > _BARS:
        text = "Share of a head’s atoms that fired at all, layers up and heads across."
        found.append((by_layer(sites, folder / "sites.svg"), "Where?", text))
    return [(figure(path), title, text) for path, title, text in found]


def densities(density: np.ndarray, path: Path) -> Path:
    """Histogram of the shares of tokens at which features fire (`[n]`, all > 0)."""
    low, high = np.floor(np.log10(density.min())), min(np.ceil(np.log10(density.max())), 0)
    edges = np.linspace(low, max(high, low + 1), 41)
    counts, _ = np.histogram(np.log10(density), edges)

    def paint(axes, colours):
        axes.stairs(counts, edges, fill=True, color=colours["atom"], alpha=0.85)
        axes.axvline(np.log10(np.median(density)), color=colours["line"], linewidth=1)
        ticks = np.arange(edges[0], edges[-1] + 0.5)
        axes.set_xticks(ticks, [_share(10.0**x) for x in ticks])
        axes.grid(False, axis="x")
        axes.set(xlim=(edges[0], edges[-1]), xlabel="share of tokens at which it fires", ylabel="atoms")

    data = {"density_from": 10 ** edges[:-1], "density_to": 10 ** edges[1:], "atoms": counts}
    return plots.draw(path, (5.0, 3.1), paint, data)


def _share(x: float) -> str:
    return f"{100 * x:.6g} %" if x >= 1e-6 else f"{x:.0e}"


def concentration(count: np.ndarray, path: Path) -> Path:
    """Share of all firings made by the most frequent features, over the share of those that fired (`[n]` counts)."""
    whole = np.cumsum(np.sort(count)[::-1]) / count.sum()
    at = np.unique(np.linspace(1, len(whole), min(_POINTS, len(whole))).astype(int))
    x, y = np.concatenate([[0], at / len(whole)]), np.concatenate([[0], whole[at - 1]])

    def paint(axes, colours):
        axes.plot([0, 1], [0, 1], color=colours["line"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot(x, y, color=colours["atom"], linewidth=1.7)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda v, _: f"{v:.0%}")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="atoms that fired, most frequent first", ylabel="share of firings")

    return plots.draw(path, (5.0, 3.1), paint, {"share_of_atoms": x, "share_of_firings": y})


def by_site(sites: list[dict], path: Path) -> Path:
    """Firings a token and the share of atoms alive, a row a site."""

    def paint(axes, colours):
        at = np.arange(len(sites))
        axes.barh(at - 0.2, [site["firings_per_token"] for site in sites], 0.36, color=colours["atom"],
                  label="firings a token (below)")  # fmt: skip
        above = axes.twiny()
        above.barh(at + 0.2, [site["alive"] / site["atoms"] for site in sites], 0.36, color=colours["delete"])
        above.set_xlim(0, 1)
        above.grid(False)
        above.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        axes.barh([0], [0], color=colours["delete"], label="atoms that fired (above)")
        axes.set_yticks(at, [f"layer {site['layer']}, head {site['head']}" for site in sites])
        axes.set(ylim=(len(sites) - 0.5, -0.5), xlabel="firings a token")
        axes.grid(False, axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.08), borderaxespad=0, ncols=2, columnspacing=1.2)

    names = ("layer", "head", "firings_per_token", "alive", "atoms")
    data = {name: [site[name] for site in sites] for name in names}
    return plots.draw(path, (6.2, 1.4 + 0.34 * len(sites)), paint, data)


def by_layer(sites: list[dict], path: Path) -> Path:
    """Share of atoms alive, a cell a site."""
    layers, heads = (sorted({site[name] for site in sites}) for name in ("layer", "head"))
    cells = np.full((len(layers), len(heads)), np.nan)
    for site in sites:
        cells[layers.index(site["layer"]), heads.index(site["head"])] = site["alive"] / max(site["atoms"], 1)

    def paint(axes, colours):
        drawn = axes.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
        bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.85)
        bar.ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
        for axis, numbers in ((axes.yaxis, layers), (axes.xaxis, heads)):
            every = max(1, -(-len(numbers) // 16))
            axis.set_ticks(range(0, len(numbers), every), [str(x) for x in numbers[::every]])
        axes.set(xlabel="head", ylabel="layer")
        axes.grid(False)

    data = {name: [site[name] for site in sites] for name in ("layer", "head", "alive", "atoms")}
    return plots.draw(path, (6.2, 1.6 + 0.16 * len(layers)), paint, data)


# ---- page -----------------------------------------------------------------------------------------------------------


def _render(store: Store, summary: Mapping, sites: list[dict], top: list[dict], figures: list[tuple[Figure, str, str]]):
    from markupsafe import Markup

    named = store.manifest.get("named")
    named = named if isinstance(named, Mapping) else {}
    atoms, alive = (sum(site[name] for site in sites) for name in ("atoms", "alive"))
    numbers = {name: summary[name] for name in ("seconds", "tokens_per_second", "bytes_per_firing", "bytes")
               if is_number(summary.get(name))}  # fmt: skip
    return template("collect.html.j2").render(
        s=summary, store=store, sites=sites[:_ROWS], more=max(0, len(sites) - _ROWS), every=len(sites), top=top,
        figures=figures, atoms=atoms, alive=alive, numbers=numbers, dense=DENSE, clean=clean,
        model=clean(named.get("model") or "a model"),
        versions={clean(name): clean(named[name]) for name in ("writesae", "torch", "transformers") if named.get(name)},
        style=Markup(STYLE), style_digest=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
    )  # fmt: skip
