"""What a replacement test varies: when the state is changed, what is taken out, what is put in, and how large.

The patched state is `S_t - N + R`, and

- **read** says when: `after` token t has read its state (the paper's: the change is first seen by token t + 1), or
  `before`, so that o_t already reads the change;
- **native** says what N is: `increment` k_t u_t^T, what the token actually added beyond the gates, or `outer`
  beta_t k_t v_t^T, which leaves the erase in place (the same where a rule erases nothing, or by a write of its own, as
  RWKV-7 does: there N is the new write, and its erase always stays);
- **condition** says what R is: see `nulls`, and a function of one's own;
- **scale** says how large R is: `coef`, the size that the condition gives it (the atom's own code; everything without
  a size of its own gets the atom's Frobenius norm), or `matched`, rescaled to the norm of N.

Every number of a result stands under one name of the four together, its arm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from . import nulls
from .engine import Clean, read, read_matrix, unread
from .nulls import Edited, Fired, States, norm

READS = ("after", "before")
NATIVES = ("increment", "outer")
SCALES = ("coef", "matched")
BASELINE = "baseline"
PLAIN = ("native", "delete")  # N itself, and nothing: they have no size
CONDITIONS = (*PLAIN, *nulls.REPLACEMENTS, *nulls.WHOLE)
DEFAULT_CONDITIONS = ("native", "atom", "delete", "random", "codebook", "singular", "scaled", "zero")
OF_WRITES = ("codebook_reconstruction",)  # of dictionaries of writes only
# These need native writes of other text.
TRAINING_CONDITIONS = ("codebook", "codebook_nearest", "codebook_reconstruction", "mean")
_OWN = re.compile(r"[a-z][a-z0-9_]{0,39}")

Condition = Callable[[Edited], "tuple[Tensor, Tensor] | Tensor"]


def chosen(conditions: Sequence | Mapping[str, Condition], training: bool) -> dict[str, Condition | None]:
    """{name: None, or the user's function}, from names, (name, function) pairs, or {name: function}.

    A mapping adds its functions to the default conditions; a sequence says all of them. `training` is whether there is
    text from which native writes are taken: without it the defaults leave out what needs them.

    Raises:
        ValueError: an unknown name, one twice, a name that no column could have, or no atom and delete among them.
    """
    default = [c for c in DEFAULT_CONDITIONS if training or c not in TRAINING_CONDITIONS]
    if conditions is None:
        conditions = default
    elif isinstance(conditions, Mapping):
        conditions = [*default, *conditions.items()]
    elif isinstance(conditions, str):
        raise ValueError(f"conditions: expected a list of names, got the text {conditions!r}")
    found: dict[str, Condition | None] = {}
    for entry in conditions:
        name, function = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        if function is None:
            if not isinstance(name, str) or name not in CONDITIONS:
                raise ValueError(
                    f"conditions: expected some of {', '.join(CONDITIONS)}, or a name with a function, got {name!r}"
                )
        elif not callable(function):
            raise ValueError(f"conditions: {name}: expected a function, got {type(function).__name__}")
        elif not isinstance(name, str) or not _OWN.fullmatch(name) or name in (*CONDITIONS, BASELINE):
            raise ValueError(
                f"conditions: expected a name of your own in lower case, digits and _ (40 at most), got {name!r}"
            )
        if name in found:
            raise ValueError(f"conditions: expected each once, got {name} twice")
        found[name] = function
    for needed in ("atom", "delete"):
        if needed not in found:
            raise ValueError(f"conditions: expected atom and delete among them, got {', '.join(found) or 'none'}")
    missing = [c for c in TRAINING_CONDITIONS if c in found]
    if missing and not training:
        raise ValueError(
            f'conditions: "{missing[0]}" needs text from which native writes are taken (train, or select), got none'
        )
    return found


def scales_of(condition: str, scales: Sequence[str]) -> tuple[str | None, ...]:
    """The scales at which a condition is an edit of its own; (None,) for one that has no size."""
    if condition in PLAIN or condition in nulls.WHOLE:
        return (None,)
    # A native write at the write's own norm is the native write.
    return tuple(s for s in scales if condition != "scaled" or s == "coef")


def arm(native: str, condition: str, scale: str | None = None, read: str = "after") -> str:
    """Name of one edit: "after.increment.native", "after.increment.coef.atom", "before.zero", ..."""
    if condition in nulls.WHOLE:
        return f"{read}.{condition}"
    return f"{read}.{native}.{condition}" if condition in PLAIN else f"{read}.{native}.{scale}.{condition}"


def arms(
    natives: Sequence[str], scales: Sequence[str], conditions: Sequence[str], reads: Sequence[str] = ("after",)
) -> list[str]:
    """Every edit of a run, each once."""
    return list(
        dict.fromkeys(arm(n, c, s, r) for r in reads for n in natives for c in conditions for s in scales_of(c, scales))
    )


class _States(States):
    """States of the places, made when first asked for and shared by all that ask."""

    def __init__(self, clean: Clean):
        self._clean = clean

    @cached_property
    def after(self) -> Tensor:
        return self._at(self._clean.places.position)

    @cached_property
    def before(self) -> Tensor:
        position = self._clean.places.position
        return self._at((position - 1).clamp_min(0)) * (position > 0)[:, None, None]

    def _at(self, position: Tensor) -> Tensor:
        places = self._clean.places
        states = self._clean.writes.states(torch.stack([places.row, position], 1))
        return states[torch.arange(len(places), device=states.device), places.head]


def replacements(
    clean: Clean,
    fired: Fired,
    natives: Sequence[str],
    scales: Sequence[str],
    conditions: Sequence[str] | Mapping[str, Condition | None],
    seed: int,
) -> dict[tuple[str, str, str | None], tuple]:
    """`{(native, condition, scale): (R, N)}`: what is put in and what is taken out, either None for nothing.

    Both are factors `([n, K], [n, V])` or `([n, r, K], [n, r, V])`, or a matrix `[n, K, V]`.

    Raises:
        ValueError: a user's condition whose result has another shape, or is not finite.
    """
    own = conditions if isinstance(conditions, Mapping) else {}
    out: dict[tuple[str, str, str | None], tuple] = {}
    states = _States(clean)
    for native in natives:
        right = clean.right if native == "increment" else clean.outer_right
        N = (clean.left, right)
        edited = Edited(clean, fired, native, *N, seed, states)
        for condition in conditions:
            if condition == "native":
                out[native, condition, None] = (N, N)
            elif condition == "delete":
                out[native, condition, None] = (None, N)
            elif condition in nulls.WHOLE:
                if native == natives[0]:
                    out[native, condition, None] = (nulls.WHOLE[condition](edited), None)
            else:
                function = own.get(condition)
                R = nulls.REPLACEMENTS[condition](edited) if function is None else _own(condition, function, edited)
                for scale in scales_of(condition, scales):
                    grow = 1.0 if scale == "coef" else edited.native_norm / norm(R).clamp_min(1e-30)
                    out[native, condition, scale] = (nulls.times(R, grow), N)
    return out


def _own(name: str, function: Condition, edited: Edited) -> tuple[Tensor, Tensor] | Tensor:
    """A user's R, checked."""
    R, (n, K), V = function(edited), edited.left.shape, edited.right.shape[1]
    if isinstance(R, Tensor):
        good = tuple(R.shape) == (n, K, V)
    else:
        good = isinstance(R, (tuple, list)) and len(R) == 2 and all(isinstance(x, Tensor) for x in R)
        good = good and all(x.ndim in (2, 3) and len(x) == n for x in R)
        good = good and (R[0].shape[-1], R[1].shape[-1]) == (K, V)
        good = good and R[0].shape[:-1] == R[1].shape[:-1]
    parts = [R] if isinstance(R, Tensor) else R
    if not good:
        got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts] if parts else parts
        raise ValueError(
            f"conditions: {name}: expected factors ([{n}, {K}], [{n}, {V}]), such with a rank in the middle, or a "
            f"matrix [{n}, {K}, {V}], got {got}"
        )
    if not all(bool(x.isfinite().all()) for x in parts):
        raise ValueError(f"conditions: {name}: expected finite values, got NaN or infinity")
    parts = [x.to(edited.left) for x in parts]
    return parts[0] if isinstance(R, Tensor) else tuple(parts)


def _read(clean: Clean, addition) -> Tensor | float:
    """`[n, L, V]` change of the head's output by an addition to the state before token t reads it."""
    if addition is None:
        return 0.0
    if isinstance(addition, Tensor):
        return read_matrix(clean, addition)
    left, right = addition
    if left.ndim == 2:
        return read(clean, left, right)
    return sum(read(clean, left[:, r], right[:, r]) for r in range(left.shape[1]))


def deltas(
    clean: Clean,
    fired: Fired,
    natives: Sequence[str],
    scales: Sequence[str],
    conditions: Sequence[str] | Mapping[str, Condition | None],
    seed: int,
    reads: Sequence[str] = ("after",),
) -> dict[str, Tensor | None]:
    """`{arm: [n, L, V]}` changes of the head's output for `ForkEngine.run`, with the baseline (None) among them.

    Raises:
        ValueError: edits before the read, of forks that begin after it.
    """
    if clean.first and "before" in reads:
        raise ValueError('reads: expected after alone, of forks that begin after the token (ForkEngine read="after")')
    out: dict[str, Tensor | None] = {BASELINE: None}
    removed: dict[str, Tensor] = {}
    for (native, condition, scale), (R, N) in replacements(clean, fired, natives, scales, conditions, seed).items():
        if N is not None and native not in removed:
            removed[native] = _read(clean, N)
        before = _read(clean, R) - (0.0 if N is None else removed[native])
        for when in reads:
            out[arm(native, condition, scale, when)] = unread(clean, before) if when == "after" else before
    return {name: out[name] for name in (BASELINE, *arms(natives, scales, tuple(conditions), reads))}
