"""The house rules a reader relies on: one stem an op, who may import whom, no file that eats the package."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CSRC = ROOT / "writesae", ROOT / "csrc"
OPS = sorted(p.stem for p in (PACKAGE / "ops" / "reference").glob("*.py") if p.stem not in ("__init__", "scan"))
RULES = tuple(x for x in OPS if "\nRULE = Rule(" in (PACKAGE / "ops" / f"{x}.py").read_text())  # ops that make writes
MACHINERY = ("scan", "tile", "operand", "host_twin", "library")  # files of csrc/cuda that serve every op

# folder or module -> what of writesae it may import (itself always)
MAY_IMPORT = {
    "_arguments": set(),
    "_autocast": set(),
    "_installed": set(),
    "writes": {"edits", "_arguments", "_autocast"},
    "firings": {"_arguments"},
    "edits": {"_arguments"},
    "files": set(),
    "interrupt": set(),
    "objects": {"files", "untrusted"},
    "progress": set(),
    "console": set(),
    "completion": set(),
    "untrusted": set(),
    "options": {"_library", "default", "sae"},
    "ranks": set(),
    "ops": {"writes", "firings", "edits", "_library", "_arguments", "_autocast"},
    "text": {"default", "files", "objects", "untrusted"},
    "sae": {
        "ops",
        "writes",
        "firings",
        "edits",
        "files",
        "interrupt",
        "console",
        "progress",
        "models",
        "default",
        "text",
        "_arguments",
        "options",
        "ranks",
        "untrusted",
        "_library",
    },
    "policies": {"_arguments"},
    "models": {"ops", "writes", "firings", "edits", "files", "default", "untrusted", "policies"},
    "collect": {
        "_installed",
        "objects",
        "models",
        "ranks",
        "sae",
        "firings",
        "edits",
        "files",
        "interrupt",
        "progress",
        "default",
        "text",
        "untrusted",
        "_library",
        "options",
    },
    "atoms": {"firings", "models", "ops", "sae", "text"},
    "experiments": {
        "_installed",
        "atoms",
        "policies",
        "untrusted",
        "models",
        "sae",
        "ops",
        "writes",
        "firings",
        "edits",
        "files",
        "interrupt",
        "progress",
        "collect",
        "report",
        "default",
        "text",
        "options",
    },
    "report": {"firings", "files", "collect", "untrusted"},
    "bridges": {
        "atoms",
        "browse",
        "collect",
        "default",
        "edits",
        "files",
        "firings",
        "models",
        "options",
        "progress",
        "sae",
        "untrusted",
        "writes",
    },
    # Never ops: pages are read where nothing is compiled. Models and dictionaries load when something is made of them.
    "browse": {
        "atoms",
        "collect",
        "default",
        "files",
        "interrupt",
        "models",
        "policies",
        "report",
        "sae",
        "text",
        "untrusted",
        "firings",
        "progress",
    },
}
EXTRAS = {
    "scipy",
    "statsmodels",
    "sklearn",
    "matplotlib",
    "datasets",
    "jinja2",
    "pandas",
    "duckdb",
    "plotly",
    "transformer_lens",
    "sae_lens",
    "nnsight",
    "accelerate",
    "starlette",
    "uvicorn",
}


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


def test_write_rules_are_ops():
    assert set(RULES) <= set(OPS)


def test_every_kernel_has_its_stem():
    for path in (ROOT / "csrc" / "cpu").glob("*.cpp"):
        assert path.stem.removesuffix("_backward") in OPS, f"csrc/cpu/{path.name} belongs to no op"
    for path in (*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cuh"), *CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.h")):
        stem = next((x for x in (*OPS, *MACHINERY) if f"{path.stem}_".startswith(f"{x}_")), None)
        assert stem is not None, f"csrc/cuda/{path.name} belongs to no op"
        assert stem in MACHINERY or (CSRC / f"{stem}.h").is_file()


def rule_of(path: Path) -> str | None:
    """The write rule whose name a file bears."""
    return next((rule for rule in RULES if f"{path.stem}_".startswith(f"{rule}_")), None)


def code(path: Path) -> str:
    """A C++ file without comments."""
    return re.sub(r"//.*|/\*.*?\*/", "", path.read_text())


SOURCES = sorted(x for x in CSRC.rglob("*") if x.suffix in (".cpp", ".h", ".cu", ".cuh"))
TABLES = {"library.cpp", "operators.h", "schemas.h", "scans.h"}  # of all operators, in csrc and csrc/cuda


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_a_write_rule_is_named_in_its_own_files_only(path):
    if path.name in TABLES or path.parent.name == "test":
        return
    text, mine = path.read_text(), rule_of(path)
    for rule in RULES:
        if rule == mine:
            continue
        camel = "".join(x.capitalize() for x in rule.split("_"))
        for word in re.findall(rf"\b{rule}(?:_\w+)?\b|\b{camel}\w*", text):
            raise AssertionError(f"csrc/{path.relative_to(CSRC)} names {word}")


@pytest.mark.parametrize("rule", RULES)
def test_one_namespace_a_write_rule(rule):
    """Or two rules' kernels of one name would be taken for one by the linker, without a word."""
    for side in ("cpu", "cuda"):
        for path in (x for x in (CSRC / side).glob("*") if rule_of(x) == rule):
            names = set(re.findall(r"^namespace (writesae[\w:]*)", code(path), re.MULTILINE))
            kernel = path.suffix == ".h"  # included inside a namespace
            assert names == {f"writesae::{side}::{rule}"} or (kernel and not names), f"csrc/{side}/{path.name}: {names}"


def symbols(path: Path) -> set[str]:
    """What an object defines, readable, without arguments, types, and what stands inside functions."""
    out = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    found = set()
    for line in out.splitlines():
        name = line[19:].replace("(anonymous namespace)", "anonymous").split(" [clone")[0].split("::{")[0]
        depth, kept = 0, ""
        for c in name:
            depth -= c in ">)"
            kept += c if depth == 0 and c not in ">)" else ""
            depth += c in "<("
        found.add(re.sub(r"[<(]|\[abi:\w+\]", "", kept).removesuffix(" const").split(" ")[-1])
    return {x for x in found if x.startswith("writesae::")}


def own_symbols(path: Path, rule: str) -> set[str]:
    """Symbols of a rule's object that bear neither its name, nor one that a file of no op at all knows."""
    side = "cuda" if "twin" in path.parent.name else "cpu"
    shared = [x for x in SOURCES if x.parent in (CSRC, CSRC / side) and x.suffix != ".cpp" and x.name not in TABLES]
    shared = " ".join(code(x) for x in shared if not f"{x.stem}_".startswith(tuple(f"{op}_" for op in OPS)))
    known = set(re.findall(r"\w+", shared))
    found = set()
    for symbol in symbols(path):
        inner = re.sub(r"^writesae::(?:(?:cpu|cuda|tile|twin|anonymous|avx512|avx2|portable)::)*", "", symbol)
        own = symbol.startswith((f"writesae::cpu::{rule}::", f"writesae::cuda::{rule}::")) or inner.startswith(rule)
        if not own and inner.split("::")[0] not in known:
            found.add(symbol)
    return found


def test_every_symbol_of_a_write_rule_bears_its_name(request):
    """In the objects of the host twin that was given, and of the CPU library where it was built here."""
    given = request.config.getoption("--twin")
    folders = [Path(given).parent] if given else []
    folders += [ROOT / "build" / "temp" / "_C_cpu" / "csrc" / "cpu", ROOT / "build" / "temp" / "_C_cpu" / "csrc"]
    objects = [x for folder in folders for x in folder.glob("*.o") if rule_of(Path(x.name.split(".")[0]))]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no objects of kernels here (--twin PATH), or no nm")
    for path in objects:
        rule = rule_of(Path(path.name.split(".")[0]))
        assert any(rule in x for x in symbols(path)), f"{path.name}: nothing was looked at"
        assert not own_symbols(path, rule), f"{path.name} defines {sorted(own_symbols(path, rule))}"


def test_files_stay_readable():
    for folder in ("writesae", "csrc", "tests", "bench", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                lines = path.read_text().count("\n")
                assert lines <= 700, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def test_only_writes_knows_how_its_heads_lie():
    """Others ask `Writes.head`, `native`, `rank_one`, `left_head`: an index by hand takes write 0 of two in silence."""
    by_hand = re.compile(r"shape\[2\] // |left\.shape\[2\]|\.(?:left|right)\[[^\]]*, 0\]|\[:, :, :, 0\]")
    makers = {  # of writes, from their parts
        "writes.py",
        "ops/scan.py",
        "ops/reference/scan.py",
        "ops/selective_scan.py",
    }  # of writes, from their parts
    found = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if by_hand.search(p.read_text())}
    assert "writes.py" in found and found <= makers, found - makers


def calls(path: Path) -> set[str]:
    """What a file calls, as far as it has a name: "os.replace", ".write_text", "open w"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        f = node.func
        name = f.id if isinstance(f, ast.Name) else f".{f.attr}" if isinstance(f, ast.Attribute) else ""
        if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in ("os", "shutil", "signal"):
            name = f.value.id + name
        strings = [x.value for x in (*node.args, *(k.value for k in node.keywords if k.arg == "mode"))
                   if isinstance(x, ast.Constant) and isinstance(x.value, str)]  # fmt: skip
        modes = [x for x in strings if re.fullmatch(r"[rwaxbt+]{1,4}", x) and set(x) & set("wax+")]
        found.add(f"{name} to write" if name in ("open", ".open", "os.fdopen") and modes else name)
    return found


WRITING = {"os.replace", "os.rename", "os.renames", "shutil.move", ".rename", ".write_text", ".write_bytes",
           "open to write", ".open to write", "os.fdopen to write"}  # fmt: skip
# What writes files of another kind: a checkpoint's last line within `whole_file`, a lock, a switch of the kernel.
WRITERS = {"files.py", "sae/resume.py", "collect/files.py", "bench/bench_encode.py"}


def test_files_are_written_in_one_place():
    """`writesae.files` alone puts files in place, whole or not at all; in scripts and benchmarks it does so, too."""
    renaming = {x for x in WRITING if "write" not in x}
    for folder in ("writesae", "bench", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT / folder).as_posix()
            if (folder, name) == ("writesae", "files.py"):
                assert {"os.replace", ".write_bytes"} <= calls(path)  # or nothing is found anywhere
                continue
            unwanted = renaming if folder != "writesae" or name in WRITERS else WRITING
            assert not calls(path) & unwanted, f"{folder}/{name} calls {calls(path) & unwanted}: use writesae.files"


def test_signals_are_handled_in_one_place():
    for path in sorted(PACKAGE.rglob("*.py")):
        found = calls(path) & {"signal.signal", "signal.pthread_sigmask"}
        assert bool(found) == (path == PACKAGE / "interrupt.py"), f"{path.relative_to(PACKAGE)}: use writesae.interrupt"


def test_progress_is_shown_in_one_way():
    """By `writesae.progress`: what is left writes between bars, or silences those of the hub's library."""
    bars = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "tqdm" or name.startswith("rich.progress") for name in imports(path))
    }  # fmt: skip
    assert bars == {"progress.py", "interrupt.py", "sae/repository.py"}


def test_the_two_folders_of_benchmarks():
    """One is the command, the other what is run by hand: no file's name is in both, and the latter's README has all."""
    by_hand = {x.name for x in (ROOT / "bench").iterdir() if x.is_file() and x.name != "README.md"}
    command = {x.name for x in (PACKAGE / "bench").glob("*.py")}
    assert by_hand and "command.py" in command and not by_hand & command
    listed = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "bench" / "README.md").read_text(), re.MULTILINE))
    assert listed == by_hand


def test_import_is_light():
    """Importing the package needs no transformers, no extras and no compiled library."""
    code = "import sys, writesae; print([m for m in ('transformers', 'torch', 'scipy', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def included(*sources: Path, flags: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """Files of csrc that each source includes, directly or through another, as the compiler says; `{source: names}`."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    command = [*compiler, "-std=c++17", "-x", "c++", f"-I{CSRC}", "-MM", *flags, *map(str, sources)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    found = {}
    for rule in out.stdout.replace("\\\n", " ").splitlines():
        names = [Path(x).resolve() for x in rule.partition(":")[2].split()]
        inside = [str(x.relative_to(CSRC)) for x in names if CSRC in x.parents]
        found[inside[0]] = set(inside[1:])
    assert len(found) == len(sources)
    return found


# A kernel of CUDA as nvcc compiles it, without CUDA's own headers, and as the host twin's compiler does.
DEVICE_FLAGS = {"device": ("-D__CUDACC__", "-MG", "-DWRITESAE_SIDE=1"), "twin": ("-DWRITESAE_SIDE=2",)}


def test_kernels_of_cpu_and_cuda_do_not_meet():
    """Not even through a third file."""
    for name, files in included(*CSRC.glob("cpu/*.cpp")).items():
        assert not [x for x in files if x.startswith("cuda/")], name
    for flags in DEVICE_FLAGS.values():
        for name, files in included(*CSRC.glob("cuda/*.cu"), flags=flags).items():
            assert not [x for x in files if x.startswith("cpu/")], name
            assert "cuda/tile.cuh" in files  # or nothing was looked at


@pytest.mark.parametrize("side", [0, 1, 2])
def test_operators_on_tensors_meet_one_side_only(side):
    """csrc/*.cpp, which includes torch: no kernels of the other side, and the encoder's no write rule."""
    from torch.utils.cpp_extension import include_paths

    sys.path.insert(0, str(CSRC))
    from sources import both_sides

    flags = [f"-isystem{path}" for path in include_paths()]
    flags += [f"-DWRITESAE_SIDE={side}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = CSRC.glob("*.cpp") if side == 0 else [CSRC / name for name in both_sides()]
    found = included(*sources, flags=tuple(flags))
    for name, files in found.items():
        assert not [x for x in files if x.startswith("cuda/" if side == 0 else "cpu/")], name
    assert not [x for x in found["encode.cpp"] if Path(x).name.startswith(RULES)]


def test_the_encoder_knows_no_write_rule():
    for flags in DEVICE_FLAGS.values():
        found = included(*CSRC.glob("cuda/encode*.cu"), CSRC / "cpu" / "encode.cpp", flags=flags)
        for name, files in found.items():
            assert not [x for x in files if Path(x).name.startswith(RULES)], name


def test_kinds_of_edits_are_numbered_alike():
    from writesae import edits
    from writesae.ops.scan import pack_edits

    text = (CSRC / "edits.h").read_text()
    enums = {
        name: {x: int(n) for x, n in re.findall(r"(\w+) = (\d+)", body)}
        for name, body in re.findall(r"enum (\w+) : int64_t \{(.*?)\}", text)
    }
    assert list(enums) == ["Kind", "When"]
    assert [x.lower() for x in enums["Kind"]] == list(edits.KINDS)
    assert [x.lower() for x in enums["When"]] == list(edits.WHENS)
    for numbers in enums.values():
        for name, number in numbers.items():
            assert getattr(edits, name) == number
    afterwards = int(re.search(r"AFTERWARDS = (\d+)", text).group(1))
    one = torch.zeros(1, 1)
    for kind, kind_number in enums["Kind"].items():
        for when, when_number in enums["When"].items():
            index, _, _ = pack_edits(edits.Edits([0], [0], [0], one, one, kind.lower(), when.lower()))
            assert int(index[0, 3]) == kind_number + afterwards * when_number


def test_public_names_load():
    import writesae

    for name in writesae.__all__:
        assert getattr(writesae, name) is not None
