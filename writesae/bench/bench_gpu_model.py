"""A full-size random Qwen3.5-0.8B on a GPU, hooked against plain, and firings collected a second to Parquet.

The plain model runs on flash-linear-attention where transformers finds it; otherwise its own torch code would be the
peer, so the peer is then the same model with our scan and nothing hooked, and the row says so.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import writesae

from .bench_model import LAYER, QWEN3_5
from .case import Case, Disagree, Options, Row
from .gpu import DRY, Gpu

TOKENS = 8192


@torch.no_grad()
def hooked(options: Options) -> Iterator[Row]:
    gpu = Gpu(options)
    name = f"Qwen3.5-0.8B (random) bf16, {TOKENS:,} tokens"
    arms = ((f"16 heads of layer {LAYER}", [LAYER], 1.05, None), ("all 288 heads", None, 1.6, 1.3))
    if gpu.dry:  # minutes on a CPU: the model is what tests/test_attach.py hooks in small
        for what, _, target, aim in arms:
            yield Row(f"{name}: {what} hooked", "plain transformers", None, "x time", target, aim=aim, note=DRY)
        return
    model = QWEN3_5.random(torch.bfloat16).cuda()
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1)).cuda()
    fla = importlib.util.find_spec("fla") is not None
    peer = "plain model on flash-linear-attention" if fla else "the same model on our scan, unhooked (no fla here)"

    def forward():
        return model(ids, logits_to_keep=8).logits

    def plain():
        if fla:
            return forward()
        with writesae.attach(model, {}, accelerate=True, self_test=False):
            return forward()

    for what, layers, target, aim in arms:
        sites = QWEN3_5.dictionaries(layers)
        ours, theirs = [], []
        for _ in range(8):
            theirs.append(_wall(plain))
            with writesae.attach(model, sites, accelerate=True, self_test=False, precision="bf16") as tap:
                ours.append(_wall(forward, lambda tap=tap: len(tap.firings)))
                logits = forward().float()
        expected = plain().float()
        error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        if not error <= 5e-2:
            raise Disagree(f"{what}: hooked logits differ from the plain model's by {error:.1e} (limit 5e-2)")
        from .timing import ratio_row

        yield ratio_row(f"{name}: {what} hooked", peer, "x time", ours[2:], theirs[2:], target, aim)


def _wall(run, after=lambda: None) -> float:
    """Seconds until the device is done and what `after` reads has come over."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    after()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def collected(options: Options) -> Iterator[Row]:
    """All heads of one layer of the same model, from tokens to Parquet; the device alone names the bottleneck."""
    gpu = Gpu(options)
    name = "firings collected to Parquet, 16 heads of one layer"
    if gpu.dry:
        yield Row(name, "", None, "firings/s", note=DRY)
        return
    from ..collect import Corpus, ModelSource, collect
    from ..models import load

    _, tokenizer = load("default")
    model = QWEN3_5.random(torch.bfloat16).cuda()
    sites = QWEN3_5.dictionaries([LAYER])
    source = ModelSource(model, sites, accelerate=True)
    corpus = Corpus.from_name("stdlib:train")
    out = Path(tempfile.mkdtemp(prefix="writesae-bench-"))
    try:
        start = time.perf_counter()
        summary = collect(corpus, tokenizer, source, out / "out", context=1024, batch=8, max_tokens=400_000)
        whole = time.perf_counter() - start
    finally:
        shutil.rmtree(out, ignore_errors=True)
    ids = torch.randint(model.config.vocab_size, (8, 1024), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    batches = summary["tokens"] // ids.numel()
    with torch.no_grad(), source:
        source.firings(ids, mask)
        passes = sum(_wall(lambda: source.firings(ids, mask)) for _ in range(batches))
    where = "hooked passes" if passes > 0.5 * whole else "reading, tokenising and storing"
    note = f"{summary['tokens'] / whole:,.0f} tokens/s; hooked passes alone take {passes / whole:.0%} of it: {where}"
    yield Row(name, "", summary["firings"] / whole, "firings/s", seconds=whole, note=note)


CASES = [
    Case("gpu-model", "Qwen3.5-0.8B (random) on a GPU, hooked", hooked, "plain model", ()),
    Case("gpu-collect", "firings collected on a GPU", collected, "", ()),
]
