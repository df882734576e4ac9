"""The kernels' C++ checks on another processor and by another compiler; `make compilers`.

    python scripts/check_compilers.py [STEP ...]

Steps: arm (compiled for 64-bit ARM by Debian's g++-aarch64-linux-gnu, the checks run by qemu-aarch64, and the hot loops
read: scripts/check_neon.py), clang (compiled by clang++, warnings as errors, and the checks run on this processor).
Without a step, both. A step whose programs are missing fails and names them; nothing is left out in silence.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARM = "aarch64-linux-gnu"
PROGRAMS = {
    "arm": {f"{ARM}-g++": f"g++-{ARM}", f"{ARM}-objdump": f"binutils-{ARM}", "qemu-aarch64": "qemu-user"},
    "clang": {"clang++": "clang"},
}
OPTIONS = {
    "arm": [
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={ARM}-g++",
        f"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/{ARM}",
    ],
    "clang": ["-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-Werror -O1"],
}  # fmt: skip


def run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


def check(step: str) -> None:
    """Builds into build/STEP and runs its checks.

    Raises:
        FileNotFoundError: a program is missing; names it and Debian's package.
        subprocess.CalledProcessError: something did not compile, or a check failed.
    """
    programs = {"cmake": "cmake", **PROGRAMS[step]}
    missing = {name: package for name, package in programs.items() if not shutil.which(name)}
    if missing:
        packages = " ".join(missing.values())
        raise FileNotFoundError(f"{step}: expected on PATH {', '.join(missing)}: apt install {packages}")
    folder = f"build/{step}"
    run("cmake", "-S", ".", "-B", folder, "-DWRITESAE_CPU_ONLY=ON", "-DWRITESAE_QUICK=ON", *OPTIONS[step])
    run("cmake", "--build", folder, "-j2")
    if step == "arm":
        run(sys.executable, "scripts/check_neon.py", folder)
    run("ctest", "--test-dir", folder, "--output-on-failure", "-j2")


def main(steps: list[str]) -> None:
    for step in steps or PROGRAMS:
        if step not in PROGRAMS:
            sys.exit(f"check_compilers.py: STEP: expected {' or '.join(PROGRAMS)}, got {step!r}")
        start = time.monotonic()
        try:
            check(step)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            sys.exit(f"check_compilers.py: {error}")
        print(f"{step}: took {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
