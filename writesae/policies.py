"""Policies: edits that answer to what the model itself does, token by token, while it reads and while it generates.

    with writesae.attach(model, {(9, 4): sae}, policies=[writesae.Clamp([17], 3.0)]) as tap:
        model.generate(**prompt)
    tap.policies[0].applied

At every token of a site a policy sees the state as it is, with all earlier edits in effect: its codes (of the token,
before its own edits), the native write, and the activation of any feature. What it answers is added to the state, or
removes or replaces the native write. So a loop is closed: an edit is met by later tokens, and so by the policy.

Letters: K key size, V value size, F atoms, r rank of an atom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import integers, said

READS = ("after", "before")
_COLUMNS = 64  # of a site's Gram matrix, that are kept: half a megabyte of 2,048 features
_Features = Iterable[int] | Mapping[tuple[int, int], Iterable[int]]


class Change(NamedTuple):
    """What a policy does to the state at one token of one site; made by `TokenView.add`, `.delete` and `.replace`.

    left `[m, K]`, right `[m, V]`: `sum_m left right^T` is added. removes: the native write is not made (if the policy
    reads "before") or taken away once its token has read it ("after"). atoms: where the sum is one of atoms of the
    site's dictionary, their numbers and how much of each.
    """

    left: Tensor
    right: Tensor
    removes: bool = False
    atoms: tuple[Tensor, Tensor] | None = None


class PolicySite:
    """A site that policies act on.

    Attributes:
        layer, head: where it is. K, V: sizes of its state.
        dictionary: of the site, or None.
        device: where its states are.
    """

    def __init__(
        self, layer: int, head: int, K: int, V: int, dictionary, device: torch.device, to_logit: Callable[[int], Tensor]
    ):
        self.layer, self.head, self.K, self.V, self.dictionary, self.device = layer, head, K, V, dictionary, device
        self._to_logit = to_logit
        self._kept: dict[Any, Any] = {}
        self._columns: dict[int, Tensor] = {}

    def __repr__(self) -> str:
        return f"PolicySite(({self.layer}, {self.head}), K={self.K}, V={self.V})"

    @property
    def key(self) -> tuple[int, int]:
        """(layer, head)."""
        return self.layer, self.head

    def kept(self, key, make: Callable[[], Any]) -> Any:
        """What `make()` gave the first time, of this key: for what a policy computes once a site."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        """`v [F, r, K]`, `w [F, r, V]`, `b [F]`, float32: a feature reads `sum_r v^T S w + b` of the state."""
        v, w, b = (x.detach().to(self.device, torch.float32) for x in self._of_dictionary("encoder"))
        return v, w, b

    @cached_property
    def atoms(self) -> tuple[Tensor, Tensor]:
        """`v [F, r, K]`, `w [F, r, V]`, float32: atom i is `sum_r v_i w_i^T`."""
        v, w = (x.detach().to(self.device, torch.float32) for x in self._of_dictionary("atoms"))
        return v, w

    def moved_by(self, feature: int) -> Tensor:
        """`[F]`: how one unit of an atom moves every pre-activation, `sum_rs (v_enc . v)(w_enc . w)`. The last columns
        asked for are kept."""
        if feature in self._columns:
            return self._columns[feature]
        (x, y, _), (v, w) = self.encoder, self.atoms
        if len(self._columns) >= _COLUMNS:
            del self._columns[next(iter(self._columns))]
        self._columns[feature] = ((x @ v[feature].T) * (y @ w[feature].T)).sum((1, 2))
        return self._columns[feature]

    def _of_dictionary(self, name: str):
        if not callable(getattr(self.dictionary, name, None)):
            raise ValueError(
                f"policies: expected a dictionary with {name}() at site {self.key}, got "
                f"{type(self.dictionary).__name__ if self.dictionary is not None else 'a site without dictionary'}"
            )
        try:
            return getattr(self.dictionary, name)()
        except ValueError as error:
            raise ValueError(f"policies: site {self.key}: {error}") from None

    def direction(self, token: int) -> Tensor:
        """`[V]`, unit: what in a value raises a token's logit by the direct path, `W_O[head]^T W_U[token]`."""
        return self.kept(("direction", token), lambda: self._to_logit(token).to(self.device, torch.float32))


class TokenView:
    """What a policy sees of one token at one site.

    Attributes:
        site: the `PolicySite`.
        row: row of the batch (sequence of a packed batch). position: column in that row, cached ones counted.
        features: `[n]` int64 that fire at the token, by falling activation (of threshold dictionaries by number).
        activations: `[n]` their codes, > 0.
        mine: `[n]` bool: which of them the policy listens to (all, if it names none).
        left: `[K]` key side of the native write (of two, of the new one). right: `[V]` its value side.
    """

    def __init__(
        self, site: PolicySite, row: int, position: int, features: Tensor, activations: Tensor, mine: Tensor,
        native: Callable[[], tuple[Tensor, Tensor]], read: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self.site, self.row, self.position = site, row, position
        self.features, self.activations, self.mine = features, activations, mine
        self._native, self._read = native, read

    def __repr__(self) -> str:
        return f"TokenView(site {self.site.key}, row {self.row}, position {self.position}, {len(self.features)} fire)"

    @cached_property
    def left(self) -> Tensor:
        return self._native()[0]

    @cached_property
    def right(self) -> Tensor:
        return self._native()[1]

    def activation(self, features: Sequence[int] | Tensor) -> Tensor:
        """`[m]` raw pre-activations (bias included) of any features, whether they fire or not."""
        at = torch.as_tensor(features, dtype=torch.int64, device=self.site.device).reshape(-1)
        return self._read(at)

    def add(self, left: Tensor, right: Tensor) -> Change:
        """`left right^T` is added to the state: `[K]`, `[V]` or `[m, K]`, `[m, V]`."""
        return Change(*self._sides(left, right))

    def add_atoms(self, features: Tensor, doses: Tensor) -> Change:
        """`sum_j dose_j A_j` of atoms of the dictionary is added: int64 `[n]` and floating `[n]`."""
        v, w = self.site.atoms
        left, right = v[features], w[features]
        return Change((left * doses[:, None, None]).flatten(0, 1), right.flatten(0, 1), False, (features, doses))

    def delete(self) -> Change:
        """The native write of the token goes."""
        return Change(self.left.new_zeros(0, self.site.K), self.left.new_zeros(0, self.site.V), True)

    def replace(self, left: Tensor, right: Tensor) -> Change:
        """The native write goes, and `left right^T` is written in its stead; sizes as in `add`."""
        return Change(*self._sides(left, right), True)

    def _sides(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        sides = []
        for name, x, letter, size in (("left", left, "K", self.site.K), ("right", right, "V", self.site.V)):
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (1, 2) or x.shape[-1] != size:
                raise ValueError(f"{name}: expected floating [{letter}={size}] or [m, {letter}={size}], got {said(x)}")
            sides.append(x.reshape(-1, size))
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"right: expected as many rows as left, {len(sides[0])}, got {len(sides[1])}")
        return sides[0], sides[1]


class Policy:
    """What to do at tokens, for `attach(..., policies=[...])`. Subclass it and write `act`:

        class Halve(writesae.Policy):
            def act(self, view):
                if view.activation([3])[0] > 2:
                    return view.replace(view.left, view.right / 2)

    It is asked at every real token (no pad) of its sites, or only where one of `features` fires, or at `positions`.
    A policy holds no state of a run: rows, attaches and models may share it. Of one with a memory of its own, mind that
    while a prompt is read the same token may be shown again, once earlier edits are known.

    Args:
        features: numbers of features, the same at every site, or `{(layer, head): numbers}`; None: every token.
        sites: (layer, head) of the sites it acts on; None: those of `features`, or all of the attach (of those, if it
            needs codes, that have a dictionary).
        read: "after": an edit is made once its token has read the state, and shows from the next token on. "before":
            its token reads it too.
        positions: columns at which it is asked; None: all.

    Raises:
        ValueError: an argument of another kind, by name.
    """

    needs_dictionary = False  # at its sites, though it names no features
    reads_codes = True  # False: its views list no features, and dictionaries are left alone

    def __init__(
        self,
        features: _Features | None = None,
        *,
        sites: Iterable[tuple[int, int]] | None = None,
        read: str = "after",
        positions: Iterable[int] | None = None,
    ):
        if read not in READS:
            raise ValueError(f"read: expected after or before, got {said(read)}")
        self.read = read
        self.positions = None if positions is None else _numbers("positions", positions)
        self.features: dict[tuple[int, int], tuple[int, ...]] | tuple[int, ...] | None = None
        if isinstance(features, Mapping):
            self.features = {_site("features", at): _numbers("features", x) for at, x in features.items()}
            sites = list(self.features) if sites is None else sites
        elif features is not None:
            self.features = _numbers("features", features)
        self.sites = None if sites is None else tuple(_site("sites", at) for at in sites)
        if self.sites is not None and not self.sites:
            raise ValueError("sites: expected at least one (layer, head), or None, got none")

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in ("features", "sites", "positions", "read")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items() if v is not None)})"

    def act(self, view: TokenView) -> Change | Sequence[Change] | None:
        """What to do at this token: `view.add(...)`, `view.delete()`, `view.replace(...)`, several of them, or None."""
        raise NotImplementedError(f"{type(self).__name__}: expected an act(view)")

    def features_at(self, site: tuple[int, int]) -> tuple[int, ...] | None:
        """The features it listens to at a site; None: it is asked at every token."""
        return self.features.get(site, ()) if isinstance(self.features, dict) else self.features

    def check(self, site: PolicySite) -> None:
        """Raises ValueError where it cannot act on a site; before anything runs. Subclasses may add to it."""
        features = self.features_at(site.key)
        if features is None and not self.needs_dictionary:
            return
        F = len(site.encoder[2])
        for feature in features or ():
            if feature >= F:
                raise ValueError(
                    f"features: expected 0 <= feature < {F} (the dictionary of site {site.key}), got {feature}"
                )


class Erase(Policy):
    """Removes what is written at tokens where one of the features fires.

    Args:
        features: see `Policy`. where: its `sites`, `read` and `positions`.
        what: "write": the token's whole native write, the paper's erase. "atom": the part `-a_i A_i` alone, for every
            one of the features that fires, with a_i its code.
    """

    def __init__(self, features: _Features, *, what: str = "write", **where):
        if what not in ("write", "atom"):
            raise ValueError(f"what: expected write or atom, got {said(what)}")
        super().__init__(_given(features), **where)
        self.what = what

    def check(self, site: PolicySite) -> None:
        super().check(site)
        if self.what == "atom":
            site.atoms  # noqa: B018 - raises where there are none

    def act(self, view: TokenView) -> Change:
        return view.delete() if self.what == "write" else _scaled(view, 0.0)


class Scale(Policy):
    """Multiplies the contribution of features where they fire: adds `(factor - 1) a_i A_i`, with a_i the code.

    Args:
        features: see `Policy`. where: its `sites`, `read` and `positions`.
        factor: > 1 amplifies, 0 takes the atom's part away, < 0 turns it round.
    """

    def __init__(self, features: _Features, factor: float, **where):
        super().__init__(_given(features), **where)
        self.factor = _number("factor", factor)

    def check(self, site: PolicySite) -> None:
        super().check(site)
        site.atoms  # noqa: B018 - raises where there are none

    def act(self, view: TokenView) -> Change:
        return _scaled(view, self.factor)


class Amplify(Scale):
    """`Scale` with a factor > 1, and a control of the same dose.

    Args:
        features: see `Policy`. where: its `sites`, `read` and `positions`.
        factor: > 1.
        control: None, or "random": in the place of each feature's atom another one of the dictionary (drawn once a site
            and feature, none of the features), of the same Frobenius norm as what it stands for.
        seed: of the draw.
    """

    def __init__(self, features: _Features, factor: float = 2.0, *, control: str | None = None, seed: int = 0, **where):
        super().__init__(features, factor, **where)
        if self.factor <= 1:
            raise ValueError(f"factor: expected > 1, got {factor}; Scale takes any")
        if control not in (None, "random"):
            raise ValueError(f"control: expected None or random, got {said(control)}")
        self.control, (self.seed,) = control, integers("seed", seed)

    def check(self, site: PolicySite) -> None:
        super().check(site)
        if self.control is not None:
            self._drawn(site)

    def act(self, view: TokenView) -> Change:
        if self.control is None:
            return super().act(view)
        others, ratio = self._drawn(view.site)
        fires = view.features[view.mine]
        return view.add_atoms(others[fires], (self.factor - 1) * view.activations[view.mine] * ratio[fires])

    def _drawn(self, site: PolicySite) -> tuple[Tensor, Tensor]:
        """`[F]` the atom that stands for each, and `[F]` by how much it is scaled to have its norm."""

        def draw() -> tuple[Tensor, Tensor]:
            v, w = site.atoms
            norm = _norms(v, w)
            free = norm > 0
            free[list(self.features_at(site.key) or ())] = False
            free = free.nonzero().flatten().cpu()
            if not len(free):
                raise ValueError(f"control: expected other atoms at site {site.key}, got none beside the features")
            generator = torch.Generator().manual_seed(self.seed)
            others = free[torch.randint(len(free), (len(v),), generator=generator)].to(v.device)
            return others, norm / norm[others]

        return site.kept((self, "drawn"), draw)


class Clamp(Policy):
    """Sets what features read: adds multiples of their atoms so that each one's pre-activation is `value`.

    Pre-activations are linear in the state, `v_enc^T S w_enc + b`, so adding c_j atoms j moves that of i by
    `sum_j (v_enc_i . v_dec_j)(w_enc_i . w_dec_j) c_j`, and c is solved for: exact, also where encoder and atoms differ,
    and for several features at once. (Several Clamps at one token do not know of each other.) Whether a feature then
    belongs to the top k is another matter.

    Args:
        features: see `Policy`. where: its `sites`, `read` and `positions`.
        value: the pre-activation, bias included.
        always: at every token, and not only those of the features that fire, where they do.
    """

    def __init__(self, features: _Features, value: float, *, always: bool = False, **where):
        super().__init__(_given(features), **where)
        if not isinstance(always, bool):
            raise ValueError(f"always: expected True or False, got {said(always)}")
        self.value, self.always, self.needs_dictionary = _number("value", value), always, True

    def features_at(self, site: tuple[int, int]) -> tuple[int, ...] | None:
        return None if self.always else super().features_at(site)

    def _clamped(self, site: PolicySite) -> tuple[int, ...]:
        return super().features_at(site.key) or ()

    def check(self, site: PolicySite) -> None:
        always, self.always = self.always, False
        try:
            super().check(site)  # of features, which it has
        finally:
            self.always = always
        if getattr(site.dictionary, "sparsity", None) == "pursuit":
            raise ValueError(
                f"policies: Clamp takes features that are linear in the state, expected no dictionary of pursuit at "
                f"site {site.key}"
            )
        gram = self._gram(site).diagonal()
        (v, w), (x, y, _) = site.atoms, site.encoder
        at = list(self._clamped(site))
        weak = gram.abs() <= 1e-6 * _norms(v[at], w[at]) * _norms(x[at], y[at])
        if bool(weak.any()):
            raise ValueError(
                f"policies: Clamp of feature {at[int(weak.nonzero()[0])]} at site {site.key}: expected an atom that "
                "moves its own pre-activation, got one that does not"
            )

    def _gram(self, site: PolicySite) -> Tensor:
        """`[n, n]`: by how much atom j moves the pre-activation of feature i."""

        def made() -> Tensor:
            at = list(self._clamped(site))
            (v, w), (x, y, _) = site.atoms, site.encoder
            products = torch.einsum("irk,jsk->ijrs", x[at], v[at]) * torch.einsum("irv,jsv->ijrs", y[at], w[at])
            return products.sum((2, 3))

        return site.kept((self, "gram"), made)

    def act(self, view: TokenView) -> Change:
        site = view.site
        clamped = site.kept((self, "at"), lambda: torch.tensor(self._clamped(site), device=site.device))
        gram = self._gram(site)
        if self.always:
            now = view.activation(clamped)
        else:
            which = (view.features[view.mine][:, None] == clamped).nonzero()[:, 1]
            now, clamped, gram = view.activations[view.mine], clamped[which], gram[which][:, which]
        missing = (self.value - now).to(gram)
        if len(clamped) == 1:
            c = missing / gram[0]
        else:
            c = torch.linalg.lstsq(gram.double().cpu(), missing.double().cpu()[:, None]).solution[:, 0].to(gram)
        return view.add_atoms(clamped, c)


class Install(Policy):
    """Writes at given positions what raises a token's logit by the direct path: `m ||N||_F k_t w*^T`, with N the native
    write of that position, k_t its key at unit length, and `w* = W_O[head]^T W_U[token]` at unit length.

    Args:
        token: number of the token.
        positions: columns, cached ones and pads counted.
        magnitude: m, in units of the native write's norm.
        where: `sites` (None: all of the attach, with or without a dictionary) and `read` of `Policy`.
    """

    reads_codes = False

    def __init__(self, token: int, positions: Iterable[int], magnitude: float, **where):
        super().__init__(positions=positions, **where)
        (self.token,) = _numbers("token", token)
        if not self.positions:
            raise ValueError("positions: expected at least one column, got none")
        self.magnitude = _number("magnitude", magnitude)

    def check(self, site: PolicySite) -> None:
        super().check(site)
        site.direction(self.token)

    def act(self, view: TokenView) -> Change | None:
        norm = view.left.norm()
        if not bool(norm > 0):
            return None
        return view.add(self.magnitude * view.right.norm() * view.left, view.site.direction(self.token).to(view.right))


class PolicyReport:
    """How often a policy of an attach has acted; of calls that came to their end.

    Attributes:
        policy: the policy.
        applied: `{(layer, head): tokens at which it changed something}`, of all its sites.
        seen: `{(layer, head): real tokens that ran}`.
    """

    def __init__(self, policy: Policy, sites: Iterable[tuple[int, int]]):
        self.policy = policy
        self.applied = dict.fromkeys(sites, 0)
        self.seen = dict.fromkeys(self.applied, 0)

    @property
    def total(self) -> int:
        """Times it changed something, of all sites together."""
        return sum(self.applied.values())

    def __repr__(self) -> str:
        return f"PolicyReport({self.policy!r}, applied {self.total} times at {len(self.applied)} sites)"


def _scaled(view: TokenView, factor: float) -> Change:
    fires = view.mine.nonzero()[:, 0]
    return view.add_atoms(view.features[fires], (factor - 1) * view.activations[fires])


def _norms(v: Tensor, w: Tensor) -> Tensor:
    """`[n]` Frobenius norms of `sum_r v w^T`, v `[n, r, K]`, w `[n, r, V]`."""
    return (torch.einsum("nrk,nsk->nrs", v, v) * torch.einsum("nrv,nsv->nrs", w, w)).sum((1, 2)).clamp_min(0).sqrt()


def _given(features):
    if features is None:
        raise ValueError("features: expected numbers, or {(layer, head): numbers}, got None")
    return features


def _numbers(name: str, x) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(integers(name, x if isinstance(x, (int, Tensor)) else list(x))))
    bad = [i for i in found if i < 0]
    if bad:
        raise ValueError(f"{name}: expected integers >= 0, got {bad[0]}")
    return found


def _site(name: str, at) -> tuple[int, int]:
    if not isinstance(at, tuple) or len(at) != 2 or not all(type(x) is int for x in at):
        raise ValueError(f"{name}: expected (layer, head) of two integers, got {at!r}")
    return at


def _number(name: str, x) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number, got {said(x)}")
    return float(x)
