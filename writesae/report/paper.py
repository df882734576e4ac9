"""The report of all the paper's studies: one page from the folders that `writesae paper --all` wrote."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text
from .html import template


def build(folder: str | Path) -> Path:
    """Writes `report.html` into the folder of a run of `writesae paper --all`, and returns its path."""
    page = Path(folder) / "report.html"
    write_text(page, template("paper.html.j2").render(studies=sorted(Path(folder).glob("*/summary.json"))))
    return page
