"""`Edits`: rank-1 changes to states, applied in place by the recurrence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import check_floats, integers, said, span, unreadable

KINDS = ("add", "delete", "replace")
ADD, DELETE, REPLACE = range(3)
WHENS = ("before", "after")
BEFORE, AFTER = range(2)

_COLUMNS = ("row", "position", "head", "left", "right", "kind", "when")


@dataclass(frozen=True, repr=False)
class Edits:
    """E changes, each at one (row, position, head), all acting at that position's write.

    kind "add":     S_t += left right^T, after the write.
    kind "delete":  the write of that position is not made (the gates still act): S_t = S_t without its increment. The
                    token's erase goes with it, since the increment is the whole actual change beyond the decay.
    kind "replace": the write is not made, and left right^T is written in its stead.

    Several edits may share a position: any delete or replace removes the native write once, and every left right^T of
    the adds and replaces is added, in the order given.

    when "before":  before the token of that position reads the state: its output is of the edited state.
    when "after":   after it has read: its output is as without the edit (to rounding), what the next token meets is
                    edited. A native write deleted or replaced then is made, read by its own token, and gone. At the
                    last token of a row only the final state and snapshots show it. Snapshots are of the state after
                    all edits of their position.

    `Edits.add`, `Edits.delete` and `Edits.replace` make them. A number, or a single row of left or right, is repeated
    for all edits: `Edits.add(0, range(8), head=3, left=p, right=q)` adds `p q^T` at eight positions.

    Attributes:
        row: `[E]` int64 batch row, or index of the sequence in a packed batch; -1 means every row.
        position: `[E]` int64 position inside that row.
        head: `[E]` int64 value head.
        left: `[E, K]` key side. Ignored for "delete" (zeros).
        right: `[E, V]` value side. Ignored for "delete" (zeros).
        kind: `[E]` int8 index into `KINDS`.
        when: `[E]` int8 index into `WHENS`.
    """

    row: Tensor
    position: Tensor
    head: Tensor
    left: Tensor
    right: Tensor
    kind: Tensor
    when: Tensor

    def __init__(self, row, position, head, left, right, kind="add", when="before"):
        """Raises ValueError for numbers that are no integers or beyond int64, sizes that do not go together, left or
        right that is not finite, and an unknown kind or when, naming the argument."""
        columns = {name: _column(name, x) for name, x in (("row", row), ("position", position), ("head", head))}
        columns |= {"kind": _codes("kind", kind, KINDS), "when": _codes("when", when, WHENS)}
        sides = {"left": _side("left", left), "right": _side("right", right)}
        check_floats(**sides)
        lengths = {name: len(x) for name, x in columns.items()} | {name: len(x) for name, x in sides.items()}
        counted = next((name for name, n in lengths.items() if n != 1), "row")
        E = lengths[counted]
        for name, n in lengths.items():
            if n not in (1, E):
                raise ValueError(f"{name}: expected {E} entries, as {counted} has, or one for all, got {n}")
        for name, x in (columns | sides).items():
            object.__setattr__(self, name, x if len(x) == E else x.expand(E, *x.shape[1:]))

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index) -> Edits:
        """Edits by mask, slice or index tensor."""
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = index.nonzero().flatten()  # vmap takes no mask
        return Edits(*(getattr(self, name)[index] for name in _COLUMNS))

    def __repr__(self) -> str:
        names = *KINDS, *(f"{kind} after" for kind in KINDS)
        counts = torch.bincount(self.kind.long() + len(KINDS) * self.when.long(), minlength=len(names)).tolist()
        kinds = ", ".join(f"{n} {name}" for n, name in zip(counts, names, strict=True) if n) or "none"
        places = f"row {span(self.row)}, position {span(self.position)}, head {span(self.head)}"
        return f"Edits({kinds}; {places}; K={self.left.shape[1]}, V={self.right.shape[1]})"

    @classmethod
    def add(cls, row, position, head, left, right, when="before") -> Edits:
        """Additions of `left right^T` after the writes at the given places: left `[K]` or `[E, K]`, right `[V]` or
        `[E, V]`; before or after those tokens read."""
        return cls(row, position, head, left, right, "add", when)

    @classmethod
    def replace(cls, row, position, head, left, right, when="before") -> Edits:
        """`left right^T` in the stead of the native writes at the given places, sizes as in `add`."""
        return cls(row, position, head, left, right, "replace", when)

    @classmethod
    def delete(cls, row, position, head, K: int, V: int, when="before") -> Edits:
        """Deletions of the native writes at the given places; K and V are the sizes of a state."""
        for name, size in (("K", K), ("V", V)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a size of the state, an integer >= 1, got {said(size)}")
        return cls(row, position, head, torch.zeros(1, K), torch.zeros(1, V), "delete", when)

    @classmethod
    def cat(cls, parts: Iterable[Edits]) -> Edits:
        """All of them, in order; at least one."""
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one Edits, got none")
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in _COLUMNS))

    def _at(self, index: Tensor) -> Edits:
        """Edits by index, taken as they are."""
        return self._with(**{name: getattr(self, name)[index] for name in _COLUMNS})

    def _with(self, **columns: Tensor) -> Edits:
        """With other columns, taken as they are: nothing is read, so a device is not waited for."""
        made = object.__new__(Edits)
        for name in _COLUMNS:
            object.__setattr__(made, name, columns.get(name, getattr(self, name)))
        return made

    def _of_heads(self, heads: list[int]) -> Edits | None:
        """Edits of the listed heads, each numbered by its place in the list; None where there are none."""
        which = [(self.head == head).nonzero().flatten() for head in heads]
        if not any(map(len, which)):
            return None
        slot = torch.arange(len(heads)).repeat_interleave(torch.tensor([len(x) for x in which]))
        return self._at(torch.cat(which))._with(head=slot)

    @property
    def needs_clean_pass(self) -> bool:
        """True when some edit refers to the native write, which only the op knows."""
        return bool((self.kind != ADD).any())

    @property
    def any_after(self) -> bool:
        """True when some edit acts after its token has read the state."""
        return bool((self.when != BEFORE).any())

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
        return self[torch.tensor(found)]._with(row=torch.tensor(row))


def _column(name: str, x) -> Tensor:
    """`[n]` int64, on the host."""
    if isinstance(x, Tensor) and x.dtype == torch.int64 and x.device.type == "cpu" and x.ndim == 1:
        return x  # as it is, numbers unread: edits are cut and joined once a call of a model
    return torch.tensor(integers(name, x), dtype=torch.int64)


def _codes(name: str, given, known: tuple[str, ...]) -> Tensor:
    """`[n]` int8 from a name, names, or codes."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, (list, tuple)) and any(isinstance(one, str) for one in given):
        for one in given:
            if not isinstance(one, str) or one not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {one!r}")
        return torch.tensor([known.index(one) for one in given], dtype=torch.int8)
    codes = _column(name, given)
    bad = ((codes < 0) | (codes >= len(known))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name}: expected codes 0 to {len(known) - 1}, got {int(codes[bad[0]])} in edit {bad[0]}")
    return codes.to(torch.int8)


def _side(name: str, x) -> Tensor:
    """`[n, size]`, finite; `[size]` is one."""
    try:
        side = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected numbers [E, size] or [size], got {said(x)}") from None
    check_floats(**{name: side})
    if side.ndim not in (1, 2):
        raise ValueError(f"{name}: expected floating [E, size] or [size], got {said(side)}")
    side = side[None] if side.ndim == 1 else side
    if unreadable(side) is None and not torch.isfinite(side).all():
        bad = int((~torch.isfinite(side)).any(1).nonzero()[0])
        raise ValueError(f"{name}: expected finite values, got a NaN or infinity in edit {bad}")
    return side
