"""Runs the tests of mamba-ssm's models, in an environment that has it: no GPU is needed.

    python scripts/test_mamba_ssm.py [PYTEST ARGUMENTS]

The package is installed without its CUDA extension into build/mamba-ssm-VERSION, beside the environment and not into
it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = "2.3.2.post1"
# causal-conv1d lies there unusable, as on a machine whose GPU is gone; einops and triton are what the package imports.
PACKAGES = (f"mamba-ssm=={VERSION}", "causal-conv1d==1.7.0", "einops==0.8.2", "triton==3.9.0")
WITHOUT_CUDA = {
    "MAMBA_FORCE_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_FORCE_BUILD": "TRUE",
    "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE",
}  # fmt: skip


def install() -> Path:
    """Where the packages lie."""
    folder = ROOT / "build" / f"mamba-ssm-{VERSION}"
    if not (folder / ".installed").exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--upgrade"]
        command = [*pip, "--target", folder, "--no-build-isolation", "--no-deps", *PACKAGES]
        subprocess.run(command, check=True, env={**os.environ, **WITHOUT_CUDA})
        (folder / ".installed").touch()
    return folder


def main(arguments: list[str]) -> int:
    folder = install()
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_mamba_ssm.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
