"""Codes as firings in few bytes: what packing rounds, and columns that are computed when asked for."""

from __future__ import annotations

import pytest
import torch
from test_attach import SITES, dictionaries
from tiny_models import tiny_model, tokens

import writesae
from writesae import SAE, Firings, Writes
from writesae.collect.source import ModelSource
from writesae.firings import LazyFirings
from writesae.models import gather
from writesae.models.grid import Grid, Tokens, feature_bits, narrowed, rounded
from writesae.models.transfer import ToHost


def codes(B=2, T=5, Hs=3, k=4, features=2048, seed=0):
    """Loose codes, some 0."""
    g = torch.Generator().manual_seed(seed)
    values = (torch.randn(B, T, Hs, k, generator=g) * 10 ** torch.randn(B, T, Hs, k, generator=g)).relu()
    return values, torch.randint(features, (B, T, Hs, k), generator=g)


def grid(values, indices, features=2048, packed=False, heads=(1, 4, 7), layer=3, real=None, cu=None, start=2):
    shape = (values.shape[0], values.shape[1])
    tokens = Tokens(shape, 10, start, cu, real, values.device)
    return Grid((values, indices), feature_bits(features) if packed else None, tokens, heads, layer, features)


def columns_of(values, indices, heads=(1, 4, 7), layer=3, real=None, start=2):
    """Of one call without packed sequences, by loops."""
    rows = []
    for b, t, h, j in (values > 0).nonzero().tolist():
        if real is None or real[b, t]:
            rows.append((10 + b, start + t, layer, heads[h], int(indices[b, t, h, j]), float(values[b, t, h, j])))
    return rows


def rows_of(firings):
    return list(zip(*(column.tolist() for column in firings.columns().values()), strict=True))


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 2, 3, 24, 2048, 2049, 40_000, 65_536])
def test_a_packed_word_holds_feature_and_activation(features):
    """The feature as it is; the activation rounded to the nearest of 32 - bits bits, which the bound follows from."""
    bits = feature_bits(features)
    values, indices = codes(4, 64, 3, 8, features)
    (packed,) = narrowed([grid(values, indices, features, packed=True)])
    assert packed.nbytes == 4 * values.numel() and len(packed.codes) == 1
    assert torch.equal(packed.feature().long(), indices)
    got = packed.activation()
    assert torch.equal(got, rounded(values, features))
    fires = values > 0
    assert torch.equal(got > 0, fires)
    off = ((got.double() - values.double()) / values.double())[fires].abs().max()
    assert off <= 2.0 ** -(25 - bits)
    if 1 < bits < 16:
        assert off > 2.0 ** -(26 - bits)  # or the bound says nothing
        step = 1 << (bits - 1)
        low = (values.view(torch.int32) // step * step).view(torch.float32)
        high = (values.view(torch.int32) // step * step + step).view(torch.float32)
        assert torch.equal((got - values).abs(), torch.minimum(values - low, high - values))


def test_activations_at_the_ends():
    """0, NaN of any kind and what rounds to 0 do not fire; an infinity stays one."""
    bits = torch.tensor([0, -(2**31), 0x7FFFFFFF, 0x7FC00000, -1, 1, 0x7F800000], dtype=torch.int32)
    values = bits.view(torch.float32)
    for features in (2, 2048, 65_536):
        indices = torch.full((1, 7, 1, 1), features - 1)
        (packed,) = narrowed([grid(values.view(1, 7, 1, 1), indices, features, packed=True, heads=(0,))])
        fires = packed.fires().flatten()
        assert fires[:5].tolist() == [False] * 5 and bool(fires[6]) and float(packed.activation().flatten()[6]) > 3e38
        assert bool(fires[5]) == (features == 2)
        assert (packed.feature() == features - 1).all()


@pytest.mark.parametrize("features, size", [(2048, 6), (65_536, 6), (65_537, 8)])
def test_exact_codes_lose_nothing(features, size):
    values, indices = codes(features=features)
    indices[0, 0, 0, 0] = features - 1
    (kept,) = narrowed([grid(values, indices, features)])
    assert kept.nbytes == size * values.numel()
    assert torch.equal(kept.activation(), values) and torch.equal(kept.feature().long(), indices)


@pytest.mark.parametrize("packed", [False, True])
def test_many_are_narrowed_as_one_is(packed):
    loose = [grid(*codes(T=t, k=k, features=f, seed=t), f, packed) for t, k, f in
             ((1, 4, 2048), (7, 2, 2048), (3, 4, 24), (5, 1, 50_000), (2, 4, 24))]  # fmt: skip
    for got, alone in zip(narrowed(loose), loose, strict=True):
        (expected,) = narrowed([alone])
        assert not got.loose and rows_of(LazyFirings([got])) == rows_of(LazyFirings([expected]))
        assert rows_of(LazyFirings([alone])) == rows_of(LazyFirings([expected]))


# ---- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [None, "some", "none"])
@pytest.mark.parametrize("fires", ["some", "all"])
def test_columns_are_computed(fires, real):
    values, indices = codes()
    values = values + 1 if fires == "all" else values
    mask = None if real is None else torch.zeros(2, 5, dtype=torch.bool)
    if real == "some":
        mask[0, 2:] = True
    part = grid(values, indices, real=mask)
    lazy = LazyFirings([part])
    assert rows_of(lazy) == columns_of(values, indices, real=mask) and len(lazy) == len(rows_of(lazy))
    assert {x.dtype for x in lazy.columns().values()} == {torch.int32, torch.float32}


def test_rows_of_a_packed_batch():
    values, indices = (x[:1] for x in codes(T=9))
    cu = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    writes = Writes(torch.zeros(1, 9, 3), torch.ones(1, 9, 3, 1, 2), torch.ones(1, 9, 3, 1, 2), cu_seqlens=cu.long())
    at = Tokens.of(writes, 0, None)
    assert at.row.tolist() == [[0, 0, 1, 2, 2, 2, 2, 2, 2]] and at.position.tolist() == [[0, 1, 0, 0, 1, 2, 3, 4, 5]]
    lazy = LazyFirings([grid(values, indices, cu=cu)])
    sites = (values > 0).nonzero()
    assert lazy.row.tolist() == at.row[0][sites[:, 1]].tolist()
    assert lazy.position.tolist() == at.position[0][sites[:, 1]].tolist()


def test_lazy_firings_are_firings():
    """Everything that firings can be asked, of parts of several kinds, as of the same columns."""
    parts = [grid(*codes(seed=1)), *narrowed([grid(*codes(T=3, seed=2), packed=True, layer=5, heads=(4, 1, 0))])]
    extra = Firings(*(torch.arange(1, 6) for _ in range(6)))
    lazy = LazyFirings([*parts, extra])
    plain = Firings(**lazy.columns())
    assert rows_of(lazy) == [row for p in parts for row in rows_of(LazyFirings([p]))] + rows_of(extra)
    assert isinstance(lazy, Firings) and len(lazy) == len(plain) and repr(lazy) == repr(plain)
    assert rows_of(lazy.sort()) == rows_of(plain.sort())
    loud = plain.activation > 1
    for index in (loud, slice(3, 20, 2), torch.tensor([4, 0, 4])):
        assert rows_of(lazy[index]) == rows_of(plain[index]) and not isinstance(lazy[index], LazyFirings)
    for layer, head in ((3, 4), (5, 4), (5, 0), (3, 0), (1, 1), (9, 9)):
        assert rows_of(lazy.of_site(layer, head)) == rows_of(plain.of_site(layer, head))
        expected = torch.bincount(plain.of_site(layer, head).feature, minlength=2048)
        assert torch.equal(lazy.counts(layer, head, 2048), expected)
        assert torch.equal(plain.counts(layer, head, 2048), expected)
    both = Firings.cat([lazy, lazy])
    assert isinstance(both, LazyFirings) and rows_of(both) == 2 * rows_of(lazy)
    assert rows_of(Firings.cat([lazy, plain])) == 2 * rows_of(lazy)
    assert rows_of(lazy.cpu()) == rows_of(lazy) and lazy.to("meta").device.type == "meta"
    assert lazy.to_pandas().equals(plain.to_pandas())
    assert len(LazyFirings([])) == 0 == len(LazyFirings([]).row)
    with pytest.raises(ValueError, match="parts: expected all on one device, got cpu, meta"):
        LazyFirings([parts[0], parts[1].to("meta")])


def test_one_parcel_holds_every_dtype():
    given = [torch.arange(3, dtype=torch.int16), torch.rand(2, 3), torch.tensor([True, False, True]),
             torch.arange(4), torch.arange(5, dtype=torch.int32).flip(0)[::2], torch.tensor(7.0)]  # fmt: skip
    for got, expected in zip(ToHost(given).get(), given, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert ToHost([]).get() == []


# ---- in attach and collections --------------------------------------------------------------------------------------


def test_attach_says_what_it_rounds():
    """Packed codes are the exact ones, rounded, whatever the device and the dictionary."""
    ids = tokens(2, 12)
    for made in (
        dictionaries(),
        {site: SAE(8, 6, 24, 3, kind="matrix", layer=site[0], head=site[1]) for site in SITES},
    ):
        found = []
        for activations in ("exact", "packed"):
            model = tiny_model()
            with torch.no_grad(), writesae.attach(model, made, activations=activations) as tap:
                model(ids)
            found.append(tap.firings)
        exact, packed = found
        assert torch.equal(packed.activation, rounded(exact.activation, 24)) and len(exact)
        assert not torch.equal(packed.activation, exact.activation)
        assert rows_of(tap.device_firings) == rows_of(packed)


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="activations: expected one of 'exact', 'packed', got 'rounded'"):
        with writesae.attach(tiny_model(), dictionaries(), activations="rounded"):
            pass
    big = {SITES[0]: SAE(8, 6, 65_537, 3, layer=0, head=0)}
    with pytest.raises(ValueError, match='activations: expected "exact" .* 65536 .*, got "packed" for one of 65537'):
        with writesae.attach(tiny_model(), big, activations="packed"):
            pass
    with pytest.raises(ValueError, match="activations: expected one of"):
        ModelSource(tiny_model(), {SITES[0]: SAE(8, 6, 24, 3, layer=0, head=0)}, activations="half")


def test_a_collection_knows_how_its_activations_are_kept():
    made = {SITES[0]: SAE(8, 6, 24, 3, layer=0, head=0)}
    model, mask = tiny_model(), torch.ones(2, 12, dtype=torch.int64)
    exact, packed = (ModelSource(model, made, activations=x) for x in ("exact", "packed"))
    assert "activations" not in exact.fingerprint and packed.fingerprint["activations"] == "packed"
    with exact:
        expected = exact.firings(tokens(2, 12), mask)
    with packed:
        got = packed.firings(tokens(2, 12), mask)
    assert torch.equal(got.activation, rounded(expected.activation, 24)) and torch.equal(got.feature, expected.feature)


def test_gathered_keeps_the_order_of_calls():
    """Firings of columns and of codes, on the host, in the order in which they came."""
    gathered = gather.Gathered()
    parts = [grid(*codes(seed=1)), Firings(*(torch.arange(1, 4) for _ in range(6))), grid(*codes(T=2, seed=3))]
    for part in parts:
        gathered.add(part, 0)
    expected = [row for p in parts for row in rows_of(LazyFirings([p]))]
    assert rows_of(gathered.joined()) == expected == rows_of(gathered.on_device())
