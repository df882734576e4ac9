"""Kernels that nothing chooses until a card has proven them, for bench/gpu.sh: the product of `encode` by Hopper's own
units (csrc/cuda/encode_product_hopper.cu), against `torch.mm` in bf16, which writes half as many bytes.

The share is that of copying: at F = 2,048 the float32 result outweighs everything else that is moved, and the product
itself would take a quarter of the time. That it runs at all, and to what error, is what a first row is for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from writesae.bench.case import Case, Missing, Options, Row, agree
from writesae.bench.gpu import Gpu

FEATURES, TOKENS, SIZE = 2048, 32768, 128
AGREE = 1e-2  # relative RMS against a result rounded to bf16


@torch.no_grad()
def product(options: Options) -> Iterator[Row]:
    gpu = Gpu(options)
    if not gpu.dry and torch.cuda.get_device_capability() != (9, 0):
        raise Missing("a card of compute capability 9.0")
    operators = torch.ops.writesae_twin if gpu.dry else torch.ops.writesae_prototypes
    F, T = (130, 140) if gpu.dry else (FEATURES, TOKENS)
    generator = torch.Generator().manual_seed(0)
    v, left = (torch.randn(n, SIZE, generator=generator).bfloat16().to(gpu.device) for n in (F, T))
    for kernel in ("hopper", "hopper ping-pong"):
        for cluster in (1, 2):

            def ours(kernel=kernel, cluster=cluster):
                return operators.encode_product(v, left, kernel, cluster)

            def theirs():
                return v @ left.T

            name = f"product of {FEATURES:,} features and {TOKENS:,} tokens, {kernel}, clusters of {cluster}"
            agree(name, ours(), theirs().float(), AGREE)
            row = gpu.ratio(name, "torch.mm, bf16", "x faster", ours, theirs)
            yield gpu.bound(row, 2 * (F + T) * SIZE + 4 * F * T, "GB/s", "copy")


CASES = [Case("gpu-product", "encode's product by wgmma and TMA, a prototype", product, "torch.mm, bf16", ())]
