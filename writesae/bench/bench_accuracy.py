"""How exact the kernels are: the worst errors against float64, and top-k sets against float64 states.

The scan runs over lengths, sizes, grouped heads, decays, correlated keys and every instruction set of this processor;
the encoder's top-32 sets of 2,048 are compared with those of `v^T S w` over float64 states.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .._library import cpu_isa as supported
from ..ops import encode, gated_delta_rule
from ..testing import cpu_isa, difference, gated_delta_rule_inputs
from .case import Case, Options, Row

SIZES = ((1, 1, 128, 128), (2, 4, 32, 64), (1, 2, 64, 40), (1, 1, 256, 128), (2, 2, 20, 12))
LENGTHS, DECAYS = (1, 63, 64, 65, 127, 1024), ("usual", "none", "weak", "strong")
TOKENS, F, ACTIVE = 1024, 2048, 32


def scan_rows() -> list[Row]:
    rows = []
    for isa in supported()["supported"].split(","):
        rms = worst = 0.0
        cases = 0
        for (Hk, H, K, V), T, decay, correlated in itertools.product(SIZES, LENGTHS, DECAYS, (False, True)):
            x = gated_delta_rule_inputs(1, T, Hk, H, K, V, decay=decay, correlated=correlated, seed=cases)
            options = {"use_qk_l2norm": True, "output_final_state": True, "return_writes": True}
            with cpu_isa(isa):
                got = gated_delta_rule(**x, **options, backend="cpu")
            exact = gated_delta_rule(**{n: y.double() for n, y in x.items()}, **options, backend="reference")
            for read in (lambda out: out.o, lambda out: out.final_state, lambda out: out.writes.right):
                found = difference(read(got), read(exact))
                rms, worst, cases = max(rms, found.rms), max(worst, found.worst), cases + 1
        rows.append(Row(f"scan, fp32, {isa}: relative RMS error, worst of {cases} tensors", "float64 reference", rms,
                        "relative", 2e-5, rms <= 2e-5))  # fmt: skip
        rows.append(Row(f"scan, fp32, {isa}: worst element over the largest magnitude", "float64 reference", worst,
                        "relative"))  # fmt: skip
    return rows


def encode_rows() -> list[Row]:
    rows = []
    unit = torch.nn.functional.normalize
    for decay in DECAYS:
        x = gated_delta_rule_inputs(1, TOKENS, 1, 1, 128, 128, decay=decay, correlated=True, seed=7)
        options = {"use_qk_l2norm": True, "return_writes": True}
        writes = gated_delta_rule(**x, **options).writes
        # The same float32 writes on both sides: what is judged is the encoder, over states in float64.
        v, w = (unit(torch.randn(1, F, 128, generator=torch.Generator().manual_seed(i)), dim=-1) for i in (1, 2))
        exact, wide = torch.empty(TOKENS, F, dtype=torch.float64), writes.to(torch.float64)
        for lo in range(0, TOKENS, 64):
            states = wide.states(list(range(lo, lo + 64)))[0, :, 0]
            exact[lo : lo + 64] = torch.einsum("fk,tkv,fv->tf", v[0].double(), states, w[0].double())
        for precision in ("fp32", "bf16"):
            codes = encode(writes, v, w, k=ACTIVE, backend="cpu", precision=precision)
            rows += agreement_rows(f"encode, {precision}, {decay} decay", codes.indices[0, :, 0], exact, precision)
    return rows


def agreement_rows(name: str, found: torch.Tensor, exact: torch.Tensor, precision: str) -> Iterator[Row]:
    """How far the sets found `[T, k]` are those of the activations `exact` `[T, F]`. bf16 is reported alone."""
    targets = (99.9, 1e-5) if precision == "fp32" else (None, None)
    best = exact.topk(ACTIVE).indices
    chosen = torch.zeros_like(exact, dtype=torch.bool).scatter(1, found, True)
    common = chosen.gather(1, best).sum(1)
    peer = "float64 states"
    yield Row(f"{name}: equal top-{ACTIVE} sets of {F:,}", peer, 100 * float((common == ACTIVE).double().mean()), "%",
              targets[0])  # fmt: skip
    if precision != "fp32":
        yield Row(f"{name}: features in common", peer, 100 * float(common.double().mean()) / ACTIVE, "%")
    # Where a set differs, the features exchanged must be nearly tied in float64.
    kth = exact.gather(1, best[:, -1:])
    gap = float(((kth - exact.gather(1, found)).clamp_min(0) / exact.abs().amax(1, keepdim=True)).max())
    yield Row(f"{name}: largest miss over the largest activation", peer, gap, "relative", targets[1])


@torch.no_grad()
def scan(options: Options) -> Iterator[Row]:
    yield from scan_rows()


@torch.no_grad()
def top_sets(options: Options) -> Iterator[Row]:
    yield from encode_rows()


CASES = [
    Case("accuracy-scan", "scan, fp32: relative RMS error", scan, "float64 reference"),
    Case("accuracy-encode", "encode: equal top-32 sets of 2,048", top_sets, "float64 states"),
]
