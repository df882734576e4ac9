"""`Order`: which passages each block of a training run holds, a function of the seed and the block's number alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .site import generator


class Order:
    """Pool after pool of a stream, the passages of each in an order drawn for it, epoch after epoch; whole blocks only.

    Args:
        pool: number of a pool to its passages; an empty range where the stream has ended. Pool 0 holds `rows` at least.
        rows: passages of a block.
        seed: of the order.
    """

    def __init__(self, pool: Callable[[int], range], rows: int, seed: int):
        self._pool, self._rows, self._seed = pool, rows, seed
        self._at = self._epoch = self._first = 0  # the pool in hand, its epoch, its first block

    def rows(self, index: int) -> Tensor:
        """`[rows]` int64 passages of block `index`. Cheapest in rising order: text is read forwards."""
        if index < self._first:
            self._at = self._epoch = self._first = 0
        here = self._pool(self._at)
        while index >= self._first + len(here) // self._rows:
            self._first += len(here) // self._rows
            self._at += 1
            here = self._pool(self._at)
            if not here:
                self._at, self._epoch = 0, self._epoch + 1
                here = self._pool(0)
        keys = ("epoch", self._epoch, self._at) if self._at else ("epoch", self._epoch)
        order = torch.randperm(len(here), generator=generator(self._seed, *keys))
        at = index - self._first
        return here.start + order[at * self._rows : (at + 1) * self._rows]

    def state(self) -> dict:
        """Where it is, as numbers."""
        return {"at": self._at, "epoch": self._epoch, "first": self._first}

    def restore(self, state: dict) -> None:
        """Goes on from `state()`.

        Raises:
            ValueError, KeyError, TypeError: no such state.
        """
        found = [state[name] for name in ("at", "epoch", "first")]
        if not all(type(x) is int and x >= 0 for x in found):
            raise ValueError(f"order: expected numbers >= 0, got {found}")
        self._at, self._epoch, self._first = found
