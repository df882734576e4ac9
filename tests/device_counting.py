"""What a hooked model asks of a device, counted on a simulated one: launches, waits, bytes to the host. For
device_count_cases.py and scripts/device_counts.py; in a process of its own, like everything on a simulated device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
from simulated_device import SimulatedDevice
from tiny_models import tiny_model, tokens

import writesae
from writesae import SAE
from writesae.collect.source import ModelSource
from writesae.models import gather
from writesae.ops import _dispatch

LAYERS, HEADS = 18, 16  # with dictionaries: the linear layers of Qwen3.5-0.8B
K, V, F, TOP = 8, 6, 64, 4


# Launches of our operators by csrc/cuda, for one group of heads, as the twin counts them (test_host_twin.py): of whole
# sequences, of sequences cut into segments to fill the device (few rows and heads), of one token of every row. A scan
# clears where it notes a NaN, prepares and walks; of segments it walks and joins first. encode cuts, packs and encodes;
# of segments it forms and combines their states first. Of one token it sums and selects.
KERNELS = {"gated_delta_rule": (3, 5, 3), "encode_topk": (3, 6, 2)}
WHOLE, SEGMENTS, TOKEN = range(3)


@dataclass
class Counts:
    """Of one call of a model, or of one step.

    Attributes:
        launches: operations on the device and kernels of our operators, by (operation, line that asks or "elsewhere").
        waits: by what waits, in this package.
        nbytes, copies: to the host.
    """

    launches: Counter
    waits: dict
    nbytes: int
    copies: int

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    @property
    def ours(self) -> int:
        """Launches that this package asks for."""
        return sum(n for (_, place), n in self.launches.items() if place != "elsewhere")


def _model(layers: int, heads: int):
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * (layers // 3)
    sites = {(i, h): SAE(K, V, F, TOP, layer=i, head=h) for i, kind in enumerate(kinds) for h in range(heads)
             if kind == "linear_attention"}  # fmt: skip
    return tiny_model("qwen3_5", kinds, heads=heads, key_heads=heads, K=K, V=V), sites


@contextlib.contextmanager
def simulated(layers: int = LAYERS, heads: int = HEADS) -> Iterator[tuple[SimulatedDevice, torch.nn.Module, dict]]:
    """(device, model on it, dictionaries of every head of so many layers), our kernels chosen as on a GPU."""
    model, sites = _model(layers, heads)
    with (
        patch.object(_dispatch, "choose", lambda op, backend, tensors: "cuda"),
        patch.object(torch, "inference_mode", torch.no_grad),  # which wrappers of tensors cannot enter
        SimulatedDevice() as device, torch.no_grad(),
    ):  # fmt: skip
        yield device, device.move(model), sites


def counted(device: SimulatedDevice, run: Callable, kind: int = WHOLE) -> Counts:
    """What `run()` asks for. kind: what it runs, WHOLE, SEGMENTS or TOKEN."""
    device.forget()
    run()
    launches: Counter = Counter()
    for (name, place), n in device.launches.items():
        kernels = KERNELS[name.split(".")[1]][kind] if name.startswith("writesae.") else 1
        launches[name, place] += n * kernels
    waits = {key: n for key, n in device.waits.items() if key[1] != "elsewhere"}
    return Counts(launches, waits, device.to_host, device.copies_to_host)


@contextlib.contextmanager
def large() -> Iterator[None]:
    """Codes are taken for as many as a long prompt has: narrowed at once."""
    with patch.object(gather, "_LARGE", 0):
        yield


def forward(device, model, sites, pads: int = 0, kind: int = WHOLE, **options) -> tuple[Counts, Counts, Counts]:
    """(plain, hooked, hooked without the finite check) of one forward pass of 2 x 12 tokens."""
    ids, mask = device.move(tokens(2, 12)), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :pads] = 0
    mask = device.move(mask)
    run = lambda: model(ids, attention_mask=mask if pads else None, use_cache=False)  # noqa: E731
    found = [counted(device, run, kind)]
    for check in (True, False):
        with writesae.attach(model, sites, accelerate=True, check_finite=check, **options), large():
            run()
            found.append(counted(device, run, kind))
    return found[0], found[1], found[2]


def decoding(device, model, sites, rows: int = 2, beams: bool = False) -> tuple[Counts, Counts, Counts]:
    """The same of the third step of decoding on a cache; beams: which are reordered after each."""
    ids, order = device.move(tokens(rows, 1)), device.move(torch.arange(rows).flip(0))

    def third():
        cache = model(device.move(tokens(rows, 12)), use_cache=True).past_key_values
        for _ in range(2):
            model(ids, past_key_values=cache, use_cache=True)
            if beams:
                cache.reorder_cache(order)
        return counted(device, lambda: model(ids, past_key_values=cache, use_cache=True), kind=TOKEN)

    found = [third()]
    for check in (True, False):
        with writesae.attach(model, sites, accelerate=True, check_finite=check):
            found.append(third())
    return found[0], found[1], found[2]


def generated(device, model, sites) -> tuple[float, float]:
    """(plain, hooked) launches of one more token of `generate`."""
    ids = device.move(tokens(2, 4))

    def more() -> float:
        runs = (lambda n=n: model.generate(ids, max_new_tokens=n, do_sample=False) for n in (4, 8))
        short, long = (counted(device, run, kind=TOKEN).total for run in runs)  # the prompt's part cancels
        return (long - short) / 4

    plain = more()
    with writesae.attach(model, sites, accelerate=True):
        return plain, more()


def collected(device, model, sites, activations: str, pads: int = 0) -> tuple[Counts, Counts, int]:
    """(begin, end, firings) of a batch of a collection: what feeds it, and what asks for its firings."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 12 - pads :] = 0
    with ModelSource(model, sites, accelerate=True, activations=activations) as source, large():
        source.firings(ids, mask)
        later: list[Callable] = []
        begun = counted(device, lambda: later.append(source.begin(ids, mask)))
        found: list = []
        ended = counted(device, lambda: found.append(len(later[0]())))
    return begun, ended, found[0]


def asked(device, model, sites, activations: str) -> tuple[Counts, Counts, int]:
    """(counts of one site on the device, all firings to the host, their number) after a forward pass."""
    with writesae.attach(model, sites, accelerate=True, check_finite=False, activations=activations) as tap:
        model(device.move(tokens(2, 12)), use_cache=False)
        layer, head = next(iter(sites))
        there = counted(device, lambda: tap.device_firings.counts(layer, head, F))
        found: list = []
        here = counted(device, lambda: found.append(len(tap.firings)))
    return there, here, found[0]
