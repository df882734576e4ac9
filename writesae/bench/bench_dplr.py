"""`dplr` on the CPU, as RWKV-7 and as GLA, against the recurrence token by token in torch, interleaved.

Rates count 8 K V floating-point operations a token and head with an erase (four multiply-adds a state element), 4 K V
without, the least the token-by-token form can do beside its gate. Floors count the gate too, as one operation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import ops
from .bench_gated_delta_rule import AGREE
from .case import Case, Options, Row, agree
from .timing import compare, floor_row

SIZE = 64


def _inputs(T: int, H: int, erase: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1, T, H, SIZE, generator=generator)

    # RWKV-7's gates lie between e^-0.607 and 1.
    x = {"q": normal(), "k": normal() / SIZE**0.5, "v": normal(), "g": -0.606531 * torch.sigmoid(normal())}
    if not erase:
        return x
    kappa = normalize(normal(), dim=-1)
    return x | {"a": kappa, "b": -torch.sigmoid(normal()) * kappa}


def _token(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor | None = None, b: Tensor | None = None):
    """The next state `[1, H, K, V]`, and what it reads."""
    new = g.exp()[..., None] * state + k[..., None] * v[..., None, :]
    if a is not None and b is not None:
        new = new + b[..., None] * (a[..., None, :] @ state)
    return new, (q[..., None, :] @ new)[..., 0, :]


def _loop(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    _, T, H, K = x["k"].shape
    state, o = torch.zeros(1, H, K, x["v"].shape[-1]), torch.empty_like(x["v"])
    for t in range(T):
        state, o[:, t] = _token(state, **{name: value[:, t] for name, value in x.items()})
    return o, state


@torch.no_grad()
def scan(options: Options) -> Iterator[Row]:
    T, H = (256, 4) if options.quick else (2048, 32)
    for rule, erase in (("RWKV-7", True), ("GLA", False)):
        x = _inputs(T, H, erase)

        def ours(x=x):
            return ops.dplr(**x, output_final_state=True)

        def theirs(x=x):
            return _loop(x)

        name = f"{rule}, T = {T:,}, {H} heads, {SIZE} x {SIZE}, fp32"
        out, (o, state) = ours(), theirs()
        agree(name, out.final_state, state, AGREE)
        agree(name, out.o, o, AGREE)
        row = compare(name, "token by token in torch", "x faster", ours, theirs, options.rounds(5))
        work = (8 if erase else 4) * SIZE * SIZE * T * H
        yield row.does(work, "GFLOP/s", "float32")
        yield floor_row(f"{name}: processor time", ours, work + SIZE * SIZE * T * H, options.rounds(15))


@torch.no_grad()
def step(options: Options) -> Iterator[Row]:
    H = 32
    x = {name: value[:, 0] for name, value in _inputs(1, H, True).items()}
    state = torch.randn(1, H, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    kept = [state.clone()]

    def ours():
        return ops.dplr_step(**x, state=state).o

    def theirs():
        kept[0], o = _token(kept[0], **x)
        return o

    name = f"RWKV-7, one token, {H} heads, {SIZE} x {SIZE}, fp32"
    agree(name, ours(), theirs(), AGREE)
    row = compare(name, "the same in torch", "x faster", ours, theirs, 20 * options.rounds(), warmup=20)
    yield row.does(8 * SIZE * SIZE * H, "GFLOP/s", "float32")


CASES = [
    Case("dplr", "dplr, T = 2,048, 32 heads, 64 x 64, fp32", scan, "token by token in torch"),
    Case("dplr-step", "dplr, one token, 32 heads, 64 x 64, fp32", step, "the same in torch"),
]
