"""`gated_delta_rule` on the CPU against transformers' own fallbacks, interleaved.

    python bench/bench_gated_delta_rule.py [--repeats 9] [--threads N] [--quick]

No ratio is printed where the two results disagree. Absolute rates count 6 K V floating-point operations a token and
head (three multiply-adds a state element), the least the token-by-token form can do.
"""

from __future__ import annotations

import argparse
import sys

import torch
from timing import Row, interleaved, median_and_spread, write_rows
from transformers.models.qwen3_5 import modeling_qwen3_5 as peer

from writesae import Edits, ops
from writesae._library import cpu_isa
from writesae.testing import difference, gated_delta_rule_inputs

AGREE = 1e-4  # relative RMS; both compute in float32


def agree(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    found = difference(ours, theirs)
    if found.rms > AGREE:
        sys.exit(f"{name}: results disagree (relative RMS {found.rms:.1e}, worst element {found.worst:.1e}); no ratio")


def sequence_rows(T: int, H: int, target: float, repeats: int, dtype: torch.dtype = torch.float32) -> list[Row]:
    x = gated_delta_rule_inputs(1, T, H, H, 128, 128, dtype=dtype)

    def ours():
        return ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True)

    def theirs():
        return peer.torch_chunk_gated_delta_rule(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], use_qk_l2norm_in_kernel=True, output_final_state=True
        )

    name = f"scan, T = {T:,}, {H} head{'s' * (H > 1)} of 128 x 128, {str(dtype).removeprefix('torch.')}"
    out, (o, state) = ours(), theirs()
    agree(name, out.final_state, state)
    if dtype == torch.float32:
        agree(name, out.o, o)
    fast, slow = interleaved([ours, theirs], repeats)
    ratio, spread = median_and_spread([b / a for a, b in zip(fast, slow, strict=True)])
    rate, rate_spread = median_and_spread([6 * 128 * 128 * T * H / a / 1e9 for a in fast])
    met = ratio >= target
    return [
        Row(name, "transformers' chunked fallback", ratio, "x faster", target, met, spread),
        Row(f"{name}: rate", "", rate, "GFLOP/s", None, None, rate_spread),
    ]


def extra_rows(repeats: int) -> list[Row]:
    """What writes and edits cost on top."""
    T, H = 2048, 4
    x = gated_delta_rule_inputs(1, T, H, H, 128, 128)
    generator = torch.Generator().manual_seed(0)
    edits = Edits(
        torch.zeros(8, dtype=torch.int64), torch.randint(0, T, (8,), generator=generator), [0, 1, 2, 3] * 2,
        torch.randn(8, 128), torch.randn(8, 128),
    )  # fmt: skip
    runs = [
        lambda: ops.gated_delta_rule(**x, use_qk_l2norm=True),
        lambda: ops.gated_delta_rule(**x, use_qk_l2norm=True, return_writes=True),
        lambda: ops.gated_delta_rule(**x, use_qk_l2norm=True, edits=edits),
    ]
    plain, writes, edited = interleaved(runs, repeats)
    rows = []
    for name, taken in (("returning the writes", writes), ("eight edits", edited)):
        ratio, spread = median_and_spread([b / a for a, b in zip(plain, taken, strict=True)])
        rows.append(Row(f"scan, T = {T:,}, {H} heads: {name}", "the same without", ratio, "x time", None, None, spread))
    return rows


def step_rows(repeats: int) -> list[Row]:
    x = gated_delta_rule_inputs(1, 1, 16, 16, 128, 128)
    now = {name: value[:, 0] for name, value in x.items()}
    start = torch.randn(1, 16, 128, 128)
    state = start.clone()

    def ours():
        return ops.gated_delta_rule_step(**now, state=state, use_qk_l2norm=True).o

    def theirs():
        return peer.torch_recurrent_gated_delta_rule(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=start, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    name = "one token, 16 heads of 128 x 128, float32"
    agree(name, ours(), theirs()[:, 0])
    fast, slow = interleaved([ours, theirs], 20 * repeats, warmup=20)
    ratio, spread = median_and_spread([b / a for a, b in zip(fast, slow, strict=True)])
    rate, rate_spread = median_and_spread([1e6 * a for a in fast])
    return [
        Row(name, "transformers' recurrent fallback", ratio, "x faster", None, None, spread),
        Row(f"{name}: time", "", rate, "us", None, None, rate_spread),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="the 16-head case only")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with torch.no_grad():
        rows = sequence_rows(2048, 16, 5.0, args.repeats)
        if not args.quick:
            rows += sequence_rows(8192, 1, 3.0, args.repeats) + sequence_rows(8192, 2, 3.0, args.repeats)
            rows += sequence_rows(2048, 16, 5.0, args.repeats, torch.bfloat16)
            rows += extra_rows(args.repeats) + step_rows(args.repeats)
    write_rows("gated_delta_rule", rows, isa=cpu_isa()["kernels"], repeats=args.repeats)


if __name__ == "__main__":
    main()
