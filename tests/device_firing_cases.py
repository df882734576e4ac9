"""Firings that stay on a device, and what decoding there goes on from; run by test_device.py, in their own process."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from device_cases import _kernels, both, dictionaries, same, spread  # noqa: F401
from simulated_device import DEVICES, OnDevice, SimulatedDevice
from tiny_models import tiny_model, tokens

import writesae
from writesae.firings import LazyFirings
from writesae.models import gather
from writesae.models.grid import rounded

STEPS = 4


@pytest.fixture
def product(monkeypatch):
    """Counts how often activations are read off whole states on a device."""
    calls = []
    encode = sys.modules["writesae.ops.encode"]
    original = encode._of_states
    monkeypatch.setattr(encode, "_of_states", lambda *given: calls.append(1) or original(*given))
    return calls


def decode(model, move, between=lambda cache, step, move: cache, rows=2):
    """Logits of a prompt and of STEPS tokens on its cache; between: what happens to the cache before each."""
    out = model(move(tokens(rows, 6)), use_cache=True)
    cache, found = out.past_key_values, [out.logits[:, -1:]]
    for step in range(STEPS):
        cache = between(cache, step, move)
        out = model(move(tokens(rows, 1, seed=step)), past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


def halve(cache, step, move):
    for layer in cache.layers:
        if step == 2 and hasattr(layer, "recurrent_states"):
            layer.recurrent_states[0].mul_(0.5)
    return cache


def reorder(cache, step, move):
    if step in (1, 2):
        cache.reorder_cache(move(torch.tensor([1, 0])))
    return cache


def copied(cache, step, move):
    if step != 2:
        return cache
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        for name in ("recurrent_states", "conv_states"):
            if hasattr(layer, name):
                setattr(layer, name, {i: x.clone() for i, x in getattr(layer, name).items()})
    return new


@pytest.mark.parametrize("between, read", [(lambda cache, step, move: cache, 1), (halve, 2), (reorder, 3), (copied, 2)],
                         ids=["straight", "changed", "reordered", "copied"])  # fmt: skip
def test_decoding_goes_on_from_its_sums(product, between, read):
    """Sums are read off the state once after the prompt and whenever it is not what the last step left, and nothing
    waits. Two layers have dictionaries."""
    model = tiny_model()
    expected, got, waits = both(model, lambda m, move: decode(m, move, between))
    same(expected, got)
    mine = {key: n for key, n in waits.items() if key[1] != "elsewhere"}
    assert len(product) == 2 * read and not mine, (len(product), waits)


def test_a_failed_step_leaves_no_sums(product):
    """The layers before the failure have moved on, and their caches with them; the next step reads what is there."""

    def run(model, move):
        fails = []

        def hook(module, *given):
            if fails:
                raise KeyboardInterrupt

        def between(cache, step, move):
            if step == 2:
                fails.append(1)
                with pytest.raises(KeyboardInterrupt):
                    model(move(tokens(2, 1, seed=9)), past_key_values=cache, use_cache=True)
                fails.clear()
            return cache

        handle = model.model.layers[2].register_forward_pre_hook(hook)
        try:
            return decode(model, move, between)
        finally:
            handle.remove()

    expected, got, _ = both(tiny_model(), run)
    same(expected, got)
    # Both layers after the prompt; layer 0, whose state the failed step changed; layer 3 was not reached.
    assert len(product) == 2 + 1


def test_writes_of_a_step_start_from_the_state_before(product):
    """`tap.writes` of a step outlive the next one, though the state that they start from is not copied."""
    model = tiny_model()

    def states(move, device=None):
        found = []
        with torch.no_grad(), writesae.attach(model, dictionaries(), accelerate=True) as tap:
            cache = model(move(tokens(2, 6)), use_cache=True).past_key_values
            for step in range(3):
                model(move(tokens(2, 1, seed=step)), past_key_values=cache, use_cache=True)
                found.append(tap.writes[0].initial_state)
        return found

    expected = states(lambda x: x)
    with SimulatedDevice() as device:
        got = states(SimulatedDevice.move.__get__(device)) if device.move(model) is model else []
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.inner, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", ["exact", "packed"])
@pytest.mark.parametrize("how", ["at once", "after others", "too many", "each alone"])
def test_firings_stay(monkeypatch, activations, how):
    """Device and host agree, in the order of calls, however many there are and whenever they move."""
    if how == "too many":  # every call is sent over
        monkeypatch.setattr(gather, "ON_DEVICE", 100)
    if how == "each alone":
        monkeypatch.setattr(gather, "_LARGE", 0)
    model, ids, mask = tiny_model(), tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0

    def run(move):
        with torch.no_grad(), writesae.attach(model, dictionaries(), accelerate=True, activations=activations) as tap:
            for _ in range(3):
                model(move(ids), attention_mask=move(mask))
                if how == "after others":
                    assert len(tap.firings) and len(tap.device_firings)
            return tap.firings, tap.device_firings

    expected, _ = run(lambda x: x)
    with SimulatedDevice() as device:
        device.move(model)
        host, there = run(device.move)
        assert isinstance(host, LazyFirings) and not isinstance(host.row, OnDevice)
        if how == "too many":
            assert not isinstance(there.row, OnDevice)  # they have left
        else:
            assert there.device == DEVICES[0] and isinstance(there.row, OnDevice)
            assert isinstance(there.sort().feature, OnDevice) and isinstance(there[3:9].head, OnDevice)
            device.forget()
            counts, of_one = there.counts(0, 3, 24), there.of_site(0, 3)
            assert not device.waits and not device.to_host
            assert torch.equal(counts.inner, torch.bincount(host.of_site(0, 3).feature, minlength=24))
            same((0 * counts.inner, of_one.cpu()), (0 * counts.inner, host.of_site(0, 3)))
            loud = there[there.activation > 0.5].cpu()
            same((0 * counts.inner, loud), (0 * counts.inner, host[host.activation > 0.5]))
            same((0 * counts.inner, there.cpu()), (0 * counts.inner, host))
    same((torch.zeros(1), expected), (torch.zeros(1), host))
    if activations == "packed":
        assert torch.equal(host.activation, rounded(host.activation, 24))


def test_firings_of_several_devices():
    model = tiny_model()
    with SimulatedDevice() as device:
        spread(device, model)
        with torch.no_grad(), writesae.attach(model, dictionaries(), accelerate=True) as tap:
            model(device.move(tokens(2, 12)))
            assert len(tap.firings)
            with pytest.raises(ValueError, match="device_firings: expected all hooked layers on one device, got sim"):
                tap.device_firings  # noqa: B018


def test_threshold_firings_on_the_device():
    model = tiny_model()
    with SimulatedDevice() as device:
        device.move(model)
        with torch.no_grad(), writesae.attach(model, dictionaries(threshold=0.2), accelerate=True) as tap:
            model(device.move(tokens(2, 12)))
            assert len(tap.firings) == len(tap.device_firings) > 0
