"""The report of all the paper's studies: one page from the folders that `writesae paper --all` wrote.

It must stand on its own for a reader who knows the paper: every numbered claim beside what was found, what the null
models do, and the command that finds it again; then a section a study. What failed, was never run or cannot be read is
listed, not left out.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ..files import make_folder, write_text
from ..untrusted import is_number, read_json, regular_size
from .html import Figure, figure, number, template
from .schema import _ANY, COUNT, INTEGER, NUMBER, TEXT, _fields, _is, _list, _mapping, _one_of, _or_none
from .style import STYLE

RUN = "paper.json"  # what `writesae paper` leaves beside the studies' folders: which there are, and which failed
VERDICTS = ("holds", "does not hold", "cannot be told", "not comparable")
LOOK = {"holds": "win", "does not hold": "loss", "cannot be told": "tie", "not comparable": "tie"}
_LIMIT = 64 * 2**20
_PICTURE = 8 * 2**20  # bytes
_ROWS = 120  # statistics of one study that the page shows; summary.json has all
_TEXT = 4000  # characters shown of one text
_OF = ("n", "ci95", "statistic", "of")  # what describes a statistic, beside its numbers
_INTERVAL = re.compile(r".*ci95.*")

_NAME = _is(lambda x: isinstance(x, str) and re.fullmatch(r"[A-Za-z0-9][\w-]{0,79}", x, re.ASCII) is not None, "a name")
_FLAG = _is(lambda x: isinstance(x, bool), "true or false")
_SUMMARY = _fields(
    {
        "study": _NAME, "title": TEXT, "what": TEXT, "command": TEXT, "model": TEXT, "seed": INTEGER, "quick": _FLAG,
        "settings": _mapping(TEXT, _ANY), "texts": _mapping(TEXT, TEXT), "seconds": NUMBER,
        "versions": _mapping(TEXT, TEXT), "statistics": _mapping(TEXT, _ANY),
        "claims": _list(_fields({"key": TEXT, "says": TEXT, "paper": TEXT, "comparable": TEXT})),
        "answers": _list(_fields({
            "claim": TEXT, "ours": TEXT, "n": COUNT, "of": TEXT, "ci95": _or_none(_list(NUMBER, 2)), "nulls": TEXT,
            "verdict": _one_of(*VERDICTS), "why_no_interval": TEXT,
        })),
        "figures": _mapping(_NAME, TEXT), "tables": _mapping(_NAME, COUNT), "notes": _list(TEXT),
    }
)  # fmt: skip
_RUN = _fields({"studies": _list(_fields({"name": _NAME, "title": TEXT, "failed": _or_none(TEXT)}))})


def check(summary: Mapping) -> None:
    """Raises ValueError, naming the entry, for a summary of other types than a study's."""
    _SUMMARY(summary, "summary.json")
    keys, answered = ([x[name] for x in summary[of]] for of, name in (("claims", "key"), ("answers", "claim")))
    if sorted(keys) != sorted(answered) or len(set(keys)) < len(keys):
        raise ValueError("run: summary.json.answers: expected one for each claim")


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds studies of the paper."""
    return (Path(folder) / RUN).is_file() or any(_studies(Path(folder)))


def _studies(folder: Path) -> Iterator[Path]:
    """Folders of finished studies in a folder."""
    for path in sorted(folder.glob("*/summary.json")):
        try:
            if "study" in read_json(path, _LIMIT):
                yield path.parent
        except ValueError:
            yield path.parent  # `_read` says what is wrong with it


@dataclass(frozen=True)
class _Claim:
    """One line of the table: a claim with its number on the page, and its answer."""

    number: int
    claim: Mapping
    answer: Mapping


@dataclass(frozen=True)
class _Section:
    """One study on the page. `failed`: why its latest run did, where it did."""

    summary: Mapping
    claims: Sequence[_Claim]
    figures: Sequence[tuple[Figure, str]]  # with captions
    tables: Mapping[str, str]  # {name: where it is, seen from the page}
    statistics: Sequence[Mapping]
    more: int
    failed: str | None


def build(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes `report.html` for a folder with the studies of `writesae paper`, and returns its path.

    Args:
        folder: where `writesae paper --out` wrote; one folder a study, with summary.json and plots/.
        out: folder for the page; None is the same one.
    Raises:
        ValueError: no study there that can be read, or a link where the page would be written.
    """
    folder = Path(folder)
    known, summaries, unread = _read(folder)
    if not summaries:
        found = "; ".join(f"{name}: {why}" for name, why in unread) or "none"
        raise ValueError(f"run: expected a folder with studies of the paper that can be read, got {found} in {folder}")
    out = make_folder(folder if out is None else Path(out))
    page = out / "report.html"
    write_text(page, render(known, summaries, unread, folder, out))
    return page


def _read(folder: Path) -> tuple[list[Mapping], dict[str, Mapping], list[tuple[str, str]]]:
    """(studies that there are, {name: summary} in the report's order, (name, why) of those that cannot be read)."""
    known: list[Mapping] = []
    if (folder / RUN).is_file():
        run = read_json(folder / RUN, _LIMIT)
        _RUN(run, RUN)
        known = run["studies"]
    found, unread = {}, []
    for place in _studies(folder):
        try:
            summary = read_json(place / "summary.json", _LIMIT)
            check(summary)
            for name in summary["figures"]:
                _check_picture(_picture(place, name))
        except ValueError as error:
            unread.append((place.name, str(error).removeprefix("run: ")))
            continue
        found[place.name] = summary
    order = [study["name"] for study in known]
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return known, {name: found[name] for name in names}, unread


def _picture(place: Path, name: str) -> Path:
    return place / "plots" / f"{name}.svg"


def _check_picture(path: Path) -> None:
    """It is shown as a picture, in which a browser runs no script and fetches nothing."""
    size = regular_size(path)
    with path.open("rb") as file:
        if size > _PICTURE or not file.read(200).lstrip().startswith(b"<svg "):
            raise ValueError(f"{path}: expected an SVG picture of at most {_PICTURE:,} bytes")


# ---- statistics -----------------------------------------------------------------------------------------------------


def statistics(tree: Mapping) -> list[dict]:
    """Every statistic of a study's `statistics`, a row each: {what, value, ci95, n, statistic}.

    A statistic is an object that says its n. Its numbers are shown beside it; what is not one is looked through.
    """
    return list(_rows(tree, ()))


def _rows(node, path: tuple[str, ...]) -> Iterator[dict]:
    if isinstance(node, (list, tuple)):
        for i, x in enumerate(node):
            yield from _rows(x, (*path, str(i + 1)))
    if not isinstance(node, Mapping):
        return
    if "n" in node and is_number(node["n"]):
        values = [(name, shown) for name, x in node.items()
                  if name not in _OF and not _INTERVAL.match(name) and (shown := _value(x)) is not None]  # fmt: skip
        ci95 = node.get("ci95")
        is_pair = isinstance(ci95, (list, tuple)) and len(ci95) == 2 and all(map(is_number, ci95))
        yield {
            "what": " · ".join(path) or "all", "values": values, "n": node["n"],
            "ci95": ci95 if is_pair else None, "statistic": str(node.get("statistic", "")),
        }  # fmt: skip
    for name, x in node.items():
        if isinstance(x, (Mapping, list, tuple)):
            yield from _rows(x, (*path, str(name)))


def _value(x) -> str | None:
    """A number or a short list of them as text; None of what is neither."""
    if is_number(x):
        return f"{x:,}" if isinstance(x, int) else number(x)
    if isinstance(x, (list, tuple)) and 0 < len(x) <= 6 and all(map(is_number, x)):
        return ", ".join(number(float(one)) for one in x)
    return x if isinstance(x, str) and len(x) <= 40 else None


# ---- page -----------------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Text that may be shown: no control characters, nor those that reorder what follows; not without end."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "", str(text))
    return text if len(text) <= _TEXT else text[:_TEXT] + " …"


def span(pair: Sequence[float] | None) -> str:
    """An interval in the number's own unit."""
    return "–" if pair is None else f"{number(pair[0])} to {number(pair[1])}".replace("-", "−")


def render(
    known: Sequence[Mapping],
    summaries: Mapping[str, Mapping],
    unread: Sequence[tuple[str, str]],
    folder: Path,
    page: Path,
) -> str:
    """The page as text, for a file in the folder `page`."""
    from markupsafe import Markup

    failed = {study["name"]: study["failed"] for study in known if study["failed"] is not None}
    sections, count = [], 0
    for name, summary in summaries.items():
        answers = {answer["claim"]: answer for answer in summary["answers"]}
        claims = [_Claim(count + i, claim, answers[claim["key"]]) for i, claim in enumerate(summary["claims"], 1)]
        count += len(claims)
        rows = statistics(summary["statistics"])
        pictures = [
            (figure(_picture(folder / name, drawn), page), caption) for drawn, caption in summary["figures"].items()
        ]
        tables = {
            table: quote(Path(os.path.relpath(folder / name / f"{table}.csv", page)).as_posix())
            for table in summary["tables"] if (folder / name / f"{table}.csv").is_file()
        }  # fmt: skip
        sections.append(
            _Section(summary, claims, pictures, tables, rows[:_ROWS], max(0, len(rows) - _ROWS), failed.get(name))
        )
    every = [claim for section in sections for claim in section.claims]
    broken = {name for name, _ in unread}
    never = [study for study in known if study["name"] not in summaries and study["name"] not in broken]
    common = {
        key: next(iter(values)) if len(values) == 1 else None
        for key in ("model", "quick", "seed")
        for values in [{section.summary[key] for section in sections}]
    }
    numbered = [claim for claim in every if claim.claim["paper"] != "–"]
    return template("paper.html.j2").render(
        numbered=numbered,
        sections=sections, every=every, verdicts=Counter(claim.answer["verdict"] for claim in every), names=VERDICTS,
        look=LOOK, failed=failed, unread=unread, never=never, known=known, common=common, shown=shown, span=span,
        value=_setting, style=Markup(STYLE),
        style_digest=base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode(),
    )  # fmt: skip


def _setting(x) -> str:
    """A setting's value as text."""
    if isinstance(x, (list, tuple)):
        return ", ".join(map(_setting, x[:20])) + (" …" if len(x) > 20 else "")
    return f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else f"{x:g}" if is_number(x) else str(x)
