"""The RMS norms of a transformers model, and how `ops.rms_norm` stands in for them while a model is accelerated.

A norm is found by what it computes, not by its class's name: a module of one weight vector is called on numbers that
tell formulas and roundings apart, and it is one of ours if what it returns is what the op returns. Whatever formula a
new class has, it is either the same or left alone.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops._dispatch import can_run
from ..ops._transforms import transformed
from . import patch

_EPS = ("variance_epsilon", "eps")  # what modules call it
_found: dict[tuple, Norm | None] = {}  # what modules of one class, size, dtype and settings are


@dataclass(frozen=True)
class Norm:
    """A formula: the arguments of `ops.rms_norm`, and whether a gate is given."""

    gated: bool
    eps: float
    zero_centred: bool
    round_once: bool

    def __call__(self, weight: Tensor, args: tuple, kwargs: dict) -> Tensor | None:
        """What a module of this formula returns, or None: leave it to the module (a gradient, a device, a dtype)."""
        if kwargs or len(args) != 1 + self.gated or not all(isinstance(x, Tensor) for x in args):
            return None
        x, gate = args[0], args[1] if self.gated else None
        if torch.is_grad_enabled() and (weight.requires_grad or any(y.requires_grad for y in args)):
            return None
        if transformed(x, weight, gate):
            return None
        same = x.dtype == weight.dtype and x.shape[-1:] == weight.shape
        if gate is not None:
            same = same and gate.dtype == x.dtype and gate.shape == x.shape
        if not same or torch.is_autocast_enabled("cpu"):
            return None
        if not can_run("cpu", "rms_norm", {"x": x, "weight": weight, "gate": gate}):
            return None
        D = len(weight)
        rows = None if gate is None else gate.reshape(-1, D)
        with torch._C._AutoDispatchBelowAutograd():  # no gradient, seen above; to ask again slows decoding
            y = torch.ops.writesae.rms_norm(
                x.reshape(-1, D), weight, rows, self.eps, self.zero_centred, self.round_once
            )
        return y.view(x.shape)


def norm_of(module: nn.Module) -> Norm | None:
    """The module's formula; None when it is something else, or when its forward is not its class's (somebody's hook,
    which may move weights)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.device.type != "cpu" or not len(weight):
        return None
    if len(module._parameters) != 1 or module._modules or module._buffers or "forward" in module.__dict__:
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    settings = {name: value for name, value in module.__dict__.items() if not name.startswith("_")}
    eps = next((settings[name] for name in _EPS if isinstance(settings.get(name), float)), None)
    if eps is None:
        return None
    try:
        key = (type(module), len(weight), weight.dtype, frozenset(settings.items()))
        hash(key)
    except TypeError:  # a setting without a hash: asked anew every time
        return _probe(module, eps)
    if key not in _found:
        _found[key] = _probe(module, eps)
    return _found[key]


@torch.no_grad()
def _probe(module: nn.Module, eps: float) -> Norm | None:
    """Calls a copy of the module with a weight of random numbers: at ones or zeros formulas look alike."""
    own = module.weight
    assert isinstance(own, Tensor)
    D, dtype = len(own), own.dtype
    generator = torch.Generator().manual_seed(0)
    size = (max(6, 4096 // D), D)  # enough numbers for roundings to show
    x, gate = (torch.randn(size, generator=generator, device="cpu") for _ in range(2))
    # Rows of different sizes, some so small that eps matters.
    x *= torch.tensor([1.0, 30.0, eps**0.5], device="cpu").repeat(len(x))[: len(x), None]
    x, gate = x.to(dtype), gate.to(dtype)
    probe = copy.copy(module)
    weight = nn.Parameter(torch.randn(D, generator=generator, device="cpu").to(dtype), requires_grad=False)
    probe.__dict__["_parameters"] = {"weight": weight}
    for given in ((x,), (x, gate)):
        try:
            with torch.autocast("cpu", enabled=False):
                theirs = type(module).forward(probe, *given)
        except Exception:  # of another signature, or no norm at all
            continue
        if not isinstance(theirs, Tensor) or theirs.dtype != dtype or theirs.shape != x.shape:
            continue
        for zero_centred, round_once in itertools.product((False, True), repeat=2):
            norm = Norm(len(given) == 2, eps, zero_centred, round_once)
            with torch.autocast("cpu", enabled=False):
                ours = norm(weight, given, {})
            if ours is not None and _same(ours, theirs):
                return norm
    return None


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ only as sums in another order do. In half precision such a difference now and then
    tips a rounding (one number in 10^4); a rounding more or less changes one number in four."""
    error = (ours.float() - theirs.float()).abs()
    step = 1e-5 if theirs.dtype == torch.float32 else 2 * torch.finfo(theirs.dtype).eps
    close = bool((error <= step * theirs.float().abs() + 1e-6 * theirs.float().abs().max()).all())
    return close and (theirs.dtype == torch.float32 or bool((error == 0).float().mean() >= 0.99))


def _body(entry, call, args, kwargs):
    serving = entry.serving()
    if not serving:
        return call(*args, **kwargs)
    norm, check = serving[0]
    y = norm(entry.module.weight, args, kwargs)
    if y is not None and check is not None:
        check(entry.module, y, call(*args, **kwargs))
    return call(*args, **kwargs) if y is None else y


def install(owner: patch.Owner, model: nn.Module, check: Callable | None = None) -> dict[nn.Module, Norm]:
    """Has the model's RMS norms on a CPU run on `ops.rms_norm` wherever no gradient is asked, until `owner` closes.

    Args:
        check: called as `check(module, ours, theirs)` with every result beside the module's own.

    Returns:
        `{module: its formula}` of all of them.
    """
    norms = {}
    with patch.lock:
        for module in model.modules():
            norm = norm_of(module)
            if norm is not None:
                owner.join(module, "forward", _body, (norm, check))
                owner.mark([module])
                norms[module] = norm
    return norms


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[dict[nn.Module, Norm]]:
    """`install` within the context."""
    with patch.Owner() as owner, owner:
        yield install(owner, model)
