"""`Edits`: rank-1 changes to states, applied in place by the recurrence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("add", "delete", "replace")
ADD, DELETE, REPLACE = range(3)


@dataclass(frozen=True)
class Edits:
    """E changes, each at one (row, position, head), all acting at that position's write.

    kind "add":     S_t += left right^T, after the write.
    kind "delete":  the write of that position is not made (the gates still act): S_t = S_t without its increment. The
                    token's erase goes with it, since the increment is the whole actual change beyond the decay.
    kind "replace": the write is not made, and left right^T is written in its stead.

    Several edits may share a position: any delete or replace removes the native write once, and every left right^T of
    the adds and replaces is added, in the order given.

    Attributes:
        row: `[E]` int64 batch row, or index of the sequence in a packed batch; -1 means every row.
        position: `[E]` int64 position inside that row.
        head: `[E]` int64 value head.
        left: `[E, K]` key side. Ignored for "delete" (zeros).
        right: `[E, V]` value side. Ignored for "delete" (zeros).
        kind: `[E]` int8 index into `KINDS`.
    """

    row: Tensor
    position: Tensor
    head: Tensor
    left: Tensor
    right: Tensor
    kind: Tensor

    def __init__(self, row, position, head, left, right, kind="add"):
        row, position, head = (torch.as_tensor(x, dtype=torch.int64).reshape(-1) for x in (row, position, head))
        left, right = torch.as_tensor(left), torch.as_tensor(right)
        E = len(row)
        if isinstance(kind, str):
            kind = [kind] * E
        if not isinstance(kind, Tensor):
            for name in kind:
                if name not in KINDS:
                    raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {name!r}")
            kind = torch.tensor([KINDS.index(name) for name in kind], dtype=torch.int8)
        for name, column in (("position", position), ("head", head), ("kind", kind)):
            if len(column) != E:
                raise ValueError(f"{name}: expected {E} entries, one for each row entry, got {len(column)}")
        for name, side in (("left", left), ("right", right)):
            if side.ndim != 2 or len(side) != E or not side.is_floating_point():
                raise ValueError(
                    f"{name}: expected floating [E={E}, size], got {side.dtype} of shape {tuple(side.shape)}"
                )
            if not torch.isfinite(side).all():
                bad = int((~torch.isfinite(side)).any(1).nonzero()[0])
                raise ValueError(f"{name}: expected finite values, got a NaN or infinity in edit {bad}")
        for name, value in (("row", row), ("position", position), ("head", head), ("left", left), ("right", right)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "kind", kind.to(torch.int8))

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index) -> Edits:
        """Edits by mask, slice or index tensor."""
        return Edits(*(getattr(self, n)[index] for n in ("row", "position", "head", "left", "right", "kind")))

    @classmethod
    def delete(cls, row, position, head, K: int, V: int) -> Edits:
        """Deletions of the native writes at the given places."""
        n = torch.as_tensor(row).numel()
        return cls(row, position, head, torch.zeros(n, K), torch.zeros(n, V), "delete")

    @classmethod
    def cat(cls, parts: Iterable[Edits]) -> Edits:
        parts = list(parts)
        names = ("row", "position", "head", "left", "right", "kind")
        return cls(*(torch.cat([getattr(p, n) for p in parts]) for n in names))

    @property
    def needs_clean_pass(self) -> bool:
        """True when some edit refers to the native write, which only the op knows."""
        return bool((self.kind != ADD).any())

    def check(self, rows: int, lengths: list[int], heads: int, K: int, V: int) -> None:
        """Raises ValueError unless every edit lies inside `rows` rows of the given lengths, H heads, sizes K and V."""
        if self.left.shape[1] != K or self.right.shape[1] != V:
            raise ValueError(
                f"edits: expected left [E, K={K}] and right [E, V={V}], got {tuple(self.left.shape)} and "
                f"{tuple(self.right.shape)}"
            )
        if not len(self):
            return
        limit = torch.tensor(lengths)
        for name, column, low, high in (("row", self.row, -1, rows), ("head", self.head, 0, heads)):
            bad = ((column < low) | (column >= high)).nonzero().flatten()
            if len(bad):
                i = int(bad[0])
                raise ValueError(f"edits.{name}: expected {low} <= {name} < {high}, got {int(column[i])} in edit {i}")
        room = torch.where(self.row < 0, limit.min(), limit[self.row.clamp(min=0)])
        bad = ((self.position < 0) | (self.position >= room)).nonzero().flatten()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"edits.position: expected 0 <= position < {int(room[i])} (the length of row {int(self.row[i])}), "
                f"got {int(self.position[i])} in edit {i}"
            )

    def expand_rows(self, rows: int) -> Edits:
        """Edits of row -1 repeated for every row."""
        if not bool((self.row < 0).any()):
            return self
        found, row = [], []
        for i, r in enumerate(self.row.tolist()):
            for target in range(rows) if r < 0 else (r,):
                found.append(i)
                row.append(target)
        index = torch.tensor(found)
        return Edits(row, self.position[index], self.head[index], self.left[index], self.right[index], self.kind[index])
