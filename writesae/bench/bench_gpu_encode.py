"""`encode` on a GPU: 16 heads, F = 2,048, k = 32, bf16 products; against the ways that write out what it keeps on chip.

The share of the matrix rate counts the two products, 2 (K + V) F operations a token and head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import Writes, ops
from ..ops._encode_gradient import writes_gradient
from ..ops.reference.encode import backward as factors_gradient
from ..ops.reference.encode import decay_matrix
from ..testing import dictionary, make_writes
from .case import Case, Options, Row, agree
from .gpu import Gpu, Run

SIZE, F, TOP, HEADS, TOKENS = 128, 2048, 32, 16, 32768
AGREE = 2e-2  # relative RMS of the values kept, bf16 products both
BACKWARD_AGREE = 1e-4  # float32 both
BLOCK = 64
LAYER, ASKED = 8192, 10 / 18  # tokens; ms, so that the 18 layers of Qwen3.5-0.8B take 10


def _inputs(gpu: Gpu, T: int) -> tuple[Writes, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes and factors whose numbers bfloat16 holds exactly, on the device."""
    H, features = (2, 64) if gpu.dry else (HEADS, F)
    generator = torch.Generator().manual_seed(0)
    w = make_writes(generator, 1, T, H, H, SIZE, SIZE).to(torch.float32)
    left, right = (x.bfloat16().float().to(gpu.device) for x in (w.left, w.right))
    v, w_enc, b = (x.float() for x in dictionary(generator, H, features, SIZE, SIZE))
    v, w_enc = (x.bfloat16().float().to(gpu.device) for x in (v, w_enc))
    return Writes(w.decay.to(gpu.device), left, right), v, w_enc, b.to(gpu.device)


def _unfused(writes: Writes, v, w, b, k: int) -> torch.Tensor:
    """Two bf16 products, the running sum in blocks of 64 tokens, torch.topk: pre-activations go through memory."""
    T, H = writes.shape[1:3]
    kept = []
    for h in range(H):
        left, right = (x[0].squeeze(1).bfloat16() for x in writes.head(h).rank_one("two products"))
        add = (left @ v[h, :, 0].bfloat16().T).float() * (right @ w[h, :, 0].bfloat16().T).float()
        whole = T // BLOCK * BLOCK
        reach = decay_matrix(writes.decay[0, :whole, h].reshape(-1, BLOCK))
        pre = [torch.bmm(reach, add[:whole].reshape(-1, BLOCK, add.shape[1]))]
        carry, start = torch.zeros_like(add[0]), writes.decay[0, :whole, h].reshape(-1, BLOCK).cumsum(1).exp()
        for i in range(len(pre[0])):
            pre[0][i] += start[i, :, None] * carry
            carry = pre[0][i, -1]
        flat = pre[0].flatten(0, 1)
        kept.append((flat + b[h]).topk(k).values.relu())
    return torch.stack(kept, 1)


def _from_states(writes: Writes, v, w, b, k: int, piece: int) -> torch.Tensor:
    found = []
    for lo in range(0, writes.shape[1], piece):
        states = writes.states(range(lo, min(lo + piece, writes.shape[1])))[0]
        pre = torch.stack(
            [torch.einsum("fk,tkv,fv->tf", v[h, :, 0], states[:, h], w[h, :, 0]) for h in range(states.shape[1])], 1
        )
        found.append((pre + b).topk(k).values.relu())
    return torch.cat(found)


def profiled(gpu: Gpu) -> Run:
    """The largest call of `encode`."""
    writes, v, w, b = _inputs(gpu, 128 if gpu.dry else TOKENS)

    @torch.no_grad()
    def run():
        return ops.encode(writes, v, w, b, k=8 if gpu.dry else TOP, precision="bf16", backend=gpu.backend)

    return run


@torch.no_grad()
def encode(options: Options) -> Iterator[Row]:
    gpu = Gpu(options)
    k, T, short = (8, 128, 64) if gpu.dry else (TOP, TOKENS, 1024)
    writes, v, w, b = _inputs(gpu, T)
    H, features = v.shape[:2]
    few = Writes(writes.decay[:, :short], writes.left[:, :short], writes.right[:, :short])

    def ours(writes=writes):
        return ops.encode(writes, v, w, b, k=k, precision="bf16", backend=gpu.backend)

    name = f"encode, {HEADS} heads x {TOKENS:,} tokens, bf16"
    exact = ops.encode(few.to(torch.float64), v.double(), w.double(), b.double(), k=k, backend="reference")
    agree(f"{name} against the reference", ours(few).values, exact.values, AGREE)
    row = Row(f"{name}: share of the matrix rate", "torch.mm in bf16", None, "of it", 0.4, aim=0.65)
    (replayed,), row.note = gpu.graphs([ours])
    row.seconds = gpu.seconds(replayed)
    gpu.bound(row, 4 * SIZE * features * T * H, "GFLOP/s", "bfloat16")
    if not gpu.dry:
        row.value, row.met = row.share, row.share >= row.target
    yield row
    if not gpu.dry:
        yield _memory(name, ours, writes, features)
    layer = few if gpu.dry else Writes(*(x[:, :LAYER] for x in (writes.decay, writes.left, writes.right)))
    row = gpu.alone(f"encode, {HEADS} heads x {LAYER:,} tokens (a layer of a model), bf16", lambda: ours(layer), ASKED)
    yield gpu.bound(row, 4 * SIZE * features * layer.shape[1] * H, "GFLOP/s", "bfloat16")
    # The unfused way needs 1.3 GB of pre-activations and their products a head; the shorter call suffices for a ratio.
    part = few if gpu.dry else Writes(*(x[:, : T // 4] for x in (writes.decay, writes.left, writes.right)))
    agree(f"{name} against products, running sum and topk", ours(part).values[0], _unfused(part, v, w, b, k), AGREE)
    yield gpu.ratio(
        f"encode, {HEADS} heads x {TOKENS // 4:,} tokens, bf16", "two products, running sum, torch.topk", "x faster",
        lambda: ours(part), lambda: _unfused(part, v, w, b, k), target=3,
    )  # fmt: skip
    agree(f"{name} against states", ours(few).values[0], _from_states(few, v, w, b, k, 64), AGREE)
    yield gpu.ratio(
        f"encode, {HEADS} heads x 1,024 tokens, bf16", "states and einsum", "x faster", lambda: ours(few),
        lambda: _from_states(few, v, w, b, k, 64), target=30,
    )  # fmt: skip


def backward(options: Options) -> Iterator[Row]:
    """From the gradient of the codes to those of the dictionary, and to those of the writes; float32."""
    gpu = Gpu(options)
    k, T = (8, 128) if gpu.dry else (TOP, TOKENS)
    writes, v, w, b = _inputs(gpu, T)
    H, features = v.shape[:2]
    heads, peer = list(range(H)), "the same in torch, block by block"
    leaves = {
        "dictionary": {"v_enc": v, "w_enc": w},
        "writes": {"decay": writes.decay, "left": writes.left, "right": writes.right},
    }
    for of, given in leaves.items():
        length = T if of == "dictionary" else T // 4  # torch goes head by head: shorter suffices
        part = Writes(*(x[:, :length] for x in (writes.decay, writes.left, writes.right)))
        given = {name: (x if of == "dictionary" else getattr(part, name)).detach() for name, x in given.items()}
        given = {name: x.requires_grad_() for name, x in given.items()}
        used = part if of == "dictionary" else Writes(**given)
        factors = list(given.values()) if of == "dictionary" else [v, w]
        values, indices = _values(used, *factors, b, k, gpu.backend)
        grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(gpu.device)
        taken = grad * (values.detach() > 0)

        def ours(values=values, given=given, grad=grad):
            return torch.autograd.grad(values, list(given.values()), grad, retain_graph=True)

        def theirs(of=of, part=part, indices=indices, taken=taken):
            if of == "dictionary":
                return factors_gradient(part, v, w, heads, indices, taken)[:2]
            return writes_gradient(part, v, w, heads, indices, taken, None)[:3]

        name = f"encode's backward, {HEADS} heads x {TOKENS if of == 'dictionary' else TOKENS // 4:,} tokens: {of}"
        with torch.no_grad():
            for key, got, expected in zip(given, ours(), theirs(), strict=True):
                agree(f"{name}: d{key}", got, expected, BACKWARD_AGREE)
            row = gpu.ratio(name, peer, "x faster", ours, theirs, target=1.0)
        yield gpu.bound(row, 8 * SIZE * features * length * H, "GFLOP/s", "float32")


def _values(writes: Writes, v, w, b, k: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes = ops.encode(writes, v, w, b, k=k, backend=backend)
    return codes.values, codes.indices


def _memory(name: str, ours, writes: Writes, features: int) -> Row:
    """What a call takes at its peak beyond its inputs and outputs, over the pre-activations it never stores."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    codes = ours()
    torch.cuda.synchronize()
    kept = codes.values.nbytes + codes.indices.nbytes + codes.carry.nbytes
    extra = torch.cuda.max_memory_allocated() - before - kept
    T, H = writes.shape[1:3]
    share = extra / (4 * T * H * features)
    return Row(f"{name}: peak extra memory", "the pre-activations", share, "relative", 0.01)


CASES = [
    Case("gpu-encode", "encode on a GPU, bf16", encode, "two products, running sum, torch.topk", ()),
    Case("gpu-encode-backward", "encode's backward on a GPU, float32", backward, "torch, block by block", ()),
]
