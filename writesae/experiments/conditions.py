"""What is put in a native write's place: the conditions of the replacement test, as changes of the head's output.

The patched state is `S_t - N + R`. N is one of two readings of "the write": `increment` k_t u_t^T, what the token
actually added beyond the gates, or `outer` beta_t k_t v_t^T, which leaves the erase in place. R by condition:

| condition | R |
|---|---|
| native | N itself: must change nothing |
| atom | the firing feature's atom |
| delete | nothing |
| random | Gaussian unit factors, fresh for every firing |
| mean | the mean write of other passages (a full matrix) |
| previous | the write of the token before |
| singular | the top singular pair of the state before |

Every R but native and delete has one of two sizes, so that only its direction is compared: `coef`, the Frobenius norm
that the atom has with its code as coefficient, or `matched`, that of N.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .engine import Clean, read, read_matrix

CONDITIONS = ("native", "atom", "delete", "random", "mean", "previous", "singular")
DEFAULT_CONDITIONS = ("native", "atom", "delete", "random")
NATIVES = ("increment", "outer")
SCALES = ("coef", "matched")
BASELINE = "baseline"


def arm(native: str, condition: str, scale: str | None = None) -> str:
    """Name of one edit: "increment.native", "increment.delete", "increment.coef.atom", ..."""
    return f"{native}.{condition}" if condition in ("native", "delete") else f"{native}.{scale}.{condition}"


def arms(natives: Sequence[str], scales: Sequence[str], conditions: Sequence[str]) -> list[str]:
    """Every edit of a run, each once (native and delete have no scale)."""
    return list(dict.fromkeys(arm(n, c, s) for n in natives for s in scales for c in conditions))


@dataclass(frozen=True)
class Fired:
    """The atoms that fired at n places, and seeds of their random controls.

    Attributes:
        v, w: `[n, r, K]`, `[n, r, V]` atom factors.
        coefficient: `[n]` the code.
        identity: n strings that name the firings whatever batch they are in; they seed the random control.
        mean: `[n, K, V]` mean write of the site, or None when the condition is not asked for.
    """

    v: Tensor
    w: Tensor
    coefficient: Tensor
    identity: list[str]
    mean: Tensor | None = None


def deltas(
    clean: Clean, fired: Fired, natives: Sequence[str], scales: Sequence[str], conditions: Sequence[str], seed: int
) -> dict[str, Tensor | None]:
    """`{arm: [n, L, V]}` changes of the head's output for `ForkEngine.run`, with the baseline (None) among them."""
    out: dict[str, Tensor | None] = {BASELINE: None}
    v, w = fired.v.to(clean.left), fired.w.to(clean.left)
    gram = torch.einsum("nrk,nsk->nrs", v, v) * torch.einsum("nrv,nsv->nrs", w, w)
    atom_norm = gram.sum((1, 2)).clamp_min(0).sqrt()
    for native in natives:
        left, right = clean.left, clean.right if native == "increment" else clean.outer_right
        removed = read(clean, left, right)
        native_norm = left.norm(dim=1) * right.norm(dim=1)
        # Changes of the output by a unit-norm R; a size is all that is left to choose.
        directions: dict[str, Tensor] = {}
        for condition in conditions:
            if condition == "native":
                out[arm(native, condition)] = read(clean, left, right) - removed
            elif condition == "delete":
                out[arm(native, condition)] = -removed
            elif condition == "atom":
                whole = sum(read(clean, v[:, r], w[:, r]) for r in range(v.shape[1]))
                directions[condition] = whole / atom_norm.clamp_min(1e-30)[:, None, None]
            elif condition == "random":
                directions[condition] = read(clean, *random_factors(fired.identity, left, right, seed))
            elif condition == "mean":
                size = torch.linalg.matrix_norm(fired.mean).clamp_min(1e-30)
                directions[condition] = read_matrix(clean, (fired.mean / size[:, None, None]).to(clean.left))
            elif condition == "previous":
                directions[condition] = read(clean, *_previous(clean))
            elif condition == "singular":
                directions[condition] = read(clean, *_top_pair(clean))
        coefficient = fired.coefficient.to(atom_norm) * atom_norm
        for scale in scales:
            size = coefficient if scale == "coef" else native_norm
            for condition, direction in directions.items():
                out[arm(native, condition, scale)] = size[:, None, None] * direction - removed
    return out


def random_factors(identity: Sequence[str], left: Tensor, right: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Unit Gaussian factors like `left [n, K]` and `right [n, V]`, one draw a firing, by name and seed alone."""
    K, V = left.shape[1], right.shape[1]
    draws = np.empty((len(identity), K + V))
    for i, name in enumerate(identity):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        draws[i] = np.random.Generator(np.random.Philox(int.from_bytes(digest, "big"))).standard_normal(K + V)
    p, q = torch.from_numpy(draws[:, :K]).to(left), torch.from_numpy(draws[:, K:]).to(right)
    return torch.nn.functional.normalize(p, dim=1), torch.nn.functional.normalize(q, dim=1)


def _previous(clean: Clean) -> tuple[Tensor, Tensor]:
    """Unit factors of the write one token earlier; zero at a passage's first token, which has none."""
    writes, places = clean.writes, clean.places
    group = writes.right.shape[2] // writes.left.shape[2]
    t = (places.position - 1).clamp_min(0)
    left = writes.left[places.row, t, places.head // group, 0]
    # The increment, whichever reading of the write is removed.
    right = writes.right[places.row, t, places.head, 0] * (places.position > 0)[:, None]
    return torch.nn.functional.normalize(left, dim=1), torch.nn.functional.normalize(right, dim=1)


def _top_pair(clean: Clean) -> tuple[Tensor, Tensor]:
    """Unit factors of the top singular pair of the state one token earlier; zero at a passage's first token."""
    places = clean.places
    before = torch.stack([places.row, (places.position - 1).clamp_min(0)], 1)
    states = clean.writes.states(before)[torch.arange(len(places)), places.head]  # [n, K, V]
    u, _, vh = torch.linalg.svd(states, full_matrices=False)
    return u[:, :, 0] * (places.position > 0)[:, None], vh[:, 0]
