"""Runs the tests of flash-linear-attention's models, in an environment that has it: no GPU is needed.

    python scripts/test_fla.py [PYTEST ARGUMENTS]

It is installed into build/fla-VERSION, beside the environment and not into it. Triton comes along where torch has not
brought its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = "0.6.0"
PACKAGES = (f"flash-linear-attention=={VERSION}", f"fla-core=={VERSION}", "einops==0.8.2")
TRITON = "triton==3.9.0"


def install() -> Path:
    """Where the packages lie."""
    folder = ROOT / "build" / f"fla-{VERSION}"
    if not (folder / ".installed").exists():
        packages = PACKAGES if find_spec("triton") else (*PACKAGES, TRITON)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--upgrade"]
        subprocess.run([*pip, "--target", folder, "--no-deps", *packages], check=True)
        (folder / ".installed").touch()
    return folder


def main(arguments: list[str]) -> int:
    folder = install()
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_fla.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
