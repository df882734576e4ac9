"""Loads the compiled extension and says what is usable, and why not."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from . import __version__

_FOLDER = Path(__file__).parent
CUDA_PACKAGE, CUDA_DISTRIBUTION = "writesae_cuda", "writesae-cuda13"


def _load(stem: str, folder: Path = _FOLDER) -> str | None:
    """Loads `<folder>/<stem>*.so`; returns None when loaded, else the reason it is not."""
    files = [f for suffix in ("so", "dylib", "pyd") for f in sorted(folder.glob(f"{stem}*.{suffix}"))]
    if not files:
        return f"not built: no {stem}*.so in {folder} (build it with `pip install .`, which needs a C++ compiler)"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"built, but did not load: {error.__cause__ or error}"
    return None


def _cuda_folder() -> Path | str:
    """Where the CUDA library lies, built here or in the package of its own; else why there is none."""
    if list(_FOLDER.glob("_C_cuda*")):
        return _FOLDER
    try:
        package = import_module(CUDA_PACKAGE)
    except ModuleNotFoundError:
        return (
            f"not installed: pip install {CUDA_DISTRIBUTION}=={__version__}, or build it where nvcc is: "
            "WRITESAE_CUDA=1 pip install ."
        )
    if package.__version__ != __version__:
        return (
            f"{CUDA_DISTRIBUTION}: expected version {__version__}, as writesae has, got {package.__version__}: "
            f"pip install {CUDA_DISTRIBUTION}=={__version__}"
        )
    return Path(package.__path__[0])


def _load_cuda() -> str | None:
    folder = _cuda_folder()
    if isinstance(folder, str):
        return folder
    if torch.version.cuda is None:
        return f"built, but this torch ({torch.__version__}) has no CUDA"
    if CPU_ERROR is not None:
        return f"built, but needs the CPU library, which is not usable: {CPU_ERROR}"
    return _load("_C_cuda", folder)


CPU_ERROR = _load("_C_cpu")
CUDA_ERROR = _load_cuda()
_twin: Path | None = None


def cpu_isa() -> dict[str, str]:
    """{"kernels": instruction set the CPU kernels use, "supported": all this processor has, best first, "bf16" and
    "bf16_supported": the same for products of bfloat16}; or {}."""
    if CPU_ERROR is not None:
        return {}
    ops = torch.ops.writesae
    return {
        "kernels": ops.cpu_isa(""), "supported": ops.cpu_isa_list(),
        "bf16": ops.cpu_bf16(""), "bf16_supported": ops.cpu_bf16_list(),
    }  # fmt: skip


def backends() -> dict[str, str | None]:
    """{backend: None when usable, else why not}."""
    cuda = CUDA_ERROR
    if cuda is None and not torch.cuda.is_available():
        cuda = "built and loaded, but torch sees no GPU"
    return {"reference": None, "cpu": CPU_ERROR, "cuda": cuda}


def has_kernel(operator: str, key: str) -> bool:
    """Whether a library that is loaded runs "namespace::operator" for the dispatch key "CPU" or "CUDA"."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    except RuntimeError:  # no such operator
        return False


def load_twin(path: str | Path) -> None:
    """Loads the CUDA kernels compiled for the CPU (scripts/build_twin.py); backend="twin" then runs them. For tests."""
    global _twin
    path = Path(path).resolve()
    if _twin is None:
        torch.ops.load_library(str(path))
        _twin = path
    elif _twin != path:
        raise RuntimeError(f"load_twin: {_twin} is loaded already, and a process takes one: got {path}")


def twin_error() -> str | None:
    """None when backend="twin" is usable, else why not."""
    return None if _twin is not None else "a test-only backend; scripts/build_twin.py builds it and load_twin loads it"
