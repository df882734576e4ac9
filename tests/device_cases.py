"""Hooked models on a simulated device against the CPU; run by test_device.py in a process of its own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from forking import fork_changes
from simulated_device import DEVICES, OnDevice, SimulatedDevice
from test_attach import FAMILIES, Dictionary
from test_engine import CASES
from tiny_models import tiny_model, tokens

import writesae
from writesae import SAE, Edits
from writesae.collect.source import ModelSource
from writesae.experiments.engine import ForkEngine, Places
from writesae.ops import _dispatch

K, V, F = 8, 6, 24
SITES = [(0, 0), (0, 3), (3, 1)]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """The device's kernels are the CPU's, which the simulated device calls with the tensors inside."""
    monkeypatch.setattr(_dispatch, "choose", lambda op, backend, tensors: "cuda")


def dictionaries(threshold=None):
    g = torch.Generator().manual_seed(5)
    made = {}
    for site in SITES:
        v, w = torch.randn(F, 1, K, generator=g), torch.randn(F, 1, V, generator=g)
        made[site] = Dictionary(v, w, 0.1 * torch.randn(F, generator=g), threshold=threshold)
    return made


def spread(device, model, first=0):
    """The model as `from_pretrained(device_map=...)` leaves it: its first two layers on device `first`, the rest on the
    other, accelerate's hooks around every block (accelerate's own mover of weights does not know wrappers)."""
    trunk = model.model
    parts = [(trunk.embed_tokens, 0), (trunk.rotary_emb, 0), (trunk.norm, 1), (model.lm_head, 1)]
    for block, part in [*parts, *((layer, int(i >= 2)) for i, layer in enumerate(trunk.layers))]:
        index = part ^ first
        device.move(block, index)
        add_hook_to_module(block, AlignDevicesHook(execution_device=DEVICES[index], place_submodules=False))
    add_hook_to_module(model, AlignDevicesHook(execution_device=DEVICES[first], io_same_device=True))


def both(model, run, sites=None, edits=None, place=SimulatedDevice.move, **options):
    """(tensor, firings) of `run(model, move)` hooked on the CPU and on the device, and what the device waited for."""
    sites = dictionaries() if sites is None else sites
    with torch.no_grad(), writesae.attach(model, sites, edits, accelerate=True, **options) as tap:
        expected = run(model, lambda x: x), tap.firings.sort()
    device = SimulatedDevice()
    with device:
        place(device, model)
        with torch.no_grad(), writesae.attach(model, sites, edits, accelerate=True, **options) as tap:
            device.waits.clear()
            out = run(model, device.move)
            waits = dict(device.waits)
            firings = tap.firings.sort()
        assert isinstance(out, OnDevice)
    assert all(not isinstance(x, OnDevice) for x in firings.columns().values())
    return expected, (out.inner, firings), waits


def same(expected, got):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    for name in ("row", "position", "layer", "head", "feature"):
        assert torch.equal(getattr(got[1], name), getattr(expected[1], name)), name
    torch.testing.assert_close(got[1].activation, expected[1].activation, rtol=1e-4, atol=1e-4)


def ours(waits):
    return {key: n for key, n in waits.items() if key[1] != "elsewhere"}


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_waits_for_nothing(family):
    """A forward pass of a hooked model waits for the device nowhere in our code; firings come over when asked for."""
    ids = tokens(2, 12)
    expected, got, waits = both(tiny_model(family), lambda model, move: model(move(ids)).logits)
    same(expected, got)
    assert not ours(waits), waits


def test_several_devices():
    """Layers on two devices, as a device_map puts them: every site's work stays with its layer."""
    ids = tokens(2, 12)
    expected, got, waits = both(tiny_model(), lambda model, move: model(move(ids)).logits, place=spread)
    same(expected, got)
    assert {0, 3} <= set(got[1].layer.tolist()) and not ours(waits), waits
    expected, got, _ = both(
        tiny_model(), lambda m, move: m.generate(move(ids), max_new_tokens=4, do_sample=False), place=spread
    )
    same(expected, got)


def test_padding():
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    expected, got, waits = both(tiny_model(), lambda m, move: m(move(ids), attention_mask=move(mask)).logits[:, 4:])
    same(expected, got)
    assert not ((got[1].row == 0) & (got[1].position < 4)).any()


def test_packed():
    ids, positions = tokens(1, 12), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    expected, got, _ = both(
        tiny_model(), lambda m, move: m(move(ids), position_ids=move(positions), use_cache=False).logits
    )
    same(expected, got)
    assert got[1].row.max() == 1


def test_generate():
    ids = tokens(2, 6)
    run = lambda model, move: model.generate(move(ids), max_new_tokens=6, do_sample=False)  # noqa: E731
    expected, got, _ = both(tiny_model(), run)
    same(expected, got)


@pytest.mark.parametrize("when", ["before", "after", ["after", "before", "after"]], ids=str)
def test_edits(when):
    ids, g = tokens(2, 12), torch.Generator().manual_seed(3)
    edits = {
        0: Edits([0, -1, 1], [3, 5, 5], [0, 2, 3], torch.randn(3, K, generator=g), torch.randn(3, V, generator=g),
                 ["add", "delete", "replace"], when)
    }  # fmt: skip
    expected, got, _ = both(tiny_model(), lambda model, move: model(move(ids)).logits, edits=edits)
    same(expected, got)


def test_threshold():
    ids = tokens(2, 12)
    expected, got, _ = both(tiny_model(), lambda m, move: m(move(ids)).logits, sites=dictionaries(threshold=0.2))
    same(expected, got)


def test_nan_is_named():
    """A NaN in a state is still found, at the latest when the context ends, with its place."""
    model = tiny_model()
    device = SimulatedDevice()
    with device:
        device.move(model)
        weight = model.model.layers[3].linear_attn.in_proj_qkv.weight
        with torch.no_grad():
            weight.inner[-1, 0] = float("nan")
        where = "NaN or infinity in the state of layer 3, first at row 0, position 0, head 3"
        with pytest.raises(ValueError, match=where):
            with torch.no_grad(), writesae.attach(model, dictionaries(), self_test=False):
                model(device.move(tokens(2, 12)))


def test_nan_of_the_first_layer_is_named():
    """Of layers on two devices that broke, the earlier; places of a packed batch are those of its sequences."""
    model = tiny_model()
    device = SimulatedDevice()
    with device:
        spread(device, model)
        for layer in (0, 3):
            weight = model.model.layers[layer].linear_attn.in_proj_qkv.weight
            with torch.no_grad():
                weight.inner[-1, 0] = float("nan")
        with pytest.raises(ValueError, match="layer 0, first at row 0, position 0, head 3"):
            with torch.no_grad(), writesae.attach(model, dictionaries(), self_test=False):
                model(device.move(tokens(2, 12)))


@pytest.mark.parametrize("place, devices", [(SimulatedDevice.move, 1), (spread, 2)], ids=["one", "two"])
def test_the_check_is_a_copy_a_call(place, devices):
    """The rule has found what there is to find: for all layers of a device one operation joins it and one copies it."""
    ids, ran = tokens(2, 12), []
    for check in (False, True):
        model, device = tiny_model(), SimulatedDevice()
        with device:
            place(device, model)
            with torch.no_grad(), writesae.attach(model, dictionaries(), check_finite=check, self_test=False) as tap:
                given = device.move(ids)
                model(given)  # which leaves some small things on the device for good
                device.forget()
                for _ in range(2):
                    model(given)
                ran.append(Counter(name for (name, _), n in device.launches.items() for _ in range(n)))
                assert len(tap.firings)
    # Where a device has one such layer, there is nothing to join.
    joined = 2 if devices == 1 else 0
    assert ran[1] - ran[0] == Counter({"aten.cat.out": joined, "aten._to_copy.default": 2 * devices}) + Counter()
    assert not ran[0] - ran[1]


def test_device_refuses_mixing():
    with SimulatedDevice() as device:
        x = device.move(torch.ones(3))
        for other in (torch.ones(3), device.move(torch.ones(3), 1)):
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                x + other
        assert (x.to(DEVICES[1]) + device.move(torch.ones(3), 1)).device == DEVICES[1]
        assert float((x + 1).sum()) == 6 and sum(device.waits.values()) == 1
        assert isinstance(torch.arange(3, device=x.device), OnDevice)
        assert not isinstance(x.cpu(), OnDevice)


@pytest.mark.parametrize("place", [SimulatedDevice.move, spread], ids=["one", "several"])
@pytest.mark.parametrize("family, layers, layer", CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_fork_engine(family, layers, layer, place):
    """The replacement test's engine keeps everything on the device and finds what it finds on the CPU."""
    if family not in FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    lengths, horizon = [23, 17], 4
    places = torch.tensor([[0, 0, 0], [0, 9, 3], [0, 22, 1], [1, 3, 1], [1, 14, 0]]).unbind(1)

    def divergences(model):
        engine = ForkEngine(model, layer, horizon)
        clean = engine.clean(tokens(2, 23), torch.tensor(lengths), lambda writes: Places(*places))
        deltas = fork_changes(engine, clean)[0]
        return engine.divergences(clean, engine.run(clean, deltas), "baseline")

    model = tiny_model(family, layers)
    expected = divergences(model)
    with SimulatedDevice() as device:
        place(device, model)
        got = divergences(model)
    for name, pair in expected.items():
        for a, b in zip(got[name], pair, strict=True):
            torch.testing.assert_close(a.inner, b, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert all(float(x.inner.nan_to_num().abs().max()) == 0 for x in got["native"])


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("place", [SimulatedDevice.move, spread], ids=["one", "several"])
def test_collection_feeds_the_next_batch_first(monkeypatch, place, pads):
    """A source on a device begins the next batch before the last one's firings are there, and does not wait."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # which wrappers of tensors cannot enter
    model, batches = tiny_model(), [tokens(2, 12, seed=i) for i in range(3)]
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 12 - pads :] = 0
    saes = {(layer, head): SAE(K, V, F, 3, layer=layer, head=head) for layer, head in SITES}
    with ModelSource(model, saes, accelerate=True) as source:
        expected = [source.firings(ids, mask).sort() for ids in batches]
    with SimulatedDevice() as device:
        place(device, model)
        with ModelSource(model, saes, accelerate=True) as source:
            assert source.asynchronous
            device.waits.clear()
            later = [source.begin(ids, mask) for ids in batches]
            assert not ours(device.waits), device.waits
            got = [firings().sort() for firings in later]
    for a, b in zip(got, expected, strict=True):
        same((a.activation, a), (b.activation, b))
