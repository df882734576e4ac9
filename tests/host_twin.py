"""The host twin of the CUDA kernels (scripts/build_twin.py), from tests: what it measures, and what it is to run as."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import Tensor

from writesae._library import load_twin

# What `machine` takes; bytes of shared memory. The twin is an H100 unless told otherwise.
A100 = {"architecture": 80, "multiprocessors": 108, "block_shared": 163 * 1024, "processor_shared": 164 * 1024}
RTX = {"architecture": 89, "multiprocessors": 128, "block_shared": 99 * 1024, "processor_shared": 100 * 1024}

_module: ModuleType | None = None


def load(path: str | Path) -> None:
    """Loads the twin: backend="twin" then runs it. The library is a module of Python too: csrc/test/twin_module.cpp."""
    global _module
    load_twin(path)
    loader = importlib.machinery.ExtensionFileLoader("twin", str(Path(path).resolve()))
    spec = importlib.util.spec_from_loader("twin", loader)
    assert spec is not None
    _module = importlib.util.module_from_spec(spec)
    loader.exec_module(_module)


def module() -> ModuleType:
    """Of the twin that was loaded."""
    if _module is None:
        raise RuntimeError("no host twin is loaded: pytest --twin PATH, or the fixture `twin`")
    return _module


@contextmanager
def set_to(reverse: bool = False, truncating: bool = False, **machine: int):
    """Within it the twin runs so; then as it does by default. machine: see A100."""
    twin = module()
    twin.schedule("reverse" if reverse else "forward")
    twin.truncating(truncating)
    twin.machine(**machine)
    try:
        yield
    finally:
        twin.schedule("forward")
        twin.truncating(False)
        twin.machine()


class Counts(dict):
    """{name of a launch: {count: number}}; see `Statistics` in csrc/cuda/host_twin.h."""

    def total(self, name: str) -> int:
        """Of all launches; of sizes, the largest."""
        values = [counts.get(name, 0) for counts in self.values()]
        return max(values, default=0) if name in ("shared_bytes_taken", "shared_bytes_asked") else sum(values)


@contextmanager
def counted(**watched: Tensor):
    """`Counts` of what runs within it, there when it ends.

    watched: tensors by name; bytes that asynchronous copies read of one are a count of their own, "bytes of <name>".
    """
    twin = module()
    twin.reset()
    for name, x in watched.items():
        twin.watch(name, x.data_ptr(), x.untyped_storage().nbytes() - x.storage_offset() * x.element_size())
    found = Counts()
    try:
        yield found
    finally:
        found.update(twin.counts())
        twin.reset()
