"""Edits to be audited, made from what a model does on a text: given ones, or built-in ones at one place a passage.

A built-in edit acts at one place of every passage, drawn by the seed and early enough that the horizon fits behind it;
`every` has it act at all such places from there on. Where a passage has no such place nothing is done to it, and it is
left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..atoms import direction_to
from ..edits import KINDS, WHENS, Edits
from ..firings import Firings
from ..policies import Policy
from ..sae import SAE
from ..untrusted import is_integer, is_number, read_json, shown
from ..writes import Writes

Site = tuple[int, int]
_INSTALLED = 3  # consecutive places, as in the paper
_FILE = 2**26  # bytes of a file of edits


@dataclass(frozen=True)
class Clean:
    """What the unedited model did on a batch of passages.

    Attributes:
        model: the model.
        first: number of the batch's first passage among all.
        ids: `[B, T]` tokens.
        writes: {layer: its writes}, of all recurrent layers.
        firings: of the dictionaries; rows count from 0.
        saes: the dictionaries.
        last: latest position of a first edit.
        seed: of every draw.
    """

    model: Any
    first: int
    ids: Tensor
    writes: Mapping[int, Writes]
    firings: Firings
    saes: Mapping[Site, SAE]
    last: int
    seed: int

    def rng(self, row: int, *more: int) -> np.random.Generator:
        """A generator of a passage, whatever batch it is in."""
        return np.random.default_rng([self.seed, self.first + row, *more])

    def places(self, candidates: list[Tensor], every: bool, many: int = 1) -> tuple[Tensor, Tensor]:
        """(row `[E]`, position `[E]`): of each passage one of its candidates with `many` - 1 behind it, or `every` one.

        Args:
            candidates: positions of each of the B passages, rising.
        """
        rows, positions = [], []
        for row, at in enumerate(candidates):
            at = at[(at > 0) & (at <= self.last)]
            if not len(at):
                continue
            if not every:
                at = at[int(self.rng(row).integers(len(at)))] + torch.arange(many)
            else:
                at = candidates[row][candidates[row] > 0]
            rows.append(torch.full_like(at, row))
            positions.append(at)
        if not rows:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        return torch.cat(rows), torch.cat(positions)

    def anywhere(self) -> list[Tensor]:
        """Every position of each passage."""
        B, T = self.ids.shape
        return [torch.arange(T)] * B


class Audited(Protocol):
    """An edit that can be audited: what it `says` it does, and the sites whose dictionaries it `needs`."""

    @property
    def says(self) -> str: ...

    @property
    def needs(self) -> tuple[Site, ...]: ...

    def edits(self, clean: Clean) -> dict[int, Edits]:
        """{layer: edits, rows those of the batch}; none where nothing is done."""


def sized(clean: Clean, site: Site) -> tuple[int, int]:
    """(K, V) of a site; raises ValueError for one the model does not have."""
    layer, head = site
    if layer not in clean.writes:
        raise ValueError(f"layer: expected one of {sorted(clean.writes)}, got {layer}")
    _, _, H, K, V = clean.writes[layer].shape
    if not 0 <= head < H:
        raise ValueError(f"head: expected 0 <= head < {H} at layer {layer}, got {head}")
    return K, V


def _when(when: str) -> str:
    return "after the token has read it" if when == "after" else "before the token reads it"


@dataclass(frozen=True)
class Given:
    """Edits as they are: {layer: Edits}, row the number of the passage, -1 every passage."""

    by_layer: Mapping[int, Edits]
    says: str = "the given edits"
    needs: tuple[Site, ...] = ()

    def edits(self, clean: Clean) -> dict[int, Edits]:
        B, T = clean.ids.shape
        out = {}
        for layer, edits in self.by_layer.items():
            here = (edits.row < 0) | ((edits.row >= clean.first) & (edits.row < clean.first + B))
            mine = edits[here]
            if len(mine):
                row = torch.where(mine.row < 0, mine.row, mine.row - clean.first)
                out[layer] = mine._with(row=row).expand_rows(B)
                late = int(out[layer].position.max())
                if late >= T - 2:
                    raise ValueError(f"edits.position: expected text to follow in passages of {T} tokens, got {late}")
        return out


@dataclass(frozen=True)
class DeleteHead:
    """Deletes a head's write at one token of every passage, or `every` one from there on."""

    layer: int
    head: int
    every: bool = False
    when: str = "after"
    needs: tuple[Site, ...] = field(default=(), init=False)

    @property
    def says(self) -> str:
        where = "every token" if self.every else "one token of every passage"
        return f"the write of layer {self.layer}, head {self.head} deleted at {where}, {_when(self.when)}"

    def edits(self, clean: Clean) -> dict[int, Edits]:
        K, V = sized(clean, (self.layer, self.head))
        row, position = clean.places(clean.anywhere(), self.every)
        return {self.layer: Edits.delete(row, position, self.head, K, V, when=self.when)} if len(row) else {}


@dataclass(frozen=True)
class _OfFeature:
    feature: int
    layer: int
    head: int
    every: bool = False
    when: str = "after"

    @property
    def needs(self) -> tuple[Site, ...]:
        return ((self.layer, self.head),)

    @property
    def _where(self) -> str:
        firings = "every firing" if self.every else "one firing in every passage"
        return f"{firings} of feature {self.feature} of layer {self.layer}, head {self.head}, {_when(self.when)}"

    def _fired(self, clean: Clean) -> tuple[Tensor, Tensor, Tensor]:
        """(row, position, activation) of the firings it acts at."""
        sae, f = clean.saes[self.layer, self.head], clean.firings
        if not 0 <= self.feature < sae.F:
            raise ValueError(
                f"feature: expected 0 <= feature < {sae.F} at {self.layer}:{self.head}, got {self.feature}"
            )
        mine = f[(f.layer == self.layer) & (f.head == self.head) & (f.feature == self.feature)]
        rows, positions = mine.row.cpu().long(), mine.position.cpu().long()
        row, position = clean.places([positions[rows == b].sort().values for b in range(len(clean.ids))], self.every)
        code = torch.zeros(clean.ids.shape)
        code[rows, positions] = mine.activation.cpu()
        return row, position, code[row, position]


@dataclass(frozen=True)
class EraseFeature(_OfFeature):
    """Deletes the whole write at firings of a feature: the paper's erase."""

    @property
    def says(self) -> str:
        return f"the write deleted at {self._where}"

    def edits(self, clean: Clean) -> dict[int, Edits]:
        K, V = sized(clean, (self.layer, self.head))
        row, position, _ = self._fired(clean)
        return {self.layer: Edits.delete(row, position, self.head, K, V, when=self.when)} if len(row) else {}


@dataclass(frozen=True)
class ScaleFeature(_OfFeature):
    """Multiplies a feature's part in the state where it fires: adds `(factor - 1) a A`, a its code, A its atom."""

    factor: float = 2.0

    @property
    def says(self) -> str:
        return f"the atom's part times {self.factor:g} at {self._where}"

    def edits(self, clean: Clean) -> dict[int, Edits]:
        sized(clean, (self.layer, self.head))
        row, position, code = self._fired(clean)
        if not len(row):
            return {}
        v, w = (x.detach()[self.feature].float().cpu() for x in clean.saes[self.layer, self.head].atoms())  # [r, *]
        left = (self.factor - 1) * code[:, None, None] * v
        r = len(v)
        return {
            self.layer: Edits.add(
                row.repeat_interleave(r), position.repeat_interleave(r), self.head, left.flatten(0, 1),
                w.repeat(len(row), 1), when=self.when,
            )
        }  # fmt: skip


@dataclass(frozen=True)
class InstallToken:
    """Writes `m |N| k w*^T` at three tokens in a row, w* the direction of a token's logit: the paper's install."""

    token: int
    layer: int
    head: int
    magnitude: float = 3.0
    every: bool = False
    when: str = "after"
    needs: tuple[Site, ...] = field(default=(), init=False)

    @property
    def says(self) -> str:
        where = "every token" if self.every else f"{_INSTALLED} tokens in a row of every passage"
        return (
            f"token {self.token} installed in layer {self.layer}, head {self.head} at {self.magnitude:g} times the "
            f"write's norm, at {where}, {_when(self.when)}"
        )

    def edits(self, clean: Clean) -> dict[int, Edits]:
        sized(clean, (self.layer, self.head))
        row, position = clean.places(clean.anywhere(), self.every, _INSTALLED)
        if not len(row):
            return {}
        left, right = (x.float().cpu() for x in clean.writes[self.layer].native(row, position, self.head))
        toward = direction_to(clean.model, self.layer, self.head, self.token).cpu()
        left = self.magnitude * right.norm(dim=1, keepdim=True) * left
        return {self.layer: Edits.add(row, position, self.head, left, toward, when=self.when)}


@dataclass(frozen=True)
class Acting:
    """Policies of an attach: what they change is known once the model has run with them."""

    policies: tuple[Policy, ...]
    needs: tuple[Site, ...] = field(default=(), init=False)

    @property
    def says(self) -> str:
        return f"the polic{'y' if len(self.policies) == 1 else 'ies'} {', '.join(map(repr, self.policies))}"

    def edits(self, clean: Clean) -> dict[int, Edits]:
        return {}


# ---- from a file ----------------------------------------------------------------------------------------------------

_NEEDED = ("position", "layer", "head")


def read_edits(path: str | Path, sizes: Mapping[int, tuple[int, int]], saes: Mapping[Site, SAE]) -> Given:
    """Edits of a JSON file, `{"edits": [{...}, ...]}`.

    An edit has position, layer and head; row (number of the passage, counted from 0; without it, every passage); kind
    (add, delete, replace; default add) and when (before, after; default after); and, but for deletions, either left
    `[K]` and right `[V]`, or feature and scale: `scale` times that atom of the site's dictionary.

    Args:
        sizes: {layer: (K, V)} of the model's recurrent layers.
        saes: dictionaries of sites.
    Raises:
        ValueError: naming the edit and what is wrong with it.
    """
    listed = read_json(path, _FILE).get("edits")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f'edit: {path}: expected {{"edits": [...]}} with one at least, got {shown(listed)}')
    parts: dict[int, list[Edits]] = {}
    for i, entry in enumerate(listed):
        try:
            layer, edits = _edit(entry, sizes, saes)
        except ValueError as error:
            raise ValueError(f"edit: {path}: edits[{i}]: {error}") from error
        parts.setdefault(layer, []).append(edits)
    by_layer = {layer: Edits.cat(x) for layer, x in sorted(parts.items())}
    return Given(by_layer, f"{len(listed)} edit{'s' if len(listed) > 1 else ''} of {Path(path).name}")


def _edit(entry: Any, sizes: Mapping[int, tuple[int, int]], saes: Mapping[Site, SAE]) -> tuple[int, Edits]:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {shown(entry)}")
    known = (*_NEEDED, "row", "kind", "when", "left", "right", "feature", "scale")
    strange = [name for name in entry if name not in known]
    if strange:
        raise ValueError(f"expected entries {', '.join(known)}, got {shown(strange[0])}")
    for name in _NEEDED:
        if not is_integer(entry.get(name), 0, 2**31):
            raise ValueError(f"{name}: expected an integer >= 0, got {shown(entry.get(name))}")
    row, kind, when = entry.get("row", -1), entry.get("kind", "add"), entry.get("when", "after")
    if not is_integer(row, -1, 2**31):
        raise ValueError(f"row: expected the number of a passage, or -1 for every, got {shown(row)}")
    for name, value, names in (("kind", kind, KINDS), ("when", when, WHENS)):
        if value not in names:
            raise ValueError(f"{name}: expected one of {', '.join(names)}, got {shown(value)}")
    layer, position, head = entry["layer"], entry["position"], entry["head"]
    if layer not in sizes:
        raise ValueError(f"layer: expected one of {sorted(sizes)}, got {layer}")
    K, V = sizes[layer]
    if kind == "delete":
        return layer, Edits.delete(row, position, head, K, V, when=when)
    if "feature" in entry:
        left, right = _atom(entry, saes)
    else:
        left, right = (_numbers(name, entry.get(name), size) for name, size in (("left", K), ("right", V)))
    if kind == "replace" and left.ndim == 2 and len(left) > 1:
        raise ValueError(f"feature: expected an atom of rank 1 for a replacement, got rank {len(left)}")
    return layer, Edits(row, position, head, left, right, kind, when)


def _atom(entry: Mapping, saes: Mapping[Site, SAE]) -> tuple[Tensor, Tensor]:
    """(left `[r, K]`, right `[r, V]`) of `scale` times an atom."""
    site, feature, scale = (entry["layer"], entry["head"]), entry["feature"], entry.get("scale", 1.0)
    if site not in saes:
        raise ValueError(f"feature: expected a dictionary of {site[0]}:{site[1]}, got none")
    if not is_integer(feature, 0, saes[site].F - 1):
        raise ValueError(f"feature: expected 0 <= feature < {saes[site].F}, got {shown(feature)}")
    if not is_number(scale):
        raise ValueError(f"scale: expected a finite number, got {shown(scale)}")
    v, w = (x.detach()[feature].float().cpu() for x in saes[site].atoms())
    return scale * v, w


def _numbers(name: str, value: Any, size: int) -> Tensor:
    if not isinstance(value, list) or len(value) != size or not all(map(is_number, value)):
        raise ValueError(f"{name}: expected {size} finite numbers, or feature and scale, got {shown(value)}")
    return torch.tensor(value, dtype=torch.float32)
