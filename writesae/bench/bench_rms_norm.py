"""The gated norm after the recurrence and the norm before a block, against transformers' own modules."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import ops
from .case import Case, Options, Row, agree
from .timing import interleaved, median_and_spread

T, H, V, HIDDEN = 1024, 16, 128, 1024


@torch.no_grad()
def against_transformers(options: Options) -> Iterator[Row]:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as peer

    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        o, gate, x = (torch.randn(*size, generator=generator).to(dtype) for size in ((T * H, V),) * 2 + ((T, HIDDEN),))
        gated, block = peer.Qwen3_5RMSNormGated(V).to(dtype), peer.Qwen3_5RMSNorm(HIDDEN).to(dtype)
        arms = [
            (
                f"gated norm, {T:,} tokens, {H} heads of {V}", 3 * o.numel(),
                lambda o=o, gate=gate, m=gated: ops.rms_norm(o, m.weight, gate),
                lambda o=o, gate=gate, m=gated: m(o, gate),
            ),
            (
                f"norm, {T:,} tokens, {HIDDEN:,} channels", 2 * x.numel(),
                lambda x=x, m=block: ops.rms_norm(x, m.weight, zero_centred=True, round_once=True),
                lambda x=x, m=block: m(x),
            ),
        ]  # fmt: skip
        for what, moved, ours, theirs in arms:
            agree("rms_norm", ours(), theirs(), tolerance)
            seconds, others = interleaved([ours, theirs], options.rounds(25))
            ratio, spread = median_and_spread([b / a for a, b in zip(seconds, others, strict=True)])
            name = f"{what}, {str(dtype).split('.')[1]}"
            row = Row(name, PEER, ratio, "x faster", spread=spread, seconds=median_and_spread(seconds)[0])
            yield row.does(moved * o.element_size(), "GB/s", "copy")


PEER = "transformers' modules"
CASES = [Case("rms-norm", "RMS norms", against_transformers, PEER, ("copy",))]
