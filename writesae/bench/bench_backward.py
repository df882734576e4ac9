"""Backward passes on the CPU: the scan's against autograd through transformers' chunked fallback, and codes' to writes.

Only the backward is timed, from one graph kept between rounds. Rates count 16 K V floating-point operations a token and
head of the scan: eight products with a whole state, two of which rebuild it. Memory is what each graph keeps for its
backward, every storage once, the inputs among them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import ops
from ..testing import dictionary, gated_delta_rule_inputs, make_writes
from .case import Case, Options, Row, agree
from .timing import compare, interleaved, ratio_row

SIZE = 128
AGREE = 2e-4  # relative RMS; both compute in float32
CHUNKED = "autograd through transformers' chunked fallback"
PRODUCTS = "seven torch.mm of its sizes"
F, TOP = 2048, 32


def _fallback():
    from transformers.models.qwen3_5 import modeling_qwen3_5

    return modeling_qwen3_5.torch_chunk_gated_delta_rule


def _leaves(T: int, H: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = gated_delta_rule_inputs(1, T, H, H, SIZE, SIZE, dtype=dtype)
    return {name: value.requires_grad_() for name, value in x.items()}


def _ours(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return ops.gated_delta_rule(**x, use_qk_l2norm=True, backend="cpu").o


def _theirs(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return _fallback()(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], use_qk_l2norm_in_kernel=True)[0]


def _kept(run) -> int:
    """Bytes that the graph `run` builds holds for its backward."""
    storages: dict[int, int] = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    del out
    return sum(storages.values())


def backward_row(T: int, H: int, repeats: int, dtype: torch.dtype = torch.float32, **targets) -> Row:
    x = _leaves(T, H, dtype)
    inputs = list(x.values())
    o, peer = _ours(x), _theirs(x)
    d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def ours():
        return torch.autograd.grad(o, inputs, d_o, retain_graph=True)

    def theirs():
        return torch.autograd.grad(peer, inputs, d_o, retain_graph=True)

    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    name = f"scan backward, T = {T:,}, {H} head{'s' * (H > 1)}, {kind}"
    for what, a, b in zip(x, ours(), theirs(), strict=True):
        agree(f"{name}, d_{what}", a, b, AGREE if dtype == torch.float32 else 6e-3)
    row = compare(name, CHUNKED, "x faster", ours, theirs, repeats, **targets)
    return row.does(16 * SIZE * SIZE * T * H, "GFLOP/s", "float32")


def scan(options: Options) -> Iterator[Row]:
    T = 256 if options.quick else 2048
    yield backward_row(T, 16, options.rounds(5), target=3)
    if options.quick:
        return
    yield backward_row(8192, 1, options.rounds(5))
    yield backward_row(T, 16, options.rounds(5), torch.bfloat16)


def step(options: Options) -> Iterator[Row]:
    """Forward and backward together, as a training step has them."""
    T, H = 256 if options.quick else 2048, 16
    x = _leaves(T, H, torch.float32)
    inputs = list(x.values())

    def ours():
        return torch.autograd.grad(_ours(x).sum(), inputs)

    def theirs():
        return torch.autograd.grad(_theirs(x).sum(), inputs)

    name = f"scan forward and backward, T = {T:,}, {H} heads, fp32"
    for what, a, b in zip(x, ours(), theirs(), strict=True):
        agree(f"{name}, d_{what}", a, b, AGREE)
    yield compare(name, CHUNKED, "x faster", ours, theirs, options.rounds(5), target=3)


def memory(options: Options) -> Iterator[Row]:
    T, H = 256 if options.quick else 2048, 16
    x = _leaves(T, H, torch.float32)
    mine, peer = _kept(lambda: _ours(x)), _kept(lambda: _theirs(x))
    name = f"scan, T = {T:,}, {H} heads, fp32: kept for the backward"
    yield Row(f"{name}, a token and head", "", mine / T / H, "bytes")
    yield Row(name, CHUNKED, mine / peer, "x", less_is_better=True)


def codes(options: Options) -> Iterator[Row]:
    """Gradients of the top-k codes' values into decay, left and right, against seven products of their sizes."""
    T, H = 256 if options.quick else 1024, 1
    generator = torch.Generator().manual_seed(0)
    writes = make_writes(generator, 1, T, H, H, SIZE, SIZE).to(torch.float32)
    v, w, b = (y.float() for y in dictionary(generator, H, F, SIZE, SIZE))
    leaves = [y.requires_grad_() for y in (writes.decay, writes.left, writes.right)]
    values = ops.encode(writes, v, w, b, k=TOP, backend="cpu").values
    exact = writes.to(torch.float64)
    indices = ops.encode(writes, v, w, b, k=TOP, backend="cpu").indices
    truth = ops.activations(exact, v.double(), w.double(), indices, b.double(), backend="reference").relu()
    weight = torch.randn(values.shape, generator=generator)

    def ours():
        return torch.autograd.grad(values, leaves, weight, retain_graph=True)

    name = f"codes backward into writes, T = {T:,}, {H} head, F = {F:,}"
    expected = torch.autograd.grad(truth, leaves, weight.double())
    for what, a, c in zip(("decay", "left", "right"), ours(), expected, strict=True):
        agree(f"{name}, d_{what}", a, c, AGREE)
    rows, atoms, wide = torch.randn(T, SIZE), torch.randn(SIZE, F), torch.randn(T, F)
    narrow, out = torch.empty(T, SIZE), torch.empty(T, F)

    def products():
        for _ in range(5):
            torch.mm(rows, atoms, out=out)
        for _ in range(2):
            torch.mm(wide, atoms.T, out=narrow)

    yield ratio_row(name, PRODUCTS, "x time", *interleaved([ours, products], options.rounds()))


CASES = [
    Case("backward-scan", "scan backward, T = 2,048, 16 heads, fp32", scan, CHUNKED),
    Case("backward-step", "scan forward and backward, T = 2,048, 16 heads, fp32", step, CHUNKED),
    Case("backward-memory", "scan, T = 2,048, 16 heads, fp32: kept for the backward", memory, CHUNKED, ()),
    Case("backward-codes", "codes backward into writes, T = 1,024, 1 head, F = 2,048", codes, PRODUCTS),
]
