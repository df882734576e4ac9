"""What torch's transforms make of the operators: forward mode, `torch.func` (jvp, grad, vjp, vmap and what is made of
them), second derivatives, autocast. Each operator is right under each, or refuses by name; `register` is the one place.

A kernel sees plain numbers. So a tangent, or a gradient that `torch.func` asks for, goes through the operator's `plain`
formula, which is made of torch's own operations and therefore right under any transform, nested ones too, only slow;
an operator without one refuses. `vmap` folds the mapped axis into the batch, or runs the operator once an element.
Public functions made of several operators ask `transformed` and take a plain path of their own. Wrapped tensors hide
what they carry: a tensor inside `vmap` says requires_grad=False whatever is outside, so they always take it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch._C import _are_functorch_transforms_active as torch_func_acts
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from .._autocast import without_autocast
from ._dispatch import say_once

_libraries: dict[str, torch.library.Library] = {}


def transformed(*tensors: Tensor | None) -> bool:
    """Whether forward mode follows one of these, or `torch.func` acts at all: it takes no Function of ours."""
    return torch_func_acts() or (forward_mode._current_level >= 0 and any(map(_has_tangent, tensors)))


def _has_tangent(x) -> bool:
    return isinstance(x, Tensor) and torch._VF._unpack_dual(x, level=0).tangent is not None


def below_autograd():
    """For calls of operators inside `torch.no_grad`, once `transformed` is answered: to ask again costs 7 us a call."""
    return nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


def _is_mapped(x: Tensor | None) -> bool:
    return x is not None and (is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x))


def say_plain(op: str) -> None:
    say_once(f"{op}: running the slow plain torch formula, because kernels know neither forward mode nor torch.func")


def refuse_transformed(op: str, advice: str, *tensors: Tensor | None) -> None:
    """For what no plain formula can do."""
    if torch_func_acts():  # whom it follows torch.compile cannot ask
        followed = (x is not None and is_functorch_wrapped_tensor(x) for x in tensors)
        refused = torch.compiler.is_compiling() or any(followed)
    else:
        refused = forward_mode._current_level >= 0 and any(map(_has_tangent, tensors))
    if refused:
        raise RuntimeError(f"{op}: not defined under forward-mode AD or torch.func (jvp, grad, vmap); {advice}")


def register(
    op: str,
    advice: str,
    plain: Callable | None = None,
    gradient: tuple[Callable, Callable] | None = None,
    fold: tuple[str, ...] | None = None,
    alone: tuple[str, ...] = (),
    namespace: str = "writesae",
) -> None:
    """Makes `torch.ops.<namespace>.<op>` right, or refusing by name, under every transform.

    Args:
        advice: what to use instead, for the refusals.
        plain: the same from torch's own operations; takes the operator's arguments.
        gradient: (setup_context(ctx, inputs, output), backward(ctx, *grads)) of plain autograd.
        fold: arguments whose first axis is the batch, as is every output's: `vmap` joins its axis to that one. None:
            the operator refuses `vmap`; (): it runs once an element.
        alone: where one of these is given or any argument outside `fold` is mapped, it runs once an element too.
    """
    packet = getattr(getattr(torch.ops, namespace), op).default

    def below(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return packet(*args)

    function = None
    if gradient is not None:
        save, backward = gradient

        def forward(ctx, *args):
            output = below(*args)
            save(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(without_autocast(backward))}
        function = type(f"Gradient_{op}", (torch.autograd.Function,), members)

    def autograd(*args):
        # A jvp that torch.compile has traced raises no level of forward_mode's.
        if (forward_mode._current_level >= 0 or torch_func_acts()) and any(map(_has_tangent, args)):
            if plain is None:
                raise RuntimeError(f"writesae::{op}: no forward-mode derivative (forward_ad, torch.func.jvp); {advice}")
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if function is not None and not torch_func_acts():
                return function.apply(*args)
            if plain is None or not torch_func_acts():
                raise RuntimeError(f"writesae::{op}: no backward in this backend; {advice}")
        else:
            return below(*args)
        say_plain(op)
        return plain(*args)

    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    _libraries[namespace].impl(op, autograd, "Autograd")
    torch.library.register_vmap(f"{namespace}::{op}", _vmap_rule(op, packet, advice, fold, alone))


def _vmap_rule(op: str, packet, advice: str, fold: tuple[str, ...] | None, alone: tuple[str, ...]) -> Callable:
    names = [argument.name for argument in packet._schema.arguments]

    def rule(info, in_dims, *args):
        size = info.batch_size
        if fold is None or not size:
            what = "vmap" if size else "vmap over an axis of size 0"
            raise RuntimeError(f"writesae::{op}: not defined under {what}; {advice}")
        # The dispatcher leaves out arguments that equal their default; they are never mapped.
        args = [x if d is None else x.movedim(d, 0) for x, d in zip(args, in_dims, strict=True)]
        mapped = {name for name, d in zip(names, in_dims, strict=False) if d is not None}
        given = {name for name, x in zip(names, args, strict=False) if x is not None}
        if not mapped <= set(fold) or given & set(alone):
            pairs = list(zip(args, in_dims, strict=True))
            each = [packet(*(x if d is None else x[i] for x, d in pairs)) for i in range(size)]
            if isinstance(each[0], Tensor):
                return torch.stack(each), 0
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
        joined = list(args)
        for i, (name, d) in enumerate(zip(names, in_dims, strict=False)):
            if name in fold and args[i] is not None:
                joined[i] = (args[i] if d is not None else args[i].expand(size, *args[i].shape)).flatten(0, 1)
        found = packet(*joined)
        outputs = tuple(x.reshape(size, len(x) // size, *x.shape[1:]) for x in _as_tuple(found))
        return (outputs[0], 0) if isinstance(found, Tensor) else (outputs, (0,) * len(outputs))

    return rule


def _as_tuple(x) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


# ---- second derivatives ---------------------------------------------------------------------------------------------


class _RefuseSecond(torch.autograd.Function):
    """Passes gradients through, with all that they depend on behind them."""

    @staticmethod
    def forward(ctx, message, n, *grads_and_sources):
        ctx.message = message
        return tuple(x.view_as(x) for x in grads_and_sources[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def once_differentiable(op: str, advice: str) -> Callable:
    """Of a Function's backward, like torch's decorator, but refusing by the operator's name, and always: torch's lets a
    second derivative go where the gradient that comes in is a constant, as that of a sum is."""

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def call(ctx, *grads):
            if not torch.compiler.is_compiling() and any(map(_is_mapped, grads)):
                raise RuntimeError(f"{op}: no vmap of a backward pass (is_grads_batched=True); use torch.func.jacrev")
            if forward_mode._current_level >= 0 and any(map(_has_tangent, grads)):
                raise RuntimeError(f"{op}: no forward-mode derivative of a backward pass; {advice}")
            with torch.no_grad():
                found = without_autocast(backward)(ctx, *grads)
            if not torch.is_grad_enabled():
                return found
            sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
            if not sources:
                return found
            message = f"{op} is once_differentiable: no second derivative (create_graph=True) by kernels; {advice}"
            which = [i for i, x in enumerate(found) if x is not None]
            asked = iter(_RefuseSecond.apply(message, len(which), *(found[i] for i in which), *sources))
            return tuple(None if x is None else next(asked) for x in found)

        return call

    return decorate
