"""`Gathered`: the firings of a run, each column written once, layer by layer, to where it stays.

288 heads of 1,024 tokens make 9.4 million firings, 226 MB. What such columns cost is mostly the first touch of their
memory, so there is one set of them for all layers of a forward pass, and codes are copied into it while in cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..firings import Firings
from ..writes import Writes
from .transfer import ToHost

_UNDER_WAY = 2**30  # bytes of codes that may wait on the host for somebody to ask for firings


@dataclass(eq=False)
class Columns:
    """Row and position of every token of a call, and which are real."""

    row: Tensor  # [B, T]
    position: Tensor  # [B, T]
    real: Tensor | None  # [B, T] bool

    @classmethod
    def of(cls, writes: Writes, start: int, mask: Tensor | None, first_row: int = 0) -> Columns:
        B, T = writes.right.shape[:2]
        device = writes.right.device
        at = torch.arange(T, device=device)
        if writes.cu_seqlens is None:
            row, position = torch.arange(first_row, first_row + B, device=device)[:, None], (at + start)[None]
        else:
            cu = writes.cu_seqlens.to(device)
            row = (torch.searchsorted(cu, at, right=True) - 1)[None]
            position = at[None] - cu[row]
        return cls(row.expand(B, T), position.expand(B, T), None if mask is None else mask.to(device))


@dataclass(eq=False)
class TopK:
    """Top-k codes of one call on the host; those above 0 of real tokens are firings."""

    values: Tensor  # [B, T, Hs, k]
    indices: Tensor
    heads: Sequence[int]
    columns: Columns
    layer: int

    @property
    def room(self) -> int:
        return self.values.numel()


@dataclass(eq=False)
class Coming:
    """Top-k codes of one call, on their way from a device; which of them are firings is seen on the host."""

    transfer: ToHost
    heads: Sequence[int]
    layer: int
    room: int

    @classmethod
    def of(cls, codes: TopK) -> Coming:
        columns = codes.columns
        values = codes.values if columns.real is None else codes.values * columns.real[:, :, None, None]
        transfer = ToHost((values.float(), codes.indices.int(), columns.row.int(), columns.position.int()))
        return cls(transfer, codes.heads, codes.layer, values.numel())

    def landed(self) -> TopK:
        values, indices, row, position = self.transfer.get()
        return TopK(values, indices, self.heads, Columns(row, position, None), self.layer)


class _Block:
    """Columns with room for so many firings, filled from the front."""

    def __init__(self, room: int):
        self._columns = Firings.empty(room).columns()
        self.room, self.used = room, 0

    def fits(self, n: int) -> bool:
        return self.used + n <= self.room

    def append(self, part: TopK | Firings) -> None:
        if isinstance(part, Firings):
            self._put(len(part), part.columns())
        else:
            self._append_codes(part)

    def _append_codes(self, codes: TopK) -> None:
        B, T, Hs, k = codes.values.shape
        fires = codes.values > 0
        if codes.columns.real is not None:
            fires &= codes.columns.real[:, :, None, None]
        head = torch.tensor(codes.heads, dtype=torch.int32)
        row, position = codes.columns.row.int()[:, :, None], codes.columns.position.int()[:, :, None]
        layer = torch.tensor(codes.layer, dtype=torch.int32)
        if bool(fires.all()):  # the usual case, and a matter of copies
            per_token = (B, T, Hs * k)
            self._put(B * T * Hs * k, {
                "row": row.expand(per_token), "position": position.expand(per_token), "layer": layer.expand(per_token),
                "head": head.repeat_interleave(k).expand(per_token), "feature": codes.indices.reshape(per_token),
                "activation": codes.values.reshape(per_token),
            })  # fmt: skip
            return
        which = fires.flatten().nonzero()[:, 0]
        site = which // k
        token = site // Hs
        self._put(len(which), {
            "row": row.flatten()[token], "position": position.flatten()[token], "layer": layer.expand(len(which)),
            "head": head[site % Hs], "feature": codes.indices.flatten()[which],
            "activation": codes.values.flatten()[which],
        })  # fmt: skip

    def _put(self, n: int, columns: dict[str, Tensor]) -> None:
        start, self.used = self.used, self.used + n
        for name, found in columns.items():
            self._columns[name][start : self.used].view(found.shape).copy_(found)

    def firings(self) -> Firings:
        found = Firings(**{name: column[: self.used] for name, column in self._columns.items()})
        # Much more room than firings: nobody should have to keep that.
        return found if self.used >= self.room * 7 // 8 else found[torch.arange(self.used)]


class Gathered:
    """Firings in the order in which calls were recorded. Not thread-safe."""

    def __init__(self):
        self._parts: list[_Block | Firings | Coming] = []

    def add(self, part: TopK | Firings | Coming, room: int) -> None:
        """Takes in one call of one layer; room: firings that all layers of the forward pass may have together."""
        if isinstance(part, TopK):
            last = self._parts[-1] if self._parts else None
            if not isinstance(last, _Block) or not last.fits(part.room):
                last = _Block(max(room, part.room))
                self._parts.append(last)
            last.append(part)
            return
        if isinstance(part, Firings) and not len(part):
            return
        self._parts.append(part)
        self._limit()

    def extend(self, other: Gathered) -> None:
        """Takes over what another has gathered, behind its own."""
        self._parts.extend(other._parts)
        self._limit()

    def _limit(self) -> None:
        if sum(p.transfer.nbytes for p in self._parts if isinstance(p, Coming)) > _UNDER_WAY:
            self.joined()

    def joined(self) -> Firings:
        """All of them, after waiting for those still on their way."""
        if not (len(self._parts) == 1 and isinstance(self._parts[0], Firings)):
            self._parts = [self._join()]
        whole = self._parts[0]
        assert isinstance(whole, Firings)
        return whole

    def _join(self) -> Firings:
        if len(self._parts) == 1 and isinstance(self._parts[0], _Block):
            return self._parts[0].firings()
        landed = [p.landed() if isinstance(p, Coming) else p.firings() if isinstance(p, _Block) else p
                  for p in self._parts]  # fmt: skip
        whole = _Block(sum(part.room if isinstance(part, TopK) else len(part) for part in landed))
        for part in landed:
            whole.append(part)
        return whole.firings()
