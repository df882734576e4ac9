"""The documentation says what is so: links lead somewhere, what is named exists, marked code runs, the ledger is the
table of the results, and every public name says what it takes."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

import writesae
from writesae import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASE.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")),
]
each_page = pytest.mark.parametrize("page", DOCS, ids=lambda p: str(p.relative_to(ROOT)))

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# What may stand above a block of Python: it runs as it is, after those before it on its page; it is a file that a
# recipe makes; or it is shown only.
MARKS = ("runs", "file", "shown")


def text_of(page: Path) -> str:
    """A page; a notebook as one, its cells in blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "markdown":
            shell = re.findall(r"^!((?:.*\\\n)*.*)$", source, re.MULTILINE)
            source = f"```python\n{source}\n```" + "".join(f"\n\n```sh\n{line}\n```" for line in shell)
        parts.append(source)
    return "\n\n".join(parts)


def prose(page: Path) -> str:
    return FENCE.sub("", text_of(page))


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(mark, code) of every block in a language; the mark is "" where none stands above."""
    text, found = text_of(page), []
    for match in FENCE.finditer(text):
        if match.group(2) == language:
            above = re.search(r"<!-- (\w+)[^>]*-->\s*$", text[: match.start()])
            found.append((above.group(1) if above else "", dedent(match.group(3))))
    return found


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading in {target.name}"


# Words in backticks that begin like a path of the repository.
PATH = re.compile(r"^(?:csrc|writesae|tests|docs|scripts|bench|\.ci)/[\w./*{},-]+$")


def expand(path: str) -> list[str]:
    """`a{b,c}` as a shell has it."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        return [path]
    return [x for part in braces.group(1).split(",") for x in expand(path.replace(braces.group(0), part, 1))]


@each_page
def test_files_named_are_there(page):
    made = {x for other in DOCS for x in re.findall(r"<!-- file: (\S+)", text_of(other))}  # by following a recipe
    for word in re.findall(r"`([^`\n]+)`", prose(page)):
        if not PATH.match(word):
            continue
        for path in expand(word):
            assert path in made or list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}"


@each_page
def test_tests_named_are_there(page):
    known = {
        x for path in (ROOT / "tests").glob("*.py") for x in re.findall(r"^def (test_\w+)", text_of(path), re.MULTILINE)
    }
    for name in re.findall(r"`(test_\w+)`", prose(page)):
        assert name in known, f"{page.name} names {name}"


def commands(page: Path) -> list[list[str]]:
    """Words of the command lines in shell blocks and in backticks; comments and variables set in front are left out."""
    text = text_of(page).replace("\\\n", " ")
    lines = [line for fence in FENCE.findall(text) if fence[1] in ("sh", "") for line in fence[2].splitlines()]
    lines += [re.sub(r"\s+", " ", x) for x in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    found = []
    for part in (x for line in lines for x in line.split(" && ")):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue  # no command
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            found.append([words[0].removeprefix(".venv/bin/"), *words[1:]])
    return found


@each_page
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            for name in (x for x in words[1:] if "=" not in x):
                assert name in targets, f"{page.name}: make {name}"


@each_page
def test_commands_and_their_options_exist(page):
    parsers = cli.parser("*")._subparsers._group_actions[0].choices
    for words in commands(page):
        if words[0] != "writesae" or len(words) == 1 or words[1].isupper() or words[1].startswith("-"):
            continue
        assert words[1] in parsers, f"{page.name}: {shlex.join(words)}"
        known = parsers[words[1]]._option_string_actions
        for option in (x.partition("=")[0] for x in words[2:] if re.match(r"--?[a-zA-Z]", x)):
            assert option in known, f"{page.name}: {shlex.join(words)} has no {option}"


@each_page
def test_scripts_exist(page):
    for words in commands(page):
        names = words[1:2] if words[0] in ("python", "bash") else words[:1]
        for name in (x for x in names if re.match(r"(scripts|bench)/.*\.(py|sh)$", x)):
            assert (ROOT / name).is_file(), f"{page.name}: {shlex.join(words)}"


# The README's run in test_readme.py, notebooks by scripts/run_notebooks.py.
PAGES = [page for page in DOCS if page != ROOT / "README.md" and page.suffix == ".md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_of_python_say_what_they_are_and_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "docs"}
    for mark, code in blocks(page, "python"):
        assert mark in MARKS, f"{page.name}: no <!-- {' | '.join(MARKS)} --> above\n{code}"
        if mark == "runs":
            exec(compile(code, page.name, "exec"), names)
        elif mark == "file":
            compile(code, page.name, "exec")


def test_the_ledger_is_the_table_of_the_results(tmp_path):
    from writesae.bench import MODULES
    from writesae.bench.case import load_cases
    from writesae.bench.record import read_records
    from writesae.bench.show import ordered, readme

    ledger, results = ROOT / "docs" / "measured.md", ROOT / "bench" / "results"
    page = tmp_path / "docs" / "measured.md"
    page.parent.mkdir()
    page.write_text(text_of(ledger), encoding="utf-8")
    records = ordered(read_records(results), [case.name for case in load_cases(MODULES)])
    readme(page, records, tmp_path / "bench" / "results" / "bench.png")
    assert text_of(page) == text_of(ledger), "writesae bench --show --readme docs/measured.md"


# By page, what of the copy's tests is run, and by which name.
RECIPES = {
    "adding-a-rule": "retention: test_retention.py test_rules.py::test_sizes test_rules.py::test_edit_kinds",
    "adding-a-model": "keeper: test_keeper.py",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_followed(name, tmp_path):
    """To the letter, in a copy without anything compiled: what it adds works on the references."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from try_recipe import copy, follow

    folder = tmp_path / "copy"
    copy(folder)
    assert len(follow(ROOT / "docs" / f"{name}.md", folder)) > 4
    new, _, tests = RECIPES[name].partition(": ")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", new, *tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(run, cwd=folder / "tests", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def templates() -> list[str]:
    """The texts in the package's sources, `…` where a value is put into them; and the Makefile."""
    found = [text_of(ROOT / "Makefile")]
    for path in (ROOT / "writesae").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(x.value if isinstance(x, ast.Constant) else "…" for x in node.values))
    return found


def test_messages_of_the_faq_are_said_by_the_package():
    quoted = re.findall(r"^### `(.*)`$", text_of(ROOT / "docs" / "faq.md"), re.MULTILINE)
    assert len(quoted) > 25
    known = templates()
    for message in quoted:
        parts = [re.escape(part) for part in message.split("…")]
        assert max(map(len, parts)) > 10, f"{message}: too little to look for"
        assert any(re.search(".*".join(parts), text) for text in known), f"faq.md: nothing says {message}"


# ---- docstrings -----------------------------------------------------------------------------------------------------

DOORS = [writesae, writesae.ops, writesae.models, writesae.sae]
# Classes that nobody but the package makes: their attributes are what matters.
MADE_HERE = ("Tap", "Stopped")


def public_names() -> list[tuple[str, object]]:
    found = [(f"{module.__name__}.{name}", getattr(module, name)) for module in DOORS for name in module.__all__]
    return [(name, x) for name, x in found if inspect.isroutine(x) or inspect.isclass(x)]


def parameters(function) -> dict[str, inspect.Parameter]:
    found = inspect.signature(function).parameters
    return {name: p for name, p in found.items() if name not in ("self", "cls") and not name.startswith("_")}


def named_in(name: str, doc: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", doc) is not None


each_name = pytest.mark.parametrize("name, what", public_names(), ids=[name for name, _ in public_names()])


@each_name
def test_public_names_say_what_they_take(name, what):
    doc = inspect.getdoc(what) or ""
    assert len(doc) > 20, f"{name} has no docstring"
    if inspect.isclass(what):
        doc += inspect.getdoc(what.__init__) or ""
        if what.__name__ in MADE_HERE:
            return
    for parameter in parameters(what):
        assert named_in(parameter, doc), f"{name}: the docstring says nothing of {parameter}"


@pytest.mark.parametrize("name, what", [x for x in public_names() if inspect.isclass(x[1])], ids=lambda x: str(x))
def test_public_methods_have_docstrings(name, what):
    for method, x in vars(what).items():
        function = x.__func__ if isinstance(x, (classmethod, staticmethod)) else getattr(x, "fget", x)
        if not method.startswith("_") and inspect.isfunction(function) and function.__name__ != "<lambda>":
            assert len(inspect.getdoc(getattr(what, method)) or "") > 10, f"{name}.{method} has no docstring"


def operators() -> list[str]:
    """Functions on tensors."""
    found = []
    for name in writesae.ops.__all__:
        x = getattr(writesae.ops, name)
        if inspect.isfunction(x) and any("Tensor" in str(p.annotation) for p in parameters(x).values()):
            found.append(name)
    return found


@pytest.mark.parametrize("name", operators())
def test_operators_say_shapes_and_errors(name):
    function = getattr(writesae.ops, name)
    doc, source = inspect.getdoc(function), inspect.getsource(inspect.unwrap(function))
    if len(parameters(function)) > 1:
        assert re.search(r"Raises|ValueError|raises|refused", doc), f"{name}: raises what?"
    for parameter, p in parameters(function).items():
        if str(p.annotation).startswith("Tensor"):
            beside = re.search(rf"^    {parameter}: .*# (\[|scalar|as )", source, re.MULTILINE)
            assert beside or "`[" in doc, f"{name}: no shape of {parameter}"


def test_write_rules_name_their_source():
    rules = [name for name in writesae.ops.__all__ if (ROOT / f"writesae/ops/reference/{name}.py").is_file()]
    assert len(rules) > 4
    for name in rules:
        doc = inspect.getdoc(getattr(writesae.ops, name, None)) or ""
        if "Writes" in doc:
            assert re.search(r"arXiv|Source", doc), f"{name}: no source"


def test_modules_say_what_they_hold():
    for module in [writesae, *(x for name in writesae.__all__ if isinstance(x := getattr(writesae, name), ModuleType))]:
        assert len(inspect.getdoc(module) or "") > 20, module.__name__


def test_no_generated_page_is_kept():
    assert not [x for x in (ROOT / "docs").rglob("*") if fnmatch(x.name, "*.html")]
