"""What could stand in for a write: the atom, and everything that might do as well without having been trained.

An atom that disturbs a model less than deletion proves little: a write taken from other text, or the top singular pair
of the state, may do as much. Each condition here is a function of the firings, `condition(edited) -> R`:

| condition | R |
|---|---|
| atom | the firing feature's atom times its code |
| random | Gaussian unit factors, fresh for every firing |
| other_atom | another atom of the dictionary, one that does not fire at the token |
| own_key | the write's own key with a Gaussian value |
| codebook | of as many native writes of other text as there are atoms, the one that scores best: v^T X w, as atoms do |
| codebook_nearest | of the same, the one with the largest cosine with the write |
| singular, singular_before | the top singular pair of S_t; of S_{t-1} |
| scaled | the write itself at the atom's size |
| previous, mean | the write of the token before; the mean write of other text (a full matrix) |
| nearest | of all atoms, the one with the largest cosine with the write |
| least_squares | the combination of the active atoms that is nearest the write |

X is what the dictionary encodes, less its mean: S_t, or the write for a dictionary of writes. The atom of a pursuit
dictionary is the one that alone is nearest the write in its metric, and its codebook is scored in that metric too.

Three more have no size to choose. `reconstruction` makes the state, or for a dictionary of writes the write, what the
dictionary reconstructs of it, by all its atoms; `codebook_reconstruction` does so with as many native writes coded by
the same rule (of writes only). `zero` empties the state, the scale against which every KL is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sae import SAE
from ..sae.sae import SparseCodes
from .codebook import codebook
from .engine import Clean


@dataclass(frozen=True)
class Material:
    """What conditions need of one site.

    Attributes:
        head: the site's head.
        sae: its dictionary.
        codebook: unit factors `([F, K], [F, V])` of native writes of other text, or None.
        mean: `[K, V]` mean native write of other text, or None.
    """

    head: int
    sae: SAE
    codebook: tuple[Tensor, Tensor] | None = None
    mean: Tensor | None = None


@dataclass(frozen=True)
class Fired:
    """The atoms that fired at n places.

    Attributes:
        v, w: `[n, r, K]`, `[n, r, V]` atom factors.
        coefficient: `[n]` the code.
        identity: n strings that name the firings whatever batch they are in; they seed whatever is drawn.
        feature: `[n]` int64, or None where there is no dictionary.
        sites: of every head that fired.
    """

    v: Tensor
    w: Tensor
    coefficient: Tensor
    identity: list[str]
    feature: Tensor | None = None
    sites: tuple[Material, ...] = field(default=())


class States:
    """S_t and S_{t-1} of n places, `[n, K, V]` each; zero before a passage's first token."""

    after: Tensor
    before: Tensor


@dataclass(frozen=True)
class Edited:
    """What a condition may look at: n firings of one layer, and the write that is taken out at each.

    A condition returns what is put in the write's place at scale "coef": factors `([n, K], [n, V])`, or with a rank
    `([n, r, K], [n, r, V])`, or a matrix `[n, K, V]`. At scale "matched" it is rescaled to the norm of the write.

        def mine(edited):  # the write's own key, the atom's value, as large as the atom
            left, right = F.normalize(edited.left, dim=1), F.normalize(edited.w[:, 0], dim=1)
            return edited.size[:, None] * left, right

        run_replacement(..., conditions={"mine": mine})

    Attributes:
        clean: the layer's clean pass: `places` (row, position, head), `writes` and more.
        fired: the atoms that fired, and their sites.
        native: which reading of the write is taken out.
        left, right: `[n, K]`, `[n, V]` factors of that write.
        seed: of the run.
        states: `states.after` is S_t, `states.before` S_{t-1}, `[n, K, V]`.
    """

    clean: Clean
    fired: Fired
    native: str
    left: Tensor
    right: Tensor
    seed: int
    states: States

    @property
    def native_norm(self) -> Tensor:
        """`[n]` Frobenius norm of the write."""
        return self.left.norm(dim=1) * self.right.norm(dim=1)

    @property
    def v(self) -> Tensor:
        """`[n, r, K]` key side of the atoms that fired."""
        return self.fired.v.to(self.left)

    @property
    def w(self) -> Tensor:
        """`[n, r, V]` value side of them."""
        return self.fired.w.to(self.left)

    @property
    def code(self) -> Tensor:
        """`[n]` their codes."""
        return self.fired.coefficient.to(self.left)

    @property
    def size(self) -> Tensor:
        """`[n]` Frobenius norm of atom times code: what a condition without a size of its own gets."""
        return self.code * norm((self.v, self.w))

    def sites(self) -> Iterator[tuple[Tensor, Material]]:
        """(indices of the firings, material) of every head that fired."""
        head = self.clean.places.head
        for site in self.fired.sites:
            mine = (head == site.head).nonzero().flatten()
            if len(mine):
                yield mine, site

    def encoded(self, mine: Tensor, sae: SAE) -> Tensor:
        """`[m, K, V]`, where the dictionary is: what it encodes at these firings, states or increments."""
        if sae.target == "state":
            X = self.states.after[mine]
        else:
            X = self.clean.left[mine, :, None] * self.clean.right[mine, None]
        return X.to(sae.mean.device)

    def codes(self, mine: Tensor, sae: SAE) -> SparseCodes:
        """`[m, j]` codes there."""
        if sae.target == "state":
            return sae.encode(self.encoded(mine, sae))
        return sae.encode_writes(*(x[mine, None].to(sae.mean.device) for x in (self.clean.left, self.clean.right)))


# ---- additions to a state: factors or a matrix --------------------------------------------------------------------


def norm(R) -> Tensor:
    """`[n]` Frobenius norm."""
    if isinstance(R, Tensor):
        return torch.linalg.matrix_norm(R)
    left, right = R
    if left.ndim == 2:
        return left.norm(dim=1) * right.norm(dim=1)
    gram = torch.einsum("nrk,nsk->nrs", left, left) * torch.einsum("nrv,nsv->nrs", right, right)
    return gram.sum((1, 2)).clamp_min(0).sqrt()


def times(R, factor: Tensor | float):
    """R times `factor`, one number or `[n]`."""
    if isinstance(factor, float) and factor == 1.0:
        return R
    if isinstance(R, Tensor):
        return R * factor[:, None, None]
    left, right = R
    return left * factor.reshape(-1, *[1] * (left.ndim - 1)), right


def _draw(identity: str, seed: int, what: str = "") -> np.random.Generator:
    """A generator of one firing, whatever batch it is in."""
    digest = hashlib.blake2b(f"{seed}/{what}{identity}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "big")))


def random_factors(
    identity: Sequence[str], left: Tensor, right: Tensor, seed: int, what: str = ""
) -> tuple[Tensor, Tensor]:
    """Unit Gaussian factors like `left [n, K]` and `right [n, V]`, one draw a firing, by name and seed alone."""
    K, V = left.shape[1], right.shape[1]
    draws = np.empty((len(identity), K + V))
    for i, name in enumerate(identity):
        draws[i] = _draw(name, seed, what).standard_normal(K + V)
    p, q = torch.from_numpy(draws[:, :K]).to(left), torch.from_numpy(draws[:, K:]).to(right)
    return normalize(p, dim=1), normalize(q, dim=1)


def _sized(edited: Edited, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of two factors `[n, K]`, `[n, V]`, at the atom's size."""
    return edited.size[:, None] * normalize(left, dim=1), normalize(right, dim=1)


# ---- the conditions -----------------------------------------------------------------------------------------------


def _atom(edited: Edited):
    return edited.code[:, None, None] * edited.v, edited.w


def _random(edited: Edited):
    return _sized(edited, *random_factors(edited.fired.identity, edited.left, edited.right, edited.seed))


def _own_key(edited: Edited):
    _, value = random_factors(edited.fired.identity, edited.left, edited.right, edited.seed, "own key/")
    return _sized(edited, edited.left, value)


def _other_atom(edited: Edited):
    v, w = torch.zeros_like(edited.v), torch.zeros_like(edited.w)
    for mine, site in edited.sites():
        codes = edited.codes(mine, site.sae)
        pick = []
        for i, values, indices in zip(mine.tolist(), codes.values.tolist(), codes.indices.tolist(), strict=True):
            active = {f for f, value in zip(indices, values, strict=True) if value > 0}
            draw = _draw(edited.fired.identity[i], edited.seed, "other atom/")
            silent = (int(f) for f in draw.permutation(site.sae.F) if int(f) not in active)
            pick.append(next(silent, int(indices[0])))
        v_dec, w_dec = site.sae.atoms()
        r = v_dec.shape[1]
        v[mine, :r], w[mine, :r] = v_dec[pick].to(v), w_dec[pick].to(w)
    return times((v, w), edited.size / norm((v, w)).clamp_min(1e-30))


def _codebook(edited: Edited):
    def best(mine, site, left, right):
        if site.sae.target == "write":
            book = codebook(site.sae, left, right)
            keys, values = (x[mine, None] for x in (edited.clean.left, edited.clean.right))
            return book.encode_writes(keys, values, k=1).indices[:, 0]
        X = edited.encoded(mine, site.sae) - site.sae.mean
        return _bilinear(X.to(left), left, right).argmax(1)

    return _from_codebook(edited, best)


def _codebook_nearest(edited: Edited):
    def best(mine, site, left, right):
        return ((edited.left[mine] @ left.T) * (edited.right[mine] @ right.T)).argmax(1)

    return _from_codebook(edited, best)


def _bilinear(X: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`[m, F]`: left_f^T X right_f, some firings at a time."""
    step = max(1, 2**25 // (X.shape[1] * len(left)))
    return torch.cat([torch.einsum("mkf,fk->mf", part @ right.T, left) for part in X.split(step)])


def _from_codebook(edited: Edited, best):
    p, q = torch.zeros_like(edited.left), torch.zeros_like(edited.right)
    for mine, site in edited.sites():
        left, right = (x.to(edited.left) for x in site.codebook)
        pick = best(mine, site, left, right)
        p[mine], q[mine] = left[pick], right[pick]
    return _sized(edited, p, q)


def _top_pair(states: Tensor) -> tuple[Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(states, full_matrices=False)
    return u[:, :, 0] * (sigma[:, :1] > 0), vh[:, 0]


def _singular(edited: Edited):
    return _sized(edited, *_top_pair(edited.states.after))


def _singular_before(edited: Edited):
    return _sized(edited, *_top_pair(edited.states.before))


def _scaled(edited: Edited):
    return _sized(edited, edited.left, edited.right)


def _previous(edited: Edited):
    """The increment of the token before, whichever reading of the write is taken out; nothing at the first token."""
    writes, places = edited.clean.writes, edited.clean.places
    left, right = writes.native(places.row, (places.position - 1).clamp_min(0), places.head)
    return _sized(edited, left, right * (places.position > 0)[:, None])


def _mean(edited: Edited):
    matrix = edited.left.new_zeros(*edited.left.shape, edited.right.shape[1])
    for mine, site in edited.sites():
        matrix[mine] = site.mean.to(matrix)
    return times(matrix, edited.size / norm(matrix).clamp_min(1e-30))


def _nearest(edited: Edited):
    v, w = torch.zeros_like(edited.v), torch.zeros_like(edited.w)
    for mine, site in edited.sites():
        v_dec, w_dec = (x.to(edited.left) for x in site.sae.atoms())
        inner = torch.einsum("frk,nk->nfr", v_dec, edited.left[mine])
        inner = (inner * torch.einsum("frv,nv->nfr", w_dec, edited.right[mine])).sum(2)
        pick = (inner / norm((v_dec, w_dec)).clamp_min(1e-30)).argmax(1)
        v[mine, : v_dec.shape[1]], w[mine, : w_dec.shape[1]] = v_dec[pick], w_dec[pick]
    return times((v, w), edited.size / norm((v, w)).clamp_min(1e-30))


def _least_squares(edited: Edited):
    found = []
    for mine, site in edited.sites():
        codes = edited.codes(mine, site.sae)
        v_dec, w_dec = (x.to(edited.left.device, torch.float64) for x in site.sae.atoms())
        indices, active = codes.indices.to(v_dec.device), (codes.values > 0).to(v_dec.device)
        v, w = v_dec[indices] * active[..., None, None], w_dec[indices]  # [m, j, r, K], [m, j, r, V]
        gram = torch.einsum("mirk,mjsk,mirv,mjsv->mij", v, v, w, w)
        inner = torch.einsum(
            "mjrk,mk,mjrv,mv->mj", v, edited.left[mine].double(), w, edited.right[mine].double()
        )  # fmt: skip
        share = (torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ inner[..., None])[..., None]  # [m, j, 1, 1]
        found.append((mine, (v * share).flatten(1, 2), w.flatten(1, 2)))
    rank = max((v.shape[1] for _, v, _ in found), default=1)
    n, K, V = *edited.left.shape, edited.right.shape[1]
    out = edited.left.new_zeros(n, rank, K), edited.left.new_zeros(n, rank, V)
    for mine, v, w in found:
        out[0][mine, : v.shape[1]], out[1][mine, : w.shape[1]] = v.to(out[0]), w.to(out[1])
    return out


def _reconstruction(edited: Edited) -> Tensor:
    change = edited.left.new_zeros(*edited.left.shape, edited.right.shape[1])
    for mine, site in edited.sites():
        change[mine] = (site.sae.decode(edited.codes(mine, site.sae)) - edited.encoded(mine, site.sae)).to(change)
    return change


def _codebook_reconstruction(edited: Edited) -> Tensor:
    change = edited.left.new_zeros(*edited.left.shape, edited.right.shape[1])
    for mine, site in edited.sites():
        book = codebook(site.sae, *site.codebook)
        change[mine] = (book.decode(edited.codes(mine, book)) - edited.encoded(mine, book)).to(change)
    return change


def _zero(edited: Edited) -> Tensor:
    return -edited.states.after


REPLACEMENTS = {
    "atom": _atom, "random": _random, "other_atom": _other_atom, "own_key": _own_key, "codebook": _codebook,
    "codebook_nearest": _codebook_nearest, "singular": _singular, "singular_before": _singular_before,
    "scaled": _scaled, "previous": _previous, "mean": _mean, "nearest": _nearest, "least_squares": _least_squares,
}  # fmt: skip
WHOLE = {"reconstruction": _reconstruction, "codebook_reconstruction": _codebook_reconstruction, "zero": _zero}
