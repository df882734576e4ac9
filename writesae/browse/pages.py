"""The pages as text: an atlas in, HTML out, the same for the server and for files (`static`).

Every link is relative to the page's own place, so a whole browser may lie in a subfolder of any host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..report.schema import CONDITIONS
from . import show
from .columns import Columns
from .guard import POLICY
from .links import link

HERE = Path(__file__).parent
FIRST_ROWS = 100  # of the list, in the page itself: seen before any script or data has come
KINDS = {"erase": "take the whole write away wherever the feature fires",
         "scale": "multiply the feature's part of the write by a number wherever it fires",
         "install": "write the feature's atom, of a strength in units of its activation, at the "
                    "prompt's last token"}  # fmt: skip
# What a list's column is called, and what it means.
HEADINGS = {
    "feature": ("feature", "layer, head and number of the feature; a link to its page"),
    "promoted": ("writes", "tokens that what it writes makes likelier, most first"),
    "answers": ("answers to", "tokens it fires on most"),
    "count": ("firings", "how often it fired"),
    "density": ("density %", "share of all tokens it fires on, in per cent"),
    "max": ("max", "largest activation"),
    "mean": ("mean", "mean activation where it fires"),
    "win_rate": ("wins %", "share of its firings at which replacing the write by the atom moves the model less than "
                 "deleting it, in per cent; – where it was not tested"),
    "cosine": ("cosine", "mean cosine of the atom and the write it stands for"),
    "partition": ("kind", "how it is classed by how often it fires, or by a study's partition"),
}  # fmt: skip
_LARGEST_BAR = 100


class Missing(LookupError):
    """A page that is not there: a title, and what to look at instead."""

    def __init__(self, title: str, hint: str):
        super().__init__(title)
        self.title, self.hint = title, hint


class Pages:
    """The pages of an atlas.

    Args:
        atlas: an `Atlas`.
        static: for files: links end in .html, and what needs a model is left out.
        linked: rows of the table that have a page; None for all.
    """

    def __init__(self, atlas: Any, static: bool = False, linked: np.ndarray | None = None):
        self.atlas, self.static = atlas, static
        self.columns = Columns(atlas, linked)
        self.title = show.plain(str(atlas.info.get("title") or "a store"))
        self.live = not static and atlas.live is not None

    @cached_property
    def _environment(self):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        made = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        made.filters.update(
            number=show.number,
            percent=show.percent,
            count=show.count,
            token=show.token,
            plain=show.plain,
            broken=_broken,
            chip=_chip,
        )
        return made

    def _render(self, name: str, depth: int, **values) -> str:
        root = "../" * depth

        def to(layer: int, head: int, feature: int) -> str:
            return root + link(layer, head, feature, self.static)

        return self._environment.get_template(f"{name}.html.j2").render(
            here=name,
            root=root or "./", to=to, static=self.static, policy=POLICY, store=self.title, live=self.live,
            info=self.atlas.info, headings=HEADINGS, page_of=self._page_of, **values,
        )  # fmt: skip

    def _page_of(self, name: str) -> str:
        """File or path of a page at the root: "about"."""
        return f"{name}.html" if self.static else name

    # ---- pages -------------------------------------------------------------------------------------------------------

    @cached_property
    def index(self) -> str:
        """The list; the same for everyone, so it is made once."""
        columns = self.columns
        rows = [columns.row(int(i)) for i in columns.order[:FIRST_ROWS]]
        names = [x for x in HEADINGS if x == "feature" or x in columns.sent]
        fired = int((columns.sent["count"] > 0).sum())
        return self._render(
            "list", 0, rows=rows, names=names, n=columns.n, fired=fired, sites=columns.sites,
            partitions=[show.plain(str(x)) for x in self.atlas.table.partitions],
        )  # fmt: skip

    def feature(self, layer: int, head: int, feature: int) -> str:
        """The page of a feature.

        Raises:
            Missing: no such feature.
        """
        row = self.columns.find(layer, head, feature)
        if row is None:
            raise self._no_feature(layer, head, feature)
        page = self.atlas.feature(layer, head, feature).as_dict()
        largest = float(self.atlas.table.max[row])
        levels = []
        for found in page["levels"]:
            contexts = [self._context(x, largest) for x in found["contexts"]]
            if contexts:
                levels.append({**found, "contexts": contexts})
        first, last = self.columns.of_site(layer, head)
        before, after = (self._next(rows) for rows in (range(row - 1, first - 1, -1), range(row + 1, last)))
        return self._render(
            "feature", 1 if self.static else 2, me=self.columns.row(row), row=row, of_site=last - first,
            levels=levels, histogram=_histogram(page.get("histogram")), writes=_writes(page.get("writes")),
            answers=_answers(page.get("answers")), neighbours=self._others(page.get("neighbours")),
            key_neighbours=self._others((page.get("answers") or {}).get("neighbours")),
            cofiring=self._others(page.get("cofiring")), replacement=_replacement(page.get("replacement")),
            before=before, after=after, strength=_strength(largest),
            count=int(self.atlas.table.count[row]), kinds=KINDS,
        )  # fmt: skip

    def text(self) -> str:
        return self._render("text", 0, sites=self.columns.sites)

    def try_it(self) -> str:
        return self._render("try", 0, kinds=KINDS, sites=self.columns.sites)

    def about(self) -> str:
        facts = [(name.replace("_", " "), _fact(x)) for name, x in self.atlas.info.items() if _is_fact(x)]
        notes = [show.plain(str(x)) for x in self.atlas.info.get("notes") or ()]
        return self._render("about", 0, facts=facts, notes=notes, levels=range(1, show.LEVELS + 1))

    def error(self, title: str, hint: str, depth: int = 0) -> str:
        return self._render("error", depth, title=title, hint=hint)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _no_feature(self, layer: int, head: int, feature: int) -> Missing:
        first, last = self.columns.of_site(layer, head)
        if first == last:
            sites = [f"L{x}H{y}" for x, y in self.columns.sites]
            shown = ", ".join(sites[:12]) + (f" and {len(sites) - 12} more" if len(sites) > 12 else "")
            return Missing(f"Nothing was collected at L{layer}H{head}", f"This store has the sites {shown}.")
        numbers = self.atlas.table.feature
        return Missing(
            f"L{layer}H{head} has no feature {feature}",
            f"Its {last - first:,} features have numbers from {numbers[first]} to {numbers[last - 1]}.",
        )

    def _next(self, rows: Iterable[int]) -> dict | None:
        """The first of these rows that has a page."""
        found = next((i for i in rows if self.columns.is_linked(i)), None)
        return None if found is None else self.columns.row(found)

    def _context(self, found: Mapping, largest: float) -> dict:
        return {
            "pieces": show.pieces(found["tokens"], found["activations"], found["at"], largest),
            "activation": show.number(found["activation"]), "source": show.plain(str(found.get("source") or "")),
            "place": f"document {found['document']}, row {found['row']}, token {found['position']}",
        }  # fmt: skip

    def _others(self, found: Iterable[Mapping] | None) -> list[dict]:
        """Features beside one, each with its own promoted tokens, so that a reader need not open it."""
        out = []
        for x in found or ():
            layer, head, feature = int(x["layer"]), int(x["head"]), int(x["feature"])
            row = self.columns.find(layer, head, feature)
            writes = self.columns.tokens(row, "promoted")[:3] if row is not None else []
            out.append(
                {
                    **x,
                    "name": f"L{layer}H{head}/{feature}",
                    "known": row is not None and self.columns.is_linked(row),
                    "writes": writes,
                }
            )
        return out


def _broken(text: str):
    """Text of a context with a faint sign at each line break, which a reader of code wants to see."""
    from markupsafe import Markup, escape

    return Markup(str(escape(text)).replace("\n", '<span class="nl" aria-hidden="true">⏎</span>\n'))


def _chip(text: str):
    """A token as `show.token` writes it; its leading spaces are faint."""
    from markupsafe import Markup, escape

    spaces = "␣" * (len(text) - len(text.lstrip("␣")))
    faint = Markup("<i>") + spaces + Markup("</i>") if spaces else ""
    return Markup('<bdi class="tok">') + faint + escape(text[len(spaces) :]) + Markup("</bdi>")


def _bars(items: Iterable[Mapping]) -> list[dict]:
    """Tokens with a value and the length of its bar, 0 to 100, beside the largest of them."""
    pairs = [(str(x["token"]), _value(x)) for x in items]
    sizes = [abs(v) for _, v in pairs if math.isfinite(v)]
    largest = max(sizes, default=0.0) or 1.0
    return [
        {"token": show.token(t), "value": show.count(v) if isinstance(v, int) else show.number(v),
         "bar": round(_LARGEST_BAR * min(abs(v) / largest, 1.0), 1) if math.isfinite(v) else 0}
        for t, v in pairs
    ]  # fmt: skip


def _value(item: Mapping) -> float:
    for name in ("value", "cosine", "count"):
        if item.get(name) is not None:
            return item[name]
    return math.nan


def _writes(found: Mapping | None) -> dict:
    found = found or {}
    return {name: _bars(found.get(name) or ()) for name in ("promoted", "suppressed")} | {"why": found.get("why")}


def _answers(found: Mapping | None) -> dict:
    return {name: _bars((found or {}).get(name) or ()) for name in ("tokens", "keys")}


def _replacement(found: Iterable[Mapping] | None) -> list[dict]:
    """What each run given with --results says of a feature: a row a condition, the atom first, then by median KL."""
    out = []
    for run in found or ():
        medians, closer = run.get("kl_median") or {}, run.get("closer_than") or {}
        names = sorted(medians, key=lambda x: (x != "atom", math.inf if medians[x] is None else medians[x]))
        rows = [
            {"condition": CONDITIONS.get(x, show.plain(str(x))), "kl": show.number(medians[x]),
             "closer": show.percent(closer[x]) if x in closer else ""} for x in names
        ]  # fmt: skip
        about = {"run": show.plain(str(run.get("run", ""))), "n": show.count(run.get("n") or 0), "rows": rows}
        out.append({**about, "win_rate": show.percent(run.get("win_rate")), "cosine": show.number(run.get("cosine"))})
    return out


def _histogram(found: Mapping | None) -> dict | None:
    if not found or not len(found["counts"]):
        return None
    counts, edges = [int(x) for x in found["counts"]], [float(x) for x in found["edges"]]
    largest = max(max(counts), 1)
    bars = [
        {"height": round(100 * c / largest, 2) if not c else max(round(100 * c / largest, 2), 1.0),
         "says": f"{show.number(edges[i])} to {show.number(edges[i + 1])}: {show.count(c)}"}
        for i, c in enumerate(counts)
    ]  # fmt: skip
    return {"bars": bars, "low": show.number(edges[0]), "high": show.number(edges[-1]), "most": show.count(largest),
            "total": show.count(sum(counts))}  # fmt: skip


def _strength(largest: float) -> float:
    """How much of an atom is installed unless said otherwise: its largest activation, in two digits."""
    return float(f"{largest:.2g}") if 0 < largest < math.inf else 1.0


def _is_fact(x: object) -> bool:
    return isinstance(x, (str, int, float)) and x != ""


def _fact(x: object) -> str:
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, int):
        return show.count(x)
    if isinstance(x, float):
        return show.number(x)
    return "–" if x is None else show.plain(str(x))[:200]
