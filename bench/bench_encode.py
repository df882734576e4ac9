"""`encode` on the CPU against the least it must do (its two matrix products alone) and against encoding from states.

    python bench/bench_encode.py [--repeats 9] [--threads N] [--quick]

K = V = 128, F = 2,048, k = 32, float32. The peer products are `torch.mm` into preallocated memory from a transposed
dictionary, the fastest form found; they leave out the running sum, the bias and the selection. Besides wall time there
is a row of processor time on one thread, which a busy machine disturbs less. No ratio where results disagree.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from timing import Row, interleaved, median_and_spread, write_rows

from writesae import Writes, ops

K = V = 128
F, TOP = 2048, 32


def inputs(T: int, H: int) -> tuple[Writes, torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    left = torch.nn.functional.normalize(torch.randn(1, T, H, 1, K, generator=gen), dim=-1)
    decay = -0.05 * torch.rand(1, T, H, generator=gen)
    writes = Writes(decay, left, torch.randn(1, T, H, 1, V, generator=gen))
    v, w = torch.randn(H, F, K, generator=gen), torch.randn(H, F, V, generator=gen)
    return writes, v, w, torch.randn(H, F, generator=gen)


def products(writes: Writes, v: torch.Tensor, w: torch.Tensor):
    """The two products of every head, as fast as the library does them."""
    T, H = writes.shape[1:3]
    pairs = [
        (factor[0, :, h, 0].contiguous(), atoms[h].T.contiguous())
        for h in range(H)
        for factor, atoms in ((writes.left, v), (writes.right, w))
    ]
    out = torch.empty(T, F)

    def run():
        for rows, atoms in pairs:
            torch.mm(rows, atoms, out=out)

    return run


def check(T: int = 300) -> None:
    writes, v, w, b = inputs(T, 2)
    codes = ops.encode(writes, v, w, b, k=TOP, backend="cpu")
    exact = ops.encode(writes.to(torch.float64), v.double(), w.double(), b.double(), k=TOP, backend="reference")
    error = float((codes.values - exact.values).abs().max() / exact.values.abs().max())
    if error > 1e-5:
        sys.exit(f"encode disagrees with the float64 reference by {error:.1e}; no ratio")


def against_products(T: int, H: int, repeats: int, target: float | None) -> list[Row]:
    writes, v, w, b = inputs(T, H)
    ours, theirs = interleaved([lambda: ops.encode(writes, v, w, b, k=TOP), products(writes, v, w)], repeats)
    ratio, spread = median_and_spread([a / c for a, c in zip(ours, theirs, strict=True)])
    rate, rate_spread = median_and_spread([2 * (K + V) * F * T * H / a / 1e9 for a in ours])
    name = f"encode, T = {T:,}, {H} head{'s' * (H > 1)}"
    return [
        Row(name, "its two torch.mm alone", ratio, "x time", target, target and ratio <= target, spread),
        Row(f"{name}: rate", "", rate, "GFLOP/s", None, None, rate_spread),
    ]


def processor_time(T: int, repeats: int) -> Row:
    """The least processor time on one thread: what is left when other programs share the machine."""
    writes, v, w, b = inputs(T, 1)
    runs = [lambda: ops.encode(writes, v, w, b, k=TOP), products(writes, v, w)]
    threads, least = torch.get_num_threads(), [float("inf")] * 2
    torch.set_num_threads(1)
    for _ in range(2 * repeats):
        for i, run in enumerate(runs):
            start = time.process_time()
            run()
            least[i] = min(least[i], time.process_time() - start)
    torch.set_num_threads(threads)
    ratio = least[0] / least[1]
    name = f"encode, T = {T:,}, 1 head: least processor time, 1 thread"
    return Row(name, "its two torch.mm alone", ratio, "x time", 1.2, ratio <= 1.2, 0.0)


def against_states(repeats: int) -> Row:
    T = 1024
    writes, v, w, b = inputs(T, 1)

    def from_states():
        found = []
        for lo in range(0, T, 128):  # the states of all tokens and their products would be 1.1 GB
            states = writes.states(range(lo, lo + 128))[0, :, 0]
            pre = torch.einsum("fk,tkv,fv->tf", v[0], states, w[0]) + b[0]
            found.append(pre.topk(TOP).values.relu())
        return torch.cat(found)

    codes = ops.encode(writes, v, w, b, k=TOP)
    error = float((from_states() - codes.values[0, :, 0]).abs().max() / codes.values.max())
    if error > 1e-4:
        sys.exit(f"encode disagrees with states and einsum by {error:.1e}; no ratio")
    ours, theirs = interleaved([lambda: ops.encode(writes, v, w, b, k=TOP), from_states], min(repeats, 3))
    ratio, spread = median_and_spread([c / a for a, c in zip(ours, theirs, strict=True)])
    return Row(f"encode, T = {T:,}, 1 head", "states and einsum", ratio, "x faster", 20, ratio >= 20, spread)


def flatness(repeats: int, longest: int) -> list[Row]:
    """Time a token at 8,192 and 65,536 tokens over that at 1,024: 1 when nothing grows with the length."""
    lengths = [n for n in (1024, 8192, 65536) if n <= longest]
    calls = []
    for T in lengths:
        x = inputs(T, 1)
        calls.append(lambda x=x: ops.encode(*x, k=TOP))
    taken = interleaved(calls, max(3, repeats // 3))
    rows = []
    for T, seconds in list(zip(lengths, taken, strict=True))[1:]:
        ratio, spread = median_and_spread([a / T / (c / 1024) for a, c in zip(seconds, taken[0], strict=True)])
        name = f"encode, 1 head: time a token at T = {T:,}"
        rows.append(Row(name, "the same at T = 1,024", ratio, "x time", 1.1, ratio <= 1.1, spread))
    return rows


def one_token(H: int, repeats: int) -> Row:
    writes, v, w, b = inputs(1, H)
    carry = torch.randn(1, H, F)
    (taken,) = interleaved([lambda: ops.encode(writes, v, w, b, k=TOP, carry=carry)], 5 * repeats)
    seconds, spread = median_and_spread(taken)
    return Row(f"encode, one token, {H} head{'s' * (H > 1)}", "", seconds * 1e3, "ms", None, None, spread)


def gradient(repeats: int) -> Row:
    T = 1024
    writes, v, w, b = inputs(T, 1)
    factors = [x.requires_grad_() for x in (v, w, b)]

    def both():
        ops.encode(writes, *factors, k=TOP).values.sum().backward()

    def forward():
        with torch.no_grad():
            ops.encode(writes, *factors, k=TOP)

    whole, part = interleaved([both, forward], repeats)
    ratio, spread = median_and_spread([a / c for a, c in zip(whole, part, strict=True)])
    return Row(f"encode, T = {T:,}, 1 head: forward and backward", "forward alone", ratio, "x time", None, None, spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="one length, few repeats, nothing written")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    check()
    if options.quick:
        for row in (*against_products(512, 1, 3, 1.2), one_token(1, 3)):
            print(f"{row.name}: {row.value:.3g} {row.unit}")
        return
    repeats = options.repeats
    rows = [
        *against_products(1024, 1, repeats, 1.2), *against_products(8192, 1, repeats, 1.2),
        *against_products(1024, 16, repeats, 1.2), *against_products(64, 1, repeats, None),
        processor_time(1024, repeats), processor_time(8192, repeats), against_states(repeats),
        *flatness(repeats, 65536), one_token(1, repeats), one_token(16, repeats), gradient(repeats),
    ]  # fmt: skip
    write_rows("encode", rows, isa=torch.ops.writesae.cpu_isa(""))


if __name__ == "__main__":
    main()
