"""`gated_delta_rule` on a GPU against other packages' kernels in the same run: flash-linear-attention, FlashQLA and
FlashInfer; bf16, K = V = 128.

Fair to both: as many key heads as the model has (all three read grouped heads), both replayed as CUDA graphs, and keys
and queries normalised beforehand for both, or inside by both where the row says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import ops
from .bench_gpu_scan import AGREE, SHAPES, SIZE, inputs, shape_of
from .case import Case, Options, Row, agree
from .gpu import Gpu, peer

FLA, QLA, INFER = "flash-linear-attention", "FlashQLA", "FlashInfer"
SCALE = SIZE**-0.5
Scan = Callable[..., tuple[Tensor, Tensor]]  # inputs by name, inside → o, final state [B, H, K, V]


def _chunked(module: str, package: str) -> Scan:
    """Of the two that share a signature."""
    rule = peer(module, "chunk_gated_delta_rule", package)

    def scan(x: dict[str, Tensor], inside: bool) -> tuple[Tensor, Tensor]:
        return rule(
            x["q"], x["k"], x["v"], x["g"], x["beta"], scale=SCALE, output_final_state=True,
            use_qk_l2norm_in_kernel=inside,
        )  # fmt: skip

    return scan


def _flashinfer(B: int, T: int, device: str) -> Scan:
    """FlashInfer's, of packed sequences, gates as factors, float32, its state `[B, H, V, K]`."""
    rule = peer("flashinfer.gdn_prefill", "chunk_gated_delta_rule", INFER)
    offsets = torch.arange(0, (B + 1) * T, T, device=device)

    def scan(x: dict[str, Tensor], inside: bool) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (x[name].flatten(0, 1) for name in ("q", "k", "v", "factor", "beta32"))
        o, state = rule(
            q, k, v, g, beta, SCALE, None, True, offsets, use_qk_l2norm_in_kernel=inside,
        )  # fmt: skip
        return o.view(B, T, *o.shape[1:]), state.mT

    return scan


def _of(name: str, B: int, T: int, device: str) -> Scan:
    if name == INFER:
        return _flashinfer(B, T, device)
    return _chunked("fla.ops.gated_delta_rule" if name == FLA else "flash_qla", name)


@torch.no_grad()
def _sequences(name: str, options: Options) -> Iterator[Row]:
    gpu = Gpu(options)
    for shape in SHAPES[:2]:  # of the same heads: Triton tunes its kernels anew, for minutes, where those change
        B, T, Hk, H = shape_of(gpu, *shape)
        theirs = _of(name, B, T, gpu.device)
        x = inputs(gpu, B, T, Hk, H)
        normal = {key: normalize(x[key].float(), dim=-1).bfloat16() if key in "qk" else x[key] for key in x}
        for inside in (False, True) if name == FLA else (False,):
            given = x if inside else normal
            packed = given | {"factor": x["g"].exp(), "beta32": x["beta"].float()}

            def ours(given=given, inside=inside):
                return ops.gated_delta_rule(
                    **given, use_qk_l2norm=inside, scale=SCALE, output_final_state=True, backend=gpu.backend
                )

            def run(theirs=theirs, packed=packed, inside=inside):
                return theirs(packed, inside)

            where = "q and k normalised inside by both" if inside else "q and k normalised before"
            label = "scan, {} x {:,}, {} / {} heads, bf16, ".format(*shape) + where
            (o, state), out = run(), ours()
            agree(label, out.o, o, AGREE)
            agree(f"{label}: final state", out.final_state, state, AGREE)
            yield gpu.ratio(
                label, name, "x faster", ours, run, target=1.0, aim=2.0 if name == FLA else None, graph=True
            )


def backward(options: Options) -> Iterator[Row]:
    """From the gradients of o and of the final state to those of q, k, v, g and beta; of the first shape."""
    gpu = Gpu(options)
    shape = SHAPES[0]
    B, T, Hk, H = shape_of(gpu, *shape)
    theirs = _of(FLA, B, T, gpu.device)
    x = {key: value.requires_grad_() for key, value in inputs(gpu, B, T, Hk, H).items()}
    generator = torch.Generator().manual_seed(0)
    d_o = torch.randn(x["v"].shape, generator=generator).to(gpu.device, torch.bfloat16)
    d_state = torch.randn(B, H, SIZE, SIZE, generator=generator).to(gpu.device)
    out = ops.gated_delta_rule(
        **x, use_qk_l2norm=True, scale=SCALE, output_final_state=True, backend=gpu.backend
    )  # fmt: skip

    def of(outputs):
        return torch.autograd.grad(outputs, list(x.values()), (d_o, d_state), retain_graph=True)

    ours, run = partial(of, (out.o, out.final_state)), partial(of, theirs(x, True))
    label = "scan's backward, {} x {:,}, {} / {} heads, bf16, q and k normalised inside by both".format(*shape)
    for key, got, other in zip(x, ours(), run(), strict=True):
        agree(f"{label}: d{key}", got, other, 2 * AGREE)
    yield gpu.ratio(label, FLA, "x faster", ours, run, target=1.0, aim=1.5)


@torch.no_grad()
def step(options: Options) -> Iterator[Row]:
    """One token: fla's recurrent kernel, which takes as many key heads as value heads or fewer."""
    gpu = Gpu(options)
    rule = peer("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule", FLA)
    B, Hk, H = (2, 1, 2) if gpu.dry else (64, 16, 64)
    x = inputs(gpu, B, 1, Hk, H)
    now = {name: value[:, 0].contiguous() for name, value in x.items()}
    start = torch.randn(B, H, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(gpu.device)
    state = start.clone()
    call = {"scale": SCALE, "use_qk_l2norm": True, "backend": gpu.backend}

    def ours():
        return ops.gated_delta_rule_step(**now, state=state, **call).o

    def theirs():
        return rule(**x, scale=SCALE, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True)[0]

    label = f"one token of {B} sequences, {Hk} / {H} heads of {SIZE} x {SIZE}, bf16"
    agree(label, ours(), theirs()[:, 0], AGREE)
    yield gpu.ratio(label, f"{FLA}'s recurrent kernel", "x faster", ours, theirs, target=1.0, graph=True)


def _case(stem: str, name: str) -> Case:
    return Case(f"gpu-peer-{stem}", f"scan on a GPU against {name}, bf16", partial(_sequences, name), name, ())


CASES = [
    _case("fla", FLA),
    _case("flashqla", QLA),
    _case("flashinfer", INFER),
    Case("gpu-peer-step", f"one token on a GPU against {FLA}, bf16", step, FLA, ()),
    Case("gpu-peer-backward", f"the scan's backward on a GPU against {FLA}, bf16", backward, FLA, ()),
]
