"""Writes the API reference, HTML made from the docstrings of the public names; `make docs`.

    python scripts/api_reference.py [FOLDER]

FOLDER is build/docs by default, and is not committed. Needs pdoc (the extra `docs`), which nothing else here uses.
tests/test_docs.py checks the docstrings themselves, without it.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render

import writesae

ROOT = Path(__file__).resolve().parents[1]


def public_modules(module: ModuleType = writesae) -> list[str]:
    """A module, the modules among its public names, and theirs. Their public names are loaded: pdoc looks into a
    module's dictionary, which the package fills on first use."""
    names = [module.__name__]
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            names += public_modules(value)
    return names


def show_shapes(module: ModuleType) -> None:
    """Adds to the docstrings of a module's functions the shapes that stand as comments beside their parameters."""
    for name in module.__all__:
        function = getattr(module, name)
        if inspect.isfunction(function):
            function = inspect.unwrap(function)  # whose docstring pdoc takes
            source = inspect.getsource(function).partition('"""')[0]
            lines = [
                f"- {x}: `{shape}`" for x, shape in re.findall(r"^    (\w+): .*?# (.*\].*)$", source, re.MULTILINE)
            ]
            if lines:
                function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Shapes:", "", *lines])


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"
    public = "|".join(re.escape(name) for name in public_modules())
    pdoc.render.configure(docformat="google", footer_text=f"writesae {writesae.__version__}")
    show_shapes(writesae.ops)
    pdoc.pdoc("writesae", f"!(?!(?:{public})$)", output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main()
