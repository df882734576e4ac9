"""`writesae info`: what is installed, what is built, what can run here and why not."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "safetensors", "pyarrow", "numpy")
EXTRAS = ("scipy", "statsmodels", "scikit-learn", "matplotlib", "datasets")


def gather() -> dict:
    """Versions, backends (`{name: None when usable, else the reason}`) and the CPU's instruction sets."""
    import torch

    from . import __version__
    from ._library import backends, cpu_isa

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "writesae": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "extras": {name: installed(name) for name in EXTRAS},
        "backends": backends(),
        "cpu": {
            "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(), **cpu_isa(),
        },
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def configure(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args) -> int:
    info = gather()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"writesae {info['writesae']}   Python {info['python']}   {info['platform']}")
    for title in ("packages", "extras"):
        print(f"{title + ':':10}" + "  ".join(f"{k} {v or '(not installed)'}" for k, v in info[title].items()))
    for name, reason in info["backends"].items():
        print(f"backend {name + ':':11}{'usable' if reason is None else reason}")
    cpu = info["cpu"]
    print("cpu:      " + "  ".join(f"{k} {v}" for k, v in cpu.items()))
    print(f"gpu:      {info['cuda_device'] or 'none seen by torch'}")
    return 0
