"""One self-contained page for a replacement test: figures inlined, no script, nothing fetched.

The page is `templates/report.html.j2`, filled by Jinja with every value escaped; here is what it is filled with. The
page's own policy lets a browser apply this one style sheet and show inlined pictures, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from ..files import make_folder, write_text
from . import plots
from .links import Links
from .load import load_run
from .schema import CONDITIONS, METRICS, NATIVES, READS, SCALES, check_run, curve, curves, headline
from .style import STYLE

TOP_ATOMS, CONTEXTS = 12, 4
BEFORE, AFTER = 14, 6  # tokens shown around a firing; more would push out of sight what fired
NEAR = 1.05  # medians closer than this factor are called the same
_DRAWN = ("atom", "delete", "random", "codebook", "singular", "zero")  # in the figure of horizons: more hide each other
_NEAR_PERCENT = round(100 * (NEAR - 1))
_TOKEN = 200  # characters shown of one token


def build(source: str | Path | tuple[Mapping, Mapping], out: str | Path, browse: str | None = None) -> Path:
    """Draws the figures and writes `report.html` into `out`.

    Args:
        source: the folder of a finished run, or (summary, firings) as `load_run` returns them.
        out: folder for `report.html` and `plots/*.svg`, each with its numbers in a .csv beside it.
        browse: where its atoms' pages are, see `links.Links`.
    Returns:
        Path of the page.
    Raises:
        ValueError: not a finished run, values of other types than a run's, or a link where a file would be written.
    """
    if isinstance(source, (str, Path)):
        summary, table = load_run(source)
    else:
        summary, table = source
        check_run(summary, table)
    links = Links(browse, Path(out))
    out = make_folder(Path(out))
    figures = draw(summary, table, out / "plots")
    page = out / "report.html"
    write_text(page, render(summary, table, figures, links))
    return page


def draw(summary: Mapping, table: Mapping[str, np.ndarray], folder: Path) -> dict[str, Path]:
    """The figures that a run has data for, as {name: SVG file}."""
    head = summary["headline"]
    columns = {c: table[curve(head, c)] for c in curves(summary)}
    kl = {name: column[:, 1:].mean(1) for name, column in columns.items()}
    won = kl["atom"] < kl["delete"]
    out = {"null_models": plots.null_models(_shares(summary), folder / "null_models.svg")}
    out["kl_scatter"] = plots.kl_scatter(kl["atom"], kl["delete"], folder / "kl_scatter.svg")
    if "random" in kl:
        path = folder / "ratio_densities.svg"
        out["ratio_densities"] = plots.ratio_densities(kl["atom"], kl["delete"], kl["random"], path)
    drawn = {c: column for c, column in columns.items() if c in _DRAWN or c not in CONDITIONS}
    first = 1 if head["read"] == "after" else 0
    out["horizon_curve"] = plots.horizon_curve(drawn, folder / "horizon_curve.svg", first)
    population = headline(summary)["population"]
    if population["n"]:
        out["feature_win_rates"] = plots.feature_win_rates(
            population["win_rates"], population["firings"], folder / "feature_win_rates.svg"
        )
    out["win_rate_by_cosine"] = plots.win_rate_by(
        table["cosine"], won, "cosine of atom and native write", folder / "win_rate_by_cosine.svg"
    )
    path = folder / "activation_histogram.svg"
    out["activation_histogram"] = plots.activation_histogram(table["activation"], path)
    return out


def _shares(summary: Mapping) -> list[tuple[str, dict[str, tuple[float, float, float]]]]:
    """(condition, {scale: (share of firings in which the atom is closer, its interval)}), deletion first."""
    out: dict[str, dict] = {"delete": {}}
    for scale in summary["settings"]["scales"]:
        test = headline(summary, scale)
        for name, found in {"delete": test["win_rate"], **test["atom_against"]}.items():
            out.setdefault(name, {})[scale] = (found["rate"], *found["ci95"])
    return list(out.items())


# ---- numbers, as the template's filters -------------------------------------------------------------------------


def percent(x: float | None, digits: int = 1):
    """A share in per cent; the space before the sign is narrow and does not break."""
    from markupsafe import Markup

    return "–" if x is None else Markup(f"{100 * x:.{digits}f}&#8239;%")


def interval(pair: Sequence[float] | None) -> str:
    return "–" if pair is None else f"{100 * pair[0]:.1f}–{100 * pair[1]:.1f}"


def number(x: float | None) -> str:
    """Three significant digits, scientific below a thousandth."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return str(x)
    if x == 0:
        return "0"
    if 1e-3 <= abs(x) < 1e5:
        return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
    mantissa, exponent = f"{x:.2e}".split("e")
    return f"{mantissa}\u202f×\u202f10{str(int(exponent)).translate(_RAISED)}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# ---- what the numbers say -----------------------------------------------------------------------------------------


def verdict(low: float, high: float, atom: float, delete: float) -> str:
    """ "win", "loss" or "tie" of the atom against deletion.

    A win needs both: closer more often than chance (the 95 % interval `low`-`high` of the win rate above one half), and
    closer in size (a median KL smaller by more than `NEAR`). A loss likewise; whatever is neither is a tie.
    """
    near = max(atom, delete) <= NEAR * min(atom, delete)
    if low > 0.5 and atom < delete and not near:
        return "win"
    return "loss" if high < 0.5 and atom > delete and not near else "tie"


def _verdict(test: Mapping, other: str = "delete") -> dict:
    """The verdict on the atom against deletion, or another condition, with the interval and medians it rests on."""
    if other == "delete":
        both = (test["win_rate_by_feature"]["ci95"], test["win_rate_by_passage"]["ci95"])
    else:
        both = (test["atom_against"][other]["by_feature"], test["atom_against"][other]["by_passage"])
    low, high = min(x[0] for x in both), max(x[1] for x in both)
    atom, median = test["kl"]["atom"]["median"], test["kl"][other]["median"]
    return {"is": verdict(low, high, atom, median), "low": low, "high": high, "atom": atom, "delete": median}


def _says(found: Mapping, other: str = "deletion") -> str:
    """A verdict as a sentence."""
    lower = "lower" if found["atom"] < found["delete"] else "higher"
    near = max(found["atom"], found["delete"]) <= NEAR * min(found["atom"], found["delete"])
    if found["is"] == "win":
        return f"The atom disturbs the model less than {other} does: more often than chance, and by its median KL"
    if found["is"] == "loss":
        return f"The atom disturbs the model more than {other} does: more often than chance, and by its median KL"
    if found["low"] <= 0.5 <= found["high"]:
        return f"A tie: how often the atom is closer than {other} cannot be told from chance"
    often = "more" if found["low"] > 0.5 else "less"
    if near:
        return f"A tie in size: the atom is closer than {other} {often} often than chance, but the medians are alike"
    return f"A tie: the atom is closer {often} often than chance, but its median KL is {lower} than {other}’s"


def _readings(summary: Mapping) -> list[dict]:
    """Every variant of the test: its title, and a row for every horizon and direction."""
    head = summary["headline"]
    groups = []
    for variant, metrics in summary["tests"].items():
        read, native, scale = variant.split("/")
        rows = []
        for metric, directions in metrics.items():
            for direction, test in directions.items():
                here = (read, native, scale, metric, direction) == tuple(
                    head[x] for x in ("read", "native", "scale", "horizon", "direction")
                )
                reverse = ", reversed" if direction == "reverse" else ""
                rows.append({"label": METRICS[metric] + reverse, "here": here, "test": test, "found": _verdict(test)})
        groups.append({"read": READS[read], "native": NATIVES[native], "scale": SCALES[scale], "rows": rows})
    return groups


def _elsewhere(summary: Mapping) -> list[dict]:
    """The headline's reading with the atom at its other size, and with the state changed at the other time."""
    head, out = summary["headline"], []
    variants = [(head["read"], scale, f"With {text}") for scale, text in SCALES.items() if scale != head["scale"]]
    for read, text in READS.items():
        if read != head["read"]:
            variants.append((read, head["scale"], f"With the state {text}"))
    for read, scale, text in variants:
        tests = summary["tests"].get(f"{read}/{head['native']}/{scale}", {}).get(head["horizon"], {})
        if head["direction"] in tests:
            test = tests[head["direction"]]
            against = test["atom_against"].get("codebook")
            out.append({
                "text": text, "rate": test["win_rate"]["rate"], "found": _verdict(test),
                "codebook": None if against is None else against["rate"],
                "codebook_found": None if against is None else _verdict(test, "codebook"),
            })  # fmt: skip
    return out


def _sites(summary: Mapping) -> list[dict]:
    """A row for every site and time of reading: the atom against deletion and codebook at either size."""
    rows: dict[tuple[str | None, str], dict] = {}
    for x in (*summary["table"], *summary["pooled"]):  # the latter without a site
        site = x.get("site")
        row = rows.setdefault((site, x["read"]), {"site": site, "read": x["read"], "n": x["n"], "all": [], "rates": {}})
        row["all"].append(x)
        if x["condition"] == "atom":
            row["rates"]["delete", x["scale"]] = x["beats_delete"]
        elif x["condition"] == "codebook":
            row["rates"]["codebook", x["scale"]] = x["atom_beats"]
        if x["scale"] in (None, summary["headline"]["scale"]):
            row[x["condition"]] = x["kl_median"]
    return list(rows.values())


def top_atoms(table: Mapping[str, np.ndarray]) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """((layer, head, feature), its firings) of those that a page shows: the features with most firings tested."""
    keys = np.stack([table[x].astype(np.int64) for x in ("layer", "head", "feature")], 1)
    unique, of, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:TOP_ATOMS]
    return [(tuple(unique[i].tolist()), np.flatnonzero(of.reshape(-1) == i)) for i in order]


def _atoms(table: Mapping[str, np.ndarray], summary: Mapping, links: Links) -> list[dict]:
    """The features with most firings tested, each with its strongest contexts from different passages."""
    head = summary["headline"]
    atom, delete = (table[curve(head, c)][:, 1:].mean(1) for c in ("atom", "delete"))
    blocks = []
    for (layer, at, feature), mine in top_atoms(table):
        contexts, seen = [], set()
        for i in mine[np.argsort(-table["activation"][mine], kind="stable")]:
            if int(table["passage"][i]) not in seen:
                seen.add(int(table["passage"][i]))
                contexts.append(_context(table, int(i)))
            if len(contexts) == CONTEXTS:
                break
        blocks.append({
            "layer": layer, "head": at, "feature": feature, "n": len(mine), "contexts": contexts,
            "href": links(layer, at, feature),
            "won": float((atom[mine] < delete[mine]).mean()), "ties": int((atom[mine] == delete[mine]).sum()),
            "cosine": float(np.median(table["cosine"][mine])),
            "about": _about(summary.get("atoms", {}).get(f"{layer}:{at}", {}).get(str(feature)), (layer, at), links),
        })  # fmt: skip
    return blocks


def _about(found: Mapping | None, site: tuple[int, int], links: Links) -> list[tuple[str, list]]:
    """(what, [(token or atom, score, an atom's address or None)]) of what is known of an atom: see `atoms.describe`."""
    if found is None:
        return []
    told = {"promoted": "raises", "answers_to": "answers to", "neighbours": "beside"}
    return [
        (word, [
            (clean(str(x)), f"{score:+.2f}".replace("-", "−"), links(*site, x) if name == "neighbours" else None)
            for x, score in found[name]
        ])
        for name, word in told.items() if found[name]
    ]  # fmt: skip


def _context(table: Mapping[str, np.ndarray], i: int) -> dict:
    tokens, at = table["context"][i], int(table["context_at"][i])
    before, after = "".join(map(clean, tokens[max(at - BEFORE, 0) : at])), tokens[at + 1 : at + 1 + AFTER]
    return {
        "activation": float(table["activation"][i]), "before": before, "token": clean(tokens[at]),
        "after": "".join(map(clean, after)), "document": clean(table["document"][i]),
    }  # fmt: skip


def clean(text: str, most: int = _TOKEN) -> str:
    """Text that may be shown: no control characters but line breaks and tabs, none that reorder what follows, and not
    without end."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", text[:most])


# ---- page -----------------------------------------------------------------------------------------------------


@cache
def template(name: str = "report.html.j2"):
    """A page's template, every value escaped."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("jinja2 is needed to write a report: pip install writesae[experiments]") from error
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(percent=percent, interval=interval, number=number)
    made.filters["count"] = lambda x: f"{x:,}"
    return made.get_template(name)


def render(
    summary: Mapping, table: Mapping[str, np.ndarray], figures: Mapping[str, Path], links: Links | None = None
) -> str:
    """The page as text."""
    from markupsafe import Markup

    test = headline(summary)
    against = test["atom_against"].get("codebook")
    power = 3 if summary["kl_median"]["delete"] >= 1e-4 else 6
    matched = None
    if summary["headline"]["scale"] != "matched" and "matched" in summary["settings"]["scales"]:
        matched = headline(summary, "matched")
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    sites = {name: tuple(name.split(":")) for name in (*summary["settings"]["sites"], *summary.get("sites", ()))}
    return template().render(
        s=summary, test=test, table=table, atoms=_atoms(table, summary, links or Links()),
        readings=_readings(summary), site=sites,
        found=_verdict(test), says=_says(_verdict(test)), elsewhere=_elsewhere(summary), names=CONDITIONS,
        against=against, matched=matched, reads=READS, scales=SCALES, rows=_sites(summary),
        unit=10.0**power, tens=f"10⁻{str(power).translate(_RAISED)}",
        codebook=None if against is None else _verdict(test, "codebook"),
        codebook_says=None if against is None else _says(_verdict(test, "codebook"), "an untrained codebook"),
        verdict=verdict,
        figures=[(name, figure(path)) for name, path in figures.items()],
        style=Markup(STYLE), style_digest=digest, near=_NEAR_PERCENT,
    )  # fmt: skip


class Figure(NamedTuple):
    """A figure on a page: its SVG in base64, and where its numbers are, seen from the page."""

    svg: str
    data: str | None


def figure(path: Path, page: Path | None = None) -> Figure:
    """A figure that `plots.draw` made, for a page in the folder `page`; None is that of `plots` itself."""
    path = Path(path)
    data = path.with_suffix(".csv")
    link = os.path.relpath(data, path.parent.parent if page is None else page)
    return Figure(
        base64.b64encode(path.read_bytes()).decode(), quote(Path(link).as_posix()) if data.is_file() else None
    )
