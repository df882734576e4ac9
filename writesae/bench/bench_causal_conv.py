"""The short convolution before the recurrence, against transformers' own on the layout its layers hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import ops
from .case import Case, Missing, Options, Row, agree
from .timing import interleaved, median_and_spread

T, D, W = 1024, 6144, 4  # q, k and v of 16 heads of 128


@torch.no_grad()
def against_transformers(options: Options) -> Iterator[Row]:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as peer

    if not hasattr(peer, "causal_conv1d_fn"):
        raise Missing("this transformers keeps the convolution on the layer")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((1, T, D), (D, W)))

        def ours(x=x, weight=weight):
            return ops.causal_conv(x, weight, activation="silu")

        def theirs(x=x, weight=weight):
            return peer.causal_conv1d_fn(x.transpose(1, 2), weight, None, activation="silu").transpose(1, 2)

        agree("causal_conv", ours(), theirs(), tolerance)
        seconds, others = interleaved([ours, theirs], options.rounds())
        ratio, spread = median_and_spread([b / a for a, b in zip(seconds, others, strict=True)])
        name = f"short convolution, {T:,} tokens, {D:,} channels, {str(dtype).split('.')[1]}"
        row = Row(name, PEER, ratio, "x faster", spread=spread, seconds=median_and_spread(seconds)[0])
        yield row.does(2 * x.numel() * x.element_size(), "GB/s", "copy")


PEER = "transformers' conv1d and SiLU"
CASES = [Case("causal-conv", "short convolution", against_transformers, PEER, ("copy",))]
