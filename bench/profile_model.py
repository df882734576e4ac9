"""Where the seconds of `writesae bench model-bfloat16` go: python bench/profile_model.py [DTYPE] [PRECISION]

Prints, by kind of operation, the milliseconds of one prefill of 1,024 tokens: plain, and with all 288 heads hooked.
Arguments: dtype of the model, and precision of the encoder's products.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import torch

import writesae
from writesae.bench.bench_model import QWEN3_5, TOKENS

# Operators that do the work themselves; the rest goes by its own name.
KINDS = {
    "linear products": ("aten::mm", "aten::addmm"),
    "products of many matrices": ("aten::bmm", "aten::baddbmm"),
    "triangular solves": ("aten::linalg_solve_triangular",),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "copies": ("aten::copy_",),
    "multiply, add, sigmoid, ...": tuple(f"aten::{x}" for x in "mul add sub silu sigmoid exp pow mean".split()),
}
KIND_OF = {operator: kind for kind, operators in KINDS.items() for operator in operators}


def profile(what: str, run) -> None:
    run()
    start = time.perf_counter()
    run()
    whole = 1e3 * (time.perf_counter() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    taken, calls = Counter(), Counter()
    for event in profiler.key_averages():
        kind = KIND_OF.get(event.key, event.key)
        taken[kind] += event.self_cpu_time_total / 1e3
        calls[kind] += event.count
    print(f"{what}: {whole:.0f} ms, under the profiler {sum(taken.values()):.0f} ms")
    for kind, milliseconds in taken.most_common(14):
        print(f"  {milliseconds:8.1f}  {calls[kind]:6d} x {kind}")


@torch.no_grad()
def main(dtype: str = "bfloat16", precision: str = "fp32") -> None:
    model = QWEN3_5.random(getattr(torch, dtype))
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    profile(f"{dtype}, plain", lambda: model(ids, logits_to_keep=1))
    sites = QWEN3_5.dictionaries()

    def hooked():
        with writesae.attach(model, sites, accelerate=True, self_test=False, precision=precision) as tap:
            with torch.profiler.record_function("the model's forward, Python around it"):
                model(ids, logits_to_keep=1)
            len(tap.firings)

    profile(f"{dtype}, {len(sites)} heads hooked, encoder in {precision} (attaching included)", hooked)


if __name__ == "__main__":
    main(*sys.argv[1:])
