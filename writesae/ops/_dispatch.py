"""Which implementation runs: one predicate that both chooses and explains a refusal. No silent fallback."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .._library import backends, twin_error

BACKENDS = ("reference", "cpu", "cuda")
_said: set[str] = set()


def can_run(backend: str, op: str, tensors: dict[str, Tensor | None], raise_error: bool = False) -> bool:
    """Whether `backend` can run `op` on these tensors. With `raise_error`, says why not instead of returning False."""
    reason = _refusal(backend, tensors)
    if reason is not None and raise_error:
        raise ValueError(f'{op}: backend="{backend}" cannot run this: {reason}')
    return reason is None


def _refusal(backend: str, tensors: dict[str, Tensor | None]) -> str | None:
    if backend not in (*BACKENDS, "twin"):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "reference":
        return None
    missing = twin_error() if backend == "twin" else backends()[backend]
    if missing is not None:
        return missing
    for name, x in tensors.items():
        if x is None:
            continue
        device = "cpu" if backend == "twin" else backend
        if x.device.type != device and x.device.type != "meta":  # a meta tensor has a shape for every backend
            return f"{name} is on {x.device}, expected a {device} tensor"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {x.dtype}, expected float32, bfloat16 or float16"
    return None


def choose(op: str, backend: str | None, tensors: dict[str, Tensor | None]) -> str:
    """The backend asked for, or the kernel of the tensors' device, or (saying so once) the reference."""
    if backend is not None:
        can_run(backend, op, tensors, raise_error=True)
        return backend
    first = next(x for x in tensors.values() if x is not None)
    where = first.device.type
    native = "cuda" if where == "cuda" else "cpu"
    # The caller has seen that all are of a floating dtype and on one device: what can be wrong is asked before why.
    wide = any([x is not None and x.dtype is torch.float64 for x in tensors.values()])
    if not wide and where in ("cpu", "cuda", "meta") and backends()[native] is None:
        return native
    reason = _refusal(native, tensors)
    say_once(f'{op}: running the slow token-by-token reference, because backend="{native}" cannot run this: {reason}')
    return "reference"


def operators(backend: str):
    """Where torch has a backend's operators: `torch.ops.writesae`, which goes by the tensors' device, or the twin's."""
    return torch.ops.writesae_twin if backend == "twin" else torch.ops.writesae


def reference_only(op: str, backend: str | None) -> None:
    """For ops that have no kernel: accepts "reference", says once that None means it, refuses the rest."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend in ("cpu", "cuda"):
        raise ValueError(f'{op}: backend="{backend}" cannot run this: {op} has no {backend} kernel in this version')
    if backend is None:
        say_once(f"{op}: running the slow token-by-token reference, because {op} has no kernel in this version")


def say_once(message: str) -> None:
    if torch.compiler.is_compiling():
        return
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def refuse_gradient(op: str, tensors: dict[str, Tensor | None], advice: str) -> None:
    """Raises when a gradient would be asked of an op that has no backward. (Under `torch.func` operators do.)"""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return
    asked = [name for name, x in tensors.items() if x is not None and x.requires_grad]
    if asked:
        raise RuntimeError(f"{op}: no backward for {', '.join(asked)} in this backend; {advice}")
