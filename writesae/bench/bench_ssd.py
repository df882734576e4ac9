"""`ssd` on the CPU against transformers' own chunk scan, interleaved, at Granite's and Bamba's size (V = 64, K = 256),
and against its arithmetic at Mamba-2's (V = 64, K = 128) too.

Rates count 4 K V floating-point operations a token and head (two multiply-adds a state element), the least the
token-by-token form can do. The sum with D x is in the time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .. import ops
from .bench_gated_delta_rule import AGREE
from .case import Case, Options, Row, agree
from .timing import compare, floor_row

V, K, GROUPS, CHUNK = 64, 256, 1, 256


def _inputs(T: int, H: int, K: int = K) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    dt = softplus(normal(1, T, H) - 4)  # steps of about 0.02, as trained models have them
    B, C = (normal(1, T, GROUPS, K) / K**0.25 for _ in range(2))
    return {"x": normal(1, T, H, V), "dt": dt, "A": -torch.arange(1.0, H + 1), "B": B, "C": C, "D": normal(H)}


@torch.no_grad()
def scan(options: Options) -> Iterator[Row]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    T, H = (256, 4) if options.quick else (2048, 16)
    x = _inputs(T, H)

    def ours():
        return ops.ssd(**x, output_final_state=True)

    def theirs():
        return mamba2_chunk_scan(
            x["x"], x["dt"], x["A"], x["B"], x["C"], CHUNK, D=x["D"], return_final_states=True
        )  # fmt: skip

    name = f"ssd, T = {T:,}, {H} heads, {K} x {V}, fp32"
    out, (o, state) = ours(), theirs()
    agree(name, out.final_state, state.transpose(-1, -2), AGREE)
    agree(name, out.o, o, AGREE)
    row = compare(name, "transformers' chunk scan", "x faster", ours, theirs, options.rounds())
    yield row.does(4 * K * V * T * H, "GFLOP/s", "float32")
    H = 4 if options.quick else 32
    for size in (128, 256):
        x = _inputs(T, H, size)
        yield floor_row(
            f"ssd, T = {T:,}, {H} heads, {size} x {V}, fp32: processor time",
            lambda x=x: ops.ssd(**x, output_final_state=True), 4 * size * V * T * H, options.rounds(),
        )  # fmt: skip


@torch.no_grad()
def step(options: Options) -> Iterator[Row]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    H = 16
    x = _inputs(1, H)
    now = {name: value[:, 0] if name in ("x", "dt", "B", "C") else value for name, value in x.items()}
    wide = {name: now[name][..., None].expand(1, H, V) for name in ("dt",)}
    A, D = now["A"][:, None, None].expand(H, V, K), now["D"][:, None].expand(H, V)
    start = torch.randn(1, H, K, V, generator=torch.Generator().manual_seed(0))
    state, turned = start.clone(), start.transpose(-1, -2).contiguous()

    def ours():
        return ops.ssd_step(**now, state=state).o

    def theirs():
        return mamba2_selective_state_update(turned, now["x"], wide["dt"], A, now["B"], now["C"], D)

    name = f"ssd, one token, {H} heads, {K} x {V}, fp32"
    agree(name, ours(), theirs(), AGREE)
    row = compare(name, "transformers' state update", "x faster", ours, theirs, 20 * options.rounds(), warmup=20)
    yield row.does(4 * K * V * H, "GFLOP/s", "float32")


CASES = [
    Case("ssd", "ssd, T = 2,048, 16 and 32 heads, 256 and 128 x 64, fp32", scan, "transformers' chunk scan"),
    Case("ssd-step", "ssd, one token, 16 heads, 256 x 64, fp32", step, "transformers' state update"),
]
