"""What is running on this thread: `Frame`, one forward call of an intercepted layer, and `running`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..ops.rule import RuleCall
from .binding import Given, LayerSite, Recurrence
from .model_call import ModelCall


class _Local(threading.local):
    def __init__(self):
        self.frames: list[Frame] = []


_local = _Local()


@dataclass(frozen=True, eq=False)
class Met:
    """One call by a layer of one of its functions.

    Attributes:
        recurrence: the function, as its family's table has it.
        original: what the layer would have called.
        args, kwargs: what it was called with; `given`: the same by name.
    """

    recurrence: Recurrence
    original: Callable
    args: tuple
    kwargs: dict[str, Any]
    given: Given


@dataclass(eq=False)
class Frame:
    """One forward call of an intercepted layer, on this thread.

    Attributes:
        site: the layer.
        call: the model's forward call around it, None when the layer was called on its own.
        cache: the cache handed to the layer, or None.
        layer_mask: `[B, T]` mask handed to the layer, or None.
        hidden: `[B, T, hidden]` what the layer was given.
        rules, convs: what stands in for its functions and its convolution, the latest installed first.
        met: the call that rules stand in for at the moment, if any.
        ran: whether the layer has called one of its functions.
        own_conv: calls the convolution that a handler stands in for, as the layer called it.
    """

    site: LayerSite
    call: ModelCall | None
    cache: Any
    layer_mask: Tensor | None
    hidden: Tensor
    rules: tuple[Callable, ...]
    convs: tuple[Callable, ...]
    met: Met | None = field(default=None, repr=False)
    ran: bool = False
    own_conv: Callable[[], Tensor] | None = field(default=None, repr=False)

    @functools.cached_property
    def cu_seqlens(self) -> Tensor | None:
        """`[N + 1]` int64 offsets of the packed sequences of this call, or None."""
        if self.call is None:
            return None
        return self.call.cu_seqlens((self.hidden.shape[0], self.hidden.shape[1]), self.cache)

    @functools.cached_property
    def start(self) -> int:
        """Column of the first token of this call: tokens (pads too) that the cache held before."""
        return 0 if self.call is None else self.call.start(self.cache)

    @functools.cached_property
    def first_row(self) -> int:
        """Number of this call's first row; see `ModelCall.first_row`."""
        return 0 if self.call is None else self.call.first_row(self.hidden.shape[0])

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """`[B, T]` bool, False at pads and at what `generate` feeds past a row's end; None when all are real tokens."""
        real = None if self.layer_mask is None or self.layer_mask.ndim != 2 else self.layer_mask.bool()
        if self.call is None:
            return real
        shape = (self.hidden.shape[0], self.hidden.shape[1])
        known = self.call.real_tokens(shape, self.start, self.hidden.device)
        return known if real is None else real if known is None else real & known.to(real.device)

    def bind(self, recurrence: Recurrence, given: Given) -> RuleCall:
        """The layer's call in the terms of its rule."""
        call = recurrence.bind(self.site, given)
        if self.cu_seqlens is not None and call.cu_seqlens is None:
            call = replace(call, cu_seqlens=self.cu_seqlens)
        return call

    def run(self, call: Callable, args: tuple, kwargs: dict):
        """`call(*args, **kwargs)`, the layer's forward, with this frame as the one that is running."""
        depth = len(_local.frames)
        try:
            try:
                _local.frames.append(self)
                return call(*args, **kwargs)
            finally:
                del _local.frames[depth:]
        finally:  # again, should an interrupt have hit the line above
            del _local.frames[depth:]


def running() -> Frame | None:
    """The intercepted layer that is running on this thread; for handlers."""
    return _local.frames[-1] if _local.frames else None
