"""`Firings`: which features fired where. The only sparse type; the store holds it and every analysis reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ._arguments import said, span

_DTYPES = {
    "row": torch.int32, "position": torch.int32, "layer": torch.int32, "head": torch.int32,
    "feature": torch.int32, "activation": torch.float32,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Firings:
    """Columns of equal length n, one entry a firing (a token, a site and a feature with a non-zero code).

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

    @classmethod
    def empty(cls, n: int = 0) -> Firings:
        """n firings whose columns are to be filled."""
        return cls(**{name: torch.empty(n, dtype=dtype) for name, dtype in _DTYPES.items()})

    @classmethod
    def cat(cls, parts: Iterable[Firings]) -> Firings:
        """Concatenates in order."""
        parts = list(parts)
        if not parts:
            return cls.empty()
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in _DTYPES})

    def sort(self) -> Firings:
        """By (row, position, layer, head, descending activation, feature): one order for one set of firings."""
        order = torch.arange(len(self))
        for key in (self.feature, -self.activation, self.head, self.layer, self.position, self.row):
            order = order[torch.argsort(key[order], stable=True)]
        return self[order]

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
        return pandas.DataFrame({name: column.detach().cpu().numpy() for name, column in self.columns().items()})
