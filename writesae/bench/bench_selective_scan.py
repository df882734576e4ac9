"""`selective_scan` on the CPU against transformers' own recurrence, interleaved, at Mamba-130m's size (1,536 channels
of 16 keys), and against its exponentials alone, one an entry of the state and token, as torch makes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import ops
from .bench_gated_delta_rule import AGREE
from .case import Case, Options, Row, agree
from .timing import compare

V, K = 1536, 16


def _inputs(T: int) -> dict[str, Tensor]:
    """As a model makes them: x and dt lie channel by channel, and A is -1, ..., -K in every channel, nearly."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, K + 1) * (1 + 0.1 * normal(V, K))
    x, dt = normal(1, V, T).transpose(1, 2), softplus(normal(1, V, T) - 4).transpose(1, 2)
    return {"x": x, "dt": dt, "A": A, "B": normal(1, T, K), "C": normal(1, T, K), "D": normal(V)}


def _theirs(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    turned = {name: x[name].transpose(1, 2) for name in ("x", "dt", "B", "C")}
    o, state = mamba_selective_scan(
        turned["x"], turned["dt"], x["A"], turned["B"], turned["C"], D=x["D"], return_last_state=True
    )
    return o.transpose(1, 2), state.transpose(1, 2)[:, None]


@torch.no_grad()
def scan(options: Options) -> Iterator[Row]:
    T = 256 if options.quick else 2048
    x = _inputs(T)

    def ours():
        return ops.selective_scan(**x, output_final_state=True)

    exponents, found = -torch.rand(V * K, generator=torch.Generator().manual_seed(0)), torch.empty(V * K)

    def exponentials():
        for _ in range(T):
            torch.exp(exponents, out=found)

    name = f"selective_scan, T = {T:,}, {V:,} channels, {K} keys, fp32"
    out, (o, state) = ours(), _theirs(x)
    agree(name, out.final_state, state, AGREE)
    agree(name, out.o, o, AGREE)
    del out, o, state
    yield compare(
        name, "transformers' recurrence", "x faster", ours, lambda: _theirs(x), options.rounds(), target=5.0
    )  # fmt: skip
    yield compare(name, "its exponentials alone", "x time", ours, exponentials, options.rounds(), target=1.3)


@torch.no_grad()
def step(options: Options) -> Iterator[Row]:
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    x = _inputs(1)
    now = {name: value if name in "AD" else value[:, 0] for name, value in x.items()}
    start = torch.randn(1, 1, K, V, generator=torch.Generator().manual_seed(0))
    state, turned = start.clone(), start[:, 0].transpose(1, 2).contiguous()

    def ours():
        return ops.selective_scan_step(**now, state=state).o

    def theirs():
        return mamba_selective_state_update(turned, now["x"], now["dt"], now["A"], now["B"], now["C"], now["D"])

    name = f"selective_scan, one token, {V:,} channels, {K} keys, fp32"
    agree(name, ours(), theirs(), AGREE)
    yield compare(name, "transformers' state update", "x faster", ours, theirs, 20 * options.rounds(), warmup=20)


def backward(options: Options) -> Iterator[Row]:
    T = 64 if options.quick else 512
    x = {name: value.requires_grad_() for name, value in _inputs(T).items()}
    weight = torch.randn(1, T, V, generator=torch.Generator().manual_seed(1))

    def ours():
        return torch.autograd.grad(ops.selective_scan(**x).o, list(x.values()), weight)

    def theirs():
        return torch.autograd.grad(_theirs(x)[0], list(x.values()), weight)

    name = f"selective_scan, forward and backward, T = {T:,}, {V:,} channels, {K} keys, fp32"
    for a, b in zip(ours(), theirs(), strict=True):
        agree(name, a, b, AGREE)
    yield compare(name, "transformers' recurrence", "x faster", ours, theirs, options.rounds())


CASES = [
    Case("selective-scan", "selective_scan, T = 2,048, 1,536 channels, fp32", scan, "transformers' recurrence"),
    Case("selective-scan-step", "selective_scan, one token, fp32", step, "transformers' state update"),
    Case("selective-scan-backward", "selective_scan, backward, T = 512, fp32", backward, "transformers' recurrence"),
]
