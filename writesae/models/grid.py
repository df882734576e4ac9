"""`Grid`: top-k codes of one layer in one call as firings, in as few bytes as they take, where the model left them.

Codes are regular, `[B, T, Hs, k]`, so that row, position, layer and head of each follow from where it stands: only what
fires there is kept. "exact": the activation as it is and the feature in 2 bytes (4 of a dictionary of more than
65,536). "packed": both in one word of 32 bits, the feature in the lowest ceil(log2 F) and the activation, which has
no sign, rounded to the nearest that the rest can hold. Of F = 2,048 features that are 21 bits, 13 of them after the
point, and a relative error of up to 2^-14; of F = 65,536 it is 2^-9. What would be rounded to 0 (below 2^-139 of 2,048
features) no longer fires.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..writes import Writes

ACTIVATIONS = ("exact", "packed")
_SHORT, _MOST = 2**16, 2**16  # features that 2 bytes name; that a packed word leaves an activation for


def check_activations(activations, features: int = 1) -> None:
    """Raises ValueError unless codes of so many features can be kept so."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activations!r}")
    if activations == "packed" and features > _MOST:
        raise ValueError(
            f'activations: expected "exact" for a dictionary of more than {_MOST} features, whose numbers leave a word '
            f'too little for the activation, got "packed" for one of {features}'
        )


def feature_bits(features: int) -> int:
    """Bits of a packed word that say which of so many features."""
    return max(1, (features - 1).bit_length())


def _fields(values: Tensor, bits: int) -> Tensor:
    """Activations >= 0, float32, as integers of 32 - bits bits, rounded to nearest. Two launches.

    A NaN becomes one, or 0 (its bits overflow): neither fires.
    """
    half = (1 << (bits - 1)) >> 1
    return values.view(torch.int32).add(half).bitwise_right_shift_(bits - 1)


def rounded(values: Tensor, features: int) -> Tensor:
    """Activations >= 0 as packed codes of so many features hold them."""
    bits = feature_bits(features)
    found = _fields(values.float().contiguous(), bits)
    return found.bitwise_left_shift_(bits - 1).view(torch.float32)


@dataclass(eq=False)
class Tokens:
    """Row and position of every token of a call, computed when asked for, and which are real.

    Attributes:
        shape: (B, T). first_row, start: number of the first row, and of the first column.
        cu_seqlens: `[N + 1]` int32 of a packed batch, whose rows are its sequences, or None.
        real: `[B, T]` bool, or None for all.
        kept: `[n]` int32, the only tokens there are codes of, counted through `[B, T]`, or None for all; row, position
            and codes have `[1, n]` in place of `[B, T]` then.
    """

    shape: tuple[int, int]
    first_row: int
    start: int
    cu_seqlens: Tensor | None
    real: Tensor | None
    device: torch.device
    kept: Tensor | None = None

    @classmethod
    def of(cls, writes: Writes, start: int, mask: Tensor | None, first_row: int = 0) -> Tokens:
        (B, T), device = writes.right.shape[:2], writes.right.device
        cu = None if writes.cu_seqlens is None else writes.cu_seqlens.to(device, torch.int32, copy=True)
        return cls((B, T), first_row, start, cu, None if mask is None else mask.to(device), device)

    @cached_property
    def _at(self) -> Tensor:
        return torch.arange(self.shape[1], dtype=torch.int32, device=self.device)

    @cached_property
    def row(self) -> Tensor:
        """`[B, T]` int32."""
        B, T = self.shape
        if self.kept is not None:
            return (self.kept // T + self.first_row)[None]
        if self.cu_seqlens is None:
            rows = torch.arange(self.first_row, self.first_row + B, dtype=torch.int32, device=self.device)
            return rows[:, None].expand(B, T)
        return (torch.searchsorted(self.cu_seqlens, self._at, right=True, out_int32=True) - 1)[None]

    @cached_property
    def position(self) -> Tensor:
        """`[B, T]` int32."""
        if self.kept is not None:
            return (self.kept % self.shape[1] + self.start)[None]
        if self.cu_seqlens is None:
            return (self._at + self.start).expand(self.shape)
        return (self._at - self.cu_seqlens[self.row[0]])[None]

    def tensors(self) -> list[Tensor]:
        """What has to be moved for them."""
        return [x for x in (self.cu_seqlens, self.real, self.kept) if x is not None]

    def holding(self, tensors: Sequence[Tensor], device: torch.device) -> Tokens:
        """The same with those, moved."""
        given = iter(tensors)
        held = (self.cu_seqlens, self.real, self.kept)
        cu, real, kept = (None if x is None else next(given) for x in held)
        return Tokens(self.shape, self.first_row, self.start, cu, real, device, kept)

    def only(self, kept: Tensor) -> Tokens:
        """Some of them, all real, of a call without packed sequences."""
        assert self.cu_seqlens is None and self.kept is None
        return Tokens(self.shape, self.first_row, self.start, None, None, self.device, kept)


@dataclass(frozen=True, eq=False)
class Grid:
    """Codes of one call; those above 0 of real tokens are firings. A part of `LazyFirings`.

    Attributes:
        codes: `[B, T, Hs, k]` each: (activations float32, features int64, or narrowed to int32 or int16 without a
            sign), or (packed words int32,).
        bits: of a packed word that say the feature; None: exact.
        heads: value heads, Hs of them.
        features: of the dictionaries.
    """

    codes: tuple[Tensor, ...]
    bits: int | None
    tokens: Tokens
    heads: tuple[int, ...]
    layer: int
    features: int

    @property
    def device(self) -> torch.device:
        return self.codes[0].device

    @property
    def room(self) -> int:
        """Firings that there may be."""
        return self.codes[0].numel()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.codes)

    @property
    def loose(self) -> bool:
        """Whether the codes are as `encode` gave them, 12 bytes each."""
        return len(self.codes) == 2 and self.codes[1].dtype == torch.int64

    def activation(self) -> Tensor:
        """`[B, T, Hs, k]` float32, 0 or NaN where nothing fires; of pads, too."""
        if self.bits is None:
            return self.codes[0]
        if self.loose:
            return rounded(self.codes[0], self.features)
        field = (self.codes[0] >> self.bits).bitwise_and_((1 << (32 - self.bits)) - 1)
        return field.bitwise_left_shift_(self.bits - 1).view(torch.float32)

    def feature(self) -> Tensor:
        """`[B, T, Hs, k]` of integers."""
        if len(self.codes) == 1:
            assert self.bits is not None
            return self.codes[0] & ((1 << self.bits) - 1)
        found = self.codes[1]
        return found.int().bitwise_and_(_SHORT - 1) if found.dtype == torch.int16 else found

    def fires(self) -> Tensor:
        """`[B, T, Hs, k]` bool."""
        fires = self.activation() > 0
        real = self.tokens.real
        return fires if real is None else fires.logical_and_(real[:, :, None, None])

    # ---- as a part --------------------------------------------------------------------------------------------

    def count(self) -> Tensor:
        return self.fires().sum()

    def fill(self, columns: MutableMapping[str, Tensor], start: int, n: int) -> None:
        B, T, Hs, k = self.codes[0].shape
        whole = {
            "row": lambda: self.tokens.row[:, :, None, None], "feature": self.feature,
            "position": lambda: self.tokens.position[:, :, None, None],
            "head": lambda: torch.tensor(self.heads, dtype=torch.int32).to(self.device, non_blocking=True)[:, None],
            "activation": self.activation,
        }  # fmt: skip
        # The usual case is that all fire, and a matter of copies.
        which = None if n == self.room else self.fires().flatten().nonzero()[:, 0]
        for name, column in columns.items():
            to = column[start : start + n]
            if name == "layer":
                to.fill_(self.layer)
                continue
            found = whole[name]()
            if which is None:
                to.view(B, T, Hs, k).copy_(found)
            elif found.shape == (B, T, Hs, k):
                to.copy_(found.flatten()[which])
            elif name == "head":
                to.copy_(found[:, 0][which // k % Hs])
            else:
                to.copy_(found.flatten()[which // (Hs * k)])

    def may_hold(self, layer: int, head: int) -> bool:
        return self.layer == layer and head in self.heads

    def of_site(self, layer: int, head: int) -> Grid:
        """As a view."""
        first = self.heads.index(head) if self.may_hold(layer, head) else len(self.heads)
        part = slice(first, first + 1)
        return replace(self, codes=tuple(x[:, :, part] for x in self.codes), heads=self.heads[part])

    def counts(self, layer: int, head: int, features: int) -> Tensor:
        mine = self.of_site(layer, head)
        found = torch.zeros(features, dtype=torch.int64, device=self.device)
        return found.scatter_add_(0, mine.feature().flatten().long(), mine.fires().flatten().long())

    def only(self, kept: Tensor, tokens: Tokens) -> Grid:
        """Codes of some tokens, `tokens`: a launch for each kind of number."""
        codes = tuple(x.flatten(0, 1).index_select(0, kept)[None] for x in self.codes)
        return replace(self, codes=codes, tokens=tokens)

    def to(self, device: torch.device | str) -> Grid:
        return self.holding([x.to(device) for x in self.tensors()])

    # ---- moving -----------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """What has to be moved for it."""
        return [*self.codes, *self.tokens.tensors()]

    def holding(self, tensors: Sequence[Tensor]) -> Grid:
        """The same with those, moved."""
        n = len(self.codes)
        return replace(self, codes=tuple(tensors[:n]), tokens=self.tokens.holding(tensors[n:], tensors[0].device))


def narrowed(grids: Sequence[Grid]) -> list[Grid]:
    """Loose codes in as few bytes as they take: one launch if exact (the activations stay where they are), three if
    packed; of several, one more or two for all of one kind."""
    alike: dict[tuple, list[int]] = {}
    for i, grid in enumerate(grids):
        alike.setdefault((grid.bits, grid.features > _SHORT, grid.device), []).append(i)
    found: list[Grid] = list(grids)
    for (bits, wide, _), members in alike.items():
        loose = [grids[i].codes for i in members]
        if len(loose) == 1:
            values, indices = loose[0]
        else:
            values, indices = (torch.cat([x.flatten() for x in side]) for side in zip(*loose, strict=True))
        if bits is None:
            flat: tuple[Tensor, ...] = values, indices.to(torch.int32 if wide else torch.int16)
        else:
            words = torch.empty(values.shape, dtype=torch.int32, device=values.device)
            flat = (torch.add(indices, _fields(values.contiguous(), bits), alpha=1 << bits, out=words),)
        if len(loose) == 1:
            found[members[0]] = replace(grids[members[0]], codes=flat)
            continue
        sizes = [codes[0].numel() for codes in loose]
        for i, *parts in zip(members, *(x.split(sizes) for x in flat), strict=True):
            shape = grids[i].codes[0].shape
            found[i] = replace(grids[i], codes=tuple(part.view(shape) for part in parts))
    return found
