"""What reads a few tokens to the left of its own besides a layer's rule and convolution functions: short convolutions
that are modules of their own, token shifts.

A run of short forks (`shared_prefix`) hands them the tokens before. Where none is running they are as they were.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .shared_prefix import Pass


class _Local(threading.local):
    def __init__(self):
        self.passes: list[Pass] = []


_local = _Local()


def running() -> Pass | None:
    """The pass that this thread's calls of a model go by."""
    return _local.passes[-1] if _local.passes else None


@contextlib.contextmanager
def served_by(run: Pass) -> Iterator[None]:
    """Within, `running()` is `run` on this thread."""
    depth = len(_local.passes)
    try:
        _local.passes.append(run)
        yield
    finally:
        del _local.passes[depth:]


def shim(function: Callable, width: int) -> Callable:
    """Stands in for `function(x, ...)`, x `[B, T, D]`, that reads the `width` tokens before each, and returns
    `[B, T, D]` or a tuple that begins with it."""

    @functools.wraps(function, updated=())
    def stand_in(x: Tensor, *args, **kwargs):
        run = running()
        if run is None:
            return function(x, *args, **kwargs)
        return run.look_back(lambda wide: function(wide, *args, **kwargs), x, width)

    return stand_in


def channels_first(entry, call, args, kwargs):
    """Stands in for the forward of a torch convolution, `[B, D, T]`, padded on both sides; its member is the width."""
    serving = entry.serving()
    if not serving:
        return call(*args, **kwargs)
    (x,) = args
    return shim(lambda wide: call(wide.mT).mT, serving[0])(x.mT).mT


def module_body(entry, call, args, kwargs):
    """Stands in for the forward of a convolution that is a module; its member is the width."""
    serving = entry.serving()
    return shim(call, serving[0])(*args, **kwargs) if serving else call(*args, **kwargs)
