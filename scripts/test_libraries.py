"""Runs the tests that a model takes part in with other libraries, and under other releases of transformers.

    python scripts/test_libraries.py [fla | mamba-ssm | bridges | transformer-lens | transformers | transformers=VERSION
        ...] [-- PYTEST ARGUMENTS]

Each is installed with what it needs into build/NAME-VERSION, beside the environment and not into it. `transformers`:
every release in `versions.TESTED` but the environment's own, and the newest (VERSION `newest`). No GPU is needed:
mamba-ssm is installed without its CUDA extension (and causal-conv1d lies there unusable, as on a machine whose GPU is
gone); Triton comes along where torch has not brought its own. Of the tools of `bridges` what their readers import comes
along, and no more. Several run side by side, as many as there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from writesae.models.versions import TESTED  # noqa: E402

# What says that a test meets a release of transformers: it runs a model.
_SIGNS = ("tiny_models", "load_default", "models import", "writesae.attach")
# What commands, studies and policies do with what a model answered is the same under every release, and so are a
# family that a test makes up and edits of a rule alone; edits of hooked models are in test_attach.py, too.
_ONCE = (
    "cli", "house", "quiet", "report", "strangers", "text_commands", "verify", "nulls", "recovered", "replace",
    "sae_gates", "sae_training", "write_dictionary", "families", "binding", "collect_model", "policies", "edits_after",
    "bridges", "bridges_attach", "bridges_peers", "browse_atlas", "browse_web", "notebooks", "library",
    "atoms", "audit", "paper", "paper_analyses", "paper_analyses_of_states", "paper_interventions", "paper_losses",
)  # fmt: skip
_OWN = ("transformers", "tokenizers", "huggingface_hub")  # pinned for the environment's own release
_TRITON = () if find_spec("triton") else ("triton==3.9.0",)


@dataclass(frozen=True)
class Library:
    """What is installed beside the environment, and which tests run with it.

    Attributes:
        name, release: of the folder, build/NAME-RELEASE.
        packages: as pip takes them.
        tests: files.
        options: of pip.
        variables: of pip's environment.
    """

    name: str
    release: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    options: tuple[str, ...] = ("--no-deps",)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return ROOT / "build" / f"{self.name}-{self.release}"

    def install(self) -> None:
        if self.release != "newest" and (self.folder / ".installed").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--upgrade"]
        command = [*pip, "--target", self.folder, *self.options, *self.packages]
        subprocess.run(command, check=True, env={**os.environ, **self.variables})
        (self.folder / ".installed").touch()

    def passes(self, threads: int, arguments: list[str]) -> bool:
        """Whether the tests pass. Prints what pytest says when it is done."""
        variables = {
            **os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": str(threads),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *self.tests, *arguments]
        run = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(f"{self.name} {self.release}:\n{run.stdout}", flush=True)
        return run.returncode == 0


FLA = Library(
    "fla", "0.6.0", ("flash-linear-attention==0.6.0", "fla-core==0.6.0", "einops==0.8.2", *_TRITON),
    ("tests/test_fla.py", "tests/test_info_models.py", "tests/test_families.py"),
)  # fmt: skip
MAMBA_SSM = Library(
    "mamba-ssm", "2.3.2.post1", ("mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0", "einops==0.8.2", *_TRITON),
    ("tests/test_mamba_ssm.py", "tests/test_info_models.py"), ("--no-deps", "--no-build-isolation"),
    {f"{x}_{y}": "TRUE" for x in ("MAMBA", "CAUSAL_CONV1D") for y in ("FORCE_BUILD", "SKIP_CUDA_BUILD")},
)  # fmt: skip
_OF_LENS = (
    "beartype==0.23.1", "better-abc==0.0.3", "einops==0.8.2", "fancy_einsum==0.0.3", "jaxtyping==0.3.11",
    "typeguard==4.6.1", "wadler_lindig==0.1.8",
)  # fmt: skip
BRIDGES = Library(
    "bridges", "sae-lens-6.54.12",  # which needs a TransformerLens before 4
    ("sae-lens==6.54.12", "transformer-lens==3.9.0", *_OF_LENS, "simple_parsing==0.1.9", "docstring_parser==0.18.0",
     "tenacity==9.2.1", "python-dotenv==1.2.4", "eai-delphi==0.1.3", "orjson==3.13.0", "asyncer==0.0.18",
     "sniffio==1.3.1", "sae-dashboard==0.8.0", "neuronpedia==1.2.1", "requests==2.34.2", "urllib3==2.8.0",
     "charset-normalizer==3.5.3", "circuit-tracer==0.5.0", "pydantic==2.14.4",
     "pydantic_core==2.50.5", "annotated-types==0.8.0", "typing-inspection==0.4.5"),
    ("tests/test_bridges_peers.py",),
)  # fmt: skip
TRANSFORMER_LENS = Library(
    "transformer-lens", "4.3.0",
    ("transformer-lens==4.3.0", *_OF_LENS, "nnsight==0.8.1", "greenlet==3.5.6", "cloudpickle==3.1.3",
     "websocket-client==1.9.2", "zstandard==0.25.0", "pydantic==2.14.4", "pydantic_core==2.50.5",
     "annotated-types==0.8.0", "typing-inspection==0.4.5"),
    ("tests/test_bridges_attach.py",),
)  # fmt: skip
BESIDE = {library.name: library for library in (FLA, MAMBA_SSM, BRIDGES, TRANSFORMER_LENS)}


def of_models() -> tuple[str, ...]:
    """Files of tests that run a model of transformers."""
    files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if f.stem[5:] not in (*_ONCE, "fla", "mamba_ssm")]
    return tuple(str(f.relative_to(ROOT)) for f in files if any(sign in f.read_text() for sign in _SIGNS))


def transformers(releases: list[str]) -> list[Library]:
    """Those releases, installed, without the environment's own and without one twice."""
    own = version("transformers")
    print(f"transformers {own}: by `make test`, with all the tests", flush=True)
    found = {}
    for release in releases:
        if release == own:
            continue
        pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(_OWN)]
        constraints = ROOT / "build" / f"transformers-{release}.txt"
        constraints.parent.mkdir(exist_ok=True)
        constraints.write_text("\n".join(pins) + "\n")
        wanted = "transformers" if release == "newest" else f"transformers=={release}"
        library = Library("transformers", release, (wanted,), of_models(), ("-c", str(constraints)))
        library.install()
        number = next(d.version for d in distributions(path=[str(library.folder)]) if d.name == "transformers")
        if number == own or number in found:
            print(f"transformers {number}, the {release}: tested already", flush=True)
        else:
            found[number] = library
    return list(found.values())


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:split] or [*BESIDE, "transformers"], arguments[split + 1 :]
    chosen: list[Library] = []
    for name in names:
        kind, _, release = name.partition("=")
        if name in BESIDE:
            chosen.append(BESIDE[name])
            chosen[-1].install()
        elif kind == "transformers":
            chosen += transformers([release] if release else [*TESTED, "newest"])
        else:
            sys.exit(__doc__)
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        threads = max(1, cores // max(len(chosen), 1))
        results = pool.map(lambda library: library.passes(threads, options), chosen)
        failed = [f"{x.name} {x.release}" for x, passed in zip(chosen, results, strict=True) if not passed]
    if failed:
        print(f"failed with {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
