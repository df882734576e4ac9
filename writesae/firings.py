"""`Firings`: which features fired where. The only sparse type; the store holds it and every analysis reads it.

`LazyFirings` are the same where columns are computed from something smaller when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ._arguments import said, span

_DTYPES = {
    "row": torch.int32, "position": torch.int32, "layer": torch.int32, "head": torch.int32,
    "feature": torch.int32, "activation": torch.float32,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Firings:
    """Columns of equal length n on one device, one entry a firing (a token, a site and a feature with a non-zero code).

    Attributes:
        row: `[n]` int32 batch row, or index of the sequence in a packed batch.
        position: `[n]` int32 position inside that row (pads count, and never fire).
        layer: `[n]` int32 layer index of the model.
        head: `[n]` int32 value head.
        feature: `[n]` int32 atom of that site's dictionary.
        activation: `[n]` float32 code, > 0.
    """

    row: Tensor
    position: Tensor
    layer: Tensor
    head: Tensor
    feature: Tensor
    activation: Tensor

    def __post_init__(self):
        n = len(self.row) if isinstance(self.row, Tensor) and self.row.ndim else 0
        for field in fields(self):
            column = getattr(self, field.name)
            if not isinstance(column, Tensor):
                raise ValueError(f"{field.name}: expected a tensor, got {said(column)}")
            if column.ndim != 1 or len(column) != n:
                raise ValueError(f"{field.name}: expected a column of length {n}, got shape {tuple(column.shape)}")
            if column.dtype != _DTYPES[field.name]:
                object.__setattr__(self, field.name, column.to(_DTYPES[field.name]))

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index) -> Firings:
        """Rows by mask, slice or index tensor."""
        return Firings(**{name: getattr(self, name)[index] for name in _DTYPES})

    def __repr__(self) -> str:
        n = len(self)
        if not n:
            return "Firings(none)"
        parts = (f"{name} {span(getattr(self, name))}" for name in ("row", "position", "layer", "head", "feature"))
        return f"Firings({n}; {', '.join(parts)}; activation {span(self.activation)})"

    @staticmethod
    def empty(n: int = 0, device: torch.device | str | None = None) -> Firings:
        """n firings whose columns are to be filled."""
        return Firings(**{name: torch.empty(n, dtype=dtype, device=device) for name, dtype in _DTYPES.items()})

    @staticmethod
    def cat(parts: Iterable[Firings]) -> Firings:
        """Concatenates in order. Lazy where all of them are."""
        parts = list(parts)
        if not parts:
            return Firings.empty()
        if all(isinstance(p, LazyFirings) for p in parts):
            return LazyFirings([part for p in parts for part in p.parts])  # type: ignore[attr-defined]
        return Firings(**{name: torch.cat([getattr(p, name) for p in parts]) for name in _DTYPES})

    def sort(self) -> Firings:
        """By (row, position, layer, head, descending activation, feature): one order for one set of firings."""
        order = torch.arange(len(self), device=self.device)
        for key in (self.feature, -self.activation, self.head, self.layer, self.position, self.row):
            order = order[torch.argsort(key[order], stable=True)]
        return self[order]

    def of_site(self, layer: int, head: int) -> Firings:
        """Those of one site, in order."""
        return self[(self.layer == layer) & (self.head == head)]

    def counts(self, layer: int, head: int, features: int) -> Tensor:
        """`[features]` int64: how often each feature of one site fired. On a device, without waiting for it.

        Args:
            features: of the site's dictionary, more than the largest that fires.
        """
        mine = (self.layer == layer) & (self.head == head)
        found = torch.zeros(features, dtype=torch.int64, device=self.device)
        return found.scatter_add_(0, torch.where(mine, self.feature, 0).long(), mine.long())

    @property
    def device(self) -> torch.device:
        """Where the columns are."""
        return self.row.device

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(column.nbytes for column in self.columns().values())

    def to(self, device: torch.device | str) -> Firings:
        """The same on another device."""
        return Firings(**{name: column.to(device) for name, column in self.columns().items()})

    def cpu(self) -> Firings:
        """The same on the CPU."""
        return self.to("cpu")

    def columns(self) -> dict[str, Tensor]:
        """`{name: [n]}` of the six columns, in this order."""
        return {name: getattr(self, name) for name in _DTYPES}

    def to_pandas(self):
        """A `pandas.DataFrame` of the six columns, in this order and these dtypes.

        Raises:
            ImportError: pandas is not installed (`pip install writesae[pandas]`).
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas: needs pandas: pip install writesae[pandas]") from error
        return pandas.DataFrame({name: column.detach().numpy() for name, column in self.cpu().columns().items()})

    def count(self) -> Tensor:
        """Their number as a tensor of their device. For `LazyFirings`, like `fill`."""
        return torch.tensor(len(self)).to(self.device, non_blocking=True)

    def may_hold(self, layer: int, head: int) -> bool:
        """Whether it is known, without looking, that none is of that site: then False."""
        return True

    def fill(self, columns: MutableMapping[str, Tensor], start: int, n: int) -> None:
        """Writes some of the columns, n entries each, from entry `start` on."""
        for name, to in columns.items():
            to[start : start + n].copy_(getattr(self, name))


class Part(Protocol):
    """What `LazyFirings` are made of: `Firings`, or anything that answers to some of their methods."""

    @property
    def device(self) -> torch.device: ...
    @property
    def nbytes(self) -> int: ...
    def count(self) -> Tensor: ...
    def fill(self, columns: MutableMapping[str, Tensor], start: int, n: int) -> None: ...
    def may_hold(self, layer: int, head: int) -> bool: ...
    def of_site(self, layer: int, head: int) -> Part: ...
    def counts(self, layer: int, head: int, features: int) -> Tensor: ...
    def to(self, device: torch.device | str) -> Part: ...


class LazyFirings(Firings):
    """Firings that lie where a model left them, in parts (the codes of one layer in one call) that know their columns.

    On a CPU the columns are computed once, together. On a device each is computed whenever it is asked for, so keep
    what is used twice: then nothing but the codes takes memory. Their number is a fact of the data, so `len` and
    columns wait for the device, once; `of_site`, `counts`, `cat` and `to` do not.

    Attributes:
        parts: all on one device.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device | str = "cpu"):
        """device: where there are no parts to say so.

        Raises:
            ValueError: parts are on several devices.
        """
        self.parts: tuple[Part, ...] = tuple(parts)
        devices = {part.device for part in self.parts} or {torch.device(device)}
        if len(devices) > 1:
            raise ValueError(f"parts: expected all on one device, got {', '.join(sorted(map(str, devices)))}")
        (self._device,) = devices

    def __post_init__(self):
        raise AssertionError("columns are not given")

    @cached_property
    def _lengths(self) -> list[int]:
        return torch.stack([part.count() for part in self.parts]).cpu().tolist() if self.parts else []

    def __len__(self) -> int:
        return sum(self._lengths)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def _filled(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: torch.empty(len(self), dtype=_DTYPES[name], device=self.device) for name in names}
        start = 0
        for part, n in zip(self.parts, self._lengths, strict=True):
            part.fill(found, start, n)
            start += n
        return found

    @cached_property
    def _host(self) -> dict[str, Tensor]:
        return self._filled(_DTYPES)

    def columns(self) -> dict[str, Tensor]:
        return dict(self._host) if self.device.type == "cpu" else self._filled(_DTYPES)

    def _column(self, name: str) -> Tensor:
        return self._host[name] if self.device.type == "cpu" else self._filled([name])[name]

    row = property(lambda self: self._column("row"))
    position = property(lambda self: self._column("position"))
    layer = property(lambda self: self._column("layer"))
    head = property(lambda self: self._column("head"))
    feature = property(lambda self: self._column("feature"))
    activation = property(lambda self: self._column("activation"))

    def of_site(self, layer: int, head: int) -> LazyFirings:
        parts = [part.of_site(layer, head) for part in self.parts if part.may_hold(layer, head)]
        return LazyFirings(parts, self.device)

    def counts(self, layer: int, head: int, features: int) -> Tensor:
        found = torch.zeros(features, dtype=torch.int64, device=self.device)
        for part in self.parts:
            if part.may_hold(layer, head):
                found += part.counts(layer, head, features)
        return found

    def to(self, device: torch.device | str) -> LazyFirings:
        return LazyFirings([part.to(device) for part in self.parts], torch.device(device))
