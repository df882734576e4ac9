"""`gated_delta_rule`, its backward and its step on a GPU, bf16, K = V = 128, q and k normalised inside; what its writes
and edits cost. Other packages' kernels on the same inputs are in bench_gpu_peers.py.

Rates count the least that must move: q, k, v, g, beta read and o written once; the step's state read and written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import Edits, ops
from ..testing import gated_delta_rule_inputs
from .case import Case, Disagree, Options, Row, agree
from .gpu import Gpu, Run

SIZE, AGREE = 128, 2e-2  # relative RMS of two bf16 computations
SHAPES = ((1, 32768, 16, 64), (4, 8192, 16, 64), (1, 8192, 16, 16))
ASKED = {SHAPES[0]: 1.67, SHAPES[1]: 1.68}  # ms: half of what flash-linear-attention took on an H200, as published
DRAWN = 4096  # tokens; longer sequences repeat them


def inputs(gpu: Gpu, B: int, T: int, Hk: int, H: int) -> dict[str, torch.Tensor]:
    x = gpu.put(gated_delta_rule_inputs(B, min(T, DRAWN), Hk, H, SIZE, SIZE, dtype=torch.bfloat16), T)
    return x | {"g": x["g"].float(), "beta": x["beta"]}


def shape_of(gpu: Gpu, B: int, T: int, Hk: int, H: int) -> tuple[int, int, int, int]:
    return (min(B, 2), 70, 1, 2) if gpu.dry else (B, T, Hk, H)


def profiled(gpu: Gpu) -> Run:
    """The largest call of `sequences`."""
    x = inputs(gpu, *shape_of(gpu, *SHAPES[0]))

    @torch.no_grad()
    def run():
        return ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True, backend=gpu.backend)

    return run


@torch.no_grad()
def sequences(options: Options) -> Iterator[Row]:
    gpu = Gpu(options)
    for shape in SHAPES:
        B, T, Hk, H = shape_of(gpu, *shape)
        x = inputs(gpu, B, T, Hk, H)
        name = "scan, {} x {:,}, {} / {} heads, bf16".format(*shape)

        def ours(x=x):
            return ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True, backend=gpu.backend)

        few = {key: value[:, :300] for key, value in x.items()}
        exact = ops.gated_delta_rule(**few, use_qk_l2norm=True, backend="reference")
        agree(f"{name} against the reference", ours(few).o, exact.o, AGREE)
        row = gpu.alone(name, ours, ASKED.get(shape))
        moved = 2 * (2 * B * T * Hk * SIZE + 2 * B * T * H * SIZE) + 6 * B * T * H
        yield gpu.bound(row, moved, "GB/s", "copy")


def backward(options: Options) -> Iterator[Row]:
    """From the gradients of o and of the final state to those of q, k, v, g and beta."""
    gpu = Gpu(options)
    for shape in SHAPES:
        B, T, Hk, H = shape_of(gpu, *shape)
        x = {name: value.requires_grad_() for name, value in inputs(gpu, B, T, Hk, H).items()}
        name = "scan's backward, {} x {:,}, {} / {} heads, bf16".format(*shape)
        generator = torch.Generator().manual_seed(0)
        d_o = torch.randn(x["v"].shape, generator=generator).to(gpu.device, torch.bfloat16)
        d_state = torch.randn(B, H, SIZE, SIZE, generator=generator).to(gpu.device)

        def of(outputs, leaves, d_o=d_o, d_state=d_state):
            return torch.autograd.grad(outputs, leaves, (d_o, d_state), retain_graph=True)

        def run(x, backend):
            out = ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True, backend=backend)
            return out.o, out.final_state

        few = {key: value.detach()[:, :300].requires_grad_() for key, value in x.items()}
        given = {"d_o": d_o[:, :300], "d_state": d_state}
        found = (of(run(few, backend), list(few.values()), **given) for backend in (gpu.backend, "reference"))
        for key, got, exact in zip(few, *found, strict=True):
            agree(f"{name} against the reference: d{key}", got, exact, AGREE)
        outputs, leaves = run(x, gpu.backend), list(x.values())

        def ours(outputs=outputs, leaves=leaves, of=of):
            return of(outputs, leaves)

        row = gpu.alone(name, ours, graph=False)
        # q, k, v, g, beta and dO read, dq, dk, dv, dg and dbeta written, once.
        moved = 2 * (4 * B * T * Hk * SIZE + 3 * B * T * H * SIZE) + 12 * B * T * H
        yield gpu.bound(row, moved, "GB/s", "copy")


@torch.no_grad()
def writes(options: Options) -> Iterator[Row]:
    """What writes cost, and 100 edits a sequence."""
    gpu = Gpu(options)
    for shape in SHAPES[:2]:
        B, T, Hk, H = shape_of(gpu, *shape)
        x = inputs(gpu, B, T, Hk, H)
        count = 8 if gpu.dry else 100
        generator = torch.Generator().manual_seed(0)
        row = torch.arange(B).repeat_interleave(count)
        edits = Edits(
            row, torch.randint(T // 2, T, (B * count,), generator=generator),
            torch.randint(H, (B * count,), generator=generator),
            torch.randn(B * count, SIZE, generator=generator), torch.randn(B * count, SIZE, generator=generator),
        )  # fmt: skip
        call = {"use_qk_l2norm": True, "backend": gpu.backend}

        def plain(x=x, call=call):
            return ops.gated_delta_rule(**x, **call)

        def with_writes(x=x, call=call):
            return ops.gated_delta_rule(**x, **call, return_writes=True)

        def with_edits(x=x, call=call, edits=edits):
            return ops.gated_delta_rule(**x, **call, edits=edits)

        name = "scan, {} x {:,}, {} / {} heads, bf16".format(*shape)
        o, edited = plain().o, with_edits().o
        agree(f"{name} returning its writes", with_writes().o, o, AGREE)
        agree(f"{name} with edits, before the first of them", edited[:, : T // 2], o[:, : T // 2], AGREE)
        if torch.equal(edited[:, T // 2 :], o[:, T // 2 :]):
            raise Disagree("the edits changed nothing")
        same = "the same without"
        yield gpu.ratio(f"{name}: returning the writes", same, "x time", with_writes, plain, target=1.10)
        yield gpu.ratio(f"{name}: {count} edits a sequence", same, "x time", with_edits, plain, target=1.05)


@torch.no_grad()
def step(options: Options) -> Iterator[Row]:
    gpu = Gpu(options)
    B, H = (2, 2) if gpu.dry else (64, 64)
    Hk = H if gpu.dry else 16
    x = inputs(gpu, B, 1, Hk, H)
    now = {name: value[:, 0].contiguous() for name, value in x.items()}
    start = torch.randn(B, H, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(gpu.device)
    state = start.clone()

    def ours():
        return ops.gated_delta_rule_step(**now, state=state, use_qk_l2norm=True, backend=gpu.backend).o

    name = f"one token of 64 sequences, 16 / 64 heads of {SIZE} x {SIZE}, bf16"
    exact = ops.gated_delta_rule(**x, initial_state=start, use_qk_l2norm=True, backend="reference")
    agree(f"{name} against the reference", ours(), exact.o[:, 0], AGREE)
    yield gpu.bound(gpu.alone(name, ours), 8 * state.numel(), "GB/s", "copy")


CASES = [
    Case("gpu-scan", "scan on a GPU, bf16", sequences, "", ()),
    Case("gpu-scan-backward", "the scan's backward on a GPU, bf16", backward, "", ()),
    Case("gpu-scan-writes", "scan on a GPU: writes and edits", writes, "the same without", ()),
    Case("gpu-step", "one token on a GPU, bf16", step, "", ()),
]
