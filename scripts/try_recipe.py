"""Follows a recipe of docs/ to the letter, in a copy of the repository.

    python scripts/try_recipe.py docs/adding-a-rule.md FOLDER

Copies the sources of this clone to FOLDER, which must not exist, and makes there, in order, what the page says:
`<!-- file: PATH -->` above a block is a file with that content; `<!-- edit: PATH -->` above a diff is a change of one
whose lines of context must be found exactly once; `<!-- make -->` above a shell block makes files by running it.
Building and testing, which the page names too, are left to you. tests/test_docs.py follows the recipes so far.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "docs", "scripts", "tests", "writesae", "bench")  # what a recipe may touch, or its tests read
BLOCK = re.compile(r"<!-- (file|edit|make)(?:: (\S+))? -->\n( *)```\w*\n(.*?)^\3```$", re.MULTILINE | re.DOTALL)


def copy(folder: Path) -> None:
    """The sources without anything compiled."""
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in (p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"):
        shutil.copy2(path, folder)


def changed(text: str, diff: str, what: str) -> str:
    """A text with one change: lines that begin with " " or "-" are looked for, in one piece, and those with " " or "+"
    stand there afterwards.

    Raises:
        ValueError: they are not there exactly once.
    """
    lines = [line or " " for line in diff.splitlines()]
    before, after = ("".join(f"{x[1:]}\n" for x in lines if x[0] in marks) for marks in (" -", " +"))
    if text.count(before) != 1:
        raise ValueError(f"{what}: expected these lines once, found them {text.count(before)} times:\n{before}")
    return text.replace(before, after)


def follow(page: Path, folder: Path) -> list[str]:
    """Makes in a copy of the repository what a page says. Returns the files made or changed."""
    touched = []
    for kind, path, _, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        body = dedent(body)
        if kind == "make":
            subprocess.run(["bash", "-euc", body], cwd=folder, check=True)
            continue
        to = folder / path
        if kind == "file":
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(body, encoding="utf-8")
        else:
            to.write_text(changed(to.read_text(encoding="utf-8"), body, f"{page.name}, {path}"), encoding="utf-8")
        touched.append(path)
    return touched


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[2])
    copy(folder)
    print("\n".join(follow(Path(sys.argv[1]), folder)))


if __name__ == "__main__":
    main()
