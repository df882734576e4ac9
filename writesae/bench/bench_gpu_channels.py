"""Scans with a gate of each key channel on a GPU, forward and backward, against the gated delta rule with a gate of a
head in the same run: Kimi Delta Attention, and `dplr` as GLA and as RWKV-7. bf16, one key head a value head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from .. import ops
from ..ops.rule import RuleOutput
from ..testing import gated_delta_rule_inputs
from .case import Case, Options, Row, agree
from .gpu import Gpu

AGREE = 2e-2  # relative RMS of two bf16 computations
PEER = "a gate of each head"
SHAPES = ((1, 8192, 32, 128), (4, 4096, 32, 64))


def _rules(gpu: Gpu, B: int, T: int, H: int, size: int) -> Iterator[tuple[str, Callable[..., RuleOutput], dict]]:
    """(name, function, inputs), the peer first."""
    x = gated_delta_rule_inputs(B, T, H, H, size, size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(B, T, H, size, generator=generator)

    x["k"] = normalize(x["k"].float(), dim=-1).bfloat16()
    g, x["g"], kappa = 0.1 * logsigmoid(normal()), x["g"].float(), normalize(normal(), dim=-1)
    scaled = {"q": x["q"] * size**-0.5, "k": x["k"], "v": x["v"], "g": g}
    erase = {"a": kappa.bfloat16(), "b": (-torch.sigmoid(normal()) * kappa).bfloat16()}
    yield PEER, ops.gated_delta_rule, gpu.put(x)
    yield "KDA", ops.gated_delta_rule, gpu.put(x | {"g": g})
    yield "GLA", ops.dplr, gpu.put(scaled)
    yield "RWKV-7", ops.dplr, gpu.put(scaled | erase)


def _backward(x: dict[str, Tensor], run: Callable[..., RuleOutput]) -> Callable[[], tuple[Tensor, ...]]:
    """Of the gradients of o and of the final state, to those of the inputs."""
    leaves = {key: value.detach().requires_grad_() for key, value in x.items()}
    out = run(leaves)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(y.shape, generator=generator).to(y) for y in (out.o, out.final_state)]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad((out.o, out.final_state), list(leaves.values()), given, retain_graph=True)

    return backward


def _rows(options: Options, gradient: bool) -> Iterator[Row]:
    gpu = Gpu(options)
    for B, T, H, size in SHAPES:
        sizes = (1, 70, 1, size) if gpu.dry else (B, T, H, size)
        runs: dict[str, Callable[[], object]] = {}
        for rule, function, x in _rules(gpu, *sizes):
            name = f"{rule}, {B} x {T:,}, {H} heads of {size}, bf16{': backward' if gradient else ''}"

            def run(x=x, function=function, backend=gpu.backend):
                return function(**x, output_final_state=True, backend=backend)

            few = {key: value[:, :200] for key, value in x.items()}
            if gradient:
                ours = _backward(x, run)
                exact = _backward(few, partial(run, backend="reference"))()
                for key, got, wanted in zip(few, _backward(few, run)(), exact, strict=True):
                    agree(f"{name} against the reference: d{key}", got, wanted, AGREE)
            else:
                agree(f"{name} against the reference", run(few).o, run(few, backend="reference").o, AGREE)
                ours = run
            runs[rule] = ours
            if rule != PEER:
                yield gpu.ratio(name, PEER, "x time", ours, runs[PEER])


@torch.no_grad()
def sequences(options: Options) -> Iterator[Row]:
    yield from _rows(options, gradient=False)


def backward(options: Options) -> Iterator[Row]:
    yield from _rows(options, gradient=True)


CASES = [
    Case("gpu-channels", "scans with a gate of each channel on a GPU, bf16", sequences, PEER, ()),
    Case("gpu-channels-backward", "their backward on a GPU, bf16", backward, PEER, ()),
]
