"""A full-size random Qwen3.5-0.8B and Mamba-2-370M, hooked against plain: prefill of 1,024 tokens, cached decoding.

Weights are random (speed does not depend on their values); logits of the accelerated model are compared with the plain
model's before any ratio is printed. Plain and hooked runs are taken in turn, the plain ones with no hook installed; the
ratio is the median over the rounds. A hooked run ends when every firing can be read. Attaching is not timed.

Why rows of Qwen3.5 are missed, by `python bench/profile_model.py DTYPE` (2 cores, Zen 4; seconds, fp32 / bf16 model;
fp32 was taken before the norms had a kernel, bf16 with it and on a slower day):

                                          plain          all 288 heads hooked
    the model's linear products           5.87 / 2.61    6.11 / 2.66
    attention                             0.22 / 0.21    0.22 / 0.22
    recurrence, convolution, norms, ...   1.96 / 1.72    0.83 / 0.82
    encoding                                             1.78 / 1.77
    joining firings                                      0.04 / 0.04
    whole                                 8.05 / 4.54    8.95 / 5.51

What `accelerate=True` may save is the third line, 24 % of the fp32 model and 38 % of the bf16 one. Layer 9 in fp32 at
0.75 of 8.05 s is 6.04 s, less than linear products and attention alone take (6.09 s). The same in bf16, 3.41 s, leaves
0.53 s for what takes 0.82 s with all heads hooked: 0.36 s of it the recurrence (0.22 s where it need not return its
writes), 0.14 s the convolution, 0.05 s norms, 0.12 s the model's own gates, residuals and SiLU, 0.08 s Python (and
attaching, which the benchmark does not time), 0.02 s copies. All 288 heads in fp32: encoding runs at over nine tenths
of `torch.mm`'s rate on its two products alone (`encode`), which is 1.6 s, and saved are 1.1 s. With products in bf16
(1.0 s) both come out a little ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import writesae

from ..models.arguments import cache_of, given_cache
from .case import Case, Disagree, Options, Row
from .timing import ratio_row

TOKENS, F, ACTIVE, LAYER = 1024, 2048, 32, 9


@dataclass(frozen=True)
class FullSize:
    """A model in the shape of a published one, with random weights.

    Attributes:
        name: as the table calls it.
        build: makes it in torch's default dtype.
        heads, K, V: of one layer's state.
        layers: the layers that keep one.
        targets: (target, aim) of one layer hooked, and of all heads, against the plain model's time.
    """

    name: str
    build: Callable[[], Any]
    heads: int
    K: int
    V: int
    layers: tuple[int, ...]
    targets: tuple[tuple[float, float], tuple[float, float]]

    def random(self, dtype: torch.dtype):
        """The model, in evaluation mode."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return self.build().eval()
        finally:
            torch.set_default_dtype(before)

    def dictionaries(self, layers=None) -> dict[tuple[int, int], RandomDictionary]:
        """One for each head of the given layers (default: all)."""
        sites = [(ell, h) for ell in layers or self.layers for h in range(self.heads)]
        return {(ell, h): RandomDictionary(self.K, self.V, self.heads * ell + h) for ell, h in sites}


class RandomDictionary:
    """A bilinear dictionary of random unit factors, as `attach` needs it."""

    kind, k, threshold, r = "bilinear", ACTIVE, None, 1

    def __init__(self, K: int, V: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.K, self.V, self.F, self.d_sae = K, V, F, F
        self.v = torch.nn.functional.normalize(torch.randn(F, 1, K, generator=generator), dim=-1)
        self.w = torch.nn.functional.normalize(torch.randn(F, 1, V, generator=generator), dim=-1)

    def encoder(self):
        return self.v, self.w, torch.zeros(F)


def _qwen3_5():
    """Qwen3.5-0.8B: 24 layers (linear x 3, full x 1), 16 heads of 128 x 128."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            vocab_size=248_320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8,
            num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16,
            linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _mamba2():
    """state-spaces/mamba2-370m: 48 layers, 32 heads of 128 x 64."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=50_288, hidden_size=1024, num_hidden_layers=48, num_heads=32, head_dim=64, state_size=128,
            expand=2, n_groups=1, conv_kernel=4, chunk_size=256, tie_word_embeddings=True,
        )
    )  # fmt: skip


_LINEAR = tuple(i for i in range(24) if i % 4 != 3)
QWEN3_5 = FullSize("Qwen3.5-0.8B (random)", _qwen3_5, 16, 128, 128, _LINEAR, ((0.75, 0.55), (1.0, 0.7)))
MAMBA2 = FullSize("Mamba-2-370M (random)", _mamba2, 32, 128, 64, tuple(range(48)), ((0.6, 0.5), (1.0, 0.7)))


def require_agreement(model, shape: FullSize, ids, sites) -> None:
    """Raises Disagree unless the hooked model's last logits are the plain model's: within 1e-3 (relative RMS) in
    float32, and in bfloat16 no further than the plain model's own from those of its weights in float32."""
    plain = model(ids, logits_to_keep=8).logits.float()
    with writesae.attach(model, sites, accelerate=True, self_test=False):
        hooked = model(ids, logits_to_keep=8).logits.float()
    reference, limit = plain, 1e-3
    if model.dtype != torch.float32:
        reference = shape.random(model.dtype).float()(ids, logits_to_keep=8).logits
        limit = 1.1 * _apart(plain, reference)
    error = _apart(hooked, reference)
    if not error <= limit:
        raise Disagree(f"{model.dtype}: hooked logits are {error:.1e} off (limit {limit:.1e})")


def _apart(found, reference) -> float:
    return float((found - reference).square().mean().sqrt() / reference.square().mean().sqrt())


@torch.no_grad()
def measure(shape: FullSize, dtype: torch.dtype, repeats: int, cases: list[str]) -> Iterator[Row]:
    model = shape.random(dtype)
    name = str(dtype).split(".")[1]
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    one = shape.dictionaries([LAYER])
    require_agreement(model, shape, ids, one)

    if "prefill" in cases:
        yield from prefill_rows(model, shape, ids, one, name, repeats)
    if "decode" in cases:
        sites = {site: dictionary for site, dictionary in one.items() if site[1] == 4}
        yield decode_row(model, ids, sites, f"{shape.name} {name}", repeats)


def prefill_rows(model, shape: FullSize, ids, one, name: str, repeats: int) -> Iterator[Row]:
    every = shape.dictionaries()
    of_one, of_all = shape.targets
    arms = [
        (f"{len(one)} heads of layer {LAYER} hooked", one, "fp32", *of_one),
        (f"all {len(every):,} heads hooked", every, "fp32", *of_all),
        (f"all {len(every):,} heads hooked, encoder's products in bf16", every, "bf16", *of_all),
    ]
    plain: list[float] = []
    hooked: list[list[float]] = [[] for _ in arms]

    def run(tap=None):
        model(ids, logits_to_keep=1)
        if tap is not None and not len(tap.firings):
            raise Disagree("no feature fired")

    for _ in range(repeats + 1):
        plain.append(time_of(run))
        for (_, hooks, precision, *_), taken in zip(arms, hooked, strict=True):
            with writesae.attach(model, hooks, accelerate=True, self_test=False, precision=precision) as tap:
                taken.append(time_of(lambda tap=tap: run(tap)))
    for (what, _, _, target, aim), taken in zip(arms, hooked, strict=True):  # the first round warms up
        yield ratio_row(f"{shape.name} {name}: {what}", PLAIN, "x time", taken[1:], plain[1:], target, aim)


def time_of(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def decode_row(model, ids, sites, name: str, repeats: int) -> Row:
    """Cached decoding, 8 tokens a round after a prompt of 128; plain and hooked continue caches of their own."""

    def decoder():
        out = model(ids[:, :128], use_cache=True, logits_to_keep=1)
        state = {"cache": cache_of(out), "token": out.logits[:, -1:].argmax(-1)}

        def run():
            for _ in range(8):
                out = model(state["token"], **given_cache(model, state["cache"]), use_cache=True)
                state["token"] = out.logits[:, -1:].argmax(-1)

        return run

    plain = decoder()
    with writesae.attach(model, sites, accelerate=True, self_test=False):
        hooked = decoder()
    ours, theirs = [], []
    for _ in range(4 * repeats + 1):  # a round is short, and the machine's clock wanders
        theirs.append(time_of(plain))
        with writesae.attach(model, sites, accelerate=True, self_test=False):
            ours.append(time_of(hooked))
    return ratio_row(f"{name}: cached decoding, one site hooked", PLAIN, "x time", ours[1:], theirs[1:], 1.05, 1.0)


def prefill_and_decode(shape: FullSize, dtype: torch.dtype):
    def run(options: Options) -> Iterator[Row]:
        return measure(shape, dtype, options.rounds(5), ["decode"] if options.quick else ["prefill", "decode"])

    return run


PLAIN = "plain transformers"
CASES = [
    Case(f"{name}-{str(dtype).split('.')[1]}", f"{shape.name} {str(dtype).split('.')[1]}",
         prefill_and_decode(shape, dtype), PLAIN, ceilings)
    for name, shape in (("model", QWEN3_5), ("mamba2", MAMBA2))
    for dtype, ceilings in ((torch.float32, ("float32", "copy")), (torch.bfloat16, ("float32", "bfloat16", "copy")))
]  # fmt: skip
