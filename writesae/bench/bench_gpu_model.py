"""A full-size random Qwen3.5-0.8B on a GPU, hooked against plain, and firings collected a second to Parquet.

The peer is the same model on our scan with nothing hooked, so that the ratio is what hooking costs; and, in a case of
its own, the plain model on flash-linear-attention. The plain model's own torch code is no peer on a GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import writesae

from .bench_model import LAYER, QWEN3_5, F, FullSize
from .case import Case, Disagree, Missing, Options, Row
from .gpu import Gpu
from .timing import ratio_row

TOKENS = 8192
ROUNDS, FEWEST, PATIENCE = 8, 4, 15.0  # of one arm: at most, at least, and seconds after which no other begins
COLLECTED = 100_000  # tokens; a firing is written for each of 16 heads x 32
OURS, FLA = "the same model on our scan, unhooked", "plain model on flash-linear-attention"


def _model(gpu: Gpu) -> tuple[FullSize, torch.nn.Module]:
    """The model on the device; in a dry run one of the same classes in small, on the CPU kernels."""
    shape = TINY if gpu.dry else QWEN3_5
    return shape, shape.random(torch.bfloat16).to(gpu.device)


def _tiny():
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            vocab_size=16_384, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, linear_num_key_heads=1, linear_num_value_heads=2,
            linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, tie_word_embeddings=True,
        )
    )  # fmt: skip


TINY = FullSize("Qwen3.5 in small", _tiny, 2, 16, 16, (0, 1, 2), ((1.0, 1.0), (1.0, 1.0)))


@torch.no_grad()
def _hooked(peer: str, options: Options) -> Iterator[Row]:
    gpu = Gpu(options)
    name = f"Qwen3.5-0.8B (random) bf16, {TOKENS:,} tokens"
    if peer == FLA and importlib.util.find_spec("fla") is None:
        raise Missing("flash-linear-attention is not installed")
    shape, model = _model(gpu)
    layer, tokens = (shape.layers[-1], 100) if gpu.dry else (LAYER, TOKENS)
    arms = ((f"16 heads of layer {LAYER}", [layer], 1.05, None), ("all 288 heads", None, 1.6, 1.3))
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(gpu.device)

    def forward():
        return model(ids, logits_to_keep=8).logits

    def plain():
        if peer == FLA:
            return forward()
        with writesae.attach(model, {}, accelerate=True, self_test=False):
            return forward()

    for what, layers, target, aim in arms:
        sites = shape.dictionaries(layers)
        ours, read, theirs = [], [], []
        began = time.perf_counter()
        while len(ours) < FEWEST or len(ours) < ROUNDS and time.perf_counter() - began < PATIENCE and not gpu.dry:
            theirs.append(_wall(gpu, plain))
            with writesae.attach(model, sites, accelerate=True, self_test=False, precision="bf16") as tap:
                ours.append(_wall(gpu, forward))
                logits = forward().float()
                tap.clear()
                read.append(_wall(gpu, forward, lambda tap=tap: tap.firings.activation.sum()))
        expected = plain().float()
        error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        if not error <= 5e-2:
            raise Disagree(f"{what}: hooked logits differ from the plain model's by {error:.1e} (limit 5e-2)")
        for taken, then, asked in ((ours, "", (target, aim)), (read, ", every firing read on the host", (None, None))):
            row = ratio_row(f"{name}: {what} hooked{then}", peer, "x time", taken[2:], theirs[2:], *asked)
            row.note = f"{1e3 * row.seconds:.0f} ms against {1e3 * row.peer_seconds:.0f}, {len(ours) - 2} rounds"
            yield gpu.honest(row)


def _wall(gpu: Gpu, run, after=lambda: None) -> float:
    """Seconds until the device is done, and `after` with what it reads."""
    gpu.synchronize()
    start = time.perf_counter()
    run()
    after()
    gpu.synchronize()
    return time.perf_counter() - start


def collected(options: Options) -> Iterator[Row]:
    """All heads of one layer of the same model, from tokens to Parquet; the device alone names the bottleneck."""
    from ..collect import Corpus, ModelSource, collect
    from ..models import load
    from ..sae import SAE

    gpu = Gpu(options)
    name = "firings collected to Parquet, 16 heads of one layer"
    context, batch, tokens = (32, 2, 200) if gpu.dry else (1024, 8, COLLECTED)
    _, tokenizer = load("default")
    shape, model = _model(gpu)
    layer, size = (shape.layers[-1], 64) if gpu.dry else (LAYER, F)
    sites = {(layer, head): SAE(shape.K, shape.V, size, layer=layer, head=head) for head in range(shape.heads)}
    source = ModelSource(model, sites, accelerate=True, digest="random weights")
    corpus = Corpus.from_name("stdlib:train")
    out = Path(tempfile.mkdtemp(prefix="writesae-bench-"))
    try:
        start = time.perf_counter()
        summary = collect(corpus, tokenizer, source, out / "out", context=context, batch=batch, max_tokens=tokens)
        whole = time.perf_counter() - start
    finally:
        shutil.rmtree(out, ignore_errors=True)
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    batches = max(1, summary["tokens"] // ids.numel())
    with torch.no_grad(), source:
        source.firings(ids, mask)
        passes = sum(_wall(gpu, lambda: source.firings(ids, mask)) for _ in range(batches))
    where = "hooked passes" if passes > 0.5 * whole else "reading, tokenising and storing"
    note = f"{summary['tokens'] / whole:,.0f} tokens/s; hooked passes alone take {passes / whole:.0%} of it: {where}"
    row = Row(name, "", summary["firings"] / whole, "firings/s", seconds=whole, note="" if gpu.dry else note)
    yield gpu.honest(row)


CASES = [
    Case("gpu-model", "Qwen3.5-0.8B (random) on a GPU, hooked", partial(_hooked, OURS), OURS, ()),
    Case("gpu-model-fla", "Qwen3.5-0.8B (random) on a GPU, hooked, against fla", partial(_hooked, FLA), FLA, ()),
    Case("gpu-collect", "firings collected on a GPU", collected, "", ()),
]
