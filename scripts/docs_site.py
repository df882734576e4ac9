"""What the documentation's site holds beside docs/*.md; mkdocs loads this file as a hook (mkdocs.yml).

Added before the pages are read: a page of the API reference for every public module, from what the package says is
public; the notebooks of docs/notebooks as `scripts/run_notebooks.py` left them in build/notebooks, with what they
printed and drew; and files that stand outside docs/ and are linked from it. Links between those and docs/ are
turned into links within the site.
"""

from __future__ import annotations

import inspect
import logging
import posixpath
import re
from html import escape
from pathlib import Path
from types import ModuleType

import nbformat
from mkdocs.structure.files import File

import writesae

ROOT = Path(__file__).resolve().parents[1]
RAN = ROOT / "build" / "notebooks"
# Linked from docs/, and of the site at the same path.
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md", "bench/results/bench.png")
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
INK = "#7f7f80"  # of text and lines in docs/notebooks/matplotlibrc
log = logging.getLogger("mkdocs.hooks.docs_site")


def on_config(config):
    section = {name: pages for entry in config.nav for name, pages in entry.items()}
    section["Reference"] += [reference_path(name) for name in public_modules()]
    placed = re.findall(r"[\w/-]+\.md", str(config.nav))  # others' place follows
    decisions = next(entry["Decisions"] for entry in section["Development"] if "Decisions" in entry)
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if (name := path.relative_to(ROOT / "docs").as_posix()) not in placed:
            (decisions if name.startswith("decisions/") else section["Guides"]).append(name)
    return config


def on_files(files, config):
    for name in BESIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    told: dict[str, str] = {}
    for name, module in sorted(public_modules().items(), key=lambda item: item[0].count(".")):
        files.append(File.generated(config, reference_path(name), content=reference(name, module, told)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/, and from outside into it, as links within the site; to other files: their text alone."""
    source = page.file.abs_src_path
    if source is None:  # made above
        return markdown
    here = Path(source).parent

    def within(match: re.Match) -> str:
        label, path, anchor = match.group(1), match.group(2), match.group(3) or ""
        if re.match(r"[a-z]+:", path):
            return match.group(0)
        target = (here / path).resolve()
        inside = target.is_relative_to(ROOT / "docs")
        uri = target.relative_to(ROOT / "docs" if inside else ROOT).as_posix()
        if target.is_dir() and inside:
            uri = f"{uri}/README.md"
        uri = re.sub(r"\.ipynb$", ".md", uri)  # the page of a notebook
        if not inside and uri not in BESIDE:
            return label
        return f"[{label}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(within, markdown[at : fence.start()]), fence.group(0)]
        at = fence.end()
    return "".join([*parts, LINK.sub(within, markdown[at:])])


# ---- API reference --------------------------------------------------------------------------------------------------


def public_modules(module: ModuleType = writesae) -> dict[str, ModuleType]:
    """{name: module} of a module, those among its public names, and theirs."""
    found = {module.__name__: module}
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            found |= public_modules(value)
    return found


def reference_path(name: str) -> str:
    return f"reference/{name}.md"


def reference(name: str, module: ModuleType, told: dict[str, str]) -> str:
    """The page of a module, for mkdocstrings to fill: its docstring, and every public name, unless another page tells
    of it. `told`: {where it is defined: the module whose page does}."""
    own = getattr(module, "__all__", None)
    if own is None:  # what it defines itself
        own = [x for x, value in vars(module).items() if getattr(value, "__module__", None) == name]
    own = [x for x in own if not x.startswith("_")]
    inner = [x for x in own if isinstance(getattr(module, x), ModuleType)]
    lines = [f"# {name}", "", inspect.getdoc(module) or "", ""]
    if inner:
        lines += ["Modules: " + ", ".join(f"[{x}]({name}.{x}.md)" for x in inner), ""]
    for x in own:
        if x in inner:
            continue
        value = getattr(module, x)
        where = home(value, name, x)
        if told.setdefault(where, name) == name:
            lines += [f"::: {where}", "", *shapes(value), ""]
        else:
            lines += [f"## {x}", "", f"See [`{told[where]}.{x}`][{where}].", ""]
    return "\n".join(lines)


def home(value, module: str, name: str) -> str:
    """Where a public name is defined, which mkdocstrings reads without running it."""
    inner = inspect.unwrap(value) if callable(value) else value
    if inspect.isclass(inner) or inspect.isfunction(inner):
        return f"{inner.__module__}.{inner.__qualname__}"
    return f"{module}.{name}"


def shapes(value) -> list[str]:
    """The shapes that stand as comments beside a function's parameters, as a list."""
    if not inspect.isfunction(value):
        return []
    head = inspect.getsource(inspect.unwrap(value)).partition('"""')[0]
    found = re.findall(r"^    (\w+): .*?# (.*\].*)$", head, re.MULTILINE)
    return ["Shapes:", "", *(f"- {name}: `{shape}`" for name, shape in found)] if found else []


# ---- notebooks ------------------------------------------------------------------------------------------------------


def notebook(path: Path) -> str:
    """A notebook as it last ran, or, where it did not, without what it shows; Markdown."""
    cells, note = nbformat.read(path, as_version=4).cells, ""
    ran = RAN / path.name
    if ran.is_file():
        kept, cells = cells, nbformat.read(ran, as_version=4).cells
        if [x.source for x in kept] != [x.source for x in cells]:
            log.warning("%s has changed since it ran: python scripts/run_notebooks.py", path.name)
    else:
        note = "This notebook was not run for this build: `make docs` shows what its cells print and draw."
        log.info("%s was not run: python scripts/run_notebooks.py", path.name)
    parts = []
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", cell.source))
            if number == 0:
                parts += [
                    f"[This page as a notebook]({path.name}){{: download={path.name} }}",
                    f"*{note}*" if note else "",
                ]
        else:
            parts.append(f"```python\n{cell.source}\n```")
            parts += [x for output in cell.outputs for x in output_of(output, cell.metadata.get("alt", ""))]
    return "\n\n".join(parts) + "\n"


def output_of(output, alt: str) -> list[str]:
    """What a cell gave, as Markdown: text, a table or a picture."""
    if output.output_type == "stream":
        return [plain(output.text)] if output.name == "stdout" else []
    data = output.get("data", {})
    if "image/svg+xml" in data:
        return [f'<div class="output">{inline(data["image/svg+xml"], alt)}</div>']
    if "<table" in data.get("text/html", ""):
        table = re.sub(r"<style.*?</style>|</?div[^>]*>", "", data["text/html"], flags=re.DOTALL)
        table = re.sub(r"<table[^>]*>", "<table>", table)
        return ['<div class="output">' + "".join(line.strip() for line in table.splitlines()) + "</div>"]
    return [plain(data["text/plain"])] if "text/plain" in data else []


def inline(svg: str, alt: str) -> str:
    """A figure of matplotlib to stand in a page, drawn in the colour of its text (notebooks/matplotlibrc), one line."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg", f'<svg role="img" aria-label="{escape(alt)}"', svg, count=1)
    return re.sub(r"\s*\n\s*", " ", svg.replace(INK, "currentColor"))


def plain(text: str) -> str:
    return f'<div class="output" markdown>\n\n```text\n{text.rstrip()}\n```\n\n</div>'
