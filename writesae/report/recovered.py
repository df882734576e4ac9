"""The page of a closed-loop run: what a head's writes are worth, and how much of it a dictionary keeps."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import make_folder, write_text
from ..untrusted import is_integer
from . import plots
from .html import figure, template
from .load import is_test, summary_of
from .schema import _CONDITION, COUNT, INTEGER, NUMBER, SITE, TEXT, _fields, _is, _list, _mapping, _one_of, _or_none
from .style import STYLE

TEST = "loss recovered"
CONDITIONS = {
    "coded": "dictionary", "codebook": "codebook of native writes", "reconstruction": "read through the reconstruction",
}  # fmt: skip
TARGETS = ("write", "state")
READS = ("after", "before")
WORDS = {
    "after": "Read after: a token’s own write is still as it was made", "before": "Read before: a token’s own write is "
    "coded, too",
}  # fmt: skip

_PAIR = _or_none(_list(NUMBER, 2))
_GROUP = _is(
    lambda x: isinstance(x, str) and re.fullmatch(r"all|layer [0-9]{1,6}|[0-9]{1,6}:[0-9]{1,6}", x) is not None,
    "all, layer N or LAYER:HEAD",
)
_SOME = _is(lambda x: is_integer(x, 1), "an integer >= 1")
_SUMMARY = _fields(
    {
        "test": _one_of(TEST), "passages": _SOME, "context": _SOME, "tokens": _SOME, "seconds": NUMBER, "plain": NUMBER,
        "groups": _list(_fields({
            "read": _or_none(_one_of(*READS)), "group": _GROUP, "heads": _SOME, "deleted": NUMBER,
            "cost": NUMBER, "cost_ci95": _PAIR, "note": _or_none(TEXT),
            "arms": _list(_fields({
                "condition": _CONDITION, "k": _or_none(COUNT), "loss": NUMBER, "share": _or_none(NUMBER), "ci95": _PAIR,
            })),
            "gains": _list(_fields({"k": _or_none(COUNT), "share": NUMBER, "ci95": _PAIR})),
        })),
        "settings": _fields({
            "target": _one_of(*TARGETS), "reads": _list(_or_none(_one_of(*READS))), "ks": _list(_or_none(COUNT)),
            "least_cost": NUMBER, "seed": INTEGER, "resamples": COUNT,
            "sites": _mapping(SITE, _fields({"kind": TEXT, "F": COUNT, "k": COUNT, "K": COUNT, "V": COUNT})),
        }),
        "versions": _mapping(TEXT, TEXT),
    },
    {"model": TEXT, "corpus": TEXT, "train": _or_none(TEXT)},
)  # fmt: skip


def check(summary: Mapping) -> None:
    """Raises ValueError, naming the entry, for a summary of other types than a run's."""
    _SUMMARY(summary, "summary.json")
    if not summary["groups"]:
        raise ValueError("run: summary.json.groups: expected at least one, got none")
    first = _arms(summary["groups"][0])
    for i, group in enumerate(summary["groups"]):
        where = f"run: summary.json.groups[{i}]"
        if not first or _arms(group) != first:
            raise ValueError(f"{where}.arms: expected the same conditions in every group, and one at least")
        if any((arm["share"] is None) != (group["note"] is not None) for arm in group["arms"]):
            raise ValueError(f"{where}: expected either shares or a note that says why there are none")
    gains = [[gain["k"] for gain in group["gains"]] for group in summary["groups"] if group["note"] is None]
    if any(ks != gains[0] for ks in gains):
        raise ValueError("run: summary.json.groups: expected gains of the same k in every group with shares")


def _reads(summary: Mapping) -> list[str | None]:
    """The times of reading that there are groups of."""
    return list(dict.fromkeys(group["read"] for group in summary["groups"]))


def _arms(group: Mapping) -> list[tuple[str, int | None]]:
    return [(arm["condition"], arm["k"]) for arm in group["arms"]]


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds the summary of a closed-loop run."""
    return is_test(folder, TEST)


def build(source: str | Path | Mapping, out: str | Path) -> Path:
    """Draws the figure and writes `report.html` into `out`.

    Args:
        source: the folder of a finished run, or its summary.
        out: folder for `report.html` and `plots/recovered*.svg`, each with its numbers in a .csv beside it.
    Returns:
        Path of the page.
    Raises:
        ValueError: values of other types than a run's, or a link where a file would be written.
    """
    summary = summary_of(source, check)
    out = make_folder(Path(out))
    figures = []
    for read in _reads(summary):
        rows = [_row(group) for group in summary["groups"] if group["read"] == read and group["note"] is None]
        if rows:
            name = "recovered.svg" if read is None else f"recovered_{read}.svg"
            figures.append((read, plots.recovered(rows, out / "plots" / name)))
    page = out / "report.html"
    write_text(page, render(summary, figures))
    return page


def _row(group: Mapping) -> tuple[str, list[tuple[str, str, float, list[float] | None]]]:
    """(name, [(condition, k, share, interval)]) for the figure."""
    return named(group["group"]), [
        (arm["condition"], label(arm["condition"], arm["k"]), arm["share"], arm["ci95"]) for arm in group["arms"]
    ]


def named(group: str) -> str:
    """A group as a reader knows it."""
    if ":" not in group:
        return "all at once" if group == "all" else group
    return "layer {}, head {}".format(*group.split(":"))


def label(condition: str, k: int | None, short: bool = False) -> str:
    """A condition and its k as a reader knows them."""
    name = CONDITIONS.get(condition, condition)
    if short and condition in ("codebook", "reconstruction"):
        name = condition
    if k is None:
        return f"{name}, its own k" if condition in CONDITIONS else name
    return f"{name}, k = {k}"


def says(gain: Mapping) -> str:
    """The dictionary against the codebook, in words."""
    low, high = gain["ci95"] or (-1, 1)
    if low <= 0 <= high:
        return "cannot be told from that of the codebook"
    return "is more than that of the codebook" if low > 0 else "is less than that of the codebook"


def render(summary: Mapping, figures: Sequence[tuple[str | None, Path]]) -> str:
    """The page as text."""
    from markupsafe import Markup

    groups = summary["groups"]
    parts = []
    for read in _reads(summary):
        mine = [group for group in groups if group["read"] == read]
        whole = [group for group in mine if group["note"] is None]
        drawn = next((path for when, path in figures if when == read), None)
        parts.append({
            "read": read, "whole": whole, "apart": [group for group in mine if group["note"] is not None],
            "headline": max(whole, key=lambda group: (group["heads"], group["cost"]), default=None),
            "figure": None if drawn is None else figure(drawn),
        })  # fmt: skip
    return template("recovered.html.j2").render(
        s=summary, parts=parts, named=named, label=label, says=says, conditions=_arms(groups[0]), words=WORDS,
        style=Markup(STYLE), style_digest=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
    )  # fmt: skip
