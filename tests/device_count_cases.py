"""How much a hooked model asks of a device; run by test_device.py in a process of its own."""

from __future__ import annotations

import device_counting as counting
import pytest

LAYERS = 6


@pytest.fixture(scope="module", autouse=True)
def on_device():
    with counting.simulated(LAYERS) as made:
        yield made


@pytest.mark.parametrize("activations, most", [("exact", 1), ("packed", 3)])
@pytest.mark.parametrize("pads", [0, 4])
def test_a_forward_pass(on_device, activations, most, pads):
    """At most 10 launches a layer, of which the codes are 1 or 3; nothing waits, and nothing goes to the host."""
    _, _, hooked = counting.forward(*on_device, pads=pads, activations=activations)
    kernels = sum(n for (name, _), n in hooked.launches.items() if name.startswith("writesae."))
    assert hooked.ours <= 10 * LAYERS and not hooked.waits and not hooked.nbytes
    assert hooked.ours - kernels <= LAYERS * most + 3


def test_a_step_of_decoding(on_device):
    """Beside the kernels of the rule and of encode, nothing is launched; as much for one row and head as for many."""
    plain, _, hooked = counting.decoding(*on_device)
    assert hooked.total - plain.total <= 40 * LAYERS / 18 and not hooked.waits and not hooked.nbytes
    assert {name for name, place in hooked.launches if place != "elsewhere"} == {
        "writesae.gated_delta_rule.default", "writesae.encode_topk.default",
    }  # fmt: skip
    _, _, more = counting.decoding(*on_device, rows=5)
    assert more.ours == hooked.ours


def test_a_step_of_decoding_with_beams(on_device):
    """Reordered states are read anew, in so many launches a layer whatever the rows."""
    found = [counting.decoding(*on_device, rows=rows, beams=True) for rows in (2, 6)]
    plain, _, hooked = found[0]
    assert hooked.total - plain.total <= 40 * LAYERS / 18 and not hooked.waits
    assert hooked.ours == found[1][2].ours <= 11 * LAYERS


def test_generate(on_device):
    plain, hooked = counting.generated(*on_device)
    assert hooked - plain <= 40 * LAYERS / 18


@pytest.mark.parametrize("activations, size", [("exact", 6), ("packed", 4)])
@pytest.mark.parametrize("pads", [0, 5])
def test_a_batch_of_a_collection(on_device, activations, size, pads):
    """All firings of a batch cross in one copy, of as many bytes as they take; pads do not. Beside them the mask."""
    begun, ended, firings = counting.collected(*on_device, activations, pads)
    checks = LAYERS  # of 16 bytes each
    assert firings == (2 * 12 - pads) * len(on_device[2]) * counting.TOP
    assert begun.copies <= 1 + checks and begun.nbytes <= size * firings + 4 * 24 + 16 * checks
    assert not begun.waits and not ended.waits and not ended.nbytes


@pytest.mark.parametrize("activations, size", [("exact", 6), ("packed", 4)])
def test_what_is_asked_for(on_device, activations, size):
    """Counts of a site are made on the device, without a wait; firings cross when asked for, in one copy."""
    there, here, firings = counting.asked(*on_device, activations)
    assert not there.waits and not there.nbytes and there.ours <= 16
    assert here.copies == 1 and here.nbytes == size * firings
