"""`Gathered`: the firings of a run, of each call as they come.

On a CPU each column is written once, layer by layer, to where it stays: 288 heads of 1,024 tokens make 9.4 million
firings, 226 MB, and what such columns cost is mostly the first touch of their memory, so there is one set of them for
all layers of a forward pass, and codes are copied into it while in cache.

On a device codes stay where they are, 4 to 6 bytes each (`Grid`), until somebody asks for them or there are too many;
then all of them cross together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..firings import Firings, LazyFirings
from .grid import Grid, Tokens, narrowed
from .transfer import ToHost

ON_DEVICE = 2**30  # bytes of codes that stay on a device; beyond, all of them move to the host meanwhile
_LARGE = 2**20  # bytes of codes narrowed at once; smaller ones wait for others (a launch each would be all they cost)
_LOOSE = 2**24  # bytes of those that wait


class Crossing:
    """Grids of devices on their way to the host, in one copy a device."""

    def __init__(self, grids: Sequence[Grid]):
        self._grids = list(grids)
        self._distinct = {id(x): x for grid in grids for x in grid.tensors()}  # a mask serves every layer of its call
        self._transfer = ToHost(list(self._distinct.values()))
        self._landed: list[Grid] | None = None

    def grid(self, number: int) -> Grid:
        """One of them, on the host. Waits for it."""
        if self._landed is None:
            host = dict(zip(self._distinct, self._transfer.get(), strict=True))
            self._landed = [grid.holding([host[id(x)] for x in grid.tensors()]) for grid in self._grids]
            self._grids, self._distinct = [], {}
        return self._landed[number]


@dataclass(eq=False)
class Held:
    """Codes of one call of one layer on a device, on the host, or on both."""

    device: Grid | None
    crossing: tuple[Crossing, int] | None = None

    def host(self) -> Grid:
        assert self.crossing is not None
        crossing, number = self.crossing
        return crossing.grid(number)


class _Block:
    """Columns with room for so many firings, filled from the front."""

    def __init__(self, room: int):
        self._columns = Firings.empty(room).columns()
        self.room, self.used = room, 0

    def fits(self, n: int) -> bool:
        return self.used + n <= self.room

    def append(self, part: Grid | Firings) -> None:
        n = int(part.count())
        part.fill(self._columns, self.used, n)
        self.used += n

    def firings(self) -> Firings:
        found = Firings(**{name: column[: self.used] for name, column in self._columns.items()})
        # Much more room than firings: nobody should have to keep that.
        return found if self.used >= self.room * 7 // 8 else found[torch.arange(self.used)]


class Gathered:
    """Firings in the order in which calls were recorded. Not thread-safe."""

    def __init__(self):
        self._parts: list[_Block | Firings | Held] = []
        self._devices: list[Held] = []  # those of the parts that take memory of a device
        self._loose: list[Held] = []  # those of them to be narrowed
        self._bytes = self._loose_bytes = 0
        self._joined: Firings | None = None

    def add(self, part: Grid | Firings, room: int) -> None:
        """Takes in one call of one layer; room: firings that all layers of the forward pass may have together."""
        self._joined = None
        if isinstance(part, Firings):
            if len(part):
                self._parts.append(part)
            return
        if part.device.type == "cpu":
            last = self._parts[-1] if self._parts else None
            if not isinstance(last, _Block) or not last.fits(part.room):
                last = _Block(max(room, part.room))
                self._parts.append(last)
            last.append(part)
            return
        if part.nbytes >= _LARGE:
            (part,) = narrowed([part])
        held = Held(part)
        self._parts.append(held)
        self._devices.append(held)
        self._bytes += part.nbytes
        if part.loose:
            self._loose.append(held)
            self._loose_bytes += part.nbytes
        self._limit()

    def extend(self, other: Gathered) -> None:
        """Takes over what another has gathered, behind its own."""
        self._joined = None
        self._parts += other._parts
        self._devices += other._devices
        self._loose += other._loose
        self._bytes += other._bytes
        self._loose_bytes += other._loose_bytes
        self._limit()

    def _limit(self) -> None:
        if self._loose_bytes > _LOOSE:
            self._narrow()
        if self._bytes > ON_DEVICE:
            self.leave()

    def _narrow(self) -> None:
        """All that are held, in as few bytes as they take."""
        grids = [held.device for held in self._loose if held.device is not None]
        for held, grid in zip(self._loose, narrowed(grids), strict=True):
            held.device = grid
        self._loose, self._loose_bytes = [], 0
        self._bytes = sum(held.device.nbytes for held in self._devices if held.device is not None)

    def _cross(self) -> None:
        """Starts the way to the host of those that are not there."""
        self._narrow()
        missing = [held for held in self._devices if held.crossing is None]
        if missing:
            crossing = Crossing([held.device for held in missing if held.device is not None])
            for i, held in enumerate(missing):
                held.crossing = crossing, i

    def drop_pads(self, mask: Tensor) -> None:
        """Lets go of the codes of pads, which the host knows: mask `[B, T]` there, of the only call there was.

        For codes on a device that are about to cross; on a CPU they are gone already.
        """
        if not self._devices or bool(mask.all()):
            return
        where = mask.flatten().nonzero()[:, 0].int()
        self._narrow()
        kept: dict[torch.device, tuple[Tensor, Tokens]] = {}
        for held in self._devices:
            grid = held.device
            assert grid is not None and grid.tokens.shape == mask.shape, "a call of another shape"
            if grid.device not in kept:
                there = where.to(grid.device, non_blocking=True)
                kept[grid.device] = there, grid.tokens.only(there)
            held.device = grid.only(*kept[grid.device])

    def leave(self) -> None:
        """Starts the way of all of them to the host, and keeps none on a device."""
        self._cross()
        for held in self._devices:
            held.device = None
        self._devices, self._bytes = [], 0

    def joined(self) -> Firings:
        """All of them on the host, after waiting for those still on their way."""
        if self._joined is None:
            self._cross()
            if not any(isinstance(part, Held) for part in self._parts):
                if not (len(self._parts) == 1 and isinstance(self._parts[0], Firings)):
                    self._parts = [self._join()]
                whole = self._parts[0]
                assert isinstance(whole, Firings)
                return whole
            self._joined = LazyFirings([
                p.host() if isinstance(p, Held) else p.firings() if isinstance(p, _Block) else p for p in self._parts
            ])  # fmt: skip
        return self._joined

    def on_device(self) -> Firings:
        """All of them where the model is: those of a CPU as `joined` gives them.

        Raises:
            ValueError: they are on several devices.
        """
        devices = {held.device.device for held in self._devices if held.device is not None}
        if len(devices) > 1:
            raise ValueError(
                "device_firings: expected all hooked layers on one device, got "
                f"{', '.join(sorted(map(str, devices)))}; use firings, which are on the host"
            )
        if not devices:
            return self.joined()
        (device,) = devices
        self._narrow()
        parts: list[Grid | Firings] = []
        for part in self._parts:
            if isinstance(part, Held):
                parts.append(part.host().to(device) if part.device is None else part.device)
            else:
                parts.append((part.firings() if isinstance(part, _Block) else part).to(device))
        return LazyFirings(parts)

    def _join(self) -> Firings:
        if len(self._parts) == 1 and isinstance(self._parts[0], _Block):
            return self._parts[0].firings()
        parts = [p.firings() if isinstance(p, _Block) else p for p in self._parts if not isinstance(p, Held)]
        whole = _Block(sum(map(len, parts)))
        for part in parts:
            whole.append(part)
        return whole.firings()
