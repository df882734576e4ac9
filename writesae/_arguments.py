"""What is asked of arguments, in one form of words: the argument's name, what was expected, what came. And the short
words for tensors that errors and reprs use."""

from __future__ import annotations

import operator
from dataclasses import fields

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
)
from torch._guards import detect_fake_mode

_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


def check_floats(optional: tuple[str, ...] = (), /, **tensors: Tensor | None) -> None:
    """Raises ValueError unless each is a dense floating tensor, all on one device; `optional` ones may be None."""
    device = None
    for name, x in tensors.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor) or x.dtype not in _FLOATS or x.layout is not torch.strided or x.is_nested:
            raise ValueError(f"{name}: expected {_expected(x)}")
        if device is None:
            device, first = x.device, name
        elif x.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, where {first} is, got one on {x.device}")


def _expected(x) -> str:
    if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested:
        return f"a floating dtype, got {x.dtype}"
    return f"a dense tensor of a floating dtype, got {said(x)}"


def check_integers(name: str, x: Tensor, shape: str) -> None:
    """Raises ValueError unless x is a dense tensor of integers."""
    if not isinstance(x, Tensor) or x.dtype not in _INTEGERS or x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"{name}: expected a tensor of integers {shape}, got {said(x)}")


def check_type(name: str, x, kind: type, optional: bool = False) -> None:
    if not isinstance(x, kind) and not (optional and x is None):
        raise ValueError(f"{name}: expected {kind.__name__}{' or None' if optional else ''}, got {said(x)}")


def integers(name: str, x) -> list[int]:
    """From a number, a sequence or a tensor of integers; nothing is rounded.

    Raises:
        ValueError: anything else (1.5, True, text, NaN, beyond int64), naming the argument.
    """
    if isinstance(x, Tensor):
        check_integers(name, x, "[n]")
        reason = unreadable(x)
        if reason is not None:
            raise RuntimeError(f"{name}: its numbers are needed, and {reason}")
        return x.reshape(-1).cpu().tolist()
    found = x.reshape(-1).tolist() if hasattr(x, "reshape") else x
    found = list(found) if hasattr(found, "__iter__") and not isinstance(found, (str, bytes)) else [found]
    for value in found:
        if isinstance(value, bool) or not hasattr(value, "__index__") or getattr(value, "dtype", None) == torch.bool:
            raise ValueError(f"{name}: expected integers, got {said(value)}")
        try:
            fits = -(2**63) <= operator.index(value) < 2**63
        except TypeError:  # a tensor or an array of another kind has the method too
            raise ValueError(f"{name}: expected integers, got {said(value)}") from None
        if not fits:
            raise ValueError(f"{name}: expected integers that fit in 64 bits, got {value}")
    return [operator.index(value) for value in found]


def sequence_offsets(op: str, cu_seqlens: Tensor, B: int, T: int) -> list[int]:
    """The offsets of packed sequences, checked."""
    check_integers("cu_seqlens", cu_seqlens, "[N + 1]")
    if cu_seqlens.ndim != 1:
        raise ValueError(f"cu_seqlens: expected [N + 1] integers, got {said(cu_seqlens)}")
    if B != 1:
        raise ValueError(f"cu_seqlens: packed sequences need B = 1, got B = {B}")
    refuse_unreadable(op, "cu_seqlens", cu_seqlens)
    offsets = cu_seqlens.cpu().tolist()
    rising = all(lo <= hi for lo, hi in zip(offsets[:-1], offsets[1:], strict=True))
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != T or not rising:
        raise ValueError(f"cu_seqlens: expected offsets rising from 0 to T={T}, got {offsets[:8]}")
    return offsets


# ---- numbers that cannot be looked at -------------------------------------------------------------------------------


def unreadable(x: Tensor) -> str | None:
    """Why a tensor's numbers cannot be looked at, or None."""
    if x.device.type == "meta":
        return "a meta tensor has no numbers"
    if torch.compiler.is_compiling() or _fake(x):
        return "tensors have no numbers while torch.export or torch.compile traces"
    if torch._C._are_functorch_transforms_active():
        if any(level.key() == TransformType.Functionalize for level in get_interpreter_stack()):
            return "torch.func.functionalize hides them"
        while is_functorch_wrapped_tensor(x):
            if is_batchedtensor(x):
                return "a tensor mapped by vmap has others for each element"
            x = get_unwrapped(x)
    return None


def _fake(x: Tensor) -> bool:
    plain = type(x) is Tensor and not torch._C._len_torch_dispatch_stack()  # nearly always, and to look on takes 5 us
    if plain:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return detect_fake_mode(x) is not None or get_proxy_mode() is not None


def refuse_unreadable(op: str, name: str, x: Tensor) -> None:
    reason = unreadable(x)
    if reason is not None:
        raise RuntimeError(f"{op}: the numbers of {name} are needed, and {reason}")


# ---- words ----------------------------------------------------------------------------------------------------------


def said(x) -> str:
    """What came, in a few words."""
    if x is None:
        return "None"
    if not isinstance(x, Tensor):
        text = str(x)
        return f"{type(x).__name__} {text if len(text) < 60 else text[:57] + '...'}"
    if x.is_nested:
        return f"a nested tensor of {x.dtype}"
    layout = "" if x.layout is torch.strided else f"{str(x.layout).removeprefix('torch.')} "
    return f"a {layout}tensor of {x.dtype} and shape {tuple(x.shape)}"


def sizes(x) -> str:
    """A field's value for a repr: of a tensor its dtype and sizes."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else repr(x)


def sizes_repr(self) -> str:
    """A `__repr__` of dataclasses that hold tensors; fields that are None are left out."""
    shown = ((field.name, getattr(self, field.name)) for field in fields(self))
    return f"{type(self).__name__}({', '.join(f'{name}={sizes(x)}' for name, x in shown if x is not None)})"


def span(x: Tensor) -> str:
    """Smallest and largest of a column, for reprs."""
    if not len(x):
        return "none"
    ends = (x.min().item(), x.max().item())
    lo, hi = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in ends)
    return lo if lo == hi else f"{lo}..{hi}"
