"""What is put in a write's place: each condition against a slow way to the same thing, on a tiny random model."""

import pytest
import torch
from tiny_models import tiny_model, tokens

from writesae.experiments.conditions import CONDITIONS as EVERY
from writesae.experiments.conditions import OF_WRITES, deltas, replacements
from writesae.experiments.engine import ForkEngine, Places, read
from writesae.experiments.firing import native_writes
from writesae.experiments.nulls import Fired, Material, random_factors
from writesae.sae import SAE

NATIVES, SCALES = ("increment", "outer"), ("coef", "matched")
HEAD = (0, 3, 0)


pytestmark = pytest.mark.usefixtures("one_thread")

CONDITIONS = tuple(c for c in EVERY if c not in OF_WRITES)


def dictionary(seed, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SAE(8, 6, 12, 3, layer=1, **options)


@pytest.fixture(scope="module")
def made():
    """(clean pass, what fired, {(native, condition, scale): (R, N) as matrices}) of three firings of two heads."""
    model = tiny_model()
    engine = ForkEngine(model, 1, 2)
    places = Places(torch.tensor([0, 0, 0]), torch.tensor([0, 4, 9]), torch.tensor(HEAD))
    clean = engine.clean(torch.arange(3, 23)[None], torch.tensor([20]), lambda writes: places)
    saes = {(1, 0): dictionary(0, head=0), (1, 3): dictionary(1, head=3)}
    books, means = native_writes(model, saes, [tokens(1, 40, seed=5)[0].numpy()], 0)
    sites = tuple(Material(site[1], sae, books[site], means[site]) for site, sae in saes.items())
    feature = torch.tensor([2, 7, 5])
    atoms = [saes[1, h].atoms() for h in HEAD]
    v, w = (torch.stack([a[side][f] for a, f in zip(atoms, feature, strict=True)]).detach() for side in (0, 1))
    fired = Fired(2 * v, w, torch.tensor([0.5, 1.0, 2.0]), ["a", "b", "c"], feature, sites)
    with torch.no_grad():
        found = replacements(clean, fired, NATIVES, SCALES, CONDITIONS, 0)
    return clean, fired, {name: tuple(map(matrix, pair)) for name, pair in found.items()}


def matrix(R):
    if R is None or isinstance(R, torch.Tensor):
        return R
    left, right = (x[:, None] if x.ndim == 2 else x for x in R)
    return torch.einsum("nrk,nrv->nkv", left, right)


def size(X):
    return torch.linalg.matrix_norm(X)


def cosine(A, B):
    return (A * B).sum((-2, -1)) / (size(A) * size(B))


def states(clean, back=0):
    """S_{t - back} of the three firings, by the recurrence, one token at a time."""
    writes, found = clean.writes, []
    for t, h in zip(clean.places.position.tolist(), HEAD, strict=True):
        S = torch.zeros(8, 6, dtype=torch.float64)
        for s in range(t + 1 - back):
            k, u = writes.left[0, s, h // 2, 0].double(), writes.right[0, s, h, 0].double()
            a, b = writes.decay[0, s, h].double().exp(), writes.beta[0, s, h].double()
            S = a * S + torch.outer(k, u)  # u holds the erase
            assert 0 <= b <= 1
        found.append(S)
    return torch.stack(found).float()


def test_every_size_is_what_it_says(made):
    clean, fired, found = made
    atom = fired.coefficient * fired.v[:, 0].norm(dim=1) * fired.w[:, 0].norm(dim=1)
    for native, right in (("increment", clean.right), ("outer", clean.outer_right)):
        norm = clean.left.norm(dim=1) * right.norm(dim=1)
        own = {"least_squares"}
        for condition in set(CONDITIONS) - {"native", "delete", "zero", "reconstruction"}:
            R = found[native, condition, "coef"][0]
            there = size(R) > 0  # nothing precedes a first token
            assert there[1:].all()
            if condition not in own:
                torch.testing.assert_close(size(R)[there], atom[there])
            if condition == "scaled":
                assert (native, condition, "matched") not in found
                torch.testing.assert_close(cosine(R, found[native, "native", None][1]), torch.ones(3))
                continue
            grown = found[native, condition, "matched"][0]
            torch.testing.assert_close(size(grown)[there], norm[there])
            torch.testing.assert_close(cosine(R, grown)[there], torch.ones(int(there.sum())))


def test_what_is_taken_out(made):
    clean, fired, found = made
    # beta_t v_t is the whole write less its erase: u_t = beta_t (v_t - S~^T k_t).
    decay, beta = (x[0, clean.places.position, clean.places.head] for x in (clean.writes.decay, clean.writes.beta))
    erased = beta[:, None] * torch.einsum("nkv,nk->nv", decay.exp()[:, None, None] * states(clean, 1), clean.left)
    torch.testing.assert_close(clean.right, clean.outer_right - erased, atol=1e-5, rtol=1e-4)
    for native, right in (("increment", clean.right), ("outer", clean.outer_right)):
        N = clean.left[:, :, None] * right[:, None]
        for (of, condition, _), (R, out) in found.items():
            if of == native and condition not in ("zero", "reconstruction"):
                torch.testing.assert_close(out, N)
                assert condition != "delete" or R is None
    torch.testing.assert_close(found["increment", "zero", None][0], -states(clean), atol=1e-5, rtol=1e-4)


def test_each_condition_by_hand(made):
    clean, fired, found = made
    S, before = states(clean), states(clean, 1)
    R = {condition: pair[0] for (native, condition, scale), pair in found.items()
         if native == "increment" and scale != "matched"}  # fmt: skip
    N = clean.left[:, :, None] * clean.right[:, None]
    torch.testing.assert_close(R["atom"], torch.einsum("n,nrk,nrv->nkv", fired.coefficient, fired.v, fired.w))
    close = dict(atol=1e-4, rtol=1e-3)
    for name, state in (("singular", S), ("singular_before", before)):
        u, _, vh = torch.linalg.svd(state)
        pair = torch.einsum("nk,nv->nkv", u[:, :, 0], vh[:, 0])
        there = size(state) > 0
        torch.testing.assert_close(cosine(R[name], pair)[there], torch.ones(int(there.sum())), **close)
    for i, (head, t) in enumerate(zip(HEAD, clean.places.position.tolist(), strict=True)):
        site = next(x for x in fired.sites if x.head == head)
        with torch.no_grad():
            atoms = site.sae.atom_matrix().view(-1, 8, 6)
            codes = site.sae.encode(S[i])
            active = codes.indices[codes.values > 0]
            best = max(range(12), key=lambda f: float(cosine(atoms[f], N[i])))
            torch.testing.assert_close(cosine(R["nearest"][i], atoms[best]), torch.tensor(1.0), **close)
            # Least squares: no combination of the active atoms is nearer.
            basis = atoms[active].flatten(1).T.double()
            solved = basis @ torch.linalg.lstsq(basis, N[i].flatten().double()[:, None]).solution
            torch.testing.assert_close(R["least_squares"][i].flatten().double(), solved[:, 0], **close)
            torch.testing.assert_close(R["reconstruction"][i], site.sae(S[i]) - S[i], **close)
            other = max(range(12), key=lambda f: abs(float(cosine(atoms[f], R["other_atom"][i]))))
            assert abs(cosine(atoms[other], R["other_atom"][i])) > 0.999 and other not in active
        book = torch.einsum("fk,fv->fkv", *site.codebook)
        scored = (book * (S[i] - site.sae.mean)).sum((1, 2)).argmax()
        torch.testing.assert_close(cosine(R["codebook"][i], book[scored]), torch.tensor(1.0), **close)
        nearest = cosine(book, N[i].expand_as(book)).argmax()
        torch.testing.assert_close(cosine(R["codebook_nearest"][i], book[nearest]), torch.tensor(1.0), **close)
        torch.testing.assert_close(cosine(R["mean"][i], site.mean.float()), torch.tensor(1.0), **close)
        if t:
            previous = torch.outer(clean.writes.left[0, t - 1, head // 2, 0], clean.writes.right[0, t - 1, head, 0])
            torch.testing.assert_close(cosine(R["previous"][i], previous), torch.tensor(1.0), **close)
        key = torch.nn.functional.normalize(clean.left[i], dim=0)
        own = R["own_key"][i]
        torch.testing.assert_close(torch.outer(key, key @ own), own, **close)


def test_a_codebook_holds_native_writes_each_once():
    model = tiny_model()
    saes = {(1, 3): dictionary(1, head=3)}
    texts = [tokens(1, n, seed=n)[0].numpy() for n in (30, 9, 70)]
    (books, means), (again, _) = (native_writes(model, saes, texts, 0) for _ in range(2))
    left, right = books[1, 3]
    assert torch.equal(left, again[1, 3][0]) and not torch.equal(left, native_writes(model, saes, texts, 1)[0][1, 3][0])
    every, total = [], torch.zeros(8, 6)
    for text in texts:
        lengths = torch.tensor([len(text)])
        place = Places(*(torch.tensor([x]) for x in (0, 0, 3)))
        writes = ForkEngine(model, 1, 1).clean(torch.from_numpy(text)[None], lengths, lambda _, at=place: at).writes
        k, u = writes.left[0, :, 1, 0], writes.right[0, :, 3, 0]
        total += torch.einsum("tk,tv->kv", k, u)
        every.append(torch.einsum("tk,tv->tkv", *(torch.nn.functional.normalize(x, dim=1) for x in (k, u))))
    every = torch.cat(every)
    alike = torch.einsum("fk,fv,tkv->ft", left, right, every)
    assert (alike.max(1).values > 0.9999).all()
    assert len(set(alike.argmax(1).tolist())) == 12  # no token twice
    torch.testing.assert_close(means[1, 3].float(), total / 109, atol=1e-5, rtol=1e-3)


def test_read_after_is_read_before_but_for_the_token_itself(made):
    clean, fired, _ = made
    with torch.no_grad():
        out = deltas(clean, fired, NATIVES, SCALES, CONDITIONS, 0, ("after", "before"))
    assert out.pop("baseline") is None
    names = {name.split(".", 1)[1] for name in out}
    assert {f"{when}.{name}" for name in names for when in ("after", "before")} == set(out)
    for name in names:
        after, before = out[f"after.{name}"], out[f"before.{name}"]
        assert (after[:, 0] == 0).all() and torch.equal(after[:, 1:], before[:, 1:])
        if name.endswith(".native"):
            assert (before == 0).all()
        else:
            assert (before[:, 0] != 0).any()
    removed = read(clean, clean.left, clean.right)
    torch.testing.assert_close(out["before.increment.delete"], -removed)


def test_draws_are_by_name(made):
    clean, fired, _ = made
    p, q = random_factors(fired.identity, clean.left, clean.right, 0)
    torch.testing.assert_close(p.norm(dim=1), torch.ones(3))
    again, _ = random_factors(["c", "a"], clean.left[:2], clean.right[:2], 0)
    torch.testing.assert_close(again, p[[2, 0]])  # by name, not by place in the batch
    assert not torch.allclose(random_factors(["c"], clean.left, clean.right, 1)[0], p[2:])
