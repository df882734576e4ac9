"""The RMS norms of a transformers model, and how `ops.rms_norm` stands in for them while a model is accelerated.

They are found by what they compute, not by class name: a module of one weight vector is called on a few small numbers, and
is a norm of ours when what it returns is what the op returns, to the last rounding. So whatever formula a new class has,
it is either the same or left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops._dispatch import can_run
from . import hf_gated_delta

_EPS = ("variance_epsilon", "eps", "epsilon")


class Norm:
    """One module that is `rms_norm(x, weight, gate, eps, zero_centred)`."""

    def __init__(self, module: nn.Module, gated: bool, eps: float, zero_centred: bool):
        self.module, self.gated, self.eps, self.zero_centred = module, gated, eps, zero_centred

    def stand_in(self, args: tuple, kwargs: dict) -> Tensor | None:
        """What the module would return, or None: leave it to the module (a gradient, a device, another dtype)."""
        weight = self.module.weight
        if kwargs or len(args) != 1 + self.gated or not all(isinstance(x, Tensor) for x in args):
            return None
        x, gate = args[0], args[1] if self.gated else None
        if torch.is_grad_enabled() and (weight.requires_grad or any(y.requires_grad for y in args)):
            return None
        fits = x.dtype == weight.dtype and x.shape[-1:] == weight.shape and (gate is None or gate.shape == x.shape)
        if not fits or not can_run("cpu", "rms_norm", {"x": x, "weight": weight, "gate": gate}):
            return None
        rows = None if gate is None else gate.reshape(-1, len(weight))
        with torch._C._AutoDispatchBelowAutograd():  # no gradient, seen above; asking again takes half of a decode step's
            y = torch.ops.writesae.rms_norm(x.reshape(-1, len(weight)), weight, rows, self.eps, self.zero_centred)
        return y.view(x.shape)


@torch.no_grad()
def norm_of(module: nn.Module) -> Norm | None:
    """The module as a norm, found by calling it; None when it is something else, or when its forward is not its class's
    (another package's hook, which may move weights)."""
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, nn.Parameter) and weight.ndim == 1 and weight.device.type == "cpu"
    eps = next((e for e in (getattr(module, name, None) for name in _EPS) if isinstance(e, float)), None)
    if not plain or eps is None or len(module._parameters) != 1 or module._modules or module._buffers:
        return None
    if "forward" in module.__dict__ or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    generator = torch.Generator().manual_seed(0)
    # Rows of different sizes, one so small that eps matters.
    x, gate = (torch.randn(3, len(weight), generator=generator) for _ in range(2))
    x = (x * torch.tensor([[1.0], [30.0], [eps**0.5]])).to(weight.dtype)
    for given in ((x,), (x, gate.to(weight.dtype))):
        try:
            found = type(module).forward(module, *given)
        except Exception:  # of another signature, or no norm at all
            continue
        if not isinstance(found, Tensor) or found.dtype != x.dtype or found.shape != x.shape:
            continue
        for zero_centred in (False, True):
            norm = Norm(module, len(given) == 2, eps, zero_centred)
            made = norm.stand_in(given, {})
            if made is not None and _same(made, found):
                return norm
    return None


def _same(made: Tensor, found: Tensor) -> bool:
    """Whether two results differ by roundings only: of sums in another order, and in half precision of what they tip."""
    error = (made.float() - found.float()).abs()
    if found.dtype == torch.float32:
        return bool((error <= 1e-5 * found.abs() + 1e-30).all())
    step = torch.finfo(found.dtype).eps
    # Where one of three roundings falls the other way a number moves by a step or two; that is rare.
    return bool((error <= 2 * step * found.float().abs() + 1e-7).all()) and bool((error == 0).float().mean() >= 0.95)


def _body(norm: Norm):
    def make(entry):
        entry.norm = norm

        def body(args, kwargs):
            made = norm.stand_in(args, kwargs) if hf_gated_delta.norms_stand_in() else None
            return entry.original(*args, **kwargs) if made is None else made

        return body

    return make


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[list[Norm]]:
    """Within the context, the model's RMS norms on a CPU run on `ops.rms_norm` wherever no gradient is asked for.

    Yields:
        the norms.
    """
    norms = []
    with contextlib.ExitStack() as stack:
        with hf_gated_delta.lock:
            for module in model.modules():
                entry = hf_gated_delta.wrapped(module)
                norm = norm_of(module) if entry is None else entry.norm  # an attach around this one may have it
                if norm is not None:
                    hf_gated_delta.acquire(stack, module, _body(norm))
                    norms.append(norm)
        yield norms
