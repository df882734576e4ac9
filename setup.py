"""Builds the compiled parts, stable-ABI libraries of operators: the rest of the packaging is in pyproject.toml.

_C_cpu is always built. _C_cuda, the CUDA kernels, takes minutes and nvcc, and is built only where WRITESAE_CUDA=1 asks
for it. Neither needs a GPU, nor a torch with CUDA. WRITESAE_CUDA_ARCHITECTURES says what for: csrc/sources.py.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup

sys.path.insert(0, os.path.abspath("csrc"))
from sources import ARCHITECTURES, ONLY, architecture_flags, both_sides, kernels  # noqa: E402

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"writesae compiles against the installed torch, which could not be imported ({error}).\n"
        "Install it first (pip install 'torch>=2.10' setuptools ninja), then: pip install --no-build-isolation ."
    )

# torch 2.10 and CPython 3.10 are the oldest this library runs on; it is compiled once for both and everything later.
TORCH_TARGET = "0x020a000000000000"
PYTHON_TARGET = "0x030A0000"
WANTED = os.environ.get("WRITESAE_CUDA_ARCHITECTURES") or ARCHITECTURES
FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]


def nvcc() -> str | None:
    """The compiler for CUDA, or None where the CUDA kernels are not asked for."""
    wanted = os.environ.get("WRITESAE_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"WRITESAE_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted != "1":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if found is None:
        where = f"in {home}/bin (CUDA_HOME)" if home else "on PATH; set CUDA_HOME or PATH"
        sys.exit(f"WRITESAE_CUDA=1 asks for the CUDA kernels, but nvcc was not found {where}")
    return found


def compile_cuda(compiler: str, folder: Path) -> list[str]:
    """Objects of csrc/cuda/*.cu, each beside ptxas' report on it (*.ptxas.txt); only what changed is compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*glob("csrc/*.h"), *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh"), "setup.py"]
    newest = max(os.path.getmtime(path) for path in headers)
    command = [compiler, "-std=c++17", "-O3", "-Icsrc", "-DWRITESAE_SIDE=1", "-Xcompiler=-fPIC,-fvisibility=hidden",
               "-Xptxas=-v"]  # fmt: skip

    def one(source: str) -> str:
        to = folder / (Path(source).stem + ".o")
        asked = folder / (Path(source).stem + ".flags")
        flags = architecture_flags(ONLY.get(Path(source).name, WANTED))
        line = shlex.join([*command, *flags, "-c", source, "-o", str(to)])
        fresh = to.exists() and to.stat().st_mtime > max(newest, os.path.getmtime(source))
        if fresh and asked.exists() and asked.read_text() == line:
            return str(to)
        print(line, flush=True)
        start = time.monotonic()
        out = subprocess.run(shlex.split(line), capture_output=True, text=True)
        if out.returncode:
            sys.exit(f"nvcc failed on {source}:\n{out.stdout}{out.stderr}")
        to.with_suffix(".ptxas.txt").write_text(out.stderr)
        asked.write_text(line)
        print(f"{source} took {time.monotonic() - start:.0f} s", flush=True)
        return str(to)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, (f"csrc/cuda/{name}" for name in kernels())))


def cuda_runtime(compiler: str) -> list[str]:
    """The static CUDA runtime, from where the compiler itself would link it."""
    out = subprocess.run([compiler, "--dryrun", "-o", "x", "x.cu"], capture_output=True, text=True).stderr
    line = next((line for line in out.splitlines() if "LIBRARIES=" in line), "")
    folders = [part[2:] for part in shlex.split(line.split("LIBRARIES=", 1)[-1]) if part.startswith("-L")]
    for folder in folders:
        path = Path(folder) / "libcudart_static.a"
        if path.exists():
            return [str(path)]
    sys.exit(f"libcudart_static.a not found in {folders}: the CUDA toolkit of {compiler} is incomplete")


class Build(BuildExtension):
    def build_extensions(self):
        compiler = os.environ.get("CXX", self.compiler.compiler_cxx[0] if sys.platform != "win32" else "cl").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"writesae needs a C++ compiler, and {compiler!r} was not found on PATH. Install one (Debian, Ubuntu:\n"
                "apt install g++; macOS: xcode-select --install), or name it in the environment variable CXX."
            )
        super().build_extensions()

    def build_extension(self, ext):
        # Editable installs build in a temporary folder; a fixed one recompiles only what changed. One a library,
        # because some sources are in both.
        self.build_temp = os.path.join("build", "temp", ext.name.rpartition(".")[2])
        if ext.name == "writesae._C_cuda":
            ext.extra_objects = [*compile_cuda(CUDA, Path(self.build_temp) / "cuda"), *cuda_runtime(CUDA)]
        super().build_extension(ext)


def extension(name: str, sources: list[str], side: int, **options) -> CppExtension:
    return CppExtension(
        f"writesae.{name}",
        sorted(sources),
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h") + glob("csrc/cuda/*")),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET), ("WRITESAE_SIDE", str(side)),
        ],
        extra_compile_args=FLAGS,
        py_limited_api=True,
        **options,
    )  # fmt: skip


CUDA = nvcc()
print("writesae: " + (f"CUDA kernels for {WANTED}, by {CUDA}" if CUDA else
      "the CPU kernels alone; WRITESAE_CUDA=1 builds the CUDA kernels too, with nvcc"), flush=True)  # fmt: skip
extensions = [extension("_C_cpu", glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"), 0)]
if CUDA is not None:
    sources = [*(f"csrc/{name}" for name in both_sides()), "csrc/cuda/library.cpp", "csrc/one_thread.cpp"]
    extensions.append(extension("_C_cuda", sources, 1, libraries=["dl", "rt", "pthread"]))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
