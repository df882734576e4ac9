"""`Carries`: the running sums that cached decoding goes on from, `[N, Hs, F]` of each group of dictionaries of a layer.

They are good as long as the cache's state is the one that they were read off, and caches are reordered, cut, reset and
copied. On a CPU states are compared. On a device that would wait for it, so there the state has to be provably the one
that the call left: either the very tensor that the rule returned, or the tensor that it started from, changed in place
exactly once while the call lasted (by the layer, which puts the new state there), and neither changed since, as torch
counts. Anything else (the first step after a prefill, beams that were reordered, inference mode, which counts nothing)
has its sums read off the state anew: one product a layer, no wait.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def _version(x: Tensor) -> int | None:
    """How often its memory was changed in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether they are one tensor, or views of one that show the same of it."""
    whole = [x._base if x._is_view() else x for x in (a, b)]
    if whole[0] is not whole[1]:
        return False
    return (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())


@dataclass(eq=False)
class Carry:
    """Sums after one call of a layer, and the state that they belong to.

    Attributes:
        state: on a CPU, a copy of it, of the group's heads; on a device the tensor that holds it.
        version: of that tensor.
        copy: on a device, the state that the rule returned and its version, where the cache holds a copy of it.
    """

    carry: Tensor
    state: Tensor
    version: int | None = None
    copy: tuple[Tensor, int | None] | None = None
    _before: tuple[Tensor, int | None] | None = None  # what the call started from, while it lasts

    @classmethod
    def of(cls, carry: Tensor, initial_state: Tensor | None, final_state: Tensor, heads: list[int]) -> Carry:
        """Of a call that is not at its end. Both states are `[N, H, K, V]`."""
        if final_state.device.type == "cpu":
            return cls(carry, final_state[:, heads])  # indexing by a list copies
        before = None
        if initial_state is not None and (initial_state.dtype, initial_state.device) == (
            final_state.dtype, final_state.device,
        ):  # fmt: skip
            before = initial_state, _version(initial_state)
        return cls(carry, final_state, _version(final_state), _before=before)

    def settle(self) -> None:
        """The call has come to its end."""
        if self._before is not None:
            state, version = self._before
            if version is not None and _version(state) == version + 1:
                self.copy = self.state, self.version
                self.state, self.version = state, version + 1
            self._before = None

    def holds(self, state: Tensor, heads: list[int]) -> bool:
        """Whether it belongs to this state of a cache, `[N, H, K, V]`."""
        if state.device.type == "cpu" or self.state.device.type == "cpu":
            if state.device != self.state.device or state.dtype != self.state.dtype:
                return False
            return torch.equal(self.state, state[:, heads])
        return self.version is not None and _version(state) == self.version and _same_memory(state, self.state)

    def untouched(self) -> Tensor | None:
        """A copy of the cache's state, while this holds, which nobody changes in place; None where there is none."""
        if self.copy is None:
            return None
        state, version = self.copy
        return state if not state.requires_grad and version is not None and _version(state) == version else None


class Carries:
    """The sums that go with each cache, as long as it lives."""

    def __init__(self):
        self._kept: MutableMapping = WeakIdKeyDictionary()  # not all caches can be hashed

    def keep(self, cache, key: tuple[int, int], carry: Carry) -> None:
        """key: (layer, number of the group). At the end of the call."""
        carry.settle()
        self._kept.setdefault(cache, {})[key] = carry

    def get(self, cache, key: tuple[int, int], state: Tensor, heads: list[int]) -> Carry | None:
        """None where the cache's state is another one now."""
        kept = self._kept.get(cache, {}).get(key)
        return kept if kept is not None and kept.holds(state, heads) else None
