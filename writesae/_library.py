"""Loads the compiled extension and says what is usable, and why not."""

from __future__ import annotations

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def _load(stem: str) -> str | None:
    """Loads `writesae/_<stem>*.so`; returns None when loaded, else the reason it is not."""
    files = [f for suffix in ("so", "dylib", "pyd") for f in sorted(_FOLDER.glob(f"{stem}*.{suffix}"))]
    if not files:
        return f"not built: no {stem}*.so in {_FOLDER} (build it with `pip install .`, which needs a C++ compiler)"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"built, but did not load: {error}"
    return None


CPU_ERROR = _load("_C_cpu")


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
    return {"reference": None, "cpu": CPU_ERROR, "cuda": "not built: the CUDA kernels are not part of this version"}
