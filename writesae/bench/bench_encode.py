"""`encode` on the CPU against the least it must do (its two matrix products alone) and against encoding from states.

K = V = 128, F = 2,048, k = 32, float32. The peer products are `torch.mm` into preallocated memory from a transposed
dictionary, the fastest form found; they leave out the running sum, the bias and the selection. Rates count the two
products, 2 (K + V) F operations a token and head. A row of processor time on one thread is disturbed less by a busy
machine. Under a channel gate, 32 heads of K = V = 64: against states that lie there already, and their one product.
Of Mamba-2's writes (`ops.ssd`, one key group of K = 128, 32 heads of V = 64) the same products count.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from .. import Writes, ops
from .._library import cpu_isa
from ..testing import dictionary, make_writes
from .case import Case, Disagree, Missing, Options, Row, agree
from .timing import compare, flat_rows, interleaved, median_and_spread, ratio_row

K = V = 128
F, TOP = 2048, 32
ONE_PRODUCT = "one product of states that are there"
PRODUCTS, STATES, FP32 = "its two torch.mm alone", "states and einsum", "the same in fp32"


def _inputs(T: int, H: int) -> tuple[Writes, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes, v `[H, F, 1, K]`, w `[H, F, 1, V]`, b `[H, F]` in float32."""
    generator = torch.Generator().manual_seed(0)
    writes = make_writes(generator, 1, T, H, H, K, V).to(torch.float32)
    return writes, *(x.float() for x in dictionary(generator, H, F, K, V))


def _name(T: int, H: int) -> str:
    return f"encode, T = {T:,}, {H} head{'s' * (H > 1)}"


def _products(writes: Writes, v: torch.Tensor, w: torch.Tensor):
    """The two products of every head, as fast as the library does them."""
    T, H = writes.shape[1:3]
    factors = writes.rank_one("two products")
    pairs = [
        (factor[0, :, h].contiguous(), atoms[h, :, 0].T.contiguous())
        for h in range(H)
        for factor, atoms in zip(factors, (v, w), strict=True)
    ]
    out = torch.empty(T, F)

    def run():
        for rows, atoms in pairs:
            torch.mm(rows, atoms, out=out)

    return run


def _check(T: int, H: int) -> None:
    """Against the float64 reference, on a piece no longer than 300 tokens: the peer products decide nothing."""
    writes, v, w, b = _inputs(min(T, 300), H)
    codes = ops.encode(writes, v, w, b, k=TOP, backend="cpu")
    exact = ops.encode(writes.to(torch.float64), v.double(), w.double(), b.double(), k=TOP, backend="reference")
    agree(f"{_name(T, H)} against the float64 reference", codes.values, exact.values, 1e-5)


def products(options: Options) -> Iterator[Row]:
    sizes = [(256, 1)] if options.quick else [(1024, 1), (8192, 1), (1024, 16)]
    for T, H in sizes:
        _check(T, H)
        writes, v, w, b = _inputs(T, H)
        row = compare(
            _name(T, H), PRODUCTS, "x time", lambda x=(writes, v, w, b): ops.encode(*x, k=TOP),
            _products(writes, v, w), options.rounds(), target=1.6, aim=1.2,
        )  # fmt: skip
        yield row.does(2 * (K + V) * F * T * H, "GFLOP/s", "float32")


@torch.no_grad()
def ssd_writes(options: Options) -> Iterator[Row]:
    """32 heads that share their keys."""
    (T, H), size = (64, 2) if options.quick else (1024, 32), 64
    generator = torch.Generator().manual_seed(0)
    x, B = (torch.randn(1, T, *shape, generator=generator) for shape in ((H, size), (1, K)))
    dt = 0.02 + 0.02 * torch.rand(1, T, H, generator=generator)
    writes = ops.ssd(x, dt, -torch.arange(1.0, H + 1), B / K**0.25, B, return_writes=True).writes
    factors = [y.float() for y in dictionary(generator, H, F, K, size)]

    def ours():
        return ops.encode(writes, *factors, k=TOP)

    name, few = f"encode, ssd's writes, T = {T:,}, {H} heads of {K} x {size}", min(T, 128)
    first = replace(writes, **{part: getattr(writes, part)[:, :few] for part in ("decay", "left", "right")})
    wide = (y.double() for y in factors)
    exact = ops.encode(first.to(torch.float64), *wide, k=TOP, backend="reference")
    agree(f"{name}, against the float64 reference", ours().values[:, :few], exact.values, 1e-5)
    row = compare(name, PRODUCTS, "x time", ours, _products(writes, *factors[:2]), options.rounds(), target=1.2)
    yield row.does(2 * (K + size) * F * T * H, "GFLOP/s", "float32")


def bf16_products(options: Options) -> Iterator[Row]:
    """What `precision="bf16"` gains with this processor's means, named in the row."""
    T, H = (256, 1) if options.quick else (1024, 16)
    writes, v, w, b = _inputs(T, H)
    rounded = ops.encode(*_inputs(min(T, 300), H), k=TOP, precision="bf16")
    wide = [x.to(torch.float64) for x in _inputs(min(T, 300), H)]
    exact = ops.encode(*wide, k=TOP, backend="reference", precision="bf16")
    agree("encode in bf16 against the float64 reference on rounded operands", rounded.values, exact.values, 1e-5)
    row = compare(
        f"{_name(T, H)}, bf16 ({cpu_isa()['bf16']})", FP32, "x faster",
        lambda: ops.encode(writes, v, w, b, k=TOP, precision="bf16"), lambda: ops.encode(writes, v, w, b, k=TOP),
        options.rounds(),
    )  # fmt: skip
    yield row.does(2 * (K + V) * F * T * H, "GFLOP/s", "bfloat16")


def processor_time(options: Options) -> Iterator[Row]:
    """The least processor time on one thread: what is left when other programs share the machine."""
    T = 256 if options.quick else 8192
    _check(T, 1)
    writes, v, w, b = _inputs(T, 1)
    runs = [lambda: ops.encode(writes, v, w, b, k=TOP), _products(writes, v, w)]
    threads, least = torch.get_num_threads(), [float("inf")] * 2
    torch.set_num_threads(1)
    for _ in range(2 * options.rounds()):
        for i, run in enumerate(runs):
            start = time.process_time()
            run()
            least[i] = min(least[i], time.process_time() - start)
    torch.set_num_threads(threads)
    name = f"{_name(T, 1)}: least processor time, 1 thread"
    yield Row(name, PRODUCTS, least[0] / least[1], "x time", 1.6, aim=1.2, seconds=least[0], peer_seconds=least[1])


def from_states(options: Options) -> Iterator[Row]:
    T, piece = 256 if options.quick else 1024, 128
    writes, v, w, b = _inputs(T, 1)

    def theirs():
        found = []
        for lo in range(0, T, piece):  # the states of all tokens and their products would be 1.1 GB
            states = writes.states(range(lo, lo + piece))[0, :, 0]
            pre = torch.einsum("fk,tkv,fv->tf", v[0, :, 0], states, w[0, :, 0]) + b[0]
            found.append(pre.topk(TOP).values.relu())
        return torch.cat(found)

    def ours():
        return ops.encode(writes, v, w, b, k=TOP)

    agree(_name(T, 1), ours().values[0, :, 0], theirs(), 1e-4)
    row = compare(_name(T, 1), STATES, "x faster", ours, theirs, options.rounds(5), target=60, aim=150)
    yield row.does(2 * (K + V) * F * T, "GFLOP/s", "float32")


def channels(options: Options) -> Iterator[Row]:
    """Processor time on one thread of rounds taken in turn. All heads have one dictionary, whose 2,048 dense atoms then
    fit in memory; forming the states is not counted, and would double what the peer takes."""
    size, (T, H) = 64, (32, 2) if options.quick else (256, 32)
    generator = torch.Generator().manual_seed(0)
    writes = make_writes(generator, 1, T, H, H, size, size)
    decay = -0.1 * torch.randn(1, T, H, size, generator=generator).abs()
    v, w, b = (x.float() for x in dictionary(generator, 1, F, size, size))
    for R in (1, 2):
        right = writes.right if R == 1 else torch.cat([0.3 * writes.right.flip(1), writes.right], 3)
        left = writes.left if R == 1 else torch.cat([writes.left.flip(1), writes.left], 3)
        gated = replace(writes, decay=decay, left=left, right=right).to(torch.float32)
        states = gated.states(range(T))[0].flatten(2)  # [T, H, K V]
        atoms = (v[0, :, 0, :, None] * w[0, :, 0, None]).flatten(1).T.contiguous()
        factors = [x.expand(H, *x.shape[1:]).contiguous() for x in (v, w, b)]

        def ours(gated=gated, factors=factors):
            return ops.encode(gated, *factors, k=TOP)

        def theirs(states=states, atoms=atoms):
            return [torch.addmm(b, states[:, h], atoms).topk(TOP).values.relu() for h in range(H)]

        name = f"encode, channel gate, {R} write{'s' * (R > 1)} a token, T = {T:,}, {H} heads of 64 x 64"
        agree(name, ours().values[0], torch.stack(theirs(), 1), 1e-4)
        threads, taken = torch.get_num_threads(), ([], [])
        torch.set_num_threads(1)
        for _ in range(options.rounds(5)):
            for run, seconds in zip((ours, theirs), taken, strict=True):
                start = time.process_time()
                run()
                seconds.append(time.process_time() - start)
        torch.set_num_threads(threads)
        asked = dict(target=12, aim=16) if R == 1 else {}
        yield ratio_row(f"{name}: processor time", ONE_PRODUCT, "x faster", *taken, **asked)


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def memory(options: Options) -> Iterator[Row]:
    """The most resident memory of a call beyond what was there before it and what it returns."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        raise Missing("it is read from Linux' process statistics")
    T = 4096 if options.quick else 65536
    for H in (1, 4):
        inputs = _inputs(T, H)
        ops.encode(*_inputs(256, H), k=TOP)  # the thread pool and the library's own buffers are there
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that stayed resident would be used unseen
        peak.write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        codes = ops.encode(*inputs, k=TOP)
        extra = _resident("VmHWM") - before - sum(x.nbytes for x in (codes.values, codes.indices, codes.carry))
        yield Row(f"{_name(T, H)}: extra memory", "", max(extra, 0) / 1e6, "MB", 64)
        del codes, inputs
        _check(T, H)


def length(options: Options) -> Iterator[Row]:
    """One head at three lengths. The longest result is compared with the same in two pieces, carried over."""
    lengths = (256, 1024) if options.quick else (1024, 8192, 65536)
    writes, *factors = _inputs(lengths[-1], 1)

    def part(lo: int, hi: int) -> Writes:
        return Writes(*(x[:, lo:hi].contiguous() for x in (writes.decay, writes.left, writes.right)))

    whole, half = ops.encode(writes, *factors, k=TOP), lengths[-1] // 2
    first = ops.encode(part(0, half), *factors, k=TOP)
    second = ops.encode(part(half, lengths[-1]), *factors, k=TOP, carry=first.carry)
    agree("encode, whole against in pieces", whole.values, torch.cat([first.values, second.values], 1), 1e-4)
    del whole, first, second
    parts = [part(0, T) for T in lengths]
    runs = [lambda x=x: ops.encode(x, *factors, k=TOP) for x in parts]
    yield from flat_rows("encode, 1 head", lengths, runs, options.rounds(5))


def one_token(options: Options) -> Iterator[Row]:
    for H in (1, 16):
        writes, v, w, b = _inputs(1, H)
        carry = torch.randn(1, H, F, generator=torch.Generator().manual_seed(1))
        wide = (x.double() for x in (v, w, b))
        exact = ops.encode(writes.to(torch.float64), *wide, k=TOP, carry=carry.double(), backend="reference")

        def run(x=(writes, v, w, b), carry=carry):
            return ops.encode(*x, k=TOP, carry=carry)

        agree(f"encode, one token, {H} heads", run().values, exact.values, 1e-5)
        (taken,) = interleaved([run], 10 * options.rounds())
        seconds, spread = median_and_spread(taken)
        name = f"encode, one token, {H} head{'s' * (H > 1)}"
        row = Row(name, "", seconds * 1e3, "ms", spread=spread, seconds=seconds)
        # The factors are read once; those of one head stay in cache, where copying is no ceiling.
        yield row.does(4 * (K + V) * F * H, "GB/s", "copy") if H > 1 else row


def gradient(options: Options) -> Iterator[Row]:
    T = 256 if options.quick else 1024
    writes, *factors = _inputs(T, 1)
    factors = [x.requires_grad_() for x in factors]

    def both():
        values = ops.encode(writes, *factors, k=TOP).values
        values.sum().backward()
        return values.detach()

    def forward():
        with torch.no_grad():
            return ops.encode(writes, *factors, k=TOP).values

    agree(_name(T, 1), both(), forward(), 1e-6)
    if not all(bool(x.grad.isfinite().all()) for x in factors):
        raise Disagree("a gradient is not finite")
    yield compare(f"{_name(T, 1)}: forward and backward", "forward alone", "x time", both, forward, options.rounds())


CASES = [
    Case("encode", "encode, T = 1,024 and 8,192", products, PRODUCTS),
    Case("encode-ssd", "encode, ssd's writes, 32 heads of 128 x 64", ssd_writes, PRODUCTS),
    Case("encode-bf16", "encode, products in bf16", bf16_products, FP32, ("bfloat16", "copy")),
    Case("encode-states", "encode, T = 1,024, 1 head", from_states, STATES),
    Case("encode-channels", "encode, channel gate, 32 heads of 64 x 64", channels, ONE_PRODUCT),
    Case("encode-memory", "encode, T = 65,536: extra memory", memory),
    Case("encode-length", "encode, 1 head: time a token at T = 1 k, 8 k, 64 k", length, "the same at T = 1,024"),
    Case("encode-processor", "encode: least processor time, 1 thread", processor_time, PRODUCTS),
    Case("encode-step", "encode, one token", one_token),
    Case("encode-gradient", "encode, forward and backward", gradient, "forward alone"),
]
