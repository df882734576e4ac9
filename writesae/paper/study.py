"""What a study is made of: the paper's claims, its settings, what it finds, and how that is written down."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..experiments.parts import concatenate
from ..files import make_folder, write_json, write_text
from ..untrusted import read_json

if TYPE_CHECKING:
    from .lab import Lab

# One file each, in the order of a reader of the paper; see `studies`.
NAMES = (
    "partition",
    "population",
    "all_heads",
    "baselines",
    "spectral",
    "residual_coherence",
    "closed_form",
    "erase",
    "sign",
    "install",
    "amplify_suppress",
    "passage_nll",
    "state_replacement_perplexity",
    "sae_read_perplexity",
    "selectivity",
    "readers",
    "transplant",
    "probing",
    "geometry",
)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        key: how answers name it, unique over all studies.
        says: the claim in our words, one sentence.
        paper: its number there, as text ("92.4 % of 4,851 firings"); "–" where it gives none.
        comparable: "" where ours is the same procedure and only the weights differ; else what else does, or which
            definition its sources lack.
    """

    key: str
    says: str
    paper: str
    comparable: str = ""


@dataclass(frozen=True)
class Answer:
    """What was found here about a claim.

    Attributes:
        claim: its key.
        ours: our number as text, with its unit.
        n: what it is a statistic of, counted, and `of` what those are ("firings", "features").
        ci95: its interval, in the number's own unit, or None where it has none; then `why_no_interval`.
        nulls: what the null models do, by the same measure; one sentence.
        verdict: "holds", "does not hold", "cannot be told" (the interval holds both), or "not comparable".
    """

    claim: str
    ours: str
    n: int
    of: str
    ci95: tuple[float, float] | None
    nulls: str
    verdict: str
    why_no_interval: str = ""

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict: expected one of {', '.join(VERDICTS)}, got {self.verdict!r}")
        if self.ci95 is None and not self.why_no_interval:
            raise ValueError(f"ci95: expected an interval for {self.claim}, or why there is none, got None")


VERDICTS = ("holds", "does not hold", "cannot be told", "not comparable")


@dataclass(frozen=True)
class Figure:
    """A picture: `paint(axes, colours)` draws it on matplotlib axes, with the colours of `report.plots.COLOURS`, once
    for light paper and once for dark; the caption says what is to be seen."""

    paint: Callable[[Any, Mapping[str, str]], None]
    caption: str
    size: tuple[float, float] = (5.6, 3.6)


@dataclass
class Findings:
    """What a study returns.

    Attributes:
        statistics: ready for JSON; every entry that is a statistic carries its n and interval (see
            `experiments.statistics`).
        tables: {name: columns `[n]`}: a CSV file each, the rows behind the statistics.
        figures: {name: Figure}.
        answers: one for every claim of the study.
        notes: what a reader must know to read them right: one sentence each.
    """

    statistics: dict[str, Any]
    tables: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """A number or text that a study can be told by `--set NAME=VALUE`: its value in a full and in a quick run."""

    full: Any
    quick: Any
    help: str


@dataclass(frozen=True)
class Study:
    """An experiment of the paper.

    Attributes:
        name: of its command and folder.
        title: a heading; `what`: two or three sentences for a reader who has not read the code.
        claims: the paper's, that it answers to; every one is answered.
        settings: {name: Setting}.
        run: takes a `Lab`, returns `Findings`.
        needs: which dictionaries: "state", "write" or "" for none.
    """

    name: str
    title: str
    what: str
    claims: tuple[Claim, ...]
    settings: Mapping[str, Setting]
    run: Callable[[Lab], Findings]
    needs: str = "state"


@cache
def studies() -> dict[str, Study]:
    """{name: Study}, in the report's order: the `STUDY` of each file."""
    found = {name: import_module(f".{name}", __package__).STUDY for name in NAMES}
    assert all(study.name == name for name, study in found.items())
    return found


def save(study: Study, findings: Findings, folder: Path, record: Mapping[str, Any]) -> dict:
    """Writes summary.json, a CSV a table and the pictures; returns the summary.

    Args:
        record: what else the summary says: model, texts, settings, seed, command, seconds, versions.
    Raises:
        ValueError: a claim without an answer, or an answer to none.
    """
    from ..report import plots

    keys, answered = [claim.key for claim in study.claims], [answer.claim for answer in findings.answers]
    if sorted(keys) != sorted(answered):
        raise ValueError(f"answers: expected one for each of {', '.join(keys)}, got {', '.join(answered) or 'none'}")
    folder = make_folder(folder)
    for name, table in findings.tables.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*(np.asarray(column).tolist() for column in table.values()), strict=True))
        write_text(folder / f"{name}.csv", text.getvalue())
    for name, figure in findings.figures.items():
        plots.draw(folder / "plots" / f"{name}.svg", figure.size, figure.paint)
    summary = {
        "study": study.name, "title": study.title, "what": study.what, **record, "statistics": findings.statistics,
        "claims": [asdict(claim) for claim in study.claims], "answers": [asdict(answer) for answer in findings.answers],
        "figures": {name: figure.caption for name, figure in findings.figures.items()},
        "tables": {name: len(next(iter(table.values()))) for name, table in findings.tables.items()},
        "notes": findings.notes,
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    return summary


def remember(folder: Path, known: Iterable[Study], ran: Collection[str], failed: Mapping[str, str]) -> None:
    """Writes `paper.json` beside the studies' folders, for the report: which studies there are, in its order, and why
    the latest run of one failed, where it did.

    Args:
        ran: names of those that this run was of; of others, what was written before stays.
        failed: {name: why}.
    """
    path = folder / "paper.json"
    before = {}
    if path.is_file():
        before = {study["name"]: study["failed"] for study in read_json(path)["studies"]}
    write_json(make_folder(folder) / path.name, {"studies": [
        {"name": study.name, "title": study.title,
         "failed": failed.get(study.name) if study.name in ran else before.get(study.name)} for study in known
    ]})  # fmt: skip


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of several units' tables, in order; empty ones left out."""
    return concatenate([part for part in parts if part and len(next(iter(part.values())))])
