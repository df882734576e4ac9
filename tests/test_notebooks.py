"""The notebooks of docs/, without running them: `make docs` does. Their links and commands: test_docs.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
each_notebook = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def test_there_are_four():
    assert len(list(FOLDER.glob("*.ipynb"))) == 4


@each_notebook
def test_no_outputs_are_kept(path):
    """The site shows those of its own build; kept ones would be of some other."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@each_notebook
def test_pictures_are_told_in_words(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "plt.show()" in "".join(cell["source"]):
            assert len(cell["metadata"].get("alt", "")) > 20, "".join(cell["source"])


@each_notebook
def test_it_begins_with_its_title_and_ends_with_what_is_next(path):
    first, *_, last = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert first["cell_type"] == last["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ") and "## What next\n" in "".join(last["source"])
