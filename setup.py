"""Builds the compiled part, one stable-ABI library of operators: the rest of the packaging is in pyproject.toml."""

import os
import shutil
import sys
from glob import glob

from setuptools import setup

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


class Build(BuildExtension):
    def build_extensions(self):
        compiler = os.environ.get("CXX", self.compiler.compiler_cxx[0] if sys.platform != "win32" else "cl").split()[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"writesae needs a C++ compiler, and {compiler!r} was not found on PATH. Install one (Debian, Ubuntu:\n"
                "apt install g++; macOS: xcode-select --install), or name it in the environment variable CXX."
            )
        # Editable installs build in a temporary folder; a fixed one recompiles only what changed.
        self.build_temp = os.path.join("build", "temp")
        super().build_extensions()


flags = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
extension = CppExtension(
    "writesae._C_cpu",
    sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
    include_dirs=[os.path.abspath("csrc")],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)],
    extra_compile_args=flags,
    py_limited_api=True,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
