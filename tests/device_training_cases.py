"""Training on a simulated device against the CPU; run by test_device.py in a process of its own."""

from __future__ import annotations

import contextlib

import pytest
import torch
from device_cases import spread
from simulated_device import OnDevice, SimulatedDevice
from test_sae_training import config, passages
from tiny_models import tiny_model

from writesae.ops import _dispatch
from writesae.sae import ModelStream, Trainer, evaluate
from writesae.sae.block import Block

SITES = [(0, 1), (3, 2)]


@contextlib.contextmanager
def on_device(monkeypatch):
    """Inside, a model can be moved to the device, whose kernels are the CPU's."""
    with monkeypatch.context() as patch, SimulatedDevice() as device:
        patch.setattr(_dispatch, "choose", lambda op, backend, tensors: "cuda")
        yield device


def train(model, folder=None, resume=False, until=None, sites=SITES, **more):
    """(trainer, dictionaries) of sites of a model, where the model is."""
    with ModelStream(model, passages(24), sites) as stream:
        settings = config(**dict(F=16, steps=16, states=40, block=8, resample_every=8) | more)
        run = Trainer(stream, sites, settings, folder, resume, progress=False)
        return run, run.run(until)


def same(run, saes, expected_run, expected):
    for site, sae in expected.items():
        for name, x in sae.state_dict().items():
            assert not isinstance(saes[site].state_dict()[name], OnDevice)
            torch.testing.assert_close(saes[site].state_dict()[name], x, rtol=2e-3, atol=2e-4)
        assert saes[site].training_record["resampled"] == sae.training_record["resampled"]
    for got, want in zip(run.history, expected_run.history, strict=True):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        dict(path="dense"), dict(path="factored", passages=3, kind="bilinear_tied", steps=8),
        dict(kind="flat", init="states", steps=9), dict(sparsity="jumprelu", steps=9),
        dict(sparsity="gated", steps=9), dict(target="write", steps=9),
        dict(target="write", kind="bilinear_tied", sparsity="pursuit", also_k=1, steps=9),
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)  # fmt: skip
def test_training_where_the_model_is(more, monkeypatch, tmp_path):
    """The same dictionaries to rounding; a run begun on the device goes on on the CPU."""
    expected_run, expected = train(tiny_model(), **more)
    with on_device(monkeypatch) as device:
        model = device.move(tiny_model())
        run, saes = train(model, **more)
        trainer = run.trainers[SITES[0]]
        held = [*trainer.sae.parameters(), trainer.silent, *trainer.optimizer.state[trainer.sae.bias].values()]
        assert all(isinstance(x, OnDevice) for x in held)
        train(model, tmp_path, until=7, **more)
    same(run, saes, expected_run, expected)
    same(*train(tiny_model(), tmp_path, True, **more), expected_run, expected)


def test_a_site_trains_where_its_layer_is(monkeypatch):
    """The tokens go to one device, the layer is on another (this simulation knows gradients on its first one only)."""
    sites = SITES[1:]
    expected_run, expected = train(tiny_model(), sites=sites)
    with on_device(monkeypatch) as device:
        model = tiny_model()
        spread(device, model, first=1)
        assert model.get_input_embeddings().weight.device != model.model.layers[3].linear_attn.A_log.device
        run, saes = train(model, sites=sites)
        assert run.trainers[sites[0]].device.index == 0
    same(run, saes, expected_run, expected)


def test_evaluation_where_the_model_is(monkeypatch):
    saes = train(tiny_model(), steps=3)[1]

    def metrics(model):
        with ModelStream(model, passages(8), SITES) as stream:
            parts = list(stream.writes(torch.arange(8)))
        return {s: evaluate(sae, Block([p[s[0]] for p in parts], s[1])) for s, sae in saes.items()}

    expected = metrics(tiny_model())
    with on_device(monkeypatch) as device:
        got = metrics(device.move(tiny_model()))
    for site in SITES:
        assert got[site] == pytest.approx(expected[site], rel=1e-4)
