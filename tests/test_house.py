"""The house rules a reader relies on: one stem an op, who may import whom, no file that eats the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "writesae"
OPS = sorted(p.stem for p in (PACKAGE / "ops" / "reference").glob("*.py") if p.stem != "__init__")

# folder or module -> what of writesae it may import (itself always)
MAY_IMPORT = {
    "_arguments": set(),
    "_autocast": set(),
    "writes": {"edits", "_arguments", "_autocast"},
    "firings": {"_arguments"},
    "edits": {"_arguments"},
    "files": set(),
    "untrusted": set(),
    "options": set(),
    "ops": {"writes", "firings", "edits", "_library", "_arguments", "_autocast"},
    "text": {"default"},
    "sae": {
        "ops", "writes", "firings", "edits", "files", "models", "default", "text", "_arguments", "options", "untrusted",
        "_library",
    },
    "models": {"ops", "writes", "firings", "edits", "files", "default", "untrusted"},
    "collect": {"models", "sae", "firings", "edits", "files", "default", "text", "_library", "options"},
    "experiments": {
        "models", "sae", "ops", "writes", "firings", "edits", "files", "collect", "report", "default", "text",
        "options",
    },
    "report": {"firings", "files", "collect", "untrusted"},
}
EXTRAS = {"scipy", "statsmodels", "sklearn", "matplotlib", "datasets", "jinja2", "pandas", "plotly", "transformer_lens"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names a file imports, relative ones resolved."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).with_suffix("").parts
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join(package[: len(package) - node.level])
                prefix = f"{base}.{node.module}" if node.module else base
            else:
                prefix = node.module
            found |= {f"{prefix}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    here = room(path)
    names = imports(path)
    if here in MAY_IMPORT:
        for name in names:
            if not name.startswith("writesae."):
                continue
            target = name.split(".")[1]
            allowed = MAY_IMPORT[here] | {here, "__version__"}
            assert target in allowed, f"{here} may not import {target} ({name})"
    if here not in ("models", "bench"):  # a benchmark runs its peers
        for name in names:
            if name.split(".")[0] == "transformers":
                raise AssertionError(f"only models/ and bench/ import transformers, found {name}")
    if here != "__main__":
        assert not any(f"{name}.".startswith("writesae.cli.") for name in names), "cli imports all, nobody imports it"
    for name in imports(path, top_level_only=True):
        assert name.split(".")[0] not in EXTRAS, f"{name} is an extra: import it where it is used"


@pytest.mark.parametrize("stem", OPS)
def test_one_stem_an_op(stem):
    for path in (f"writesae/ops/{stem}.py", f"writesae/ops/reference/{stem}.py", f"tests/test_{stem}.py"):
        assert (ROOT / path).is_file(), f"{path} is missing"
    kernel = ROOT / "csrc" / "cpu" / f"{stem}.cpp"
    if kernel.exists():
        assert (ROOT / "csrc" / f"{stem}.h").is_file()
        assert (PACKAGE / "bench" / f"bench_{stem}.py").is_file()


def test_every_kernel_has_its_stem():
    for path in (ROOT / "csrc" / "cpu").glob("*.cpp"):
        assert path.stem.removesuffix("_backward") in OPS, f"csrc/cpu/{path.name} belongs to no op"


def test_files_stay_readable():
    for folder in ("writesae", "csrc", "tests", "bench", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                lines = path.read_text().count("\n")
                assert lines <= 700, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def test_import_is_light():
    """Importing the package needs no transformers, no extras and no compiled library."""
    code = "import sys, writesae; print([m for m in ('transformers', 'torch', 'scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_cuda_and_cpu_sources_do_not_meet():
    for side, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in (ROOT / "csrc" / side).glob("*"):
            assert f"{other}/" not in "".join(x for x in path.read_text().splitlines() if "#include" in x)


def test_public_names_load():
    import writesae

    for name in writesae.__all__:
        assert getattr(writesae, name) is not None
