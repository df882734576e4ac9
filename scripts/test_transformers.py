"""Runs the tests that a model takes part in under other releases of transformers: those tested, and the newest.

    python scripts/test_transformers.py [VERSION | newest ...]

Each release is installed with what it needs into build/transformers-VERSION, beside the environment and not into it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from writesae.models.versions import TESTED  # noqa: E402

# What says that a test runs a model.
_SIGNS = ("tiny_models", "transformers", "load_default", "models import", "writesae.attach")
_OWN = ("transformers", "tokenizers", "huggingface_hub")  # pinned for the environment's own release


def install(release: str) -> tuple[Path, str]:
    """Where a release lies, and its number."""
    folder = ROOT / "build" / f"transformers-{release}"
    if release == "newest" or not (folder / ".installed").exists():
        pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(_OWN)]
        folder.mkdir(parents=True, exist_ok=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        wanted = "transformers" if release == "newest" else f"transformers=={release}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--upgrade"]
        subprocess.run([*pip, "--target", folder, "-c", constraints, wanted], check=True)
        (folder / ".installed").touch()
    found = [d.version for d in distributions(path=[str(folder)]) if d.name == "transformers"]
    return folder, found[0]


def tests() -> list[str]:
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if any(sign in f.read_text() for sign in _SIGNS)]


def main(releases: list[str]) -> int:
    done = {version("transformers")}
    print(f"transformers {version('transformers')}: by `make test`, with all the tests", flush=True)
    runs = []
    for release in releases:
        if release in done:
            continue
        folder, number = install(release)
        if number in done:
            print(f"transformers {number}, the {release}: tested already", flush=True)
            continue
        done.add(number)
        runs.append((number, folder))
    # Side by side, as many as there are cores: most of a test is one thread.
    threads = max(1, (os.cpu_count() or 1) // max(len(runs), 1))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda run: one(*run, threads), runs)
        failed = [number for (number, _), passed in zip(runs, results, strict=True) if not passed]
    if failed:
        print(f"failed under transformers {', '.join(failed)}")
    return int(bool(failed))


def one(number: str, folder: Path, threads: int) -> bool:
    """Whether the tests pass under a release. Prints what pytest says when it is done."""
    environment = {
        **os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests()]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f"transformers {number}:\n{run.stdout}", flush=True)
    return run.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [*TESTED, "newest"]))
