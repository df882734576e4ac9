"""What is running on this thread: `Frame`, one forward call of an intercepted layer, and `running`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from ..ops import nonfinite
from ..ops.rule import RuleCall
from ..writes import Writes, joined
from .binding import Given, LayerSite, Recurrence
from .model_call import ModelCall, fed_columns


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


class Recorded(NamedTuple):
    """What one call of a rule leaves: its writes, its states `[N, H, K, V]` before and after, or None, and where its
    increments are not finite, as `RuleOutput.first_nonfinite`, or None where nobody asks."""

    writes: Writes
    initial_state: Tensor | None
    final_state: Tensor | None
    first_nonfinite: Tensor | None


@dataclass(eq=False)
class Frame:
    """One forward call of an intercepted layer, on this thread.

    Attributes:
        site: the layer.
        call: the model's forward call around it, None when the layer was called on its own.
        cache: the cache handed to the layer, or None.
        layer_mask: `[B, T]` mask handed to the layer (of cached columns too, in some families), or None.
        hidden: `[B, T, hidden]` what the layer was given.
        head: the value head whose call rules stand in for, where a layer makes a call a head (`one_head_a_call`).
        gradients: `[B, T, 1, V]` of such a layer's heads in the backward that is running, until they are all there.
        rules, convs: what stands in for its functions and its convolution, the latest installed first.
        met: the call that rules stand in for at the moment, if any.
        ran: whether the layer has called one of its functions.
        own_conv: calls the convolution that a handler stands in for, as the layer called it.
        helpless: the layer's own functions cannot run on this machine; see `Binding.stand_ins`.
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
    head: int | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _parts: list[Recorded] = field(default_factory=list, repr=False)
    helpless: bool = False

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
        """`[B, T]` bool, False at pads, at what `generate` feeds past a row's end, and at what it has fed before (of a
        call without a cache all but the latest column); None when all are real tokens."""
        return self._real(once=True)

    @functools.cached_property
    def fed(self) -> Tensor | None:
        """`mask`, but True also at what `generate` has fed before."""
        return self.mask if self.call is None or self.call.generation is None else self._real(once=False)

    def _real(self, once: bool) -> Tensor | None:
        mask = self.layer_mask if self.layer_mask is not None and self.layer_mask.ndim == 2 else None
        shape = (self.hidden.shape[0], self.hidden.shape[1])
        if self.call is None:
            return None if mask is None else fed_columns(mask, shape[1])
        return self.call.real_tokens(shape, self.start, self.hidden.device, once, mask)

    def bind(self, recurrence: Recurrence, given: Given) -> RuleCall:
        """The layer's call in the terms of its rule.

        Raises:
            ValueError: one call more than the layer has heads, where there should be one for each.
        """
        if self.site.binding.one_head_a_call:
            self.head = 0 if self.head is None else self.head + 1
            if self.head >= self.site.num_v_heads:
                raise ValueError(
                    f"model: expected {type(self.site.module).__name__} to call {recurrence.name} once for each of its "
                    f"{self.site.num_v_heads} heads, got a call more"
                )
        call = recurrence.bind(self.site, given)
        if self.cu_seqlens is not None and call.cu_seqlens is None:
            call = replace(call, cu_seqlens=self.cu_seqlens)
        return call

    def all_heads(self, part: Recorded) -> Recorded | None:
        """What a call recorded; of a layer with a call a head, all of them together with the last, None before."""
        if self.head is None or self.site.num_v_heads == 1:
            return part
        before = part.initial_state
        if before is not None:  # a cache's, which the layer changes in place before its next call
            before = before.clone()
            part = part._replace(writes=replace(part.writes, initial_state=before), initial_state=before)
        self._parts.append(part)
        if len(self._parts) < self.site.num_v_heads:
            return None
        writes, initial, final, first = zip(*self._parts, strict=True)
        self._parts.clear()
        bad = None if first[0] is None else nonfinite.of_heads(first)
        return Recorded(Writes.of_heads(writes), joined(initial, 1), joined(final, 1), bad)

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
