"""Which implementation runs: one predicate that both chooses and explains a refusal, from the limits that each op
declares. No silent fallback."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._library import backends, has_kernel, twin_error

BACKENDS = ("reference", "cpu", "cuda")
_said: set[str] = set()


@dataclass(frozen=True)
class Limits:
    """What the kernel of an op takes on one backend.

    Attributes:
        operator: that runs it first, of `torch.ops.writesae` (the host twin's: `torch.ops.writesae_twin`).
        dtypes: of every tensor.
        largest: {argument: largest size of its last axis}.
        gates: kinds of gate it takes; means nothing to an op that has none.
        gradient: kinds of gate it has a backward for, and for the rest the reference runs where a gradient is asked;
            of none, the op refuses a gradient (`refuse_gradient`).
    """

    operator: str
    dtypes: frozenset[torch.dtype] = frozenset((torch.float32, torch.bfloat16, torch.float16))
    largest: Mapping[str, int] = field(default_factory=dict)
    gates: tuple[str, ...] = ("scalar",)
    gradient: tuple[str, ...] = ("scalar",)


LIMITS: dict[str, Mapping[str, Limits]] = {}
_built: dict[tuple[str, str], Limits] = {}  # (op, backend): those whose library, as it was loaded, has the operator


def declare(op: str, limits: Mapping[str, Limits]) -> Mapping[str, Limits]:
    """Says what kernels an op has: {"cpu" or "cuda": limits}, nothing for one that is plain torch. The host twin, built
    of the CUDA kernels, has theirs."""
    LIMITS[op] = limits
    for backend, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if backend in limits and has_kernel(f"writesae::{limits[backend].operator}", key):
            _built[op, backend] = limits[backend]
    return limits


def kernel_error(op: str, backend: str) -> str | None:
    """None when an op's kernel is usable on a backend, for some tensors at least; else why not."""
    if (op, backend) in _built:
        return twin_error() if backend == "twin" else backends()[backend]
    if backend not in (*BACKENDS, "twin"):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "reference":
        return None
    declared = "cuda" if backend == "twin" else backend
    none = f"{op} has no {backend} kernel in this version"
    if declared not in LIMITS[op]:
        return none
    missing = twin_error() if backend == "twin" else backends()[backend]
    if missing is not None:
        return missing
    if backend == "twin" and has_kernel(f"writesae_twin::{LIMITS[op][declared].operator}", "CPU"):
        _built[op, backend] = LIMITS[op][declared]
        return None
    return none


def can_run(backend: str, op: str, tensors: Mapping[str, Tensor | None], raise_error: bool = False) -> bool:
    """Whether `backend` can run `op` on these tensors. With `raise_error`, says why not instead of returning False."""
    reason = _refusal(backend, op, tensors)
    if reason is not None and raise_error:
        raise ValueError(f'{op}: backend="{backend}" cannot run this: {reason}')
    return reason is None


def _refusal(backend: str, op: str, tensors: Mapping[str, Tensor | None]) -> str | None:
    missing = kernel_error(op, backend)
    if missing is not None or backend == "reference":
        return missing
    limits = _built[op, backend]
    dtypes, cuda = limits.dtypes, backend == "cuda"
    for name, x in tensors.items():
        if x is None:
            continue
        if not (x.is_cuda if cuda else x.is_cpu) and not x.is_meta:  # a meta tensor has a shape for every backend
            return f"{name} is on {x.device}, expected a {'cuda' if cuda else 'cpu'} tensor"
        if x.dtype not in dtypes:
            return f"{name} is {x.dtype}, expected {_listed(limits.dtypes)}"
    for name, most in limits.largest.items():
        x = tensors.get(name)
        if x is not None and x.shape[-1] > most:
            return f"the last axis of {name} has {x.shape[-1]} entries, expected at most {most}"
    gate = gate_of(tensors)
    if gate is None:
        return None
    if gate not in limits.gates:
        return f"its kernel takes no {gate} gate"
    if gate not in limits.gradient and torch.is_grad_enabled():
        asked = [name for name, x in tensors.items() if x is not None and x.requires_grad]
        if asked:
            return f"its kernel has no backward for a {gate} gate, and {asked[0]} asks for a gradient"
    return None


def gate_of(tensors: Mapping[str, Tensor | None]) -> str | None:
    """The kind of gate of a scan's tensors (`g` beside keys `k`) or of writes (`decay`), or None: there is none."""
    decay = tensors.get("decay")
    if decay is not None:
        return "element" if tensors.get("decay_matrix") is not None else "scalar" if decay.ndim == 3 else "channel"
    g, k = tensors.get("g"), tensors.get("k")
    return None if g is None or k is None else "channel" if g.ndim == k.ndim else "scalar"


def _listed(dtypes: frozenset[torch.dtype]) -> str:
    order = (torch.float32, torch.bfloat16, torch.float16)
    *first, last = (str(x).removeprefix("torch.") for x in order if x in dtypes)
    return f"{', '.join(first)} or {last}" if first else last


def choose(op: str, backend: str | None, tensors: Mapping[str, Tensor | None]) -> str:
    """The backend asked for, or the kernel of the tensors' device, or (saying so once) the reference."""
    if backend is not None:
        can_run(backend, op, tensors, raise_error=True)
        return backend
    native = "cuda" if next(x for x in tensors.values() if x is not None).is_cuda else "cpu"
    reason = _refusal(native, op, tensors)
    if reason is None:
        return native
    say_once(f'{op}: running the slow token-by-token reference, because backend="{native}" cannot run this: {reason}')
    return "reference"


def operators(backend: str):
    """Where torch has a backend's operators: `torch.ops.writesae`, which goes by the tensors' device, or the twin's."""
    return torch.ops.writesae_twin if backend == "twin" else torch.ops.writesae


def say_once(message: str) -> None:
    """Warns, naming the line outside the package that led here."""
    if torch.compiler.is_compiling() or message in _said:
        return
    _said.add(message)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("writesae."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def refuse_gradient(op: str, tensors: Mapping[str, Tensor | None], advice: str) -> None:
    """Raises when a gradient would be asked of an op that has no backward. (Under `torch.func` operators do.)"""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return
    asked = [name for name, x in tensors.items() if x is not None and x.requires_grad]
    if asked:
        raise RuntimeError(f"{op}: no backward for {', '.join(asked)} in this backend; {advice}")
